"""`jaxzs tag IMAGES --labels a,b,c`: every class seen in each image, with scores and where it was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.options import (
    File,
    Flag,
    Folder,
    Images,
    LabelOptions,
    ModelOptions,
    OutputOptions,
    Text,
    check_named,
    check_numbers,
    check_output_file,
    check_output_folder,
    check_record_beside,
    command_line,
    load_model,
    name_unusable,
    read_templates,
    reason_of,
    say_rows,
    settings_of,
    shown_as,
    split_names,
)
from jaxzs.errors import DataError, ImageError, LabelError

if TYPE_CHECKING:
    from PIL import Image

    from jaxzs.clip import Model
    from jaxzs.patch import ImageTags


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchOptions(OutputOptions, ModelOptions, LabelOptions):
    """What `jaxzs tag` and `jaxzs segment` have in common."""

    images: Images = ()
    """Folders, files or globs."""
    background: Text = None
    """Names of what else may be seen, separated by commas: they compete, but never become tags."""
    threshold: float = 0.5
    """Tag what scores above this fraction of the way from an image's lowest to its highest score."""
    templates: Annotated[tuple[str, ...], shown_as("TEXT ...")] = ()
    """Sentences with {}, or sets simple, imagenet7, imagenet80, tagclip85; else the data set's, or TagCLIP's 85."""
    keep_border: Flag = False
    """Let boxes reach the last row and column of patches, which the original never does."""
    exact: Flag = False
    """Reproduce the original code to the last decision, its oddities too; slower."""
    batch_size: int = 8
    """Images worked on at once."""
    max_patches: int = 4096
    """Refuse images of more patches: memory grows with the square."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagOptions(PatchOptions):
    overlay: Folder = None
    """Folder for one picture an image: boxes and a heat map for every tag."""
    out: File = None
    """Write all results to this .csv or .json file; the record of the run lies beside a .csv file, as .json."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes to look at each image in, relative to its own; scores are averaged."""
    renormalize: Flag = False
    """Make attention weights sum to one, which the original does not."""


def run(options: TagOptions) -> int:
    """Tag and print; returns 0, or 1 when some images could not be used."""
    check_options(options)
    check_output_file(options.out, ".csv", ".json")
    check_record_beside(options.out)
    check_output_folder(options.overlay, "overlay")
    if not options.scales or min(options.scales) <= 0:
        raise DataError(f"--scales are {options.scales}, expected numbers above 0, such as 1 1.5")
    from tqdm import tqdm

    from jaxzs.data import find_images
    from jaxzs.patch import Batching, tag_images
    from jaxzs.patch.texts import default_cache, tag_texts
    from jaxzs.report import measured

    unusable: dict[Path, ImageError] = {}
    opened: list[Path] = []
    results: dict[Path, dict[str, Any]] = {}
    with measured() as seconds:
        paths = find_images(options.images)
        names = read_names(options)
        model = load_model(options, names.all, force=options.force)
        texts = tag_texts(
            model,
            names.foreground,
            names.background,
            names.templates,
            cache=default_cache(),
            progress=not options.quiet,
        )
        found = tag_images(
            model,
            open_images(paths, opened, unusable),
            texts,
            num_foreground=len(names.foreground),
            batching=Batching(
                batch_size=min(options.batch_size, len(paths)), scales=options.scales, max_patches=options.max_patches
            ),
            on_error=lambda number, error: unusable.__setitem__(opened[number], error),
            relative_threshold=options.threshold,
            exact=options.exact,
            keep_border=options.keep_border,
            renormalize=options.renormalize,
            compute_dtype=options.compute_dtype,
        )
        pictures = picture_names(paths, options.overlay)
        with tqdm(total=len(paths), unit="image", disable=options.no_progress) as bar:
            for tagged in found:
                path = opened[tagged.number]
                results[path] = _row(path, tagged, names.foreground)
                if pictures:
                    _draw(pictures[path], path, tagged, names.foreground)
                bar.update(len(results) + len(unusable) - bar.n)
    check_any(results, unusable, paths)
    rows = [results[path] for path in paths if path in results]
    say_rows(options, rows, "tags", in_file=options.out is not None)
    tags = sum(len(row["tags"]) for row in rows)
    metrics = {"images": len(rows), "tags_per_image": tags / len(rows)}
    record = record_of("tag", options, model, names, paths, unusable, metrics, seconds)
    record |= {"box": "left, top, right, bottom in pixels", "results": rows}
    _write(options, rows, record)
    options.say(f"{len(rows)} images, {len(names.foreground)} classes, {tags / len(rows):.1f} tags an image")
    options.print_record(record)
    name_unusable(record["unreadable"], len(paths))
    return INCOMPLETE if unusable else FINISHED


