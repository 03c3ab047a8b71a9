"""Dense features: CLIP's patches in the shared space, by another attention in the last layer and nothing else.

MaskCLIP ("v", arXiv 2112.01071), SCLIP ("csa", arXiv 2312.01597), ClearCLIP ("qq", arXiv 2407.12442) and NACLIP
("naclip", arXiv 2404.08181) differ in which patches a patch collects its values from in the last block, and in
whether that block keeps its residual and MLP.
Axis letters: B batch, T = 1+P tokens, P patches (row-major), H heads, D width, E embedding, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig, ResNetConfig
from jaxzs.clip.layers import (
    Attend,
    Numerics,
    Params,
    attend,
    block,
    dense,
    last_block,
    layer_norm,
    layers_of,
    merge_heads,
    project_qkv,
)  # fmt: skip
from jaxzs.clip.model import (
    all_blocks,
    encode_image,
    normalize,
    pool_image,
    position_table,
    project_image,
    vision_embeddings,
    vision_input,
    vision_output,
)
from jaxzs.clip.resnet import local_features
from jaxzs.errors import ConfigError, DataError
from jaxzs.patch.settings import check_positive
from jaxzs.patch.tags import check_pixels, check_texts

Attention = Literal["csa", "qq", "kk", "v", "naclip", "ordinary"]
Positions = Literal["bicubic_offset", "bicubic"]


# Attentions as `block` takes them, of q, k, v [B,H,T,D/H]; how: bias and numerics, handed on to `attend`.


def self_correlated(q, k, v, *how):
    """Patches collect from those whose queries, and from those whose keys, are like theirs: rows sum to 2 (SCLIP)."""
    by_queries, by_keys = queries_alone(q, k, v, *how), keys_alone(q, k, v, *how)
    return by_queries[0] + by_keys[0], by_queries[1] + by_keys[1]  # [B,H,T,D/H], [B,H,T,T]


def queries_alone(q, k, v, *how):
    """By the likeness of queries; q comes scaled by 1/sqrt(D/H), which must count once (ClearCLIP)."""
    return attend(q, q * q.shape[-1] ** 0.5, v, *how)  # [B,H,T,D/H], [B,H,T,T]


def keys_alone(q, k, v, *how):
    """By the likeness of keys."""
    return attend(k * k.shape[-1] ** -0.5, k, v, *how)  # [B,H,T,D/H], [B,H,T,T]


def values_alone(q, k, v, *how):
    """Every patch keeps its own value (MaskCLIP)."""
    return v, jnp.broadcast_to(jnp.eye(v.shape[2]), (*v.shape[:3], v.shape[2]))  # [B,H,T,T], not computed if unused


_ATTENDS: Mapping[str, Attend] = {
    "csa": self_correlated,
    "qq": queries_alone,
    "kk": keys_alone,
    "v": values_alone,
    "naclip": keys_alone,  # with a bias, `neighbourhood_bias`
    "ordinary": attend,
}
_REDUCED = {"qq", "kk", "v", "naclip"}  # whose papers drop residual and MLP of the last block


def neighbourhood_bias(grid: tuple[int, int], deviation: float | jax.Array, class_token: bool = True) -> jax.Array:
    """Gaussian of the distance between patches, 0 for the class token: [T,T] float32 (NACLIP, equation 3).

    deviation: in patches, 5 as published; may be traced. class_token: False for towers that have none (SigLIP).
    """
    row, column = (np.asarray(place).reshape(-1, 1) for place in np.indices(grid))  # [P,1]
    squared = (row - row.T) ** 2 + (column - column.T) ** 2  # [P,P]
    between = jnp.exp(-squared.astype(np.float32) / (2 * jnp.square(jnp.asarray(deviation, jnp.float32))))
    first = int(class_token)
    return jnp.pad(between, ((first, 0), (first, 0)))  # [T,T]; added to the scores before the softmax


class Last(NamedTuple):
    """The last block, as a static argument."""

    attention: Attention
    reduced: bool
    positions: Positions


class DenseTask(NamedTuple):
    """What of a call is part of the program: the model's shape, its last block, and how products are computed."""

    config: CLIPConfig
    last: Last
    numerics: Numerics


