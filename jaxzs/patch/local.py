"""CLIP's vision tower in local mode, and what TagCLIP (arXiv 2312.12828, section 3) reads from it.

The last block keeps its value path but mixes nothing, so that every patch keeps what is at its place; its tokens
are scored against the texts. The attention of the blocks before says which patches belong together.
Axis letters: B batch, T = 1+P tokens, P patches of the padded grid (row-major), E embedding, C classes, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params, block, layers_of
from jaxzs.clip.model import normalize, vision_output
from jaxzs.patch.grid import Grid
from jaxzs.patch.tower import Pass, attend_by_head, between_patches, embed_images


class LocalOutput(NamedTuple):
    """What the vision tower in local mode gives.

    tokens: [B,T,E] projected, not normalised; the class token first, where there is one. In SigLIP each is what the MAP
      head makes of it as its only key.
    attention: L arrays [B,T,T], mean over heads; the last layer's is the ordinary one, though it was not used.
    """

    tokens: jax.Array
    attention: tuple[jax.Array, ...]


def keep_values(q, k, v, *how):
    """Attention that is the identity: the values as they are, and the weights that were not used.

    how: bias and numerics, as `attend` takes them.
    """
    # The original adds a mask of -100 off the diagonal instead, and mixes by what is left.
    return v, attend_by_head(q, k, v, *how)[1]  # [B,H,T,D/H], [B,T,T]


def local_tower(
    params: Params,
    pixels: jax.Array,
    config: CLIPConfig,
    grid: Grid,
    *,
    half_positions: bool = False,
    numerics: Numerics = Numerics(),
) -> LocalOutput:
    """The vision tower in local mode, for images of any size: pixels [B,H,W,3], normalised, NHWC.

    Args:
      params: the whole parameter tree (only the vision part is used).
      pixels: H and W multiples of the patch size; what lies outside of `grid` is never looked at.
      config: of the checkpoint.
      grid: the true grids.
      half_positions: round the positions of all grids but the native one, as the original does.
      numerics: how products are computed.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 96, 3), np.float32)
    >>> tower = jax.jit(patch.local_tower, static_argnames="config")
    >>> local = tower(model.params, pixels, model.config, patch.full_grid(1, 6, 12))
    >>> local.tokens.shape, len(local.attention), local.attention[0].shape
    ((1, 73, 64), 5, (1, 73, 73))
    """
    tree, vision = params["vision_model"], config.vit
    task = Pass(config, "half" if half_positions else "bilinear", numerics)
    x, bias = embed_images(params, pixels, grid, task)  # [B,T,D], [B,1,1,T]
    attention = []
    *before, last = layers_of(tree, vision)
    for layer in before:
        x, weights = block(layer, x, vision, bias, numerics, attend_by_head)  # [B,T,D], [B,T,T]
        attention.append(weights)
    x, weights = block(last, x, vision, bias, numerics, keep_values)  # [B,T,D], [B,T,T]
    return LocalOutput(vision_output(params, x, vision, numerics), (*attention, weights))


def default_attention_layers(num_layers: int, kind: str = "last") -> tuple[int, ...]:
    """Layers whose attention is averaged: the three before the last ("last"), or all before the last ("all").

    >>> patch.default_attention_layers(12), patch.default_attention_layers(5)
    ((8, 9, 10), (1, 2, 3))
    """
    first = 0 if kind == "all" else max(0, num_layers - 4)
    return tuple(range(first, num_layers - 1)) or (0,)


def default_votes(num_layers: int) -> int:
    """Layers that must agree before two patches count as related: a third of them, 4 of 12 as in the original.

    >>> patch.default_votes(12), patch.default_votes(5), patch.default_votes(24)
    (4, 2, 8)
    """
    return max(1, round(num_layers / 3))


def attention_votes(attention: Sequence[jax.Array], patches: jax.Array) -> jax.Array:
    """In how many layers a patch attends to another above that layer's mean: L x [B,T,T] -> [B,P,P] int32.

    patches [B,P] bool: the mean is over pairs of valid patches only.

    The attention mask of dual masking: TagCLIP, arXiv 2312.12828, section 3.2.

    >>> weights = jnp.array([[[0.2, 0.4, 0.4], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]])  # one layer, two patches
    >>> patch.attention_votes([weights, weights], jnp.ones((1, 2), bool)).tolist()
    [[[2, 0], [0, 2]]]
    """
    pairs = patches[:, :, None] & patches[:, None, :]  # [B,P,P]
    count = jnp.maximum(pairs.sum((1, 2), dtype=jnp.float32), 1.0)
    votes = jnp.zeros(pairs.shape, jnp.int32)
    for weights in attention:
        between = jnp.where(pairs, between_patches(weights, patches), 0.0)
        mean = between.sum((1, 2)) / count  # [B], of valid pairs
        votes = votes + (between > mean[:, None, None]).astype(jnp.int32)
    return jnp.where(pairs, votes, 0)


def fuse_attention(
    attention: Sequence[jax.Array],
    patches: jax.Array,
    layers: Sequence[int],
    votes: int | jax.Array,
    *,
    renormalize: bool = False,
) -> jax.Array:
    """Patch-to-patch attention [B,P,P]: the mean of `layers`, where at least `votes` of all layers agree.

    Rows sum to less than 1, as in the paper; `renormalize` (not in the paper) makes them sum to 1.

    attention: L arrays [B,T,T] of `local_tower`. patches [B,P] bool: the valid ones. layers: numbers of the averaged
    layers. votes may be traced. TagCLIP, arXiv 2312.12828, section 3.2.

    >>> weights = jnp.array([[[0.2, 0.4, 0.4], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]])  # one layer, two patches
    >>> print(patch.fuse_attention([weights, weights], jnp.ones((1, 2), bool), layers=(0, 1), votes=2)[0])
    [[0.8 0. ]
     [0.  0.7]]
    """
    agreed = attention_votes(attention, patches) >= votes  # [B,P,P]
    mean = sum(between_patches(attention[layer], patches) for layer in layers) / len(layers)  # [B,P,P]
    fused = jnp.where(agreed & patches[:, :, None] & patches[:, None, :], mean, 0.0)
    if renormalize:
        fused = fused / jnp.maximum(fused.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return fused


def class_probabilities(tokens: jax.Array, text_features: jax.Array, logit_scale: jax.Array) -> jax.Array:
    """Softmax over all C classes of exp(logit_scale) times the cosine: [...,E], [C,E] -> [...,C] float32.

    Both sides are L2-normalised here.
    """
    cosine = jnp.matmul(normalize(tokens), normalize(text_features).T, precision=jax.lax.Precision.HIGHEST)  # [...,C]
    return jax.nn.softmax(jnp.exp(logit_scale.astype(jnp.float32)) * cosine, axis=-1)


def coarse_scores(
    tokens: jax.Array, text_features: jax.Array, logit_scale: jax.Array, class_tokens: int = 1
) -> jax.Array:
    """Class probabilities of every patch, the class token left out: tokens [B,T,E], [C,E] -> [B,P,C].

    text_features [C,E] of all names, background included. Both sides are L2-normalised here; logit_scale [] as in the
    checkpoint (its logarithm); class_tokens: 0 for SigLIP. Float32, summing to 1 over C. TagCLIP, arXiv 2312.12828,
    section 3.

    >>> tokens = jnp.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]])  # class token, two patches
    >>> print(patch.coarse_scores(tokens, jnp.eye(2), jnp.log(jnp.float32(100)))[0].round(2))
    [[1.  0. ]
     [0.5 0.5]]
    """
    return class_probabilities(tokens[:, class_tokens:], text_features, logit_scale)
