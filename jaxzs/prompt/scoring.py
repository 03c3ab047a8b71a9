"""Scoring images: logits under the prompts of every run, and without any, a batch at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip.model import logits_per_image
from jaxzs.prompt.modality import Frozen, Prompts, Task, check_task
from jaxzs.prompt.prepare import equal_batches


def score(task: Task, prompts: Prompts, frozen: Frozen, images: jax.Array, *, batch_size: int = 64) -> np.ndarray:
    """Logits of all images under the prompts of every run: images [N,...], prompts [R,...] -> [R,N,C] float32.

    Scaled cosines, computed `batch_size` images at a time. images: as `constant_images` made them for this modality.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> prompts = modality.init(jax.random.key(0), model.config)
    >>> one_run = jax.tree.map(lambda leaf: leaf[None], prompts)
    >>> prompt.score(prompt.Task(modality, model.config), one_run, frozen, images).shape
    (1, 30, 3)
    """
    check_task(task)
    classes = _class_features(task, prompts, frozen)  # [R,C,E], once for all images
    # Each batch goes to the host at once: the device need not hold [R,N,C].
    parts = [
        np.asarray(_batch_logits(task, prompts, classes, frozen, images, rows))[:, :real]  # [R,B,C]
        for rows, real in equal_batches(len(images), batch_size)
    ]
    return np.concatenate(parts, axis=1)  # [R,N,C]


@jax.jit
def _class_features(task, prompts, frozen):
    one = lambda p: task.modality.class_features(p, frozen, task.config, task.numerics)  # noqa: E731
    return jax.vmap(one)(prompts)  # [R,C,E]


@jax.jit
def _batch_logits(task, prompts, classes, frozen, images, rows):
    def one(prompts, classes):
        features = task.modality.image_features(prompts, frozen, images[rows], task.config, task.numerics)  # [B,E]
        return logits_per_image(features, classes, jnp.asarray(frozen.params["logit_scale"]))  # [B,C]

    return jax.vmap(one)(prompts, classes)  # [R,B,C]


def plain_logits(
    task: Task, class_features: jax.Array, frozen: Frozen, images: jax.Array, *, batch_size: int = 64
) -> np.ndarray:
    """Logits of all images without any prompt: images [N,...], class_features [C,E] -> [N,C] float32.

    task, frozen, images: of one modality, as `freeze` and `constant_images` made them. This is zero-shot CLIP, which
    gives the first pseudolabels.

    >>> model, modality = jaxzs.load("demo"), prompt.TextPrompt(length=4)
    >>> source = data.open_source("photos")
    >>> frozen = prompt.freeze(model, modality, source.label_names)
    >>> images, labels = prompt.read_source(model, modality, source)
    >>> prompt.plain_logits(prompt.Task(modality, model.config), frozen.text_features, frozen, images).shape
    (30, 3)
    """
    check_task(task)
    parts = [
        np.asarray(_plain_batch(task, class_features, frozen, images, rows))[:real]  # [B,C]
        for rows, real in equal_batches(len(images), batch_size)
    ]
    return np.concatenate(parts)  # [N,C]


@jax.jit
def _plain_batch(task, class_features, frozen, images, rows):
    features = task.modality.plain_features(frozen, images[rows], task.config, task.numerics)  # [B,E]
    return logits_per_image(features, class_features, jnp.asarray(frozen.params["logit_scale"]))  # [B,C]
