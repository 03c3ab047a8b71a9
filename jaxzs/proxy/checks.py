"""Checks of what callers hand in: named errors before anything is compiled.

Values are checked where they are there to look at; under `jit` and `vmap` only shapes are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import ConfigError, DataError


def concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def matrix(x: Any, name: str, axes: str) -> jax.Array:
    """A floating-point array of rank 2 with at least one row and column."""
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
    if x.ndim != 2:
        raise DataError(f"{name} has shape {x.shape}; expected two axes {axes}")
    if 0 in x.shape:
        raise DataError(f"{name} has shape {x.shape}: it is empty; expected at least one row of {axes}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise DataError(f"{name} has dtype {x.dtype}; expected a floating-point type")
    return jnp.asarray(x)


def row_mask(mask: Any, num_rows: int) -> jax.Array:
    """A bool mask [N]; None stands for all rows."""
    if mask is None:
        return jnp.ones((num_rows,), bool)
    if jnp.shape(mask) != (num_rows,):
        raise DataError(f"mask has shape {jnp.shape(mask)}; expected one entry per row: ({num_rows},)")
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise DataError(f"mask has dtype {mask.dtype}; expected bool, True for rows that count")
    if concrete(mask):
        with jax.ensure_compile_time_eval():  # the caller may be tracing something else
            if not bool(jnp.any(mask)):
                raise DataError("mask leaves no row; expected at least one True")
    return mask


def finite(x: jax.Array, name: str, mask: jax.Array | None = None) -> None:
    """No NaN and no infinity, padding aside."""
    if not concrete(x) or (mask is not None and not concrete(mask)):
        return
    with jax.ensure_compile_time_eval():  # the caller may be tracing something else
        bad = ~jnp.all(jnp.isfinite(x), axis=-1)
        bad = bad if mask is None else bad & mask
        if bool(jnp.any(bad)):
            raise DataError(
                f"{name} holds values that are not finite, first in row {int(jnp.argmax(bad))} "
                f"({int(jnp.sum(bad))} rows in all); leave those rows out or mask them"
            )


def classes(num_classes: int) -> None:
    if num_classes < 2:
        raise DataError(
            f"there is {num_classes} class; expected at least two, since one class leaves nothing to decide"
        )


def same(a: int, b: int, what: str) -> None:
    if a != b:
        raise DataError(f"{what} differ: {a} and {b}; do both come from the same model and data?")


def positive(value: Any, name: str) -> None:
    if concrete(value) and not np.all((np.asarray(value) > 0) & np.isfinite(np.asarray(value))):
        raise ConfigError(f"{name} is {value}; expected a finite number above 0")


def between(value: Any, name: str, low: float, high: float) -> None:
    if not concrete(value):
        return
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.number) or not np.all((array >= low) & (array <= high)):
        raise ConfigError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}")


def whole_number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1")


def scalar(value: Any) -> jax.Array:
    """A float32 scalar, or a tracer of one."""
    return jnp.asarray(value).astype(jnp.float32)


def label_options(temperature: Any, gamma: Any, iterations: Any) -> None:
    positive(temperature, "temperature")
    if isinstance(gamma, str):
        if gamma != "auto":
            raise ConfigError(f'gamma is {gamma!r}; expected a number from 0 to 1, or "auto"')
    else:
        between(gamma, "gamma", 0, 1)
    whole_number(iterations, "iterations")


def features_and_proxies(image_features: Any, text_proxies: Any, mask: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checked features [N, E], text proxies [C, E] and mask [N]."""
    x = matrix(image_features, "image_features", "[N,E]")
    z = matrix(text_proxies, "text_proxies", "[C,E]")
    classes(z.shape[0])
    same(x.shape[1], z.shape[1], "the feature sizes of image_features and text_proxies")
    rows_mask = row_mask(mask, x.shape[0])
    finite(x, "image_features", rows_mask)
    finite(z, "text_proxies")
    return x, z, rows_mask


def divides(num_rows: int, shards: int, axis: str) -> None:
    if num_rows % shards:
        raise DataError(
            f"{num_rows} rows do not divide over the {shards} devices of mesh axis {axis!r}; "
            "pad them and mask the padding"
        )
