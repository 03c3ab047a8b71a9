"""Pseudolabels: the K most confident images of every class, by the authors' leaderboards or by a true top-K."""

from __future__ import annotations

import bisect
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.errors import DataError

ALL_IMAGES = 10_000_000  # the authors' special K: every image under its most probable class
Rule = Literal["boards", "top_k"]


def select_pseudolabels(
    probabilities: np.ndarray | jax.Array, k: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """K images for every class by the rule of the released code of GRIP: one scan, one board per class.

    An image is offered to its most probable class; if that board is full of better ones, to every other class, and
    it stays on all boards that accept. A board accepts while it is short, and then whatever beats its last
    entry; it is sorted for the first time when it is full and accepts. So the result depends on the
    order of the images, an image may occur several times with different labels, and one that is pushed
    off a board is not offered elsewhere. `select_top_k` has none of these effects.

    Args:
      probabilities: [N,C] float32, softmax over the candidate classes, images in the data set's order.
      k: entries per class; `ALL_IMAGES` takes every image under its most probable class.
      mask: [N] bool, False for padding.

    Returns:
      (image_indices, labels), int64 of one length, class by class; fewer than k of a class where there are
      not enough images.

    Raises:
      DataError: k below 1 (the pool is too small for a growing schedule) or no whole number, no image, wrong shapes or
        types, not finite.

    >>> images, labels = prompt.select_pseudolabels(np.float32([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]), 1)
    >>> images.tolist(), labels.tolist()
    ([1, 2], [0, 1])
    """
    rows, probabilities = _checked(probabilities, k, mask)
    top = probabilities.argmax(1)  # [N]
    if k >= ALL_IMAGES:
        return rows, top
    C = probabilities.shape[1]
    # Entries are (-p, -image): ascending order is descending confidence, ties to the later image.
    boards: list[list[tuple[float, int]]] = [[] for _ in range(C)]
    # As released a board is not sorted while it fills: it then ends with its newest entry, not its poorest.
    is_sorted = [False] * C
    last = np.full(C, -np.inf, np.float32)  # of a full board; a short one accepts everything
    for row, p, best in zip(rows.tolist(), probabilities, top.tolist(), strict=True):
        accepting = last < p  # [C]; strictly: who equals the last entry does not displace it
        # Placed under its best class an image goes nowhere else; refused there, it enters every board that takes it.
        chosen = [best] if accepting[best] else np.flatnonzero(accepting).tolist()
        for c in chosen:
            board, entry = boards[c], (-float(p[c]), -row)
            if len(board) < k:
                board.append(entry)
            else:
                if not is_sorted[c]:
                    board.sort()
                    is_sorted[c] = True
                bisect.insort(board, entry)
                board.pop()  # who is displaced is lost: it is offered to no other class
            if len(board) == k:
                last[c] = -board[-1][0]  # the lowest only once the board is sorted
    images = [-image for board in boards for _, image in board]
    labels = np.repeat(np.arange(C), [len(board) for board in boards])
    return np.array(images, np.int64), labels


def select_top_k(
    probabilities: np.ndarray | jax.Array, k: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k images of highest probability for every class, whatever their order; ties to the earlier image.

    Arguments, result and errors as `select_pseudolabels`; where k exceeds N every image is taken.

    >>> images, labels = prompt.select_top_k(np.float32([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]), 1)
    >>> images.tolist(), labels.tolist()
    ([1, 0], [0, 1])
    """
    rows, probabilities = _checked(probabilities, k, mask)
    C = probabilities.shape[1]
    _, best = jax.lax.top_k(jnp.asarray(probabilities.T), min(k, len(rows)))  # [C,k]
    return rows[np.asarray(best).reshape(-1)], np.repeat(np.arange(C), best.shape[1])  # [C*k] each


def _checked(probabilities: np.ndarray | jax.Array, k: int, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that count, and their rows in float32."""
    values = np.asarray(probabilities)
    if values.ndim != 2 or values.shape[1] == 0 or not _real(values.dtype):
        raise DataError(f"probabilities are {values.dtype} of shape {values.shape}, expected [N,C] numbers")
    check_k(k)
    present = np.ones(len(values), bool) if mask is None else np.asarray(mask)
    if present.shape != (len(values),) or present.dtype != np.bool_:
        raise DataError(
            f"mask is {present.dtype} of shape {present.shape}, expected {len(values)} bool, one for each image"
        )
    rows = np.flatnonzero(present)
    if len(rows) == 0:
        raise DataError("there are no unlabelled images to pseudolabel")
    values = values[rows].astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("probabilities are not finite; the prompts have diverged")
    return rows, values


def check_k(k: int) -> None:
    """`DataError` unless k is a whole number of 1 or more."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise DataError(f"K is {k!r}, expected a whole number of 1 or more")
    if k < 1:
        raise DataError(
            f"K is {k}: the unlabelled pool is too small for this many classes and iterations; use more "
            "images, fewer iterations, or a fixed K (ifpl)"
        )


def _real(dtype: np.dtype) -> bool:
    """Whether values are real numbers; bfloat16 is one for JAX, and none for NumPy."""
    return jnp.issubdtype(dtype, jnp.floating) or np.issubdtype(dtype, np.integer)
