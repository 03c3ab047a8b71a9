"""Vision proxies from pseudo labels: the reference solver and the fast one.

Both minimise the cross-entropy between labels P and Q(W) = softmax(X W^T / tau_i) over proxies W with rows of
unit length. Since rows of P sum to one it is `mean_i logsumexp_j(x_i W_j / tau_i) - <P^T X, W> / (n tau_i)`: after
P^T X is known, no solver looks at the labels again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxzs.errors import ConfigError
from jaxzs.proxy.closed_form import LabelSums, closed_form, precondition
from jaxzs.proxy.rows import EXACT, normalize
from jaxzs.proxy.settings import Checked
from jaxzs.proxy.sweeps import REFRESH, Line, Sweeps, stretch

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
    return x - jnp.sum(x * proxies, axis=-1, keepdims=True) * proxies  # [C,E]


@jax.jit
def _cross_entropy(
    sums_over_images: tuple[jax.Array, jax.Array], proxies: jax.Array, sums: LabelSums, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Objective [] and its gradient [C, E], not yet projected, from `Sweeps.gradient`."""
    total, predicted = sums_over_images
    scale = 1 / (sums.num_images * temperature)
    # rows of P sum to 1: the labels enter by P^T X alone
    objective = total / sums.num_images - jnp.sum(sums.labelled * proxies) * scale
    return objective, (predicted - sums.labelled) * scale  # [C,E] (Q - P)^T X / (n tau)


def solve(sweeps: Sweeps, sums: LabelSums, text: jax.Array | None, settings: Checked) -> ProxyResult:
    """Proxies of the labels whose sums are given; "reference" starts from `text` [C, E]."""
    if settings.solver == "reference":
        assert text is not None
        return reference(sweeps, sums, normalize(text), settings)
    inverse = precondition(sums, settings.ridge)  # [E,E]
    proxies = closed_form(sums, inverse)  # [C,E]
    if settings.solver == "closed_form":
        return evaluate_at(sweeps, proxies, sums, settings.temperature)
    return fast(sweeps, sums, proxies, inverse, settings)


def evaluate_at(sweeps: Sweeps, proxies: jax.Array, sums: LabelSums, temperature: jax.Array) -> ProxyResult:
    """A `ProxyResult` of given proxies: histories of one entry, no passes."""
    found = sweeps.gradient(sweeps.start(proxies), proxies)
    objective, gradient = _cross_entropy(found, proxies, sums, temperature)
    norm = jnp.linalg.norm(tangent(gradient, proxies))
    return ProxyResult(proxies, objective[None], norm[None], jnp.zeros((), jnp.float32))


class _Descent(NamedTuple):
    """State of "reference"."""

    proxies: jax.Array  # [C,E]
    rate: jax.Array  # [] eta
    norm: jax.Array  # [] of the last gradient
    objectives: jax.Array  # [iterations]
    norms: jax.Array  # [iterations] on the spheres


def reference(sweeps: Sweeps, sums: LabelSums, start: jax.Array, settings: Checked) -> ProxyResult:
    """Gradient descent as InMaP describes it: eta = 10, halved whenever the norm of the gradient grew.

    The gradient is not projected; rows are normalised after each step.
    """
    steps = REFERENCE_ITERATIONS if settings.iterations is None else settings.iterations

    def descend(i: jax.Array, state: _Descent) -> _Descent:
        found = sweeps.gradient(sweeps.start(state.proxies), state.proxies)
        return _descend(i, state, found, sums, settings.temperature)

    nothing = jnp.zeros((steps,), jnp.float32)
    # A norm of infinity: the first iteration has none to compare with, and never halves.
    first = _Descent(start, jnp.float32(LEARNING_RATE), jnp.float32(jnp.inf), nothing, nothing)
    descent = sweeps.loops.fori_loop(0, steps, descend, first)
    last = evaluate_at(sweeps, descent.proxies, sums, settings.temperature)
    return ProxyResult(
        descent.proxies,
        jnp.concatenate([descent.objectives, last.objective]),
        jnp.concatenate([descent.norms, last.gradient_norm]),
        jnp.float32(steps),
    )


@jax.jit
def _descend(
    i: jax.Array, state: _Descent, found: tuple[jax.Array, jax.Array], sums: LabelSums, temperature: jax.Array
) -> _Descent:
    """One step of "reference" from the sums that it found at its proxies."""
    objective, gradient = _cross_entropy(found, state.proxies, sums, temperature)
    norm = jnp.linalg.norm(gradient)
    # the paper's test looks at the gradient before projection, which does not vanish at the minimum: eta collapses
    rate = jnp.where(norm > state.norm, state.rate / 2, state.rate)
    return _Descent(
        normalize(state.proxies - rate * gradient),
        rate,
        norm,
        state.objectives.at[i].set(objective),
        state.norms.at[i].set(jnp.linalg.norm(tangent(gradient, state.proxies))),
    )


