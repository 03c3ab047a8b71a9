"""Training prompts: one compiled program per chunk of steps, for one run or several at once.

Runs (seeds, learning rates, class splits, weights) lie along a leading axis R of everything that differs between them
and are vmapped. Batches are indices into device-resident images; short ones are padded and masked, and a step
whose batch is empty changes nothing. A chunk has a fixed number of steps, wherever epochs begin and end, so that lists
of any length, all iterations of a growing schedule and all strategies share one program.
SGD as in PyTorch: g = gradient + wd * p; m = momentum * m + g; p = p - lr * m (arXiv 2306.01669, released code).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzs import parallel
from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import logits_per_image
from jaxzs.errors import DataError, JaxzsError
from jaxzs.prompt.modality import Frozen, Modality, Prompts, class_logits
from jaxzs.prompt.objective import loss
from jaxzs.prompt.prepare import equal_batches
from jaxzs.prompt.protocol import epoch_learning_rates

Order = Callable[[int, int, int], np.ndarray]  # (run, epoch, length of its list) -> order of the list


class DivergedError(JaxzsError):
    """The loss is no longer finite. `state` is the last good one, `step` the number of steps it has seen."""

    def __init__(self, message: str, state: TrainState, step: int) -> None:
        super().__init__(message)
        self.state, self.step = state, step


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How prompts are trained; the defaults are the published ones, whatever the modality.

    learning_rate: peak, one for all runs or one for each; None takes the modality's published one.
    steps_per_chunk: steps in one compiled call; between calls losses are checked, reported and saved.

    >>> optimisation = prompt.Optimisation(epochs=50)
    >>> rates = optimisation.learning_rates(prompt.TextPrompt(), runs=1)
    >>> rates.shape, float(rates.max())
    ((50, 1), 0.1)
    """

    learning_rate: float | tuple[float, ...] | None = None
    epochs: int = 150
    warmup_epochs: int = 5
    batch_size: int = 16
    momentum: float = 0.9
    weight_decay: float = 0.1  # coupled L2, on every trained leaf
    steps_per_chunk: int = 100

    def __post_init__(self) -> None:
        if min(self.batch_size, self.steps_per_chunk, self.epochs) < 1:
            raise DataError("epochs, batch_size and steps_per_chunk must be at least 1")
        epoch_learning_rates(1.0, self.epochs, self.warmup_epochs)

    def learning_rates(self, modality: Modality, runs: int) -> np.ndarray:
        """Learning rate of every epoch and run: [epochs,R]."""
        peak = modality.learning_rate if self.learning_rate is None else self.learning_rate
        peaks = np.broadcast_to(np.asarray(peak, float), (runs,))
        rates = [epoch_learning_rates(p, self.epochs, self.warmup_epochs) for p in peaks]
        return np.stack(rates, axis=1)


class Items(NamedTuple):
    """One run's training list: rows of the images, their labels, and the group of `loss` they are in; each [n]."""

    images: np.ndarray
    labels: np.ndarray
    second: np.ndarray


class Run(NamedTuple):
    """What differs between runs and stays for a training: leaves [R] and [R,C].

    weights of the two groups of `loss`; class_mask: the classes that compete.
    """

    w_first: jax.Array
    w_second: jax.Array
    class_mask: jax.Array
    momentum: jax.Array
    weight_decay: jax.Array


class TrainState(NamedTuple):
    """What a training carries from step to step: prompts and SGD's momentum, leaves [R,...]."""

    prompts: Prompts
    optimiser: Any


class Batches(NamedTuple):
    """Steps of a chunk: [T,R,B] rows, labels, groups and mask; [T,R] learning rates."""

    images: jax.Array
    labels: jax.Array
    second: jax.Array
    mask: jax.Array
    learning_rate: jax.Array


def runs(weights: Sequence[tuple[float, float]], class_masks: np.ndarray, optimisation: Optimisation) -> Run:
    """R runs from (w_first, w_second) of each, class_masks [R,C] bool, and SGD's settings for all."""
    first, second = jnp.asarray(np.array(weights, np.float32).T)
    momentum = jnp.full(len(weights), optimisation.momentum, jnp.float32)
    decay = jnp.full(len(weights), optimisation.weight_decay, jnp.float32)
    return Run(first, second, jnp.asarray(class_masks), momentum, decay)


