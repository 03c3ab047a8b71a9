"""Masks without tags: every pixel the class whose name its patch is nearest to (SCLIP, ClearCLIP, NACLIP).

Photos are looked at through windows of the size that the model was trained with. The windows of all photos share one
program, whatever the photos' sizes; their scores are averaged patch by patch and enlarged to pixels in strips, so that
no [pixels, classes] array ever exists.
Axis letters: W windows, P patches of a window, E embedding, N names (several may mean one class), C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import CLIPConfig, Model
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import normalize, resize_weights
from jaxzs.clip.preprocess import to_rgb
from jaxzs.errors import DataError, ImageError, LabelError
from jaxzs.patch.batching import SIXTEEN, Batching, usable
from jaxzs.patch.crf import dense_crf, for_crf, nearest
from jaxzs.patch.dense import Attention, DenseTask, Last, Positions, check_last, dense_tokens, last_of
from jaxzs.patch.images import on_mesh
from jaxzs.patch.settings import CRF, Number, check_positive, check_share, check_whole
from jaxzs.patch.tags import check_texts

_STRIP = 2**22  # scores of names at pixels that are held at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """How masks are made of dense features, with the values of NACLIP for VOC.

    Args:
      attention: as in `dense_features`.
      reduced: likewise.
      neighbourhood: likewise.
      positions: likewise.
      short_side: pixels of a photo's shorter side when it is looked at (560 for Cityscapes).
      window: in pixels; by default the model's own size.
      stride: of windows, in pixels; by default half of one.
      scale: of the cosines in the softmax over names, 40 as published.
      threshold: what is less probable becomes background; 0 where there are names for backgrounds.
      background: whether label 0 is background and class c is c + 1; False: class c is c.
      crf: None, or how the labels that were found are sharpened along the edges of the photo.

    Raises `DataError` for numbers out of range.

    >>> patch.Dense(attention="csa", threshold=0.1).short_side
    336
    """

    attention: Attention | None = dataclasses.field(default=None, metadata={"static": True})
    reduced: bool | None = dataclasses.field(default=None, metadata={"static": True})
    neighbourhood: Number = 5.0
    positions: Positions = dataclasses.field(default="bicubic_offset", metadata={"static": True})
    short_side: int = dataclasses.field(default=336, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    stride: int | None = dataclasses.field(default=None, metadata={"static": True})
    scale: float = dataclasses.field(default=40.0, metadata={"static": True})
    threshold: float = dataclasses.field(default=0.0, metadata={"static": True})
    background: bool = dataclasses.field(default=True, metadata={"static": True})
    crf: CRF | None = None

    def __post_init__(self) -> None:
        check_last(self.attention, self.positions)
        check_positive("neighbourhood", self.neighbourhood)
        check_positive("scale", self.scale)
        check_share("threshold", self.threshold)
        for name in ("short_side", "window", "stride"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value)

    def last(self, config: CLIPConfig) -> Last:
        """The last block that is asked for, of this tower."""
        return last_of(self.attention, self.reduced, self.positions, config)


class DenseMask(NamedTuple):
    """Segmentation of one image.

    number: its place among the images given. labels: [height,width] int32. scores: [rows,columns,N] cosines of its
    patches with the names, averaged over windows. present: labels that occur, background left out.
    """

    number: int
    labels: np.ndarray
    scores: np.ndarray
    present: np.ndarray


class _View(NamedTuple):
    """A photo that is being looked at: what its windows gave so far."""

    number: int
    photo: np.ndarray
    total: np.ndarray  # [rows,columns,N]
    count: np.ndarray  # type: ignore[assignment] # [rows,columns,1]
    missing: list[int]  # windows, one number


class _Window(NamedTuple):
    view: _View
    row: int  # of patches
    column: int
    pixels: np.ndarray


def segment_dense(
    model: Model,
    images: Iterable[Any],
    text_features: jax.Array | np.ndarray,
    settings: Dense = Dense(),
    *,
    classes: Sequence[int] | None = None,
    batching: Batching = SIXTEEN,
    numerics: Numerics = Numerics(),
) -> Iterator[DenseMask]:
    """Label maps of images of any sizes, without tags or training: NACLIP, arXiv 2404.08181, or what `settings` say.

    Args:
      model: a loaded checkpoint.
      images: PIL images or uint8 arrays, read lazily.
      text_features: [N,E] of names.
      settings: `Dense`.
      classes: [N] the class that each name means, 0 and up, or -1 for background; by default name n is class n.
      batching: how many windows at a time, the devices that share them, what becomes of images that cannot be used.
      numerics: how products are computed.

    Yields:
      `DenseMask`, in the order of the images.

    Raises:
      DataError: texts of another model; windows that are no whole patches.
      LabelError: classes that do not fit.

    >>> model = jaxzs.load("demo")
    >>> image = np.full((96, 120, 3), 40, np.uint8)
    >>> image[20:60, 30:70] = (220, 40, 40)
    >>> texts = zeroshot.text_proxies(model, ["red square", "ground", "wall"])
    >>> settings = patch.Dense(attention="v", reduced=False, short_side=96)
    >>> [mask] = patch.segment_dense(model, [image], texts, settings, classes=[0, -1, -1])
    >>> mask.labels.shape, mask.scores.shape, set(np.unique(mask.labels).tolist()) <= {0, 1}
    ((96, 120), (12, 15, 3), True)
    """
    model.config.check_one_size()
    batching.check_one_view("masks without tags")
    check_texts("text_features", text_features, model.config)
    labels_of = _checked_classes(classes, len(text_features), settings)
    looking = _looking(model, settings, len(text_features))
    shared = model.params, normalize(jnp.asarray(text_features)), jnp.asarray(settings.neighbourhood, jnp.float32)
    run = on_mesh(window_scores, shared, batching.mesh, DenseTask(model.config, settings.last(model.config), numerics))
    size = batching.devices * -(-batching.batch_size // batching.devices)
    windows = _windows(model, looking, images, batching)
    for view in _looked_at(windows, run, size, looking.window):
        scores = view.total / view.count  # [rows,columns,N], every window counts the same
        labels = labels_of_scores(scores, view.photo, labels_of, settings)
        present = np.unique(labels)
        yield DenseMask(view.number, labels, scores, present[present > 0] if settings.background else present)


def window_scores(shared: Any, rows: tuple[jax.Array], task: DenseTask) -> jax.Array:
    """Cosines of the patches of windows with the names: [W,S,S,3] -> [W,P,N]."""
    (params, texts, neighbourhood), (pixels,) = shared, rows
    features = normalize(dense_tokens(params, pixels, neighbourhood, task=task))  # [W,P,E]
    return jnp.einsum("wpe,ne->wpn", features, texts, precision=jax.lax.Precision.HIGHEST)  # [W,P,N]


def _windows(model: Model, looking: _Looking, images: Iterable[Any], batching: Batching) -> Iterator[_Window]:
    """The windows of all images, one image after another."""
    return itertools.chain.from_iterable(usable(images, functools.partial(_windows_of, model, looking), batching))


def _windows_of(model: Model, looking: _Looking, number: int, image: Any) -> list[_Window]:
    """One photo at its viewing size, cut into windows."""
    from PIL import Image

    names, short_side, window, stride = looking
    rgb, patch = to_rgb(image), model.config.vision.patch_size
    height, width = _viewing_size(rgb.height, rgb.width, max(short_side, window), patch)
    pixels = model.preprocessor.normalize(np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC)))  # [H,W,3]
    starts = [(y, x) for y in _starts(height, window, stride) for x in _starts(width, window, stride)]
    grid = height // patch, width // patch  # of the whole photo
    total, count = np.zeros((*grid, names), np.float32), np.zeros((*grid, 1), np.float32)
    view = _View(number, np.asarray(rgb), total, count, [len(starts)])
    return [_Window(view, y // patch, x // patch, pixels[y : y + window, x : x + window]) for y, x in starts]


def _viewing_size(height: int, width: int, short_side: int, patch: int) -> tuple[int, int]:
    """Sides when a photo's shorter one is made so long, whole patches."""
    scale = short_side / min(height, width)
    if max(height, width) / min(height, width) > 50:
        raise ImageError(
            f"{height}x{width} pixels are too long and thin to be looked at in windows: cut it into pieces"
        )
    rows, columns = (max(1, -(-round(side * scale) // patch)) for side in (height, width))
    return patch * rows, patch * columns


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last one ends where the photo does.

    >>> _starts(448, 224, 112), _starts(352, 224, 112)
    ([0, 112, 224], [0, 112, 128])
    """
    return sorted({min(start, length - window) for start in range(0, length - window + stride, stride)})


def _looked_at(windows: Iterator[_Window], run: Callable[..., Any], size: int, window: int) -> Iterator[_View]:
    """Views as soon as all of their windows were seen, `size` windows of whatever photos at a time."""
    waiting: list[_Window] = []

    def flush() -> Iterator[_View]:
        pixels = np.zeros((size, window, window, 3), np.float32)
        for place, one in enumerate(waiting):
            pixels[place] = one.pixels
        found = np.asarray(run(pixels))  # [W,P,N]
        side = round(found.shape[1] ** 0.5)
        for one, scores in zip(waiting, found, strict=False):
            here = slice(one.row, one.row + side), slice(one.column, one.column + side)
            one.view.total[here] += scores.reshape(side, side, -1)  # [side,side,N]
            one.view.count[here] += 1
            one.view.missing[0] -= 1
            if not one.view.missing[0]:
                yield one.view
        waiting.clear()

    for one in windows:
        waiting.append(one)
        if len(waiting) == size:
            yield from flush()
    if waiting:
        yield from flush()


# --- scores to pixels -------------------------------------------------------------------------------


def labels_of_scores(scores: np.ndarray, photo: np.ndarray, classes: np.ndarray, settings: Dense) -> np.ndarray:
    """Label of every pixel, [height,width] int32: scores [rows,columns,N], photo [height,width,3], classes [N].

    Strips of the photo at a time: names are enlarged, and compared, and forgotten.
    """
    height, width, _ = photo.shape
    down = resize_weights(scores.shape[0], height, "bilinear")  # [height,rows]
    wide = np.einsum("xc,rcn->rxn", resize_weights(scores.shape[1], width, "bilinear"), scores)  # [rows,width,N]
    strip = max(1, _STRIP // (width * scores.shape[2]))
    labels = np.empty((height, width), np.int32)
    for top in range(0, height, strip):
        at_pixels = np.tensordot(down[top : top + strip], wide, axes=1)  # [h,width,N]
        labels[top : top + strip] = decided(at_pixels, classes, settings)
    present = np.unique(labels)
    if settings.crf is None or len(present) == 1:
        return labels
    field = _sharpened(_maps_of(present, scores, classes, settings), for_crf(photo), settings.crf)  # [K,h,w]
    return present[nearest(field.argmax(0), height, width)].astype(np.int32)  # at most as large as a CRF takes


def decided(at_pixels: np.ndarray, classes: np.ndarray, settings: Dense) -> np.ndarray:
    """Label of the best name, of equals the first; background where it is not probable enough: [...,N] -> [...]."""
    best = at_pixels.argmax(-1)  # [...]
    labels = classes[best] + int(settings.background)  # -1, names of background, becomes 0
    if settings.threshold > 0:
        highest = np.take_along_axis(at_pixels, best[..., None], -1)  # [...,1]
        probability = 1 / np.exp(settings.scale * (at_pixels - highest)).sum(-1)
        labels = np.where(probability < settings.threshold, 0, labels)
    return labels


def _maps_of(present: np.ndarray, scores: np.ndarray, classes: np.ndarray, settings: Dense) -> np.ndarray:
    """How probable each label that occurs is, by the best of its names: [K,rows,columns] float32."""
    z = np.exp(settings.scale * (scores - scores.max(-1, keepdims=True)))
    names = z / z.sum(-1, keepdims=True)  # [rows,columns,N]
    of_label = classes + int(settings.background)
    # A class is as probable as its best name, not as all of them: adding names to it must not make it win.
    maps = [names[..., of_label == label].max(-1, initial=0.0) for label in present]
    if settings.background and settings.threshold > 0:
        maps[0] = np.maximum(maps[0], settings.threshold) if present[0] == 0 else maps[0]
    return np.stack(maps).astype(np.float32)  # [K,rows,columns]


def _sharpened(maps: np.ndarray, photo: np.ndarray, crf: CRF) -> np.ndarray:
    """Maps [K,rows,columns], enlarged to the photo and through the CRF: [K,height,width]."""
    down, across = (
        resize_weights(old, new, "bilinear") for old, new in zip(maps.shape[1:], photo.shape[:2], strict=True)
    )
    return np.asarray(dense_crf(down @ maps @ across.T, photo, crf))


def _checked_classes(classes: Sequence[int] | None, num_names: int, settings: Dense) -> np.ndarray:
    found = np.arange(num_names) if classes is None else np.asarray(classes)
    if found.shape != (num_names,) or found.dtype.kind not in "iu":
        raise LabelError(
            f"classes are {found.dtype} of shape {found.shape}, expected a whole number for each of {num_names} names"
        )
    lowest = -1 if settings.background else 0
    if found.min() < lowest:
        raise LabelError(f"classes go down to {found.min()}, expected {lowest} at least")
    if settings.threshold > 0 and not settings.background:
        raise DataError("a threshold needs a background for what lies below it")
    return found.astype(np.int32)


class _Looking(NamedTuple):
    """How every photo is looked at: for N names; its shorter side, the windows' side and stride, in pixels."""

    names: int
    short_side: int
    window: int
    stride: int


def _looking(model: Model, settings: Dense, num_names: int) -> _Looking:
    vision = model.config.vision
    patch, window = vision.patch_size, settings.window or vision.image_size
    stride = settings.stride or max(patch, window // 2 // patch * patch)
    for name, value in (("window", window), ("stride", stride)):
        if value % patch:
            raise DataError(f"{name} is {value} pixels, expected a multiple of the patch size {patch}")
    if window < 2 * patch or stride > window:
        raise DataError(f"windows of {window} pixels every {stride}: expected two patches at least, and no gaps")
    return _Looking(num_names, settings.short_side, window, stride)
