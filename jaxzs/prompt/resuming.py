"""What a fit carries from chunk to chunk, on disk and in reports."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import parallel
from jaxzs.clip.params import flatten, unflatten
from jaxzs.errors import DataError
from jaxzs.files import CHECKSUM, from_json, read_arrays, write_arrays
from jaxzs.prompt import files
from jaxzs.prompt.evaluation import Evaluation
from jaxzs.prompt.modality import Frozen, Prompts, Task
from jaxzs.prompt.protocol import Split
from jaxzs.prompt.training import TrainState, start

FORMAT = "jaxzs.fit/2"  # 1 had no checksum
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
    seconds: float = 0.0


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


class FitState(NamedTuple):
    """All that a fit carries from step to step; a step returns another one.

    iteration: counted from 0. losses: [steps done in it,R]; with none `train` holds its start prompts. initial: start
    prompts of the first iteration. selections: of this iteration, one a run. records: of the finished iterations.
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
        # A new iteration counts its steps from 0 again.
        new = done - self.reported if done > self.reported else done
        self.reported = done
        if self.first is None:
            self.first = self.seconds
        else:
            self.steps += new
            # As if the iterations to come were as long as this one; GRIP's lists grow, so it will take longer.
            left = steps - done + (self.iterations - state.iteration - 1) * steps
            remaining = (self.seconds - self.first) / self.steps * left
        loss = float(np.mean(state.losses[-new:]))
        return Progress(state.iteration + 1, self.iterations, done, steps, loss, remaining)


# --- whose state it is --------------------------------------------------------------------------------------------


def identify(task: Task, splits: Sequence[Split], plan: Any, frozen: Frozen, images: jax.Array) -> str:
    """Hash of all that determines a fit, by which its file is known: settings, splits, every weight and image."""
    config, numerics = dataclasses.asdict(task.config), dataclasses.asdict(task.numerics)
    parts: list[Any] = [files.describe(task.modality), config, numerics, dataclasses.asdict(plan)]
    for split in splits:
        # Validation decides nothing, and the seen classes follow from the candidates.
        of_split = split.labelled, split.unlabelled, split.candidates
        parts.append([split.paradigm, split.num_classes, *(own.tolist() for own in of_split)])
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for array in (*jax.tree.leaves(frozen), images):
        digest.update(f"{array.dtype}{array.shape}".encode())  # equal bytes may be other arrays
        for rows in _pieces(array):
            digest.update(np.ascontiguousarray(parallel.gather(jnp.asarray(rows))).tobytes())
    return digest.hexdigest()


def _pieces(array: jax.Array, most: int = 2**26) -> Iterator[jax.Array]:
    """An array by rows of at most that many numbers together, so that the host never holds all of a large one."""
    if array.size <= most:
        yield array
        return
    rows = max(1, most // (array.size // len(array)))  # rows of [N,...] to a piece
    for first in range(0, len(array), rows):
        yield array[first : first + rows]


# --- the file -----------------------------------------------------------------------------------------------------


def write_state(path: str | Path, identity: str, state: FitState) -> None:
    """Write all of a fit's state to one file, atomically, with a checksum; of several processes the first one does."""
    trees = {
        "initial": state.initial,
        "prompts": state.train.prompts,
        "momentum": state.train.optimiser[1].trace,  # of optax's chain of (weight decay, trace)
    }
    arrays: dict[str, Any] = {"losses": state.losses}
    arrays |= {f"{name}/{leaf}": parallel.gather(x) for name, tree in trees.items() for leaf, x in flatten(tree)}
    for r, selected in enumerate(state.selections):
        arrays[f"selection/{r}"] = np.stack(selected)  # [2,n]: rows, classes
    values = {
        "format": FORMAT,
        "identity": identity,
        "iteration": state.iteration,
        "records": [dataclasses.asdict(record) for record in state.records],
    }
    # Gathering above is a collective that every process joins; writing is the first one's alone.
    if parallel.is_main_process():
        write_arrays(path, arrays, values)
    # Without waiting another process could look for the file before it is there.
    parallel.barrier("state of the fit")


def read_state(path: str | Path, identity: str, num_runs: int = 1, like: FitState | None = None) -> FitState | None:
    """The state in a file, None when there is no file.

    num_runs: of this fit; like: a state of it, whose arrays it must have. Raises `DataError` for a damaged file, and
    for one of another fit.
    """
    if not Path(path).exists():
        return None
    arrays, values = read_arrays(path, "`jaxzs tune`")
    if values.get("format") != FORMAT or CHECKSUM not in values or values.get("identity") != identity:
        raise DataError(
            f"{path} is not the state of this fit (other images, model, seeds or settings, or an earlier version of "
            "jaxzs); remove it or name another file to start anew"
        )
    try:
        state = _restored(arrays, values)
        if like is not None:
            _check_like(state, num_runs, like)
    except (DataError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error!r}); remove it to start anew") from error
    return state


def _restored(arrays: dict[str, np.ndarray], values: dict[str, Any]) -> FitState:
    tree = jax.tree.map(jnp.asarray, unflatten(arrays))
    # The optimiser's structure is optax's own; only its numbers are in the file.
    weight_decay, trace = start(tree["prompts"]).optimiser
    train = TrainState(tree["prompts"], (weight_decay, trace._replace(trace=tree["momentum"])))
    selections = [
        (rows, classes) for rows, classes in (arrays[f"selection/{r}"] for r in range(len(tree["selection"])))
    ]
    # The counter never falls behind the finished iterations.
    if type(values["iteration"]) is not int or values["iteration"] < len(values["records"]):
        raise ValueError("iteration")
    records = [from_json(Record, record, "its record", DataError) for record in values["records"]]
    return FitState(values["iteration"], arrays["losses"], tree["initial"], train, selections, records)


def _check_like(state: FitState, num_runs: int, like: FitState) -> None:
    import chex

    try:
        chex.assert_trees_all_equal_shapes_and_dtypes((state.initial, state.train), (like.initial, like.train))
    except AssertionError as error:
        raise ValueError("its arrays are not those of this fit") from error
    if state.losses.shape[1:] != like.losses.shape[1:]:
        raise ValueError("its losses are not those of this fit")
    if len(state.selections) != num_runs:
        raise ValueError("other runs")
