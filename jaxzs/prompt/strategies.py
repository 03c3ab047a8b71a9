"""FPL, IFPL and GRIP (arXiv 2306.01669): select pseudolabels, train on them, and again with the tuned model.

FPL selects once with zero-shot CLIP and trains once. IFPL repeats with the same K, GRIP with a growing one, until
nearly the whole pool is used, the same number for every class. "labelled" trains on labels alone (CoOp, VPT, UPT).
Several runs (seeds, class splits) are trained together, see `training`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import parallel
from jaxzs.errors import DataError, renamed
from jaxzs.prompt import resuming
from jaxzs.prompt.evaluation import evaluate
from jaxzs.prompt.modality import Frozen, Prompts, Task, check_task
from jaxzs.prompt.objective import Convention, Strategy, balance_weights
from jaxzs.prompt.prepare import Pool
from jaxzs.prompt.protocol import Split, check_labels, schedule, split_pseudolabels
from jaxzs.prompt.resuming import FitState, Progress, Rate, Record, Selection
from jaxzs.prompt.scoring import plain_logits, score
from jaxzs.prompt.selection import Rule, select_pseudolabels, select_top_k
from jaxzs.prompt.training import (
    Items,
    Optimisation,
    Training,
    check_training,
    on_mesh,
    placed,
    runs,
    start,
    steps_per_epoch,
    total_steps,
)  # fmt: skip
from jaxzs.prompt.training import advance as advance_training

Reinit = Literal["official", "warm", "fresh"]
Order = Callable[[int, int, int, int], np.ndarray]  # (iteration, run, epoch, length) -> order


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done, with the published defaults.

    strategy: "labelled", "fpl", "ifpl" or "grip". k: pseudolabels per class (FPL, IFPL). iterations: of IFPL, GRIP.
    balance: weights of the two groups, see `balance_weights`. reinit: where an iteration after the first starts:
    "official" as the authors' code on an accelerator (text: where the last one ended; image: from the same initial
    prompts; joint: its tokens where they ended, its maps anew), "warm" where the last one ended, "fresh" anew.
    selection: "boards" as the authors' code, or the true "top_k". loader_seed: of the order of batches. seeds: one for
    each run, or one for all; they decide the initial prompts only.

    >>> plan = prompt.Plan("ifpl", k=8, iterations=5, optimisation=prompt.Optimisation(epochs=50))
    >>> plan.k, plan.balance, plan.optimisation.batch_size
    (8, 'code', 16)
    >>> prompt.Plan(selection="best")
    Traceback (most recent call last):
    jaxzs.errors.DataError: selection is 'best', expected one of boards, top_k
    """

    strategy: Strategy = "grip"
    k: int = 16
    iterations: int = 10
    balance: Convention = "code"
    reinit: Reinit = "official"
    selection: Rule = "boards"
    loader_seed: int = 0
    seeds: Sequence[int] = (1,)  # published: 1 to 5
    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("reinit", self.reinit, ("official", "warm", "fresh")),
            ("selection", self.selection, ("boards", "top_k")),
        ):
            if value not in choices:
                raise DataError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Running:
    """Where a fit runs, what it starts from, and what is called on the way.

    mesh: every batch is spread over its axis "data"; what is not on the mesh yet is copied to all its devices.
    resume: file that the state is written to after every chunk of steps, atomically; if it is there already, the fit
    goes on from it. initial: start prompts with leaves [R,...], instead of drawn ones. order: of the training list in
    an epoch, (iteration, run, epoch, length) -> [length]; by default `plan.loader_seed`, iteration and epoch decide.
    on_progress, on_record: called after every chunk of steps, and after every iteration.

    >>> running = prompt.Running(resume="fit.safetensors", on_record=lambda record: print(record.loss))
    >>> running.mesh is None
    True
    """

    mesh: jax.sharding.Mesh | None = None
    resume: str | Path | None = None
    initial: Prompts | None = None
    order: Order | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_record: Callable[[Record], None] | None = None


class Fit(NamedTuple):
    """Result: prompts with leaves [R,...], a record for every iteration, the selection each was trained on."""

    prompts: Prompts
    records: list[Record]
    selections: list[Selection]


