"""The layers of CLIP's two transformers, as pure functions on parameter dicts, and how their products are computed.

Numerics: float32 by default, whatever type the weights are stored in. With `Numerics(jnp.bfloat16)` the
operands of every matrix product are bfloat16 and its result float32; softmax, LayerNorm and the
residual stream stay float32. Asking for the float32 result selects the fast kernel on CPU, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import TextConfig, VisionConfig

Params = Mapping[str, Any]
Array = jax.Array | np.ndarray
Precision = jax.lax.PrecisionLike


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Numerics:
    """How matrix products are computed: type of the operands (None is float32), and XLA precision.

    A static value: it may be passed to `jit` as any argument.

    >>> numerics = clip.Numerics(compute_dtype=jnp.bfloat16)
    >>> numerics.matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).dtype
    dtype('float32')
    """

    compute_dtype: Any = None  # None is float32
    precision: Precision = None

    def matmul(self, a: Array, b: Array) -> jax.Array:
        """`a @ b` with operands in the compute type and a float32 result."""
        dtype = jnp.float32 if self.compute_dtype is None else self.compute_dtype
        # Without the last argument XLA's CPU backend turns bfloat16 operands into float32: less than half the speed.
        return jnp.matmul(
            a.astype(dtype), b.astype(dtype), precision=self.precision, preferred_element_type=jnp.float32
        )


def dense(params: Params, x: jax.Array, numerics: Numerics = Numerics()) -> jax.Array:
    """`x @ kernel (+ bias)`: x [..., D_in] -> [..., D_out] float32.

    One flat product: with more axes XLA's CPU backend transposes for the gradients, which makes training 1.7 x slower.
    """
    y = numerics.matmul(x.reshape(-1, x.shape[-1]), params["kernel"])  # [B*T,D_out]
    y = y + _like(params["bias"], y) if "bias" in params else y  # the projections of CLIP's ViTs have none
    return y.reshape(*x.shape[:-1], y.shape[-1])  # [...,D_out]


def layer_norm(params: Params, x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis in float32: x [..., D] -> [..., D] float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)  # [...,1]; E[x^2] - E[x]^2 loses digits
    y = centred * jax.lax.rsqrt(variance + eps)  # [...,D]
    return y * _like(params["scale"], y) + _like(params["bias"], y)


def activation(x: jax.Array, name: str) -> jax.Array:
    """Elementwise non-linearity of the MLP: OpenAI's quick_gelu, LAION's exact gelu, or its tanh form."""
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)  # taken for gelu it moves features by about 1 %, without any error
    return jax.nn.gelu(x, approximate=name != "gelu")  # "gelu_new" and "gelu_pytorch_tanh" are the same tanh form


def mlp(params: Params, x: jax.Array, hidden_act: str, numerics: Numerics = Numerics()) -> jax.Array:
    """Two dense layers with an activation between: [..., D] -> [..., D]."""
    return dense(params["fc2"], activation(dense(params["fc1"], x, numerics), hidden_act), numerics)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B,T,D] -> [B,H,T,D/H]."""
    B, T, D = x.shape
    return x.reshape(B, T, num_heads, D // num_heads).transpose(0, 2, 1, 3)  # [B,T,H,D/H] -> [B,H,T,D/H]


def merge_heads(x: jax.Array) -> jax.Array:
    """[B,H,T,D/H] -> [B,T,D]."""
    B, H, T, D = x.shape  # D is here the width of one head
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * D)  # [B,T,H,D/H] -> [B,T,D]


def project_qkv(
    params: Params, x: jax.Array, num_heads: int, numerics: Numerics = Numerics()
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries (already scaled by 1/sqrt(D/H)), keys and values, each [B,H,T,D/H], of x [B,T,D]."""
    q = dense(params["q_proj"], x, numerics) * (x.shape[-1] // num_heads) ** -0.5  # [B,T,D]
    k = dense(params["k_proj"], x, numerics)  # [B,T,D]
    v = dense(params["v_proj"], x, numerics)  # [B,T,D]
    return split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, numerics: Numerics = Numerics()
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention, heads first. Returns ([B,H,T,D/H] output, [B,H,T,S] weights).

    q [B,H,T,D/H] scaled; k, v [B,H,S,D/H]; bias broadcastable to [B,H,T,S], added to the scores.
    The division by the softmax sum comes after the product with v: fewer elements, and no [T,S]
    array is written twice. The returned weights cost nothing under `jit` when they are not used.
    """
    scores = numerics.matmul(q, k.swapaxes(-1, -2))  # [B,H,T,S]
    if bias is not None:
        scores = scores + bias  # the same for every head, and for every image or text where its first axis is 1
    # The maximum cancels in the quotient: it keeps exp from overflowing, and needs no gradient.
    unnormalised = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))  # [B,H,T,S]
    total = unnormalised.sum(-1, keepdims=True)  # [B,H,T,1]
    return numerics.matmul(unnormalised, v) / total, unnormalised / total  # [B,H,T,D/H], [B,H,T,S]