def start(prompts: Prompts) -> TrainState:
    """Fresh momentum for prompts with leaves [R,...]."""
    return TrainState(prompts, _sgd(0.9, 0.1).init(prompts))


def _sgd(momentum: Any, weight_decay: Any) -> optax.GradientTransformation:
    """PyTorch's SGD without its learning rate, which the schedule of epochs gives."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


def step(
    modality: Modality,
    state: TrainState,
    batch: Batches,
    run: Run,
    frozen: Frozen,
    images: jax.Array,
    config: CLIPConfig,
    numerics: Numerics = Numerics(),
) -> tuple[TrainState, jax.Array]:
    """One SGD step of one run: batch leaves [B] and a scalar learning rate -> (state, loss before the step).

    A batch without members changes nothing.
    """

    def objective(prompts: Prompts) -> jax.Array:
        logits = class_logits(modality, prompts, frozen, images[batch.images], config, numerics)
        weights = run.w_first, run.w_second
        return loss(logits, batch.labels, batch.second, weights, batch.mask, run.class_mask)

    value, gradient = jax.value_and_grad(objective)(state.prompts)
    sgd = _sgd(run.momentum, run.weight_decay)
    direction, optimiser = sgd.update(gradient, state.optimiser, state.prompts)
    update = jax.tree.map(lambda d: -batch.learning_rate * d, direction)
    new = TrainState(optax.apply_updates(state.prompts, update), optimiser)
    counts = batch.mask.any()
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, state), value


@functools.partial(jax.jit, static_argnames=("modality", "config", "numerics"))
def train_chunk(
    modality: Modality,
    state: TrainState,
    batches: Batches,
    run: Run,
    frozen: Frozen,
    images: jax.Array,
    config: CLIPConfig,
    numerics: Numerics = Numerics(),
) -> tuple[TrainState, jax.Array]:
    """All steps of a chunk for all runs: -> (state, losses [T,R] before each step, 0 where no batch was)."""
    R = batches.images.shape[1]

    def one(state: TrainState, batch: Batches, run: Run) -> tuple[TrainState, jax.Array]:
        return step(modality, state, batch, run, frozen, images, config, numerics)

    def advance(state: TrainState, batch: Batches) -> tuple[TrainState, jax.Array]:
        return jax.lax.cond(  # padding to the longest list costs nothing
            batch.mask.any(), lambda: jax.vmap(one)(state, batch, run), lambda: (state, jnp.zeros(R, jnp.float32))
        )

    return jax.lax.scan(advance, state, batches)


def steps_per_epoch(num_items: int, batch_size: int) -> int:
    """Batches of an epoch; the last, incomplete one is kept."""
    return math.ceil(num_items / batch_size)


def chunk_batches(
    items: Sequence[Items], order: Order, first_step: int, rates: np.ndarray, optimisation: Optimisation
) -> Batches:
    """Batches of the next `steps_per_chunk` steps; host arrays, empty where a run has finished.

    items: one list a run; every run goes through its own epochs, longer or shorter than another's. rates: [epochs,R].
    """
    T, B, R = optimisation.steps_per_chunk, optimisation.batch_size, len(items)
    rows, labels = np.zeros((T, R, B), np.int32), np.zeros((T, R, B), np.int32)
    second, mask = np.zeros((T, R, B), bool), np.zeros((T, R, B), bool)
    learning_rate = np.zeros((T, R), np.float32)
    for r, own in enumerate(items):
        per_epoch = steps_per_epoch(len(own.images), B)
        rows[:, r] = own.images[0]  # padding repeats one of the list: no other image is touched
        shuffled_list, of_epoch = np.zeros(0, int), -1
        for t in range(min(T, optimisation.epochs * per_epoch - first_step)):
            epoch, position = divmod(first_step + t, per_epoch)
            if epoch != of_epoch:
                shuffled_list, of_epoch = order(r, epoch, len(own.images)), epoch
            chosen = shuffled_list[position * B : (position + 1) * B]
            place = t, r, slice(len(chosen))
            rows[place], labels[place] = own.images[chosen], own.labels[chosen]
            second[place], mask[place] = own.second[chosen], True
            learning_rate[t, r] = rates[epoch, r]
    return Batches(rows, labels, second, mask, learning_rate)  # type: ignore[arg-type]


def shuffled(seed: int) -> Order:
    """The default order: a permutation for every epoch that depends on the seed and the epoch, not on the run.

    As in the released code, whose loader has its own fixed seed: runs of one list see the same batches.
    """
    return lambda run, epoch, length: np.random.default_rng((seed, epoch)).permutation(length)


def train(
    modality: Modality,
    prompts: Prompts | TrainState,
    items: Sequence[Items],
    run: Run,
    frozen: Frozen,
    images: jax.Array,
    config: CLIPConfig,
    optimisation: Optimisation = Optimisation(),
    *,
    order: Order | None = None,
    numerics: Numerics = Numerics(),
    first_step: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    on_chunk: Callable[[TrainState, int, np.ndarray], None] | None = None,
) -> tuple[TrainState, np.ndarray]:
    """Train R runs together, chunk by chunk.

    Args:
      modality: settings of the prompt.
      prompts: leaves [R,...], or the state of a training that was interrupted.
      items: one training list for each run.
      run: weights of the loss and so on, leaves [R,...] (`runs`).
      frozen: what the towers need.
      images: [N,...] on device, what `modality.constant_images` returns.
      config: of the checkpoint.
      optimisation: epochs, batch size, learning rate.
      order: order of a list in an epoch; default `shuffled(0)`.
      numerics: type and precision of the towers' products.
      first_step: steps that the given state has already seen.
      mesh: spread every batch over the axis "data"; the batch size must be a multiple of it. What is not on the mesh
        yet is copied to all its devices.
      on_chunk: called after every chunk with (state, steps done, losses [steps of the chunk,R]).

    Returns:
      (state, losses [steps taken,R], each before its step); 0 where a run with a shorter list had finished.

    Raises:
      DivergedError: a loss is not finite; says at which epoch and step, and carries the last good state.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> from jaxzs.prompt.training import Items, runs
    >>> items = Items(np.arange(30), labels, np.ones(30, bool))  # all in the second group of the loss
    >>> optimisation = prompt.Optimisation(epochs=4, warmup_epochs=1)
    >>> one_run = jax.tree.map(lambda leaf: leaf[None], modality.init(jax.random.key(0), model.config))
    >>> run = runs([(0.0, 1.0)], np.ones((1, 3), bool), optimisation)
    >>> state, losses = prompt.train(modality, one_run, [items], run, frozen, images, model.config, optimisation)
    >>> losses.shape, bool(losses[-1, 0] < losses[0, 0])
    ((8, 1), True)
    """
    state = prompts if isinstance(prompts, TrainState) else start(prompts)
    if min(len(own.images) for own in items) == 0:
        raise DataError("the training list is empty")
    rates = optimisation.learning_rates(modality, len(items))
    order = order or shuffled(0)
    place = _placer(mesh, optimisation.batch_size)
    state, run = place(state), place(run)
    frozen, images = on_mesh((frozen, images), mesh)
    history = [np.zeros((0, len(items)), np.float32)]
    total = total_steps(items, optimisation)
    for first in range(first_step, total, optimisation.steps_per_chunk):
        batches = place(chunk_batches(items, order, first, rates, optimisation))
        new, losses = train_chunk(modality, state, batches, run, frozen, images, config, numerics)
        done = min(first + optimisation.steps_per_chunk, total)
        history.append(np.asarray(losses)[: done - first])
        _check_finite(history[-1], state, items, first, optimisation.batch_size)
        state = new
        if on_chunk is not None:
            on_chunk(state, done, history[-1])
    return state, np.concatenate(history)


def total_steps(items: Sequence[Items], optimisation: Optimisation) -> int:
    """Steps of a training: those of the run with the longest list."""
    longest = max(len(own.images) for own in items)
    return optimisation.epochs * steps_per_epoch(longest, optimisation.batch_size)


def _check_finite(losses: np.ndarray, state: TrainState, items: Sequence[Items], first: int, batch_size: int) -> None:
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        t, r = bad[0]
        epoch, step = divmod(first + t, steps_per_epoch(len(items[r].images), batch_size))
        raise DivergedError(
            f"the loss of run {r} is {losses[t, r]} at step {step} of epoch {epoch}; the state after {first} steps "
            "is the last good one. A smaller learning rate helps most often.",
            state,
            first,
        )


def _placer(mesh: jax.sharding.Mesh | None, batch_size: int) -> Callable[[Any], Any]:
    """Puts arrays on the mesh: the batch axis, last of three, over "data"; everything else whole on every device."""
    if mesh is None:
        return lambda tree: jax.tree.map(jnp.asarray, tree)
    devices = mesh.shape[parallel.DATA]
    if batch_size % devices:
        raise DataError(f"batch_size {batch_size} is not a multiple of the {devices} devices")

    def spread(x: Any) -> jax.Array:
        axes = (None, None, "images")[: x.ndim]  # [T,R,B]; learning rates are [T,R]
        where = parallel.sharding(mesh, axes, x.shape)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return lambda tree: jax.tree.map(spread, tree) if isinstance(tree, Batches) else on_mesh(tree, mesh)


def on_mesh(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Arrays that are not on the mesh yet, on all its devices; without a mesh, as they are."""
    if mesh is None:
        return tree
    devices = set(mesh.devices.flat)

    def place(x: Any) -> jax.Array:
        there = isinstance(x, jax.Array) and x.sharding.device_set == devices
        return x if there else parallel.replicate(x, mesh)

    return jax.tree.map(place, tree)


