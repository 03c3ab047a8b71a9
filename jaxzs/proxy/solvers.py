"""Vision proxies from pseudo labels: the reference solver and the fast one.

Both minimise the cross-entropy between labels P and Q(W) = softmax(X W^T / tau_i) over proxies W with rows of
unit length. Since rows of P sum to one it is `mean_i logsumexp_j(x_i W_j / tau_i) - <P^T X, W> / (n tau_i)`: after
P^T X is known, no solver looks at the labels again.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, closed_form, precondition
from jaxzs.proxy.rows import EXACT, normalize
from jaxzs.proxy.sweeps import REFRESH, Sweeps, stretch

Solver = Literal["fast", "reference", "closed_form"]
REFERENCE_ITERATIONS = 2000
LEARNING_RATE = 10.0
# One pass to start, one a step, half a pass for each refresh: at most 30 passes, or 50 where images are few.
FAST_STEPS = 28
FAST_STEPS_FEW_IMAGES = 47
LONGEST_STEP = 0.3  # root mean square of the proxies' moves in one step
SLOPE_LEFT = 1 - 2e-4  # of the slope at the start that may point uphill at the end of a step


class ProxyResult(NamedTuple):
    """What a solver returns.

    proxies: [C,E] float32, unit length.
    objective: its history, the first entry at the start, the last one at `proxies`; entries after an early stop repeat
    the last.
    gradient_norm: history of the Frobenius norm of the objective's gradient on the spheres.
    passes: [] float32, pairs of [N,E] x [E,C] products it took; the evaluation that ends the histories of "reference"
    and "closed_form" is not counted.
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


def solve(
    sweeps: Sweeps,
    sums: LabelSums,
    text: jax.Array,
    temperature: jax.Array,
    ridge: jax.Array,
    tolerance: jax.Array,
    solver: Solver,
    iterations: int | None,
) -> ProxyResult:
    """Proxies of the labels whose sums are given, by one of the solvers; "reference" starts from `text` [C, E]."""
    if solver == "reference":
        steps = REFERENCE_ITERATIONS if iterations is None else iterations
        return reference(sweeps, sums, normalize(text), temperature, steps)
    inverse = precondition(sums, ridge)
    proxies = closed_form(sums, inverse)
    if solver == "closed_form":
        return evaluate_at(sweeps, proxies, sums, temperature)
    return fast(sweeps, sums, proxies, inverse, temperature, tolerance, iterations)


def check_options(temperature: Any, confidence: Any, solver: str, iterations: int | None, ridge: float) -> None:
    """Raise `ConfigError` unless these are options of `solve`."""
    checks.positive(temperature, "temperature")
    checks.between(confidence, "confidence", 0, 1)
    checks.positive(ridge, "ridge")
    if solver not in get_args(Solver):
        raise ConfigError(f"solver is {solver!r}; expected one of {', '.join(get_args(Solver))}")
    if iterations is not None:
        checks.whole_number(iterations, "iterations")


def evaluate_at(sweeps: Sweeps, proxies: jax.Array, sums: LabelSums, temperature: jax.Array) -> ProxyResult:
    """A `ProxyResult` of given proxies: histories of one entry, no passes."""
    objective, gradient = _evaluate(sweeps, sweeps.start(proxies), proxies, sums, temperature)
    norm = jnp.linalg.norm(tangent(gradient, proxies))
    return ProxyResult(proxies, objective[None], norm[None], jnp.zeros((), jnp.float32))


def reference(
    sweeps: Sweeps, sums: LabelSums, start: jax.Array, temperature: jax.Array, iterations: int = REFERENCE_ITERATIONS
) -> ProxyResult:
    """Gradient descent as InMaP describes it: eta = 10, halved whenever the norm of the gradient grew.

    The gradient is not projected; rows are normalised after each step.
    """

    def descend(state: tuple[jax.Array, ...], _: None) -> tuple[Any, Any]:
        proxies, rate, previous = state
        objective, gradient = _evaluate(sweeps, sweeps.start(proxies), proxies, sums, temperature)
        norm = jnp.linalg.norm(gradient)
        rate = jnp.where(norm > previous, rate / 2, rate)
        on_spheres = jnp.linalg.norm(tangent(gradient, proxies))
        return (normalize(proxies - rate * gradient), rate, norm), (objective, on_spheres)

    first = (start, jnp.float32(LEARNING_RATE), jnp.float32(jnp.inf))
    (proxies, _, _), (objectives, norms) = jax.lax.scan(descend, first, length=iterations)
    last = evaluate_at(sweeps, proxies, sums, temperature)
    return ProxyResult(
        proxies,
        jnp.concatenate([objectives, last.objective]),
        jnp.concatenate([norms, last.gradient_norm]),
        jnp.float32(iterations),
    )


class _Point(NamedTuple):
    """Proxies on the spheres and what is known there."""

    proxies: jax.Array  # [C, E]
    cache: Any  # of the sweeps
    objective: jax.Array  # []
    radial: jax.Array  # [C] the part of the gradient along each proxy
    gradient: jax.Array  # [C, E] the part on the spheres
    preconditioned: jax.Array  # [C, E]


