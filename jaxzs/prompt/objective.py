"""The training objective of every paradigm: two groups of a batch, each group's mean cross-entropy, two weights.

Group one is what is labelled (SSL) or of a seen class (TRZSL); group two is what is pseudolabelled (SSL, UL) or of an
unseen class (TRZSL). Menghini et al. 2023 (arXiv 2306.01669), and their released code where the two differ.
"""

from __future__ import annotations

from math import inf
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import DataError, LabelError

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
    """w_first * CE(first group) + w_second * CE(second group), scalar float32; an empty group counts 0.

    Args:
      logits: [B,C] float, scaled cosines.
      labels: [B] integer in 0..C-1; ignored where mask is False.
      in_second_group: [B] bool.
      weights: (w_first, w_second), of `balance_weights`; a group of weight 0 is not looked at.
      mask: [B] bool, False for padding, whose logits may be anything: neither value nor gradient sees them.
      class_mask: [C] bool, the classes that compete; all by default (labelled-only TRZSL: the seen ones).

    Means run over the members that are in the batch, so a group's weight does not depend on its size there.

    Raises `DataError` for unfit shapes, types and logits, `LabelError` for a label that is no class or does not
    compete. Values can be looked at only outside of `jit`: inside, the loss of such a label is NaN or infinite.

    >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 1])
    >>> round(float(prompt.loss(logits, labels, jnp.array([False, False]))), 4)  # ln 4, no second group
    1.3863
    """
    logits, labels, second = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(in_second_group)
    present = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask)  # [B]
    competing = jnp.ones(logits.shape[-1:], bool) if class_mask is None else jnp.asarray(class_mask)  # [C]
    _check_loss(logits, labels, second, present, competing)
    if any(not isinstance(weight, jax.core.Tracer) and not np.isfinite(weight) for weight in weights):
        raise DataError(f"weights are {weights}, expected finite numbers")
    # A group of weight 0 counts for nothing, whatever is in it: NaN, or labels that are no classes.
    weighs = [jnp.not_equal(weight, 0) for weight in weights]
    counted = jnp.logical_and(present, jnp.where(second, weighs[1], weighs[0]))  # [B]
    _check_members(logits, labels, counted, competing)
    # Rows that do not count get harmless logits before anything is computed: 0 x NaN and 0 x inf are NaN.
    logits = jnp.where(competing[None], logits.astype(jnp.float32), -jnp.inf)  # [B,C]
    logits = jnp.where(counted[:, None], logits, 0.0)  # [B,C]
    C = logits.shape[1]
    # Inside of a trace labels cannot be checked: one outside of the classes gives NaN, not another class's loss.
    known = jnp.logical_and(labels >= 0, labels < C)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.clip(labels, 0, C - 1)[:, None], axis=1)[:, 0]  # [B]
    entropy = -jnp.where(known, picked, jnp.nan)  # [B]
    first = jnp.logical_and(counted, ~second)
    second = jnp.logical_and(counted, second)
    return weights[0] * _mean_of(entropy, first) + weights[1] * _mean_of(entropy, second)


def _mean_of(values: jax.Array, members: jax.Array) -> jax.Array:
    total = jnp.where(members, values, 0.0).sum()
    return total / jnp.maximum(members.sum(), 1).astype(values.dtype)  # an empty group is 0 / 1, not NaN


def _check_loss(
    logits: jax.Array, labels: jax.Array, second: jax.Array, present: jax.Array, competing: jax.Array
) -> None:
    """Shapes and types, which a trace knows, too."""
    if logits.ndim != 2 or not logits.shape[1] or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise DataError(f"logits are {logits.dtype} of shape {logits.shape}, expected floats [B,C]")
    B, C = logits.shape
    if labels.shape != (B,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise LabelError(f"labels are {labels.dtype} of shape {labels.shape}, expected {B} integers")
    for name, x, size in (("in_second_group", second, B), ("mask", present, B), ("class_mask", competing, C)):
        if x.shape != (size,) or x.dtype != jnp.bool_:
            raise DataError(f"{name} is {x.dtype} of shape {x.shape}, expected {size} bool")


def _check_members(logits: jax.Array, labels: jax.Array, counted: jax.Array, competing: jax.Array) -> None:
    """Values of the rows that count, where there are values: not inside of a trace."""
    # What other processes hold cannot be read here, no more than a tracer.
    if any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in (labels, counted, competing)):
        return
    rows, allowed = np.flatnonzero(counted), np.asarray(competing)
    own = np.asarray(labels)[rows]
    outside = (own < 0) | (own >= len(allowed))
    wrong = np.flatnonzero(outside | ~allowed[np.clip(own, 0, len(allowed) - 1)])  # clipped only to be an index
    if len(wrong):
        row, label = rows[wrong[0]], own[wrong[0]]
        why = f"lies outside 0..{len(allowed) - 1}" if outside[wrong[0]] else "is of a class that does not compete"
        raise LabelError(f"label {label} of row {row} {why} ({len(wrong)} such labels); mask rows that do not count")
    # Under a gradient outside of `jit` the labels are values while the logits are traced.
    if isinstance(logits, jax.core.Tracer) or not logits.is_fully_addressable:
        return
    if not np.isfinite(np.asarray(logits.astype(jnp.float32))[rows][:, allowed]).all():
        raise DataError("logits are not finite; the prompts have diverged, or their checkpoint is damaged")


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
    if not 1 <= num_pseudo < inf:  # a comparison that NaN fails, too
        raise DataError("no image was pseudolabelled: the unlabelled pool or K is too small")
    if paradigm == "ul":
        return 0.0, 1.0
    if not 1 <= num_labelled < inf:
        raise DataError(f"paradigm {paradigm!r} needs labelled images, none were given")
    # In SSL the labelled, first group carries the ratio, in TRZSL the pseudolabelled, second one.
    ratio = num_pseudo / num_labelled if paradigm == "ssl" else num_labelled / num_pseudo
    # The released code takes a root for joint FPL only ...
    if convention == "code" and strategy == "fpl" and modality == "joint":
        ratio = ratio**0.5
    # ... and IFPL and GRIP reuse a helper that was written for TRZSL: in SSL it turns the ratio around.
    if convention == "code" and strategy != "fpl" and paradigm == "ssl":
        ratio = 1 / ratio
    return (ratio, 1.0) if paradigm == "ssl" else (1.0, ratio)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
