"""What `jaxzs tag` and `jaxzs segment` have in common: options, names, and images that are opened one by one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from jaxzs.commands.options import (
    File,
    Flag,
    Images,
    LabelOptions,
    ModelOptions,
    OutputOptions,
    Text,
    check_named,
    check_numbers,
    check_output_file,
    read_templates,
    shown_as,
    split_names,
    told_apart,
)
from jaxzs.errors import ImageError, LabelError

if TYPE_CHECKING:
    import jax
    from PIL import Image

    from jaxzs.clip import Model
    from jaxzs.commands.run import Run
    from jaxzs.patch import Batching, Encoded, ImageTags


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchOptions(OutputOptions, ModelOptions, LabelOptions):
    """Options of both commands."""

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
    html: File = None
    """Write a page to look at in a browser: all images, with maps or masks where one is pointed at, and filters."""
    offsets: Annotated[
        int,
        tyro.conf.arg(
            help="Look at each image from so many origins along each side, moved by parts of a patch, and average "
            "scores and maps: 2 is more exact, and four times the work."
        ),
    ] = 1
    batch_size: int = 8
    """Images worked on at once."""
    max_patches: int = 4096
    """Scale images of more patches to fit: memory grows with the square."""
    no_resize: Flag = False
    """Refuse such images instead. Boxes and masks are in an image's own pixels either way."""

    def batching(self, num_images: int, scales: tuple[float, ...], opening: Opening) -> Batching:
        """How so many images are put together, with a word of what is scaled, compiled and left out on the way."""
        from jaxzs.patch import Batching

        return Batching(
            batch_size=min(self.batch_size, max(1, num_images)),  # a few images are not filled up to a full batch
            scales=scales,
            offsets=self.offsets,
            max_patches=self.max_patches,
            resize=not self.no_resize,
            notice=self.notice,
            on_error=opening.failed,
        )


def check_options(options: PatchOptions) -> None:
    """Raise for options that cannot be meant, before anything is loaded."""
    if options.labels is None and options.labels_file is None and options.dataset is None:
        raise LabelError("what may be tagged? Give one of --labels a,b,c, --labels-file and --dataset")
    check_output_file(options.html, ".html", name="html")
    check_numbers(options, "threshold", least=0, most=1)
    check_numbers(options, "batch_size")
    check_numbers(options, "offsets", most=8)
    check_numbers(options, "max_patches", least=4)  # a grid of 2x2


class Names(NamedTuple):
    """What may be tagged, what competes, and templates where they are not TagCLIP's.

    shown: foreground names as results call them, where some of them are alike and only their labels tell them apart.
    """

    foreground: tuple[str, ...]
    background: tuple[str, ...]
    templates: tuple[str, ...] | None
    shown: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Foreground names as results call them."""
        return self.shown or self.foreground

    @property
    def all(self) -> tuple[str, ...]:
        """Foreground names, then background names."""
        return (*self.foreground, *self.background)


def read_names(options: PatchOptions) -> Names:
    """Names and templates as given, or those of the data set."""
    foreground, info = options.class_names(), options.dataset_info()
    assert foreground is not None  # check_options has seen to it
    # A class may compete with itself under a published list of backgrounds (COCO-Object's "bed"): once is enough.
    background = () if info is None else tuple(name for name in info.background_names if name not in foreground)
    if options.background is not None:
        background = split_names(options.background)
        check_named(background, f"--background {options.background!r}")
    templates = read_templates(options.templates) or (info.templates if info else None)
    return Names(foreground, background, templates, told_apart(info) if info else ())


class Opening:
    """Images that are read one after another, under numbers; `run` is told which of them could not be used."""

    def __init__(self, run: Run, paths: Sequence[Path]) -> None:
        self.run, self.paths = run, paths
        self.opened: list[Path] = []  # by number, which only images that could be read have

    def __iter__(self) -> Iterator[Image.Image]:
        from jaxzs.data import open_image

        for path in self.paths:
            try:
                image = open_image(path)
            except ImageError as error:
                self.run.fail(path, error)
                continue
            self.opened.append(path)
            yield image

    def failed(self, number: int, error: ImageError) -> None:
        """An image that was read and cannot be used."""
        self.run.fail(self.opened[number], error)


def text_features(options: PatchOptions, model: Model, names: Names) -> jax.Array:
    """Of foreground names, then background names, kept on disk where there is a place for it."""
    from jaxzs.files import cache_folder
    from jaxzs.patch.texts import tag_texts

    return tag_texts(
        model,
        names.foreground,
        names.background,
        names.templates,
        distinct=options.dataset is None,  # ImageNet has names twice
        cache=None if options.no_cache else cache_folder(),
        progress=not options.quiet,
    )


def tagged_images(
    run: Run, model: Model, paths: Sequence[Path], names: Names, scales: tuple[float, ...] = (1.0,), **more: Any
) -> Iterator[tuple[Path, ImageTags]]:
    """Path and tags of each usable image, as they are found. more: of `patch.Tagging`."""
    from jaxzs.clip import Numerics
    from jaxzs.patch import Tagging, tag_images

    options, opening = run.options, Opening(run, paths)
    settings = Tagging(
        relative_threshold=options.threshold, exact=options.exact, keep_border=options.keep_border, **more
    )
    found = tag_images(
        model,
        opening,
        text_features(options, model, names),
        settings,
        num_foreground=len(names.foreground),
        batching=options.batching(len(paths), scales, opening),
        numerics=Numerics(options.compute_dtype),
    )
    for tagged in found:
        yield opening.opened[tagged.number], tagged


def learned_tags(run: Run, model: Model, paths: Sequence[Path], names: Names) -> Iterator[tuple[Path, ImageTags]]:
    """Path and tags of each usable image by a classifier that these images taught: they are read twice."""
    from jaxzs.clip import Numerics
    from jaxzs.patch import Batching, encoded_patches, learn_patch_classifier, tag_images_with

    options, texts = run.options, text_features(run.options, model, names)

    def batches(opening: Opening) -> Iterator[Encoded]:
        batching = Batching(
            min(options.batch_size, len(paths)), max_patches=options.max_patches, on_error=opening.failed
        )
        numerics = Numerics(options.compute_dtype)
        return encoded_patches(model, opening, side=options.side, batching=batching, numerics=numerics)

    first = iter(batches(Opening(run, paths)))
    # Asked for by itself, because learning from nothing is an error.
    if (start := next(first, None)) is None:
        return  # nothing could be used, which is said where all commands say it
    seen = (batch.patches[: len(batch.numbers)] for batch in itertools.chain([start], first))  # without filling
    classifier = learn_patch_classifier(seen, texts)
    # The second reading leaves out what the first could not use: it is told once.
    opening = Opening(run, [path for path in paths if str(path) not in run.unusable])
    vision = model.config.vision
    rows = vision.grid[0] if options.side is None else options.side // vision.patch_size
    found = tag_images_with(
        classifier,
        batches(opening),
        (rows, rows),
        num_foreground=len(names.foreground),
        relative_threshold=options.threshold,
    )
    for tagged in found:
        yield opening.opened[tagged.number], tagged


def picture_names(paths: Sequence[Path], folder: Path | None) -> dict[Path, Path]:
    """A picture's name for each image, numbered where several images are called the same."""
    if folder is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[Path, Path] = {}
    taken: set[str] = set()
    last: dict[str, int] = {}  # number last given to a stem, so that a million files of one name are named at once
    for path in paths:
        name, number = path.stem, last.get(path.stem, 1)
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        last[path.stem] = number
        taken.add(name)
        names[path] = folder / f"{name}.png"
    return names
