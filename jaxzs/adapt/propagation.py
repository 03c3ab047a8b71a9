"""ZLaP: labels spread from the texts over a graph of images. Stojnic et al. (CVPR 2024, arXiv 2404.04072).

A baseline: it was never the best on our data, and loses much where classes are absent.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.adapt.graph import Graph, graph_of, spread
from jaxzs.adapt.images import number
from jaxzs.proxy import checks
from jaxzs.proxy.rows import EXACT, normalize

ITERATIONS = 60  # of F <- alpha S F + Y: 0.7^60 = 5e-10


class Links(NamedTuple):
    """Links of the images to images and to texts, [N,k] each: the place and the weight."""

    images: Graph
    texts: Graph


def zlap(
    image_features: ArrayLike,
    text_proxies: ArrayLike,
    *,
    neighbours: int = 5,
    power: ArrayLike = 5.0,
    alpha: ArrayLike = 0.3,
    rescale: bool = False,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Label propagation from texts over the nearest-neighbour graph, transductive: arXiv 2404.04072, section 3.

    Args:
      image_features: [N,E], any float type; L2-normalised here.
      text_proxies: [C,E], any float type; L2-normalised here.
      neighbours: k >= 1 images (the image itself counts, as published) and k texts that each image is linked to.
      power: > 0, of the links to texts.
      alpha: 0 to 0.9, how far labels travel.
      rescale: bring similarities to [0, 1] first, as is done for vision proxies in the place of texts.
      mask: [N] bool, False for padding.

    Returns:
      Scores [N,C] float32; predict with argmax.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: options out of range.

    >>> x = jnp.array([[1.0, 0.1], [0.9, -0.1], [0.1, 1.0], [0.0, 0.8]])
    >>> adapt.zlap(x, jnp.array([[1.0, 0.9], [0.9, 1.0]]), neighbours=2).argmax(-1).tolist()
    [0, 0, 1, 1]
    """
    x, text, rows_mask = checks.features_and_proxies(image_features, text_proxies, mask)
    checks.whole_number(neighbours, "neighbours")
    numbers = number(power, "power"), number(alpha, "alpha", 0, 0.9)
    return _zlap(x, text, rows_mask, *numbers, neighbours, bool(rescale))


@partial(jax.jit, static_argnums=(5, 6))
def _zlap(
    x: jax.Array, text: jax.Array, mask: jax.Array, power: jax.Array, alpha: jax.Array, neighbours: int, rescale: bool
) -> jax.Array:
    x, text = normalize(jnp.where(mask[:, None], x.astype(jnp.float32), jnp.float32(0))), normalize(text)
    links = links_of(x, text, mask, power, neighbours, rescale)
    return propagate(links, text.shape[0], alpha)


def links_of(x: jax.Array, text: jax.Array, mask: jax.Array, power: jax.Array, neighbours: int, rescale: bool) -> Links:
    """Weights of the links; that of an image to itself is 0."""
    # The image is one of its own k, as published: 5 means 4 others.
    images = graph_of(x, mask, neighbours, itself=True)
    best, classes = jax.lax.top_k(EXACT.logits(x, text), min(neighbours, text.shape[0]))  # [N,k]
    texts = Graph(classes, jnp.where(mask[:, None], best, 0))
    if rescale:
        images, texts = rescaled(images, texts, mask)
    own = images.index == jnp.arange(len(x), dtype=images.index.dtype)[:, None]  # [N,k]
    # W has a zero diagonal; negative cosines are no links.
    weights = jnp.where(own | ~mask[:, None], 0, jnp.maximum(images.similarity, 0))
    # The power sharpens links to texts, whose cosines hardly differ.
    powers = jnp.where(mask[:, None], jnp.maximum(texts.similarity, 0) ** power, 0)
    return Links(Graph(images.index, weights), Graph(texts.index, powers))


def rescaled(images: Graph, texts: Graph, mask: jax.Array) -> Links:
    """All kept similarities, of images to themselves too, brought to [0, 1] together."""
    everything = jnp.concatenate([images.similarity, texts.similarity], axis=-1)  # [N,2k]
    counted = mask[:, None] & (everything != 0)
    low = jnp.min(jnp.where(counted, everything, jnp.inf))
    high = jnp.max(jnp.where(counted, everything, -jnp.inf))
    return Links(*(Graph(g.index, (g.similarity - low) / jnp.maximum(high - low, 1e-12)) for g in (images, texts)))


def propagate(links: Links, num_classes: int, alpha: jax.Array) -> jax.Array:
    """(I - alpha S)^-1 [C+N,C] applied to one-hot texts, the rows of images [N,C]; S = D^-1/2 (W + W^T) D^-1/2."""
    images, texts = links
    ones = jnp.ones((images.index.shape[0], 1), jnp.float32)
    degree = spread(images, ones)[:, 0] + jnp.sum(texts.similarity, axis=-1)  # [N] row sums of W + W^T
    text_degree = jnp.zeros((num_classes,), jnp.float32).at[texts.index].add(texts.similarity)  # [C]
    # A node without links: 1 for 0, as published; its row of S is zeros anyhow.
    by_image = jax.lax.rsqrt(jnp.where(degree > 0, degree, 1))
    by_text = jax.lax.rsqrt(jnp.where(text_degree > 0, text_degree, 1))
    images = Graph(images.index, images.similarity * by_image[:, None] * by_image[images.index])
    texts = Graph(texts.index, texts.similarity * by_image[:, None] * by_text[texts.index])
    sources = jnp.eye(num_classes, dtype=jnp.float32)

    def step(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_texts, of_images = state  # [C,C], [N,C]
        # [N,k] links by [N,k,C] labels of those texts -> [N,C].
        to_images = jnp.einsum("nk,nkc->nc", texts.similarity, of_texts[texts.index], precision=EXACT.precision)
        # Links are stored in the image's row alone; the way back is a scatter. [C,C]
        to_texts = jnp.zeros_like(of_texts).at[texts.index].add(texts.similarity[:, :, None] * of_images[:, None, :])
        return alpha * to_texts + sources, alpha * (spread(images, of_images) + to_images)

    nothing = jnp.zeros((images.index.shape[0], num_classes), jnp.float32)
    # The series of the inverse, all classes at once, in place of conjugate gradients for each of them.
    return jax.lax.fori_loop(0, ITERATIONS, step, (sources, nothing))[1]
