"""CLIP (arXiv 2103.00020) and SigLIP (2303.15343, 2502.14786) as pure functions, on HuggingFace's Flax parameter tree.

Every function is `f(params, x, config, ...)`: no state, no classes. Axis letters: B batch, T tokens, P patches,
H heads, D width, E embedding, C classes, L layers. Pixels are NHWC.

The layers and their numerics are in `layers.py`: float32 by default, whatever type the weights are stored in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import LEGACY_END, CLIPConfig, ResNetConfig, TextConfig, VisionConfig
from jaxzs.clip.layers import (
    Array,
    Numerics,
    Params,
    block,
    dense,
    last_block,
    layer_norm,
    layers_of,
    transformer,
)  # fmt: skip
from jaxzs.clip.naflex import Patches, Pixels, naflex_positions
from jaxzs.clip.pooling import attention_pool, map_head, map_local
from jaxzs.clip.resnet import feature_maps
from jaxzs.errors import ConfigError, ImageError, TextError, renamed

# Keywords of earlier versions, and what is written now.
_RENAMED = {
    "compute_dtype": "numerics=clip.Numerics(compute_dtype)",
    "precision": "numerics=clip.Numerics(precision=precision)",
}


class TowerOutput(NamedTuple):
    """Named intermediates of one tower. Under `jit`, what is not used is not computed.

    tokens: [B,T,D] after the last block; the text tower's are after its final LayerNorm, the vision tower's are raw.
    pooled: [B,D] what is projected: the text's token, the class token after the post-LayerNorm, or what the
      tower has in its place (mean, MAP head, attention pool).
    hidden: L+1 arrays [B,T,D]: input of the first block, then the output of each block. Of a ResNet the maps of its
      stem and stages, [B,H,W,C].
    attention: L arrays [B,H,T,T], softmax over the last axis. Of a ResNet that of its pool, [B,H,1,1+P].
    """

    tokens: jax.Array
    pooled: jax.Array
    hidden: tuple[jax.Array, ...]
    attention: tuple[jax.Array, ...]


# --- vision -----------------------------------------------------------------------------------------


def patch_embeddings(params: Params, pixels: Array, vision: VisionConfig, numerics: Numerics = Numerics()) -> jax.Array:
    """Patches as one matrix product: pixels [B,H,W,3] -> [B,P,D], row-major; a remainder of H or W is cut off."""
    size = vision.patch_size
    B, rows, columns, channels = (pixels.shape[0], pixels.shape[1] // size, pixels.shape[2] // size, pixels.shape[3])
    # In torch a convolution of stride p without padding, which leaves a remainder out too (384 pixels, patches of 14).
    patches = pixels[:, : rows * size, : columns * size]  # [B,rows*p,columns*p,3]
    patches = patches.reshape(B, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)  # [B,r,c,p,p,3]
    return embed_patches(params, patches.reshape(B, rows * columns, -1), numerics)  # [B,P,p*p*3] -> [B,P,D]


def embed_patches(params: Params, patches: Array, numerics: Numerics = Numerics()) -> jax.Array:
    """Patches cut out already, row, column, channel in one axis: [B,P,p*p*3] -> [B,P,D]."""
    leaves = params["embeddings"]["patch_embedding"]
    kernel = leaves["kernel"]  # [p,p,3,D]
    x = numerics.matmul(patches, kernel.reshape(-1, kernel.shape[-1]))  # [B,P,p*p*3] @ [p*p*3,D] = [B,P,D]
    return x + leaves["bias"].astype(jnp.float32)[None, None] if "bias" in leaves else x  # only SigLIP has one


def resize_weights(size: int, new_size: int, method: str = "bicubic") -> np.ndarray:
    """Interpolation matrix [new_size, size] float32 along one axis, as torch's `interpolate` has it.

    Half-pixel centres, clamped borders, no antialiasing; "bicubic" (a = -0.75) or "bilinear". "bicubic_offset" samples
    at a scale of (new_size + 0.1) / size, as dense repositories do to be safe from truncation.
    """
    scale = (new_size + 0.1 * (method == "bicubic_offset")) / size
    centres = (np.arange(new_size) + 0.5) / scale - 0.5  # [new_size], in places of the old grid
    if method == "bilinear":
        centres = np.maximum(centres, 0.0)  # torch clamps the coordinate, not only the index
    first = np.floor(centres).astype(int)  # [new_size], the tap at or before the centre
    t = centres - first  # [new_size], 0 to 1
    if method == "bilinear":
        taps = {0: 1 - t, 1: t}
    elif method in ("bicubic", "bicubic_offset"):
        a = -0.75  # torch's; Pillow takes -0.5
        # Cubic convolution: `near` weighs taps up to 1 away, `far` those from 1 to 2.
        near = lambda d: ((a + 2) * d - (a + 3)) * d * d + 1  # noqa: E731
        far = lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a  # noqa: E731
        taps = {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
    else:
        raise ValueError(f"method must be 'bicubic' or 'bilinear', got {method!r}")
    weights = np.zeros((new_size, size))
    # Taps outside fall on the border; several then share one place, hence add.at and no assignment.
    for offset, weight in taps.items():
        np.add.at(weights, (np.arange(new_size), np.clip(first + offset, 0, size - 1)), weight)
    return weights.astype(np.float32)


def position_table(
    params: Params, vision: VisionConfig | ResNetConfig, grid: tuple[int, int], method: str = "bicubic"
) -> jax.Array:
    """Learned positions [1+P,D] float32 for a grid of patches, interpolated when it is not the native one.

    Row 0 belongs to the class token (or the mean of a ResNet's places) and is never interpolated; SigLIP has none.
    "bicubic" is what HuggingFace does
    (`interpolate_pos_encoding`), "bilinear" what TagCLIP does, "bicubic_offset" what SCLIP and NACLIP do.
    """
    table = params["embeddings"]["position_embedding"]["embedding"].astype(jnp.float32)
    if grid == vision.grid:
        return table
    own = len(table) - vision.num_patches  # rows of no patch: 1, in SigLIP 0
    native = table[own:].reshape(*vision.grid, -1)  # [r,c,D]
    down = jnp.asarray(resize_weights(vision.grid[0], grid[0], method))  # [y,r]
    across = jnp.asarray(resize_weights(vision.grid[1], grid[1], method))  # [x,c]
    resized = jnp.einsum("yr,rcd,xc->yxd", down, native, across, precision=jax.lax.Precision.HIGHEST)  # [y,x,D]
    return jnp.concatenate([table[:own], resized.reshape(grid[0] * grid[1], -1)])  # [1+P,D]


def vision_embeddings(
    params: Params,
    pixels: Array,
    vision: VisionConfig,
    positions: jax.Array | None = None,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Class token and patches with their positions, before the pre-LayerNorm: pixels [B,H,W,3] -> [B,1+P,D].

    params: the tree under "vision_model". positions [1+P,D] or [B,1+P,D]: by default the native table.
    """
    x = patch_embeddings(params, pixels, vision, numerics)  # [B,P,D]
    if positions is None:
        positions = position_table(params, vision, vision.grid)
    return with_class_token(params, x, vision) + (positions if positions.ndim == 3 else positions[None])  # [B,1+P,D]


def with_class_token(params: Params, x: jax.Array, vision: VisionConfig) -> jax.Array:
    """The class token before the patches, in towers that have one: x [B,P,D] -> [B,1+P,D]."""
    if not vision.class_token:
        return x
    token = params["embeddings"]["class_embedding"].astype(jnp.float32)  # [D]
    return jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, token.shape[-1])), x], axis=1)  # [B,1+P,D]


