"""Score maps to boxes: min-max normalisation, 8-bit thresholds, connected components, as jitted array programs.

TagCLIP (arXiv 2312.12828) and CLIP-ES call OpenCV for this; here the components of all maps of a batch grow at once, in
one fixed-point iteration. Maps are [B,...,rows,columns] on the padded grid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzs.patch.grid import Grid, divide


def min_max(scores: jax.Array, patches: jax.Array) -> jax.Array:
    """Each map to 0..1 over its valid patches: scores [B,P,...], patches [B,P] bool. A constant map becomes 0.

    The largest is exactly 1, on machines whose division is not correctly rounded, too.
    """
    inside = patches.reshape(patches.shape + (1,) * (scores.ndim - 2))  # [B,P,1...]
    lowest = jnp.where(inside, scores, jnp.inf).min(1, keepdims=True)  # [B,1,...]
    shifted = jnp.where(inside, scores - lowest, 0.0)  # [B,P,...], 0 on padding
    highest = shifted.max(1, keepdims=True)  # [B,1,...]
    relative = jnp.where(shifted >= highest, 1.0, divide(shifted, jnp.where(highest > 0, highest, 1.0)))
    return jnp.where(highest > 0, relative, 0.0)


def above_threshold(maps: jax.Array, threshold: jax.Array) -> jax.Array:
    """Foreground in 8-bit arithmetic, as the original has it: maps [...,rows,columns] in 0..1 -> bool.

    threshold [...] is a fraction of each map's maximum, which is truncated to grey levels, too.
    """
    grey = (255.0 * maps).astype(jnp.int32)  # truncated, not rounded, as astype(uint8) does
    highest = grey.max((-2, -1)).astype(jnp.float32)  # [...]
    level = (threshold * highest).astype(jnp.int32)  # OpenCV compares 8-bit levels: "above" is strict
    return grey > level[..., None, None]


def component_reach(foreground: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """First and last index along `axis` (-2 rows, -1 columns) of the 8-connected component of each pixel.

    foreground [...,rows,columns] bool. Returns two int32 arrays of that shape; background pixels hold nothing of use.
    Every pixel takes the extremes of its eight neighbours until nothing changes.
    """
    size = foreground.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, foreground.shape, foreground.ndim + axis)  # [...,rows,columns]
    # (last, -first) so that both grow by maxima; background never wins.
    start = jnp.where(foreground[None], jnp.stack([index, -index]), -size)  # [2,...,rows,columns]

    def grow(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reach, _ = state
        grown = jnp.where(foreground[None], _maximum_of_neighbours(reach, -size), -size)
        return grown, (grown != reach).any()

    # As many steps as the longest component winds: a snake through the grid takes the most.
    reach, _ = jax.lax.while_loop(lambda state: state[1], grow, (start, jnp.bool_(True)))
    return -reach[1], reach[0]


def _maximum_of_neighbours(x: jax.Array, outside: int) -> jax.Array:
    """3 x 3 maximum over the last two axes, one axis after the other."""
    for axis in (-2, -1):
        width = [(0, 0)] * x.ndim
        width[axis] = (1, 1)
        padded = jnp.pad(x, width, constant_values=outside)
        shifted = [jax.lax.slice_in_dim(padded, start, start + x.shape[axis], axis=axis) for start in range(3)]
        x = jnp.maximum(jnp.maximum(shifted[0], shifted[1]), shifted[2])  # [...,rows,columns]
    return x


def union_of_boxes(foreground: jax.Array, grid: Grid, *, keep_border: bool = False) -> jax.Array:
    """Mask of all patches inside the bounding box of a component: foreground [B,C,rows,columns] bool -> same.

    The original's boxes never reach the last row and column of the grid; `keep_border` lets them.
    A component has a pixel in every row that its box crosses, so each row is painted by its own pixels.
    """
    first, last = component_reach(foreground, -1)  # [B,C,rows,columns] each: columns of a component
    column = jnp.arange(grid.shape[1])[None, None, None, None, :]  # [1,1,1,1,columns]
    spans = (first[..., None] <= column) & (column <= last[..., None]) & foreground[..., None]
    mask = spans.any(-2)  # over the pixels of a row
    return mask & inner_patches(grid, keep_border)[:, None]


def inner_patches(grid: Grid, keep_border: bool) -> jax.Array:
    """Patches that a box can hold, [B,rows,columns] bool: all but the last row and column of each true grid."""
    rows, columns = grid.shape
    cut = 0 if keep_border else 1
    in_row = jnp.arange(rows)[None, :] < grid.rows[:, None] - cut  # [B,rows]
    in_column = jnp.arange(columns)[None, :] < grid.columns[:, None] - cut  # [B,columns]
    return in_row[:, :, None] & in_column[:, None, :]  # [B,rows,columns]


def tight_boxes(region: jax.Array, grid: Grid, *, keep_border: bool = False) -> jax.Array:
    """One box around everything: region [B,F,rows,columns] bool -> [B,F,4] int32 (top, bottom, left, right).

    Ends are exclusive, and cut at the last row and column unless `keep_border`. An empty region gives an empty box.
    """
    cut = 0 if keep_border else 1
    top, bottom = _extent(region.any(-1), grid.rows[:, None] - cut)  # [B,F]
    left, right = _extent(region.any(-2), grid.columns[:, None] - cut)  # [B,F]
    return jnp.stack([top, bottom, left, right], axis=-1)  # [B,F,4]


def _extent(occupied: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First occupied index and one past the last, at most `end`: occupied [...,n] bool, end broadcastable to [...]."""
    size = occupied.shape[-1]
    first = jnp.argmax(occupied, axis=-1).astype(jnp.int32)
    last = size - jnp.argmax(occupied[..., ::-1], axis=-1).astype(jnp.int32)
    stop = jnp.minimum(jnp.where(occupied.any(-1), last, first), end.astype(jnp.int32))  # empty: ends where it starts
    return first, jnp.maximum(stop, first)