def dense_features(
    params: Params,
    pixels: jax.Array | np.ndarray,
    config: CLIPConfig,
    *,
    attention: Attention | None = None,
    reduced: bool | None = None,
    neighbourhood: float | jax.Array = 5.0,
    positions: Positions = "bicubic_offset",
    numerics: Numerics = Numerics(),
) -> jax.Array:
    """Features of patches in the space of the texts: [B,P,E] float32, projected, NOT normalised, row-major.

    Args:
      params: parameter tree of a checkpoint.
      pixels: [B,H,W,3] float, normalised; H and W any multiples of the patch size, at least two patches each.
      config: of the checkpoint.
      attention: of the last block: "csa" (SCLIP), "qq" (ClearCLIP), "kk", "v" (MaskCLIP), "naclip", the default, or
        "ordinary". A ResNet has only "v": every place of its last map as the only key of the attention pool, without
        positions, as MaskCLIP reads it; patches are 32 pixels wide.
      reduced: drop residual and MLP of the last block; by default as the paper of that attention does ("csa" and
        "ordinary" keep them).
      neighbourhood: standard deviation in patches of NACLIP's Gaussian; may be traced.
      positions: on other grids than the native one: "bicubic_offset" samples as those repositories do, by a scale of
        (n + 0.1) / native; "bicubic" exactly.
      numerics: how products are computed.

    Raises `ImageError` for pixels that do not fit, `DataError` for an unknown attention, `ConfigError` for one that a
    ResNet does not have and for NaFlex.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 96, 3), np.float32)
    >>> patch.dense_features(model.params, pixels, model.config, attention="csa").shape  # 6 x 12 patches
    (1, 72, 64)
    """
    check_pixels(pixels, config, None)
    check_last(attention, positions)
    last = last_of(attention, reduced, positions, config)
    check_positive("neighbourhood", neighbourhood)
    deviation = jnp.asarray(neighbourhood, jnp.float32)
    return dense_tokens(params, jnp.asarray(pixels), deviation, task=DenseTask(config, last, numerics))


@functools.partial(jax.jit, static_argnames="task")
def dense_tokens(params: Params, pixels: jax.Array, neighbourhood: jax.Array, *, task: DenseTask) -> jax.Array:
    """`dense_features`, unchecked, to be part of a program, too: [B,H,W,3] -> [B,P,E]."""
    if isinstance(task.config.vision, ResNetConfig):
        return local_features(params, pixels, task.config.vision, task.numerics)  # [B,P,E]
    return _patches(params, _before_last(params, pixels, task), _grid(pixels, task), neighbourhood, task)


@functools.partial(jax.jit, static_argnames="task")
def dense_and_whole(
    params: Params, pixels: jax.Array, neighbourhood: jax.Array, *, task: DenseTask
) -> tuple[jax.Array, jax.Array]:
    """Features of patches [B,P,E] and of whole images [B,E], as `clip.encode_image` has them, in one pass.

    Images of the native size; only the last block is computed twice, in its two ways.
    """
    if isinstance(task.config.vision, ResNetConfig):
        whole = encode_image(params, pixels, task.config, numerics=task.numerics)  # compilers see that maps are shared
        return dense_tokens(params, pixels, neighbourhood, task=task), whole
    vision, x = task.config.vit, _before_last(params, pixels, task)  # [B,T,D]
    patches = _patches(params, x, _grid(pixels, task), neighbourhood, task)
    *_, final = layers_of(params["vision_model"], vision)
    if vision.pooling == "class":
        first = jnp.zeros(len(x), jnp.int32)  # [B], where the class token stands
        token = last_block(final, x, first, vision, None, task.numerics)  # [B,D]
        return patches, vision_output(params, token, vision, task.numerics)
    x, _ = block(final, x, vision, None, task.numerics)  # a mean or a MAP head reads every token
    pooled = pool_image(params["vision_model"], x, vision, task.numerics)  # [B,D]
    return patches, project_image(params, pooled, task.numerics)


def _grid(pixels: jax.Array, task: DenseTask) -> tuple[int, int]:
    size = task.config.vit.patch_size
    return pixels.shape[1] // size, pixels.shape[2] // size