@renamed(**_RENAMED)
def vision_tower(
    params: Params,
    pixels: Pixels,
    config: CLIPConfig,
    *,
    numerics: Numerics = Numerics(),
    interpolate_positions: bool = False,
) -> TowerOutput:
    """Vision transformer with every named intermediate.

    Args:
      params: the whole parameter tree (only "vision_model" is used).
      pixels: [B,S,S,3] float, normalised by the checkpoint's mean and standard deviation; NaFlex: `clip.Patches`.
      config: of the checkpoint.
      numerics: type of the operands of matrix products (float32 by default) and their XLA precision.
      interpolate_positions: accept any H and W of at least one patch, with interpolated positions.

    Returns:
      `TowerOutput`; T = 1 + P, the class token first.

    Raises:
      ImageError: wrong rank, channels or size.

    >>> model, tower = jaxzs.load("demo"), jax.jit(clip.vision_tower, static_argnames="config")
    >>> output = tower(model.params, np.zeros((2, 48, 48, 3), np.float32), model.config)
    >>> output.tokens.shape, output.pooled.shape  # 36 patches and the class token
    ((2, 37, 96), (2, 96))
    >>> len(output.hidden), len(output.attention), output.attention[0].shape
    (6, 5, (2, 3, 37, 37))
    """
    check_tree(params, config, "vision")
    grid = _check_pixels(pixels, config.vision, interpolate_positions)
    tree, vision = params["vision_model"], config.vision
    if isinstance(vision, ResNetConfig):
        return _resnet_tower(params, pixels, vision, grid, numerics)
    x, bias = embedded(tree, pixels, vision, grid, numerics)  # [B,T,D]; the bias is None but for NaFlex
    hidden, attention = transformer(tree, vision_input(params, x, vision), vision, bias, numerics)
    return TowerOutput(hidden[-1], pool_image(tree, hidden[-1], vision, numerics, bias), hidden, attention)


