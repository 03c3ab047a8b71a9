"""Class activation maps of CLIP's vision tower, by the gradient through its last block (CLIP-ES, arXiv 2212.09506).

The map of a class weighs the channels that enter the last block by how much they raise the class's probability
against the other tags and the background names. All tags of all images are differentiated at once.
Axis letters: B batch, T = 1+P tokens, P patches of the padded grid, D width, E embedding, K tags of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, VisionConfig
from jaxzs.clip.layers import (
    Numerics,
    Params,
    attend,
    block,
    finish_block,
    layer_norm,
    layers_of,
    project_qkv,
)  # fmt: skip
from jaxzs.clip.model import normalize, vision_output
from jaxzs.errors import ConfigError
from jaxzs.patch.grid import Grid, divide
from jaxzs.patch.tower import Pass, attend_by_head, embed_images


class CamTexts(NamedTuple):
    """What competes for the patches of each image: its tags, and names for whatever else is there.

    features: [B,K+M,E] text features of each image's K tags, then of M background names; L2-normalised where used.
    present: [B,K] bool, False where an image has fewer than K tags.

    >>> texts = zeroshot.text_proxies(jaxzs.load("demo"), ["circle", "square", "ground"])[None]
    >>> patch.CamTexts(texts, jnp.array([[True, False]])).features.shape  # two tags, of which one is there
    (1, 3, 64)
    """

    features: jax.Array
    present: jax.Array


class CamOutput(NamedTuple):
    """Activation maps and the attention that refines them.

    probability: [B,K+M] softmax over an image's tags and the M background names; 0 for absent tags.
    maps: [B,K,P] each from 0 to 1; 0 for absent tags and padded patches.
    attention: L arrays [B,T,T], mean over heads.
    """

    probability: jax.Array
    maps: jax.Array
    attention: tuple[jax.Array, ...]


def class_activation_maps(
    params: Params,
    pixels: jax.Array,
    texts: CamTexts,
    config: CLIPConfig,
    grid: Grid,
    *,
    half_positions: bool = False,
    numerics: Numerics = Numerics(),
) -> CamOutput:
    """Activation maps of the tags of each image.

    Args:
      params: the whole parameter tree (only the vision part is used).
      pixels: [B,H,W,3] normalised; H and W multiples of the patch size.
      texts: the tags of each image and the M background names, `CamTexts`.
      config: of the checkpoint.
      grid: the true grids.
      half_positions: round positions to half precision, also on the native grid, as the original does.
      numerics: how products are computed.

    CLIP-ES, arXiv 2212.09506, Softmax-GradCAM. Returns `CamOutput`.

    >>> model, pixels = jaxzs.load("demo"), np.zeros((1, 48, 48, 3), np.float32)
    >>> texts = zeroshot.text_proxies(model, ["circle", "square", "ground"])[None]  # two tags, one background
    >>> texts = patch.CamTexts(texts, present=jnp.ones((1, 2), bool))
    >>> maps = jax.jit(patch.class_activation_maps, static_argnames="config")
    >>> cam = maps(model.params, pixels, texts, model.config, patch.full_grid(1, 6, 6))
    >>> cam.maps.shape, cam.probability.shape
    ((1, 2, 36), (1, 3))
    """
    vision, first = check_tower(config), int(config.vit.class_token)
    task = Pass(config, "all_half" if half_positions else "bilinear", numerics)
    x, bias = embed_images(params, pixels, grid, task)  # [B,T,D], [B,1,1,T]
    attention = []
    *before, last = layers_of(params["vision_model"], vision)
    for layer in before:
        x, weights = block(layer, x, vision, bias, numerics, attend_by_head)
        attention.append(weights)  # [B,T,T]
    y = layer_norm(last["layer_norm1"], x, vision.layer_norm_eps)  # [B,T,D], what gradients are taken of
    names, present = texts
    K, of_background = present.shape[1], names.shape[1] - present.shape[1]
    allowed = jnp.pad(present, ((0, 0), (0, of_background)), constant_values=True)  # [B,K+M]

    def probability(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B,K+M] from what enters the last block's attention; x enters its residual and is held fixed."""
        q, k, v = project_qkv(last["self_attn"], y, vision.num_attention_heads, numerics)  # [B,H,T,D/H]
        mixed, weights = attend(q, k, v, bias, numerics)  # [B,H,T,D/H], [B,H,T,T]
        z = finish_block(last, x, mixed, vision, numerics)  # [B,T,D]
        tokens = vision_output(params, z, vision, numerics)[:, first:]  # the class token is not used
        feature = normalize(_mean_of_patches(tokens, grid))  # [B,E]
        cosine = jnp.einsum("be,bce->bc", feature, normalize(names), precision=jax.lax.Precision.HIGHEST)  # [B,K+M]
        logits = jnp.exp(params["logit_scale"].astype(jnp.float32)) * cosine
        return jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf)), weights.mean(1)

    found, pull_back, weights = jax.vjp(probability, y, has_aux=True)
    # The images do not touch each other: one pull-back serves the same tag number of all of them.
    seeds = jax.nn.one_hot(jnp.arange(K), found.shape[1])  # [K,K+M]
    seeds = jnp.broadcast_to(seeds[:, None], (seeds.shape[0], *found.shape))  # [K,B,K+M]
    (gradient,) = jax.vmap(pull_back)(seeds)  # [K,B,T,D]
    channels = jax.vmap(_mean_of_patches, (0, None))(gradient[:, :, first:], grid)  # [K,B,D]
    maps = jnp.einsum("bpd,kbd->bkp", y[:, first:], channels, precision=jax.lax.Precision.HIGHEST)  # [B,K,P]
    maps = jax.nn.relu(jnp.where(grid.patches[:, None], maps, 0.0))  # only what speaks for the class
    maps = min_max_with_epsilon(min_max_with_epsilon(maps, grid), grid)  # twice, as in CLIP-ES
    maps = jnp.where(present[:, :, None], maps, 0.0)
    return CamOutput(found, maps, (*attention, weights))


def check_tower(config: CLIPConfig) -> VisionConfig:
    """The image tower, where it has patches that a gradient can weigh; else `ConfigError`."""
    config.check_one_size()
    if config.vit.pooling == "map":
        raise ConfigError(
            "activation maps are gradients through a mean of patches, and this tower (SigLIP) reads its patches "
            "through a MAP head, for which no such map is known",
            python="patch.score_maps and patch.segment_dense make masks of it",
            command="--maps scores and --maps dense make masks of it",
        )
    return config.vit


def _mean_of_patches(tokens: jax.Array, grid: Grid) -> jax.Array:
    """Mean over valid patches: [B,P,D] -> [B,D]."""
    inside = grid.patches[:, :, None]  # [B,P,1]
    count = jnp.maximum(inside.sum(1, dtype=jnp.float32), 1.0)  # [B,1]; an image of padding divides by 1
    return jnp.where(inside, tokens, 0.0).sum(1) / count  # [B,D]


def min_max_with_epsilon(maps: jax.Array, grid: Grid) -> jax.Array:
    """Maps [B,K,P] to 0..1 over valid patches, (z - min) / (1e-7 + max(z - min)) as in CLIP-ES; 0 on padding."""
    inside = grid.patches[:, None]  # [B,1,P]
    lowest = jnp.where(inside, maps, jnp.inf).min(-1, keepdims=True)  # [B,K,1]
    shifted = jnp.where(inside, maps - lowest, 0.0)  # [B,K,P]
    return divide(shifted, 1e-7 + shifted.max(-1, keepdims=True))
