"""Class-wise re-identification (CWR; TagCLIP, arXiv 2312.12828, section 3.3).

Where a class scores high, the image is cropped and encoded again, its class token seeing only the class's region;
the probability of the class in that second look is averaged with its patch score. The candidates of all images of
a batch share encoder calls of fixed size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params
from jaxzs.clip.model import all_blocks, pool_image, project_image, read_image, vision_embeddings, vision_input
from jaxzs.patch.boxes import min_max, tight_boxes
from jaxzs.patch.grid import Grid, bilinear_taps, interpolate
from jaxzs.patch.local import class_probabilities

_HIDDEN = -1000.0  # the original's additive mask


class Candidates(NamedTuple):
    """Classes to look at a second time.

    chosen: [B,F] bool. threshold: [B]. boxes: [B,F,4] int32 (top, bottom, left, right) in patches, of every class.
    region: [B,F,rows,columns] bool. accepted: [B,F] bool, those of `chosen` that have a box to look at.
    """

    chosen: jax.Array
    threshold: jax.Array
    boxes: jax.Array
    region: jax.Array
    accepted: jax.Array


def relative_cut(lowest: jax.Array, highest: jax.Array, relative: float | jax.Array) -> jax.Array:
    """The value at a fraction of the way from lowest to highest."""
    return lowest + relative * (highest - lowest)


def find_candidates(
    refined: jax.Array,
    num_foreground: int,
    relative_threshold: float | jax.Array,
    grid: Grid,
    *,
    stop_at_empty: bool = False,
    keep_border: bool = False,
) -> Candidates:
    """Foreground classes whose best patch exceeds a fraction of the range of all scores of the image.

    refined [B,P,C]; the range covers background classes, too. `stop_at_empty`: the first candidate without a box
    rules out those after it (what the original does) and not only itself.

    relative_threshold: the fraction, 0 to 1; may be traced. TagCLIP, arXiv 2312.12828, section 3.3.

    >>> refined = jnp.zeros((1, 9, 2)).at[0, 0, 0].set(0.9).at[0, 4, 1].set(0.1)  # 3 x 3 patches, two classes
    >>> candidates = jax.jit(patch.find_candidates, static_argnums=1)
    >>> found = candidates(refined, 2, 0.5, patch.full_grid(1, 3, 3))
    >>> found.chosen.tolist(), found.boxes[0, 0].tolist()  # top, bottom, left, right
    ([[True, False]], [0, 1, 0, 1])
    """
    inside = grid.patches[:, :, None]
    lowest = jnp.where(inside, refined, jnp.inf).min((1, 2))  # [B], over background classes too
    highest = jnp.where(inside, refined, -jnp.inf).max((1, 2))  # [B]
    threshold = relative_cut(lowest, highest, relative_threshold)  # [B]; NaN for an image of padding
    best = best_scores(refined, num_foreground, grid)  # [B,F]
    chosen = best > threshold[:, None]  # [B,F]
    relative = min_max(refined[:, :, :num_foreground], grid.patches)  # [B,P,F]
    region = (relative > 0.5).swapaxes(1, 2).reshape(*chosen.shape, *grid.shape)  # [B,F,rows,columns]
    boxes = tight_boxes(region, grid, keep_border=keep_border)  # [B,F,4]
    top, bottom, left, right = jnp.moveaxis(boxes, -1, 0)
    empty = (top == bottom) | (left == right)  # [B,F]
    if stop_at_empty:
        empty = jnp.cumsum(chosen & empty, axis=1) > 0  # the original leaves its loop there
    return Candidates(chosen, threshold, boxes, region, chosen & ~empty)


def best_scores(refined: jax.Array, num_foreground: int, grid: Grid) -> jax.Array:
    """Best patch of each foreground class: refined [B,P,C] -> [B,F]; 0 for an image of padding."""
    inside = grid.patches[:, :, None]
    best = jnp.where(inside, refined[:, :, :num_foreground], -jnp.inf).max(1)  # [B,F]
    return jnp.where(grid.patches.any(1)[:, None], best, 0.0)


def crop_pixels(pixels: jax.Array, image: jax.Array, box: jax.Array, patch_size: int, size: int) -> jax.Array:
    """One box of one image, resized bilinearly without antialiasing: pixels [B,H,W,3], box [4] -> [size,size,3]."""
    top, bottom, left, right = box * patch_size  # in pixels
    above, below, down = bilinear_taps(bottom - top, size, size)
    before, after, across = bilinear_taps(right - left, size, size)
    rows = pixels.at[image, jnp.stack([top + above, top + below])].get(mode="clip")  # [2,S,W,3]
    left_pixels, right_pixels = rows[:, :, left + before], rows[:, :, left + after]  # [2,S,S,3] each
    wide = interpolate(left_pixels, right_pixels, across[None, None, :, None])  # [2,S,S,3]
    return interpolate(wide[0], wide[1], down[:, None, None])  # [S,S,3]


def nearest_indices(largest: int, size: int) -> np.ndarray:
    """Nearest neighbours of every resize from n = 0..largest to `size` samples: [largest+1,size] int32.

    floor(j * n/size) with n/size in float32, as torch has it; a table, because a compiler may divide differently.
    """
    ratio = np.arange(largest + 1, dtype=np.float32)[:, None] / np.float32(size)
    return np.floor(np.arange(size, dtype=np.float32)[None, :] * ratio).astype(np.int32)


def crop_region(region: jax.Array, box: jax.Array, native: tuple[int, int]) -> jax.Array:
    """A region inside its box, resized to the native grid: region [rows,columns] bool, box [4] -> [P'] bool."""
    top, bottom, left, right = box
    rows = jnp.asarray(nearest_indices(region.shape[0], native[0]))[bottom - top]  # the native grid's rows
    columns = jnp.asarray(nearest_indices(region.shape[1], native[1]))[right - left]  # its columns
    return region[(top + rows)[:, None], (left + columns)[None, :]].reshape(-1)  # [P']


def region_tokens(
    params: Params, crops: jax.Array, regions: jax.Array, config: CLIPConfig, numerics: Numerics = Numerics()
) -> jax.Array:
    """What the tower reads of a region alone: crops [M,S,S,3], regions [M,P'] bool -> [M,E], not normalised.

    A class token sees only its region, in every layer; a mean (CLIPA) or a MAP head (SigLIP) pools only that. Patches
    attend freely. The last block is evaluated for the class token alone.
    """
    tree, vision = params["vision_model"], config.vit
    hidden = jnp.where(regions, 0.0, _HIDDEN)  # [M,P']
    x = vision_embeddings(tree, crops, vision, None, numerics)  # [M,T,D]
    if vision.pooling != "class":
        x = all_blocks(tree, vision_input(params, x, vision), vision, None, numerics)  # [M,T,D]
        return project_image(params, pool_image(tree, x, vision, numerics, hidden[:, None, None]), numerics)  # [M,E]
    row = jnp.pad(hidden, ((0, 0), (1, 0)))[:, None, None, :]  # [M,1,1,T]; it may see itself
    bias = jnp.pad(row, ((0, 0), (0, 0), (0, regions.shape[1]), (0, 0)))  # other queries: free
    return read_image(params, x, config, numerics, bias=bias)  # [M,E]


def reidentify(
    params: Params,
    pixels: jax.Array,
    text_features: jax.Array,
    candidates: Candidates,
    config: CLIPConfig,
    *,
    capacity: int,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Probability of each accepted class in its own crop: [B,F], 0 for all others.

    `capacity` candidates, of whatever images, go through the encoder at a time, as often as it takes to do all.

    pixels [B,H,W,3] float, normalised; text_features [C,E]; candidates of `find_candidates`.
    TagCLIP, arXiv 2312.12828, section 3.3.

    >>> model, pixels = jaxzs.load("demo"), jnp.zeros((1, 48, 48, 3))
    >>> texts = zeroshot.text_proxies(model, ["circle", "square"])
    >>> refined = jnp.zeros((1, 36, 2)).at[0, 7:9, 0].set(0.9)
    >>> found = jax.jit(patch.find_candidates, static_argnums=1)(refined, 2, 0.5, patch.full_grid(1, 6, 6))
    >>> again = patch.reidentify(model.params, pixels, texts, found, model.config, capacity=2)
    >>> found.accepted.tolist(), (again > 0).tolist()
    ([[True, False]], [[True, False]])
    """
    B, F = candidates.accepted.shape
    vision = config.vit
    total = candidates.accepted.sum(dtype=jnp.int32)  # [], decides how many calls are made
    # Candidates of all images in one row, image * F + class; B*F marks an empty slot, and is dropped when scattered.
    slots = jnp.flatnonzero(candidates.accepted, size=B * F, fill_value=B * F).astype(jnp.int32)
    slots = jnp.pad(slots, (0, -(B * F) % capacity), constant_values=B * F)  # whole calls
    logit_scale = params["logit_scale"]

    def one_call(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, probability = state
        chosen = jax.lax.dynamic_slice_in_dim(slots, start, capacity)  # [M]
        # A slot without a candidate looks at the last class of the last image; its result is dropped.
        filled = jnp.minimum(chosen, B * F - 1)
        image, label = filled // F, filled % F  # [M], [M]
        boxes = candidates.boxes[image, label]  # [M,4]
        crops = jax.vmap(crop_pixels, (None, 0, 0, None, None))(
            pixels, image, boxes, vision.patch_size, vision.image_size
        )
        regions = jax.vmap(crop_region, (0, 0, None))(candidates.region[image, label], boxes, vision.grid)  # [M,P']
        tokens = region_tokens(params, crops, regions, config, numerics)  # [M,E]
        found = class_probabilities(tokens, text_features, logit_scale)  # [M,C]
        found = jnp.take_along_axis(found, label[:, None], axis=1)[:, 0]  # [M], each of its own class
        return start + capacity, probability.at[chosen].set(found, mode="drop")

    _, probability = jax.lax.while_loop(
        lambda state: state[0] < total, one_call, (jnp.int32(0), jnp.zeros(B * F, jnp.float32))
    )
    return probability.reshape(B, F)