def _resnet_tower(
    params: Params, pixels: Any, vision: ResNetConfig, grid: tuple[int, int], numerics: Numerics
) -> TowerOutput:
    """tokens [B,P,D]: the last map; hidden: the maps [B,H,W,C] of stem and stages; attention: that of the pool."""
    tree = params["vision_model"]
    maps = feature_maps(tree, pixels, vision, numerics)
    tokens = maps[-1].reshape(maps[-1].shape[0], -1, vision.hidden_size)  # [B,H/32,W/32,D] -> [B,P,D]
    pooled, weights = attention_pool(
        tree["attention_pool"], tokens, position_table(tree, vision, grid), vision, numerics
    )
    return TowerOutput(tokens, pooled, maps, (weights,))


def embedded(
    tree: Params, pixels: Pixels, vision: VisionConfig, grid: tuple[int, int], numerics: Numerics
) -> tuple[jax.Array, jax.Array | None]:
    """What the blocks read, before the pre-LayerNorm: ([B,T,D], additive mask [B,1,1,T] of padding or None)."""
    if isinstance(pixels, Patches):
        x = embed_patches(tree, pixels.values, numerics) + naflex_positions(tree, pixels, vision)  # [B,N,D]
        # Without it every image would see its padding: features were then off by 13 %.
        hidden = jnp.where(pixels.mask[:, None, None, :], jnp.float32(0), jnp.finfo(jnp.float32).min)  # [B,1,1,N]
        return x, hidden
    return vision_embeddings(tree, pixels, vision, position_table(tree, vision, grid), numerics), None


@renamed(**_RENAMED)
def encode_image(
    params: Params,
    pixels: Pixels,
    config: CLIPConfig,
    *,
    numerics: Numerics = Numerics(),
    interpolate_positions: bool = False,
) -> jax.Array:
    """Image features in the shared space, projected, NOT normalised: pixels [B,S,S,3] -> [B,E] float32.

    Arguments and errors as `vision_tower`. Compiled once per shape and configuration.

    >>> model = jaxzs.load("demo")
    >>> pixels = model.preprocess(data.open_image("photos/one/0.png"))
    >>> clip.encode_image(model.params, pixels, model.config).shape
    (1, 64)
    >>> clip.encode_image(model.params, pixels[:, :32], model.config)
    Traceback (most recent call last):
    jaxzs.errors.ImageError: pixels are 32x48, this checkpoint takes 48x48; resize with model.preprocess(images), ...
    """
    check_tree(params, config, "vision")
    # Here as well as within, so that a wrong shape is refused before anything is traced.
    _check_pixels(pixels, config.vision, interpolate_positions)
    return _encode_image(params, pixels, config, numerics, interpolate_positions)


