"""Sums over the images of a data set, whole or by blocks, on one device or on many.

Every step of proxy learning touches the images only through sums over them: column sums for Sinkhorn,
P^T X for the labels, Q^T X for a gradient. A `Reduce` computes such a sum, `reduce(function, *args)` being
the sum over blocks of `function(block, *args)`; where the rows lie is its business alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxzs.proxy import checks


class Rows(NamedTuple):
    """Images of one block: arrays that all start with the axis of images, or None where not needed."""

    mask: jax.Array  # [N] bool, False for padding
    features: Any = None  # [N, E], normalised where a function receives a block
    similarity: Any = None  # [N, C] X Z^T, where it is there already
    fold: Any = None  # [N] bool, the half a row belongs to (gamma="auto")


class Reduce(Protocol):
    """`reduce(function, *args, log=False)`: the sum of `function(rows, *args)` over all blocks of rows.

    With `log` the function returns logarithms, and the logarithm of the sum is returned.
    """

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any: ...


@dataclass(frozen=True)
class Products:
    """The two matrix products that cost all the time: their operand type and precision.

    With bfloat16 operands the products accumulate and return float32.
    """

    dtype: Any = jnp.float32
    precision: Any = jax.lax.Precision.HIGHEST

    def logits(self, features: jax.Array, proxies: jax.Array) -> jax.Array:
        """[N, E], [C, E] -> [N, C] float32."""
        return self._dot(features, proxies, "ne,ce->nc")

    def by_class(self, weights: jax.Array, features: jax.Array) -> jax.Array:
        """[N, C], [N, E] -> [C, E] float32."""
        return self._dot(weights, features, "nc,ne->ce")

    def _dot(self, a: jax.Array, b: jax.Array, equation: str) -> jax.Array:
        return jnp.einsum(
            equation,
            a.astype(self.dtype),
            b.astype(self.dtype),
            precision=self.precision if self.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )


EXACT = Products()


def normalize(x: jax.Array) -> jax.Array:
    """Rows of unit length in float32; rows of zeros stay zero."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def prepare(rows: Rows) -> Rows:
    """Normalised float32 features; whatever stands in padded rows becomes zeros."""

    def clean(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.where(rows.mask[:, None], x.astype(jnp.float32), 0.0)

    features = clean(rows.features)
    return rows._replace(features=None if features is None else normalize(features), similarity=clean(rows.similarity))


def whole(rows: Rows) -> Reduce:
    """All rows at once; where they are sharded, the compiler adds the all-reduces."""
    prepared = prepare(rows)

    def reduce(function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        return function(prepared, *args)

    return reduce


def in_blocks(rows: Rows, block_size: int, axis_name: str | None = None) -> Reduce:
    """Block after block of `block_size` rows in a compiled loop, then summed over the mesh axis, if any.

    The last block starts early enough to be full; rows counted before are masked. Nothing is copied.
    """
    num_rows = rows.mask.shape[0]
    size = min(block_size, num_rows)

    def block(i: jax.Array) -> Rows:
        start = jnp.minimum(i * size, num_rows - size)
        rows_i = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), rows)
        new = start + jnp.arange(size, dtype=start.dtype) >= i * size
        return prepare(rows_i._replace(mask=rows_i.mask & new))

    def reduce(function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        first = jnp.zeros((), jnp.int32)
        shapes = jax.eval_shape(lambda: function(block(first), *args))
        empty = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf if log else 0, s.dtype), shapes)
        add = jnp.logaddexp if log else jnp.add

        def body(i: jax.Array, total: Any) -> Any:
            return jax.tree.map(add, total, function(block(i), *args))

        total = jax.lax.fori_loop(0, -(-num_rows // size), body, empty)
        if axis_name is None:
            return total
        if log:
            return jax.tree.map(lambda x: _log_psum(x, axis_name), total)
        return jax.lax.psum(total, axis_name)

    return reduce


def _log_psum(x: jax.Array, axis_name: str) -> jax.Array:
    top = jax.lax.pmax(x, axis_name)
    return top + jnp.log(jax.lax.psum(jnp.exp(x - top), axis_name))


def block_rows(block_size: int | None, num_rows: int, num_classes: int) -> int:
    """Images in a block: as asked, or such that [block, C] holds about four million numbers."""
    if block_size is None:
        block_size = max(2**22 // num_classes, 256)
    checks.whole_number(block_size, "block_size")
    return min(block_size, num_rows)


def count(rows: Rows) -> jax.Array:
    """Number of images, padding left out: [] float32."""
    return jnp.sum(rows.mask, dtype=jnp.float32)
