"""Prompts and interrupted trainings on disk: arrays as safetensors, everything else as JSON in the same file's header.

One file a prompt, written atomically. It names the checkpoint it was made with by fingerprint; it can be loaded onto
any checkpoint of the same widths, with a warning when it is another one.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxzs.clip import Model
from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.params import flatten, unflatten
from jaxzs.errors import DataError
from jaxzs.files import read_arrays, write_arrays
from jaxzs.prompt.joint import JointPrompt
from jaxzs.prompt.modality import Modality, Prompts
from jaxzs.prompt.text import TextPrompt
from jaxzs.prompt.visual import VisualPrompt

MODALITIES: dict[str, Any] = {"text": TextPrompt, "image": VisualPrompt, "joint": JointPrompt}
FORMAT = "jaxzs.prompt/1"
_LARGEST = 1e12  # a LayerNorm squares: beyond 1e19 nothing is left of the float32 features, at 1e12 all are alike


@dataclasses.dataclass(frozen=True)
class TunedPrompt:
    """One run's prompts and what is needed to use them.

    prompts: the pytree of the modality. class_names: C names in the order of the logits. template: for the class
    features of a visual prompt. fingerprint: of the checkpoint. settings: how it was trained, as JSON values.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> tuned.class_names, tuned.settings
    (('one', 'two'), {})
    """

    modality: Modality
    prompts: Prompts
    class_names: tuple[str, ...]
    template: str
    fingerprint: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_prompt(path: str | Path, tuned: TunedPrompt) -> None:
    """Write one prompt, atomically. Raises `DataError` when the place cannot be written.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> prompt.save_prompt("digits.safetensors", tuned)
    >>> prompt.load_prompt("digits.safetensors", model).class_names
    ('one', 'two')
    """
    values = {
        "format": FORMAT,
        "modality": describe(tuned.modality),
        "class_names": list(tuned.class_names),
        "template": tuned.template,
        "fingerprint": tuned.fingerprint,
        "settings": tuned.settings,
    }
    write_arrays(path, dict(flatten(tuned.prompts)), values)


def load_prompt(path: str | Path, model: Model) -> TunedPrompt:
    """Read a prompt for use with `model`.

    Raises `DataError` when the file is no prompt, is damaged, or was made for a checkpoint of other widths; warns
    when it was made with another checkpoint of the same widths.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> prompts = modality.init(jax.random.key(0), model.config)  # or one run of what `prompt.fit` returns
    >>> tuned = prompt.TunedPrompt(modality, prompts, ("one", "two"), "a photo of a {}", model.fingerprint)
    >>> prompt.save_prompt("digits.safetensors", tuned)
    >>> again = prompt.load_prompt("digits.safetensors", model)
    >>> bool((again.prompts["prefix"] == prompts["prefix"]).all())
    True
    """
    arrays, values = read_arrays(path, "`jaxzs tune`")
    if values.get("format") != FORMAT:
        raise DataError(f"{path} holds no prompt: it is not a file written by `jaxzs tune`")
    # A header of valid JSON may still be of anything: each part is looked at before it is used.
    try:
        modality = restore(values["modality"])
        names, template = values["class_names"], values["template"]
        fingerprint, settings = values["fingerprint"], dict(values["settings"])
        if not isinstance(names, list) or not all(isinstance(x, str) for x in (*names, template, fingerprint)):
            raise TypeError("class names, template and fingerprint must be texts")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the description of the prompt is damaged ({error!r})") from error
    # Before the fingerprint: other widths are an error, other weights of the same widths only a warning.
    check_shapes(arrays, modality, model.config, f"{path} does not fit this checkpoint")
    if fingerprint != model.fingerprint:
        warnings.warn(
            f"{path} was tuned with another checkpoint (fingerprint {fingerprint[:12]}, this one is "
            f"{model.fingerprint[:12]}); the widths agree, its accuracy need not",
            stacklevel=2,
        )
    return TunedPrompt(modality, unflatten(arrays), tuple(names), template, fingerprint, settings)


def check_shapes(arrays: dict[str, np.ndarray], modality: Modality, config: CLIPConfig, what: str) -> None:
    """`DataError` listing every array that is missing, too many, or of another shape than the modality's."""
    wanted = jax.eval_shape(lambda key: modality.init(key, config), jax.random.key(0))  # shapes only, nothing is drawn
    expected = {name: leaf.shape for name, leaf in flatten(wanted)}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise DataError(
            f"{what} ({modality.name} prompt; text width {config.text.hidden_size}, vision width "
            f"{config.vision.hidden_size}): {'; '.join(wrong[:4])}. Use the checkpoint it was tuned with."
        )
    if any(array.dtype != np.float32 for array in arrays.values()):
        raise DataError(f"{what}: its arrays are not float32")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise DataError(f"{what}: it holds values that are not finite")
    largest = max(float(np.abs(array.astype(np.float64)).max(initial=0)) for array in arrays.values())
    if largest > _LARGEST:
        raise DataError(f"{what}: it holds values up to {largest:.0e}, a prompt that has diverged")


def describe(modality: Modality) -> dict[str, Any]:
    """A modality's settings as JSON values; `restore` is the inverse."""
    return {"name": modality.name, **dataclasses.asdict(modality)}  # type: ignore[call-overload]


def restore(values: dict[str, Any]) -> Modality:
    """The modality that `describe` described. Raises KeyError or TypeError."""
    options = dict(values)
    return MODALITIES[options.pop("name")](**options)
