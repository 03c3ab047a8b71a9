"""What a solver asks of the images: value and gradient at proxies, and the curvature along a line.

Two ways to answer: `Kept` holds the logits of all images between the questions, `Recomputed` goes through the
images block by block and holds nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxzs.proxy.rows import Products, Reduce, Rows, prepare

REFRESH = 10  # kept logits are computed anew every so many steps


class Sweeps(Protocol):
    """The sums over images that a solver asks for. Logits are kept between them, or computed again.

    `cache` belongs to proxies W and `along` to a direction D at W; a solver only hands them on.
    """

    keeps_logits: bool

    def start(self, proxies: jax.Array) -> Any: ...

    def gradient(self, cache: Any, proxies: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sum_i logsumexp_j(x_i W_j / tau) [] and Q(W)^T X [C, E]."""
        ...

    def along(self, direction: jax.Array) -> Any: ...

    def spread(self, cache: Any, along: Any, proxies: jax.Array, direction: jax.Array) -> jax.Array:
        """sum_i Var_q(x_i D_j), the variance over classes j under Q(W): []."""
        ...

    def advance(
        self, cache: Any, along: Any, proxies: jax.Array, direction: jax.Array, t: jax.Array, step: jax.Array
    ) -> Any:
        """The cache of W(t), given as `proxies`."""
        ...


def stretch(direction: jax.Array, t: jax.Array) -> jax.Array:
    """Lengths of the rows of W + t D for D orthogonal to W: [C]."""
    return jnp.sqrt(1 + jnp.square(t) * jnp.sum(jnp.square(direction), axis=-1))


def spread_sum(logits: jax.Array, along: jax.Array, mask: jax.Array, temperature: jax.Array) -> jax.Array:
    """Sum over images of the variance of `along` [N, C] under softmax(logits / tau): []."""
    q = jax.nn.softmax(logits / temperature, axis=-1)
    centred = along - jnp.sum(q * along, axis=-1, keepdims=True)
    variance = jnp.sum(q * jnp.square(centred), axis=-1)
    return jnp.sum(jnp.where(mask, variance, jnp.float32(0)))


def gradient_sums(
    products: Products, rows: Rows, logits: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    normaliser = jax.nn.logsumexp(logits / temperature, axis=-1)
    q = jnp.exp(logits / temperature - normaliser[:, None])
    q = jnp.where(rows.mask[:, None], q, jnp.float32(0))
    total = jnp.sum(jnp.where(rows.mask, normaliser, jnp.float32(0)))
    return total, products.by_class(q, rows.features)


class Kept:
    """`Sweeps` with the logits of all images in memory: two products a step."""

    keeps_logits = True

    def __init__(self, rows: Rows, temperature: jax.Array, products: Products):
        self.rows, self.temperature, self.products = prepare(rows), temperature, products
        # bfloat16 operands are rounded once, not in every product
        self.rows = self.rows._replace(features=self.rows.features.astype(products.dtype))

    def start(self, proxies: jax.Array) -> jax.Array:
        return self.products.logits(self.rows.features, proxies)

    def gradient(self, cache: jax.Array, proxies: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gradient_sums(self.products, self.rows, cache, self.temperature)

    def along(self, direction: jax.Array) -> jax.Array:
        return self.products.logits(self.rows.features, direction)

    def spread(self, cache: jax.Array, along: jax.Array, proxies: jax.Array, direction: jax.Array) -> jax.Array:
        return spread_sum(cache, along, self.rows.mask, self.temperature)

    def advance(
        self,
        cache: jax.Array,
        along: jax.Array,
        proxies: jax.Array,
        direction: jax.Array,
        t: jax.Array,
        step: jax.Array,
    ) -> jax.Array:
        return jax.lax.cond(
            step % REFRESH == 0,
            lambda: self.start(proxies),
            lambda: (cache + t * along) / stretch(direction, t)[None, :],
        )


class Recomputed:
    """`Sweeps` by blocks that keep nothing: products are computed again in each evaluation."""

    keeps_logits = False

    def __init__(self, reduce: Reduce, temperature: jax.Array, products: Products):
        self.reduce, self.temperature, self.products = reduce, temperature, products

    def start(self, proxies: jax.Array) -> tuple[()]:
        return ()

    def gradient(self, cache: tuple[()], proxies: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.reduce(self._block_gradient, proxies, self.temperature)

    def along(self, direction: jax.Array) -> tuple[()]:
        return ()

    def spread(self, cache: tuple[()], along: tuple[()], proxies: jax.Array, direction: jax.Array) -> jax.Array:
        return self.reduce(self._block_spread, proxies, direction, self.temperature)

    def advance(
        self,
        cache: tuple[()],
        along: tuple[()],
        proxies: jax.Array,
        direction: jax.Array,
        t: jax.Array,
        step: jax.Array,
    ) -> tuple[()]:
        return ()

    def _block_gradient(self, rows: Rows, proxies: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = self.products.logits(rows.features, proxies)
        return gradient_sums(self.products, rows, logits, temperature)

    def _block_spread(self, rows: Rows, proxies: jax.Array, direction: jax.Array, temperature: jax.Array) -> jax.Array:
        logits = self.products.logits(rows.features, proxies)
        along = self.products.logits(rows.features, direction)
        return spread_sum(logits, along, rows.mask, temperature)
