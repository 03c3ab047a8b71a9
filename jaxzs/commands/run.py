"""What every run of a command does around its own work: measure, load, tell, record, write, and end with a code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxzs.commands import FINISHED, INCOMPLETE, terminal
from jaxzs.commands.options import option
from jaxzs.commands.terminal import counted, one_line
from jaxzs.errors import DataError, JaxzsError

if TYPE_CHECKING:
    from jaxzs.clip import Model
    from jaxzs.data import FolderSource, Pairing, PassedOver
    from jaxzs.report import Results
    from jaxzs.report.page import Maps

_SHOWN = 20  # lines on the terminal of what is written in full elsewhere
_UNRECORDED = ("json", "quiet", "out", "html", "no_cache", "device")  # options that change no result


class Run:
    """One run of a command. Its order: identity of the inputs, work, files, screen.

    options: of the command, whose name follows from their class. settings: what else the result depends on.
    data, model: entries of the record, once known.
    unusable: why inputs could not be used, by their names; a run that has some ends with exit code 1.
    """

    def __init__(self, options: Any) -> None:
        self.options = options
        self.command = command_of(options)
        self.settings: dict[str, Any] = {}
        self.data: dict[str, Any] | None = None
        self.model: Model | None = None
        self.notices: list[str] = []
        self.passed_over: PassedOver | None = None
        self.unusable: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    # --- the work -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def measured(self, kept: Callable[[], str] = lambda: "nothing is kept") -> Iterator[None]:
        """Seconds of the block become those of the record; Ctrl-C inside of it says what is kept."""
        from jaxzs.report import measured

        try:
            with measured() as seconds:
                yield
        except KeyboardInterrupt as stop:
            # A block inside has said already what is kept, and knows it better.
            raise KeyboardInterrupt(stop.args[0] if stop.args else kept()) from None
        self.seconds = {**seconds, **self.seconds}  # what the command has set itself stays

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.started

    def find_images(self) -> list[Path]:
        """Paths of the images that the options name; the record's data, as they were before the work."""
        return [Path(file) for file in self.open_images().files]

    def open_images(self) -> FolderSource:
        """The images that the options name, with the classes of their subfolders; tells what was passed over."""
        from jaxzs.data import open_images

        if not self.options.images:
            raise DataError("no images given: name a folder, files or globs")
        source = open_images(self.options.images)
        self.of_data(self.options.images[0], source.identity, len(source))
        self.pass_over(source.passed_over)
        return source

    def pass_over(self, passed: PassedOver | None) -> None:
        """Tells what lies beside the images; a folder that cannot be read makes the run incomplete."""
        self.passed_over = passed
        for line in passed.notices() if passed else ():
            self.notice(line)

    def of_data(self, place: str, identity: str, images: int) -> None:
        """The record's data: named as the data set, or as the folder."""
        from jaxzs.report import data_entry

        name = getattr(self.options, "dataset", None) or Path(place).name
        self.data = data_entry(name, identity, images)

    def load_model(self, names: Sequence[str] = (), *, images_only: bool = False) -> Model:
        """The checkpoint; raises `TextError` for names that the demo checkpoint has never seen, unless forced.

        images_only: a checkpoint of the vision tower alone will do.
        """
        from jaxzs.clip import find_checkpoint, towers_of

        name, revision = self.options.model, self.options.revision
        with self.step(f"loading {name}"):
            alone = images_only and towers_of(find_checkpoint(name, revision=revision)) == ("vision",)
            self.model = self.options.load(("vision",) if alone else ("text", "vision"))
        if getattr(self.options, "truncate", False):
            self.model = dataclasses.replace(
                self.model, tokenizer=dataclasses.replace(self.model.tokenizer, truncate=True)
            )
        if names and not self.options.force:
            self.model.check_words(names)
        return self.model

    def load_one_size(self, names: Sequence[str]) -> Model:
        """The same for what needs one grid of patches for all images: NaFlex as a tower of one size."""
        from jaxzs.clip import fixed_size

        model = self.load_model(names)
        self.model = fixed_size(model)
        if self.model is not model:
            side = self.model.config.vision.image_size
            self.notice(
                f"note: {model.name} is used as SigLIP 2 of {side} x {side} pixels, not for any aspect (NaFlex)"
            )
        return self.model

    # --- what is told and kept ------------------------------------------------------------------------------------

    def notice(self, text: str) -> None:
        """What a user should know beside the answer: on standard error, and in the record."""
        self.notices.append(text)
        self.options.notice(text)

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """What takes seconds inside of the block, with a clock, for a person who waits at a terminal."""
        with terminal.clock(doing, disable=self.options.no_progress):
            yield

    def tell_pairing(self, pairing: Pairing) -> None:
        """Which class each label of the data is, unless all are written alike; the first of many."""
        if pairing.given == pairing.found:
            return
        labels = zip(pairing.lines(), pairing.found, pairing.places, strict=True)
        # What is written alike is worth no line, in whatever order.
        lines = [line for line, label, place in labels if pairing.how != "label" or label != pairing.given[place]]
        if not lines:
            return
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        alike = [f"{len(pairing.found) - len(lines)} written alike"] if len(lines) < len(pairing.found) else []
        self.notice(f"labels of the data, matched by {pairing.how}: {', '.join([*lines[:_SHOWN], *more, *alike])}")

    def fail(self, name: str | Path, error: JaxzsError) -> None:
        """An input that could not be used."""
        reason = error.shown(on_command_line=True)
        # Most errors name their file.
        self.unusable[str(name)] = reason if str(name) in reason else f"{name}: {reason}"

    def skip(self, reasons: Sequence[str]) -> None:
        """Inputs that could not be used, by reasons that name them."""
        self.unusable.update(zip(reasons, reasons, strict=True))  # a reason names its input, and is its own key

    def check_any(self, usable: Sized, verb: str = "used") -> None:
        """Raise `DataError` when nothing could be used."""
        if not usable:
            first = next(iter(self.unusable.values()), "")
            raise DataError(f"none of the {len(self.unusable)} images could be {verb}; the first: {first}")

    def record(self, results: Results, rows: Sequence[Any] | None = None, **more: Any) -> dict[str, Any]:
        """The record of the run, not yet written. rows: what was found of each image; more: keys of its own."""
        from jaxzs.report import write_record

        if self.notices:
            more["notices"] = self.notices
        if self.passed_over and (passed := self.passed_over.record()):
            more["passed_over"] = passed
        # Of images also where all could be used: the empty list says so.
        if self.data:
            more["unreadable"] = list(self.unusable.values())
        record = write_record(
            None,
            command=command_line(self.options),
            settings=settings_of(self.options) | self.settings,
            results=results,
            model=self.model,
            data=self.data,
            seconds=self.seconds,
            **more,
        )
        # Not through `write_record`, which has an argument of this name.
        return record if rows is None else record | {"results": list(rows)}

    def write(self, record: dict[str, Any], path: Path | None) -> None:
        """The record as .json, also beside a table of another suffix."""
        from jaxzs.files import write_json

        if path is not None:
            write_json(path.with_suffix(".json"), record)

    def write_table(self, path: Path | None, header: Sequence[str], cells: Sequence[Sequence[Any]]) -> None:
        """The results as a table, where a .csv file is asked for. Before the record, which holds them too."""
        from jaxzs.report import write_csv

        if path is not None and path.suffix.lower() == ".csv":
            write_csv(path, header, cells)

    def write_page(self, record: dict[str, Any], maps: Maps | None = None) -> None:
        """The results as a page for a browser, where --html asks for one. maps: heat maps of tags by path."""
        from jaxzs.report import write_page

        if self.options.html is None:
            return
        page = write_page(self.options.html, record, maps=maps)
        pictures = "" if page.pictures == page.images else f", pictures of {page.pictures:,}"
        size = f"{page.bytes / 1e6:.1f} MB" if page.bytes >= 1e6 else f"{page.bytes / 1e3:.0f} kB"
        self.wrote(f"page of {counted(page.images, 'image')}{pictures}, {size},", self.options.html)

    def wrote(self, what: str, where: Path | None) -> None:
        """Tells where a file went, or a folder."""
        if where is not None and not self.options.quiet:
            self.options.say(f"{what} written to {where}")

    def finish(self, record: dict[str, Any], closing: str = "") -> int:
        """The last line, the record with --json, the inputs that could not be used; returns the exit code."""
        if closing:
            self.options.say(closing)
        self.options.print_record(record)
        if not self.unusable:
            # A folder that could not be read may have held images.
            return INCOMPLETE if self.passed_over and self.passed_over.unreadable_folders else FINISHED
        total = self.data["images"] if self.data else len(self.unusable)
        lines = [f"  {one_line(reason)}" for reason in list(self.unusable.values())[:_SHOWN]]
        if len(self.unusable) > _SHOWN:
            lines.append(f"  and {len(self.unusable) - _SHOWN} more, all named in the record")
        head = f"{len(self.unusable)} of {counted(total, 'image')} could not be used:"
        terminal.warn("\n".join([head, *lines]))  # also with --quiet: something is missing from the answer
        return INCOMPLETE


