"""`jaxzs segment IMAGES --labels a,b,c --out DIR`: a label for every pixel, from tags that are found or given."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.options import (
    File,
    Flag,
    Number,
    check_numbers,
    check_output_folder,
    kept_when_interrupted,
    load_model,
    name_unusable,
    read_templates,
)
from jaxzs.commands.tag import (
    Names,
    PatchOptions,
    check_any,
    check_options,
    open_images,
    picture_names,
    read_names,
    record_of,
)
from jaxzs.errors import DataError, ImageError, LabelError

if TYPE_CHECKING:
    from jaxzs.clip import Model
    from jaxzs.patch import ImageTags

_CPU_KERNEL = 2e9  # kernel elements an iteration that a CPU is given: seconds for a photo
_CLIP_ES_TEMPLATE = "a clean origami {}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentOptions(PatchOptions):
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("masks")
    """Folder for palette masks (.png), overlays and the record, masks.json."""
    tags: File = None
    """Tags of the images, as `jaxzs tag --out FILE.json` writes them; by default they are found."""
    maps: Literal["cam", "scores"] = "cam"
    """Where tags are: activation maps (CLIP-ES), or patch scores, which suit the demo checkpoint better."""
    crf: Flag = False
    """Sharpen the masks along the edges of the photo with a dense CRF."""
    crf_stride: Number = None
    """Take only every so many rows and columns as sources; default 1, on a CPU more for large images."""
    box_threshold: float = 0.4
    """Fraction of a map's maximum above which it spreads; 0.4 for VOC, 0.7 for COCO."""


def run(options: SegmentOptions) -> int:
    """Segment and write; returns 0, or 1 when some images could not be used."""
    check_options(options)
    check_numbers(options, "box_threshold", least=0, most=1)
    check_numbers(options, "crf_stride")
    check_output_folder(options.out)
    from tqdm import tqdm

    from jaxzs.data import find_images, open_image
    from jaxzs.files import write_json
    from jaxzs.patch.overlay import write_mask_overlay, write_palette_mask
    from jaxzs.report import measured

    unusable: dict[Path, ImageError] = {}
    rows: dict[Path, dict[str, Any]] = {}
    paths: list[Path] = []
    kept = kept_when_interrupted(lambda: f"{options.out} keeps {len(rows)} of {len(paths)} masks")
    with kept, measured() as seconds:
        paths = find_images(options.images)
        names = read_names(options)
        if len(names.foreground) > 255:
            raise LabelError(
                f"{len(names.foreground)} classes: a palette mask holds 255 and the background; name fewer"
            )
        given = None if options.tags is None else _read_tags(options.tags, paths, names.foreground)
        model = load_model(options, names.all, force=options.force)
        crf = {"stride": _crf_stride(options, paths)} if options.crf else None
        job = _Job(options, model, paths, names, given, crf, unusable)
        masks_found = _by_scores(job) if options.maps == "scores" else _by_activation(job)
        masks = picture_names(paths, options.out / "masks")
        overlays = picture_names(paths, options.out / "overlays")
        shown = ["background", *names.foreground]
        for path, tags, labels in tqdm(masks_found, total=len(paths), unit="image", disable=options.no_progress):
            write_palette_mask(masks[path], labels)
            write_mask_overlay(overlays[path], open_image(path).convert("RGB"), labels, shown)
            rows[path] = _row(path, masks[path], tags, labels, names.foreground)
    check_any(rows, unusable, paths)
    record = record_of("segment", options, model, names, paths, unusable, {"images": len(rows)}, seconds)
    record["labels"] = {str(c): name for c, name in enumerate(shown)}
    record["results"] = [rows[path] for path in paths if path in rows]
    write_json(options.out / "masks.json", record)
    options.say(f"{len(rows)} masks and overlays written to {options.out}")
    options.print_record(record)
    name_unusable(record["unreadable"], len(paths))
    return INCOMPLETE if unusable else FINISHED


class _Job(NamedTuple):
    """What both kinds of maps start from. given: tags from a file. unusable: filled as images are read."""

    options: SegmentOptions
    model: Model
    paths: Sequence[Path]
    names: Names
    given: dict[Path, list[int]] | None
    crf: dict[str, int] | None
    unusable: dict[Path, ImageError]


