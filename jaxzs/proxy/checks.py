"""Checks of what callers hand in: named errors before anything is compiled.

Values are checked where they are there to look at; under `jit` and `vmap` only shapes are.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxzs.errors import ConfigError, DataError

SMALLEST = 1e-37  # of a temperature: a tenth of it and float32 is no longer normal, so that S / tau is not a number
LARGEST = 1e37  # of a number that is divided by, or multiplied with
LARGEST_LOGIT = 1e37  # of which float32 still holds differences and sums
SUM_OF_LABELS = 1e-2  # how far a row of labels may be from a distribution: more than float16 rounds off


def concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def matrix(x: Any, name: str, axes: str) -> jax.Array:
    """A floating-point array of rank 2 with at least one row and column, at most as wide as float32 on the host."""
    if not isinstance(x, jax.Array):  # what is on devices stays there
        x = _on_host(x, name)
    if x.ndim != 2:
        raise DataError(f"{name} has shape {x.shape}; expected two axes {axes}")
    if 0 in x.shape:
        raise DataError(f"{name} has shape {x.shape}: it is empty; expected at least one row of {axes}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DataError(f"{name} has dtype {x.dtype}; expected a floating-point type")
    with np.errstate(over="ignore"):  # too wide for float32: an infinity, which `finite` names
        return jnp.asarray(x)


def _on_host(x: Any, name: str) -> np.ndarray:
    """An array of this machine's byte order."""
    try:
        x = np.asarray(x)
    except (TypeError, ValueError) as error:  # rows of several lengths
        raise DataError(f"{name} is not an array: {error}") from error
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def host_vectors(x: Any, name: str) -> np.ndarray:
    """An array of which only the directions of its rows matter: wide types do not overflow on their way to float32."""
    x = _on_host(x, name)
    if x.ndim != 2 or x.size == 0 or x.dtype.kind != "f" or x.dtype.itemsize <= 4:
        return x
    longest = np.max(np.abs(x), axis=-1, keepdims=True, where=np.isfinite(x), initial=0)
    return (x / np.where(longest > 0, longest, 1)).astype(np.float32)


def row_mask(mask: Any, num_rows: int) -> jax.Array:
    """A bool mask [N]; None stands for all rows."""
    if mask is None:
        return jnp.ones((num_rows,), bool)
    mask = mask if isinstance(mask, jax.Array) else _on_host(mask, "mask")
    if mask.shape != (num_rows,):
        raise DataError(f"mask has shape {mask.shape}; expected one entry per row: ({num_rows},)")
    if mask.dtype != jnp.bool_:
        raise DataError(f"mask has dtype {mask.dtype}; expected bool, True for rows that count")
    mask = jnp.asarray(mask)
    if concrete(mask):
        with jax.ensure_compile_time_eval():  # the caller may be tracing something else
            # On the host where all of it is here: a reduction over devices would be a program of its own.
            any_row = np.asarray(mask).any() if mask.is_fully_addressable else jnp.any(mask)
            if not bool(any_row):
                raise DataError("mask leaves no row; expected at least one True")
    return mask


def _no_row(bad: jax.Array, mask: jax.Array | None, message: str) -> None:
    """Raise `DataError` if a row that counts is bad [N]; the message is told which."""
    bad = bad if mask is None else bad & mask
    if bool(jnp.any(bad)):
        where = f"first in row {int(jnp.argmax(bad))} ({int(jnp.sum(bad))} rows in all)"
        raise DataError(f"{message}, {where}; leave those rows out or mask them")


def finite(x: jax.Array, name: str, mask: jax.Array | None = None) -> None:
    """No NaN and no infinity, padding aside."""
    if not concrete(x) or (mask is not None and not concrete(mask)):
        return
    with jax.ensure_compile_time_eval():  # the caller may be tracing something else
        _no_row(~jnp.all(jnp.isfinite(x), axis=-1), mask, f"{name} holds values that are not finite")


def directions(x: jax.Array, name: str, mask: jax.Array | None = None) -> None:
    """Finite rows, none of zeros: those point nowhere, and would be given to some class without a word."""
    finite(x, name, mask)
    if not concrete(x) or (mask is not None and not concrete(mask)):
        return
    with jax.ensure_compile_time_eval():
        nothing = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) < np.finfo(np.float32).tiny
        _no_row(nothing, mask, f"{name} holds rows of zeros")


def vectors(x: Any, name: str, axes: str) -> jax.Array:
    """A `matrix` of which only the directions of its rows matter."""
    return matrix(x if isinstance(x, jax.Array) else host_vectors(x, name), name, axes)


def classes(num_classes: int) -> None:
    if num_classes < 2:
        raise DataError(
            f"there is {num_classes} class; expected at least two, since one class leaves nothing to decide"
        )


def same(a: int, b: int, what: str) -> None:
    if a != b:
        raise DataError(f"{what} differ: {a} and {b}; do both come from the same model and data?")


