"""What the passes of patch classification share: images of any size to tokens, averaged attention, blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, VisionConfig
from jaxzs.clip.layers import Numerics, Params, attend
from jaxzs.clip.model import vision_embeddings, vision_input
from jaxzs.patch.grid import Grid, bilinear_taps, interpolate


def local_positions(
    params: Params, vision: VisionConfig, grid: Grid, *, half: bool = False, half_native: bool = False
) -> jax.Array:
    """Learned positions [B,T,D] float32, interpolated bilinearly to the true grid of each image.

    The class token's row is never interpolated. `half` rounds the tables of all grids but the native one to IEEE half
    precision, row 0 too, as the original implementation does; `half_native` that of the native grid as well, as it does
    for segmentation. Rows outside of the true grid mean nothing.
    """
    table = params["embeddings"]["position_embedding"]["embedding"].astype(jnp.float32)
    native_rows, native_columns = vision.grid
    native = table[1:].reshape(native_rows, native_columns, -1)
    rows, columns = grid.shape

    def of_image(true_rows: jax.Array, true_columns: jax.Array) -> jax.Array:
        left, right, across = bilinear_taps(native_columns, true_columns, columns)
        top, bottom, down = bilinear_taps(native_rows, true_rows, rows)
        wide = interpolate(native[:, left], native[:, right], across[None, :, None])
        tall = interpolate(wide[top], wide[bottom], down[:, None, None])  # [rows,columns,D]
        return jnp.concatenate([table[:1], tall.reshape(rows * columns, -1)])

    resized = jax.vmap(of_image)(jnp.maximum(grid.rows, 1), jnp.maximum(grid.columns, 1))
    if not half:
        return resized
    rounded = resized.astype(jnp.float16).astype(jnp.float32)
    if half_native:
        return rounded
    is_native = (grid.rows == native_rows) & (grid.columns == native_columns)
    return jnp.where(is_native[:, None, None], resized, rounded)


def padding_bias(patches: jax.Array) -> jax.Array:
    """Additive mask [B,1,1,T] that hides padded patches from every query: patches [B,P] bool."""
    visible = jnp.pad(patches, ((0, 0), (1, 0)), constant_values=True)  # the class token
    return jnp.where(visible, jnp.float32(0), jnp.finfo(jnp.float32).min)[:, None, None, :]


def embed_images(
    params: Params,
    pixels: jax.Array,
    config: CLIPConfig,
    grid: Grid,
    *,
    padded: bool,
    half_positions: bool = False,
    half_native: bool = False,
    numerics: Numerics = Numerics(),
) -> tuple[jax.Array, jax.Array | None]:
    """What enters the first block, [B,T,D], and the mask that hides padded patches in every block, or None.

    params: the whole parameter tree. padded: False promises that every grid is full. half_positions, half_native: see
    `local_positions`.
    """
    tree, vision = params["vision_model"], config.vision
    tables = grid if padded else Grid(*(part[:1] for part in grid))  # one table serves all
    positions = local_positions(tree, vision, tables, half=half_positions, half_native=half_native)
    x = vision_embeddings(tree, pixels, vision, positions, numerics)
    x = vision_input(params, x, vision)
    return x, padding_bias(grid.patches) if padded else None


def attend_by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, numerics: Numerics = Numerics()
) -> tuple[jax.Array, jax.Array]:
    """`layers.attend`, one head after the other: ([B,H,T,D/H] output, [B,T,T] mean of the weights over heads).

    No [B,H,T,T] array exists, which large images would fill the memory with; bias [B,1,1,T] is the same for all heads.
    """
    B, H, T, _ = q.shape

    def one_head(total: jax.Array, head: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        q, k, v = (part[:, None] for part in head)
        mixed, weights = attend(q, k, v, bias, numerics)
        return total + weights[:, 0], mixed[:, 0]

    heads = (q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1))
    total, mixed = jax.lax.scan(one_head, jnp.zeros((B, T, T), jnp.float32), heads)
    return mixed.swapaxes(0, 1), total / H
