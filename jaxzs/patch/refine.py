"""Dual-masking attention refinement (DMAR; TagCLIP, arXiv 2312.12828, section 3.2).

Coarse patch scores are spread along the fused attention (attention mask), then once more, but only from patches
inside the boxes where the first result is high (class-wise box mask).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.patch.boxes import above_threshold, min_max, union_of_boxes
from jaxzs.patch.grid import Grid, divide


class Refined(NamedTuple):
    """Scores after dual masking.

    spread: [B,P,C] after the attention mask alone.
    box_mask: [B,C,P] bool, patches inside a class's boxes.
    scores: [B,P,C] refined.
    """

    spread: jax.Array
    box_mask: jax.Array
    scores: jax.Array


def dual_masking(attention: jax.Array, coarse: jax.Array, grid: Grid, *, keep_border: bool = False) -> Refined:
    """Refine patch scores: attention [B,P,P] (fused), coarse [B,P,C] -> `Refined`.

    A class whose spread scores are all zero, or constant and so without any box, keeps them as they are. Padded
    patches must have no attention to or from them (`fuse_attention` sees to it); their scores are 0.

    TagCLIP, arXiv 2312.12828, section 3.2. keep_border: let boxes reach the last row and column (not in the original).

    >>> coarse = jnp.zeros((1, 9, 1)).at[0, 0, 0].set(0.9).at[0, 8, 0].set(0.5)  # 3 x 3 patches, one class
    >>> refined = jax.jit(patch.dual_masking)(jnp.eye(9)[None], coarse, patch.full_grid(1, 3, 3))
    >>> print(refined.scores[0, :, 0].reshape(3, 3))  # boxes end before the last row and column
    [[0.9 0.  0. ]
     [0.  0.  0. ]
     [0.  0.  0. ]]
    """
    spread = _spread(attention, coarse)  # [B,P,C]
    relative = min_max(spread, grid.patches)  # [B,P,C]
    count = jnp.maximum(grid.patches.sum(1, dtype=jnp.float32), 1.0)
    threshold = divide(relative.sum(1), count[:, None])  # [B,C] the mean: padded patches hold 0
    maps = relative.swapaxes(1, 2).reshape(*threshold.shape, *grid.shape)  # [B,C,rows,columns]
    mask = union_of_boxes(above_threshold(maps, threshold), grid, keep_border=keep_border)
    mask = mask.reshape(*threshold.shape, -1)  # [B,C,P]
    # What is masked are the coarse scores, not those that were spread already.
    refined = _spread(attention, jnp.where(mask.swapaxes(1, 2), coarse, 0.0))  # [B,P,C]
    informative = (spread.max(1) > 0) & (relative.max(1) > 0)  # [B,C]
    return Refined(spread, mask, jnp.where(informative[:, None, :], refined, spread))


def _spread(attention: jax.Array, scores: jax.Array) -> jax.Array:
    """Every patch collects the scores of those it attends to: [B,P,P], [B,P,C] -> [B,P,C]."""
    return jnp.matmul(attention, scores, precision=jax.lax.Precision.HIGHEST)
