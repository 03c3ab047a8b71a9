"""Many records as one set of tables and plots, published numbers beside the measured ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxzs.report import plots
from jaxzs.report.published import Published, published_beside
from jaxzs.report.records import Record
from jaxzs.report.results import Figure
from jaxzs.report.tables import markdown_table

CSV_HEADER = (
    "data", "protocol", "figure", "method", "value_percent", "deviation", "passes", "published_percent", "published_in",
    "model", "fingerprint", "record",
)  # fmt: skip


_COLUMNS = 8  # numbers of a line that can be read


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured number, the record it is from, and the published one that it may be compared with."""

    figure: Figure
    record: Record
    published: Published | None


def rows_of(records: Iterable[Record]) -> list[Row]:
    """All numbers of all records, by data set; within one in the order of the records."""
    rows = [
        Row(figure, record, published_beside(figure, record.model, record.data))
        for record in records
        for figure in record.results.figures
    ]
    return sorted(rows, key=lambda row: row.figure.data)  # stable


def csv_rows(rows: Iterable[Row]) -> list[list[Any]]:
    """`rows_of` for a spreadsheet, under `CSV_HEADER`."""
    return [
        [
            row.figure.data,
            row.figure.protocol,
            row.figure.figure,
            row.figure.method,
            row.figure.value,
            row.figure.deviation,
            row.figure.passes,
            row.published.figure.value if row.published else None,
            f"{row.published.paper}; {row.published.table}" if row.published else None,
            (row.record.model or {}).get("name"),
            (row.record.model or {}).get("fingerprint"),
            str(row.record.path),
        ]
        for row in rows
    ]


def report_text(records: Sequence[Record], rows: Sequence[Row], pictures: Sequence[tuple[str, str]]) -> str:
    """The Markdown report: a table a data set, pictures (title, file name), and where everything is from."""
    parts = ["# Results", "All numbers in percent, ± standard deviation over runs."]
    for data, own in _by_data(rows):
        parts += [f"## {data}", _figures_table(own)]
        sources = dict.fromkeys((row.published.paper, row.published.table) for row in own if row.published)
        parts += [f"Published: {paper}; {table}." for paper, table in sources]
        parts += [f"![{title}]({name})" for title, name in pictures if title.startswith(f"{data}: ")]
    # Data sets of which there are curves but no numbers have no table.
    named = {data for data, _ in _by_data(rows)}
    rest = [(title, name) for title, name in pictures if title.split(": ")[0] not in named]
    parts += [f"![{title}]({name})" for title, name in rest]
    parts += ["## Records", _records_table(records)]
    return "\n\n".join(parts) + "\n"


