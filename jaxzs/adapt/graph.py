"""The exact graph of nearest neighbours, by blocks of rows and of columns: never [N,N]."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxzs.errors import ConfigError
from jaxzs.proxy import checks
from jaxzs.proxy.rows import EXACT, normalize

BLOCK = 2048  # similarities of that many rows with that many columns are held at once


class Graph(NamedTuple):
    """The k most similar other images of each image.

    index: [N,k] int32, most similar first. similarity: [N,k] float32, cosines; 0 where there is no such neighbour.

    >>> adapt.nearest_neighbours(jnp.eye(3) + 0.1, 1).index.shape
    (3, 1)
    """

    index: jax.Array  # type: ignore[assignment] # a field in the place of tuple.index
    similarity: jax.Array


def nearest_neighbours(
    image_features: ArrayLike, neighbours: int = 3, *, mask: ArrayLike | None = None, block_size: int = BLOCK
) -> Graph:
    """Exact nearest neighbours by cosine, an image itself left out by its place (a duplicate of it counts).

    Args:
      image_features: [N,E], any float type; L2-normalised here.
      neighbours: k, at least 1; where there are fewer other images the rest has similarity 0.
      mask: [N] bool, False for padding, which is nobody's neighbour.
      block_size: rows and columns of a block of similarities.

    Returns:
      `Graph`; of equal similarities the first row wins.

    Raises:
      DataError: shapes that do not fit, values that are not finite.
      ConfigError: numbers below 1.

    >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> adapt.nearest_neighbours(x, 1).index[:, 0].tolist()
    [1, 0, 3, 2]
    """
    x = checks.vectors(image_features, "image_features", "[N,E]")
    rows_mask = checks.row_mask(mask, x.shape[0])
    checks.directions(x, "image_features", rows_mask)
    checks.whole_number(neighbours, "neighbours")
    checks.whole_number(block_size, "block_size")
    return _nearest(x, rows_mask, neighbours, min(block_size, x.shape[0]))


@partial(jax.jit, static_argnums=(2, 3))
def _nearest(x: jax.Array, mask: jax.Array, neighbours: int, block_size: int) -> Graph:
    x = normalize(jnp.where(mask[:, None], x.astype(jnp.float32), jnp.float32(0)))
    return graph_of(x, mask, neighbours, block_size)


def graph_of(x: jax.Array, mask: jax.Array, neighbours: int, block_size: int = BLOCK, *, itself: bool = False) -> Graph:
    """`nearest_neighbours` of normalised rows [N,E]; itself: a row is a neighbour of its own, as any other."""
    num_rows = x.shape[0]
    size = min(block_size, num_rows)
    num_blocks = blocks_of_rows(num_rows, block_size)
    padding = num_blocks * size - num_rows
    blocks = jnp.pad(x, ((0, padding), (0, 0))).reshape(num_blocks, size, -1)  # [.,B,E]
    counts = jnp.pad(mask, (0, padding)).reshape(num_blocks, size)  # [.,B] padding is no neighbour
    places = jnp.arange(num_blocks * size, dtype=jnp.int32).reshape(num_blocks, size)

    def of_rows(rows: tuple[jax.Array, jax.Array]) -> Graph:
        own, own_places = rows
        best = jnp.full((size, neighbours), -jnp.inf)  # [B,k] so far
        nobody = jnp.zeros((size, neighbours), jnp.int32)

        def with_columns(found: tuple[jax.Array, jax.Array], columns: tuple[jax.Array, ...]):
            others, other_places, counted = columns
            similarity = EXACT.logits(own, others)  # [B,B]
            # By place, not as the first of the sorted: of duplicates the image itself need not come first.
            usable = counted[None, :] & (itself | (own_places[:, None] != other_places[None, :]))
            similarity = jnp.where(usable, similarity, -jnp.inf)
            return _merged(found, similarity, other_places), None

        (similarity, index), _ = jax.lax.scan(with_columns, (best, nobody), (blocks, places, counts))
        # [B,k]; a missing neighbour is image 0 with weight 0, so that gathers need no mask.
        there = jnp.isfinite(similarity)
        return Graph(jnp.where(there, index, 0), jnp.where(there, similarity, 0))

    graph = jax.lax.map(of_rows, (blocks, places))
    return Graph(*(leaf.reshape(-1, neighbours)[:num_rows] for leaf in graph))


def blocks_of_rows(num_rows: int, block_size: int = BLOCK) -> int:
    """Blocks of rows of a graph; each is compared with all rows."""
    return -(-num_rows // min(block_size, num_rows))


def _merged(
    found: tuple[jax.Array, jax.Array], similarity: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The running k best with a block [B,B] of columns more; of equals the ones found before stay."""
    best, index = found
    neighbours = best.shape[1]
    new, at = jax.lax.top_k(similarity, min(neighbours, similarity.shape[1]))  # [B,k]
    both = jnp.concatenate([best, new], axis=1)  # [B,2k], the older ones first
    names = jnp.concatenate([index, places[at]], axis=1)
    best, at = jax.lax.top_k(both, neighbours)  # stable: of equals the earlier place
    return best, jnp.take_along_axis(names, at, axis=1)


def spread(graph: Graph, values: jax.Array) -> jax.Array:
    """(A + A^T) values for the links A [N,N] of the graph, values [N,C]: a gather and a scatter."""
    gathered = jnp.einsum("nk,nkc->nc", graph.similarity, values[graph.index], precision=EXACT.precision)  # A v [N,C]
    sent = graph.similarity[:, :, None] * values[:, None, :]  # [N,k,C]
    # A^T v [N,C]: what others who name this image send to it.
    received = jnp.zeros_like(values).at[graph.index].add(sent)
    return gathered + received


def check_neighbours(neighbours: int) -> None:
    """0 stands for no graph."""
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 0:
        raise ConfigError(f"neighbours is {neighbours!r}; expected a whole number, 0 for no graph")
