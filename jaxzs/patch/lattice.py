"""Gaussian filtering of many points at once, on a permutohedral lattice (Adams, Baek and Davis 2010).

A point is the mixture of the d+1 corners of the simplex that it lies in: values are splatted onto the corners,
blurred along the d+1 directions of the lattice, and sliced back. Linear in the points, where the exact sum is
quadratic. The lattice is built on the host in NumPy, and used by one compiled program for every size of it.
Axis letters: N points, d features of a point, M corners that are used, C channels.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import DataError

_BLOCK = 256  # points splatted and sliced at once: what they gather stays in a cache, a fifth to a third less time
_KEY_BITS = 62  # of a corner's coordinates, packed into one integer


class Lattice(NamedTuple):
    """A lattice and the points in it, padded: row M of what is splatted belongs to nobody.

    weights: [N,d+1] float32, how much of each corner a point is; 0 for padding.
    corners: [N,d+1] int32, numbers 0..M-1, or M for padding.
    neighbours: [d+1,2,M] int32, the corners before and after in each direction, M where there is none.
    """

    weights: jax.Array | np.ndarray
    corners: jax.Array | np.ndarray
    neighbours: jax.Array | np.ndarray


def build(features: np.ndarray) -> Lattice:
    """The lattice of points: features [N,d], in units of the Gaussian's standard deviation.

    Raises `DataError` when the points lie too far apart for the numbers that corners are given.

    >>> lattice = build(np.array([[0.1, 0.2], [0.12, 0.21], [9.0, 9.0]]))
    >>> lattice.weights.shape, lattice.corners[0].tolist() == lattice.corners[1].tolist()
    ((3, 3), True)
    """
    elevated = _elevated(np.asarray(features, np.float32))  # [N,d+1]
    origin, rank = _simplex(elevated)  # [N,d+1] each
    weights = _barycentric(elevated, origin, rank)  # [N,d+1]
    keys, unit = _corner_keys(origin, rank)  # [N,d+1], [d]
    used, corners = np.unique(keys.ravel(), return_inverse=True)  # [M], [N(d+1)]
    return Lattice(weights, corners.reshape(keys.shape).astype(np.int32), _neighbours(used, unit))


def _elevated(features: np.ndarray) -> np.ndarray:
    """Points onto the plane of d+1 coordinates that sum to 0, scaled for the blur to have unit variance: [N,d+1]."""
    num, d = features.shape
    index = np.arange(1, d + 1)
    scale = np.sqrt(2 / 3) * (d + 1) / np.sqrt(index * (index + 1))  # [d]
    scaled = (features * scale).astype(np.float32)  # [N,d]
    behind = np.zeros((num, d + 1), np.float32)  # sum of this coordinate and those behind it
    behind[:, :d] = np.cumsum(scaled[:, ::-1], axis=1)[:, ::-1]
    behind[:, 1:] -= index.astype(np.float32) * scaled
    return behind


def _simplex(elevated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest point of the lattice with remainder 0, and each coordinate's rank in the distance to it: [N,d+1]."""
    size = elevated.shape[1]
    rounded = np.floor(elevated / size + 0.5).astype(np.int32)  # [N,d+1], in cells
    above = elevated - rounded * np.float32(size)  # [N,d+1], each from -size/2 to size/2
    rank = np.zeros(elevated.shape, np.int32)
    for i in range(size):
        for j in range(i + 1, size):
            less = above[:, i] < above[:, j]
            rank[:, i] += less
            rank[:, j] += ~less  # equal ones: the later has the higher rank
    rank += rounded.sum(1, keepdims=True)  # coordinates must sum to 0: the ranks say which of them give way
    wrap = (rank < 0).astype(np.int32) - (rank >= size)  # -1, 0 or 1
    return (rounded + wrap) * size, rank + wrap * size


