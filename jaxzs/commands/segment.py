"""`jaxzs segment IMAGES --labels a,b,c --out DIR`: a label for every pixel, from tags that are found or given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from jaxzs.commands.options import (
    File,
    Flag,
    Number,
    check_numbers,
    check_output_folder,
    one_of,
    read_templates,
    shown_as,
)
from jaxzs.commands.patches import (
    Names,
    Opening,
    PatchOptions,
    check_options,
    picture_names,
    read_names,
    tagged_images,
    text_features,
)
from jaxzs.commands.run import Run
from jaxzs.commands.terminal import counted
from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    from jaxzs.clip import Model
    from jaxzs.patch import CRF, Segmenting

_Attention = Literal["csa", "qq", "kk", "v", "naclip", "ordinary"]  # of `patch.dense_features`
_CLIP_ES_TEMPLATE = "a clean origami {}."  # CLIP-ES chose it, by the sharpness of the scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentOptions(PatchOptions):
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("masks")
    """Folder for palette masks (.png), overlays and the record, masks.json."""
    tags: File = None
    """Tags of the images, as `jaxzs tag --out FILE.json` writes them; by default they are found."""
    maps: Annotated[
        Literal["cam", "scores", "dense"],
        # Not a docstring of two lines: the help would be broken where the source is.
        tyro.conf.arg(
            help="Where tags are: activation maps (CLIP-ES), or patch scores, which suit the demo checkpoint better. "
            "dense needs no tags: every pixel gets the name that its patch is nearest to (NACLIP)."
        ),
    ] = "cam"
    attention: Annotated[_Attention | None, one_of(_Attention), shown_as()] = None
    """Of the last layer, for dense maps: csa is SCLIP's, qq ClearCLIP's, v MaskCLIP's; default naclip (ResNets: v)."""
    background_below: float = 0.0
    """With dense maps, what is less probable becomes background; or name backgrounds with --background."""
    crf: Flag = False
    """Sharpen the masks along the edges of the photo with a dense CRF."""
    crf_stride: Number = None
    """Sum over every so many rows and columns of pixels instead of a lattice; 1 is exact, and slow on a CPU."""
    box_threshold: float = 0.4
    """Fraction of a map's maximum above which it spreads; 0.4 for VOC, 0.7 for COCO."""


def run(options: SegmentOptions) -> int:
    """Segment and write; returns 0, or 1 when some images could not be used."""
    check_options(options)
    check_numbers(options, "box_threshold", least=0, most=1)
    check_numbers(options, "crf_stride")
    check_numbers(options, "background_below", least=0, most=1)
    if options.maps == "dense" and options.tags is not None:
        raise DataError("--maps dense finds its own classes: leave --tags out")
    if options.maps == "dense" and options.offsets > 1:
        raise DataError("--maps dense has windows that overlap: leave --offsets out")
    check_output_folder(options.out)
    from tqdm import tqdm

    from jaxzs.report import Results

    run = Run(options)
    rows: dict[Path, dict[str, Any]] = {}
    paths: list[Path] = []
    with run.measured(kept=lambda: f"{options.out} keeps {len(rows)} of {len(paths)} masks"):
        paths, names = run.find_images(), _names(options)
        given = None if options.tags is None else _read_tags(options.tags, paths, names.labels)
        job = _Job(run, run.load_one_size(names.all), paths, names, given, _crf(options))
        masks_found = {"scores": _by_scores, "cam": _by_activation, "dense": _by_patches}[options.maps](job)
        write = _Writer(options.out, paths, names.labels)
        bar = {"total": len(paths), "unit": "image", "desc": "masks", "disable": options.no_progress}
        for path, tags, labels in tqdm(masks_found, **bar):
            rows[path] = write(path, tags, labels)
    run.check_any(rows)
    record = run.record(
        Results({"images": len(rows)}),
        class_names=list(names.labels),
        background_names=list(names.background),
        labels={str(c): name for c, name in enumerate(write.shown)},
        # In the order of the paths, whatever the order they came in.
        rows=[rows[path] for path in paths if path in rows],
    )
    run.write(record, options.out / "masks.json")
    run.write_page(record)
    return run.finish(record, f"{counted(len(rows), 'mask')} and overlays written to {options.out}")


