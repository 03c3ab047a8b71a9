"""StatA and TransCLIP: a Gaussian a class, the text as prior, and neighbours that agree.

StatA: "Realistic Test-Time Adaptation of Vision-Language Models" (CVPR 2025, arXiv 2501.03729). TransCLIP: "Boosting
Vision-Language Models with Transduction" (NeurIPS 2024, arXiv 2406.01837). Labels z and the Gaussians are updated in
turn. Without the graph, z is a function of the Gaussians alone, so that only sums over blocks of images are kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.adapt.discriminant import winners_of
from jaxzs.adapt.graph import blocks_of_rows, check_neighbours, graph_of, spread
from jaxzs.adapt.heads import GaussianHead, linear, probabilities, scores_of
from jaxzs.adapt.images import Images, number, over_images
from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.closed_form import labelled_sums
from jaxzs.proxy.rows import EXACT, Reduce, Rows, count, normalize, prepare
from jaxzs.proxy.sinkhorn import largest_of_row

LIKELIHOOD = 1 / 50  # what the official codes divide log-likelihood and neighbours by
INNER = 5  # Jacobi steps of the labels for given Gaussians
QUERIES = 8  # images that TransCLIP's first means are made of
SMALLEST = 1e-8  # variance; unit vectors of 512 features have 2e-3


class Numbers(NamedTuple):
    """All that may be traced, [] each: one program for any of them."""

    temperature: jax.Array
    laplacian: jax.Array
    anchor: jax.Array
    iterations: jax.Array
    soft: jax.Array


class Moments(NamedTuple):
    """Sums over the images with labels z."""

    labelled: jax.Array  # [C,E] z^T X
    squared: jax.Array  # [C,E] z^T (X * X)
    mass: jax.Array  # [C] sum of z
    winners: jax.Array  # [C] images whose largest label it is
    num_images: jax.Array  # []


def moments(rows: Rows, labels: jax.Array) -> Moments:
    """All sums of one block with labels [B,C], rows of padding 0."""
    labelled, mass = labelled_sums(rows, labels)
    squared = EXACT.by_class(labels, jnp.square(rows.features))  # [C,E]
    return Moments(labelled, squared, mass, winners_of(labels, rows.mask), count(rows))


def moments_of_head(rows: Rows, head: GaussianHead) -> Moments:
    """The same with the labels that a head gives: without the graph."""
    return moments(rows, probabilities(head, rows))


def text_moments(rows: Rows, text: jax.Array, temperature: jax.Array) -> Moments:
    """The same with the text's labels."""
    return moments(rows, probabilities(linear(text, temperature), rows))


def deviations(found: Moments, means: jax.Array) -> jax.Array:
    """sum_i z_ic (x_ie - mu_ce)^2: [C,E]; never [N,C,E]."""
    # The square written out, so that sums over images suffice for any means.
    around = found.squared - 2 * means * found.labelled + found.mass[:, None] * jnp.square(means)
    return jnp.maximum(around, 0)  # a sum of squares that rounding has made negative


# StatA


def stata_start(first: Moments, text: jax.Array, numbers: Numbers) -> GaussianHead:
    """Means are the text, and all classes share one diagonal variance around it."""
    shared = jnp.sum(deviations(first, text), axis=0) / jnp.maximum(first.num_images, 1)  # [E]
    variances = jnp.broadcast_to(jnp.maximum(shared, SMALLEST)[None, :], text.shape)  # [C,E]
    return GaussianHead(linear(text, numbers.temperature), text, variances, jnp.float32(LIKELIHOOD), None)


@jax.jit
def stata_update(head: GaussianHead, found: Moments, start: GaussianHead, numbers: Numbers) -> GaussianHead:
    """Means and variances of the labels, pulled to the text as far as images of the class are missing (equation 9)."""
    text, initial = start.means, start.variances
    # By winners as published: many small probabilities are no image.
    images = jnp.where(numbers.soft, found.mass, found.winners)
    trust = (images / (numbers.anchor + images + 1e-12))[:, None]  # [C,1] beta_c
    mass = jnp.maximum(found.mass, 1e-30)[:, None]
    means = normalize(trust * normalize(found.labelled / mass) + (1 - trust) * text)  # [C,E]
    # The second part is the spread of the anchor as seen from the new mean: var_0 + (Z - mu)^2.
    variances = trust * deviations(found, means) / mass + (1 - trust) * (initial + jnp.square(text - means))
    return head._replace(means=means, variances=jnp.maximum(variances, SMALLEST))