@renamed(
    labels="prompt.Pool(images, labels)",
    seeds="prompt.Plan(seeds=...)",
    numerics="prompt.Task(modality, config, numerics)",
    mesh="prompt.Running(mesh=...)",
    resume="prompt.Running(resume=...)",
    initial="prompt.Running(initial=...)",
    order="prompt.Running(order=...)",
    on_progress="prompt.Running(on_progress=...)",
    on_record="prompt.Running(on_record=...)",
)
def fit(
    task: Task,
    frozen: Frozen,
    pool: Pool,
    splits: Sequence[Split],
    plan: Plan = Plan(),
    running: Running = Running(),
    *,
    test: Pool | None = None,
) -> Fit:
    """Tune prompts, R runs together: a fold of `advance` over the state of the fit.

    Args:
      task: modality, configuration of the checkpoint, numerics.
      frozen: of `freeze`, made for this modality.
      pool: the training pool, what `read_source` returns, or `Pool(constant_images(...), labels)`. Labels are needed
        for labelled rows, elsewhere only for the record; -1: not known.
      splits: one for each run, or one for all.
      plan: strategy, settings, and the seeds of the runs.
      running: mesh, file to resume from, callbacks.
      test: evaluated after every iteration.

    Returns:
      `Fit`; prompts are those of the last epoch, as in the authors' code (validation is not used).

    Raises:
      DataError: K = 0, a missing split, a file to resume from of another fit, lists that do not fit.
      LabelError: labels of labelled rows outside of the classes.
      DivergedError: a loss is not finite; the file to resume from holds the last good state.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> pool = prompt.read_source(model, modality, source)
    >>> split = prompt.ul_split(len(pool.images), len(source.label_names))
    >>> plan = prompt.Plan("grip", iterations=2, optimisation=prompt.Optimisation(epochs=4, warmup_epochs=1))
    >>> tuned = prompt.fit(prompt.Task(modality, model.config), frozen, pool, [split], plan)
    >>> [record.k for record in tuned.records], tuned.prompts["prefix"].shape  # one run
    ([[5], [10]], (1, 4, 64))
    """
    check_task(task)
    job = _job(task, frozen, pool, splits, plan, running, test)
    keep, state = _begun(job, running)
    rate = Rate(job.iterations)
    while state.iteration < job.iterations:
        before, state = state, advance(job, state)
        finished = len(state.records) > len(before.records)
        if finished:
            record = dataclasses.replace(state.records[-1], seconds=round(rate.seconds, 3))
            state = state._replace(records=[*before.records, record])
        # Kept before anybody is told: who stops the run in a callback finds this step on disk.
        keep(state)
        if finished and running.on_record is not None:
            running.on_record(record)
        if not finished and running.on_progress is not None:
            running.on_progress(rate.progress(state, total_steps(_training(job, state))))
    return Fit(state.train.prompts, state.records, state.selections)


class _Job(NamedTuple):
    """What does not change during a fit; one split, schedule and seed for each of the R runs."""

    task: Task
    frozen: Frozen
    pool: Pool
    test: Pool | None
    splits: list[Split]
    ks: list[list[int]]
    seeds: list[int]
    plan: Plan
    running: Running

    @property
    def iterations(self) -> int:
        return len(self.ks[0])


def _job(
    task: Task, frozen: Frozen, pool: Pool, splits: Sequence[Split], plan: Plan, running: Running, test: Pool | None
) -> _Job:
    """The fit with its arrays on the devices, its runs side by side."""
    splits, seeds = _broadcast(splits, plan.seeds)
    labels = _known_labels(pool[1], len(pool[0]), splits)
    ks = [schedule(plan.strategy, split, plan.k, plan.iterations) for split in splits]
    frozen, images = on_mesh((frozen, pool[0]), running.mesh)
    if test is not None:
        test = Pool(on_mesh(test[0], running.mesh), test[1])
    return _Job(task, frozen, Pool(images, labels), test, splits, ks, seeds, plan, running)


def _begun(job: _Job, running: Running) -> tuple[Callable[[FitState], None], FitState]:
    """How a state is kept, and the one to go on from."""
    prompts = _draw(job, 0) if running.initial is None else running.initial
    prompts = on_mesh(prompts, running.mesh)
    # Arrays do not change in place here: `initial` stays what the first iteration started from.
    fresh = FitState(0, np.zeros((0, len(job.seeds)), np.float32), prompts, start(prompts), [], [])
    if running.resume is None:
        return lambda state: None, fresh._replace(selections=_first_selections(job))
    path = running.resume
    identity = resuming.identify(job.task, job.splits, job.plan, job.frozen, job.pool.images)
    # Looked for before anything is scored: a fit that goes on does not repeat the zero-shot pass.
    found = resuming.read_state(path, identity, len(job.seeds), fresh)
    _check_all_found(path, found)
    state = fresh._replace(selections=_first_selections(job)) if found is None else found
    keep = lambda state: resuming.write_state(path, identity, state)  # noqa: E731
    return keep, state._replace(train=on_mesh(state.train, running.mesh))


