"""What a solver asks of the images: value and gradient at proxies, and the curvature along a line.

Two ways to answer: `Kept` holds the logits of all images between the questions, `Recomputed` goes through the
images block by block and holds nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxzs.proxy.rows import COMPILED, Loops, Products, Reduce, Rows, prepare
from jaxzs.proxy.settings import Checked

REFRESH = 10  # kept logits are computed anew every so many steps


class Line(NamedTuple):
    """A direction D at proxies W, orthogonal to them row by row, and what is kept of both."""

    proxies: jax.Array  # [C,E] W
    direction: jax.Array  # [C,E] D
    cache: Any  # of W
    along: Any = ()  # of D


class Sweeps(Protocol):
    """The sums over images that a solver asks for. Logits are kept between them, or computed again.

    `cache` belongs to proxies W and `along` to a direction D at W; a solver only hands them on.
    """

    keeps_logits: bool
    loops: Loops

    def start(self, proxies: jax.Array) -> Any: ...

    def gradient(self, cache: Any, proxies: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sum_i logsumexp_j(x_i W_j / tau) [] and Q(W)^T X [C, E]."""
        ...

    def along(self, direction: jax.Array) -> Any: ...

    def spread(self, line: Line) -> jax.Array:
        """sum_i Var_q(x_i D_j), the variance over classes j under Q(W): []."""
        ...

    def advance(self, line: Line, proxies: jax.Array, t: jax.Array, step: jax.Array) -> Any:
        """The cache of W(t), given as `proxies`."""
        ...


def stretch(direction: jax.Array, t: jax.Array) -> jax.Array:
    """Lengths of the rows of W + t D for D orthogonal to W: [C]."""
    return jnp.sqrt(1 + jnp.square(t) * jnp.sum(jnp.square(direction), axis=-1))


def spread_sum(logits: jax.Array, along: jax.Array, mask: jax.Array, temperature: jax.Array) -> jax.Array:
    """Sum over images of the variance of `along` [N, C] under softmax(logits / tau): []."""
    q = jax.nn.softmax(logits / temperature, axis=-1)  # [N,C]
    # Centred first: in float32 the mean of squares less the square of the mean would cancel.
    centred = along - jnp.sum(q * along, axis=-1, keepdims=True)  # [N,C]
    variance = jnp.sum(q * jnp.square(centred), axis=-1)  # [N]
    return jnp.sum(jnp.where(mask, variance, jnp.float32(0)))


def gradient_sums(
    products: Products, rows: Rows, logits: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `Sweeps.gradient` is of a block with those logits [N, C]."""
    normaliser = jax.nn.logsumexp(logits / temperature, axis=-1)  # [N]
    q = jnp.exp(logits / temperature - normaliser[:, None])  # [N,C]
    q = jnp.where(rows.mask[:, None], q, jnp.float32(0))  # padding has a softmax, too
    total = jnp.sum(jnp.where(rows.mask, normaliser, jnp.float32(0)))
    return total, products.by_class(q, rows.features)  # [], [C,E]


class Kept:
    """`Sweeps` with the logits of all images in memory: two products a step."""

    keeps_logits = True
    loops = COMPILED

    def __init__(self, rows: Rows, settings: Checked):
        self.rows, self.temperature, self.products = prepare(rows), settings.temperature, settings.products
        # bfloat16 operands are rounded once, not in every product
        self.rows = self.rows._replace(features=self.rows.features.astype(self.products.dtype))

    def start(self, proxies: jax.Array) -> jax.Array:
        return self.products.logits(self.rows.features, proxies)  # [N,C]

    def gradient(self, cache: jax.Array, proxies: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gradient_sums(self.products, self.rows, cache, self.temperature)

    def along(self, direction: jax.Array) -> jax.Array:
        return self.products.logits(self.rows.features, direction)  # [N,C]

    def spread(self, line: Line) -> jax.Array:
        return spread_sum(line.cache, line.along, self.rows.mask, self.temperature)

    def advance(self, line: Line, proxies: jax.Array, t: jax.Array, step: jax.Array) -> jax.Array:
        # the products are linear in D, so logits of W(t) need no new one; rounding adds up until the next refresh
        return jax.lax.cond(
            step % REFRESH == 0,
            lambda: self.start(proxies),
            lambda: (line.cache + t * line.along) / stretch(line.direction, t)[None, :],  # [N,C]
        )


class Recomputed:
    """`Sweeps` by blocks that keep nothing: products are computed again in each evaluation."""

    keeps_logits = False

    def __init__(self, reduce: Reduce, settings: Checked):
        self.reduce, self.temperature, self.products = reduce, settings.temperature, settings.products
        self.loops = reduce.loops

    def start(self, proxies: jax.Array) -> tuple[()]:
        return ()

    def gradient(self, cache: tuple[()], proxies: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.reduce(block_gradient, proxies, self.temperature, self.products)

    def along(self, direction: jax.Array) -> tuple[()]:
        return ()

    def spread(self, line: Line) -> jax.Array:
        return self.reduce(block_spread, line.proxies, line.direction, self.temperature, self.products)

    def advance(self, line: Line, proxies: jax.Array, t: jax.Array, step: jax.Array) -> tuple[()]:
        return ()


def block_gradient(
    rows: Rows, proxies: jax.Array, temperature: jax.Array, products: Products
) -> tuple[jax.Array, jax.Array]:
    """`Sweeps.gradient` of one block."""
    return gradient_sums(products, rows, products.logits(rows.features, proxies), temperature)


def block_spread(
    rows: Rows, proxies: jax.Array, direction: jax.Array, temperature: jax.Array, products: Products
) -> jax.Array:
    """`Sweeps.spread` of one block."""
    logits = products.logits(rows.features, proxies)  # [B,C]
    return spread_sum(logits, products.logits(rows.features, direction), rows.mask, temperature)
