"""Text features for patch classification, computed once and kept on disk by content."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import Model
from jaxzs.errors import DataError, LabelError
from jaxzs.files import atomic_path
from jaxzs.zeroshot import text_proxies


def tag_texts(
    model: Model,
    foreground: Sequence[str],
    background: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    *,
    distinct: bool = True,
    cache: Path | None = None,
    progress: bool = False,
) -> jax.Array:
    """Text features [C,E] of foreground names, then background names, averaged over templates; L2-normalised.

    templates: by default the 85 of TagCLIP. distinct: whether a foreground name that occurs twice is an error; not in a
    data set whose labels tell the classes apart (ImageNet's "sunglasses"). cache: a folder where they are kept under
    the hash of checkpoint, names and templates, so that nothing stale is ever read; None keeps nothing.
    Raises `LabelError` for no foreground names, or a name given twice, and what `zeroshot.text_proxies` raises.

    >>> model = jaxzs.load("demo")
    >>> patch.tag_texts(model, ["circle", "square"], ["ground"], ["a picture of a {}."]).shape
    (3, 64)
    """
    from jaxzs.data import template_set

    if not foreground:
        raise LabelError("there are no foreground names: nothing could be tagged")
    names = [*foreground, *background]
    counts = collections.Counter([*(foreground if distinct else set(foreground)), *background])
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise LabelError(f"names occur more than once among classes and background: {', '.join(repeated)}")
    templates = template_set("tagclip85") if templates is None else tuple(templates)
    if cache is None:
        return text_proxies(model, names, templates, progress=progress)
    content = json.dumps([model.fingerprint, model.tokenizer.fingerprint, names, list(templates)])
    path = cache / f"text-{hashlib.sha256(content.encode()).hexdigest()}.npy"
    if (kept := _read(path, (len(names), model.config.projection_dim))) is not None:
        return kept
    features = text_proxies(model, names, templates, progress=progress)
    _write(path, np.asarray(features))
    return features


def _read(path: Path, shape: tuple[int, int]) -> jax.Array | None:
    """A kept file, or None when there is none, or it is damaged (it is then made anew)."""
    try:
        features = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if features.shape != shape or features.dtype != np.float32 or not np.isfinite(features).all():
        return None
    return jnp.asarray(features)


def _write(path: Path, features: np.ndarray) -> None:
    """A cache that cannot be written (read-only home, full disk) costs time, not the result."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, features)
    except (OSError, DataError):
        return
