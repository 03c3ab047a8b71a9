"""SigLIP 2 NaFlex (arXiv 2502.14786): images of any aspect as a list of patches with a mask, one program a length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxzs.clip.config import VisionConfig
from jaxzs.clip.layers import Array, Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "mask", "shapes"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """Images cut into patches: what a NaFlex tower takes in place of pixels. A pytree; images are taken out by rows.

    values: [B,N,p*p*3] normalised; row, column and channel of a patch in one axis, patches row by row, then padding.
    mask: [B,N] bool, False for padding. shapes: [B,2] rows and columns of patches.

    >>> images = clip.Patches(np.zeros((3, 6, 192), np.float32), np.ones((3, 6), bool), np.full((3, 2), (2, 3)))
    >>> images.values.shape, len(images), images[:2].values.shape
    ((3, 6, 192), 3, (2, 6, 192))
    """

    values: Array
    mask: Array
    shapes: Array

    # As arrays of pixels have them, so that batches of both are cut by the same code.
    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Patches:
        return Patches(self.values[rows], self.mask[rows], self.shapes[rows])

    def __iter__(self) -> Iterator[Patches]:
        return (self[row] for row in range(len(self)))


Pixels = Array | Patches  # what image towers take: [B,S,S,3], or lists of patches


def naflex_positions(tree: Params, images: Patches, vision: VisionConfig) -> jax.Array:
    """Positions of every patch, [B,N,D]: the square table resized to each image's grid; padding gets patch 0's."""
    table = tree["embeddings"]["position_embedding"]["embedding"].astype(jnp.float32)  # [side*side,D]
    side = vision.grid[0]
    rows, columns = images.shapes[:, :1], images.shapes[:, 1:]  # [B,1]
    number = jnp.arange(images.values.shape[1])[None]  # [1,N]
    # transformers fills the padding with the first resized row; the mask hides it, a comparison of tokens would not.
    number = jnp.where(number < rows * columns, number, 0)  # [B,N]
    down = _triangle(number // columns, rows, side)  # [B,N,side]
    across = _triangle(number % columns, columns, side)  # [B,N,side]
    native = table.reshape(side, side, -1)  # [side,side,D]
    # [B,N,D]: bilinear weights are a row's times a column's, so that one product serves grids of every aspect.
    return jnp.einsum("bnr,bnc,rcd->bnd", down, across, native, precision=jax.lax.Precision.HIGHEST)


def _triangle(places: jax.Array, new: Array, size: int) -> jax.Array:
    """Weights of torch's bilinear `interpolate` with antialias=True: places [B,N], new sizes [B,1] -> [B,N,size]."""
    scale = size / jnp.asarray(new, jnp.float32)  # [B,1], above 1 where the table shrinks
    # antialias: a shrinking table widens the triangle; with the plain one features were off by 2.4 %.
    support = jnp.maximum(scale, 1.0)[..., None]  # [B,1,1]
    centre = (scale * (places.astype(jnp.float32) + 0.5))[..., None]  # [B,N,1]
    taps = jnp.arange(size, dtype=jnp.float32)[None, None]  # [1,1,size]
    # torch's whole-numbered window: a tap outside of it has no weight, even within the triangle.
    inside = (taps >= jnp.floor(centre - support + 0.5)) & (taps < jnp.floor(centre + support + 0.5))
    weights = jnp.where(inside, jnp.maximum(1.0 - jnp.abs(taps - centre + 0.5) / support, 0.0), 0.0)
    return weights / weights.sum(-1, keepdims=True)  # [B,N,size]; windows cut off at a border sum to 1 too
