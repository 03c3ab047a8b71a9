"""FPL, IFPL and GRIP (arXiv 2306.01669): select pseudolabels, train on them, and again with the tuned model.

FPL selects once with zero-shot CLIP and trains once. IFPL repeats with the same K, GRIP with a growing one, until
nearly the whole pool is used, the same number for every class. "labelled" trains on labels alone (CoOp, VPT, UPT).
Several runs (seeds, class splits) are trained together, see `training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics
from jaxzs.errors import DataError
from jaxzs.prompt import resuming
from jaxzs.prompt.evaluation import evaluate
from jaxzs.prompt.modality import Frozen, Modality, Prompts
from jaxzs.prompt.objective import Convention, Strategy, balance_weights
from jaxzs.prompt.protocol import Split, check_labels, schedule, split_pseudolabels
from jaxzs.prompt.resuming import FitState, Progress, Rate, Record, Selection
from jaxzs.prompt.selection import Rule, select_pseudolabels, select_top_k
from jaxzs.prompt.training import (
    Items,
    Optimisation,
    Run,
    TrainState,
    on_mesh,
    plain_logits,
    runs,
    score,
    start,
    steps_per_epoch,
    total_steps,
    train,
)

Reinit = Literal["official", "warm", "fresh"]
Order = Callable[[int, int, int, int], np.ndarray]  # (iteration, run, epoch, length) -> order


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done, with the published defaults.

    strategy: "labelled", "fpl", "ifpl" or "grip". k: pseudolabels per class (FPL, IFPL). iterations: of IFPL, GRIP.
    balance: weights of the two groups, see `balance_weights`. reinit: where an iteration after the first starts:
    "official" as the authors' code on an accelerator (text: where the last one ended; image: from the same initial
    prompts; joint: its tokens where they ended, its maps anew), "warm" where the last one ended, "fresh" anew.
    selection: "boards" as the authors' code, or the true "top_k". loader_seed: of the order of batches.

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
    optimisation: Optimisation = dataclasses.field(default_factory=Optimisation)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("reinit", self.reinit, ("official", "warm", "fresh")),
            ("selection", self.selection, ("boards", "top_k")),
        ):
            if value not in choices:
                raise DataError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


class Fit(NamedTuple):
    """Result: prompts with leaves [R,...], a record for every iteration, the selection each was trained on."""

    prompts: Prompts
    records: list[Record]
    selections: list[Selection]


def fit(
    modality: Modality,
    frozen: Frozen,
    images: jax.Array,
    splits: Sequence[Split],
    config: CLIPConfig,
    plan: Plan = Plan(),
    *,
    labels: np.ndarray | None = None,
    seeds: Sequence[int] = (1,),
    test: tuple[jax.Array, np.ndarray] | None = None,
    initial: Prompts | None = None,
    order: Order | None = None,
    numerics: Numerics = Numerics(),
    mesh: jax.sharding.Mesh | None = None,
    resume: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Fit:
    """Tune prompts, R runs together.

    Args:
      modality: `TextPrompt`, `VisualPrompt` or `JointPrompt`.
      frozen: of `prepare.freeze`, made for this modality.
      images: [N,...] the training pool, what `prepare.constant_images` or `prepare.read_source` returns.
      splits: one for each run, or one for all.
      config: of the checkpoint.
      plan: strategy and settings.
      labels: [N] true labels; needed for labelled rows, elsewhere only for the record. -1: not known.
      seeds: one for each run, or one for all; decides the initial prompts only.
      test: (images [M,...], labels [M]) evaluated after every iteration.
      initial: start prompts with leaves [R,...], instead of drawn ones.
      order: of the training list in an epoch; default depends on `plan.loader_seed`, iteration and epoch.
      numerics: type and precision of the towers' products.
      mesh: spread every batch over the axis "data"; what is not on the mesh yet is copied to all its devices.
      resume: file that the state is written to after every chunk of steps, atomically; if it is there already, the
        fit goes on from it.
      on_progress: called after every chunk of steps.
      on_record: called after every iteration.

    Returns:
      `Fit`; prompts are those of the last epoch, as in the authors' code (validation is not used).

    Raises:
      DataError: K = 0, a missing split, `resume` of another fit, lists that do not fit.
      LabelError: labels of labelled rows outside of the classes.
      DivergedError: a loss is not finite; `resume` holds the last good state.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> split = prompt.ul_split(len(images), len(source.label_names))
    >>> plan = prompt.Plan("grip", iterations=2, optimisation=prompt.Optimisation(epochs=4, warmup_epochs=1))
    >>> tuned = prompt.fit(modality, frozen, images, [split], model.config, plan, labels=labels)
    >>> [record.k for record in tuned.records], tuned.prompts["prefix"].shape  # one run
    ([[5], [10]], (1, 4, 64))
    """
    splits, seeds = _broadcast(splits, seeds)
    labels = _known_labels(labels, len(images), splits)
    ks = [schedule(plan.strategy, split, plan.k, plan.iterations) for split in splits]
    frozen, images = on_mesh((frozen, images), mesh)
    if test is not None:
        test = on_mesh(test[0], mesh), test[1]
    job = _Job(modality, frozen, images, splits, ks, labels, seeds, config, plan, numerics, mesh)
    identity = resuming.identify(modality, splits, seeds, plan, frozen, images)
    state = None if resume is None else resuming.read_state(resume, identity)
    if state is None:
        prompts = _draw(job, 0) if initial is None else initial
        none = np.zeros((0, len(seeds)), np.float32)
        state = FitState(0, none, prompts, start(prompts), _first_selections(job), [])
    rate = Rate(len(ks[0]))

    def after_chunk(steps: int) -> None:
        if resume is not None:
            resuming.write_state(resume, identity, state)
        if on_progress is not None:
            on_progress(rate.progress(state, steps))

    while state.iteration < len(ks[0]):
        _train_iteration(job, state, order, after_chunk)
        state.records.append(_record(job, state, test, rate.seconds))
        if on_record is not None:
            on_record(state.records[-1])
        _prepare_next(job, state)
        if resume is not None:
            resuming.write_state(resume, identity, state)
    return Fit(state.train.prompts, state.records, state.selections)


class _Job(NamedTuple):
    """What does not change during a fit; one split, schedule and seed for each of the R runs."""

    modality: Modality
    frozen: Frozen
    images: jax.Array
    splits: list[Split]
    ks: list[list[int]]
    labels: np.ndarray
    seeds: list[int]
    config: CLIPConfig
    plan: Plan
    numerics: Numerics
    mesh: jax.sharding.Mesh | None


def _train_iteration(job: _Job, state: FitState, order: Order | None, after_chunk: Callable[[int], None]) -> None:
    """All steps of the current iteration that are still to be done; `state` follows."""
    items, run = _training_lists(job, state)
    iteration, plan = state.iteration, job.plan
    steps = total_steps(items, plan.optimisation)

    def on_chunk(train_state: TrainState, done: int, losses: np.ndarray) -> None:
        state.train, state.losses = train_state, np.concatenate([state.losses, losses])
        after_chunk(steps)

    def own_order(run: int, epoch: int, length: int) -> np.ndarray:
        if order is not None:
            return order(iteration, run, epoch, length)
        return np.random.default_rng((plan.loader_seed, iteration, epoch)).permutation(length)

    train(
        job.modality,
        state.train,
        items,
        run,
        job.frozen,
        job.images,
        job.config,
        plan.optimisation,
        order=own_order,
        numerics=job.numerics,
        first_step=len(state.losses),
        mesh=job.mesh,
        on_chunk=on_chunk,
    )


def _record(job: _Job, state: FitState, test: tuple[jax.Array, np.ndarray] | None, seconds: float) -> Record:
    ks = [own[state.iteration] for own in job.ks]
    kept = [len(split_pseudolabels(*selected, k)[0]) for selected, k in zip(state.selections, ks, strict=True)]
    accuracies = [_accuracy_of(selected, job.labels) for selected in state.selections]
    sizes = [n + len(split.labelled) for n, split in zip(kept, job.splits, strict=True)]
    loss = [_last_epoch(own, n, job.plan) for own, n in zip(state.losses.T, sizes, strict=True)]
    results = None
    if test is not None:
        logits = _score(job, state.train.prompts, test[0])
        results = [
            evaluate(own.argmax(1), test[1], split.seen if split.paradigm == "trzsl" else None)
            for own, split in zip(logits, job.splits, strict=True)
        ]
    return Record(state.iteration + 1, ks, kept, accuracies, loss, results, round(seconds, 3))


def _prepare_next(job: _Job, state: FitState) -> None:
    """New pseudolabels by the tuned model, and where the next iteration starts.

    After the last one nothing: the released code selects once more and does not use it.
    """
    state.iteration += 1
    if state.iteration == len(job.ks[0]):
        return
    last = state.train.prompts
    logits = _score(job, last, job.images)
    state.selections = [
        select_for(own, split, ks[state.iteration], job.plan.selection)
        for own, split, ks in zip(logits, job.splits, job.ks, strict=True)
    ]
    state.train = start(_restarted(job, state.iteration, state.initial, last))
    state.losses = state.losses[:0]


def _score(job: _Job, prompts: Prompts, images: jax.Array) -> np.ndarray:
    return score(job.modality, prompts, job.frozen, images, job.config, numerics=job.numerics)


# --- the steps of an iteration ------------------------------------------------------------------------


def select_for(logits: np.ndarray, split: Split, k: int, rule: Rule = "boards") -> Selection:
    """Pseudolabels of a split's unlabelled images: logits [N,C] of the whole pool -> (rows, classes).

    Probabilities are a softmax over the candidate classes only.
    """
    own = logits[np.ix_(split.unlabelled, split.candidates)]
    probabilities = np.asarray(jax.nn.softmax(own, axis=1))
    select = select_top_k if rule == "top_k" else select_pseudolabels
    positions, boards = select(probabilities, k)
    return split.unlabelled[positions], split.candidates[boards]


def _first_selections(job: _Job) -> list[Selection]:
    """By zero-shot CLIP; nothing for labels alone."""
    if job.plan.strategy == "labelled":
        return [(np.zeros(0, np.int64), np.zeros(0, np.int64)) for _ in job.splits]
    features = job.frozen.pseudolabel_features
    logits = plain_logits(job.modality, features, job.frozen, job.images, job.config, numerics=job.numerics)
    return [select_for(logits, split, ks[0], job.plan.selection) for split, ks in zip(job.splits, job.ks, strict=True)]


def _training_lists(job: _Job, state: FitState) -> tuple[list[Items], Run]:
    """Pseudolabelled items in drawn order, then the labelled ones; and the weights that depend on their numbers."""
    items, weights, masks, plan = [], [], [], job.plan
    for selected, split, ks in zip(state.selections, job.splits, job.ks, strict=True):
        rows, pseudo = split_pseudolabels(*selected, ks[state.iteration])
        labels = np.concatenate([pseudo, job.labels[split.labelled]])
        if split.paradigm == "trzsl":  # groups by class: a pseudolabel is always one of the unseen
            second = np.isin(labels, split.candidates)
        else:
            second = np.arange(len(labels)) < len(rows)
        items.append(Items(np.concatenate([rows, split.labelled]), labels, second))
        sizes = len(split.labelled), len(rows)
        weights.append(balance_weights(split.paradigm, plan.strategy, job.modality.name, *sizes, plan.balance))
        masks.append(_competing(split, plan.strategy))
    return items, runs(weights, np.stack(masks), plan.optimisation)


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
    keys = jnp.stack([_key(seed, iteration) for seed in job.seeds])
    restart = lambda *arguments: job.modality.restart(arguments[0], job.config, *arguments[1:])  # noqa: E731
    return jax.vmap(restart)(keys, initial, last)


def _draw(job: _Job, iteration: int) -> Prompts:
    """Prompts with leaves [R,...] that depend on each run's seed and the iteration only."""
    keys = jnp.stack([_key(seed, iteration) for seed in job.seeds])
    return jax.vmap(lambda key: job.modality.init(key, job.config))(keys)


def _key(seed: int, iteration: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), iteration)


def _accuracy_of(selected: Selection, labels: np.ndarray) -> float | None:
    rows, pseudo = selected
    known = labels[rows] >= 0
    return float((labels[rows][known] == pseudo[known]).mean()) if known.any() else None


def _last_epoch(losses: np.ndarray, length: int, plan: Plan) -> float:
    """Mean loss of one run's last epoch: losses [steps of the longest run], the length of its own list."""
    per_epoch = steps_per_epoch(length, plan.optimisation.batch_size)
    end = plan.optimisation.epochs * per_epoch
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
