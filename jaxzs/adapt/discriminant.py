"""Gaussian discriminant analysis on frozen features, with labels, without, and anchored to the text.

With labels: "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (ICLR 2024, arXiv 2402.04087). Without:
its EM. Anchored: each class mean is pulled to its text proxy, moved over the modality gap, as far as images are missing
(the anchors of StatA, arXiv 2501.03729, with the covariance of GDA): not published, see `docs/guides/adapting.md`.

Every round touches the images through sums only, R^T X [C,E] and two of [C]; X^T X [E,E] is taken once.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxzs.adapt.heads import Head, linear, probabilities
from jaxzs.adapt.images import Images, Shots, check_shots, number, over_images
from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import LabelSums, feature_sums, labelled_sums, sums_of
from jaxzs.proxy.rows import EXACT, Reduce, Rows, normalize
from jaxzs.proxy.sinkhorn import largest_of_row

# The published shrinkage divides by the number of images: of 50,000 the text alone would be left (on food10 repeated 25
# times 91.0 % instead of 93.7). More images than this weigh no less against the text.
MOST = 2000
NOTHING = 1e-6  # scatter of unit vectors below this share of their number, in all or in one direction, is rounding


class Numbers(NamedTuple):
    """Numbers that all forms share, [] float32 each."""

    temperature: jax.Array
    anchor: jax.Array
    weight: jax.Array


class Labelled(NamedTuple):
    """Sums over images with labels, soft or hard, and how many images are labelled c before all others: [C]."""

    sums: LabelSums
    winners: jax.Array


def winners_of(labels: jax.Array, mask: jax.Array) -> jax.Array:
    """How many rows of [B,C] have their largest entry in each class: [C] float32."""
    return jnp.sum(largest_of_row(labels) & mask[:, None], axis=0, dtype=jnp.float32)


def round_sums(rows: Rows, head: Head) -> tuple[jax.Array, jax.Array, jax.Array]:
    """R^T X [C,E], column sums of R [C] and winners [C] of a block, R = softmax(scores of `head`)."""
    labels = probabilities(head, rows)  # [B,C]
    return *labelled_sums(rows, labels), winners_of(labels, rows.mask)  # [C,E], [C], [C]


def shot_sums(features: jax.Array, labels: jax.Array, num_classes: int) -> Labelled:
    """The sums of checked shots: features [M,E] normalised, labels [M] (-1: does not count)."""
    hard = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)  # [M,C]; -1 is a row of zeros
    sums = sums_of(Rows(labels >= 0, features=features), hard)
    return Labelled(sums, sums.mass)  # of hard labels both counts are the same


def discriminant(means: jax.Array, scatter: jax.Array, ridge: jax.Array) -> Head:
    """x P mu^T - diag(mu P mu^T) / 2 with P = E (scatter + ridge tr(scatter) I)^-1: [C,E], [E,E], [] -> head.

    Of no scatter at all (one image), or of one that is rounding, nothing can be said: a head of zeros.
    """
    dim = means.shape[1]
    trace, identity = jnp.trace(scatter), jnp.eye(dim, dtype=jnp.float32)
    flat = trace <= 0
    # relative to its trace, so that float32 holds it whatever the number of images
    scatter = scatter / jnp.where(flat, 1, trace) + ridge * identity
    factor = jnp.linalg.cholesky(jnp.where(flat, identity, scatter))  # [E,E]
    # Sums over thousands of equal images round by more than the ridge allows for: to a spread below zero.
    flat = flat | ~jnp.isfinite(factor).all()
    factor = jnp.where(flat, identity, factor)
    solved = jax.scipy.linalg.cho_solve((factor, True), means.T).T * (dim / jnp.where(flat, 1, trace))
    weights = jnp.where(flat, 0, solved)  # [C,E]
    return Head(weights, -0.5 * jnp.sum(weights * means, axis=-1))


def anchored_means(observed: jax.Array, found: Labelled, text: jax.Array, anchor: jax.Array) -> jax.Array:
    """Class means [C,E], pulled to the text moved over the modality gap where few images are of the class."""
    sums, winners = found
    number = jnp.maximum(sums.num_images, 1)
    # Texts and images lie in different cones: unshifted, 290 classes of ImageNet fall from 72.2 to 56.8 %.
    gap = sums.total / number - jnp.matmul(sums.mass, text, precision=EXACT.precision) / number  # [E]
    # By images won and not by mass: crumbs of probability from all images must not make a mean of an absent class.
    trust = (winners / jnp.maximum(winners + anchor, 1e-12))[:, None]
    return trust * observed + (1 - trust) * (text + gap[None, :])


def scatter_around(means: jax.Array, sums: LabelSums) -> jax.Array:
    """sum_ic R_ic (x_i - mu_c)(x_i - mu_c)^T for any means: [E,E]."""
    cross = EXACT.by_class(sums.labelled, means)  # [E,E] sum over classes
    # Of the sums alone, X - mu[y] is never formed. For the classes' own means the three terms are -mu^T diag(n) mu.
    return sums.gram - cross - cross.T + EXACT.by_class(means * sums.mass[:, None], means)


def scatter_of_shots(shots: tuple[jax.Array, jax.Array], means: jax.Array) -> jax.Array:
    """The same of checked shots and their labels, from the differences, which do not cancel: [E,E]."""
    features, labels = shots
    away = jnp.where(labels[:, None] >= 0, features - means[labels], 0)  # [M,E]
    return EXACT.by_class(away, away)


def unless_nothing(scatter: jax.Array, num_images: jax.Array, otherwise: jax.Array | float = 0) -> jax.Array:
    """The scatter [E,E] of so many images, or another one where it is rounding, whose inverse would be any noise."""
    return jnp.where(jnp.trace(scatter) > NOTHING * num_images, scatter, otherwise)


def ridge_of_sums(ridge: jax.Array, scatter: jax.Array, num_images: jax.Array) -> jax.Array:
    """At least what `scatter_around` has of rounding in any direction, relative to the trace as `ridge` []."""
    # Of unit vectors: the differences of their sums round by what N rounds by, however near the images lie.
    least = NOTHING * jnp.maximum(num_images, 1)
    return jnp.maximum(ridge, least / jnp.maximum(jnp.trace(scatter), least))


def observed_means(sums: LabelSums) -> jax.Array:
    """Means of the images with their labels, 0 of a class without any: [C,E]."""
    return sums.labelled / jnp.maximum(sums.mass, 1e-30)[:, None]


def beside_text(
    means: jax.Array, scatter: jax.Array, num_images: jax.Array, text: jax.Array, numbers: Numbers, *, exact: bool
) -> Head:
    """The text's scores plus `weight` times the discriminant. exact: the scatter is one of differences, not of sums."""
    size = jnp.clip(num_images, 1, MOST)
    # P = E (n S + tr(S) I)^-1, S the covariance and n the number of images, but at most MOST.
    ridge = 1 / size if exact else ridge_of_sums(1 / size, scatter, num_images)
    added = discriminant(means, scatter * (size / jnp.maximum(num_images, 1)), ridge)
    return jax.tree.map(lambda prior, own: prior + numbers.weight * own, linear(text, numbers.temperature), added)


