"""`jaxzs tag IMAGES --labels a,b,c`: every class seen in each image, with scores and where it was seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxzs.commands.options import (
    File,
    Flag,
    Folder,
    Number,
    check_output_file,
    check_output_folder,
    check_record_beside,
)
from jaxzs.commands.patches import (
    Names,
    PatchOptions,
    check_options,
    learned_tags,
    picture_names,
    read_names,
    tagged_images,
)
from jaxzs.commands.run import Run, say_rows
from jaxzs.commands.terminal import counted
from jaxzs.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from jaxzs.clip import Model
    from jaxzs.patch import ImageTags


@dataclasses.dataclass(frozen=True, kw_only=True)
class TagOptions(PatchOptions):
    overlay: Folder = None
    """Folder for one picture an image: boxes and a heat map for every tag."""
    out: File = None
    """Write all results to this .csv or .json file; the record of the run lies beside a .csv file, as .json."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes to look at each image in, relative to its own; scores are averaged."""
    learn: Flag = False
    """Learn what patches of each class look like from these images, without labels, and tag by that (PIAA)."""
    side: Number = None
    """With --learn, pixels that each image is made high and wide; default the model's own. More show smaller things."""
    renormalize: Flag = False
    """Make attention weights sum to one, which the original does not."""


def run(options: TagOptions) -> int:
    """Tag and print; returns 0, or 1 when some images could not be used."""
    _check(options)
    from tqdm import tqdm

    from jaxzs.report import Results

    run = Run(options)
    found: dict[Path, dict[str, Any]] = {}
    maps: dict[str, list[tuple[str, np.ndarray]]] = {}
    with run.measured():
        paths, names = run.find_images(), read_names(options)
        model = run.load_one_size(names.all)
        pictures = picture_names(paths, options.overlay)
        tags, done = _tags(run, model, paths, names), 0
        with tqdm(total=len(paths), unit="image", desc="tag images", disable=options.no_progress) as bar:
            for path, tagged in tags:
                found[path] = row_of(path, tagged, names.labels)
                if options.html is not None:
                    # Small maps are kept for the page at the end; pictures are written as they come.
                    maps[str(path)] = maps_of(found[path], tagged, names.labels)
                if pictures:
                    _draw(pictures[path], path, tagged, names.labels)
                done, before = len(found) + len(run.unusable), done  # an unusable image is done, too
                bar.update(done - before)
    run.check_any(found)
    rows = [found[path] for path in paths if path in found]  # in the order of the paths
    per_image = sum(len(row["tags"]) for row in rows) / len(rows)
    run.write_table(options.out, _HEADER, _cells(rows))
    record = run.record(
        Results({"images": len(rows), "tags_per_image": per_image}),
        class_names=list(names.labels),
        background_names=list(names.background),
        box="left, top, right, bottom in pixels",
        rows=rows,
    )
    run.write(record, options.out)
    run.write_page(record, maps)
    say_rows(options, rows, "tags", in_file=options.out is not None)
    run.wrote(counted(len(rows), "result"), options.out)
    run.wrote(counted(len(rows), "picture"), options.overlay)
    classes = counted(len(names.foreground), "class", "classes")
    return run.finish(record, f"{counted(len(rows), 'image')}, {classes}, {per_image:.1f} tags an image")


def _tags(run: Run, model: Model, paths: Sequence[Path], names: Names) -> Iterator[tuple[Path, ImageTags]]:
    options = run.options
    if options.learn:
        return learned_tags(run, model, paths, names)
    return tagged_images(run, model, paths, names, scales=options.scales, renormalize=options.renormalize)


def _check(options: TagOptions) -> None:
    check_options(options)
    check_output_file(options.out, ".csv", ".json")
    check_record_beside(options.out)
    check_output_folder(options.overlay, "overlay")
    several = tuple(options.scales) != (1.0,) or options.offsets > 1
    if options.learn and (options.exact or options.renormalize or several):
        raise DataError(
            "--learn looks at each image once, its own way: leave --exact, --renormalize, --scales and --offsets out"
        )
    if options.side is not None and not options.learn:
        raise DataError("--side is of --learn: without it images keep their sizes, or take --scales")
    if not options.scales or not 0 < min(options.scales) <= max(options.scales) < float("inf"):
        raise DataError(f"--scales are {options.scales}, expected numbers above 0, such as 1 1.5")


def row_of(path: Path, tagged: ImageTags, foreground: Sequence[str]) -> dict[str, Any]:
    """What is written of one image: its tags, best first, and the scores of all classes."""
    order = sorted(range(len(foreground)), key=lambda c: -tagged.scores[c])  # best first
    height, width = tagged.size  # of the image itself, in pixels
    tags = []
    for c in order:
        if not tagged.tags[c]:
            continue
        # Fractions of the image, rows first; what is written is left, top, right, bottom in pixels.
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


def maps_of(row: dict[str, Any], tagged: ImageTags, foreground: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Where each tag of the row is: refined scores [rows,columns], best tag first."""
    return [(tag["label"], tagged.refined[..., foreground.index(tag["label"])]) for tag in row["tags"]]


def _draw(picture: Path, path: Path, tagged: ImageTags, foreground: Sequence[str]) -> None:
    from jaxzs.data import open_image
    from jaxzs.patch.overlay import write_overlay

    write_overlay(picture, open_image(path).convert("RGB"), tagged, foreground)


_HEADER = ("path", "label", "score", "reidentified", "left", "top", "right", "bottom")


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A line a tag."""
    return [
        [row["path"], tag["label"], tag["score"], tag["reidentified"], *tag["box"]]
        for row in rows
        for tag in row["tags"]
    ]
