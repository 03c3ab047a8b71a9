"""From tags to masks: classify-then-segment (CLIP-ES, arXiv 2212.09506, with TagCLIP's tags).

Class activation maps -> spread along a class-aware affinity made of the attention -> enlarged to the image -> labels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params
from jaxzs.clip.model import resize_weights
from jaxzs.errors import DataError, renamed
from jaxzs.patch.boxes import above_threshold, union_of_boxes
from jaxzs.patch.cam import CamTexts, check_tower, class_activation_maps, min_max_with_epsilon
from jaxzs.patch.grid import Grid, full_grid, grid_from_mask
from jaxzs.patch.settings import Segmenting, is_known
from jaxzs.patch.tags import NUMERICS, check_pixels, check_texts
from jaxzs.patch.tower import between_patches

OF_SEGMENTING = NUMERICS | {
    name: f"settings=patch.Segmenting({name}=...)"
    for name in ("box_threshold", "affinity_layers", "exact", "keep_border", "background", "crf")
}
_NORMALIZATIONS = 3  # of columns, then rows


class Segmentation(NamedTuple):
    """Maps of the tags of a batch of images, on the padded grid.

    probability: [B,K+M] softmax over an image's tags and the M background names.
    activation: [B,K,rows,columns] class activation maps, 0 to 1.
    box_mask: [B,K,rows,columns] bool, where the affinity may spread from.
    refined: [B,K,rows,columns] after the affinity. maps: the same, 0 to 1.
    """

    probability: jax.Array
    activation: jax.Array
    box_mask: jax.Array
    refined: jax.Array
    maps: jax.Array


def affinity(attention: Sequence[jax.Array], grid: Grid, layers: Sequence[int]) -> jax.Array:
    """How strongly patches belong together: L x [B,T,T] head means -> [B,P,P].

    The mean over layers without the class token, made doubly stochastic by Sinkhorn-like steps (columns, then
    rows, three times), symmetrised, and squared: two steps along it.

    CLIP-ES, arXiv 2212.09506, class-aware attention-based affinity.

    >>> weights = jnp.array([[[0.2, 0.4, 0.4], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]])  # one layer, two patches
    >>> patch.affinity([weights], patch.full_grid(1, 1, 2), layers=(0,))[0].tolist()
    [[0.625, 0.375], [0.375, 0.625]]
    """
    pairs = grid.patches[:, :, None] & grid.patches[:, None, :]  # [B,P,P]
    mean = sum(between_patches(attention[layer], grid.patches) for layer in layers) / len(layers)  # [B,P,P]
    weights = jnp.where(pairs, mean, 0.0)
    for _ in range(_NORMALIZATIONS):
        weights = weights / _or_one(weights.sum(1, keepdims=True))  # columns first, as in CLIP-ES
        weights = weights / _or_one(weights.sum(2, keepdims=True))  # then rows
    symmetric = (weights + weights.swapaxes(1, 2)) / 2  # [B,P,P]
    return jnp.matmul(symmetric, symmetric, precision=jax.lax.Precision.HIGHEST)  # [B,P,P]


def _or_one(sums: jax.Array) -> jax.Array:
    """Sums to divide by, 1 where they are 0: compilers multiply divisors, and the square of a tiny float would be 0."""
    return jnp.where(sums > 0, sums, 1.0)


@renamed(**OF_SEGMENTING)
def segment(
    params: Params,
    pixels: jax.Array | np.ndarray,
    text_features: jax.Array | np.ndarray,
    background_features: jax.Array | np.ndarray,
    tags: jax.Array | np.ndarray,
    config: CLIPConfig,
    settings: Segmenting = Segmenting(),
    *,
    mask: jax.Array | np.ndarray | None = None,
    numerics: Numerics = Numerics(),
) -> Segmentation:
    """Maps of where the tags of each image are, without any training: CLIP-ES, arXiv 2212.09506.

    Args:
      params: parameter tree of a checkpoint.
      pixels: [B,H,W,3] normalised; H and W multiples of the patch size.
      text_features: [C,E] of the classes (CLIP-ES: one template, "a clean origami {}.").
      background_features: [M,E] of names that compete with the tags, M at least 1.
      tags: [B,K] int, classes of each image; -1 where it has fewer than K.
      config: of the checkpoint.
      settings: `Segmenting`; what it says of backgrounds and the CRF is for `segment_images`, which makes labels.
      mask: [B,H/p,W/p] bool, False on padding; None: no padding.
      numerics: how the encoder's products are computed.

    Returns:
      `Segmentation`; `label_map` makes labels of one image's maps.

    Raises:
      ImageError: pixels or mask of wrong shape.
      DataError: texts of another model, tags outside of the classes.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 96, 3), np.float32)
    >>> texts = zeroshot.text_proxies(model, ["circle", "square"])
    >>> others = zeroshot.text_proxies(model, ["ground", "wall"])
    >>> found = patch.segment(model.params, pixels, texts, others, np.array([[1, -1]]), model.config)
    >>> found.maps.shape, found.probability.shape  # one tag, and a place for another
    ((1, 2, 6, 12), (1, 4))
    """
    check_tower(config)
    check_pixels(pixels, config, mask)
    check_texts("text_features", text_features, config)
    check_texts("background_features", background_features, config)
    check_tags(tags, len(pixels), len(text_features))
    texts, others = jnp.asarray(text_features, jnp.float32), jnp.asarray(background_features, jnp.float32)
    shared = Segmenter(params, texts, others, settings.resolved(config.vision.num_hidden_layers))
    rows = jnp.asarray(pixels), jnp.asarray(tags, jnp.int32), None if mask is None else jnp.asarray(mask)
    return segment_program(shared, rows, (config, numerics))


class Segmenter(NamedTuple):
    """What all images share. texts [C,E] of classes; others [M,E] of background names; settings that are `resolved`."""

    params: Params
    texts: jax.Array
    others: jax.Array
    settings: Segmenting


@functools.partial(jax.jit, static_argnames="task")
def segment_program(
    shared: Segmenter, images: tuple[jax.Array, jax.Array, jax.Array | None], task: tuple[CLIPConfig, Numerics]
) -> Segmentation:
    """`segment`, unchecked. images: pixels [B,H,W,3], tags [B,K], mask [B,rows,columns] or None."""
    (params, texts, others, settings), (pixels, tags, mask) = shared, images
    config, numerics = task
    B, size = pixels.shape[0], config.vision.patch_size
    rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
    grid = full_grid(B, rows, columns) if mask is None else grid_from_mask(mask)
    background = jnp.broadcast_to(others[None], (B, *others.shape))  # [B,M,E]
    names = jnp.concatenate([texts[jnp.maximum(tags, 0)], background], axis=1)  # [B,K+M,E]
    half, competing = settings.half_positions, CamTexts(names, tags >= 0)
    cam = class_activation_maps(params, pixels, competing, config, grid, half_positions=half, numerics=numerics)
    activation = cam.maps.reshape(*tags.shape, rows, columns)  # [B,K,rows,columns]
    threshold = jnp.broadcast_to(settings.box_threshold, tags.shape)  # [B,K]
    boxes = union_of_boxes(above_threshold(activation, threshold), grid, keep_border=settings.keep_border)
    boxed = jnp.where(boxes, activation, 0.0).reshape(cam.maps.shape)  # [B,K,P]
    spread = affinity(cam.attention, grid, settings.affinity_layers or ())  # [B,P,P], symmetric
    refined = jnp.matmul(boxed, spread.swapaxes(1, 2), precision=jax.lax.Precision.HIGHEST)  # [B,K,P]
    maps = min_max_with_epsilon(refined, grid)  # [B,K,P]
    grid_shape = activation.shape
    return Segmentation(
        cam.probability,
        activation,
        boxes,
        refined.reshape(grid_shape),
        jnp.where((tags >= 0)[:, :, None], maps, 0.0).reshape(grid_shape),
    )


def enlarge(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Maps of one image on its grid, resized bilinearly to its pixels: [K,rows,columns] -> [K,height,width] float16.

    Half-pixel centres, clamped borders; stored in half precision, as the original does.

    >>> patch.enlarge(np.array([[[0.0, 1.0]]]), height=1, width=4).tolist()
    [[[0.0, 0.25, 0.75, 1.0]]]
    """
    maps = np.asarray(maps, np.float32)
    down = resize_weights(maps.shape[1], height, "bilinear")  # [height,rows]
    across = resize_weights(maps.shape[2], width, "bilinear")  # [width,columns]
    return (down @ maps @ across.T).astype(np.float16)  # [K,height,width]


