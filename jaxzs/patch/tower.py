"""What the passes of patch classification share: images of any size to tokens, averaged attention, blocks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, VisionConfig
from jaxzs.clip.layers import Numerics, Params, attend
from jaxzs.clip.model import vision_embeddings, vision_input
from jaxzs.patch.grid import Grid, bilinear_taps, interpolate

# How learned positions get onto grids of other sizes: in float32; rounded to half precision but on the native grid
# (TagCLIP's code); on the native one, too (CLIP-ES's code).
Positions = Literal["bilinear", "half", "all_half"]


class Pass(NamedTuple):
    """How images go through the vision tower: static. positions: how the learned ones get onto their grids."""

    config: CLIPConfig
    positions: Positions
    numerics: Numerics


def local_positions(params: Params, vision: VisionConfig, grid: Grid, positions: Positions = "bilinear") -> jax.Array:
    """Learned positions [B,T,D] float32, interpolated bilinearly to the true grid of each image.

    The class token's row, where there is one, is never interpolated, but rounded with the others. Rows outside of the
    true grid mean nothing.
    """
    table, first = params["embeddings"]["position_embedding"]["embedding"].astype(jnp.float32), int(vision.class_token)
    native_rows, native_columns = vision.grid
    native = table[first:].reshape(native_rows, native_columns, -1)  # [r,c,D]
    rows, columns = grid.shape

    def of_image(true_rows: jax.Array, true_columns: jax.Array) -> jax.Array:
        left, right, across = bilinear_taps(native_columns, true_columns, columns)
        top, bottom, down = bilinear_taps(native_rows, true_rows, rows)
        wide = interpolate(native[:, left], native[:, right], across[None, :, None])  # [r,columns,D]
        tall = interpolate(wide[top], wide[bottom], down[:, None, None])  # [rows,columns,D]
        return jnp.concatenate([table[:first], tall.reshape(rows * columns, -1)])  # [T,D]

    resized = jax.vmap(of_image)(jnp.maximum(grid.rows, 1), jnp.maximum(grid.columns, 1))
    if positions == "bilinear":
        return resized
    rounded = resized.astype(jnp.float16).astype(jnp.float32)
    if positions == "all_half":
        return rounded
    is_native = (grid.rows == native_rows) & (grid.columns == native_columns)  # [B]
    return jnp.where(is_native[:, None, None], resized, rounded)


def embed_images(params: Params, pixels: jax.Array, grid: Grid, task: Pass) -> tuple[jax.Array, jax.Array | None]:
    """What enters the first block, [B,T,D], and the mask that hides padded patches in every block, or None.

    params: the whole parameter tree. Padded patches enter as zeros, whatever their pixels hold.
    """
    task.config.check_one_size()
    tree, vision = params["vision_model"], task.config.vit
    tables = grid if grid.padded else jax.tree.map(lambda part: part[:1], grid)  # one table serves all
    positions = local_positions(tree, vision, tables, task.positions)  # [B or 1,T,D]
    x = vision_embeddings(tree, pixels, vision, positions, task.numerics)
    x = vision_input(params, x, vision)  # [B,T,D]
    if not grid.padded:
        return x, None
    visible = jnp.pad(grid.patches, ((0, 0), (int(vision.class_token), 0)), constant_values=True)  # [B,T]
    hidden = jnp.where(visible, jnp.float32(0), jnp.finfo(jnp.float32).min)[:, None, None, :]  # [B,1,1,T]
    # A hidden token has weight 0 everywhere, but 0 times a NaN or an infinity of its pixels would be NaN.
    return jnp.where(visible[:, :, None], x, 0.0), hidden


def between_patches(weights: jax.Array, patches: jax.Array) -> jax.Array:
    """What patches attend to among themselves, the class token left out: [B,T,T], patches [B,P] -> [B,P,P]."""
    first = weights.shape[1] - patches.shape[1]  # 0 in SigLIP
    return weights[:, first:, first:]


def attend_by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, numerics: Numerics = Numerics()
) -> tuple[jax.Array, jax.Array]:
    """`layers.attend`, one head after the other: ([B,H,T,D/H] output, [B,T,T] mean of the weights over heads).

    No [B,H,T,T] array exists, which large images would fill the memory with; bias [B,1,1,T] is the same for all heads.
    """
    B, H, T, _ = q.shape

    def one_head(total: jax.Array, head: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        q, k, v = (part[:, None] for part in head)  # [B,1,T,D/H] each
        mixed, weights = attend(q, k, v, bias, numerics)  # [B,1,T,D/H], [B,1,T,T]
        return total + weights[:, 0], mixed[:, 0]

    heads = (q.swapaxes(0, 1), k.swapaxes(0, 1), v.swapaxes(0, 1))  # [H,B,T,D/H] each
    total, mixed = jax.lax.scan(one_head, jnp.zeros((B, T, T), jnp.float32), heads)
    return mixed.swapaxes(0, 1), total / H  # [B,H,T,D/H], [B,T,T]
