"""What training asks of a modality, and what is frozen around it.

A new modality is one new file: a hashable dataclass with the functions of `Modality`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, Params
from jaxzs.clip.model import logits_per_image
from jaxzs.errors import ConfigError, DataError

Prompts = Any  # a pytree of float32 arrays, the only thing that is trained


class Frozen(NamedTuple):
    """All that training reads and never changes, on device.

    params: the checkpoint's tree.
    input_ids: [C,1+K+M+1] int32, class names behind K places (`placeholder_ids`).
    text_features: [C,E] features of the template filled with each name, without a prompt.
    pseudolabel_features: [C,E] the same for the first pseudolabels, whose template may differ.
    """

    params: Params
    input_ids: jax.Array
    text_features: jax.Array
    pseudolabel_features: jax.Array


class Modality(Protocol):
    """A hashable dataclass of settings (a static argument of `jit`) with pure functions.

    name: "text", "image" or "joint"; learning_rate: the published default; length: K, tokens of a prefix.
    """

    @property
    def name(self) -> str: ...

    @property
    def learning_rate(self) -> float: ...

    @property
    def length(self) -> int: ...

    def init(self, key: jax.Array, config: CLIPConfig) -> Prompts:
        """Freshly drawn prompts."""
        ...

    def restart(self, key: jax.Array, config: CLIPConfig, initial: Prompts, last: Prompts) -> Prompts:
        """Where the authors' next iteration starts: from what the first started from, the last prompts, or anew."""
        ...

    def constant_images(
        self, params: Params, pixels: jax.Array, config: CLIPConfig, numerics: Numerics = ...
    ) -> jax.Array:
        """What of the images no prompt changes: pixels [B,S,S,3] -> [B,...]; computed once."""
        ...

    def plain_features(
        self, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = ...
    ) -> jax.Array:
        """Features without any prompt, of what `constant_images` returned: [B,E]."""
        ...

    def class_features(
        self, prompts: Prompts, frozen: Frozen, config: CLIPConfig, numerics: Numerics = ...
    ) -> jax.Array:
        """Text features [C,E] under the prompts, not normalised."""
        ...

    def image_features(
        self, prompts: Prompts, frozen: Frozen, images: jax.Array, config: CLIPConfig, numerics: Numerics = ...
    ) -> jax.Array:
        """Image features [B,E] under the prompts, not normalised, of what `constant_images` returned."""
        ...


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Task:
    """What is tuned, of which architecture, and how its products are computed: one static value.

    modality: settings of the prompt. config: of the checkpoint. numerics: type and precision of the towers' products.

    >>> task = prompt.Task(prompt.TextPrompt(length=4), jaxzs.load("demo").config)
    >>> task.modality.name, task.numerics
    ('text', Numerics(compute_dtype=None, precision=None))
    """

    modality: Modality
    config: CLIPConfig
    numerics: Numerics = Numerics()


def check_settings(modality: Modality, **least: float) -> None:
    """`ConfigError` unless these fields are numbers of at least so much, whole ones where the default is."""
    defaults = {field.name: field.default for field in dataclasses.fields(modality)}  # type: ignore[arg-type]
    for name, bound in least.items():
        value, kind = getattr(modality, name), type(defaults[name])
        # True is an int for Python, and no length.
        fits = not isinstance(value, bool) and isinstance(value, int | np.integer if kind is int else int | float)
        if not fits or not bound <= value < 2**31:
            wanted = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{name} of a {modality.name} prompt is {value!r}, expected {wanted} of at least {bound}")
    for name, default in defaults.items():
        if isinstance(default, bool) and not isinstance(getattr(modality, name), bool):
            raise ConfigError(f"{name} of a {modality.name} prompt is {getattr(modality, name)!r}, expected a bool")


def check_prefix(prefix: jax.Array, width: int, most: int | None = None) -> None:
    """`DataError` unless a prefix is [K,width] float with K at most so many, and finite where its values are known."""
    if prefix.ndim != 2 or prefix.shape[1] != width or not jnp.issubdtype(prefix.dtype, jnp.floating):
        raise DataError(f"the prefix is {prefix.dtype} of shape {prefix.shape}, expected floats [K,{width}]")
    if most is not None and len(prefix) > most:
        raise DataError(f"the prefix has {len(prefix)} vectors, the texts have room for {most}; see placeholder_ids")
    # Finite or not cannot be asked of a tracer, nor of what other processes hold.
    if not isinstance(prefix, jax.core.Tracer) and prefix.is_fully_addressable and not np.isfinite(prefix).all():
        raise DataError("the prefix is not finite: the prompt has diverged")


def check_task(task: Task) -> None:
    """`ConfigError` for what an earlier version took as the first argument."""
    if not isinstance(task, Task):
        raise ConfigError(
            f"the first argument is {type(task).__name__}, expected prompt.Task(modality, model.config); the "
            "configuration and numerics= are not passed apart any more"
        )


def class_logits(task: Task, prompts: Prompts, frozen: Frozen, images: jax.Array) -> jax.Array:
    """exp(logit_scale) * cosine of prompted image and class features: images [B,...] -> [B,C] float32.

    prompts: of one run. images: as `constant_images` made them for this modality.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> prompts = modality.init(jax.random.key(0), model.config)
    >>> task = prompt.Task(modality, model.config)
    >>> jax.jit(prompt.class_logits)(task, prompts, frozen, images).shape  # a task is static of itself
    (30, 3)
    """
    check_task(task)
    modality, config, numerics = task.modality, task.config, task.numerics
    # The scale is the checkpoint's own, 100 as published; it is not trained.
    return logits_per_image(
        modality.image_features(prompts, frozen, images, config, numerics),  # [B,E]
        modality.class_features(prompts, frozen, config, numerics),  # [C,E]
        jnp.asarray(frozen.params["logit_scale"]),
    )
