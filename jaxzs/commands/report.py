"""`jaxzs report RESULTS...`: tables and plots of the records of runs."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.options import File, OutputOptions, check_output_file, check_output_folder, shown_as
from jaxzs.commands.run import command_line
from jaxzs.commands.terminal import counted
from jaxzs.errors import RecordError

if TYPE_CHECKING:
    from jaxzs.report import Record

_SHOWN = 10  # skipped files named on the terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions(OutputOptions):
    results: Annotated[tuple[str, ...], tyro.conf.Positional, shown_as("RESULTS ...")] = ()
    """Records (.json), folders with records anywhere below, or globs."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("report")
    """Folder for report.md, figures.csv and the plots."""
    html: File = None
    """Write a page to look at in a browser: of one record all its images, of several their figures; plots."""


def run(options: ReportOptions) -> int:
    """Read, write the tables and plots; returns 0, or 1 when a file that was named could not be used."""
    check_output_folder(options.out)
    check_output_file(options.html, ".html", name="html")
    from jaxzs.files import atomic_path
    from jaxzs.report import read_record, write_csv, write_page
    from jaxzs.report.summary import CSV_HEADER, csv_rows, draw, report_text, rows_of

    named, found = find_records(options.results, besides=options.out)
    records, skipped = [], {}
    for path in sorted({*named, *found}):  # each once, also if it was named and found
        try:
            records.append(read_record(path))
        except RecordError as error:
            # Folders hold other .json files, too: what is no record is told, but is no error.
            skipped[path] = str(error)
    if not records:
        first = f"; the first: {next(iter(skipped.values()))}" if skipped else ""
        raise RecordError(
            f"no record of a run among {len(skipped)} .json files of {', '.join(options.results)}{first}. "
            "Records are the .json files that commands and experiments write (demo.json, --out, ...)"
        )
    rows = rows_of(records)
    pictures = draw(records, rows, options.out)
    text = report_text(records, rows, pictures)
    with atomic_path(options.out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_csv(options.out / "figures.csv", CSV_HEADER, csv_rows(rows))
    options.say(text)
    written = [str(options.out / name) for name in ("report.md", "figures.csv", *(n for _, n in pictures))]
    made = counted(len(records), "record"), counted(len(rows), "number"), counted(len(pictures), "plot")
    options.say(f"{', '.join(made)} written to {options.out}")
    if options.html is not None:
        write_page(options.html, _joined(options, records), plots=[(title, options.out / n) for title, n in pictures])
        options.say(f"page written to {options.html}")
    if skipped:
        lines = [f"  {reason}" for reason in list(skipped.values())[:_SHOWN]]
        lines += [f"  and {len(skipped) - _SHOWN} more"] * (len(skipped) > _SHOWN)
        options.notice(
            "\n".join([f"{counted(len(skipped), 'file')} {'is' if len(skipped) == 1 else 'are'} not used:", *lines])
        )
    options.print_record(
        {
            "command": command_line(options),
            "records": [str(record.path) for record in records],
            "skipped": {str(path): reason for path, reason in skipped.items()},
            "figures": [dict(zip(CSV_HEADER, row, strict=True)) for row in csv_rows(rows)],
            "written": written,
        }
    )
    # Only what was named in full was surely meant to be a record.
    return INCOMPLETE if named & skipped.keys() else FINISHED


def _joined(options: ReportOptions, records: Sequence[Record]) -> dict[str, Any]:
    """One record as it is; of several their figures, and which they are."""
    if len(records) == 1:
        return dict(records[0].raw)
    figures = [dataclasses.asdict(figure) for record in records for figure in record.results.figures]
    return {
        "command": command_line(options),
        "figures": figures,
        "settings": {str(record.path): record.command for record in records},
    }


def find_records(places: tuple[str, ...], besides: Path) -> tuple[set[Path], set[Path]]:
    """JSON files that are named in full, and those found in folders and by globs, not below `besides`.

    Raises `RecordError` for no places, a place that does not exist, and a glob without matches.
    """
    if not places:
        raise RecordError("no records given: name .json files that runs have written, folders or globs")
    named: set[Path] = set()
    found: set[Path] = set()
    for place in places:
        path = Path(place).expanduser()  # a ~ in quotes comes as it is
        if not place:  # to Path it is the current folder
            raise RecordError("an empty text names no records: name files, folders or globs, or . for this folder")
        if path.is_dir():
            found.update(path.rglob("*.json"))
        elif path.exists():
            named.add(path)
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            if not matches:
                raise RecordError(f"no such file or folder: {place}")
            for match in matches:
                found.update(match.rglob("*.json") if match.is_dir() else [match])
    # What an earlier report has written there is no result, and features that `evaluate` has kept are none.
    results = {path for path in found if not path.resolve().is_relative_to(besides.resolve()) and not _in_store(path)}
    return named, results - named


def _in_store(path: Path) -> bool:
    """Whether a file describes stored features, or a chunk of them."""
    return path.name == "store.json" or (path.name == "chunk.json" and (path.parents[1] / "store.json").is_file())