class _FastState(NamedTuple):
    step: jax.Array
    done: jax.Array
    point: _Point
    direction: jax.Array  # [C, E]
    damping: jax.Array  # of the next step: 1, less after a step that failed
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
) -> ProxyResult:
    """Preconditioned Riemannian conjugate gradient (Polak-Ribiere+) on the product of spheres.

    `start` [C, E] is the closed form and `inverse` [E, E] its preconditioner. Each step goes to the minimum of
    the second-order model along its direction, at most LONGEST_STEP far. The model's curvature is a sum of
    variances, which rounding does not touch; differences of objectives, on which line searches usually rest,
    drown in it after ten steps and make equal runs part: so would the Armijo condition. A step is kept by the slope at
    its end (the approximate Wolfe condition of Hager and Zhang 2005, equation 4.1 there), as long as the objective does
    not rise by more than rounding; else it is taken back and damped. Equal runs on any number of devices thus take
    equal decisions. Stops after `steps`, once the gradient is no longer than its own rounding errors, or
    once a step gains no more than `tolerance` of the objective, if that is above 0.
    """
    longest = FAST_STEPS_FEW_IMAGES if steps is None else steps
    limit = jnp.int32(longest)
    if steps is None:
        few = sums.num_images < 2 * start.shape[0]
        limit = jnp.where(few, jnp.int32(FAST_STEPS_FEW_IMAGES), jnp.int32(FAST_STEPS))
    # rounding of an objective made of logits up to 1 / tau, and of its gradient (Q - P)^T X / (n tau)
    noise = jnp.finfo(jnp.float32).eps / temperature

    def at(proxies: jax.Array, cache: Any) -> _Point:
        objective, gradient = _evaluate(sweeps, cache, proxies, sums, temperature)
        radial = jnp.sum(gradient * proxies, axis=-1)
        gradient = tangent(gradient, proxies)
        preconditioned = jnp.matmul(gradient, inverse, precision=EXACT.precision)
        return _Point(proxies, cache, objective, radial, gradient, tangent(preconditioned, proxies))

    def running(state: _FastState) -> jax.Array:
        return (state.step < limit) & ~state.done

    def descend(state: _FastState) -> _FastState:
        step, old, direction = state.step + 1, state.point, state.direction
        along = sweeps.along(direction)
        slope = jnp.sum(old.gradient * direction)
        t = state.damping * _newton_step(sweeps, old, direction, along, slope, sums, temperature)

        proxies = normalize(old.proxies + t * direction)
        new = at(proxies, sweeps.advance(old.cache, along, proxies, direction, t, step))
        gain = old.objective - new.objective
        slope_there = jnp.sum(new.gradient * direction / stretch(direction, t)[:, None])
        accepted = (slope_there <= -SLOPE_LEFT * slope) & (gain >= -10 * noise)
        damped = jnp.clip(slope / (slope - jnp.maximum(slope_there, 0)), 0.1, 0.5)  # secant

        point = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        norm = jnp.linalg.norm(point.gradient)
        stalled = (tolerance > 0) & accepted & (gain <= tolerance * jnp.abs(new.objective))
        after = jnp.arange(longest + 1) >= step
        return _FastState(
            step=step,
            done=stalled | (norm <= noise),
            point=point,
            direction=jnp.where(accepted, _conjugate(old, new, direction), direction),
            damping=jnp.where(accepted, jnp.float32(1), state.damping * damped),
            objectives=jnp.where(after, point.objective, state.objectives),
            norms=jnp.where(after, norm, state.norms),
            passes=state.passes + _passes_of_step(sweeps, step),
        )

    first = at(start, sweeps.start(start))
    norm = jnp.linalg.norm(first.gradient)
    last = jax.lax.while_loop(
        running,
        descend,
        _FastState(
            step=jnp.zeros((), jnp.int32),
            done=norm <= noise,
            point=first,
            direction=-first.preconditioned,
            damping=jnp.ones((), jnp.float32),
            objectives=jnp.full((longest + 1,), first.objective),
            norms=jnp.full((longest + 1,), norm),
            passes=jnp.ones((), jnp.float32),
        ),
    )
    return ProxyResult(last.point.proxies, last.objectives, last.norms, last.passes)


def _newton_step(
    sweeps: Sweeps,
    point: _Point,
    direction: jax.Array,
    along: Any,
    slope: jax.Array,
    sums: LabelSums,
    temperature: jax.Array,
) -> jax.Array:
    """-slope / curvature of t -> objective(rownorm(W + t D)) at 0, for D orthogonal to W: []."""
    squared = jnp.sum(jnp.square(direction), axis=-1)
    variance = sweeps.spread(point.cache, along, point.proxies, direction)
    # the second term comes from the spheres: rownorm bends W + t D back by t^2 |D_j|^2 / 2
    curvature = variance / (sums.num_images * jnp.square(temperature)) - jnp.sum(squared * point.radial)
    furthest = LONGEST_STEP / jnp.maximum(jnp.sqrt(jnp.mean(squared)), 1e-30)
    newton = -slope / jnp.maximum(curvature, 1e-30)
    return jnp.where(curvature > 0, jnp.minimum(newton, furthest), furthest)


def _conjugate(old: _Point, new: _Point, direction: jax.Array) -> jax.Array:
    """Polak-Ribiere+; the old gradient and direction are carried over by projection: [C, E]."""
    turned = jnp.sum(new.preconditioned * (new.gradient - tangent(old.gradient, new.proxies)))
    beta = turned / jnp.maximum(jnp.sum(old.preconditioned * old.gradient), 1e-30)
    steepest = -new.preconditioned
    conjugate = steepest + jnp.maximum(beta, 0) * tangent(direction, new.proxies)
    return jnp.where(jnp.sum(new.gradient * conjugate) < 0, conjugate, steepest)


def _passes_of_step(sweeps: Sweeps, step: jax.Array) -> jax.Array:
    """X D^T and Q^T X, X W^T when refreshed; by blocks X W^T, X D^T, X W(t)^T and Q^T X."""
    if not sweeps.keeps_logits:
        return jnp.float32(2)
    return jnp.where(step % REFRESH == 0, jnp.float32(1.5), jnp.float32(1))