def check_maps(maps: np.ndarray, tags: np.ndarray) -> None:
    """Raise `DataError` unless there is a finite map [rows,columns] for each of the tags [K]."""
    if maps.ndim != 3 or len(maps) != len(tags) or (len(tags) and 0 in maps.shape):
        raise DataError(f"maps have shape {maps.shape}, expected [{len(tags)},rows,columns], a map for each tag")
    if not np.isfinite(maps).all():
        raise DataError("maps are not all finite")


def class_numbers(tags: Any, num_classes: int | None = None) -> np.ndarray:
    """Tags of one image: [K] int32. Raises `DataError` unless they are numbers of the C classes."""
    found = np.asarray(tags)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise DataError(f"tags are {tags!r}, expected a list of class numbers")
    if found.size and (found.min() < 0 or (num_classes is not None and found.max() >= num_classes)):
        allowed = "0 at least" if num_classes is None else f"0 to {num_classes - 1}"
        raise DataError(f"tags range from {found.min()} to {found.max()}, expected {allowed}")
    return found.astype(np.int32)


def label_map(maps: np.ndarray, tags: Sequence[int] | np.ndarray, *, background: bool = True) -> np.ndarray:
    """Label of every pixel: maps [K,height,width], tags K class numbers -> [height,width] int32.

    With a background, it scores 1 - the highest map and is label 0, class c is c + 1 (VOC, COCO); without, the
    best class wins and is c (COCO-Stuff). The first of equals wins.

    >>> maps = np.array([[[0.9, 0.2, 0.4]], [[0.1, 0.1, 0.7]]])  # of the classes 3 and 5, three pixels
    >>> patch.label_map(maps, [3, 5]).tolist()
    [[4, 0, 6]]
    >>> patch.label_map(maps, [3, 5], background=False).tolist()
    [[3, 3, 5]]
    """
    maps, tags = np.asarray(maps), class_numbers(tags)
    check_maps(maps, tags)
    return labels_of_maps(maps, tags, background)


