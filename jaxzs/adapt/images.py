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
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError, LabelError
from jaxzs.proxy import checks
from jaxzs.proxy.rows import Blocks, Rows, normalize, where_rows_lie
from jaxzs.proxy.settings import DEFAULTS, Checked, for_rows, in_float32
from jaxzs.proxy.streaming import Chunks, _Passes

Method = Callable[..., Any]
Images = ArrayLike | Chunks


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
    # Of the settings only the size of blocks and the sharding are used.
    blocks = for_rows(in_float32(DEFAULTS), rows, text.shape[0])
    return _compiled(rows, text, numbers, blocks, method=method, choices=choices)


@partial(jax.jit, static_argnames=("method", "choices"))
def _compiled(rows: Rows, text: jax.Array, numbers: Any, blocks: Checked, *, method: Method, choices: Hashable) -> Any:
    def run(rows: Rows, text: jax.Array, numbers: Any) -> Any:
        # Inside `where_rows_lie` each device has its own rows, and sums end in an all-reduce.
        reduce = Blocks(rows, blocks.block_size, blocks.row_axes)
        return method(reduce, normalize(text), numbers, choices)

    return where_rows_lie(run, blocks.sharding)(rows, text, numbers)


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
    # A mask [N] has no place in chunks of sizes that only their maker knows.
    if mask is not None:
        raise ConfigError("chunks of features take no mask: leave the rows out of the chunks")
    text = checks.text(text_proxies, np.shape(text_proxies)[-1] if np.ndim(text_proxies) else 0)
    passes = _Passes(chunks, text, DEFAULTS)
    if folds is not None:
        passes.fold = np.asarray(folds(passes.num_rows))
    return method(passes, normalize(text), numbers, choices)


def number(value: Any, name: str, low: float = checks.SMALLEST, high: float = checks.LARGEST) -> jax.Array:
    """A checked float32 scalar, or a tracer of one; by default any above 0."""
    return checks.between(value, name, low, high)


def check_shots(shots: Shots, num_classes: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """Normalised features [M,E], 0 where a row does not count, and labels [M] int32, -1 there."""
    features = checks.vectors(shots.features, "shot_features", "[M,E]")
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
    checks.directions(features, "shot_features", labels >= 0)
    # NaN in rows that do not count would get through a product with 0.
    features = jnp.where(labels[:, None] >= 0, features.astype(jnp.float32), jnp.float32(0))
    return normalize(features), jnp.maximum(labels, -1)
