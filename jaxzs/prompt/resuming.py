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
from jaxzs.files import read_arrays, write_arrays
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
    """Where a fit is: this iteration counted from 1, its steps, the mean loss of the last chunk, seconds that remain.

    `remaining` is None until it can be told; where lists grow, it takes those to come to be as long as this one.
    """

    iteration: int
    iterations: int
    step: int
    steps: int
    loss: float
    remaining: float | None


@dataclasses.dataclass
class FitState:
    """All that a fit carries from chunk to chunk.

    iteration: counted from 0. losses: [steps done in it,R]; with none `train` holds its start prompts. initial: start
    prompts of the first iteration. selections: of this iteration, one a run.
    """

    iteration: int
    losses: np.ndarray
    initial: Prompts
    train: TrainState
    selections: list[Selection]
    records: list[Record]


class Rate:
    """Time since the start, and an estimate of what is left (from the second chunk on: the first one compiles)."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.began = time.monotonic()
        self.first: float | None = None  # when the first chunk had been done
        self.steps, self.reported = 0, 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def progress(self, state: FitState, steps: int) -> Progress:
        """Called once after every chunk; steps: of this iteration."""
        done, remaining = len(state.losses), None
        new = done - self.reported if done > self.reported else done
        self.reported = done
        if self.first is None:
            self.first = self.seconds
        else:
            self.steps += new
            left = steps - done + (self.iterations - state.iteration - 1) * steps
            remaining = (self.seconds - self.first) / self.steps * left
        loss = float(np.mean(state.losses[-new:]))
        return Progress(state.iteration + 1, self.iterations, done, steps, loss, remaining)


def identify(
    modality: Modality, splits: Sequence[Split], seeds: Sequence[int], plan: Any, frozen: Frozen, images: jax.Array
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
    arrays: dict[str, Any] = {"losses": state.losses}
    arrays |= {f"{name}/{leaf}": x for name, tree in trees.items() for leaf, x in flatten(tree)}
    for r, selected in enumerate(state.selections):
        arrays[f"selection/{r}"] = np.stack(selected)
    values = {
        "format": FORMAT,
        "identity": identity,
        "iteration": state.iteration,
        "records": [dataclasses.asdict(record) for record in state.records],
    }
    write_arrays(path, arrays, values)


def read_state(path: str | Path, identity: str) -> FitState | None:
    """The state in a file, None when there is no file. Raises `DataError` when it is damaged or of another fit."""
    if not Path(path).exists():
        return None
    arrays, values = read_arrays(path, "`jaxzs tune`")
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
        arrays["losses"],
        tree["initial"],
        train,
        selections,  # type: ignore[arg-type]
        [_record(record) for record in values["records"]],
    )


def _record(values: dict[str, Any]) -> Record:
    test = values.pop("test")
    return Record(**values, test=None if test is None else [Evaluation(**own) for own in test])
