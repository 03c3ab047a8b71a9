"""Learned proxies on disk: one safetensors file with the class names and the checkpoint that they belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jaxzs.clip import Model
from jaxzs.errors import DataError
from jaxzs.files import read_arrays, write_arrays
from jaxzs.kept import check_checkpoint, described, description

FORMAT = "jaxzs.proxies/1"


@dataclasses.dataclass(frozen=True, eq=False)  # == of arrays is no truth value
class LearnedProxies:
    """Proxies and what is needed to use them on other images.

    proxies: [C,E]. class_names: C names in their order. fingerprint: of the checkpoint whose features they are
    compared with. settings: how they were learned, as JSON values.

    >>> learned = proxy.LearnedProxies(np.eye(2, 4, dtype=np.float32), ("cat", "dog"), "of the model")
    >>> learned.class_names, learned.settings
    (('cat', 'dog'), {})
    """

    proxies: ArrayLike
    class_names: tuple[str, ...]
    fingerprint: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_proxies(path: str | Path, learned: LearnedProxies) -> None:
    """Write proxies, atomically. Raises `DataError` when they do not fit their names or cannot be written.

    >>> model = jaxzs.load("demo")
    >>> text = zeroshot.text_proxies(model, ["one", "two"])  # or what `proxy.fit` returns
    >>> learned = proxy.LearnedProxies(text, ("one", "two"), model.fingerprint)
    >>> proxy.save_proxies("digits.safetensors", learned)
    >>> proxy.load_proxies("digits.safetensors", model).class_names
    ('one', 'two')
    """
    _check(learned, str(path))
    write_arrays(path, {"proxies": np.asarray(learned.proxies, np.float32)}, description(learned, FORMAT))


def load_proxies(path: str | Path, model: Model) -> LearnedProxies:
    """Read proxies for use with the features of `model`; `.proxies` is a [C,E] float32 array.

    Raises `DataError` when the file holds no proxies, is damaged, or was made with another checkpoint: features of
    another one mean something else, even where their widths agree.

    >>> model = jaxzs.load("demo")
    >>> learned = proxy.LearnedProxies(np.eye(2, 64, dtype=np.float32), ("one", "two"), "of another model")
    >>> proxy.save_proxies("other.safetensors", learned)
    >>> proxy.load_proxies("other.safetensors", model)
    Traceback (most recent call last):
    jaxzs.errors.DataError: other.safetensors was fitted with another checkpoint ...
    """
    arrays, values = read_arrays(path, "`jaxzs classify --save`")
    if values.get("format") != FORMAT or set(arrays) != {"proxies"}:
        raise DataError(f"{path} holds no proxies; name a file that `jaxzs classify --save` has written")
    try:
        learned = LearnedProxies(arrays["proxies"], **described(values))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the description of the proxies is damaged ({error!r})") from error
    _check(learned, str(path))
    check_checkpoint(path, learned, model)
    return learned


def _check(learned: LearnedProxies, where: str) -> None:
    shape = np.shape(learned.proxies)
    if len(shape) != 2 or shape[0] != len(learned.class_names):
        raise DataError(
            f"{where}: proxies have shape {shape}, expected [C,E] with the {len(learned.class_names)} class names"
        )
    if not np.isfinite(np.asarray(learned.proxies, np.float32)).all():
        raise DataError(f"{where}: the proxies hold values that are not finite")
