"""Options that several commands have: the same name, default, wording and checks everywhere."""

from __future__ import annotations

import collections
import dataclasses
import json as json_format
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro

from jaxzs.commands import terminal
from jaxzs.errors import DataError, LabelError, RecordError

if TYPE_CHECKING:
    from jaxzs.clip import Model, Numerics
    from jaxzs.data import DatasetInfo


def shown_as(metavar: str | None = None) -> Any:
    """How the help shows an option that may be left out; its text says what happens then."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")  # instead of "(default: None)"


def left_out(kind: Callable[[str], Any], choices: tuple[str, ...] = ()) -> Any:
    """For an option of a kind that may be left out: else the word "None" would do that, and errors name it."""

    def typed(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError as error:
            raise ValueError(f"expected a number, not {words[0]!r}") from error

    return tyro.constructors.PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=typed,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
        choices=choices or None,
    )


def one_of(words: Any) -> Any:
    """For an option that is one of the words of a Literal, or left out."""
    return left_out(str, get_args(words))


_Device = Literal["cpu", "gpu", "tpu"]
Text = Annotated[str | None, left_out(str), shown_as("TEXT")]
File = Annotated[Path | None, left_out(Path), shown_as("FILE")]
Folder = Annotated[Path | None, left_out(Path), shown_as("DIR")]
Number = Annotated[int | None, left_out(int), shown_as("INT")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
ByPosition = Annotated[
    bool,
    tyro.conf.arg(
        help_behavior_hint="", help="Pair class names with the data's own in their order, whatever they say."
    ),
]
Images = Annotated[tuple[str, ...], tyro.conf.Positional, shown_as("IMAGES ...")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What every command says, and where."""

    json: Flag = False
    """Print the record of the run as JSON on standard output, and nothing else there."""
    quiet: Flag = False
    """Neither progress nor notices."""

    def say(self, text: str = "") -> None:
        """Part of the answer, for people: on standard output, which --json keeps for the record."""
        if not self.json:  # the record is alone on standard output, for a program that reads it
            terminal.say(text)

    def notice(self, text: str) -> None:
        """What a user should know beside the answer: on standard error."""
        if not self.quiet:
            terminal.warn(text)

    def print_record(self, record: dict[str, Any]) -> None:
        """With --json, the record."""
        if self.json:
            terminal.say(json_format.dumps(record, indent=2, allow_nan=False))  # NaN would be no JSON

    @property
    def no_progress(self) -> bool | None:
        """For tqdm's `disable`: None shows progress on terminals only."""
        return True if self.quiet else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What is computed on, and whether compiled programs are kept."""

    device: Annotated[_Device | None, one_of(_Device), shown_as()] = None
    """What to compute on; by default the fastest that jax finds."""
    no_cache: Flag = False
    """Keep no compiled programs and texts; else they are in JAXZS_CACHE, by default jaxzs/ in your cache folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(ComputeOptions):
    """Which checkpoint, and how it computes."""

    model: str = "demo"
    """demo or art, which are inside the package, a folder or file, or a hub id such as openai/clip-vit-base-patch32."""
    revision: Text = None
    """Commit, branch or tag of a hub id."""
    bfloat16: Flag = False
    """Encode with bfloat16 products: faster on accelerators, results equal to two or three digits."""

    @property
    def compute_dtype(self) -> Any:
        """Type of the operands of the encoders' products; None is float32."""
        import jax.numpy as jnp

        return jnp.bfloat16 if self.bfloat16 else None

    @property
    def numerics(self) -> Numerics:
        """How the encoders compute their products."""
        from jaxzs.clip import Numerics

        return Numerics(self.compute_dtype)

    def load(self, towers: Sequence[Literal["text", "vision"]]) -> Model:
        """The checkpoint, or these towers of it."""
        from jaxzs.clip import load

        return load(self.model, revision=self.revision, towers=towers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What the classes are called."""

    labels: Text = None
    """Class names, separated by commas."""
    labels_file: File = None
    """File with one class name a line, or a JSON list."""
    dataset: Text = None
    """Class names and templates of a known data set (`jaxzs datasets` lists them), or of your own JSON file."""
    force: Flag = False
    """Use class names that the checkpoint says it has never seen, as demo and art do."""
    truncate: Flag = False
    """Cut texts that are too long for the model, instead of refusing them."""

    def dataset_info(self) -> DatasetInfo | None:
        """The data set named by --dataset."""
        from jaxzs.data import dataset_info

        return None if self.dataset is None else dataset_info(self.dataset)

    def class_names(self) -> tuple[str, ...] | None:
        """Class names of --labels, --labels-file or --dataset; None where none is given.

        Raises `LabelError` for more than one of them, and for names that are empty or repeated.
        """
        given = [name for name in ("labels", "labels_file", "dataset") if getattr(self, name)]
        given += ["labels"] * (self.labels == "")  # given, though empty
        if len(given) > 1:
            named = " and ".join(map(option, given))
            raise LabelError(f"{named} are given: give only one of --labels, --labels-file and --dataset")
        if self.labels is not None:
            names, where = split_names(self.labels), f"--labels {self.labels!r}"
        elif self.labels_file is not None:
            names, where = read_names(self.labels_file), f"{self.labels_file}"
        else:
            # Not checked: a known data set may name two classes alike.
            info = self.dataset_info()
            return None if info is None else info.class_names
        check_named(names, where)
        return names


def check_named(names: Sequence[str], where: str) -> None:
    """`zeroshot.check_class_names`, saying where the names stand."""
    from jaxzs.zeroshot import check_class_names

    try:
        check_class_names(names)
    except LabelError as error:
        raise LabelError(f"{where}: {error}") from error


def told_apart(info: DatasetInfo) -> tuple[str, ...]:
    """Class names as results call them: with the label behind where a name occurs twice (ImageNet's "sunglasses")."""
    twice = {name for name, count in collections.Counter(info.class_names).items() if count > 1}
    pairs = zip(info.class_names, info.labels, strict=True)
    return tuple(f"{name} ({label})" if name in twice else name for name, label in pairs)


def split_names(names: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name.strip() for name in names.split(","))


def read_names(path: Path) -> tuple[str, ...]:
    """Class names from a file: a JSON list, or one a line (blank lines are passed over).

    Raises `LabelError` naming the file when it cannot be read or holds no list of names.
    """
    if path.suffix.lower() in (".csv", ".tsv"):  # each line of it would pass for a name
        raise LabelError(
            f"{path} is a table: expected one class name a line, or a JSON list. Labels of single images are for "
            "`jaxzs extract --label-table`"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: Windows editors begin a file with a mark
    except OSError as error:
        raise LabelError(
            f"cannot read class names from {path}: {error.strerror or error}; name a file with one class name "
            "a line, or a JSON list"
        ) from error
    except UnicodeDecodeError as error:
        raise LabelError(
            f"cannot read class names from {path}: it is not a text file in UTF-8; name a file with one class "
            "name a line, or a JSON list"
        ) from error
    if path.suffix.lower() != ".json":
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
    else:
        try:
            listed = json_format.loads(text)
        except (ValueError, RecursionError) as error:
            raise LabelError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise LabelError(f'{path}: expected a JSON list of class names, such as ["cat", "dog"]')
        names = tuple(listed)
    if not names:
        raise LabelError(f"{path} holds no class names: expected one a line, or a JSON list")
    return names


def read_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Sentences, and those of the sets that are named among them."""
    from jaxzs.data import template_set, template_set_names

    # A set stands for its sentences; whatever is no set is a sentence itself.
    known = template_set_names()
    return tuple(
        text for template in templates for text in (template_set(template) if template in known else (template,))
    )


# --- checks before anything is loaded ---------------------------------------------------------------------


LARGEST_SEED = 2**32 - 1  # that NumPy's generators take


def check_numbers(options: Any, *names: str, least: float = 1, most: float | None = None) -> None:
    """Raise `DataError` naming the first option that lies outside of a range; None lies in every range."""
    for name in names:
        value = getattr(options, name)
        # Asked this way round, NaN lies outside, too.
        if value is not None and not (least <= value and (most is None or value <= most)):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise DataError(f"{option(name)} is {value}, expected {wanted}")


def option(name: str) -> str:
    """How the field of an options class is typed."""
    return "--" + name.replace("_", "-")


def check_output_file(path: Path | None, *suffixes: str, name: str = "out") -> None:
    """Raise `DataError` before hours of work when a file will not be writable, or is not of a type that is written."""
    if path is None:
        return
    if path.is_dir():
        raise DataError(
            f"{option(name)} {path} is a folder, expected a file; write e.g. {path / ('results' + suffixes[0])}"
        )
    if path.suffix.lower() not in suffixes:  # the suffix decides what is written
        wanted = " or ".join(suffixes)
        raise DataError(f"{option(name)} {path}: the name must end in {wanted}")
    _check_writable(path.parent, f"{option(name)} {path}")


def check_record_beside(out: Path | None) -> None:
    """Raise `DataError` when the .json file beside `out`, where the record will go, is something else."""
    from jaxzs.report import read_record

    # The record of an earlier run may go, a file of somebody else's may not.
    if out is None or not (beside := out.with_suffix(".json")).exists() or beside == out:
        return
    try:
        read_record(beside)
    except RecordError as error:
        raise DataError(
            f"--out {out}: the record of the run would replace {beside}, which is none; name another, or remove it"
        ) from error


def check_output_folder(path: Path | None, name: str = "out") -> None:
    """The same for a folder, which need not exist yet."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise DataError(f"{option(name)} {path} is a file, expected a folder; name another")
    _check_writable(path, f"{option(name)} {path}")


def _check_writable(folder: Path, what: str) -> None:
    # The nearest folder that there is decides whether the others can be made in it.
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise DataError(f"{what} cannot be written: {there} is a file, not a folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"{what} cannot be written: no permission in {there}; name another place")
