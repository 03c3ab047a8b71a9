"""The whole method on features that do not fit on the devices: chunks come from the host, pass after pass.

Proxy learning sees the images only through sums over them (`rows.py`). Here such a sum is a pass over chunks: each is
padded to one shape, put on the devices, summed block by block by a compiled program, and dropped. Memory is that of
three chunks and of [C,E], whatever the number of images.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxzs import parallel
from jaxzs.errors import DataError, renamed
from jaxzs.proxy import checks
from jaxzs.proxy.fit import IN_SETTINGS, whole_method
from jaxzs.proxy.gamma import random_splits
from jaxzs.proxy.rows import Blocks, Loops, Rows, normalize, where_rows_lie
from jaxzs.proxy.settings import DEFAULTS, PAPER_LOGIT_SCALE, Settings, block_rows, in_float32
from jaxzs.proxy.sinkhorn import Task
from jaxzs.proxy.solvers import ProxyResult

Chunks = Callable[[], Iterable[np.ndarray]]
_AHEAD = 2  # chunks that are on their way to the devices while one is summed


@renamed(**IN_SETTINGS)
def fit_chunks(
    chunks: Chunks,
    text_proxies: ArrayLike,
    settings: Settings = DEFAULTS,
    *,
    logit_scale: ArrayLike = PAPER_LOGIT_SCALE,
    key: jax.Array | None = None,
) -> ProxyResult:
    """`proxy.fit` on chunks of features, with equal results.

    Args:
      chunks: called for every pass; gives arrays [n,E] of any float type and any n, the same ones in the same order,
        for instance the method `features` of a feature store. With several processes each gives its own part, e.g.
        `partial(store.features, part=jax.process_index(), parts=jax.process_count())`, and sums are added up between
        them once a pass.
      text_proxies: [C,E], any float type; L2-normalised here.
      settings: `Settings`; gamma="auto" keeps up to eight bools an image on the host; sharding: devices of this
        process that chunks are spread over, by default all.
      logit_scale: as in `proxy.fit`.
      key: as in `proxy.fit`.

    Returns:
      `ProxyResult`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, rows of zeros, no images.
      ConfigError: options out of range; a keyword that is now one of `Settings`.

    >>> x = np.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]], np.float32)
    >>> z = np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
    >>> result = proxy.fit_chunks(lambda: [x[:2], x[2:]], z)
    >>> zeroshot.predict(x, result.proxies).tolist()
    [0, 0, 1, 1]
    """
    checked = in_float32(settings, logit_scale)
    text = checks.text(text_proxies, np.shape(text_proxies)[-1] if np.ndim(text_proxies) else 0)
    passes = _Passes(chunks, text, settings)
    if settings.auto:
        passes.fold = np.asarray(random_splits(key, passes.num_rows))
    task = Task(passes, passes.num_images, text.shape[0], normalize(text))
    return whole_method(task, checked)


def _while(running: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
    while running(state):
        state = step(state)
    return state


def _for(start: int, end: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    for i in range(start, end):
        state = step(np.int32(i), state)
    return state


def _cond(first: Any, function: Callable[[], Any], other: Callable[[], Any]) -> Any:
    return function() if bool(first) else other()


class _Passes:
    """A `Reduce` over chunks: `passes(function, *args)` is one pass.

    The loops of the solvers run in Python, where each of their sums can be a pass; sums and steps are compiled.
    """

    loops = Loops(_while, _for, _cond)

    def __init__(self, chunks: Chunks, text: jax.Array, settings: Settings):
        self.chunks = chunks
        self.fold: np.ndarray | None = None
        self.sharding = settings.sharding or NamedSharding(
            parallel.make_mesh(devices=jax.local_devices()), P(parallel.DATA)
        )
        # A pass of its own: the shape of all chunks must be known first, and later passes rely on what is checked here.
        lengths = [len(_checked(chunk, text.shape[1])) for chunk in chunks()]
        of_processes = parallel.gather_each(np.array(sum(lengths)))
        self.num_rows = int(of_processes.sum())
        self.first = int(of_processes[: jax.process_index()].sum())  # of all rows, the first one that is this process's
        if self.num_rows == 0:
            raise DataError("the chunks hold no images")
        shards = checks.shards(self.sharding)
        # One shape, so that one program serves all chunks.
        self.length = parallel.padded_length(max(lengths, default=1), shards)
        self.block_size = block_rows(settings, self.length // shards, text.shape[0])

    @property
    def num_images(self) -> jax.Array:
        return jnp.float32(self.num_rows)

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        add = partial(_add, function=function, log=log, block_size=self.block_size, sharding=self.sharding)
        total, under_way = None, deque[Any]()
        for rows in self._rows():
            total = add(total, rows, args)
            under_way.append(jax.tree.leaves(total)[0])
            if len(under_way) > _AHEAD:  # or all chunks would queue up in the memory of the devices
                under_way.popleft().block_until_ready()
        # From here on small arrays on one device, on which the steps of the solver run.
        return jax.tree.map(lambda x: jnp.asarray(_over_processes(np.asarray(x), log)), total)

    def _rows(self) -> Iterable[Rows]:
        start = self.first
        for chunk in self.chunks():
            features, mask = parallel.pad_rows(checks.host_vectors(chunk, "a chunk of features"), self.length)
            fold = None
            if self.fold is not None:
                fold, _ = parallel.pad_rows(self.fold[start : start + len(chunk)], self.length)
            start += len(chunk)
            yield jax.device_put(Rows(mask, features, None, fold), self.sharding)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("function", "log", "block_size", "sharding"))
def _add(
    total: Any, rows: Rows, args: Any, *, function: Callable[..., Any], log: bool, block_size: int, sharding: Any
) -> Any:
    """The running total with one chunk more."""

    def of_chunk(rows: Rows, args: Any) -> Any:
        return Blocks(rows, block_size, sharding.spec[0])(function, *args, log=log)

    part = where_rows_lie(of_chunk, sharding)(rows, args)
    return part if total is None else jax.tree.map(jnp.logaddexp if log else jnp.add, total, part)


def _checked(chunk: Any, width: int) -> np.ndarray:
    """A chunk whose rows are fit to learn from."""
    chunk = checks.host_vectors(chunk, "a chunk of features")
    if chunk.ndim != 2 or chunk.shape[1] != width or not jnp.issubdtype(chunk.dtype, jnp.floating):
        raise DataError(
            f"a chunk has shape {chunk.shape} of {chunk.dtype}, text_proxies have E = {width}: expected [n,{width}] "
            "of a floating-point type"
        )
    largest = np.max(np.abs(chunk.astype(np.float32)), axis=-1, initial=0)
    if not np.isfinite(largest).all():
        raise DataError("a chunk of features holds values that are not finite")
    if (largest < np.finfo(np.float32).tiny).any():
        raise DataError("a chunk of features holds rows of zeros")
    return chunk


def _over_processes(x: np.ndarray, log: bool = False) -> np.ndarray:
    """The total of all processes: one exchange for each array of a pass."""
    if jax.process_count() == 1:
        return x
    total: np.ndarray = (np.logaddexp.reduce if log else np.sum)(parallel.gather_each(x), axis=0)
    return total