def labels_of_maps(maps: np.ndarray, tags: np.ndarray, background: bool) -> np.ndarray:
    """`label_map` of checked maps and tags."""
    if len(tags) == 0:
        if not background:
            raise DataError("an image without tags has no labels where there is no background")
        return np.zeros(maps.shape[1:], np.int32)
    if not background:
        return tags[maps.argmax(0)]
    scores = np.concatenate([1 - maps.max(0, keepdims=True), maps])  # [1+K,height,width]
    return np.concatenate([[0], tags + 1]).astype(np.int32)[scores.argmax(0)]


def check_tags(tags: Any, num_images: int, num_classes: int) -> None:
    """Raise `DataError` unless tags are class numbers [B,K], or -1."""
    if len(tags.shape) != 2 or tags.shape[0] != num_images or tags.shape[1] == 0:
        raise DataError(
            f"tags have shape {tuple(tags.shape)}, expected [B,K] = [{num_images}, at least 1]; -1 "
            "fills up where an image has fewer tags"
        )
    if not jnp.issubdtype(tags.dtype, jnp.integer):
        raise DataError(f"tags are {tags.dtype}, expected class numbers")
    if not is_known(tags):
        return
    lowest, highest = int(np.min(tags)), int(np.max(tags))
    if lowest < -1 or highest >= num_classes:
        raise DataError(f"tags range from {lowest} to {highest}, expected -1 to {num_classes - 1}")