class _Point(NamedTuple):
    """Proxies on the spheres and what is known there."""

    proxies: jax.Array  # [C,E]
    cache: Any  # of the sweeps
    objective: jax.Array  # []
    radial: jax.Array  # [C] the part of the gradient along each proxy
    gradient: jax.Array  # [C,E] the part on the spheres
    preconditioned: jax.Array  # [C,E]


class _FastState(NamedTuple):
    """State of "fast"."""

    step: jax.Array
    done: jax.Array
    point: _Point
    direction: jax.Array  # [C,E]
    damping: jax.Array  # of the next step: 1, less after a step that failed
    objectives: jax.Array  # [longest + 1]
    norms: jax.Array  # [longest + 1]
    passes: jax.Array


class _Given(NamedTuple):
    """What stays as it is while "fast" runs."""

    sums: LabelSums
    inverse: jax.Array  # [E,E] the preconditioner
    temperature: jax.Array
    tolerance: jax.Array

    @property
    def noise(self) -> jax.Array:
        """Rounding of an objective made of logits up to 1 / tau, and of its gradient (Q - P)^T X / (n tau)."""
        return jnp.finfo(jnp.float32).eps / self.temperature


def fast(sweeps: Sweeps, sums: LabelSums, start: jax.Array, inverse: jax.Array, settings: Checked) -> ProxyResult:
    """Preconditioned Riemannian conjugate gradient (Polak-Ribiere+) on the product of spheres.

    `start` [C, E] is the closed form and `inverse` [E, E] its preconditioner. Each step goes to the minimum of
    the second-order model along its direction, at most LONGEST_STEP far. The model's curvature is a sum of
    variances, which rounding does not touch; differences of objectives, on which line searches usually rest,
    drown in it after ten steps and make equal runs part: so would the Armijo condition. A step is kept by the slope at
    its end (the approximate Wolfe condition of Hager and Zhang 2005, equation 4.1 there), as long as the objective does
    not rise by more than rounding; else it is taken back and damped. Equal runs on any number of devices thus take
    equal decisions. Stops after `iterations`, once the gradient is no longer than its own rounding errors, or
    once a step gains no more than `tolerance` of the objective, if that is above 0.
    """
    given = _without_derivative(_Given(sums, inverse, settings.temperature, settings.tolerance))
    limit = _limit(sums, start.shape[0], settings.iterations)
    longest = FAST_STEPS_FEW_IMAGES if settings.iterations is None else settings.iterations

    def at(proxies: jax.Array, cache: Any) -> _Point:
        return _point(sweeps.gradient(cache, proxies), proxies, cache, given)

    def running(state: _FastState) -> jax.Array:
        return (state.step < limit) & ~state.done

    def descend(state: _FastState) -> _FastState:
        old = state.point
        line = Line(old.proxies, state.direction, old.cache, sweeps.along(state.direction))
        t, proxies = _move(state, sweeps.spread(line), given)
        new = at(proxies, sweeps.advance(line, proxies, t, state.step + 1))
        state = state._replace(passes=state.passes + _passes_of_step(sweeps, state.step + 1))
        return _judge(state, new, t, given)

    first = at(start, sweeps.start(start))
    last = sweeps.loops.while_loop(running, descend, _first_state(first, longest, given))
    return ProxyResult(last.point.proxies, last.objectives, last.norms, last.passes)


@jax.custom_jvp
def _without_derivative(x: Any) -> Any:
    """x as it is; a derivative of it is a named error.

    Reverse derivatives of a loop that stops by itself do not exist. Forward ones do, but conjugate gradient amplifies
    rounding in them without bound (30 times too large after 28 steps of 96 images). Those of the minimum are another
    function's: where the solver stops, features still move proxies otherwise than at the minimum.
    """
    return x


@_without_derivative.defjvp
def _refuse(*_: Any) -> Any:
    raise ConfigError(
        'the solver "fast" has no derivative; take proxy.Settings(solver="closed_form"), which has one, or hold its '
        "arguments with jax.lax.stop_gradient"
    )


def _limit(sums: LabelSums, num_classes: int, iterations: int | None) -> jax.Array:
    """Steps that "fast" may take: as asked, or more of them where there are few images."""
    if iterations is not None:
        return jnp.int32(iterations)
    few = sums.num_images < 2 * num_classes
    return jnp.where(few, jnp.int32(FAST_STEPS_FEW_IMAGES), jnp.int32(FAST_STEPS))