Attend = Callable[..., tuple[jax.Array, jax.Array]]  # (q, k, v, bias, numerics) -> (mixed values [B,H,T,D/H], weights)


def block(
    params: Params,
    x: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None = None,
    numerics: Numerics = Numerics(),
    attend: Attend = attend,
) -> tuple[jax.Array, jax.Array]:
    """One pre-norm transformer block: x [B,T,D] -> ([B,T,D], what `attend` returns as weights)."""
    y = layer_norm(params["layer_norm1"], x, tower.layer_norm_eps)
    q, k, v = project_qkv(params["self_attn"], y, tower.num_attention_heads, numerics)  # [B,H,T,D/H] each
    mixed, weights = attend(q, k, v, bias, numerics)  # [B,H,T,D/H], [B,H,T,T]
    return finish_block(params, x, mixed, tower, numerics), weights


def finish_block(
    params: Params, x: jax.Array, mixed: jax.Array, tower: TextConfig | VisionConfig, numerics: Numerics = Numerics()
) -> jax.Array:
    """A block from its mixed values [B,H,T,D/H] on: output projection, residual, MLP. x [B,T,D] -> [B,T,D]."""
    x = x + dense(params["self_attn"]["out_proj"], merge_heads(mixed), numerics)  # [B,T,D]
    y = layer_norm(params["layer_norm2"], x, tower.layer_norm_eps)
    return x + mlp(params["mlp"], y, tower.hidden_act, numerics)


def last_block(
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None = None,
    numerics: Numerics = Numerics(),
    context: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """A block at one position of each sequence, the only one that is read: x [B,T,D] -> [B,D].

    positions [B]; bias [1 or B,1,T,S] or None; context: keys and values [1,H,S-T,D/H] that precede those of x.
    """
    y, own = layer_norm(params["layer_norm1"], x, tower.layer_norm_eps), params["self_attn"]
    heads = tower.num_attention_heads
    here = positions[:, None, None]  # [B,1,1]
    q = dense(own["q_proj"], jnp.take_along_axis(y, here, axis=1), numerics)  # [B,1,D]
    q = split_heads(q * (x.shape[-1] // heads) ** -0.5, heads)  # [B,H,1,D/H]
    k, v = (split_heads(dense(own[name], y, numerics), heads) for name in ("k_proj", "v_proj"))  # [B,H,T,D/H]
    k, v = (k, v) if context is None else with_context(context, k, v)  # [B,H,S,D/H]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (x.shape[0], *bias.shape[1:]))  # [B,1,T,S]: positions differ from text to text
        bias = jnp.take_along_axis(bias, here[..., None], axis=2)  # [B,1,1,S]
    mixed, _ = attend(q, k, v, bias, numerics)  # [B,H,1,D/H]
    return finish_block(params, jnp.take_along_axis(x, here, axis=1), mixed, tower, numerics)[:, 0]  # [B,D]


def with_context(context: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [C,H,M,D/H] behind those of the context [1,H,S,D/H], which every sequence shares."""
    shared_k, shared_v = (jnp.broadcast_to(shared, (k.shape[0], *shared.shape[1:])) for shared in context)
    return jnp.concatenate([shared_k, k], axis=2), jnp.concatenate([shared_v, v], axis=2)  # [C,H,S+M,D/H]


def transformer(
    params: Params,
    x: jax.Array,
    tower: TextConfig | VisionConfig,
    bias: jax.Array | None = None,
    numerics: Numerics = Numerics(),
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """All blocks of `params["encoder"]`: x [B,T,D] -> (L+1 hidden states, L attention maps)."""
    hidden, attention = [x], []
    # Unrolled: every block's output is kept, and in bfloat16 a scan took six times the temporary memory.
    for layer in layers_of(params, tower):
        x, weights = block(layer, x, tower, bias, numerics)
        hidden.append(x)
        attention.append(weights)
    return tuple(hidden), tuple(attention)


def layers_of(params: Params, tower: TextConfig | VisionConfig) -> list[Params]:
    """The blocks' parameters in their order."""
    # By number, never by sorting the keys, which are strings: "10" would come before "2".
    return [params["encoder"]["layers"][str(layer)] for layer in range(tower.num_hidden_layers)]


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A [D] parameter in float32, with as many axes as x (rank promotion is explicit throughout)."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))  # [1,...,1,D]
