"""Heads on disk: one safetensors file with the class names and the checkpoint that they belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxzs.adapt.heads import AnyHead, GaussianHead, Head, linear, width
from jaxzs.clip import Model
from jaxzs.errors import DataError
from jaxzs.files import read_arrays, write_arrays
from jaxzs.kept import check_checkpoint, described, description
from jaxzs.proxy.files import FORMAT as PROXIES
from jaxzs.proxy.rows import normalize

FORMAT = "jaxzs.head/1"
VISION = 4  # temperatures of vision proxies: this over the logit scale


@dataclasses.dataclass(frozen=True)
class KeptHead:
    """A head and what is needed to use it on other images.

    head: `Head` or `GaussianHead`. class_names: C names in their order. fingerprint: of the checkpoint whose features
    it scores. settings: how it was fitted, as JSON values.

    >>> kept = adapt.KeptHead(adapt.text_head(jnp.eye(2)), ("cat", "dog"), "of the model")
    >>> kept.class_names, kept.settings
    (('cat', 'dog'), {})
    """

    head: AnyHead
    class_names: tuple[str, ...]
    fingerprint: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_head(path: str | Path, kept: KeptHead) -> None:
    """Write a head, atomically; of a `GaussianHead` without the posterior of the images that it was fitted on.

    Raises `DataError` when it does not fit its names or cannot be written.

    >>> model = jaxzs.load("demo")
    >>> text = zeroshot.text_proxies(model, ["one", "two"])
    >>> head = adapt.text_head(text, temperature=1 / model.logit_scale)  # or what `adapt.fit` returns
    >>> adapt.save_head("digits.safetensors", adapt.KeptHead(head, ("one", "two"), model.fingerprint))
    >>> adapt.load_head("digits.safetensors", model).class_names
    ('one', 'two')
    """
    # A head that could not be read again is not written.
    _check(kept, str(path))
    write_arrays(path, _arrays(kept.head), description(kept, FORMAT))


def load_head(path: str | Path, model: Model) -> KeptHead:
    """Read a head for the features of `model`; proxies that an earlier version kept are read as the head they are.

    Raises `DataError` when the file holds no head, is damaged, or was made with another checkpoint: features of another
    one mean something else, even where their widths agree.

    >>> model = jaxzs.load("demo")
    >>> head = adapt.text_head(jnp.eye(2, 64))
    >>> adapt.save_head("other.safetensors", adapt.KeptHead(head, ("one", "two"), "of another model"))
    >>> adapt.load_head("other.safetensors", model)
    Traceback (most recent call last):
    jaxzs.errors.DataError: other.safetensors was fitted with another checkpoint ...
    """
    arrays, values = read_arrays(path, "`jaxzs classify --save`")
    try:
        kept = KeptHead(_head(arrays, values.get("format"), model.logit_scale), **described(values))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} holds no head, or its description is damaged ({error}); name a file that `jaxzs classify --save` "
            "has written"
        ) from error
    _check(kept, str(path))
    check_checkpoint(path, kept, model)
    return kept


def _arrays(head: AnyHead) -> dict[str, np.ndarray]:
    if isinstance(head, GaussianHead):
        own = {"means": head.means, "variances": head.variances, "share": jnp.reshape(head.share, (1,))}
        return {**_arrays(head.prior), **{name: np.asarray(array, np.float32) for name, array in own.items()}}
    return {"weights": np.asarray(head.weights, np.float32), "bias": np.asarray(head.bias, np.float32)}


def _head(arrays: dict[str, np.ndarray], form: Any, logit_scale: float) -> AnyHead:
    if form == PROXIES:
        # Files of proxies hold no temperature: it is that of `proxy.fit`, 4 over the logit scale.
        return linear(normalize(jnp.asarray(arrays["proxies"])), jnp.float32(VISION / logit_scale))
    if form != FORMAT:
        raise ValueError(f"its format is {form!r}")
    own = {name: jnp.asarray(array) for name, array in arrays.items()}
    prior = Head(own["weights"], own["bias"])
    # A linear head; the posterior of a Gaussian one was of other images and is not in the file.
    if "means" not in own:
        return prior
    return GaussianHead(prior, own["means"], own["variances"], own["share"][0], None)


def _check(kept: KeptHead, where: str) -> None:
    arrays, named = _arrays(kept.head), len(kept.class_names)
    dim = width(kept.head)
    wanted = {"bias": (named,), "share": (1,)}  # all others are [C,E]
    for name, array in arrays.items():
        expected = wanted.get(name, (named, dim))
        if array.shape != expected:
            raise DataError(f"{where}: {name} have shape {array.shape}, expected {expected} for {named} class names")
        if not np.isfinite(array).all():
            raise DataError(f"{where}: {name} hold values that are not finite")
