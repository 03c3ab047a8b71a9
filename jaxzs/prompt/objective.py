"""The training objective of every paradigm: two groups of a batch, each group's mean cross-entropy, two weights.

Group one is what is labelled (SSL) or of a seen class (TRZSL); group two is what is pseudolabelled (SSL, UL) or of an
unseen class (TRZSL). Menghini et al. 2023 (arXiv 2306.01669), and their released code where the two differ.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxzs.errors import DataError

Paradigm = Literal["ssl", "trzsl", "ul"]
Strategy = Literal["labelled", "fpl", "ifpl", "grip"]
Convention = Literal["code", "paper"]
PARADIGMS: tuple[Paradigm, ...] = ("ssl", "trzsl", "ul")
STRATEGIES: tuple[Strategy, ...] = ("labelled", "fpl", "ifpl", "grip")


def loss(
    logits: jax.Array,
    labels: jax.Array,
    in_second_group: jax.Array,
    weights: tuple[jax.Array | float, jax.Array | float] = (1.0, 1.0),
    mask: jax.Array | None = None,
    class_mask: jax.Array | None = None,
) -> jax.Array:
    """w_first * CE(first group) + w_second * CE(second group), scalar; an empty group counts 0.

    Args:
      logits: [B,C] float32, scaled cosines.
      labels: [B] integer; ignored where mask is False.
      in_second_group: [B] bool.
      weights: (w_first, w_second), of `balance_weights`.
      mask: [B] bool, False for padding.
      class_mask: [C] bool, the classes that compete; all by default (labelled-only TRZSL: the seen ones).

    Means run over the members that are in the batch, so a group's weight does not depend on its size there.

    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 1])
    >>> round(float(prompt.loss(logits, labels, jnp.array([False, False]))), 4)  # ln 4, no second group
    1.3863
    """
    if class_mask is not None:
        logits = jnp.where(class_mask[None], logits, -jnp.inf)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    present = jnp.ones(labels.shape, bool) if mask is None else mask
    first = jnp.logical_and(present, ~in_second_group)
    second = jnp.logical_and(present, in_second_group)
    return weights[0] * _mean_of(-picked, first) + weights[1] * _mean_of(-picked, second)


def _mean_of(values: jax.Array, members: jax.Array) -> jax.Array:
    total = jnp.where(members, values, 0.0).sum()
    return total / jnp.maximum(members.sum(), 1).astype(values.dtype)


def balance_weights(
    paradigm: Paradigm,
    strategy: Strategy,
    modality: str,
    num_labelled: int,
    num_pseudo: int,
    convention: Convention = "code",
) -> tuple[float, float]:
    """Weights (w_first, w_second) of the two groups of `loss`.

    Args:
      paradigm: "ssl", "trzsl" or "ul".
      strategy: "labelled", "fpl", "ifpl" or "grip".
      modality: "text", "image" or "joint".
      num_labelled: size of the labelled training list, |L|.
      num_pseudo: size of the pseudolabelled training list, |U|.
      convention: "code" is what the released code does: SSL weighs labels |U|/|L| in FPL but |L|/|U| in IFPL and
        GRIP (a helper written for TRZSL is reused there), TRZSL weighs pseudolabels |L|/|U|, and joint FPL takes
        the square root. "paper" balances the two terms alike everywhere: SSL |U|/|L| on labels,
        TRZSL |L|/|U| on pseudolabels.

    Labels alone give (1, 0), UL gives (0, 1) in both. Raises `DataError` if a list is empty.

    >>> prompt.balance_weights("ssl", "fpl", "text", num_labelled=160, num_pseudo=1280)
    (8.0, 1.0)
    >>> prompt.balance_weights("ssl", "grip", "text", num_labelled=160, num_pseudo=1280)
    (0.125, 1.0)
    """
    _check_choice("paradigm", paradigm, PARADIGMS)
    _check_choice("strategy", strategy, STRATEGIES)
    _check_choice("balance", convention, ("code", "paper"))
    if strategy == "labelled":
        return 1.0, 0.0
    if num_pseudo < 1:
        raise DataError("no image was pseudolabelled: the unlabelled pool or K is too small")
    if paradigm == "ul":
        return 0.0, 1.0
    if num_labelled < 1:
        raise DataError(f"paradigm {paradigm!r} needs labelled images, none were given")
    ratio = num_pseudo / num_labelled if paradigm == "ssl" else num_labelled / num_pseudo
    if convention == "code" and strategy == "fpl" and modality == "joint":
        ratio = ratio**0.5
    if convention == "code" and strategy != "fpl" and paradigm == "ssl":
        ratio = 1 / ratio
    return (ratio, 1.0) if paradigm == "ssl" else (1.0, ratio)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