def check_options(options: PatchOptions) -> None:
    """Raise for options that cannot be meant, before anything is loaded."""
    if not options.images:
        raise DataError("no images given: name a folder, files or globs")
    if options.labels is None and options.labels_file is None and options.dataset is None:
        raise LabelError("what may be tagged? Give one of --labels a,b,c, --labels-file and --dataset")
    check_numbers(options, "threshold", least=0, most=1)
    check_numbers(options, "batch_size", "max_patches")


def check_any(results: dict[Path, Any], unusable: dict[Path, ImageError], paths: Sequence[Path]) -> None:
    """Raise `DataError` when no image could be used."""
    if not results:
        path, error = next(iter(unusable.items()))
        raise DataError(f"none of the {len(paths)} images could be used; the first: {reason_of(path, error)}")


class Names(NamedTuple):
    """What may be tagged, what competes, and templates where they are not TagCLIP's."""

    foreground: tuple[str, ...]
    background: tuple[str, ...]
    templates: tuple[str, ...] | None

    @property
    def all(self) -> tuple[str, ...]:
        """Foreground names, then background names."""
        return (*self.foreground, *self.background)


def read_names(options: PatchOptions) -> Names:
    """Names and templates as given, or those of the data set."""
    foreground, info = options.class_names(), options.dataset_info()
    assert foreground is not None  # check_options has seen to it
    background = () if info is None else info.background_names
    if options.background is not None:
        background = split_names(options.background)
        check_named(background, f"--background {options.background!r}")
    templates = read_templates(options.templates) or (info.templates if info else None)
    return Names(foreground, background, templates)


def record_of(
    command: str,
    options: PatchOptions,
    model: Model,
    names: Names,
    paths: Sequence[Path],
    unusable: dict[Path, ImageError],
    metrics: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The record of a run, not yet written."""
    from jaxzs.data import open_files
    from jaxzs.report import data_entry, write_record

    name = options.dataset or Path(options.images[0]).name
    return write_record(
        None,
        command=command_line(command, options),
        settings=settings_of(options),
        metrics=metrics,
        model=model,
        data=data_entry(name, open_files(paths).identity, len(paths)),
        seconds=seconds,
        class_names=list(names.foreground),
        background_names=list(names.background),
        unreadable=[reason_of(path, error) for path, error in unusable.items()],
    )


def open_images(paths: Sequence[Path], opened: list[Path], unusable: dict[Path, ImageError]) -> Iterator[Image.Image]:
    """The readable images, in order; their paths are appended to `opened` as they are read."""
    from jaxzs.data import open_image

    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            unusable[path] = error
            continue
        opened.append(path)
        yield image


def _row(path: Path, tagged: ImageTags, foreground: Sequence[str]) -> dict[str, Any]:
    """What is written of one image: its tags, best first, and the scores of all classes."""
    order = sorted(range(len(foreground)), key=lambda c: -tagged.scores[c])
    height, width = tagged.size
    tags = []
    for c in order:
        if not tagged.tags[c]:
            continue
        top, bottom, left, right = tagged.boxes[c].tolist()
        tags.append(
            {
                "label": foreground[c],
                "score": round(float(tagged.scores[c]), 6),
                "reidentified": bool(tagged.reidentified[c]),
                "box": [round(left * width), round(top * height), round(right * width), round(bottom * height)],
            }
        )
    return {
        "path": str(path),
        "size": [width, height],
        "tags": tags,
        "scores": {name: round(float(s), 6) for name, s in zip(foreground, tagged.scores, strict=True)},
    }


def picture_names(paths: Sequence[Path], folder: Path | None) -> dict[Path, Path]:
    """A picture's name for each image, numbered where two images are called the same."""
    if folder is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 2
        while name in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name)
        names[path] = folder / f"{name}.png"
    return names


def _draw(picture: Path, path: Path, tagged: ImageTags, foreground: Sequence[str]) -> None:
    from jaxzs.data import open_image
    from jaxzs.patch.overlay import write_overlay

    write_overlay(picture, open_image(path).convert("RGB"), tagged, foreground)


def _write(options: TagOptions, rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
    """The record as .json, and a line a tag where --out is a .csv file."""
    from jaxzs.files import write_json
    from jaxzs.report import write_csv

    if options.out is not None:
        if options.out.suffix.lower() == ".csv":
            header = ["path", "label", "score", "reidentified", "left", "top", "right", "bottom"]
            lines = [
                [row["path"], tag["label"], tag["score"], tag["reidentified"], *tag["box"]]
                for row in rows
                for tag in row["tags"]
            ]
            write_csv(options.out, header, lines)
        write_json(options.out.with_suffix(".json"), record)
        options.say(f"{len(rows)} results written to {options.out}")
    if options.overlay is not None:
        options.say(f"{len(rows)} pictures written to {options.overlay}")
