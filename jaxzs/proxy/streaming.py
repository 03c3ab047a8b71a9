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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxzs import parallel
from jaxzs.errors import DataError
from jaxzs.proxy import checks
from jaxzs.proxy.fit import checked_options, whole_method
from jaxzs.proxy.gamma import Gamma, is_auto, random_halves
from jaxzs.proxy.rows import Rows, block_rows, in_blocks
from jaxzs.proxy.solvers import ProxyResult, Solver

Chunks = Callable[[], Iterable[np.ndarray]]
_AHEAD = 2  # chunks that are on their way to the devices while one is summed


def fit_chunks(
    chunks: Chunks,
    text_proxies: ArrayLike,
    *,
    label_temperature: ArrayLike = 0.01,
    temperature: ArrayLike = 0.04,
    gamma: Gamma = 0.0,
    sinkhorn_iterations: int = 20,
    confidence: ArrayLike = 0.6,
    solver: Solver = "fast",
    iterations: int | None = None,
    key: jax.Array | None = None,
    tolerance: float = 0.0,
    product_dtype: Any = jnp.float32,
    ridge: float = 1.0,
    block_size: int | None = None,
    mesh: Mesh | None = None,
) -> ProxyResult:
    """`proxy.fit` on chunks of features, with equal results.

    Args:
      chunks: called for every pass; gives arrays [n,E] of any float type and any n, the same ones in the same order,
        for instance the method `features` of a feature store. With several processes each gives its own part, e.g.
        `partial(store.features, part=jax.process_index(), parts=jax.process_count())`, and sums are added up between
        them once a pass.
      text_proxies: [C,E], any float type; L2-normalised here.
      label_temperature: as in `proxy.fit`.
      temperature: as in `proxy.fit`.
      gamma: as in `proxy.fit`; "auto" keeps one bool an image on the host.
      sinkhorn_iterations: as in `proxy.fit`.
      confidence: as in `proxy.fit`.
      solver: as in `proxy.fit`.
      iterations: as in `proxy.fit`.
      key: as in `proxy.fit`.
      tolerance: as in `proxy.fit`.
      product_dtype: as in `proxy.fit`.
      ridge: as in `proxy.fit`.
      block_size: as in `proxy.fit`.
      mesh: devices of this process that chunks are spread over ("data"); by default all.

    Returns:
      `ProxyResult`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, no images.
      ConfigError: options out of range.

    >>> x = np.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]], np.float32)
    >>> z = np.array([[1.0, 0.9], [0.9, 1.0]], np.float32)
    >>> result = proxy.fit_chunks(lambda: [x[:2], x[2:]], z)
    >>> zeroshot.predict(x, result.proxies).tolist()
    [0, 0, 1, 1]
    """
    numbers, choices = checked_options(
        label_temperature=label_temperature,
        temperature=temperature,
        gamma=gamma,
        sinkhorn_iterations=sinkhorn_iterations,
        confidence=confidence,
        solver=solver,
        iterations=iterations,
        tolerance=tolerance,
        product_dtype=product_dtype,
        ridge=ridge,
    )
    text = checks.matrix(text_proxies, "text_proxies", "[C,E]")
    checks.finite(text, "text_proxies")
    checks.classes(text.shape[0])
    mesh = parallel.make_mesh(devices=jax.local_devices()) if mesh is None else mesh
    passes = _Passes(chunks, text, mesh, block_size)
    if is_auto(gamma):
        passes.fold = np.asarray(random_halves(key, passes.num_images))
    # Without jit the loops of the solvers run in Python, where each of their sums can be a pass over the chunks;
    # the sums themselves are compiled.
    with jax.disable_jit():
        return whole_method(passes, jnp.float32(passes.num_images), text, numbers, choices)


class _Passes:
    """A `Reduce` over chunks: `passes(function, *args)` is one pass."""

    def __init__(self, chunks: Chunks, text: jax.Array, mesh: Mesh, block_size: int | None):
        self.chunks, self.mesh = chunks, mesh
        self.fold: np.ndarray | None = None
        lengths = [self._checked(chunk, text.shape[1]) for chunk in chunks()]
        self.num_images = int(_over_processes(np.array(sum(lengths))))
        if self.num_images == 0:
            raise DataError("the chunks hold no images")
        self.length = parallel.padded_length(max(lengths, default=1), mesh.shape[parallel.DATA])
        per_device = self.length // mesh.shape[parallel.DATA]
        self.block_size = block_rows(block_size, per_device, text.shape[0])
        self.compiled: dict[Any, Any] = {}

    @staticmethod
    def _checked(chunk: np.ndarray, dim: int) -> int:
        if chunk.ndim != 2 or chunk.shape[1] != dim:
            raise DataError(f"a chunk has shape {chunk.shape}, text_proxies have E = {dim}: [n,{dim}]")
        if not np.isfinite(chunk.astype(np.float32)).all():
            raise DataError("a chunk of features holds values that are not finite")
        return len(chunk)

    def __call__(self, function: Callable[..., Any], *args: Any, log: bool = False) -> Any:
        with jax.disable_jit(False):
            total, under_way = None, deque[Any]()
            for rows in self._rows():
                total = self._program(function, log)(total, rows, args)
                under_way.append(jax.tree.leaves(total)[0])
                if len(under_way) > _AHEAD:  # or all chunks would queue up in the memory of the devices
                    under_way.popleft().block_until_ready()
            # From here on small arrays on one device: the solver's own steps are not compiled.
            return jax.tree.map(lambda x: jnp.asarray(_over_processes(np.asarray(x), log)), total)

    def _rows(self) -> Iterable[Rows]:
        start = 0
        for chunk in self.chunks():
            features, mask = parallel.pad_rows(np.asarray(chunk), self.length)
            fold = None
            if self.fold is not None:
                fold, _ = parallel.pad_rows(self.fold[start : start + len(chunk)], self.length)
            start += len(chunk)
            place = lambda x: parallel.shard_rows(x, self.mesh)[0]  # noqa: E731
            yield Rows(place(mask), place(features), None, None if fold is None else place(fold))

    def _program(self, function: Callable[..., Any], log: bool) -> Any:
        if (function, log) not in self.compiled:
            self.compiled[function, log] = jax.jit(partial(self._add, function, log))
        return self.compiled[function, log]

    def _add(self, function: Callable[..., Any], log: bool, total: Any, rows: Rows, args: Any) -> Any:
        """The running total with one chunk more."""

        def of_chunk(rows: Rows, args: Any) -> Any:
            return in_blocks(rows, self.block_size, parallel.DATA)(function, *args, log=log)

        part = jax.shard_map(
            of_chunk,
            mesh=self.mesh,
            in_specs=(P(parallel.DATA), P()),
            out_specs=P(),
            check_vma=False,  # equal on all devices: the sum over rows ends in a psum
        )(rows, args)
        return part if total is None else jax.tree.map(jnp.logaddexp if log else jnp.add, total, part)


def _over_processes(x: np.ndarray, log: bool = False) -> np.ndarray:
    """The total of all processes: one exchange for each array of a pass."""
    if jax.process_count() == 1:
        return x
    from jax.experimental import multihost_utils

    everyone = np.asarray(multihost_utils.process_allgather(x))
    total: np.ndarray = (np.logaddexp.reduce if log else np.sum)(everyone, axis=0)
    return total