def _barycentric(elevated: np.ndarray, origin: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Weights of a point's corners, summing to 1: [N,d+1]."""
    size = elevated.shape[1]
    by_rank = np.empty_like(elevated)
    np.put_along_axis(by_rank, rank, (elevated - origin) / np.float32(size), axis=1)
    weights = by_rank[:, ::-1].copy()  # differences of neighbours in rank are the barycentric coordinates
    weights[:, 1:] -= by_rank[:, :0:-1]
    weights[:, 0] += 1 - by_rank[:, 0]
    return weights


def _corner_keys(origin: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each corner of each point's simplex [N,d+1], and what a step in each coordinate adds to it [d].

    From corner r to the next all coordinates grow by 1, and the one of rank d - r falls by d+1. The last coordinate
    follows from the others and is not part of the number.
    """
    num, size = origin.shape
    lowest, highest = origin[:, :-1].min(0) - 2 * size, origin[:, :-1].max(0) + 2 * size  # neighbours, too
    bits = [int(span).bit_length() for span in highest - lowest]
    if sum(bits) > _KEY_BITS:
        raise DataError(
            f"points are up to {int((highest - lowest).max())} cells of the lattice apart: the standard deviations are "
            "too small for it",
            python="take larger ones, or CRF(kernel='exact')",
        )
    unit = np.array([1 << sum(bits[i + 1 :]) for i in range(size - 1)], np.int64)
    falls = np.append(size * unit, 0)  # by coordinate
    of_rank = np.empty_like(rank)  # the coordinate that has it
    np.put_along_axis(of_rank, rank, np.broadcast_to(np.arange(size, dtype=np.int32), rank.shape), axis=1)
    keys = np.empty((num, size), np.int64)  # [N,d+1], corner 0 has remainder 0
    keys[:, 0] = sum((origin[:, i] - lowest[i]).astype(np.int64) * unit[i] for i in range(size - 1))
    for corner in range(1, size):
        keys[:, corner] = keys[:, corner - 1] + unit.sum() - falls[of_rank[:, size - corner]]
    return keys, unit


def _neighbours(used: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Where in `used` [M] the two neighbours of each corner are, in each direction; M where none is: [d+1,2,M]."""
    d, M = len(unit), len(used)
    found = np.full((d + 1, 2, M), M, np.int32)
    for direction in range(d + 1):
        wanted = used - unit.sum() + ((d + 1) * unit[direction] if direction < d else 0)
        place = np.minimum(np.searchsorted(used, wanted), M - 1).astype(np.int32)  # [M]
        here = np.flatnonzero(used[place] == wanted).astype(np.int32)
        found[direction, 0, here] = place[here]
        found[direction, 1, place[here]] = here  # whose neighbour on this side it is, on the other
    return found


def padded(lattice: Lattice, num_points: int, num_corners: int) -> Lattice:
    """The same lattice in arrays for so many points and corners, which change nothing."""
    (N, size), M = lattice.weights.shape, lattice.neighbours.shape[2]
    weights = np.zeros((num_points, size), np.float32)
    corners = np.full((num_points, size), num_corners, np.int32)
    neighbours = np.full((size, 2, num_corners), num_corners, np.int32)
    weights[:N], corners[:N] = lattice.weights, lattice.corners
    neighbours[:, :, :M] = np.where(lattice.neighbours == M, num_corners, lattice.neighbours)
    return Lattice(weights, corners, neighbours)


def blur(lattice: Lattice, values: jax.Array) -> jax.Array:
    """About sum_j exp(-|f_i - f_j|^2 / 2) v_j, up to a constant: values [N,C] -> [N,C]. Differentiable."""
    size, _, M = lattice.neighbours.shape
    N, C = values.shape
    corners, weights, given = (_in_blocks(each) for each in (lattice.corners, lattice.weights, values))

    def splat(splatted: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        at, weight, value = block  # [n,d+1], [n,d+1], [n,C]
        return splatted.at[at].add(weight[:, :, None] * value[:, None, :]), None  # [n,d+1,C] onto [M+1,C]

    def slice_(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        at, weight = block  # [n,d+1] each
        gathered = (weight[:, corner, None] * everyone[at[:, corner]] for corner in range(size))
        return functools.reduce(jnp.add, gathered)  # [n,C]

    # Row M is nobody, the neighbour of the outermost: 0, as what is put there has no weight.
    everyone, _ = jax.lax.scan(splat, jnp.zeros((M + 1, C), values.dtype), (corners, weights, given))  # [M+1,C]
    nobody = jnp.zeros((1, C), values.dtype)  # [1,C]
    # Behind barriers, or compilers gather from what they compute anew for every neighbour: 9 times slower on a CPU.
    for before, after in lattice.neighbours:
        blurred = everyone[:M] + 0.5 * (everyone[before] + everyone[after])  # [M,C], weights 1/4 1/2 1/4 times 2
        everyone = jax.lax.optimization_barrier(jnp.concatenate([blurred, nobody]))  # [M+1,C]
    sliced = jax.lax.map(slice_, (corners, weights)).reshape(-1, C)[:N]  # [N,C]
    return sliced / (1 + 2.0 ** (1 - size))


def _in_blocks(each: jax.Array | np.ndarray) -> jax.Array:
    """Rows of points in blocks, the last filled with zeros, which are weights of none: [N,m] -> [blocks,n,m]."""
    filled = jnp.pad(each, ((0, -len(each) % _BLOCK), (0, 0)))
    return filled.reshape(-1, _BLOCK, each.shape[1])
