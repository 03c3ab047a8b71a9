"""Tables as Markdown and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxzs.files import atomic_path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 2) -> str:
    """A Markdown table; floats are rounded to `digits`, columns aligned to read well as plain text too.

    >>> print(report.markdown_table(["method", "accuracy"], [["zero-shot", 87.123]]))
    | method    | accuracy |
    | :-------- | -------: |
    | zero-shot |    87.12 |
    """
    cells = [[_cell(value, digits) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    widths = [max(width, 4) for width in widths]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
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
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def write_csv(path: str | Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV, atomically; None is an empty cell.

    >>> from pathlib import Path
    >>> report.write_csv("table.csv", ["method", "accuracy"], [["zero-shot", 87.12], ["proxies", None]])
    >>> Path("table.csv").read_text().splitlines()
    ['method,accuracy', 'zero-shot,87.12', 'proxies,']
    """
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
