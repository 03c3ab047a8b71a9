"""Text sequences that begin alike: their common beginning goes through the frozen tower once."""

from __future__ import annotations

import functools

import jax

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import (
    Numerics,
    Params,
    attend,
    finish_block,
    last_block,
    layer_norm,
    layers_of,
    project_qkv,
    with_context,
)
from jaxzs.clip.model import causal_bias, text_output


def read_text_with_context(
    params: Params,
    shared: jax.Array,
    x: jax.Array,
    ends: jax.Array,
    config: CLIPConfig,
    numerics: Numerics,
    recompute: bool,
) -> jax.Array:
    """`clip.model.read_text` of sequences that begin alike, with the common beginning computed once.

    The mask is causal: no position of the beginning sees what follows, so its keys and values are the same for
    every class. shared [1,S,D] the embedded beginning, x [C,M,D] what follows it, ends [C] counted in x
    -> [C,E]. Equal to `read_text` on the concatenation, also in the gradient.
    """
    text, S = config.text, shared.shape[1]
    bias = causal_bias(S + x.shape[1])  # [1,1,S+M,S+M]
    *before, last = layers_of(params["text_model"], text)
    plain = functools.partial(_shared_block, text=text, numerics=numerics)
    step = jax.checkpoint(plain) if recompute else plain
    for layer in before:
        shared, x = step(layer, shared, x, bias)  # [1,S,D], [C,M,D]
    _, k, v = _queries(last, shared, text, numerics)  # [1,H,S,D/H]; nobody reads the beginning behind this layer
    token = last_block(last, x, ends, text, bias[:, :, S:], numerics, (k, v))  # [C,D]
    return text_output(params, token, text, numerics)  # [C,E]


def _shared_block(params, shared, x, bias, text, numerics):
    S = shared.shape[1]
    q, k, v = _queries(params, shared, text, numerics)  # [1,H,S,D/H]
    mixed, _ = attend(q, k, v, bias[:, :, :S, :S], numerics)  # [1,H,S,D/H]
    shared = finish_block(params, shared, mixed, text, numerics)  # [1,S,D]

    # Names meet the beginning as it entered this layer: k and v are from before its own block.
    q, own_k, own_v = _queries(params, x, text, numerics)  # [C,H,M,D/H]
    mixed, _ = attend(q, *with_context((k, v), own_k, own_v), bias[:, :, S:], numerics)  # [C,H,M,D/H]
    return shared, finish_block(params, x, mixed, text, numerics)


def _queries(params, x, text, numerics):
    y = layer_norm(params["layer_norm1"], x, text.layer_norm_eps)  # [B,T,D]
    return project_qkv(params["self_attn"], y, text.num_attention_heads, numerics)  # three of [B,H,T,D/H]