def _tagged(job: _Job) -> Iterator[tuple[Path, ImageTags]]:
    """Path and tags of each usable image, as they are found."""
    from jaxzs.patch import Batching, tag_images
    from jaxzs.patch.texts import default_cache, tag_texts

    opened: list[Path] = []
    found = tag_images(
        job.model,
        open_images(job.paths, opened, job.unusable),
        tag_texts(
            job.model,
            job.names.foreground,
            job.names.background,
            job.names.templates,
            cache=default_cache(),
            progress=not job.options.quiet,
        ),
        num_foreground=len(job.names.foreground),
        batching=Batching(batch_size=min(job.options.batch_size, len(job.paths)), max_patches=job.options.max_patches),
        on_error=lambda number, error: job.unusable.__setitem__(opened[number], error),
        relative_threshold=job.options.threshold,
        exact=job.options.exact,
        keep_border=job.options.keep_border,
        compute_dtype=job.options.compute_dtype,
    )
    for tagged in found:
        yield opened[tagged.number], tagged


def _by_scores(job: _Job) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Path, tags and labels of each usable image, from the scores of its patches."""
    from jaxzs.data import open_image
    from jaxzs.patch.masks import pixel_labels, score_maps

    for path, tagged in _tagged(job):
        own = np.flatnonzero(tagged.tags) if job.given is None else job.given[path]
        tags = np.asarray(own, int)
        maps = score_maps(tagged, tags)
        image = open_image(path)
        yield path, tags, pixel_labels(image, maps, tags, crf=job.crf, exact=job.options.exact)


def _by_activation(job: _Job) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Path, tags and labels of each usable image, from activation maps (CLIP-ES)."""
    from jaxzs.patch import Batching, segment_images
    from jaxzs.patch.texts import default_cache, tag_texts

    tags = job.given
    if tags is None:
        from tqdm import tqdm

        quiet = job.options.no_progress
        found = tqdm(_tagged(job), total=len(job.paths), unit="image", desc="tags", disable=quiet)
        tags = {path: np.flatnonzero(tagged.tags).tolist() for path, tagged in found}
    templates = read_templates(job.options.templates) or (_CLIP_ES_TEMPLATE,)
    F = len(job.names.foreground)
    others = job.names.background or ("background",)  # one name at least must compete with the tags
    texts = tag_texts(job.model, job.names.foreground, others, templates, cache=default_cache())
    usable = [path for path in job.paths if path in tags]
    opened: list[Path] = []
    masks = segment_images(
        job.model,
        open_images(usable, opened, job.unusable),
        _InOrderOfOpening(tags, opened),
        texts[:F],
        texts[F:],
        crf=job.crf,
        batching=Batching(
            batch_size=min(job.options.batch_size, max(1, len(usable))), max_patches=job.options.max_patches
        ),
        on_error=lambda number, error: job.unusable.__setitem__(opened[number], error),
        box_threshold=job.options.box_threshold,
        exact=job.options.exact,
        keep_border=job.options.keep_border,
        compute_dtype=job.options.compute_dtype,
    )
    for mask in masks:
        yield opened[mask.number], mask.tags, mask.labels


class _InOrderOfOpening(Sequence):
    """Tags by the number under which an image was read: unreadable files have none."""

    def __init__(self, tags: dict[Path, list[int]], opened: list[Path]) -> None:
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
        tags[path] = sorted({place[label] for label in labels})
    return tags


def _crf_stride(options: SegmentOptions, paths: Sequence[Path]) -> int:
    """As asked for; otherwise exact on an accelerator, and on a CPU what it can do in seconds for the largest image."""
    import jax
    from PIL import Image

    if options.crf_stride is not None:
        return options.crf_stride
    if jax.default_backend() != "cpu":
        return 1
    pixels = []
    for path in paths:
        with contextlib.suppress(OSError), Image.open(path) as image:  # unreadable: said elsewhere
            pixels.append(image.width * image.height)
    return max(1, round(max(pixels, default=1) / _CPU_KERNEL**0.5))


def _row(path: Path, mask: Path, tags: np.ndarray, labels: np.ndarray, foreground: Sequence[str]) -> dict[str, Any]:
    """What is written of one image: its tags and the part of the image that each covers."""
    covered = {foreground[c]: round(float((labels == c + 1).mean()), 6) for c in tags.tolist()}
    return {"path": str(path), "mask": str(mask), "tags": list(covered), "covered": covered}
