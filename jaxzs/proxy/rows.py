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
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Rows(NamedTuple):
    """Images of one block: arrays that all start with the axis of images, or None where not needed."""

    mask: jax.Array  # [N] bool, False for padding
    features: Any = None  # [N,E], normalised where a function receives a block
    similarity: Any = None  # [N,C] X Z^T, where it is there already
    fold: Any = None  # [N,S] bool, the half a row belongs to in each split (gamma="auto")


class Loops(NamedTuple):
    """How steps that ask for sums are repeated and chosen: as the functions of `jax.lax` of these names do."""

    while_loop: Callable[..., Any] = jax.lax.while_loop
    fori_loop: Callable[..., Any] = jax.lax.fori_loop
    cond: Callable[..., Any] = jax.lax.cond  # of branches without arguments; one of the two runs, under vmap both


COMPILED = Loops()


class Reduce(Protocol):
    """`reduce(function, *args, log=False)`: the sum of `function(rows, *args)` over all blocks of rows.

    With `log` the function returns logarithms, and the logarithm of the sum is returned. `function` is one of a
    module, so that programs made of it are found again.
    """

    @property
    def loops(self) -> Loops: ...

    @property
    def num_images(self) -> jax.Array:
        """Padding left out: [] float32. Takes no pass."""
        ...

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any: ...


FLOAT32 = np.dtype(np.float32)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Products:
    """The two matrix products that cost all the time: their operand type and precision.

    With bfloat16 operands the products accumulate and return float32.
    """

    dtype: np.dtype = FLOAT32
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
            precision=self.precision if self.dtype == jnp.float32 else None,  # 16 bits are multiplied exactly
            preferred_element_type=jnp.float32,
        )


EXACT = Products()


def normalize(x: jax.Array) -> jax.Array:
    """Rows of unit length in float32; rows of zeros stay zero."""
    x = x.astype(jnp.float32)
    # squares of very long or short rows leave float32: brought near 1 first, which changes no direction
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)  # [.,1]
    x = x / jax.lax.stop_gradient(jnp.where(largest < jnp.finfo(jnp.float32).tiny, jnp.float32(1), largest))
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)  # [.,1], 1 to E, or 0
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def prepare(rows: Rows) -> Rows:
    """Normalised float32 features; whatever stands in padded rows becomes zeros."""

    def clean(x: jax.Array | None) -> jax.Array | None:
        # NaN in padding would get through a product with 0.
        return None if x is None else jnp.where(rows.mask[:, None], x.astype(jnp.float32), 0.0)

    features = clean(rows.features)
    return rows._replace(features=None if features is None else normalize(features), similarity=clean(rows.similarity))


@dataclass(frozen=True)
class Whole:
    """All rows at once; where they are sharded, the compiler adds the all-reduces."""

    rows: Rows  # prepared
    loops: Loops = COMPILED

    @property
    def num_images(self) -> jax.Array:
        return count(self.rows)

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        return function(self.rows, *args)


@dataclass(frozen=True)
class Blocks:
    """Block after block of `block_size` rows in a compiled loop, then summed over the mesh axes, if any.

    The last block starts early enough to be full; rows counted before are masked. Nothing is copied.
    """

    rows: Rows
    block_size: int
    axes: Any = None
    loops: Loops = COMPILED

    @property
    def num_images(self) -> jax.Array:
        number = count(self.rows)
        return number if self.axes is None else jax.lax.psum(number, self.axes)

    def block(self, i: jax.Array) -> Rows:
        num_rows, size = self.rows.mask.shape[0], self.block_size
        start = jnp.minimum(i * size, num_rows - size)  # of the last block: earlier, so that it is full
        rows = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), self.rows)
        new = start + jnp.arange(size, dtype=start.dtype) >= i * size  # [B] not in the block before
        return prepare(rows._replace(mask=rows.mask & new))

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        first = jnp.zeros((), jnp.int32)
        # The loop needs a total of the right shapes before its first block; nothing is computed for it.
        shapes = jax.eval_shape(lambda: function(self.block(first), *args))
        empty = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf if log else 0, s.dtype), shapes)
        add = jnp.logaddexp if log else jnp.add

        def body(i: jax.Array, total: Any) -> Any:
            return jax.tree.map(add, total, function(self.block(i), *args))

        # bounds known when compiling, so that the loop has a reverse derivative
        num_blocks = -(-self.rows.mask.shape[0] // self.block_size)
        total = jax.lax.fori_loop(0, num_blocks, body, empty)
        if self.axes is None:
            return total
        return jax.tree.map(lambda x: _log_psum(x, self.axes), total) if log else jax.lax.psum(total, self.axes)


def _log_psum(x: jax.Array, axes: Any) -> jax.Array:
    top = jax.lax.pmax(jax.lax.stop_gradient(x), axes)  # any constant is right, so it needs no derivative
    return top + jnp.log(jax.lax.psum(jnp.exp(x - top), axes))


class Counted:
    """A `Reduce` that counts: `passes` [] float32 are the sums that were asked for, in loops as often as they ran.

    A pass reads the features of all images once. What is counted is what runs, not what a formula says of it.
    """

    def __init__(self, reduce: Reduce):
        self.reduce = reduce
        self.passes = jnp.zeros((), jnp.float32)
        self.loops = Loops(self._while, self._for, self._cond)

    @property
    def num_images(self) -> jax.Array:
        return self.reduce.num_images

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        self.passes = self.passes + 1
        return self.reduce(function, *args, log=log)

    # The count is part of the state of a loop: a compiled one traces its step once, however often it runs.

    def _while(self, running: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
        def counted(carried: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            state, self.passes = carried
            state = step(state)
            return state, self.passes

        first = state, self.passes
        state, self.passes = self.reduce.loops.while_loop(lambda carried: running(carried[0]), counted, first)
        return state

    def _for(self, start: Any, end: Any, step: Callable[[Any, Any], Any], state: Any) -> Any:
        def counted(i: Any, carried: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            state, self.passes = carried
            state = step(i, state)
            return state, self.passes

        state, self.passes = self.reduce.loops.fori_loop(start, end, counted, (state, self.passes))
        return state

    def _cond(self, first: Any, function: Callable[[], Any], other: Callable[[], Any]) -> Any:
        before = self.passes

        def counted(branch: Callable[[], Any]) -> tuple[Any, jax.Array]:
            self.passes = before
            found = branch()
            return found, self.passes

        found, self.passes = self.reduce.loops.cond(first, lambda: counted(function), lambda: counted(other))
        return found


def where_rows_lie(function: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
    """`function(rows, *args)` run on the devices over which rows are spread, each with its part; sums end in a psum."""
    if sharding is None:
        return function

    def spread(rows: Rows, *args: Any) -> Any:
        specs = (P(sharding.spec[0]), *[P()] * len(args))  # all but the rows is on every device
        # check_vma: results are equal on all devices, since every sum over rows ends in a psum
        return jax.shard_map(function, mesh=sharding.mesh, in_specs=specs, out_specs=P(), check_vma=False)(rows, *args)

    return spread


def count(rows: Rows) -> jax.Array:
    """Number of images, padding left out: [] float32."""
    return jnp.sum(rows.mask, dtype=jnp.float32)
