"""Training prompts: one compiled program per chunk of steps, for one run or several at once.

Runs (seeds, learning rates, class splits, weights) lie along a leading axis R of everything that differs between them
and are vmapped. Batches are indices into device-resident images; short ones are padded and masked, and a step
whose batch is empty changes nothing. A chunk has a fixed number of steps, wherever epochs begin and end, so that lists
of any length, all iterations of a growing schedule and all strategies share one program.
SGD as in PyTorch: g = gradient + wd * p; m = momentum * m + g; p = p - lr * m (arXiv 2306.01669, released code).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import parallel
from jaxzs.errors import DataError, JaxzsError
from jaxzs.prompt.modality import Frozen, Modality, Prompts, Task, check_task, class_logits
from jaxzs.prompt.objective import loss
from jaxzs.prompt.protocol import epoch_learning_rates

if TYPE_CHECKING:
    import optax

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
        sizes = self.epochs, self.warmup_epochs, self.batch_size, self.steps_per_chunk
        if any(isinstance(n, bool) or not isinstance(n, int | np.integer) for n in sizes):
            raise DataError(
                f"epochs, warmup_epochs, batch_size and steps_per_chunk are {sizes}, expected whole numbers"
            )
        if min(self.batch_size, self.steps_per_chunk, self.epochs) < 1:
            raise DataError("epochs, batch_size and steps_per_chunk must be at least 1")
        epoch_learning_rates(1.0, self.epochs, self.warmup_epochs)  # only for its check of the warm-up
        rates = np.atleast_1d(0.0 if self.learning_rate is None else self.learning_rate)
        for name, value, most in (
            ("learning_rate", rates, np.inf),
            ("momentum", self.momentum, 1),
            ("weight_decay", self.weight_decay, np.inf),
        ):
            if not (np.isrealobj(value) and np.all(np.greater_equal(value, 0)) and np.all(np.less(value, most))):
                raise DataError(f"{name} is {value}, expected finite numbers of at least 0" + ", below 1" * (most == 1))

    def learning_rates(self, modality: Modality, runs: int) -> np.ndarray:
        """Learning rate of every epoch and run: [epochs,R]."""
        peak = modality.learning_rate if self.learning_rate is None else self.learning_rate
        peaks = np.broadcast_to(np.asarray(peak, float), (runs,))  # [R]
        rates = [epoch_learning_rates(p, self.epochs, self.warmup_epochs) for p in peaks]
        return np.stack(rates, axis=1)  # [epochs,R]


class Items(NamedTuple):
    """One run's training list: rows of the images, their labels, and the group of `loss` they are in; each [n]."""

    images: np.ndarray
    labels: np.ndarray
    second: np.ndarray


class Run(NamedTuple):
    """What differs between runs and stays for a training: leaves [R] and [R,C].

    weights of the two groups of `loss`; class_mask: the classes that compete.
    """

    w_first: jax.Array  # [R]
    w_second: jax.Array  # [R]
    class_mask: jax.Array  # [R,C]
    momentum: jax.Array  # [R]
    weight_decay: jax.Array  # [R]


class TrainState(NamedTuple):
    """What a training carries from step to step: prompts and SGD's momentum, leaves [R,...]."""

    prompts: Prompts
    optimiser: Any


class Batches(NamedTuple):
    """Steps of a chunk: [T,R,B] rows, labels, groups and mask; [T,R] learning rates."""

    images: jax.Array  # [T,R,B]
    labels: jax.Array  # [T,R,B]
    second: jax.Array  # [T,R,B]
    mask: jax.Array  # [T,R,B]
    learning_rate: jax.Array  # [T,R]


def runs(weights: Sequence[tuple[float, float]], class_masks: np.ndarray, optimisation: Optimisation) -> Run:
    """R runs from (w_first, w_second) of each, class_masks [R,C] bool, and SGD's settings for all."""
    first, second = jnp.asarray(np.array(weights, np.float32).T)  # [R] each
    momentum = jnp.full(len(weights), optimisation.momentum, jnp.float32)
    decay = jnp.full(len(weights), optimisation.weight_decay, jnp.float32)
    return Run(first, second, jnp.asarray(class_masks), momentum, decay)


