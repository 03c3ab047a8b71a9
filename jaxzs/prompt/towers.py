"""The frozen towers as prompts need them: blocks that may be recomputed, and a last block for one token only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxzs.clip.config import CLIPConfig, TextConfig, VisionConfig
from jaxzs.clip.layers import (
    Numerics,
    Params,
    attend,
    block,
    dense,
    layer_norm,
    merge_heads,
    mlp,
    project_qkv,
)
from jaxzs.clip.model import causal_bias, pool


def blocks(
    params: Params,
    x: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None,
    numerics: Numerics,
    recompute: bool,
) -> jax.Array:
    """All blocks but the last: x [B,T,D] -> [B,T,D]; `recompute` trades time for memory in the gradient."""
    plain = functools.partial(block, tower=tower, numerics=numerics)
    run = jax.checkpoint(plain) if recompute else plain
    for layer in range(tower.num_hidden_layers - 1):
        x, _ = run(params["encoder"]["layers"][str(layer)], x, bias=bias)
    return x


def feed_forward(
    params: Params,
    x: jax.Array,
    mixed: jax.Array,
    tower: TextConfig | VisionConfig,
    numerics: Numerics,
) -> jax.Array:
    """What follows attention in a block: x [B,T,D] and the heads' output [B,H,T,D/H] -> [B,T,D]."""
    x = x + dense(params["self_attn"]["out_proj"], merge_heads(mixed), numerics)
    y = layer_norm(params["layer_norm2"], x, tower.layer_norm_eps)
    return x + mlp(params["mlp"], y, tower.hidden_act, numerics)


def last_block(
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None,
    numerics: Numerics,
    context: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The last block at one position of each sequence, the only one that is read: x [B,T,D] -> [B,D].

    positions [B]; bias [1,1,T,S] or None; context: keys and values [1,H,S-T,D/H] that precede those of x.
    """
    B, T, _ = x.shape
    y = layer_norm(params["layer_norm1"], x, tower.layer_norm_eps)
    q, k, v = project_qkv(params["self_attn"], y, tower.num_attention_heads, numerics)
    k, v = (k, v) if context is None else with_context(context, k, v)
    q = jnp.take_along_axis(q, positions[:, None, None, None], axis=2)  # [B,H,1,D/H]
    if bias is not None:
        rows = jnp.broadcast_to(bias[0, 0], (B, T, bias.shape[-1]))
        bias = jnp.take_along_axis(rows, positions[:, None, None], axis=1)[:, None]  # [B,1,1,S]
    mixed, _ = attend(q, k, v, bias, numerics)
    token = pool(x, positions)[:, None]  # [B,1,D]
    return feed_forward(params, token, mixed, tower, numerics)[:, 0]


def with_context(
    context: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [C,H,M,D/H] behind those of the context [1,H,S,D/H], which every class shares."""
    shared_k, shared_v = (
        jnp.broadcast_to(shared, (k.shape[0], *shared.shape[1:])) for shared in context
    )
    return jnp.concatenate([shared_k, k], axis=2), jnp.concatenate([shared_v, v], axis=2)


def read_text(
    params: Params,
    x: jax.Array,
    ends: jax.Array,
    config: CLIPConfig,
    numerics: Numerics,
    recompute: bool,
) -> jax.Array:
    """Text features of embedded sequences: x [C,T,D], end positions [C] -> [C,E], not normalised."""
    tree, text = params["text_model"], config.text
    bias = causal_bias(x.shape[1])
    x = blocks(tree, x, text, bias, numerics, recompute)
    last = tree["encoder"]["layers"][str(text.num_hidden_layers - 1)]
    token = last_block(last, x, ends, text, bias, numerics)
    return project_text(params, token, config, numerics)


def read_text_with_context(
    params: Params,
    shared: jax.Array,
    x: jax.Array,
    ends: jax.Array,
    config: CLIPConfig,
    numerics: Numerics,
    recompute: bool,
) -> jax.Array:
    """`read_text` of sequences that begin alike, with the common beginning computed once.

    The mask is causal: no position of the beginning sees what follows, so its keys and values are the same for
    every class. shared [1,S,D] the embedded beginning, x [C,M,D] what follows it, ends [C] counted in x
    -> [C,E]. Equal to `read_text` on the concatenation, also in the gradient.
    """
    tree, text = params["text_model"], config.text
    S, M = shared.shape[1], x.shape[1]
    bias = causal_bias(S + M)
    plain = functools.partial(_shared_block, text=text, numerics=numerics)
    step = jax.checkpoint(plain) if recompute else plain
    for layer in range(text.num_hidden_layers - 1):
        shared, x = step(tree["encoder"]["layers"][str(layer)], shared, x, bias)
    last = tree["encoder"]["layers"][str(text.num_hidden_layers - 1)]
    y = layer_norm(last["layer_norm1"], shared, text.layer_norm_eps)
    _, k, v = project_qkv(last["self_attn"], y, text.num_attention_heads, numerics)
    token = last_block(last, x, ends, text, bias[:, :, S:], numerics, (k, v))
    return project_text(params, token, config, numerics)


def _shared_block(params, shared, x, bias, text, numerics):
    S = shared.shape[1]
    y = layer_norm(params["layer_norm1"], shared, text.layer_norm_eps)
    q, k, v = project_qkv(params["self_attn"], y, text.num_attention_heads, numerics)
    mixed, _ = attend(q, k, v, bias[:, :, :S, :S], numerics)
    shared = feed_forward(params, shared, mixed, text, numerics)

    y = layer_norm(params["layer_norm1"], x, text.layer_norm_eps)
    q, own_k, own_v = project_qkv(params["self_attn"], y, text.num_attention_heads, numerics)
    own_k, own_v = with_context((k, v), own_k, own_v)
    mixed, _ = attend(q, own_k, own_v, bias[:, :, S:], numerics)
    return shared, feed_forward(params, x, mixed, text, numerics)


def project_text(
    params: Params, token: jax.Array, config: CLIPConfig, numerics: Numerics
) -> jax.Array:
    """Final LayerNorm and projection of the end token: [C,D] -> [C,E]."""
    norm = params["text_model"]["final_layer_norm"]
    token = layer_norm(norm, token, config.text.layer_norm_eps)
    return dense(params["text_projection"], token, numerics)


def read_image(
    params: Params,
    x: jax.Array,
    config: CLIPConfig,
    numerics: Numerics,
    recompute: bool,
) -> jax.Array:
    """Image features of embedded patches behind a class token: x [B,T,D], no LayerNorm yet -> [B,E]."""
    tree, vision = params["vision_model"], config.vision
    x = layer_norm(tree["pre_layrnorm"], x, vision.layer_norm_eps)  # [sic]
    x = blocks(tree, x, vision, None, numerics, recompute)
    last = tree["encoder"]["layers"][str(vision.num_hidden_layers - 1)]
    token = last_block(last, x, jnp.zeros(x.shape[0], jnp.int32), vision, None, numerics)
    token = layer_norm(tree["post_layernorm"], token, vision.layer_norm_eps)
    return dense(params["visual_projection"], token, numerics)