@jax.jit
def anchored_head(found: Labelled, text: jax.Array, numbers: Numbers) -> Head:
    """`beside_text` of anchored means, with the covariance around the observed ones."""
    import chex

    sums = found.sums
    chex.assert_equal_shape([text, sums.labelled])  # [C,E]; at trace time, so for nothing
    chex.assert_shape([sums.mass, found.winners], text.shape[:1])
    observed = observed_means(sums)
    means = anchored_means(observed, found, text, numbers.anchor)  # [C,E]
    # Around the observed means, as in `gda`; around the anchored ones accuracy is 0.2 points less on average. Those
    # only where each image is its class: then they alone have any spread.
    loose = unless_nothing(scatter_around(means, sums), sums.num_images)
    scatter = unless_nothing(scatter_around(observed, sums), sums.num_images, loose)
    return beside_text(means, scatter, sums.num_images, text, numbers, exact=False)


def anchored_rounds(reduce: Reduce, text: jax.Array, numbers: tuple[Numbers, jax.Array, Any], _: Any = ()) -> Head:
    """Labels from the head, the head from labels, in turn. With shots, theirs stay as they are."""
    # X^T X and the sum of X do not depend on labels: one pass, before the rounds.
    return rounds_of(reduce, text, numbers, reduce(feature_sums))


def rounds_of(
    reduce: Reduce, text: jax.Array, numbers: tuple[Numbers, jax.Array, Any], fixed: tuple[jax.Array, ...]
) -> Head:
    """`anchored_rounds` with the `feature_sums` of the images."""
    own, rounds, shots = numbers
    known = None if shots is None else shot_sums(shots[0], shots[1], text.shape[0])  # labels that no round changes

    def one(_: Any, head: Head) -> Head:
        labelled, mass, winners = reduce(round_sums, head)  # [C,E], [C], [C]
        found = Labelled(LabelSums(labelled, mass, *fixed), winners)
        if known is not None:
            found = jax.tree.map(jnp.add, found, known)
        return anchored_head(found, text, own)

    # Begins with the text's labels; each round is one pass over the images.
    return reduce.loops.fori_loop(0, rounds, one, linear(text, own.temperature))