# --- scoring ------------------------------------------------------------------------------------------


def score(
    modality: Modality,
    prompts: Prompts,
    frozen: Frozen,
    images: jax.Array,
    config: CLIPConfig,
    *,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
) -> np.ndarray:
    """Logits of all images under the prompts of every run: images [N,...], prompts [R,...] -> [R,N,C] float32.

    Scaled cosines, computed `batch_size` images at a time. images: as `constant_images` made them for this modality.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> prompts = modality.init(jax.random.key(0), model.config)
    >>> one_run = jax.tree.map(lambda leaf: leaf[None], prompts)
    >>> prompt.score(modality, one_run, frozen, images, model.config).shape
    (1, 30, 3)
    """
    classes = _class_features(modality, prompts, frozen, config, numerics)
    parts = [
        np.asarray(_batch_logits(modality, prompts, classes, frozen, images, rows, config, numerics))[:, :real]
        for rows, real in equal_batches(len(images), batch_size)
    ]
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnames=("modality", "config", "numerics"))
def _class_features(modality, prompts, frozen, config, numerics):
    one = lambda p: modality.class_features(p, frozen, config, numerics)  # noqa: E731
    return jax.vmap(one)(prompts)


@functools.partial(jax.jit, static_argnames=("modality", "config", "numerics"))
def _batch_logits(modality, prompts, classes, frozen, images, rows, config, numerics):
    def one(prompts, classes):
        features = modality.image_features(prompts, frozen, images[rows], config, numerics)
        return logits_per_image(features, classes, jnp.asarray(frozen.params["logit_scale"]))

    return jax.vmap(one)(prompts, classes)


def plain_logits(
    modality: Modality,
    class_features: jax.Array,
    frozen: Frozen,
    images: jax.Array,
    config: CLIPConfig,
    *,
    batch_size: int = 64,
    numerics: Numerics = Numerics(),
) -> np.ndarray:
    """Logits of all images without any prompt: images [N,...], class_features [C,E] -> [N,C] float32.

    modality, frozen, images: of one kind, as `freeze` and `constant_images` made them. This is zero-shot CLIP, which
    gives the first pseudolabels.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> prompt.plain_logits(modality, frozen.text_features, frozen, images, model.config).shape
    (30, 3)
    """
    parts = [
        np.asarray(_plain_batch(modality, class_features, frozen, images, rows, config, numerics))[:real]
        for rows, real in equal_batches(len(images), batch_size)
    ]
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("modality", "config", "numerics"))
def _plain_batch(modality, class_features, frozen, images, rows, config, numerics):
    features = modality.plain_features(frozen, images[rows], config, numerics)
    return logits_per_image(features, class_features, jnp.asarray(frozen.params["logit_scale"]))
