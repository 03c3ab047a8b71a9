"""What a fit carries from chunk to chunk, on disk and in reports."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.params import flatten, unflatten
from jaxzs.errors import DataError
from jaxzs.prompt import files
from jaxzs.prompt.evaluation import Evaluation
from jaxzs.prompt.modality import Frozen, Modality, Prompts
from jaxzs.prompt.protocol import Split
from jaxzs.prompt.training import TrainState, start

FORMAT = "jaxzs.fit/1"
Selection = tuple[np.ndarray, np.ndarray]  # rows of the pool, their pseudolabels


@dataclasses.dataclass(frozen=True)
class Record:
    """One finished iteration, counted from 1; every list has one entry a run.

    k: pseudolabels asked for per class. num_pseudolabels: those trained on. pseudolabel_accuracy: of those
    selected, None where true labels are not known. loss: mean over the last epoch. test: None without test images.
    seconds: since the fit began in this process.
    """

    iteration: int
    k: list[int]
    num_pseudolabels: list[int]
    pseudolabel_accuracy: list[float | None]
    loss: list[float]
    test: list[Evaluation] | None
    seconds: float


class Progress(NamedTuple):
    """Where a fit is, counted from 1: mean loss of all runs, seconds that remain (None until it can be told)."""

    iteration: int
    iterations: int
    epoch: int
    epochs: int
    loss: float
    remaining: float | None


@dataclasses.dataclass
class FitState:
    """All that a fit carries from chunk to chunk.

    iteration: counted from 0. epoch: done in it; at 0 `train` holds its start prompts. initial: start prompts of
    the first iteration. selections: of this iteration, one a run. loss: mean of the last epoch, one a run.
    """

    iteration: int
    epoch: int
    initial: Prompts
    train: TrainState
    selections: list[Selection]
    loss: list[float]
    records: list[Record]


class Rate:
    """Time since the start, and an estimate of what is left (from the second chunk on: the first one compiles)."""

    def __init__(self, iterations: int, epochs: int) -> None:
        self.iterations, self.epochs = iterations, epochs
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def progress(self, state: FitState) -> Progress:
        """Called once after every chunk."""
        done, remaining = state.iteration * self.epochs + state.epoch, None
        if self.first is None:
            self.first = done, self.seconds
        elif done > self.first[0]:
            pace = (self.seconds - self.first[1]) / (done - self.first[0])
            remaining = pace * (self.iterations * self.epochs - done)
        loss = float(np.mean(state.loss))
        return Progress(
            state.iteration + 1, self.iterations, state.epoch, self.epochs, loss, remaining
        )


def identify(
    modality: Modality,
    splits: Sequence[Split],
    seeds: Sequence[int],
    plan: Any,
    frozen: Frozen,
    images: jax.Array,
) -> str:
    """Hash of all that determines a fit, by which its file is known."""
    parts: list[Any] = [files.describe(modality), dataclasses.asdict(plan), list(seeds)]
    for split in splits:
        rows = split.labelled, split.unlabelled, split.candidates
        parts.append([split.paradigm, split.num_classes, *(own.tolist() for own in rows)])
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    few = images.reshape(len(images), -1)[:, :64]  # of every image, enough to tell pools apart
    for array in (frozen.input_ids, frozen.text_features, frozen.pseudolabel_features, few):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def write_state(path: str | Path, identity: str, state: FitState) -> None:
    """Write all of a fit's state to one file, atomically."""
    trees = {
        "initial": state.initial,
        "prompts": state.train.prompts,
        "momentum": state.train.optimiser[1].trace,  # of optax's chain of (weight decay, trace)
    }
    arrays = {f"{name}/{leaf}": x for name, tree in trees.items() for leaf, x in flatten(tree)}
    for r, selected in enumerate(state.selections):
        arrays[f"selection/{r}"] = np.stack(selected)
    values = {
        "format": FORMAT,
        "identity": identity,
        "iteration": state.iteration,
        "epoch": state.epoch,
        "loss": state.loss,
        "records": [dataclasses.asdict(record) for record in state.records],
    }
    files.write_arrays(path, arrays, values)


def read_state(path: str | Path, identity: str) -> FitState | None:
    """The state in a file, None when there is no file. Raises `DataError` when it is damaged or of another fit."""
    if not Path(path).exists():
        return None
    arrays, values = files.read_arrays(path)
    if values.get("format") != FORMAT or values.get("identity") != identity:
        raise DataError(
            f"{path} is not the state of this fit (other data, model, seeds or settings); remove it or name "
            "another file to start anew"
        )
    tree = jax.tree.map(jnp.asarray, unflatten(arrays))
    weight_decay, trace = start(tree["prompts"]).optimiser
    train = TrainState(tree["prompts"], (weight_decay, trace._replace(trace=tree["momentum"])))
    selections = [tuple(arrays[f"selection/{r}"]) for r in range(len(tree["selection"]))]
    return FitState(
        values["iteration"],
        values["epoch"],
        tree["initial"],
        train,
        selections,  # type: ignore[arg-type]
        values["loss"],
        [_record(record) for record in values["records"]],
    )


def _record(values: dict[str, Any]) -> Record:
    test = values.pop("test")
    return Record(**values, test=None if test is None else [Evaluation(**own) for own in test])