def stata_rounds(reduce: Reduce, text: jax.Array, numbers: Numbers, _: Any = ()) -> GaussianHead:
    """StatA without graph, by blocks of images: a pass a round."""
    start = stata_start(reduce(text_moments, text, numbers.temperature), text, numbers)

    def one(_: Any, head: GaussianHead) -> GaussianHead:
        return stata_update(head, reduce(moments_of_head, head), start, numbers)

    return reduce.loops.fori_loop(0, numbers.iterations, one, start)


def stata(
    image_features: Images,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    iterations: int = 10,
    neighbours: int = 3,
    laplacian: ArrayLike = 1.0,
    anchor: ArrayLike = 1.0,
    soft: bool = False,
    mask: ArrayLike | None = None,
) -> GaussianHead:
    """StatA: Gaussians anchored to the text, arXiv 2501.03729. Hardly ever below the text.

    Args:
      image_features: X [N,E], any float type; L2-normalised here. With neighbours=0 also a function that gives chunks
        [n,E] for every pass, such as `FeatureStore.features`; there is no posterior then.
      text_proxies: Z [C,E], any float type; L2-normalised here.
      temperature: > 0 of the text; 1/s for a checkpoint of logit scale s.
      iterations: updates of the Gaussians; 10 in the paper.
      neighbours: of each image in the graph; 0 for none, which needs no array of size N beside the features.
      laplacian: >= 0, weight of the graph.
      anchor: > 0, images that the text counts for in each class (alpha of equation 9).
      soft: count the images of a class by their probabilities instead of by their largest one.
      mask: [N] bool, False for padding.

    Returns:
      `GaussianHead`; predict with argmax of `.posterior` [N,C] on these images, of `adapt.scores` on others.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> adapt.stata(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]), neighbours=1).posterior.argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    numbers = as_numbers(temperature, laplacian, anchor, iterations, soft)
    check_neighbours(neighbours)
    if callable(image_features):
        if neighbours:
            raise ConfigError("chunks of features have no graph of neighbours: neighbours=0")
        return over_images(stata_rounds, image_features, text_proxies, numbers)
    # z is then a function of the Gaussians: sums by blocks, no labels [N,C] until the end.
    if neighbours == 0:
        head = over_images(stata_rounds, image_features, text_proxies, numbers, mask=mask)
        return _with_posterior(head, *checks.features_and_proxies(image_features, text_proxies, mask))
    return _stata(*checks.features_and_proxies(image_features, text_proxies, mask), numbers, neighbours)


@partial(jax.jit, static_argnums=4)
def _stata(x: jax.Array, text: jax.Array, mask: jax.Array, numbers: Numbers, neighbours: int) -> GaussianHead:
    """StatA with the graph: labels [N,C] of all images are kept."""
    rows, text = prepare(Rows(mask, features=x)), normalize(text)
    # var_0 is the spread of the images around the text, weighted by the text's labels.
    start = stata_start(text_moments(rows, text, numbers.temperature), text, numbers)
    update = lambda head, found: stata_update(head, found, start, numbers)  # noqa: E731
    return _transduce(rows, start, update, numbers, neighbours)


# TransCLIP


def transclip(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    *,
    temperature: ArrayLike = 0.01,
    iterations: int = 10,
    neighbours: int = 3,
    mask: ArrayLike | None = None,
) -> GaussianHead:
    """TransCLIP without labels: Gaussians of one shared variance, arXiv 2406.01837, section 3.

    Good where all classes are present in like numbers; where they are not it can lose more than half of what the text
    gets right (see the guide). Use `stata` or `fit` instead.

    Arguments, results and errors as `stata`. The official code cannot run where a class has no image; this one can.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> adapt.transclip(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]), neighbours=1).posterior.argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    numbers = as_numbers(temperature, iterations=iterations)
    check_neighbours(neighbours)
    return _transclip(*checks.features_and_proxies(image_features, text_proxies, mask), numbers, neighbours)


def transclip_start(rows: Rows, text: jax.Array, temperature: jax.Array) -> GaussianHead:
    """Means of the images that the text is surest of, in each class; variance 1/E."""
    prior, dim = linear(text, temperature), text.shape[1]
    sure = jnp.where(rows.mask[:, None], log_odds(scores_of(prior, rows.features)), -jnp.inf)
    # By log-odds: several of the surest have p = 1 in float32, and could not be told apart.
    best, index = jax.lax.top_k(sure.T, min(QUERIES, sure.shape[0]))  # [C,8]
    # shares of the 8: of a class that the text sees nowhere all probabilities are below float32
    shares = jnp.exp(jax.nn.log_sigmoid(best) - jax.nn.log_sigmoid(best[:, :1]))
    # [C,8] shares of features [C,8,E] -> [C,E]
    means = normalize(jnp.einsum("ck,cke->ce", shares, rows.features[index], precision=EXACT.precision))
    return GaussianHead(prior, means, jnp.full(text.shape, 1 / dim), jnp.float32(LIKELIHOOD), None)