def say_rows(options: Any, rows: Sequence[dict[str, Any]], labels: str, *, in_file: bool) -> None:
    """A line an image: its path, and label and score of each entry of `labels`; the first 20 if a file has all."""
    shown = rows[:_SHOWN] if in_file else rows
    width = max(len(one_line(row["path"])) for row in shown)
    for row in shown:
        found = "  ".join(f"{one_line(entry['label'])} {entry['score']:.3f}" for entry in row[labels])
        options.say(f"{one_line(row['path']):{width}}  {found}")
    if len(shown) < len(rows):
        options.say(f"... and {len(rows) - len(shown)} more")


# --- options as they are recorded ---------------------------------------------------------------------------------


def command_of(options: Any) -> str:
    """The command that a class of options belongs to: `ClassifyOptions` are of `jaxzs classify`."""
    return type(options).__name__.removesuffix("Options").lower()


def settings_of(options: Any) -> dict[str, Any]:
    """All options that a result depends on, as JSON values."""
    own = {name: value for name, value in dataclasses.asdict(options).items() if name not in _UNRECORDED}
    return json.loads(json.dumps(own, default=str))  # paths as texts, tuples as lists


def command_line(options: Any) -> str:
    """`jaxzs COMMAND` with every option that is not the default, as it could be typed."""
    positional, named = [], []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        values = [str(one) for one in (value if isinstance(value, tuple) else (value,))]
        # Types are texts here: annotations are not evaluated in modules of options.
        if "Positional" in str(field.type) or str(field.type) == "Images":
            positional += [] if value is None else values
        elif value != default and field.name not in ("json", "quiet"):
            named += [option(field.name), *([] if value is True else values)]  # a flag has no value
    return shlex.join(["jaxzs", command_of(options), *positional, *named])