def _check_all_found(path: str | Path, found: FitState | None) -> None:
    """`DataError` unless every process goes on from the same place: the first one writes, all of them read."""
    own = (-1, 0) if found is None else (found.iteration, len(found.losses))
    if not parallel.same_everywhere(np.array(own)):
        raise DataError(f"the processes do not all see the same {path}; it must lie in a folder that all of them share")


def advance(job: _Job, state: FitState) -> FitState:
    """A step of a fit: the next chunk of steps of an iteration, or after its last one what ends the iteration."""
    training = _training(job, state)
    if len(state.losses) < total_steps(training):
        train_state, losses = advance_training(training, state.train, len(state.losses))
        return state._replace(train=train_state, losses=np.concatenate([state.losses, losses]))  # [t,R]
    return _next_iteration(job, state._replace(records=[*state.records, _record(job, state)]))


def _record(job: _Job, state: FitState) -> Record:
    ks = [own[state.iteration] for own in job.ks]
    # Those that are trained on: with K of 10 or more a drawn 80 % of the selected.
    kept = [len(split_pseudolabels(*selected, k)[0]) for selected, k in zip(state.selections, ks, strict=True)]
    accuracies = [_accuracy_of(selected, job.pool.labels) for selected in state.selections]
    sizes = [n + len(split.labelled) for n, split in zip(kept, job.splits, strict=True)]
    loss = [_last_epoch(own, n, job.plan) for own, n in zip(state.losses.T, sizes, strict=True)]
    results = None
    if job.test is not None:
        logits = score(job.task, state.train.prompts, job.frozen, job.test.images)  # [R,N,C]
        results = [
            evaluate(own.argmax(1), job.test.labels, split.seen if split.paradigm == "trzsl" else None)
            for own, split in zip(logits, job.splits, strict=True)
        ]
    return Record(state.iteration + 1, ks, kept, accuracies, loss, results)


def _next_iteration(job: _Job, state: FitState) -> FitState:
    """New pseudolabels by the tuned model, and where the next iteration starts.

    After the last one nothing: the released code selects once more and does not use it.
    """
    iteration, last = state.iteration + 1, state.train.prompts
    if iteration == job.iterations:
        return state._replace(iteration=iteration)
    # The whole pool at once for all runs; which rows may be chosen differs between their splits.
    logits = score(job.task, last, job.frozen, job.pool.images)  # [R,N,C]
    selections = [
        select_for(own, split, ks[iteration], job.plan.selection)
        for own, split, ks in zip(logits, job.splits, job.ks, strict=True)
    ]
    # Momentum and schedule always start anew; the plan chooses only where the prompts do.
    train = start(on_mesh(_restarted(job, iteration, state.initial, last), job.running.mesh))
    return state._replace(iteration=iteration, losses=state.losses[:0], train=train, selections=selections)


# --- the steps of an iteration ------------------------------------------------------------------------


def select_for(logits: np.ndarray, split: Split, k: int, rule: Rule = "boards") -> Selection:
    """Pseudolabels of a split's unlabelled images: logits [N,C] of the whole pool -> (rows, classes).

    Probabilities are a softmax over the candidate classes only.
    """
    own = logits[np.ix_(split.unlabelled, split.candidates)]  # [unlabelled,candidates]
    probabilities = np.asarray(jax.nn.softmax(own, axis=1))
    select = select_top_k if rule == "top_k" else select_pseudolabels
    positions, boards = select(probabilities, k)
    return split.unlabelled[positions], split.candidates[boards]  # rows of the pool, classes of the data set


def _first_selections(job: _Job) -> list[Selection]:
    """By zero-shot CLIP; nothing for labels alone."""
    if job.plan.strategy == "labelled":
        return [(np.zeros(0, np.int64), np.zeros(0, np.int64)) for _ in job.splits]
    logits = plain_logits(job.task, job.frozen.pseudolabel_features, job.frozen, job.pool.images)  # [N,C]
    return [select_for(logits, split, ks[0], job.plan.selection) for split, ks in zip(job.splits, job.ks, strict=True)]