@functools.partial(jax.jit, static_argnames=("config", "interpolate_positions"))
def _encode_image(params, pixels, config, numerics, interpolate_positions):
    grid = _check_pixels(pixels, config.vision, interpolate_positions)
    if isinstance(config.vision, ResNetConfig):
        tower = _resnet_tower(params, pixels, config.vision, grid, numerics)
        return project_image(params, tower.pooled, numerics)  # [B,E]
    x, bias = embedded(params["vision_model"], pixels, config.vision, grid, numerics)
    return read_image(params, x, config, numerics, bias=bias)  # [B,E]


def project_image(params: Params, pooled: jax.Array, numerics: Numerics = Numerics()) -> jax.Array:
    """Pooled vectors [B,D] in the shared space [B,E], which in SigLIP they are in already."""
    return dense(params["visual_projection"], pooled, numerics) if "visual_projection" in params else pooled


def vision_input(params: Params, x: jax.Array, vision: VisionConfig) -> jax.Array:
    """Embeddings [B,T,D] as the first block takes them: the pre-LayerNorm of the towers that have one."""
    if not vision.pre_norm:
        return x
    return layer_norm(params["vision_model"]["pre_layrnorm"], x, vision.layer_norm_eps)  # [sic]


def vision_output(params: Params, x: jax.Array, vision: VisionConfig, numerics: Numerics = Numerics()) -> jax.Array:
    """What left the last block, [...,D], in the shared space, token by token: post-LayerNorm and projection to [...,E].

    In SigLIP every token is the only key of the MAP head.
    """
    tree = params["vision_model"]
    x = layer_norm(tree["post_layernorm"], x, vision.layer_norm_eps)  # [...,D]
    if vision.pooling == "map":
        x = map_local(tree["head"], x, vision, numerics)
    return project_image(params, x, numerics)  # [...,E]


def pool_image(
    tree: Params,
    x: jax.Array,
    vision: VisionConfig,
    numerics: Numerics = Numerics(),
    bias: jax.Array | None = None,
    prefix: int = 0,
) -> jax.Array:
    """One vector an image, not projected: what left the last block, x [B,T,D] -> [B,D].

    tree: under "vision_model". bias: additive [B,1,1,P], lowest where a mean or a head must not read a patch. prefix:
    prompt tokens behind the class token, which neither reads.
    """
    norm = functools.partial(layer_norm, tree["post_layernorm"], eps=vision.layer_norm_eps)
    if vision.pooling == "class":
        return norm(x[:, 0])  # [B,D]; the LayerNorm of one token, not of all
    first = int(vision.class_token) + prefix  # CLIPA has a class token, but its mean leaves it out
    if vision.pooling == "mean":  # CLIPA: the LayerNorm comes after the mean
        share = None if bias is None else jax.nn.softmax(bias[:, 0, 0])[:, :, None]  # [B,P,1]
        return norm(x[:, first:].mean(1) if share is None else (share * x[:, first:]).sum(1))
    return map_head(tree["head"], norm(x[:, first:]), vision, numerics, bias)  # [B,D]


def read_image(
    params: Params,
    x: jax.Array,
    config: CLIPConfig,
    numerics: Numerics = Numerics(),
    recompute: bool = False,
    bias: jax.Array | None = None,
    prefix: int = 0,
) -> jax.Array:
    """Image features of embedded patches: x [B,T,D], no LayerNorm yet -> [B,E]. prefix: as in `pool_image`."""
    vision, tree = config.vit, params["vision_model"]
    x = vision_input(params, x, vision)
    if vision.pooling == "class":
        first = jnp.zeros(x.shape[0], jnp.int32)  # [B], where the class token stands
        token = read_token(tree, x, first, vision, bias, numerics, recompute)  # [B,D]
        return vision_output(params, token, vision, numerics)  # [B,E]
    # A mean or a MAP head reads every token: here the last block is needed whole.
    pooled = pool_image(tree, all_blocks(tree, x, vision, bias, numerics, recompute), vision, numerics, bias, prefix)
    return project_image(params, pooled, numerics)