def _before_last(params: Params, pixels: jax.Array, task: DenseTask) -> jax.Array:
    """What enters the last block: [B,H,W,3] -> [B,T,D]; all blocks but that one as trained."""
    tree, (config, last, numerics) = params["vision_model"], task
    table = position_table(tree, config.vit, _grid(pixels, task), last.positions)  # [T,D]
    x = vision_input(params, vision_embeddings(tree, pixels, config.vit, table, numerics), config.vit)  # [B,T,D]
    return all_blocks(tree, x, config.vit, None, numerics, leave=1)


def _patches(
    params: Params, x: jax.Array, grid: tuple[int, int], neighbourhood: jax.Array, task: DenseTask
) -> jax.Array:
    """The last block with its own attention, and the way into the shared space: [B,T,D] -> [B,P,E]."""
    vision, last, numerics = task.config.vit, task.last, task.numerics
    *_, final = layers_of(params["vision_model"], vision)
    near = neighbourhood_bias(grid, neighbourhood, vision.class_token)  # [T,T]
    bias = near[None, None] if last.attention == "naclip" else None  # [1,1,T,T]
    if last.reduced:
        x = _reduced_block(final, x, bias, task)
    else:
        x, _ = block(final, x, vision, bias, numerics, _ATTENDS[last.attention])
    return vision_output(params, x[:, int(vision.class_token) :], vision, numerics)  # [B,P,E]: patches alone


def _reduced_block(params: Params, x: jax.Array, bias: jax.Array | None, task: DenseTask) -> jax.Array:
    """The last block as ClearCLIP and NACLIP have it, no residual and no MLP: [B,T,D] -> [B,T,D]."""
    vision, numerics = task.config.vit, task.numerics
    y = layer_norm(params["layer_norm1"], x, vision.layer_norm_eps)  # [B,T,D]
    q, k, v = project_qkv(params["self_attn"], y, vision.num_attention_heads, numerics)  # [B,H,T,D/H]
    mixed, _ = _ATTENDS[task.last.attention](q, k, v, bias, numerics)
    return dense(params["self_attn"]["out_proj"], merge_heads(mixed), numerics)  # [B,T,D]


def dense_scores(
    params: Params, pixels: jax.Array | np.ndarray, text_features: jax.Array | np.ndarray, config: CLIPConfig, **options
) -> jax.Array:
    """Cosines of patches with texts: pixels [B,H,W,3], text_features [C,E] -> [B,P,C] float32, -1 to 1.

    options: of `dense_features`. Errors as there, and `DataError` for texts of another model, not finite or zero.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 96, 3), np.float32)
    >>> texts = zeroshot.text_proxies(model, ["circle", "square", "ground"])
    >>> patch.dense_scores(model.params, pixels, texts, model.config).shape
    (1, 72, 3)
    """
    check_texts("text_features", text_features, config)
    features = normalize(dense_features(params, pixels, config, **options))  # [B,P,E]
    texts = normalize(jnp.asarray(text_features))  # [C,E]
    return jnp.einsum("bpe,ce->bpc", features, texts, precision=jax.lax.Precision.HIGHEST)  # [B,P,C]


def last_of(attention: Attention | None, reduced: bool | None, positions: Positions, config: CLIPConfig) -> Last:
    """The last block as asked for, of this tower; residual and MLP by default as in the paper of its attention."""
    attention = attention or default_attention(config)
    if isinstance(config.vision, ResNetConfig) and attention != "v":
        raise ConfigError(
            f"attention is {attention!r}; the image tower is a ResNet, whose places do not attend to each other: "
            "expected 'v', MaskCLIP's"
        )
    return Last(attention, attention in _REDUCED if reduced is None else bool(reduced), positions)


def default_attention(config: CLIPConfig, of_vit: Attention = "naclip") -> Attention:
    """The attention of a tower where none is asked for."""
    return "v" if isinstance(config.vision, ResNetConfig) else of_vit


def check_last(attention: Attention | None, positions: Positions) -> None:
    """Raise `DataError` for a name that is not known."""
    for name, value, choices in (
        ("attention", attention, (*get_args(Attention), None)),
        ("positions", positions, get_args(Positions)),
    ):
        if value not in choices:
            raise DataError(f"{name} is {value!r}, expected one of {', '.join(filter(None, choices))}")
