"""`jaxzs tag IMAGES --labels a,b,c`: every class seen in each image, with scores and where it was seen."""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxzs.errors import DataError, ImageError, LabelError

if TYPE_CHECKING:
    from PIL import Image

    from jaxzs.clip import Model
    from jaxzs.patch import ImageTags

_SHOWN = 20  # lines of results on the terminal when they also go to a file


@dataclasses.dataclass(frozen=True)
class PatchOptions:
    """What `jaxzs tag` and `jaxzs segment` have in common."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folders, files or globs."""
    labels: str | None = None
    """Class names that become tags, separated by commas."""
    labels_file: Path | None = None
    """File with one class name a line, or a JSON list."""
    dataset: str | None = None
    """Class names, background names and templates of a known data set; `jaxzs datasets` lists them."""
    background: str | None = None
    """Names of what else may be seen, separated by commas: they compete, but never become tags."""
    model: str = "demo"
    """The embedded demo checkpoint, a folder, or a hub id such as openai/clip-vit-base-patch16."""
    revision: str | None = None
    """Commit, branch or tag of a hub id."""
    threshold: float = 0.5
    """Tag what scores above this fraction of the way from an image's lowest to its highest score."""
    templates: tuple[str, ...] = ()
    """Sentences with {} for the name; by default TagCLIP's 85."""
    keep_border: bool = False
    """Let boxes reach the last row and column of patches, which the original never does."""
    exact: bool = False
    """Reproduce the original code to the last decision, its oddities too; slower."""
    batch_size: int = 8
    """Images worked on at once."""
    max_patches: int = 4096
    """Refuse images of more patches: memory grows with the square."""
    bfloat16: bool = False
    """Encode with bfloat16 products: faster, scores equal to two or three digits."""
    force: bool = False
    """Use class names that the demo checkpoint has never seen."""


@dataclasses.dataclass(frozen=True)
class TagOptions(PatchOptions):
    overlay: Path | None = None
    """Folder for one picture an image: boxes and a heat map for every tag."""
    out: Path | None = None
    """Write all results to this .csv or .json file."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes to look at each image in, relative to its own; scores are averaged."""
    renormalize: bool = False
    """Make attention weights sum to one, which the original does not."""


def run(options: TagOptions) -> int:
    """Tag and print; returns 0, or 1 when some images could not be used."""
    check_options(options)
    _check_outputs(options)
    from tqdm import tqdm

    from jaxzs.data import find_images
    from jaxzs.patch import Batching, tag_images
    from jaxzs.patch.texts import default_cache, tag_texts

    paths = find_images(options.images)
    foreground, background, templates = read_names(options)
    model = load_model(options, foreground, background)
    texts = tag_texts(
        model, foreground, background, templates, cache=default_cache(), progress=True
    )
    unusable: dict[Path, ImageError] = {}
    opened: list[Path] = []
    results: dict[Path, dict[str, Any]] = {}
    found = tag_images(
        model,
        open_images(paths, opened, unusable),
        texts,
        num_foreground=len(foreground),
        batching=Batching(
            batch_size=min(options.batch_size, len(paths)),
            scales=options.scales,
            max_patches=options.max_patches,
        ),
        on_error=lambda number, error: unusable.__setitem__(opened[number], error),
        relative_threshold=options.threshold,
        exact=options.exact,
        keep_border=options.keep_border,
        renormalize=options.renormalize,
        compute_dtype=compute_dtype(options),
    )
    pictures = picture_names(paths, options.overlay)
    with tqdm(total=len(paths), unit="image", disable=None) as bar:
        for tagged in found:
            path = opened[tagged.number]
            results[path] = _record(path, tagged, foreground)
            if pictures:
                _draw(pictures[path], path, tagged, foreground)
            bar.update(len(results) + len(unusable) - bar.n)
    if not results:
        first = next(iter(unusable.values()))
        raise DataError(f"none of the {len(paths)} images could be used; the first: {first}")
    rows = [results[path] for path in paths if path in results]
    _show(rows, options)
    _report(rows, options, model, foreground, background, unusable)
    return 1 if unusable else 0


def check_options(options: PatchOptions) -> None:
    """Raise for options that cannot be meant, before anything is loaded."""
    if not options.images:
        raise DataError("no images given: name a folder, files or globs")
    given = [options.labels, options.labels_file, options.dataset]
    if sum(value is not None for value in given) != 1:
        raise LabelError(
            "what may be tagged? Give one of --labels a,b,c, --labels-file and --dataset"
        )
    if not 0 <= options.threshold <= 1:
        raise DataError(f"--threshold is {options.threshold}, expected 0 to 1")
    if options.batch_size < 1:
        raise DataError(f"--batch-size is {options.batch_size}, expected at least 1")


