"""Tags for a batch of images in one compiled program (TagCLIP, arXiv 2312.12828).

Local mode -> coarse scores -> dual-masking attention refinement -> class-wise re-identification -> tags: the
paper's steps in the paper's order, each a function of its own in this package.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params, Precision
from jaxzs.errors import DataError, ImageError, LabelError
from jaxzs.patch.grid import Grid, full_grid, grid_from_mask
from jaxzs.patch.local import coarse_scores, default_attention_layers, default_votes, fuse_attention, local_tower
from jaxzs.patch.refine import dual_masking
from jaxzs.patch.reidentify import best_scores, find_candidates, reidentify, relative_cut


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


def tag(
    params: Params,
    pixels: jax.Array | np.ndarray,
    text_features: jax.Array | np.ndarray,
    config: CLIPConfig,
    *,
    num_foreground: int,
    attention_layers: Sequence[int] | None = None,
    votes: int | jax.Array | None = None,
    relative_threshold: float | jax.Array = 0.5,
    exact: bool = False,
    mask: jax.Array | np.ndarray | None = None,
    tag_threshold: float | jax.Array | np.ndarray | None = None,
    keep_border: bool = False,
    renormalize: bool = False,
    capacity: int | None = None,
    compute_dtype: Any = None,
    precision: Precision = None,
) -> Tags:
    """Tag images with the classes seen in them, without any training: TagCLIP, arXiv 2312.12828.

    Compiled once per shape and setting. The numbers may be traced (`vmap` over thresholds or votes).

    Args:
      params: parameter tree of a checkpoint.
      pixels: [B,H,W,3] float, normalised; H and W any multiples of the patch size, at least two patches each.
      text_features: [C,E], foreground classes first, then background names; L2-normalised here.
      config: of the checkpoint.
      num_foreground: F; only these classes become tags.
      attention_layers: whose attention is averaged; by default the three before the last (8, 9, 10 of 12). COCO-Stuff
        takes all before the last, `default_attention_layers(12, "all")`.
      votes: layers that must agree; by default a third of them (4 of 12).
      relative_threshold: 0 to 1, the fraction of the range of scores above which a class is re-identified, and tagged.
      exact: do as the original code does where it is odd: positions rounded to half precision, and a candidate
        without a box ends the re-identification of the image.
      mask: [B,H/p,W/p] bool, True on the patches of the image and False on padding, a rectangle in the upper left;
        all False for an image that only fills up the batch. None: no padding.
      tag_threshold: the fraction for tags alone, a number or one for each class [F]; by default `relative_threshold`.
      keep_border: let boxes reach the last row and column of the grid (not in the paper's code).
      renormalize: make the rows of the fused attention sum to 1 (not in the paper).
      capacity: candidates that go through the encoder at a time, by default B; any number of them is served.
      compute_dtype: None (float32) or the type of the operands of the encoder's products.
      precision: XLA precision of the encoder's products.

    Returns:
      `Tags`.

    Raises:
      ImageError: pixels of wrong shape, type, or below two patches a side; a mask that does not fit.
      LabelError: num_foreground outside of 1..C.
      DataError: text features of another model; layers or numbers out of range.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 96, 3), np.float32)
    >>> texts = zeroshot.text_proxies(model, ["circle", "square", "ground"])  # the last is background
    >>> tags = patch.tag(model.params, pixels, texts, model.config, num_foreground=2)
    >>> tags.scores.shape, tags.tags.dtype, tags.refined.shape  # 6 x 12 patches
    ((1, 2), dtype('bool'), (1, 72, 3))
    """
    check_pixels(pixels, config, mask)
    _check_texts(text_features, config, num_foreground)
    layers = _checked_layers(attention_layers, config.vision.num_hidden_layers)
    if capacity is not None and capacity < 1:
        raise DataError(f"capacity is {capacity}, expected at least 1 candidate per encoder call")
    for name, value in (("relative_threshold", relative_threshold), ("tag_threshold", tag_threshold)):
        _check_fraction(name, value)
    fraction = relative_threshold if tag_threshold is None else tag_threshold
    fraction = jnp.asarray(fraction, jnp.float32)
    if fraction.ndim > 1 or (fraction.ndim == 1 and fraction.shape[0] != num_foreground):
        raise DataError(f"tag_threshold has shape {fraction.shape}, expected one number or [{num_foreground}]")
    return _tag(
        params,
        jnp.asarray(pixels),
        jnp.asarray(text_features),
        jnp.asarray(default_votes(config.vision.num_hidden_layers) if votes is None else votes),
        jnp.asarray(relative_threshold, jnp.float32),
        jnp.broadcast_to(fraction, (num_foreground,)),
        None if mask is None else jnp.asarray(mask),
        config=config,
        num_foreground=num_foreground,
        layers=layers,
        exact=exact,
        keep_border=keep_border,
        renormalize=renormalize,
        capacity=capacity or pixels.shape[0],
        numerics=Numerics(compute_dtype, precision),
    )


_STATIC = ("config", "num_foreground", "layers", "exact", "keep_border", "renormalize", "capacity", "numerics")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _tag(
    params: Params,
    pixels: jax.Array,
    text_features: jax.Array,
    votes: jax.Array,
    relative_threshold: jax.Array,
    tag_threshold: jax.Array,
    mask: jax.Array | None,
    *,
    config: CLIPConfig,
    num_foreground: int,
    layers: tuple[int, ...],
    exact: bool,
    keep_border: bool,
    renormalize: bool,
    capacity: int,
    numerics: Numerics,
) -> Tags:
    B, height, width, _ = pixels.shape
    size = config.vision.patch_size
    padded = mask is not None
    grid = full_grid(B, height // size, width // size) if mask is None else grid_from_mask(mask)

    local = local_tower(params, pixels, config, grid, padded=padded, half_positions=exact, numerics=numerics)
    attention = fuse_attention(local.attention, grid.patches, layers, votes, renormalize=renormalize)
    coarse = coarse_scores(local.tokens, text_features, params["logit_scale"])
    refined = dual_masking(attention, coarse, grid, keep_border=keep_border).scores
    candidates = find_candidates(
        refined, num_foreground, relative_threshold, grid, stop_at_empty=exact, keep_border=keep_border
    )
    probability = reidentify(params, pixels, text_features, candidates, config, capacity=capacity, numerics=numerics)
    best = best_scores(refined, num_foreground, grid)
    scores = fuse_scores(best, probability, candidates.accepted)
    tags, threshold = decide(scores, tag_threshold, grid)
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
    threshold = relative_cut(scores.min(1, keepdims=True), scores.max(1, keepdims=True), relative_threshold[None, :])
    tags = scores > threshold
    highest = jax.nn.one_hot(scores.argmax(1), scores.shape[1], dtype=bool)
    tags = jnp.where(tags.any(1, keepdims=True), tags, highest)
    return tags & grid.patches.any(1)[:, None], threshold


# --- checks at the boundary -------------------------------------------------------------------------


def check_pixels(pixels: Any, config: CLIPConfig, mask: Any) -> None:
    """Raise `ImageError` unless pixels [B,H,W,3] and mask [B,H/p,W/p] fit the model and each other."""
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
            f"pixels are {shape[1]}x{shape[2]}, expected multiples of the patch size {size}; "
            "jaxzs.patch.prepare_image resizes"
        )
    rows, columns = shape[1] // size, shape[2] // size
    if min(rows, columns) < 2:
        raise ImageError(
            f"pixels are {shape[1]}x{shape[2]}, that is {rows}x{columns} patches of {size}; at least "
            "2x2 are needed to tell places apart: enlarge the image"
        )
    if mask is None:
        return
    if tuple(mask.shape) != (shape[0], rows, columns) or mask.dtype != bool:
        raise ImageError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool [B,rows,columns] = "
            f"{[shape[0], rows, columns]}, one entry a patch"
        )
    if isinstance(mask, jax.core.Tracer):
        return
    if isinstance(mask, jax.Array) and not mask.is_fully_addressable:
        return
    valid: np.ndarray = np.asarray(mask)
    sides = np.stack([valid.any(2).sum(1), valid.any(1).sum(1)])  # [2,B]
    row, column = np.arange(rows)[None, :, None], np.arange(columns)[None, None, :]
    rectangle = (row < sides[0][:, None, None]) & (column < sides[1][:, None, None])
    if (valid != rectangle).any() or (sides == 1).any():
        raise ImageError(
            "mask: the True entries of an image must fill a rectangle in its upper left corner, of at least 2x2 patches"
        )


def _check_texts(text_features: Any, config: CLIPConfig, num_foreground: int) -> None:
    shape = tuple(text_features.shape)
    if len(shape) != 2 or shape[1] != config.projection_dim:
        raise DataError(
            f"text_features have shape {shape}, expected [C,{config.projection_dim}]: were they made "
            "by the same checkpoint?"
        )
    if not 1 <= num_foreground <= shape[0]:
        raise LabelError(
            f"num_foreground is {num_foreground}, expected 1 to {shape[0]} (the number of text "
            "features); background names come after the foreground"
        )


def _checked_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    if layers is None:
        return default_attention_layers(num_layers)
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise DataError(f"attention_layers are {list(layers)}, expected numbers from 0 to {num_layers - 1}")
    return tuple(layers)


def _check_fraction(name: str, value: Any) -> None:
    if value is None or isinstance(value, jax.core.Tracer):
        return
    if not (np.all(np.asarray(value) >= 0) and np.all(np.asarray(value) <= 1)):
        raise DataError(f"{name} is {value}, expected a fraction from 0 to 1")
