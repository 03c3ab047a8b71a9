"""Tables as Markdown and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxzs.files import atomic_path

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for the beginning of one


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 2) -> str:
    """A Markdown table; floats are rounded to `digits`, columns aligned to read well as plain text too.

    >>> print(report.markdown_table(["method", "accuracy"], [["zero-shot", 87.123]]))
    | method    | accuracy |
    | :-------- | -------: |
    | zero-shot |    87.12 |
    """
    cells = [[_cell(value, digits) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    widths = [max(width, 4) for width in widths]  # room for the rule below the header
    # A column goes to the right where all of it are numbers.
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(header))
    ]
    line = lambda row: (  # noqa: E731
        "| "
        + " | ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        )
        + " |"
    )
    rule = [
        "-" * (width - 1) + ":" if to_right else ":" + "-" * (width - 1)
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(list(header)), line(rule), *map(line, cells)])


def _cell(value: Any, digits: int) -> str:
    if value is None:  # nothing was measured there
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    return " ".join(str(value).splitlines()).replace("|", "\\|")  # a name cannot begin another cell or row


def write_csv(path: str | Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV, atomically; None is an empty cell.

    A text that a spreadsheet would take for a formula (it begins with = + - @, a tab or a return) gets a ' in front.
    Bytes of a file name that are no UTF-8 are written as they are.

    >>> from pathlib import Path
    >>> report.write_csv("table.csv", ["method", "accuracy"], [["zero-shot", 87.12], ["proxies", None]])
    >>> Path("table.csv").read_text().splitlines()
    ['method,accuracy', 'zero-shot,87.12', 'proxies,']
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        plain, quoted = (csv.writer(file, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        for row in (header, *rows):
            cells = [_harmless(cell) for cell in row]
            # A return alone ends a row for readers, but is not quoted by Python's writer.
            (quoted if any("\r" in str(cell) for cell in cells) else plain).writerow(cells)


def _harmless(cell: Any) -> Any:
    if cell is None:
        return ""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