def all_blocks(
    tree: Params,
    x: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None,
    numerics: Numerics,
    recompute: bool = False,
    leave: int = 0,
) -> jax.Array:
    """All blocks but the last `leave`, for all tokens: x [B,T,D] -> [B,T,D]. recompute: in the backward pass."""
    plain = functools.partial(block, tower=tower, numerics=numerics)
    run = jax.checkpoint(plain) if recompute else plain  # between blocks x alone is kept for the gradients
    for layer in layers_of(tree, tower)[: tower.num_hidden_layers - leave]:
        x, _ = run(layer, x, bias=bias)
    return x


def read_token(
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None,
    numerics: Numerics,
    recompute: bool = False,
) -> jax.Array:
    """All blocks, the last one for one token of each sequence: x [B,T,D], positions [B] -> [B,D]."""
    x = all_blocks(params, x, tower, bias, numerics, recompute, leave=1)  # [B,T,D]
    *_, last = layers_of(params, tower)
    return last_block(last, x, positions, tower, bias, numerics)  # [B,D]


# --- text -------------------------------------------------------------------------------------------


def end_positions(input_ids: Array, text: TextConfig) -> jax.Array:
    """Position of the token that is pooled: input_ids [B,T] -> [B] int32.

    By `text.pooling`. "end": the first end-of-text token; with the legacy `eos_token_id == 2` the highest id
    (HuggingFace's rule).
    """
    if text.pooling == "last":
        return jnp.full(input_ids.shape[0], input_ids.shape[1] - 1, jnp.int32)
    if text.pooling == "highest" or (text.pooling == "end" and text.eos_token_id == LEGACY_END):
        return input_ids.argmax(-1).astype(jnp.int32)  # the first of equal ones: padding with the end token is harmless
    return (input_ids == text.eos_token_id).argmax(-1).astype(jnp.int32)  # 0 where none is: see `_check_ids`


def causal_bias(length: int, attention_mask: Array | None = None) -> jax.Array:
    """Additive mask [1 or B,1,T,T] float32: later positions, and those with attention_mask 0, get the lowest float.

    The lowest float and not -inf: a query with nothing to attend to becomes uniform, not NaN.
    """
    allowed = jnp.tril(jnp.ones((length, length), bool))[None, None]  # [1,1,T,T]
    if attention_mask is not None:
        allowed = jnp.logical_and(allowed, attention_mask.astype(bool)[:, None, None, :])  # [B,1,T,T]
    return jnp.where(allowed, jnp.float32(0), jnp.finfo(jnp.float32).min)


def text_bias(length: int, text: TextConfig, attention_mask: Array | None = None) -> jax.Array | None:
    """The additive mask of a text tower: causal, or in SigLIP none, whose texts are padded and padding is read."""
    if text.causal:
        return causal_bias(length, attention_mask)
    if attention_mask is None:
        return None
    # [B,1,1,T]: only where a caller hides tokens; neither transformers nor open_clip passes a mask to SigLIP.
    return jnp.where(attention_mask.astype(bool)[:, None, None, :], jnp.float32(0), jnp.finfo(jnp.float32).min)


def text_embeddings(params: Params, input_ids: Array) -> jax.Array:
    """Token plus position embeddings: input_ids [B,T] -> [B,T,D]; params: the tree under "text_model"."""
    tokens = params["embeddings"]["token_embedding"]["embedding"].astype(jnp.float32)[input_ids]  # [B,T,D]
    positions = params["embeddings"]["position_embedding"]["embedding"].astype(jnp.float32)
    return tokens + positions[None, : input_ids.shape[1]]  # [B,T,D]


