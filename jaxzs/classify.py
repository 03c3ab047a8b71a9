"""The model-level call: unlabelled image features and class names in, labels with scores out.

Zero-shot (Radford et al. 2021, arXiv 2103.00020), or with vision proxies learned from these very images
(InMaP, Qian et al. 2023, arXiv 2310.19752: transductive, no labels).
"""

from __future__ import annotations

import functools
import os
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import proxy
from jaxzs.clip import Model
from jaxzs.errors import DataError, LabelError
from jaxzs.proxy.settings import Solver
from jaxzs.zeroshot import check_rows, similarity

Method = Literal["zero-shot", "proxy", "learned"]
FEW_IMAGES_PER_CLASS = 10
_BLOCK = 4_000_000  # similarities held at once when labels are read off


class Classification(NamedTuple):
    """Labels of N images.

    classes [N,k] int32: most similar first. scores [N,k]: softmax over all classes, 0 to 1. proxies [C,E]: what the
    images were compared with. method: the one really used. notes: warnings for the user, empty when all is well.
    """

    classes: np.ndarray
    scores: np.ndarray
    proxies: jax.Array
    method: Method
    notes: tuple[str, ...]


def classify(
    model: Model,
    image_features: jax.Array,
    text_proxies: jax.Array,
    *,
    method: Method = "proxy",
    gamma: float | Literal["auto"] = "auto",
    solver: Solver = "fast",
    top: int = 1,
    seed: int = 0,
) -> Classification:
    """Classify images by text proxies, or by vision proxies learned from the images themselves.

    Args:
      model: the checkpoint that made the features; its logit scale s gives the temperatures 1/s (text) and 4/s
        (vision), the paper's 0.01 and 0.04 at s = 100.
      image_features: [N,E], of all images to classify (the proxies are learned on them).
      text_proxies: [C,E], from `zeroshot.text_proxies`; for "learned" vision proxies.
      method: "proxy", "zero-shot" for the text proxies as they are, or "learned" for vision proxies that are there
        already (`proxy.load_proxies`). One image alone is never learned from, but classified zero-shot.
      gamma: assumed class balance: 0 uniform, 1 as the text proxies predict, "auto" chosen without labels (a
        uniform marginal would turn a folder of cats half into dogs).
      solver: of `proxy.Settings`.
      top: number of classes returned for each image.
      seed: of the halves that "auto" compares.

    Returns:
      `Classification`.

    Raises:
      LabelError: fewer than two classes, or more than memory allows.
      DataError: no images, features of another width, rows that are not finite or zero.

    >>> model = jaxzs.load("demo")
    >>> text = zeroshot.text_proxies(model, ["zero", "one"], ["the digit {}"])
    >>> classify(model, text, text, method="zero-shot").classes[:, 0].tolist()
    [0, 1]
    """
    num_images, num_classes = len(image_features), len(text_proxies)
    if num_images == 0:
        raise DataError("there are no images to classify")
    check_number_of_classes(num_classes, text_proxies.shape[1])
    check_rows(image_features, "image")
    check_rows(text_proxies, "proxy")
    if top < 1:
        raise LabelError(f"top is {top}, expected at least 1")
    method, notes = _usable_method(method, num_images, num_classes)
    proxies = text_proxies
    temperature = (1 if method == "zero-shot" else 4) / model.logit_scale
    if method == "proxy":
        fitted = proxy.fit(
            image_features,
            text_proxies,
            proxy.Settings(gamma=gamma, solver=solver),
            logit_scale=model.logit_scale,
            key=jax.random.key(seed),
        )
        proxies = fitted.proxies
    classes, scores = top_classes(image_features, proxies, temperature=temperature, top=min(top, num_classes))
    return Classification(classes, scores, proxies, method, notes)


def _usable_method(method: Method, num_images: int, num_classes: int) -> tuple[Method, tuple[str, ...]]:
    """The method that this number of images allows, and what the user should know about it."""
    if method != "proxy":
        return method, ()
    if num_images == 1:
        return "zero-shot", ("one image only: proxies are learned from many; classified zero-shot",)
    if num_images < num_classes:
        return method, (
            f"{num_images} images for {num_classes} classes: fewer images than classes, learned "
            "proxies may be worse than zero-shot (--method zero-shot)",
        )
    if num_images < FEW_IMAGES_PER_CLASS * num_classes:
        return method, (
            f"{num_images} images for {num_classes} classes: with fewer than about "
            f"{FEW_IMAGES_PER_CLASS} images a class, compare with --method zero-shot",
        )
    return method, ()


def check_number_of_classes(num_classes: int, width: int) -> None:
    """Raise `LabelError` for one class (nothing to tell apart) or more than the host's memory can hold."""
    if num_classes < 2:
        raise LabelError(
            "one class only: every image would be given it. Name at least two, e.g. what the "
            "images could be confused with"
        )
    needed = 12 * 4 * num_classes * width  # the solver's directions, gradients and transports
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise LabelError(
            f"{num_classes:,} classes need about {needed / 2**30:,.0f} GiB, this machine has "
            f"{memory / 2**30:,.0f} GiB: at most {memory // (12 * 4 * width):,} classes"
        )


def top_classes(
    image_features: jax.Array, proxies: jax.Array, *, temperature: float, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Best classes and their softmax scores, by blocks of images: [N,E], [C,E] -> ([N,k] int32, [N,k])."""
    rows = max(1, _BLOCK // len(proxies))
    blocks = [
        _top_of_block(image_features[start : start + rows], proxies, temperature, top)
        for start in range(0, len(image_features), rows)
    ]
    classes, scores = zip(*blocks, strict=True)
    return np.concatenate(classes), np.concatenate(scores)


@functools.partial(jax.jit, static_argnames="top")
def _top_of_block(image_features, proxies, temperature, top):
    scores = jax.nn.softmax(similarity(image_features, proxies) / jnp.float32(temperature), axis=-1)
    best, classes = jax.lax.top_k(scores, top)
    return classes, best
