"""Vision proxies from pseudo labels: the reference solver and the fast one.

Both minimise the cross-entropy between labels P and Q(W) = softmax(X W^T / tau_i) over proxies W with rows of
unit length. Since rows of P sum to one it is `mean_i logsumexp_j(x_i W_j / tau_i) - <P^T X, W> / (n tau_i)`: after
P^T X is known, no solver looks at the labels again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.proxy.closed_form import LabelSums
from jaxzs.proxy.rows import EXACT, normalize
from jaxzs.proxy.sweeps import REFRESH, Sweeps, stretch

REFERENCE_ITERATIONS = 2000
LEARNING_RATE = 10.0
# One pass to start, one a step, half a pass for each refresh: at most 30 passes, or 50 where images are few.
FAST_STEPS = 28
FAST_STEPS_FEW_IMAGES = 47
ARMIJO = 1e-4

WhileLoop = Callable[[Callable[[Any], Any], Callable[[Any], Any], Any], Any]


class ProxyResult(NamedTuple):
    """What a solver returns.

    proxies [C, E] float32, unit length. objective and gradient_norm: histories, the first entry at the start,
    the last one at `proxies`; entries after an early stop repeat the last. gradient_norm is the Frobenius norm
    of the objective's gradient on the spheres. passes: pairs of [N,E]x[E,C] products it took ([] float32; the
    evaluation that ends the histories of "reference" and "closed_form" not counted).
    """

    proxies: jax.Array
    objective: jax.Array
    gradient_norm: jax.Array
    passes: jax.Array


def tangent(x: jax.Array, proxies: jax.Array) -> jax.Array:
    """Each row of x [C, E] without its part along the proxy."""
    return x - jnp.sum(x * proxies, axis=-1, keepdims=True) * proxies


def _evaluate(
    sweeps: Sweeps, cache: Any, proxies: jax.Array, sums: LabelSums, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Objective [] and its gradient [C, E], not yet projected."""
    total, predicted = sweeps.gradient(cache, proxies)
    scale = 1 / (sums.num_images * temperature)
    objective = total / sums.num_images - jnp.sum(sums.labelled * proxies) * scale
    return objective, (predicted - sums.labelled) * scale


def evaluate_at(
    sweeps: Sweeps, proxies: jax.Array, sums: LabelSums, temperature: jax.Array
) -> ProxyResult:
    """A `ProxyResult` of given proxies: histories of one entry, no passes."""
    objective, gradient = _evaluate(sweeps, sweeps.start(proxies), proxies, sums, temperature)
    norm = jnp.linalg.norm(tangent(gradient, proxies))
    return ProxyResult(proxies, objective[None], norm[None], jnp.zeros((), jnp.float32))


def reference(
    sweeps: Sweeps,
    sums: LabelSums,
    start: jax.Array,
    temperature: jax.Array,
    iterations: int = REFERENCE_ITERATIONS,
    while_loop: WhileLoop = jax.lax.while_loop,
) -> ProxyResult:
    """Gradient descent as InMaP describes it: eta = 10, halved whenever the norm of the gradient grew.

    The gradient is not projected; rows are normalised after each step.
    """
    scale = sums.num_images * temperature
    zeros = jnp.zeros((iterations,), jnp.float32)

    def running(state: Any) -> jax.Array:
        return state[0] < iterations

    def descend(state: Any) -> Any:
        i, proxies, rate, previous, objectives, norms = state
        objective, gradient = _evaluate(sweeps, sweeps.start(proxies), proxies, sums, temperature)
        norm = (
            jnp.linalg.norm(gradient) * scale
        )  # of G without 1 / (n tau), which the method compares
        rate = jnp.where(norm > previous, rate / 2, rate)
        return (
            i + 1,
            normalize(proxies - rate * gradient),
            rate,
            norm,
            objectives.at[i].set(objective),
            norms.at[i].set(jnp.linalg.norm(tangent(gradient, proxies))),
        )

    first = (
        jnp.zeros((), jnp.int32),
        start,
        jnp.float32(LEARNING_RATE),
        jnp.float32(jnp.inf),
        zeros,
        zeros,
    )
    _, proxies, _, _, objectives, norms = while_loop(running, descend, first)
    last = evaluate_at(sweeps, proxies, sums, temperature)
    return ProxyResult(
        proxies,
        jnp.concatenate([objectives, last.objective]),
        jnp.concatenate([norms, last.gradient_norm]),
        jnp.float32(iterations),
    )


class _FastState(NamedTuple):
    step: jax.Array
    done: jax.Array
    proxies: jax.Array
    cache: Any
    gradient: jax.Array  # on the spheres
    preconditioned: jax.Array
    direction: jax.Array
    trial: jax.Array  # first t of the next line search
    objective: jax.Array
    objectives: jax.Array
    norms: jax.Array
    passes: jax.Array