def draw(records: Sequence[Record], rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """Every plot that the records carry data for, in `folder`: (title, file name) of each."""
    drawn: list[tuple[str, str]] = []

    def name(title: str) -> Path:
        # Titles that differ in signs only have one slug: it is numbered.
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        taken, number = {kept for _, kept in drawn}, 1
        while (file := f"{slug}{'' if number == 1 else f'-{number}'}.png") in taken:
            number += 1
        drawn.append((title, file))
        return folder / file

    for data, own in _by_data(rows):
        # Less of it is better, among accuracies; reliability has a plot of its own.
        own = [row for row in own if row.figure.figure != "ECE"] or own
        # A single dot compares nothing.
        if len({(row.figure.method, row.record.path) for row in own}) > 1:
            plots.plot_figures(name(f"{data}: accuracy by method"), *_told_apart(own))
    for record in records:
        for per_class in record.results.per_class:
            named = ", ".join(filter(None, (per_class.method, per_class.protocol)))
            plots.plot_per_class(name(f"{per_class.data}: change per class, {named}"), per_class)
        for confusion in record.results.confusion:
            named = ", ".join(filter(None, (confusion.method, confusion.protocol)))
            plots.plot_confusion(name(f"{confusion.data}: confusion, {named}"), confusion)
        for methods in _by_protocol(record.results.reliability):
            named = ", ".join(filter(None, ("reliability", methods[0].protocol)))
            plots.plot_reliability(name(f"{methods[0].data}: {named}"), methods)
        for curves in _groups(record.results.convergence):
            plots.plot_convergence(name(f"{curves[0].data}: convergence of proxies"), curves)
        for curves in _groups(record.results.pseudolabels):
            plots.plot_pseudolabels(name(f"{curves[0].data}: K against pseudolabel accuracy"), curves)
    return drawn


def _told_apart(rows: Sequence[Row]) -> tuple[list[Figure], list[Figure]]:
    """Measured and published figures; a method of several records carries the name of its record."""
    places: dict[str, set[Path]] = {}
    for row in rows:
        places.setdefault(row.figure.method, set()).add(row.record.path)

    def named(figure: Figure, row: Row) -> Figure:
        # Two dots of one name in a row could not be told apart.
        several = len(places[figure.method]) > 1
        own = f"{figure.method} ({row.record.path.stem})" if several else figure.method
        return dataclasses.replace(figure, method=own)

    measured = [named(row.figure, row) for row in rows]
    return measured, [named(row.published.figure, row) for row in rows if row.published]


def _by_data(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    names = dict.fromkeys(row.figure.data for row in rows)
    return [(name, [row for row in rows if row.figure.data == name]) for name in names]


def _groups(curves: Sequence[Any]) -> list[list[Any]]:
    names = dict.fromkeys(curve.data for curve in curves)
    return [[curve for curve in curves if curve.data == name] for name in names]


def _by_protocol(curves: Sequence[Any]) -> list[list[Any]]:
    """Methods that were measured on the same images in the same setting belong into one picture."""
    names = dict.fromkeys((curve.data, curve.protocol) for curve in curves)
    return [[curve for curve in curves if (curve.data, curve.protocol) == name] for name in names]


def _figures_table(rows: Sequence[Row]) -> str:
    """Methods down; kinds of numbers across, each with its published column where there is one.

    Of many protocols each has lines of its own.
    """
    by_line = len({(row.figure.figure, row.figure.protocol) for row in rows}) > _COLUMNS
    # The same method in several records: model and record tell the lines apart.
    several = len({row.record.path for row in rows}) > 1
    columns: dict[tuple[str, ...], None] = {}
    lines: dict[tuple[str, ...], dict[tuple[str, ...], Row]] = {}
    for row in rows:
        protocol = (row.figure.protocol,)
        column = (row.figure.figure, *(() if by_line else protocol))
        where = (_model(row.record), str(row.record.path)) if several else ()
        columns[column] = None
        lines.setdefault((row.figure.method, *(protocol if by_line else ()), *where), {})[column] = row
    # A column of published numbers only where there is one.
    compared = [c for c in columns if any(c in own and own[c].published for own in lines.values())]
    header = ["method", *(["protocol"] if by_line else []), *(["model", "record"] if several else [])]
    for column in columns:
        header.append(", ".join(filter(None, column)))
        if column in compared:
            header.append(f"{header[-1]} (published)")
    counted = {key: dict.fromkeys(r.figure.passes for r in own.values()) for key, own in lines.items()}
    if any(count is not None for own in counted.values() for count in own):
        header.append("passes")
    table = []
    for key, own in lines.items():
        line: list[str] = [*key]
        for column in columns:
            found = own.get(column)
            line.append("" if found is None else _value(found.figure))
            if column in compared:
                there = found.published if found else None
                line.append("" if there is None else _value(there.figure))
        if header[-1] == "passes":
            line.append(", ".join(f"{count:g}" for count in counted[key] if count is not None))
        table.append(line)
    return markdown_table(header, table)


def _value(figure: Figure) -> str:
    spread = "" if figure.deviation is None else f" ± {figure.deviation:.1f}"
    return f"{figure.value:.1f}{spread}"


def _model(record: Record) -> str:
    return str((record.model or {}).get("name", ""))


def _records_table(records: Sequence[Record]) -> str:
    header = ["record", "command", "model", "device", "jax", "revision", "date", "compile s", "run s"]
    table = []
    for record in records:
        raw, seconds = record.raw, record.seconds
        table.append(
            [
                str(record.path),
                f"`{record.command}`",
                " ".join(filter(None, (_model(record), str((record.model or {}).get("fingerprint", ""))[:12]))),
                raw.get("device", ""),
                raw.get("versions", {}).get("jax", "") if isinstance(raw.get("versions"), dict) else "",
                raw.get("git_revision") or "",
                str(raw.get("date", ""))[:10],
                *(f"{seconds[n]:.1f}" if n in seconds else "" for n in ("compile", "run")),
            ]
        )
    return markdown_table(header, table)