def _check_outputs(options: TagOptions) -> None:
    if options.out is not None and options.out.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"--out {options.out}: the name must end in .csv or .json")
    if options.overlay is not None and options.overlay.exists() and not options.overlay.is_dir():
        raise DataError(f"--overlay {options.overlay} is a file, expected a folder")


def compute_dtype(options: PatchOptions) -> Any:
    """Type of the operands of the encoder's products."""
    import jax.numpy as jnp

    return jnp.bfloat16 if options.bfloat16 else None


def load_model(
    options: PatchOptions, foreground: Sequence[str], background: Sequence[str]
) -> Model:
    """The checkpoint; raises `TextError` for names that the demo checkpoint has never seen."""
    from jaxzs.clip import load

    model = load(options.model, revision=options.revision)
    if not options.force:
        model.check_words([*foreground, *background])
    return model


def read_names(
    options: PatchOptions,
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]:
    """Foreground names, background names, and templates where they are not TagCLIP's."""
    from jaxzs.commands.classify import read_labels
    from jaxzs.data import dataset_info
    from jaxzs.zeroshot import check_class_names

    background: tuple[str, ...] = ()
    templates = options.templates or None
    if options.dataset is not None:
        info = dataset_info(options.dataset)
        foreground, background = info.class_names, info.background_names
        templates = templates or info.templates
    elif options.labels is not None:
        foreground = _split(options.labels)
    else:
        assert options.labels_file is not None
        foreground = read_labels(options.labels_file)
    if options.background is not None:
        background = _split(options.background)
    check_class_names(foreground)
    if background:
        check_class_names(background)
    return foreground, background, templates


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


def open_images(
    paths: Sequence[Path], opened: list[Path], unusable: dict[Path, ImageError]
) -> Iterator[Image.Image]:
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


def _record(path: Path, tagged: ImageTags, foreground: Sequence[str]) -> dict[str, Any]:
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
                "box": [
                    round(left * width),
                    round(top * height),
                    round(right * width),
                    round(bottom * height),
                ],
            }
        )
    return {
        "path": str(path),
        "size": [width, height],
        "tags": tags,
        "scores": {
            name: round(float(s), 6) for name, s in zip(foreground, tagged.scores, strict=True)
        },
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


def _show(rows: Sequence[dict[str, Any]], options: TagOptions) -> None:
    shown = rows if options.out is None else rows[:_SHOWN]
    width = max(len(row["path"]) for row in shown)
    for row in shown:
        tags = "  ".join(f"{tag['label']} {tag['score']:.3f}" for tag in row["tags"])
        print(f"{row['path']:{width}}  {tags}")
    if len(shown) < len(rows):
        print(f"... and {len(rows) - len(shown)} more")


def _report(
    rows: Sequence[dict[str, Any]],
    options: TagOptions,
    model: Model,
    foreground: Sequence[str],
    background: Sequence[str],
    unusable: dict[Path, ImageError],
) -> None:
    """Files, and the closing lines."""
    if options.out is not None:
        summary = {
            "model": options.model,
            "fingerprint": model.fingerprint,
            "class_names": list(foreground),
            "background_names": list(background),
            "threshold": options.threshold,
            "scales": list(options.scales),
            "exact": options.exact,
            "box": "left, top, right, bottom in pixels",
            "unusable": [str(path) for path in unusable],
        }
        _write(options.out, rows, summary)
        print(f"{len(rows)} results written to {options.out}")
    if options.overlay is not None:
        print(f"{len(rows)} pictures written to {options.overlay}")
    count = sum(len(row["tags"]) for row in rows)
    print(f"{len(rows)} images, {len(foreground)} classes, {count / len(rows):.1f} tags an image")
    print_unusable(unusable, len(rows) + len(unusable))


def print_unusable(unusable: dict[Path, ImageError], total: int) -> None:
    """List the images that could not be used, on stderr."""
    if not unusable:
        return
    print(f"{len(unusable)} of {total} images could not be used:", file=sys.stderr)
    for path, error in unusable.items():
        print(f"  {error if str(path) in str(error) else f'{path}: {error}'}", file=sys.stderr)


def _write(path: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    from jaxzs.files import atomic_path, write_json

    if path.suffix.lower() == ".json":
        write_json(path, {**summary, "results": list(rows)})
        return
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["path", "label", "score", "reidentified", "left", "top", "right", "bottom"]
        )
        for row in rows:
            for tag in row["tags"]:
                writer.writerow(
                    [row["path"], tag["label"], tag["score"], tag["reidentified"], *tag["box"]]
                )