def log_odds(scores: jax.Array) -> jax.Array:
    """log p - log (1 - p) of p = softmax(scores) [N,C]: tells apart what float32 rounds to 1."""
    log_p = jax.nn.log_softmax(scores, axis=-1)  # [N,C]
    leading = largest_of_row(scores)  # [N,C]
    # log (1 - p) of the leading class as the sum of the others: 1 - p itself would be 0.
    others = jax.nn.logsumexp(jnp.where(leading, -jnp.inf, log_p), axis=-1, keepdims=True)
    return log_p - jnp.where(leading, others, jnp.log1p(-jnp.exp(log_p)))


def transclip_update(head: GaussianHead, found: Moments) -> GaussianHead:
    """Means of the labels, of unit length, and the variance that all classes share."""
    means = normalize(found.labelled / jnp.maximum(found.mass, 1e-30)[:, None])
    means = jnp.where(found.mass[:, None] > 1e-30, means, head.means)  # a class that nobody has any part of
    shared = jnp.sum(deviations(found, means), axis=0) / jnp.maximum(jnp.sum(found.mass), 1e-30)
    variances = jnp.broadcast_to(jnp.maximum(shared, SMALLEST)[None, :], means.shape)
    return head._replace(means=means, variances=variances)


@partial(jax.jit, static_argnums=4)
def _transclip(x: jax.Array, text: jax.Array, mask: jax.Array, numbers: Numbers, neighbours: int) -> GaussianHead:
    rows = prepare(Rows(mask, features=x))
    start = transclip_start(rows, normalize(text), numbers.temperature)
    return _transduce(rows, start, transclip_update, numbers, neighbours)


# Both


def _transduce(rows: Rows, start: GaussianHead, update: Any, numbers: Numbers, neighbours: int) -> GaussianHead:
    """Labels of all images and the Gaussians in turn, ending with labels: one more update of those."""
    # Once: features stay as they are, only labels and Gaussians move.
    graph = graph_of(rows.features, rows.mask, neighbours) if neighbours else None
    log_prior = jax.nn.log_softmax(scores_of(start.prior, rows.features), axis=-1)  # [N,C]

    def labels_of(head: GaussianHead, labels: jax.Array) -> jax.Array:
        own = scores_of(head, rows.features)  # what the labels would be without neighbours
        if graph is None:
            return _softmax(rows, own)

        def agree(_: Any, labels: jax.Array) -> jax.Array:
            # t / 50 of the official code, whose 50 / (2k) beside the graph becomes 1 / (2k).
            return _softmax(rows, own + numbers.laplacian / (2 * neighbours) * spread(graph, labels))

        # Jacobi steps: all images from the labels before, so that their order does not matter.
        return jax.lax.fori_loop(0, INNER, agree, labels)

    def one(_: Any, state: tuple[GaussianHead, jax.Array]) -> tuple[GaussianHead, jax.Array]:
        head, labels = state
        # Labels first, then their Gaussians: 10 iterations are 11 updates of labels and 10 of Gaussians, as there.
        labels = labels_of(head, labels)
        return update(head, moments(rows, labels)), labels

    labels = _softmax(rows, log_prior)
    head, labels = jax.lax.fori_loop(0, numbers.iterations, one, (start, labels))
    return head._replace(posterior=labels_of(head, labels))


def _softmax(rows: Rows, logits: jax.Array) -> jax.Array:
    return jnp.where(rows.mask[:, None], jax.nn.softmax(logits, axis=-1), jnp.float32(0))


@jax.jit
def _with_posterior(head: GaussianHead, x: jax.Array, text: jax.Array, mask: jax.Array) -> GaussianHead:
    del text
    return head._replace(posterior=probabilities(head, prepare(Rows(mask, features=x))))


def passes_with_graph(num_rows: int, iterations: int = 10) -> int:
    """How often the features of all rows are read with a graph of neighbours, where labels [N,C] are kept."""
    # The start and the text's scores, each iteration's labels and Gaussians, the last labels.
    return 2 + 2 * iterations + 1 + blocks_of_rows(num_rows)


def as_numbers(
    temperature: Any, laplacian: Any = 1.0, anchor: Any = 1.0, iterations: Any = 10, soft: Any = False
) -> Numbers:
    """Checked; by default the papers'."""
    if not checks.concrete(iterations) or iterations != 0:  # 0: the text's labels and the Gaussians around it
        checks.whole_number(iterations, "iterations")
    return Numbers(
        number(temperature, "temperature"),
        number(laplacian, "laplacian", 0),
        number(anchor, "anchor"),
        jnp.int32(iterations),
        jnp.bool_(soft),
    )