def between(value: Any, name: str, low: float, high: float) -> jax.Array:
    """A float32 scalar in that range, or a tracer of one."""
    wrong = ConfigError(f"{name} is {value!r:.80}; expected one number from {low:g} to {high:g}")
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise wrong from error
    # bool is neither.
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if not real or array.shape != () or (concrete(array) and not _in_range(float(array), low, high)):
        raise wrong
    return jnp.asarray(array).astype(jnp.float32)


def _in_range(value: float, low: float, high: float) -> bool:
    """Whether a number is in the range as float32 rounds all three: the bounds belong to it. NaN lies in none."""
    with np.errstate(over="ignore"):  # too large for float32: an infinity, which is in no range
        value, low, high = np.array([value, low, high]).astype(np.float32).tolist()
    return low <= value <= high


def scale(value: Any, name: str) -> jax.Array:
    """A temperature or a logit scale: a float32 scalar above 0 whose inverse float32 holds too."""
    return between(value, name, SMALLEST, LARGEST)


def whole_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")


def product_dtype(value: Any) -> np.dtype:
    """A type that large products may have."""
    known = ("float32", "bfloat16", "float16")
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or value is None or dtype.name not in known:
        raise ConfigError(f"product_dtype is {value!r}; expected one of {', '.join(known)}")
    return dtype


def row_sharding(value: Any) -> None:
    """None, or a sharding whose first axis is spread over a mesh."""
    if value is None:
        return
    if not isinstance(value, NamedSharding) or not value.spec or value.spec[0] is None:
        raise ConfigError(
            f"sharding is {value!r}; expected one that spreads rows: NamedSharding(mesh, PartitionSpec('data'))"
        )


def random_key(key: Any) -> jax.Array:
    """One key of `jax.random.key`, or of the older `jax.random.PRNGKey`."""
    if isinstance(key, jax.Array | np.ndarray):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return jnp.asarray(key)
        if key.dtype == np.uint32 and key.shape == jax.random.PRNGKey(0).shape:
            return jnp.asarray(key)
    raise ConfigError(f"key is {key!r:.80}; expected a random key: jax.random.key(0) or another")


def features_and_proxies(image_features: Any, text_proxies: Any, mask: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checked features [N, E], text proxies [C, E] and mask [N]."""
    x = vectors(image_features, "image_features", "[N,E]")
    rows_mask = row_mask(mask, x.shape[0])
    directions(x, "image_features", rows_mask)
    return x, text(text_proxies, x.shape[1]), rows_mask


def text(text_proxies: Any, width: int) -> jax.Array:
    """Checked text proxies [C, E] for features of that width."""
    z = vectors(text_proxies, "text_proxies", "[C,E]")
    classes(z.shape[0])
    same(width, z.shape[1], "the feature sizes of image_features and text_proxies")
    directions(z, "text_proxies")
    return z


def similarities(similarity: Any, mask: Any, label_temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Checked similarities [N, C] and mask [N]; float32 holds their quotients by the temperature."""
    s = matrix(similarity, "similarity", "[N,C]")
    classes(s.shape[1])
    rows_mask = row_mask(mask, s.shape[0])
    finite(s, "similarity", rows_mask)
    if concrete(s) and concrete(rows_mask) and concrete(label_temperature):
        with jax.ensure_compile_time_eval():
            logits = s.astype(jnp.float32) / label_temperature
            too_large = ~(jnp.max(jnp.abs(logits), axis=-1) <= LARGEST_LOGIT)  # ~ and <=: NaN, too
            _no_row(too_large, rows_mask, "similarity / temperature holds numbers that float32 does not")
    return s, rows_mask


def distributions(soft_labels: Any, num_rows: int, num_classes: int, mask: jax.Array) -> jax.Array:
    """Checked labels [N, C]: each row that counts is one distribution, on which the objective rests."""
    labels = matrix(soft_labels, "soft_labels", "[N,C]")
    same(labels.shape[0], num_rows, "the numbers of rows of soft_labels and image_features")
    same(labels.shape[1], num_classes, "the numbers of classes of soft_labels and text_proxies")
    finite(labels, "soft_labels", mask)
    if concrete(labels) and concrete(mask):
        with jax.ensure_compile_time_eval():
            p = labels.astype(jnp.float32)
            off = jnp.abs(jnp.sum(p, axis=-1) - 1) > SUM_OF_LABELS
            negative = jnp.min(p, axis=-1) < -SUM_OF_LABELS
            _no_row(off | negative, mask, "soft_labels holds rows that are no distributions (from 0 to 1, sum 1)")
    return labels


def shards(sharding: NamedSharding | None) -> int:
    """Devices over which rows are spread."""
    if sharding is None:
        return 1
    axes = sharding.spec[0] if isinstance(sharding.spec[0], tuple) else (sharding.spec[0],)
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def rows_per_device(num_rows: int, sharding: NamedSharding | None) -> int:
    """Rows on each device, the same number on all."""
    if num_rows % shards(sharding):
        raise DataError(
            f"{num_rows} rows do not divide over the {shards(sharding)} devices of {sharding}; "
            "pad them and mask the padding (jaxzs.parallel.shard_rows does)"
        )
    return num_rows // shards(sharding)