@renamed(**_RENAMED)
def text_tower(
    params: Params,
    input_ids: Array,
    config: CLIPConfig,
    attention_mask: Array | None = None,
    *,
    numerics: Numerics = Numerics(),
) -> TowerOutput:
    """Text transformer with every named intermediate.

    Args:
      params: the whole parameter tree (only "text_model" is used).
      input_ids: [B,T] integer, T at most `config.text.max_position_embeddings`. Where the mask is
        causal T may be cut right behind the longest text's end token without changing any feature; SigLIP's texts,
        pooled at the last place, must have the full length.
      config: of the checkpoint.
      attention_mask: [B,T], 0 where a token must not be attended to.
      numerics: type of the operands of matrix products (float32 by default) and their XLA precision.

    Returns:
      `TowerOutput`; `tokens` are after the final LayerNorm, `hidden` before it.

    Raises:
      TextError: wrong rank or type, too long, ids outside the vocabulary.

    >>> model, tower = jaxzs.load("demo"), jax.jit(clip.text_tower, static_argnames="config")
    >>> input_ids, _ = model.tokenize(["the digit one", "seven"])
    >>> output = tower(model.params, input_ids, model.config)
    >>> output.tokens.shape, output.pooled.shape
    ((2, 5, 64), (2, 64))
    """
    check_tree(params, config, "text")
    _check_ids(input_ids, config.text, attention_mask)
    tree, text = params["text_model"], config.text
    bias = text_bias(input_ids.shape[1], text, attention_mask)
    x = text_embeddings(tree, input_ids)
    hidden, attention = transformer(tree, x, text, bias, numerics)
    tokens = layer_norm(tree["final_layer_norm"], hidden[-1], text.layer_norm_eps)  # [B,T,D]
    return TowerOutput(tokens, pool(tokens, end_positions(input_ids, text)), hidden, attention)


