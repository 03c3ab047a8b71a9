"""What the passes of patch classification share: images of any size to tokens, and the end of a block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, VisionConfig
from jaxzs.clip.layers import Numerics, Params, dense, layer_norm, merge_heads, mlp
from jaxzs.clip.model import vision_embeddings
from jaxzs.patch.grid import Grid, bilinear_taps, interpolate


def local_positions(
    params: Params,
    vision: VisionConfig,
    grid: Grid,
    *,
    half: bool = False,
    half_native: bool = False,
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
    x = layer_norm(tree["pre_layrnorm"], x, vision.layer_norm_eps)  # [sic] as in the checkpoints
    return x, padding_bias(grid.patches) if padded else None


def finish_block(
    params: Params,
    x: jax.Array,
    mixed: jax.Array,
    vision: VisionConfig,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """A block from its mixed values on, [B,H,T,D/H]: output projection, residual, MLP. x [B,T,D] -> [B,T,D]."""
    x = x + dense(params["self_attn"]["out_proj"], merge_heads(mixed), numerics)
    y = layer_norm(params["layer_norm2"], x, vision.layer_norm_eps)
    return x + mlp(params["mlp"], y, vision.hidden_act, numerics)