def _names(options: SegmentOptions) -> Names:
    names = read_names(options)
    if len(names.foreground) > 255:
        raise LabelError(f"{len(names.foreground)} classes: a palette mask holds 255 and the background; name fewer")
    if options.maps == "cam" and not names.background and "background" in names.foreground:
        raise LabelError(
            "a class is called 'background', as is what competes with the tags: leave the class out, or name others "
            "with --background, such as sky,wall"
        )
    return names


class _Job(NamedTuple):
    """What both kinds of maps start from. given: tags from a file."""

    run: Run
    model: Model
    paths: Sequence[Path]
    names: Names
    given: dict[Path, list[int]] | None
    crf: CRF | None

    def settings(self) -> Segmenting:
        """As the options ask for."""
        from jaxzs.patch import Segmenting

        options = self.run.options
        return Segmenting(
            box_threshold=options.box_threshold, exact=options.exact, keep_border=options.keep_border, crf=self.crf
        )


_Found = Iterator[tuple[Path, np.ndarray, np.ndarray]]  # path, tags and labels of each usable image


def _by_scores(job: _Job) -> _Found:
    """From the scores of patches."""
    from jaxzs.data import open_image
    from jaxzs.patch import pixel_labels, score_maps

    for path, tagged in tagged_images(job.run, job.model, job.paths, job.names):
        tags = np.asarray(np.flatnonzero(tagged.tags) if job.given is None else job.given[path], int)
        maps = score_maps(tagged, tags)
        yield path, tags, pixel_labels(open_image(path), maps, tags, job.settings())


def _by_activation(job: _Job) -> _Found:
    """From activation maps (CLIP-ES)."""
    from jaxzs.clip import Numerics
    from jaxzs.patch import segment_images

    options = job.run.options
    # One name at least must compete with the tags.
    names = Names(job.names.foreground, job.names.background or ("background",), _cam_templates(options))
    texts = text_features(options, job.model, names)  # before the tags, whose work names that do not fit would lose
    tags = _tags(job)
    # What the tagging could not use has no tags, and is told already.
    opening = Opening(job.run, [path for path in job.paths if path in tags])
    masks = segment_images(
        job.model,
        opening,
        _InOrderOfOpening(tags, opening.opened),
        texts[: len(names.foreground)],  # [F,E]
        texts[len(names.foreground) :],  # [C-F,E]
        job.settings(),
        batching=options.batching(len(tags), (1.0,), opening),
        numerics=Numerics(options.compute_dtype),
    )
    for mask in masks:
        yield opening.opened[mask.number], mask.tags, mask.labels


def _by_patches(job: _Job) -> _Found:
    """From dense features, without tags."""
    from jaxzs.clip import Numerics
    from jaxzs.patch import Batching, Dense, segment_dense

    options, names = job.run.options, _dense_names(job.run.options, job.names)
    settings = Dense(attention=options.attention, threshold=options.background_below, crf=job.crf)
    opening = Opening(job.run, job.paths)
    masks = segment_dense(
        job.model,
        opening,
        text_features(options, job.model, Names(tuple(name for name, _ in names), (), job.names.templates)),
        settings,
        classes=[c for _, c in names],
        batching=Batching(batch_size=16, on_error=opening.failed),
        numerics=Numerics(options.compute_dtype),
    )
    for mask in masks:
        yield opening.opened[mask.number], mask.present - 1, mask.labels  # masks count classes from 1


