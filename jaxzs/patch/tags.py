"""Tags for a batch of images in one compiled program (TagCLIP, arXiv 2312.12828).

Local mode -> coarse scores -> dual-masking attention refinement -> class-wise re-identification -> tags: the
paper's steps in the paper's order, each a function of its own in this package.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params
from jaxzs.errors import DataError, ImageError, LabelError, renamed
from jaxzs.patch.grid import Grid, full_grid, grid_from_mask
from jaxzs.patch.local import coarse_scores, fuse_attention, local_tower
from jaxzs.patch.refine import dual_masking
from jaxzs.patch.reidentify import best_scores, find_candidates, reidentify, relative_cut
from jaxzs.patch.settings import Tagging, is_known

# Keywords of earlier versions, and what is written today.
NUMERICS = {
    "compute_dtype": "numerics=clip.Numerics(compute_dtype)",
    "precision": "numerics=clip.Numerics(precision=...)",
}
OF_TAGGING = NUMERICS | {
    name: f"settings=patch.Tagging({name}=...)"
    for name in (
        "attention_layers",
        "votes",
        "relative_threshold",
        "tag_threshold",
        "exact",
        "keep_border",
        "renormalize",
        "capacity",
    )
}


class Tags(NamedTuple):
    """Tags of a batch of images, and what led to them. P patches of the padded grid, row-major.

    scores: [B,F] final scores of the foreground classes, 0 to 1.
    tags: [B,F] bool; at least one for every image, none for an image that is all padding.
    threshold: [B,F] that the scores had to exceed.
    coarse: [B,P,C] probabilities of every patch, before refinement. Padded patches hold nothing of use.
    refined: [B,P,C] scores after dual masking.
    reidentified: [B,F] bool, classes that were looked at a second time.
    probability: [B,F] their probability in the second look, 0 for the others.
    boxes: [B,F,4] int32 (top, bottom, left, right) in patches, ends exclusive: where each class scores high.
    """

    scores: jax.Array
    tags: jax.Array
    threshold: jax.Array
    coarse: jax.Array
    refined: jax.Array
    reidentified: jax.Array
    probability: jax.Array
    boxes: jax.Array


@renamed(**OF_TAGGING)
def tag(
    params: Params,
    pixels: jax.Array | np.ndarray,
    text_features: jax.Array | np.ndarray,
    config: CLIPConfig,
    settings: Tagging = Tagging(),
    *,
    num_foreground: int,
    mask: jax.Array | np.ndarray | None = None,
    numerics: Numerics = Numerics(),
) -> Tags:
    """Tag images with the classes seen in them, without any training: TagCLIP, arXiv 2312.12828.

    Compiled once per shape and static setting. The numbers may be traced (`vmap` over thresholds or votes).

    Args:
      params: parameter tree of a checkpoint.
      pixels: [B,H,W,3] float, normalised; H and W any multiples of the patch size, at least two patches each.
      text_features: [C,E], foreground classes first, then background names; L2-normalised here.
      config: of the checkpoint.
      settings: thresholds, votes, layers; `Tagging(exact=True)` for the original code's oddities, too.
      num_foreground: F; only these classes become tags.
      mask: [B,H/p,W/p] bool, True on the patches of the image and False on padding, a rectangle in the upper left;
        all False for an image that only fills up the batch. None: no padding.
      numerics: how the encoder's products are computed.

    Returns:
      `Tags`.

    Raises:
      ImageError: pixels of wrong shape or type, not finite, or below two patches a side; a mask that does not fit.
      LabelError: num_foreground outside of 1..C.
      DataError: text features of another model, not finite or zero; layers or votes that the model does not have.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 96, 3), np.float32)
    >>> texts = zeroshot.text_proxies(model, ["circle", "square", "ground"])  # the last is background
    >>> tags = patch.tag(model.params, pixels, texts, model.config, num_foreground=2)
    >>> tags.scores.shape, tags.tags.dtype, tags.refined.shape  # 6 x 12 patches
    ((1, 2), dtype('bool'), (1, 72, 3))
    >>> bold = patch.tag(model.params, pixels, texts, model.config, patch.Tagging(votes=1), num_foreground=2)
    >>> bool((bold.refined.max() >= tags.refined.max()))
    True
    """
    check_tower(config)
    check_pixels(pixels, config, mask)
    check_texts("text_features", text_features, config)
    check_foreground(num_foreground, len(text_features))
    settings = settings.resolved(config.vision.num_hidden_layers, num_foreground)
    shared = Tagger(params, jnp.asarray(text_features), settings)
    rows = jnp.asarray(pixels), None if mask is None else jnp.asarray(mask)
    return tag_program(shared, rows, Task(config, num_foreground, numerics))


class Tagger(NamedTuple):
    """What all images share. texts [C,E]; settings that are `resolved`."""

    params: Params
    texts: jax.Array
    settings: Tagging


class Task(NamedTuple):
    """What of a call is part of the program: the model's shape, F, and how products are computed."""

    config: CLIPConfig
    num_foreground: int
    numerics: Numerics