@jax.jit
def _point(found: tuple[jax.Array, jax.Array], proxies: jax.Array, cache: Any, given: _Given) -> _Point:
    """All that is known at proxies, from the sums found there."""
    objective, gradient = _cross_entropy(found, proxies, given.sums, given.temperature)
    radial = jnp.sum(gradient * proxies, axis=-1)  # [C]
    gradient = tangent(gradient, proxies)
    preconditioned = jnp.matmul(gradient, given.inverse, precision=EXACT.precision)  # [C,E]
    return _Point(proxies, cache, objective, radial, gradient, tangent(preconditioned, proxies))


@partial(jax.jit, static_argnames="longest")
def _first_state(point: _Point, longest: int, given: _Given) -> _FastState:
    norm = jnp.linalg.norm(point.gradient)
    return _FastState(
        step=jnp.zeros((), jnp.int32),
        done=norm <= given.noise,
        point=point,
        direction=-point.preconditioned,
        damping=jnp.ones((), jnp.float32),
        objectives=jnp.full((longest + 1,), point.objective),
        norms=jnp.full((longest + 1,), norm),
        passes=jnp.ones((), jnp.float32),
    )


@jax.jit
def _move(state: _FastState, variance: jax.Array, given: _Given) -> tuple[jax.Array, jax.Array]:
    """Length t of the step [] and the proxies rownorm(W + t D) [C, E] at its end."""
    t = state.damping * _newton_step(state.point, state.direction, variance, given)  # []
    return t, normalize(state.point.proxies + t * state.direction)


def _newton_step(point: _Point, direction: jax.Array, variance: jax.Array, given: _Given) -> jax.Array:
    """-slope / curvature of t -> objective(rownorm(W + t D)) at 0, for D orthogonal to W: []."""
    squared = jnp.sum(jnp.square(direction), axis=-1)  # [C] |D_j|^2
    # the second term comes from the spheres: rownorm bends W + t D back by t^2 |D_j|^2 / 2
    curvature = variance / given.sums.num_images / given.temperature / given.temperature
    curvature = curvature - jnp.sum(squared * point.radial)
    furthest = LONGEST_STEP / jnp.maximum(jnp.sqrt(jnp.mean(squared)), 1e-30)
    newton = -jnp.sum(point.gradient * direction) / jnp.maximum(curvature, 1e-30)
    return jnp.where(curvature > 0, jnp.minimum(newton, furthest), furthest)


@jax.jit
def _judge(state: _FastState, new: _Point, t: jax.Array, given: _Given) -> _FastState:
    """The state after a step of length t to `new`: kept, or taken back and damped."""
    step, old, direction = state.step + 1, state.point, state.direction
    slope = jnp.sum(old.gradient * direction)  # [] downhill: below 0
    gain = old.objective - new.objective
    # rownorm(W + t D) moves by D / stretch and along the proxies; of the latter the gradient here has no part.
    slope_there = jnp.sum(new.gradient * direction / stretch(direction, t)[:, None])
    accepted = (slope_there <= -SLOPE_LEFT * slope) & (gain >= -10 * given.noise)
    damped = jnp.clip(slope / (slope - jnp.maximum(slope_there, 0)), 0.1, 0.5)  # secant

    # where and not cond: under vmap each problem decides for itself
    point = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
    norm = jnp.linalg.norm(point.gradient)
    stalled = (given.tolerance > 0) & accepted & (gain <= given.tolerance * jnp.abs(new.objective))
    after = jnp.arange(len(state.norms)) >= step  # an early stop repeats its last entry
    return state._replace(
        step=step,
        done=stalled | (norm <= given.noise),
        point=point,
        direction=jnp.where(accepted, _conjugate(old, new, direction), direction),
        damping=jnp.where(accepted, jnp.float32(1), state.damping * damped),
        objectives=jnp.where(after, point.objective, state.objectives),
        norms=jnp.where(after, norm, state.norms),
    )


def _conjugate(old: _Point, new: _Point, direction: jax.Array) -> jax.Array:
    """Polak-Ribiere+; the old gradient and direction are carried over by projection: [C, E]."""
    # Polak-Ribiere's inner products are those of the preconditioned metric
    turned = jnp.sum(new.preconditioned * (new.gradient - tangent(old.gradient, new.proxies)))
    beta = turned / jnp.maximum(jnp.sum(old.preconditioned * old.gradient), 1e-30)
    steepest = -new.preconditioned
    # + : a negative beta starts anew, as does a direction that points uphill (below)
    conjugate = steepest + jnp.maximum(beta, 0) * tangent(direction, new.proxies)
    return jnp.where(jnp.sum(new.gradient * conjugate) < 0, conjugate, steepest)


def _passes_of_step(sweeps: Sweeps, step: jax.Array) -> jax.Array:
    """X D^T and Q^T X, X W^T when refreshed; by blocks X W^T, X D^T, X W(t)^T and Q^T X."""
    if not sweeps.keeps_logits:
        return jnp.float32(2)
    return jnp.where(step % REFRESH == 0, jnp.float32(1.5), jnp.float32(1))