def fast(
    sweeps: Sweeps,
    sums: LabelSums,
    start: jax.Array,
    inverse: jax.Array,
    temperature: jax.Array,
    tolerance: jax.Array,
    steps: int | None = None,
    while_loop: WhileLoop = jax.lax.while_loop,
) -> ProxyResult:
    """Preconditioned Riemannian conjugate gradient (Polak-Ribiere+) on the product of spheres.

    `start` [C, E] is the closed form and `inverse` [E, E] its preconditioner. Stops after `steps`, or once a
    step lowers the objective by no more than `tolerance` of its value.
    """
    longest = FAST_STEPS_FEW_IMAGES if steps is None else steps
    limit = jnp.int32(longest)
    if steps is None:
        few = sums.num_images < 2 * start.shape[0]
        limit = jnp.where(few, jnp.int32(FAST_STEPS_FEW_IMAGES), jnp.int32(FAST_STEPS))

    def precondition(gradient: jax.Array, proxies: jax.Array) -> jax.Array:
        return tangent(jnp.matmul(gradient, inverse, precision=EXACT.precision), proxies)

    def running(state: _FastState) -> jax.Array:
        return (state.step < limit) & ~state.done

    def descend(state: _FastState) -> _FastState:
        step = state.step + 1
        along = sweeps.along(state.direction)
        slope = jnp.sum(state.gradient * state.direction)
        t, change, tried = _line_search(sweeps, state, along, slope, sums, temperature)

        proxies = normalize(state.proxies + t * state.direction)
        cache = sweeps.advance(state.cache, along, proxies, state.direction, t, step)
        objective, gradient = _evaluate(sweeps, cache, proxies, sums, temperature)
        gradient = tangent(gradient, proxies)
        preconditioned = precondition(gradient, proxies)

        # Polak-Ribiere+; the previous gradient and direction are carried over by projection
        old = jnp.sum(state.preconditioned * state.gradient)
        turned = jnp.sum(preconditioned * (gradient - tangent(state.gradient, proxies)))
        beta = jnp.maximum(turned / jnp.maximum(old, 1e-30), 0)
        direction = tangent(-preconditioned + beta * state.direction, proxies)
        new_slope = jnp.sum(gradient * direction)
        reset = (new_slope >= 0) | (t == 0)
        direction = jnp.where(reset, -preconditioned, direction)
        new_slope = jnp.where(reset, -jnp.sum(gradient * preconditioned), new_slope)
        trial = jnp.where(t == 0, tried / 10, t * slope / jnp.minimum(new_slope, -1e-30))

        norm = jnp.linalg.norm(gradient)
        after = jnp.arange(longest + 1) >= step
        refreshed = jnp.where((step % REFRESH == 0) & sweeps.keeps_logits, 0.5, 0.0)
        searched = 0.0 if sweeps.keeps_logits else 2.0  # two evaluations of two products each
        return _FastState(
            step=step,
            done=(t > 0) & (-change <= tolerance * jnp.abs(objective)),
            proxies=proxies,
            cache=cache,
            gradient=gradient,
            preconditioned=preconditioned,
            direction=direction,
            trial=trial,
            objective=objective,
            objectives=jnp.where(after, objective, state.objectives),
            norms=jnp.where(after, norm, state.norms),
            passes=state.passes + 1 + searched + refreshed,
        )

    cache = sweeps.start(start)
    objective, gradient = _evaluate(sweeps, cache, start, sums, temperature)
    gradient = tangent(gradient, start)
    preconditioned = precondition(gradient, start)
    rms = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(preconditioned), axis=-1)))
    first = _FastState(
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros((), bool),
        proxies=start,
        cache=cache,
        gradient=gradient,
        preconditioned=preconditioned,
        direction=-preconditioned,
        trial=0.3 / jnp.maximum(rms, 1e-30),
        objective=objective,
        objectives=jnp.full((longest + 1,), objective),
        norms=jnp.full((longest + 1,), jnp.linalg.norm(gradient)),
        passes=jnp.ones((), jnp.float32),
    )
    last = while_loop(running, descend, first)
    return ProxyResult(last.proxies, last.objectives, last.norms, last.passes)


def _line_search(
    sweeps: Sweeps,
    state: _FastState,
    along: Any,
    slope: jax.Array,
    sums: LabelSums,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The trial t, one quadratic refinement, the better one if it passes Armijo's test, else 0.

    Returns t, the change of the objective, and the smaller t that was tried.
    """
    proxies, direction = state.proxies, state.direction
    own = jnp.sum(sums.labelled * proxies, axis=-1)
    other = jnp.sum(sums.labelled * direction, axis=-1)

    def change(t: jax.Array) -> jax.Array:
        lengths = stretch(direction, t)
        # 1 / s - 1 without cancellation, s = sqrt(1 + r)
        shrink = -(jnp.square(t) * jnp.sum(jnp.square(direction), axis=-1)) / (
            lengths * (1 + lengths)
        )
        linear = jnp.sum(own * shrink + t * other / lengths) / temperature
        return (sweeps.change(state.cache, along, proxies, direction, t) - linear) / sums.num_images

    def least(t: jax.Array, value: jax.Array) -> jax.Array:
        """Minimum of the parabola through (0, 0) with this slope and (t, value)."""
        curvature = value - slope * t
        best = -slope * jnp.square(t) / (2 * jnp.maximum(curvature, 1e-30))
        return jnp.clip(best, 0.1 * t, 4 * t)

    t1 = state.trial
    change1 = change(t1)
    t2 = least(t1, change1)
    change2 = change(t2)
    better = change2 < change1
    t = jnp.where(better, t2, t1)
    value = jnp.where(better, change2, change1)
    good = value <= ARMIJO * slope * t
    zero = jnp.float32(0)
    return jnp.where(good, t, zero), jnp.where(good, value, zero), jnp.minimum(t1, t2)
