"""Attention as pooling: SigLIP's MAP head with a learned probe, the pool of CLIP's ResNets with the mean as query."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxzs.clip.config import ResNetConfig, VisionConfig
from jaxzs.clip.layers import Numerics, Params, attend, dense, layer_norm, merge_heads, mlp, split_heads


def map_head(
    head: Params, x: jax.Array, vision: VisionConfig, numerics: Numerics, bias: jax.Array | None = None
) -> jax.Array:
    """One learned query attends to all patches: x [B,P,D] after the post-LayerNorm -> [B,D] (arXiv 2303.15343).

    bias: additive, broadcastable to [B,1,1,P]; hides padding.
    """
    probe = head["probe"].astype(jnp.float32).reshape(1, 1, -1)  # [1,1,D]
    mixed, _ = _attend_from(head["attention"], probe, x, vision.num_attention_heads, numerics, bias)  # [B,1,D]
    y = dense(head["attention"]["out_proj"], mixed[:, 0], numerics)  # [B,D]
    return _residual_mlp(head, y, vision, numerics)


def map_local(head: Params, x: jax.Array, vision: VisionConfig, numerics: Numerics) -> jax.Array:
    """What `map_head` gives where every patch is its own only key: x [..., D] -> [..., D], in the shared space."""
    own = head["attention"]
    y = dense(own["out_proj"], dense(own["v_proj"], x, numerics), numerics)  # [...,D]; the softmax of one key is 1
    return _residual_mlp(head, y, vision, numerics)


def _residual_mlp(head: Params, y: jax.Array, vision: VisionConfig, numerics: Numerics) -> jax.Array:
    # The residual is the attention's output; the probe itself is not added.
    normed = layer_norm(head["layernorm"], y, vision.layer_norm_eps)
    return y + mlp(head["mlp"], normed, vision.hidden_act, numerics)  # [...,D]


def attention_pool(
    pool: Params, x: jax.Array, positions: jax.Array, vision: ResNetConfig, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """The mean of all places attends to itself and to them: x [B,P,D] -> ([B,D], weights [B,H,1,1+P]).

    positions [1+P,D], row 0 that of the mean. The projection to the shared space (`c_proj`) follows elsewhere.
    """
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1) + positions[None]  # [B,1+P,D]
    mixed, weights = _attend_from(pool, x[:, :1], x, vision.num_attention_heads, numerics)  # [B,1,D], [B,H,1,1+P]
    return mixed[:, 0], weights


def _attend_from(
    params: Params, query: jax.Array, x: jax.Array, heads: int, numerics: Numerics, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query [1 or B,1,D] to x [B,T,D]: ([B,1,D] before the output projection, weights [B,H,1,T])."""
    # A learned query is projected once for the whole batch, then spread over it.
    q = split_heads(dense(params["q_proj"], query, numerics) * (x.shape[-1] // heads) ** -0.5, heads)
    k, v = (split_heads(dense(params[name], x, numerics), heads) for name in ("k_proj", "v_proj"))  # [B,H,T,D/H]
    q = jnp.broadcast_to(q, (x.shape[0], *q.shape[1:]))  # [B,H,1,D/H]
    mixed, weights = attend(q, k, v, bias, numerics)  # [B,H,1,D/H], [B,H,1,T]
    return merge_heads(mixed), weights  # [B,1,D]