@functools.partial(jax.jit, static_argnames="task")
def tag_program(shared: Tagger, rows: tuple[jax.Array, jax.Array | None], task: Task) -> Tags:
    """`tag`, unchecked: the steps of the paper in its order. rows: pixels [B,H,W,3], mask [B,rows,columns] or None."""
    (params, texts, settings), (pixels, mask) = shared, rows
    config, num_foreground, numerics = task
    B, height, width, _ = pixels.shape
    size = config.vision.patch_size
    grid = full_grid(B, height // size, width // size) if mask is None else grid_from_mask(mask)

    local = local_tower(params, pixels, config, grid, half_positions=settings.half_positions, numerics=numerics)
    attention = fuse_attention(  # [B,P,P]
        local.attention, grid.patches, settings.attention_layers or (), settings.votes, renormalize=settings.renormalize
    )
    coarse = coarse_scores(local.tokens, texts, params["logit_scale"], int(config.vit.class_token))  # [B,P,C]
    refined = dual_masking(attention, coarse, grid, keep_border=settings.keep_border).scores  # [B,P,C], 3.2
    candidates = find_candidates(
        refined,
        num_foreground,
        settings.relative_threshold,
        grid,
        stop_at_empty=settings.stop_at_empty,
        keep_border=settings.keep_border,
    )
    capacity = settings.capacity or B
    # Section 3.3: only what passes the threshold is looked at again; everything else keeps its patch score.
    probability = reidentify(params, pixels, texts, candidates, config, capacity=capacity, numerics=numerics)
    scores = fuse_scores(best_scores(refined, num_foreground, grid), probability, candidates.accepted)  # [B,F]
    tags, threshold = decide(scores, settings.tag_threshold, grid)  # [B,F] each
    return Tags(scores, tags, threshold, coarse, refined, candidates.accepted, probability, candidates.boxes)


def fuse_scores(best: jax.Array, probability: jax.Array, reidentified: jax.Array) -> jax.Array:
    """Average of patch score and second look, where there was one: three arrays [B,F] -> [B,F].

    best: of the refined patches. probability: of `reidentify`. reidentified: bool, where it counts.
    TagCLIP, arXiv 2312.12828, section 3.3.

    >>> best, again = jnp.array([[0.75, 0.25]]), jnp.array([[0.25, 0.0]])
    >>> patch.fuse_scores(best, again, jnp.array([[True, False]])).tolist()
    [[0.5, 0.25]]
    """
    return jnp.where(reidentified, 0.5 * best + 0.5 * probability, best)


def decide(scores: jax.Array, relative_threshold: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Tags and the thresholds they exceed, a fraction of each image's range of scores: [B,F], [F] -> two [B,F].

    An image whose scores are all equal, or below their thresholds, gets the tag of its first highest score.

    scores [B,F]; relative_threshold [F], 0 to 1. Returns tags bool and thresholds float32, both [B,F]. As the code of
    TagCLIP (arXiv 2312.12828) does.

    >>> scores = jnp.array([[0.9, 0.2, 0.6]])
    >>> tags, threshold = patch.decide(scores, jnp.full(3, 0.5), patch.full_grid(1, 2, 2))
    >>> tags.tolist(), round(float(threshold[0, 0]), 2)
    ([[True, False, True]], 0.55)
    """
    lowest, highest = scores.min(1, keepdims=True), scores.max(1, keepdims=True)  # [B,1]
    threshold = relative_cut(lowest, highest, relative_threshold[None, :])  # [B,F]
    tags = scores > threshold
    first = jax.nn.one_hot(scores.argmax(1), scores.shape[1], dtype=bool)  # [B,F], the first of the highest
    tags = jnp.where(tags.any(1, keepdims=True), tags, first)
    return tags & grid.patches.any(1)[:, None], threshold


# --- checks at the boundary -------------------------------------------------------------------------


def check_tower(config: CLIPConfig) -> None:
    """Raise `ConfigError` for towers whose patches do not attend to each other (ResNets), and for NaFlex."""
    config.check_one_size()
    config.vit  # noqa: B018 # which raises


def check_pixels(pixels: Any, config: CLIPConfig, mask: Any) -> None:
    """Raise `ImageError` unless pixels [B,H,W,3] and mask [B,H/p,W/p] fit the model and each other, and are finite."""
    config.check_one_size()
    vision, shape = config.vision, tuple(pixels.shape)
    if len(shape) != 4 or shape[3] != vision.num_channels or shape[0] == 0:
        raise ImageError(
            f"pixels have shape {shape}, expected [B,H,W,{vision.num_channels}] (channels last) of at least one image"
        )
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ImageError(f"pixels are {pixels.dtype}, expected normalised floats")
    size = vision.patch_size
    if shape[1] % size or shape[2] % size:
        raise ImageError(
            f"pixels are {shape[1]}x{shape[2]}, expected multiples of the patch size {size}",
            python="jaxzs.patch.prepare_image resizes",
        )
    rows, columns = shape[1] // size, shape[2] // size
    if min(rows, columns) < 2:
        raise ImageError(
            f"pixels are {shape[1]}x{shape[2]}, that is {rows}x{columns} patches of {size}; at least "
            "2x2 are needed to tell places apart: enlarge the image"
        )
    if mask is not None:
        _check_mask(mask, (shape[0], rows, columns))
    if not is_known(pixels) or not (mask is None or is_known(mask)):
        return
    broken = ~np.isfinite(np.asarray(pixels, np.float32)).all(-1)  # [B,H,W]
    if mask is not None:
        broken &= np.asarray(mask).repeat(size, 1).repeat(size, 2)  # what padding holds is never looked at
    if broken.any():
        image, row, column = np.argwhere(broken)[0]
        raise ImageError(f"pixels of image {image} are not finite at row {row}, column {column}")


def _check_mask(mask: Any, shape: tuple[int, int, int]) -> None:
    if tuple(mask.shape) != shape or mask.dtype != bool:
        raise ImageError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool [B,rows,columns] = "
            f"{list(shape)}, one entry a patch"
        )
    if not is_known(mask):
        return
    valid: np.ndarray = np.asarray(mask)
    sides = np.stack([valid.any(2).sum(1), valid.any(1).sum(1)])  # [2,B]
    row, column = np.arange(shape[1])[None, :, None], np.arange(shape[2])[None, None, :]
    rectangle = (row < sides[0][:, None, None]) & (column < sides[1][:, None, None])
    if (valid != rectangle).any() or (sides == 1).any():
        raise ImageError(
            "mask: the True entries of an image must fill a rectangle in its upper left corner, of at least 2x2 patches"
        )


def check_texts(name: str, features: Any, config: CLIPConfig) -> None:
    """Raise `DataError` unless features are [C,E] of the model, C at least 1, finite, without a row of zeros."""
    shape = tuple(features.shape)
    if len(shape) != 2 or shape[1] != config.projection_dim or not shape[0]:
        raise DataError(
            f"{name} have shape {shape}, expected [C,{config.projection_dim}] with at least one row: were they made "
            "by the same checkpoint?"
        )
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise DataError(f"{name} are {features.dtype}, expected floats")
    if not is_known(features):
        return
    rows = np.asarray(features, np.float32)
    if not (finite := np.isfinite(rows).all(1)).all():
        raise DataError(f"{name}: row {int(np.argmin(finite))} is not finite")
    if not (some := rows.any(1)).all():
        raise DataError(f"{name}: row {int(np.argmin(some))} is all zeros and points nowhere")


def check_foreground(num_foreground: int, num_texts: int) -> None:
    """Raise `LabelError` unless 1 <= F <= C."""
    if not 1 <= num_foreground <= num_texts:
        raise LabelError(
            f"num_foreground is {num_foreground}, expected 1 to {num_texts} (the number of text "
            "features); background names come after the foreground"
        )