def _dense_names(options: SegmentOptions, names: Names) -> list[tuple[str, int]]:
    """Every name and the class that it means, -1 for the background; data sets have several names for some classes."""
    info = options.dataset_info()
    of_classes = [(name, c) for c, name in enumerate(names.foreground)]
    if info is not None:
        of_classes = [(name, c) for name, c in info.dense_names if c >= 0]
    return [*of_classes, *((name, -1) for name in names.background)]


def _tags(job: _Job) -> dict[Path, list[int]]:
    """Tags of each usable image: as given, or found."""
    from tqdm import tqdm

    if job.given is not None:
        return job.given
    found = tagged_images(job.run, job.model, job.paths, job.names)
    bar = {"total": len(job.paths), "unit": "image", "desc": "tags", "disable": job.run.options.no_progress}
    return {path: np.flatnonzero(tagged.tags).tolist() for path, tagged in tqdm(found, **bar)}


def _cam_templates(options: SegmentOptions) -> tuple[str, ...]:
    return read_templates(options.templates) or (_CLIP_ES_TEMPLATE,)


class _Writer:
    """Writes mask and overlay of an image, under names of their own."""

    def __init__(self, folder: Path, paths: Sequence[Path], foreground: Sequence[str]) -> None:
        self.masks = picture_names(paths, folder / "masks")
        self.overlays = picture_names(paths, folder / "overlays")
        self.shown = ["background", *foreground]  # 0 is the background

    def __call__(self, path: Path, tags: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """The row of the image: its tags and the part of the image that each covers."""
        from jaxzs.data import open_image
        from jaxzs.patch.overlay import write_mask_overlay, write_palette_mask

        write_palette_mask(self.masks[path], labels)
        write_mask_overlay(self.overlays[path], open_image(path).convert("RGB"), labels, self.shown)
        covered = {self.shown[c + 1]: round(float((labels == c + 1).mean()), 6) for c in tags.tolist()}
        return {"path": str(path), "mask": str(self.masks[path]), "tags": list(covered), "covered": covered}


class _InOrderOfOpening(Sequence):
    """Tags by the number under which an image was read: unreadable files have none."""

    def __init__(self, tags: dict[Path, list[int]], opened: list[Path]) -> None:
        # `opened` grows while images are read: tags are looked up when their image is there.
        self.tags, self.opened = tags, opened

    def __len__(self) -> int:
        return len(self.opened)

    def __getitem__(self, number: Any) -> list[int]:
        return self.tags[self.opened[number]]


def _read_tags(file: Path, paths: Sequence[Path], foreground: Sequence[str]) -> dict[Path, list[int]]:
    """Tags of the images from a file of `jaxzs tag`, matched by path, then by file name."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text file"
        raise DataError(
            f"cannot read {file}: {reason}; write it with `jaxzs tag ... --out {file.with_suffix('.json')}`"
        ) from error
    try:
        rows = json.loads(text)["results"]
        listed = {Path(row["path"]): [tag["label"] for tag in row["tags"]] for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{file} is not a file that `jaxzs tag ... --out {file.with_suffix('.json')}` writes: {error}"
        ) from error
    # By name where folders have been moved since.
    by_name = {path.name: labels for path, labels in listed.items()}
    place = {name: c for c, name in enumerate(foreground)}
    tags = {}
    for path in paths:
        labels = listed.get(path, by_name.get(path.name))
        if labels is None:
            raise DataError(f"{file} has no tags for {path}")
        unknown = [label for label in labels if label not in place]
        if unknown:
            raise LabelError(f"{file}: {path} is tagged {unknown[0]!r}, which is not among --labels")
        tags[path] = sorted({place[label] for label in labels})  # each once, in the order of the classes
    return tags


def _crf(options: SegmentOptions) -> CRF | None:
    """With a stride the exact kernel at so many sources, else what suits the machine."""
    from jaxzs.patch import CRF

    if not options.crf:
        return None
    return CRF() if options.crf_stride is None else CRF(kernel="exact", stride=options.crf_stride)