def pool(tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """One token of each sequence: tokens [B,T,D], positions [B] -> [B,D]."""
    return jnp.take_along_axis(tokens, positions[:, None, None], axis=1)[:, 0]  # [B,D]


@renamed(**_RENAMED)
def encode_text(
    params: Params,
    input_ids: Array,
    config: CLIPConfig,
    attention_mask: Array | None = None,
    *,
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Text features in the shared space, projected, NOT normalised: input_ids [B,T] -> [B,E] float32.

    Arguments and errors as `text_tower`. Compiled once per shape and configuration.

    >>> model = jaxzs.load("demo")
    >>> input_ids, _ = model.tokenize(["the digit one", "the digit seven"])
    >>> clip.encode_text(model.params, input_ids, model.config).shape
    (2, 64)
    """
    check_tree(params, config, "text")
    _check_ids(input_ids, config.text, attention_mask)
    return _encode_text(params, input_ids, config, attention_mask, numerics)


@functools.partial(jax.jit, static_argnames="config")
def _encode_text(params, input_ids, config, attention_mask, numerics):
    x, ends = (text_embeddings(params["text_model"], input_ids), end_positions(input_ids, config.text))
    bias = text_bias(input_ids.shape[1], config.text, attention_mask)
    return read_text(params, x, ends, config, numerics, bias=bias)


def read_text(
    params: Params,
    x: jax.Array,
    ends: jax.Array,
    config: CLIPConfig,
    numerics: Numerics = Numerics(),
    recompute: bool = False,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Text features of embedded sequences: x [C,T,D], end positions [C] -> [C,E], not normalised."""
    bias = text_bias(x.shape[1], config.text) if bias is None else bias
    token = read_token(params["text_model"], x, ends, config.text, bias, numerics, recompute)  # [C,D]
    return text_output(params, token, config.text, numerics)


def text_output(params: Params, token: jax.Array, text: TextConfig, numerics: Numerics = Numerics()) -> jax.Array:
    """Final LayerNorm and projection of the end token: [C,D] -> [C,E]."""
    token = layer_norm(params["text_model"]["final_layer_norm"], token, text.layer_norm_eps)
    return dense(params["text_projection"], token, numerics) if text.projection else token  # [C,E]


# --- both towers ------------------------------------------------------------------------------------


def normalize(features: jax.Array) -> jax.Array:
    """L2-normalise the last axis in float32: [...,E] of any float type -> [...,E] float32.

    A zero row stays zero. Idempotent up to rounding.

    >>> print(clip.normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    [[0.6 0.8]
     [0.  0. ]]
    """
    features = features.astype(jnp.float32)
    norm = jnp.sqrt(jnp.square(features).sum(-1, keepdims=True))  # [...,1]
    return features / jnp.where(norm > 0, norm, 1.0)  # not a tiny float: its square would be 0


def logits_per_image(
    image_features: jax.Array, text_features: jax.Array, logit_scale: jax.Array, logit_bias: jax.Array | None = None
) -> jax.Array:
    """exp(logit_scale) * cosine + logit_bias: image_features [B,E], text_features [C,E], scalars -> [B,C] float32.

    Both are L2-normalised here (arXiv 2103.00020, figure 3). With a bias (SigLIP) the probability of a pair is the
    sigmoid of its logit, whatever the other pairs are; in a softmax the bias has no effect.

    >>> images, texts = jnp.eye(2), jnp.array([[2.0, 0.0], [3.0, 4.0]])
    >>> print(clip.logits_per_image(images, texts, jnp.log(jnp.float32(100))).round())
    [[100.  60.]
     [  0.  80.]]
    """
    # HIGHEST: multiplied by 100 an error of 1e-3 in a cosine is one of 10 % in the odds of two classes.
    cosine = jnp.matmul(normalize(image_features), normalize(text_features).T, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.exp(logit_scale.astype(jnp.float32)) * cosine  # [B,C]
    return logits if logit_bias is None else logits + logit_bias.astype(jnp.float32)


def contrastive_loss(logits: jax.Array) -> jax.Array:
    """CLIP's symmetric cross-entropy of matched pairs: logits [B,B] -> scalar (arXiv 2103.00020, figure 3).

    >>> round(float(clip.contrastive_loss(jnp.zeros((4, 4)))), 4)  # no pair stands out: ln 4
    1.3863
    """
    of_images = jnp.diagonal(jax.nn.log_softmax(logits, axis=1)).mean()  # each image among all texts
    of_texts = jnp.diagonal(jax.nn.log_softmax(logits, axis=0)).mean()  # each text among all images
    return -(of_images + of_texts) / 2


def sigmoid_loss(logits: jax.Array) -> jax.Array:
    """SigLIP's loss of matched pairs: logits [B,B] -> scalar (arXiv 2303.15343, algorithm 1).

    >>> round(float(clip.sigmoid_loss(jnp.zeros((4, 4)))), 4)  # every pair as likely as not: 4 ln 2
    2.7726
    """
    signs = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1  # 1 for pairs that match, -1 for all others
    return -jax.nn.log_sigmoid(signs * logits).sum(-1).mean()  # divided by B, not by the number of pairs


# --- checks at the boundary -------------------------------------------------------------------------


def check_tree(params: Params, config: CLIPConfig, tower: str) -> None:
    """Raise `ConfigError` where the arguments of an encoder stand in another order."""
    if not isinstance(config, CLIPConfig):
        raise ConfigError(f"config is {type(config).__name__}, expected a CLIPConfig: pass model.config")
    if not isinstance(params, Mapping) or f"{tower}_model" not in params:
        found = f"a tree of {', '.join(map(str, params))}" if isinstance(params, Mapping) else type(params).__name__
        raise ConfigError(f"params is {found[:200]}, expected the tree with {tower}_model: pass model.params first")


def _check_pixels(pixels: Pixels, vision: VisionConfig | ResNetConfig, interpolate_positions: bool) -> tuple[int, int]:
    """Rows and columns of patches. Raises `ImageError`."""
    if getattr(vision, "variable", False) or isinstance(pixels, Patches):
        return _check_patches(pixels, vision)
    shape = tuple(getattr(pixels, "shape", ()))
    if len(shape) != 4 or shape[3] != vision.num_channels or 0 in shape:
        what = f"pixels have shape {shape}" if hasattr(pixels, "shape") else f"pixels are {type(pixels).__name__}"
        raise ImageError(
            f"{what}, expected [B,H,W,{vision.num_channels}] (channels last), at least one image; "
            "use model.preprocess(images)"
        )
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ImageError(f"pixels are {pixels.dtype}, expected normalised floats; use model.preprocess(images)")
    size, native = shape[1:3], (vision.image_size, vision.image_size)
    if not interpolate_positions and size != native:
        raise ImageError(
            f"pixels are {size[0]}x{size[1]}, this checkpoint takes {native[0]}x{native[1]}; resize "
            "with model.preprocess(images), or pass interpolate_positions=True"
        )
    grid = size[0] // vision.patch_size, size[1] // vision.patch_size  # a remainder is cut off
    if min(grid) < 1:
        raise ImageError(f"pixels are {size[0]}x{size[1]}, one patch is {vision.patch_size} wide")
    return grid


def _check_patches(images: Any, vision: VisionConfig | ResNetConfig) -> tuple[int, int]:
    size = vision.patch_size**2 * vision.num_channels
    if not (isinstance(images, Patches) and getattr(vision, "variable", False)):
        wanted = "clip.Patches" if getattr(vision, "variable", False) else "an array of pixels"
        raise ImageError(f"images are {type(images).__name__}, this tower takes {wanted}")
    shape = tuple(images.values.shape)
    if len(shape) != 3 or shape[2] != size or 0 in shape:
        raise ImageError(f"patches have shape {shape}, expected [B,N,{size}], at least one image")
    if images.mask.shape != shape[:2] or images.shapes.shape != (shape[0], 2):
        raise ImageError(f"mask {images.mask.shape} and shapes {images.shapes.shape} do not fit patches {shape}")
    return vision.grid


def _check_ids(input_ids: Array, text: TextConfig, attention_mask: Array | None) -> None:
    shape, dtype = tuple(getattr(input_ids, "shape", ())), getattr(input_ids, "dtype", np.dtype(object))
    if len(shape) != 2 or shape[0] == 0 or not jnp.issubdtype(dtype, jnp.integer):
        what = f"{dtype} of shape {shape}" if hasattr(input_ids, "shape") else type(input_ids).__name__
        raise TextError(f"input_ids are {what}, expected integers [B,T], at least one text; use model.tokenize(texts)")
    if not 0 < input_ids.shape[1] <= text.max_position_embeddings:
        raise TextError(
            f"texts have {input_ids.shape[1]} tokens, this checkpoint takes 1 to {text.max_position_embeddings}"
        )
    # A shorter row has its last place elsewhere: features were off by more than their own size.
    if text.pooling == "last" and input_ids.shape[1] != text.max_position_embeddings:
        raise TextError(
            f"texts have {input_ids.shape[1]} tokens; this checkpoint reads the last of exactly "
            f"{text.max_position_embeddings}, padding too: use model.tokenize(texts), and do not cut"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise TextError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; they must be equal"
        )
    # Values can be looked at only outside of a trace; a gather would clamp them silently.
    if isinstance(input_ids, jax.core.Tracer) or not _addressable(input_ids):
        return
    ids = np.asarray(input_ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < text.vocab_size:
        raise TextError(
            f"input_ids range from {ids.min()} to {ids.max()}, the vocabulary has {text.vocab_size} "
            "tokens: were they made by another checkpoint's tokenizer?"
        )
    # These pool some place of any row; whether a text ends there, only its tokenizer could tell.
    if text.pooling in ("highest", "last") or (text.pooling == "end" and text.eos_token_id == LEGACY_END):
        return
    if not (ids == text.eos_token_id).any(1).all():
        raise TextError(
            f"a text has no end token (id {text.eos_token_id}); nothing could be pooled. Use model.tokenize(texts)"
        )


def _addressable(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable  # rows of other processes cannot be looked at
