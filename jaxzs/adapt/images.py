"""How a method sees its images: an array, one spread over devices, or chunks from the host. All give the same sums.

A method of this package is a function `method(reduce, text, numbers, choices)`: `reduce` (`jaxzs.proxy.rows`) adds up
over blocks of images, `text` [C,E] are normalised text proxies, `numbers` a pytree that may be traced, `choices` a
hashable value that decides what is compiled. `over_images` checks the images and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxzs import parallel
from jaxzs.errors import ConfigError, LabelError
from jaxzs.proxy import checks
from jaxzs.proxy.fit import _mesh_of
from jaxzs.proxy.rows import Rows, block_rows, in_blocks, normalize
from jaxzs.proxy.streaming import Chunks, _Passes

Method = Callable[..., Any]
Images = ArrayLike | Chunks
DATA = parallel.DATA


class Shots(NamedTuple):
    """A few images whose labels are known.

    features: [M,E], any float type. labels: [M] int, in 0..C-1; a negative label says that the row does not count.

    >>> shots = adapt.Shots(np.eye(2, dtype=np.float32), np.array([0, 1]))
    >>> shots.labels.tolist()
    [0, 1]
    """

    features: ArrayLike
    labels: ArrayLike


def over_images(
    method: Method,
    image_features: Images,
    text_proxies: ArrayLike,
    numbers: Any = (),
    choices: Hashable = (),
    *,
    mask: ArrayLike | None = None,
    folds: Callable[[int], jax.Array] | None = None,
) -> Any:
    """What `method` finds in these images: arrays that are the same on all devices.

    image_features: [N,E], or a function that gives the chunks anew for every pass (`FeatureStore.features`). folds: the
    splits that a row of N belongs to, where the method asks for them.
    """
    if callable(image_features):
        return _over_chunks(method, image_features, text_proxies, numbers, choices, mask, folds)
    x, text, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    rows = Rows(rows_mask, features=x, fold=None if folds is None else folds(x.shape[0]))
    mesh = _mesh_of(x, DATA)
    shards = 1 if mesh is None else mesh.shape[DATA]
    checks.divides(x.shape[0], shards, DATA)
    size = block_rows(None, x.shape[0] // shards, text.shape[0])
    return _compiled(rows, text, numbers, method=method, choices=choices, block_size=size, mesh=mesh)


@partial(jax.jit, static_argnames=("method", "choices", "block_size", "mesh"))
def _compiled(
    rows: Rows, text: jax.Array, numbers: Any, *, method: Method, choices: Hashable, block_size: int, mesh: Mesh | None
) -> Any:
    def run(rows: Rows, text: jax.Array, numbers: Any) -> Any:
        reduce = in_blocks(rows, block_size, None if mesh is None else DATA)
        return method(reduce, normalize(text), numbers, choices)

    if mesh is not None:
        # Results are equal on all devices, since every sum over rows ends in a psum: nothing to check.
        run = jax.shard_map(run, mesh=mesh, in_specs=(P(DATA), P(), P()), out_specs=P(), check_vma=False)
    return run(rows, text, numbers)


def _over_chunks(
    method: Method,
    chunks: Chunks,
    text_proxies: ArrayLike,
    numbers: Any,
    choices: Hashable,
    mask: ArrayLike | None,
    folds: Callable[[int], jax.Array] | None,
) -> Any:
    """The same pass by pass: the loops of the method run in Python, their sums are compiled."""
    if mask is not None:
        raise ConfigError("chunks of features take no mask: leave the rows out of the chunks")
    text = checks.matrix(text_proxies, "text_proxies", "[C,E]")
    checks.finite(text, "text_proxies")
    checks.classes(text.shape[0])
    passes = _Passes(chunks, text, parallel.make_mesh(devices=jax.local_devices()), None)
    if folds is not None:
        passes.fold = np.asarray(folds(passes.num_images))
    with jax.disable_jit():
        return method(passes, normalize(text), numbers, choices)


def number(value: Any, name: str, low: float = 1e-37, high: float = 1e37) -> jax.Array:
    """A checked float32 scalar, or a tracer of one; by default any above 0."""
    checks.between(value, name, low, high)
    return jnp.asarray(value).astype(jnp.float32)


def check_shots(shots: Shots, num_classes: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """Normalised features [M,E], 0 where a row does not count, and labels [M] int32, -1 there."""
    features = checks.matrix(shots.features, "shot_features", "[M,E]")
    checks.same(features.shape[1], dim, "the feature sizes of shot_features and text_proxies")
    labels = shots.labels if isinstance(shots.labels, jax.Array) else np.asarray(shots.labels)
    if labels.shape != features.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise LabelError(
            f"shot_labels have shape {labels.shape} and dtype {labels.dtype}; expected one whole number per row of "
            f"shot_features: ({features.shape[0]},)"
        )
    if checks.concrete(labels):
        with jax.ensure_compile_time_eval():
            host = np.asarray(labels)
        if (host >= num_classes).any():
            first = int((host >= num_classes).argmax())
            raise LabelError(f"shot_labels[{first}] is {host[first]}, expected 0 to {num_classes - 1}")
        if (host < 0).all():
            raise LabelError("no shot has a label; expected at least one in 0..C-1")
    labels = jnp.asarray(labels).astype(jnp.int32)
    checks.finite(features, "shot_features", labels >= 0)
    features = jnp.where(labels[:, None] >= 0, features.astype(jnp.float32), jnp.float32(0))
    return normalize(features), jnp.maximum(labels, -1)