def start(prompts: Prompts) -> TrainState:
    """Fresh momentum for prompts with leaves [R,...]."""
    return TrainState(prompts, _sgd(0.9, 0.1).init(prompts))  # any settings: they do not enter the state


def _sgd(momentum: Any, weight_decay: Any) -> optax.GradientTransformation:
    """PyTorch's SGD without its learning rate, which the schedule of epochs gives."""
    import optax

    # PyTorch's order: decay enters the gradient before momentum, and the first momentum is the gradient itself.
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


def step(
    task: Task, state: TrainState, batch: Batches, run: Run, frozen: Frozen, images: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One SGD step of one run: batch leaves [B] and a scalar learning rate -> (state, loss before the step).

    A batch without members changes nothing.
    """
    import optax

    def objective(prompts: Prompts) -> jax.Array:
        logits = class_logits(task, prompts, frozen, images[batch.images])  # [B,C]
        weights = run.w_first, run.w_second
        return loss(logits, batch.labels, batch.second, weights, batch.mask, run.class_mask)

    value, gradient = jax.value_and_grad(objective)(state.prompts)
    sgd = _sgd(run.momentum, run.weight_decay)
    direction, optimiser = sgd.update(gradient, state.optimiser, state.prompts)  # m <- mu m + (g + wd p)
    # The rate multiplies behind the momentum, as in PyTorch: a rate that falls acts on all that was gathered.
    update = jax.tree.map(lambda d: -batch.learning_rate * d, direction)
    new = TrainState(optax.apply_updates(state.prompts, update), optimiser)
    counts = batch.mask.any()
    # A run that has finished waits, momentum included: on an empty batch weight decay would still move it.
    return jax.tree.map(lambda a, b: jnp.where(counts, a, b), new, state), value


@jax.jit
def train_chunk(
    task: Task, state: TrainState, batches: Batches, run: Run, frozen: Frozen, images: jax.Array
) -> tuple[TrainState, jax.Array]:
    """All steps of a chunk for all runs: -> (state, losses [T,R] before each step, 0 where no batch was)."""
    R = batches.images.shape[1]

    def one(state: TrainState, batch: Batches, run: Run) -> tuple[TrainState, jax.Array]:
        return step(task, state, batch, run, frozen, images)

    def advance(state: TrainState, batch: Batches) -> tuple[TrainState, jax.Array]:
        return jax.lax.cond(  # padding to the longest list costs nothing
            batch.mask.any(), lambda: jax.vmap(one)(state, batch, run), lambda: (state, jnp.zeros(R, jnp.float32))
        )

    return jax.lax.scan(advance, state, batches)  # losses [T,R]


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
            epoch, position = divmod(first_step + t, per_epoch)  # a chunk may begin anywhere in an epoch
            # A function of run and epoch: who goes on within an epoch finds its order again, without any state of it.
            if epoch != of_epoch:
                shuffled_list, of_epoch = order(r, epoch, len(own.images)), epoch
            # The last batch of an epoch may be short; the rest stays masked.
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


class Training(NamedTuple):
    """All that a training of R runs reads and never changes.

    items: one list for each run. run: weights of the loss and so on, leaves [R,...] (`runs`). frozen: what the towers
    need. images: [N,...] on device, what `constant_images` returns. order: of a list in an epoch. mesh: every batch is
    spread over its axis "data", of which the batch size must be a multiple; what is not on the mesh yet is copied to
    all its devices.
    """

    task: Task
    items: Sequence[Items]
    run: Run
    frozen: Frozen
    images: jax.Array
    optimisation: Optimisation = Optimisation()
    order: Order = shuffled(0)
    mesh: jax.sharding.Mesh | None = None


def train(training: Training, prompts: Prompts | TrainState) -> tuple[TrainState, np.ndarray]:
    """Train R runs together: all chunks of steps, one after the other.

    Args:
      training: lists of the runs, loss, optimisation.
      prompts: leaves [R,...].

    Returns:
      (state, losses [steps,R], each before its step); 0 where a run with a shorter list had finished.

    Raises:
      DivergedError: a loss is not finite; says at which epoch and step, and carries the last good state.
      DataError: an empty list, a batch size that the mesh does not divide.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> from jaxzs.prompt.training import Items, Training, runs
    >>> items = Items(np.arange(30), labels, np.ones(30, bool))  # all in the second group of the loss
    >>> optimisation = prompt.Optimisation(epochs=4, warmup_epochs=1)
    >>> one_run = jax.tree.map(lambda leaf: leaf[None], modality.init(jax.random.key(0), model.config))
    >>> run = runs([(0.0, 1.0)], np.ones((1, 3), bool), optimisation)
    >>> task = prompt.Task(modality, model.config)
    >>> state, losses = prompt.train(Training(task, [items], run, frozen, images, optimisation), one_run)
    >>> losses.shape, bool(losses[-1, 0] < losses[0, 0])
    ((8, 1), True)
    """
    check_training(training)
    training = placed(training)
    state = on_mesh(prompts if isinstance(prompts, TrainState) else start(prompts), training.mesh)
    losses = np.zeros((0, len(training.items)), np.float32)
    while len(losses) < total_steps(training):
        state, own = advance(training, state, len(losses))
        losses = np.concatenate([losses, own])  # [t,R]
    return state, losses


def advance(training: Training, state: TrainState, done: int) -> tuple[TrainState, np.ndarray]:
    """The chunk of steps that follows the first `done` ones: (state, losses [its steps,R]).

    A training is this, again and again, from wherever it was left. training: `placed`.
    """
    optimisation, items = training.optimisation, training.items
    rates = optimisation.learning_rates(training.task.modality, len(items))
    batches = _spread(chunk_batches(items, training.order, done, rates, optimisation), training.mesh)
    new, losses = train_chunk(training.task, state, batches, training.run, training.frozen, training.images)
    own = np.asarray(losses)[: total_steps(training) - done]  # the last chunk is filled up with empty steps
    _check_finite(own, state, training, done)  # the state before them is the last good one
    return new, own


def check_training(training: Training) -> None:
    """`DataError` for an empty list, or a batch size that the mesh does not divide."""
    check_task(training.task)
    if min(len(own.images) for own in training.items) == 0:
        raise DataError("the training list is empty")
    size, mesh = training.optimisation.batch_size, training.mesh
    if mesh is not None and size % mesh.shape[parallel.DATA]:
        raise DataError(f"batch_size {size} is not a multiple of the {mesh.shape[parallel.DATA]} devices")


def placed(training: Training) -> Training:
    """The same with all arrays on the devices of its mesh."""
    run, frozen, images = on_mesh((training.run, training.frozen, training.images), training.mesh)
    return training._replace(run=run, frozen=frozen, images=images)


def total_steps(training: Training) -> int:
    """Steps of a training: those of the run with the longest list."""
    longest = max(len(own.images) for own in training.items)
    return training.optimisation.epochs * steps_per_epoch(longest, training.optimisation.batch_size)


def _check_finite(losses: np.ndarray, state: TrainState, training: Training, first: int) -> None:
    bad = np.argwhere(~np.isfinite(losses))  # [n,2]: steps and runs
    if len(bad):
        t, r = bad[0]
        # By the run's own list: with lists of different lengths, runs are in different epochs at one step.
        per_epoch = steps_per_epoch(len(training.items[r].images), training.optimisation.batch_size)
        epoch, step = divmod(first + t, per_epoch)
        raise DivergedError(
            f"the loss of run {r} is {losses[t, r]} at step {step} of epoch {epoch}; the state after {first} steps "
            "is the last good one. A smaller learning rate helps most often.",
            state,
            first,
        )


def _spread(batches: Batches, mesh: jax.sharding.Mesh | None) -> Batches:
    """Batches on the mesh: their images, last of three axes, over "data"; learning rates [T,R] whole everywhere."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, batches)

    def place(x: np.ndarray) -> jax.Array:
        where = parallel.sharding(mesh, (None, None, "images")[: x.ndim], x.shape)
        # Each process fills its own devices.
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(place, batches)


def on_mesh(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Arrays that are not on the mesh yet, on all its devices; without a mesh, on the default one."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    devices = set(mesh.devices.flat)

    def place(x: Any) -> jax.Array:
        there = isinstance(x, jax.Array) and x.sharding.device_set == devices
        return x if there else parallel.replicate(x, mesh)

    return jax.tree.map(place, tree)