def _training(job: _Job, state: FitState) -> Training:
    """The training of the current iteration: pseudolabelled items in drawn order, then the labelled ones.

    The weights of the two groups depend on their numbers.
    """
    items, weights, plan, iteration = [], [], job.plan, state.iteration
    for selected, split, ks in zip(state.selections, job.splits, job.ks, strict=True):
        rows, pseudo = split_pseudolabels(*selected, ks[iteration])
        labels = np.concatenate([pseudo, job.pool.labels[split.labelled]])  # [n], pseudolabels first
        if split.paradigm == "trzsl":  # groups by class: a pseudolabel is always one of the unseen
            second = np.isin(labels, split.candidates)
        else:
            second = np.arange(len(labels)) < len(rows)  # pseudolabelled items come first
        items.append(Items(np.concatenate([rows, split.labelled]), labels, second))
        sizes = len(split.labelled), len(rows)
        weights.append(balance_weights(split.paradigm, plan.strategy, job.task.modality.name, *sizes, plan.balance))
    masks = np.stack([_competing(split, plan.strategy) for split in job.splits])  # [R,C]
    run = runs(weights, masks, plan.optimisation)
    training = Training(
        job.task, items, run, job.frozen, job.pool.images, plan.optimisation, _order(job, iteration), job.running.mesh
    )
    check_training(training)
    return placed(training)


def _order(job: _Job, iteration: int) -> Callable[[int, int, int], np.ndarray]:
    """Order of a list in an epoch of this iteration."""
    if job.running.order is not None:
        return functools.partial(job.running.order, iteration)
    seed = job.plan.loader_seed
    # Without the run, as released, whose loader has one seed: runs differ by their prompts alone.
    return lambda run, epoch, length: np.random.default_rng((seed, iteration, epoch)).permutation(length)


def _competing(split: Split, strategy: Strategy) -> np.ndarray:
    """[C] bool: all classes compete, except that TRZSL from labels alone knows only the seen ones."""
    if strategy == "labelled" and split.paradigm == "trzsl":
        return np.isin(np.arange(split.num_classes), split.seen)
    return np.ones(split.num_classes, bool)


def _restarted(job: _Job, iteration: int, initial: Prompts, last: Prompts) -> Prompts:
    if job.plan.reinit == "warm":
        return last
    if job.plan.reinit == "fresh":
        return _draw(job, iteration)
    # "official": each modality knows what the released code does.
    keys = jnp.stack([_key(seed, iteration) for seed in job.seeds])
    modality, config = job.task.modality, job.task.config
    restart = lambda key, *prompts: modality.restart(key, config, *prompts)  # noqa: E731
    return jax.vmap(restart)(keys, initial, last)  # leaves [R,...]


def _draw(job: _Job, iteration: int) -> Prompts:
    """Prompts with leaves [R,...] that depend on each run's seed and the iteration only."""
    keys = jnp.stack([_key(seed, iteration) for seed in job.seeds])
    return jax.vmap(lambda key: job.task.modality.init(key, job.task.config))(keys)


def _key(seed: int, iteration: int) -> jax.Array:
    # Not split among the runs: the draw of one seed is the same, whichever other runs there are.
    return jax.random.fold_in(jax.random.key(seed), iteration)


def _accuracy_of(selected: Selection, labels: np.ndarray) -> float | None:
    rows, pseudo = selected
    known = labels[rows] >= 0
    return float((labels[rows][known] == pseudo[known]).mean()) if known.any() else None


def _last_epoch(losses: np.ndarray, length: int, plan: Plan) -> float:
    """Mean loss of one run's last epoch: losses [steps of the longest run], the length of its own list."""
    per_epoch = steps_per_epoch(length, plan.optimisation.batch_size)
    end = plan.optimisation.epochs * per_epoch  # of this run: behind it a shorter list has zeros
    return float(losses[end - per_epoch : end].mean())


# --- checks and sizes -------------------------------------------------------------------------------------


def _broadcast(splits: Sequence[Split], seeds: Sequence[int]) -> tuple[list[Split], list[int]]:
    splits, seeds = list(splits), [int(seed) for seed in seeds]
    R = max(len(splits), len(seeds))
    if not splits or not seeds:
        raise DataError("fit needs a split and a seed")
    paradigms = sorted({split.paradigm for split in splits})
    if len(paradigms) > 1:
        raise DataError(f"runs of different paradigms cannot be trained together: {paradigms}")
    if len(splits) not in (1, R) or len(seeds) not in (1, R):
        raise DataError(f"{len(splits)} splits and {len(seeds)} seeds: give one of either, or as many")
    return splits * (R // len(splits)), seeds * (R // len(seeds))


def _known_labels(labels: np.ndarray | None, count: int, splits: Sequence[Split]) -> np.ndarray:
    """Labels [N] with -1 for unknown ones; those of labelled rows must be classes."""
    values = np.full(count, -1, np.int64) if labels is None else np.asarray(labels)
    if values.shape != (count,):
        raise DataError(f"{values.shape} labels for {count} images")
    for split in splits:
        if max((int(rows.max()) for rows in (split.labelled, split.unlabelled) if len(rows)), default=0) >= count:
            raise DataError(f"the split names rows beyond the {count} images")
        check_labels(values[split.labelled], split.num_classes)
    return values.astype(np.int64)