def anchored_gda(
    image_features: Images,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    rounds: int = 5,
    anchor: ArrayLike = 1.0,
    shots: Shots | None = None,
    mask: ArrayLike | None = None,
) -> Head:
    """Discriminant analysis without labels, its class means anchored to the text: safe where classes are absent.

    Not published: the covariance of arXiv 2402.04087 with the anchors of StatA (arXiv 2501.03729, equation 9).

    Args:
      image_features: X [N,E], any float type; L2-normalised here. Rows sharded over "data" stay where they are: one
        all-reduce a round. Or a function that gives chunks [n,E] for every pass, such as `FeatureStore.features`.
      text_proxies: Z [C,E], any float type; L2-normalised here.
      temperature: > 0 of the text; 1/s for a checkpoint of logit scale s.
      rounds: of labels and means in turn; 5 is enough.
      anchor: > 0, images that the text counts for in each class mean.
      shots: images with labels beside those of `image_features`: each counts as one image of its class.
      mask: [N] bool, False for padding.

    Returns:
      `Head`.

    Raises:
      DataError: shapes that do not fit, values that are not finite, no images.
      LabelError: labels of shots out of range.
      ConfigError: options out of range.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> head = adapt.anchored_gda(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    >>> adapt.scores(head, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    numbers = _numbers(temperature, anchor, 1.0)
    checks.whole_number(rounds, "rounds")  # traced: one program for any number
    checked = None if shots is None else check_shots(shots, *_shape(text_proxies))
    return over_images(anchored_rounds, image_features, text_proxies, (numbers, jnp.int32(rounds), checked), mask=mask)


def few_shot(
    shot_features: ArrayLike,
    shot_labels: ArrayLike,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    anchor: ArrayLike = 4.0,
    weight: ArrayLike = 0.3,
) -> Head:
    """A few labelled images beside the text; no validation data, from one shot on, also of some classes only.

    Not published: `gda` with anchored means. With unlabelled images too: `anchored_gda(..., shots=adapt.Shots(...))`.

    Args:
      shot_features: V [M,E], any float type; L2-normalised here.
      shot_labels: [M] int in 0..C-1; rows of a negative label do not count (padding).
      text_proxies: Z [C,E], any float type; L2-normalised here.
      temperature: > 0 of the text.
      anchor: > 0, images that the text counts for in each class mean.
      weight: >= 0 of the shots against the text.

    Returns:
      `Head`; the text's where there is one shot alone, which has no spread. Classes with many shots win images of
      those without.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      LabelError: labels out of range.
      ConfigError: options out of range.

    >>> shots, labels = jnp.array([[1.0, 0.1], [0.1, 1.0]]), jnp.array([0, 1])
    >>> head = adapt.few_shot(shots, labels, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    >>> adapt.scores(head, jnp.array([[1.0, 0.0], [0.0, 1.0]])).argmax(-1).tolist()
    [0, 1]
    """
    numbers = _numbers(temperature, anchor, weight)
    text, shots = _text_and_shots(text_proxies, shot_features, shot_labels)
    return _few_shot(text, shots, numbers)


@jax.jit
def _few_shot(text: jax.Array, shots: tuple[jax.Array, jax.Array], numbers: Numbers) -> Head:
    text = normalize(text)
    found = shot_sums(*shots, text.shape[0])
    means = anchored_means(observed_means(found.sums), found, text, numbers.anchor)  # [C,E]
    # One shot a class is its own mean: only around the anchored means is there any spread.
    scatter = unless_nothing(scatter_of_shots(shots, means), found.sums.num_images)
    return beside_text(means, scatter, found.sums.num_images, text, numbers, exact=True)


def gda(
    shot_features: ArrayLike,
    shot_labels: ArrayLike,
    text_proxies: ArrayLike,
    *,
    alpha: ArrayLike,
    temperature: ArrayLike = 0.01,
) -> Head:
    """Discriminant analysis on labelled images, as published: arXiv 2402.04087, equations 5 to 7.

    Args:
      shot_features: V [M,E], any float type; L2-normalised here.
      shot_labels: [M] int in 0..C-1; rows of a negative label do not count (padding).
      text_proxies: Z [C,E], any float type; L2-normalised here.
      alpha: >= 0, weight against the text. The paper chooses it of 1e-4 to 1e2 on labelled validation images; no one
        value serves all data. Without such images use `few_shot`.
      temperature: > 0 of the text.

    Returns:
      `Head`. One shot a class has no covariance: the scores are the text's, less a constant. A class without shots has
      a mean of 0 and is hardly ever predicted, but for an alpha near 0 (`few_shot` gives it one by its text).

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      LabelError: labels out of range.
      ConfigError: options out of range.

    >>> shots = jnp.array([[1.0, 0.1], [1.0, 0.3], [0.1, 1.0], [0.2, 1.0]])
    >>> head = adapt.gda(shots, jnp.array([0, 0, 1, 1]), jnp.array([[1.0, 0.9], [0.9, 1.0]]), alpha=1.0)
    >>> adapt.scores(head, shots).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    numbers = _numbers(temperature, 1.0, alpha)
    text, shots = _text_and_shots(text_proxies, shot_features, shot_labels)
    return _gda(text, shots, numbers)


@jax.jit
def _gda(text: jax.Array, shots: tuple[jax.Array, jax.Array], numbers: Numbers) -> Head:
    text = normalize(text)
    sums, _ = shot_sums(*shots, text.shape[0])
    means = observed_means(sums)  # [C,E]
    scatter = unless_nothing(scatter_of_shots(shots, means), sums.num_images)
    own = discriminant(means, scatter, published_ridge(sums))  # [C,E], [C]
    prior = linear(text, numbers.temperature)
    # log prior of balanced classes; changes no prediction, kept to have the published scores.
    uniform = -jnp.log(jnp.float32(text.shape[0]))
    return Head(prior.weights + numbers.weight * own.weights, prior.bias + numbers.weight * (own.bias + uniform))


def published_ridge(sums: LabelSums) -> jax.Array:
    """The official shrinkage, tr(cov) beside (M-1) cov, relative to the trace of the scatter: []."""
    return 1 / jnp.maximum(sums.num_images - 1, 1)


def gda_em(
    image_features: Images,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    rounds: int = 10,
    prior: Literal["uniform", "count"] = "uniform",
    mask: ArrayLike | None = None,
) -> Head:
    """Discriminant analysis without labels, by EM from the text's labels: arXiv 2402.04087, section 3.3.

    Collapses where classes are absent; `anchored_gda` does not. Arguments and errors as there, and prior: of classes,
    "uniform" or as they were "count"ed in the round before.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> head = adapt.gda_em(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    >>> adapt.scores(head, x).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    if prior not in ("uniform", "count"):
        raise ConfigError(f'prior is {prior!r}; expected "uniform" or "count"')
    numbers = _numbers(temperature, 1.0, 1.0)
    checks.whole_number(rounds, "rounds")
    own = numbers.temperature, jnp.int32(rounds)
    return over_images(em_rounds, image_features, text_proxies, own, prior, mask=mask)


def em_rounds(reduce: Reduce, text: jax.Array, numbers: tuple[jax.Array, jax.Array], kind: str) -> Head:
    """Expectation and maximisation in turn."""
    temperature, rounds = numbers
    fixed, start = reduce(feature_sums), linear(text, temperature)

    def one(_: Any, head: Head) -> Head:
        labelled, mass, _winners = reduce(round_sums, head)
        sums = LabelSums(labelled, mass, *fixed)
        # A class without images keeps its text.
        means = jnp.where(mass[:, None] < 1e-3, text, observed_means(sums))
        scatter = unless_nothing(scatter_around(means, sums), sums.num_images)
        own = discriminant(means, scatter, ridge_of_sums(published_ridge(sums), scatter, sums.num_images))
        # One image more for each class, else the prior of an absent one is -inf for good.
        counted = jnp.log((mass + 1) / jnp.sum(mass + 1)) if kind == "count" else jnp.zeros_like(mass)
        return Head(start.weights + own.weights, own.bias + counted)

    return reduce.loops.fori_loop(0, rounds, one, start)


def _numbers(temperature: Any, anchor: Any, weight: Any) -> Numbers:
    return Numbers(number(temperature, "temperature"), number(anchor, "anchor"), number(weight, "weight", 0))


def _shape(text_proxies: ArrayLike) -> tuple[int, int]:
    rows, dim = checks.matrix(text_proxies, "text_proxies", "[C,E]").shape
    return rows, dim


def _text_and_shots(
    text_proxies: ArrayLike, features: ArrayLike, labels: ArrayLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    text = checks.text(text_proxies, np.shape(text_proxies)[-1] if np.ndim(text_proxies) else 0)
    return text, check_shots(Shots(features, labels), *text.shape)
