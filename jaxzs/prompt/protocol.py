"""Who is labelled, seen, trained on and when: the splits, partitions and schedules of arXiv 2306.01669.

All draws are those of the released code, NumPy's legacy generator freshly seeded each time, so that the same images
are drawn. They do not depend on the seed of a run, which changes only the prompts' initial values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxzs.data import seen_unseen_split
from jaxzs.errors import DataError, LabelError
from jaxzs.prompt.objective import Paradigm, Strategy

TRAIN_RATIO = 0.8  # the rest is set aside and decides nothing: the last epoch's prompts are the result
SPLIT_SEEDS = (500, 0, 200)  # of the three published seen/unseen splits
SMALLEST_K_TO_SPLIT = 10  # with fewer pseudolabels per class all of them are trained on


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows of a training pool a run may use, and how.

    labelled: rows trained on with their true labels. validation: labelled rows set aside (never used in training).
    unlabelled: rows to pseudolabel, in scan order. seen: classes with labels; candidates: classes that a
    pseudolabel may take, in the order of their boards.
    """

    paradigm: Paradigm
    num_classes: int
    labelled: np.ndarray
    validation: np.ndarray
    unlabelled: np.ndarray
    seen: np.ndarray
    candidates: np.ndarray


def draw(count: int, size: int, seed: int = 0) -> np.ndarray:
    """`size` of range(count) without replacement, as NumPy's legacy generator seeded with `seed` draws them."""
    return np.random.RandomState(seed).choice(count, size, replace=False)


def partition(count: int, ratio: float = TRAIN_RATIO, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) positions of a list: int(ratio*count) in drawn order, and the rest ascending.

    >>> partition(7)
    (array([6, 2, 1, 3, 0]), array([4, 5]))
    """
    train = draw(count, int(ratio * count), seed)
    return train, np.setdiff1d(np.arange(count), train)


def few_labels(labels: np.ndarray, num_classes: int, per_class: int = 2) -> np.ndarray:
    """Rows of `per_class` labelled images of every class, class by class: labels [N] -> [C*per_class].

    Raises `LabelError` when a class has fewer images.
    """
    chosen = []
    for c in range(num_classes):
        rows = np.flatnonzero(np.asarray(labels) == c)
        if len(rows) < per_class:
            raise LabelError(
                f"class {c} has {len(rows)} images in the training pool, {per_class} labelled ones are asked for"
            )
        # Every class from the same fresh seed, as released: its draw does not depend on the classes before it.
        chosen.append(np.random.RandomState(0).choice(rows, per_class, replace=False))
    return np.concatenate(chosen)  # [C*per_class]


def ssl_split(labels: np.ndarray, num_classes: int, per_class: int = 2) -> Split:
    """Semi-supervised: a few labels of every class, of which 80 % are trained on; the rest of the pool is unlabelled.

    labels [N]: true labels of the pool; only those of the drawn rows are ever looked at in training.
    Raises `LabelError` for labels outside 0..C-1 and for classes with too few images.

    >>> split = prompt.ssl_split(np.repeat(np.arange(3), 10), num_classes=3)
    >>> len(split.labelled), len(split.validation), len(split.unlabelled)
    (4, 2, 24)
    """
    _check_whole(1, classes=num_classes, labels_per_class=per_class)
    labels = check_labels(labels, num_classes)
    chosen = few_labels(labels, num_classes, per_class)
    train, validation = partition(len(chosen))
    classes = np.arange(num_classes)
    unlabelled = np.setdiff1d(np.arange(len(labels)), chosen)
    # The 80 % are drawn from the list, not from each class: with 2 labels a class may lose both.
    return Split("ssl", num_classes, chosen[train], chosen[validation], unlabelled, classes, classes)


def trzsl_split(
    labels: np.ndarray, num_classes: int, split_seed: int = SPLIT_SEEDS[0], seen: Sequence[int] | None = None
) -> Split:
    """Transductive zero-shot: every image of the seen classes is labelled, those of the unseen ones are unlabelled.

    seen: the seen classes, instead of those drawn by `split_seed`. Raises `LabelError` and `DataError`.

    >>> split = prompt.trzsl_split(np.repeat(np.arange(3), 10), num_classes=3, seen=[0, 1])
    >>> len(split.labelled), len(split.unlabelled), split.candidates.tolist()
    (16, 10, [2])
    """
    labels = check_labels(labels, num_classes)
    if seen is None:
        seen_classes, unseen = seen_unseen_split(num_classes, split_seed)
    else:
        seen_classes = np.asarray(seen, int)
        unseen = np.setdiff1d(np.arange(num_classes), seen_classes)
        outside = np.setdiff1d(seen_classes, np.arange(num_classes))
        if len(outside) or not len(seen_classes) or not len(unseen):
            raise DataError(f"seen classes {seen_classes.tolist()} must be some but not all of 0..{num_classes - 1}")
    is_seen = np.isin(labels, seen_classes)
    for c in range(num_classes):
        if not (labels == c).any():
            raise LabelError(f"class {c} has no image in the training pool")
    rows = np.flatnonzero(is_seen)
    train, validation = partition(len(rows))
    return Split("trzsl", num_classes, rows[train], rows[validation], np.flatnonzero(~is_seen), seen_classes, unseen)


def ul_split(num_images: int, num_classes: int, labels: np.ndarray | None = None) -> Split:
    """Unsupervised: the whole pool is unlabelled.

    labels [N]: if given, the scan order is the authors' (images of the unseen classes of split 500, the drawn 80 % of
    the seen ones, their 20 %), which alone is what labels are used for; by default it is the pool's order.

    >>> split = prompt.ul_split(30, num_classes=3)
    >>> split.paradigm, len(split.labelled), len(split.unlabelled)
    ('ul', 0, 30)
    """
    _check_whole(1, images=num_images, classes=num_classes)
    classes, none = np.arange(num_classes), np.zeros(0, int)
    order = np.arange(num_images)
    if labels is not None:
        trzsl = trzsl_split(labels, num_classes)
        # The scan order of the released code, on which the boards depend.
        order = np.concatenate([trzsl.unlabelled, trzsl.labelled, trzsl.validation])  # [N]
    return Split("ul", num_classes, none, none, order, classes, classes)


def _check_whole(least: int, **numbers: int) -> None:
    """`DataError` unless all are whole numbers of at least so much."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise DataError(f"{value!r} {name.replace('_', ' ')}: expected a whole number of {least} or more")


def split_pseudolabels(images: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The pseudolabelled items that are trained on: a drawn 80 % if k >= 10, otherwise all, in their order."""
    if k < SMALLEST_K_TO_SPLIT:
        return images, labels
    train, _ = partition(len(images))
    return images[train], labels[train]


def growing_schedule(num_images: int, num_classes: int, num_iterations: int = 10) -> list[int]:
    """K of every iteration of GRIP: the pool is used up in equal steps, the same number for every class.

    num_images: unlabelled images; num_classes: candidates. With S = floor(N/I), K_i = floor(i*S/C), at most floor(N/C).

    >>> prompt.growing_schedule(1836, 102)
    [1, 3, 5, 7, 8, 10, 12, 14, 16, 17]
    """
    _check_whole(0, images=num_images)
    _check_whole(1, iterations=num_iterations, classes=num_classes)
    step = num_images // num_iterations
    return [_growing_k(num_images, num_classes, step, i) for i in range(1, num_iterations + 1)]


def _growing_k(num_images: int, num_classes: int, step: int, iteration: int) -> int:
    # K_i = floor(i S / C), at most floor(N / C), with S = floor(N / I) the step.
    return min(iteration * step // num_classes, num_images // num_classes)


def schedule(strategy: Strategy, split: Split, k: int = 16, num_iterations: int = 10) -> list[int]:
    """K of every iteration: one (FPL), equal ones (IFPL), growing ones (GRIP), or [0] for no pseudolabels.

    Raises `DataError` when the pool is too small for one pseudolabel per class, or the paradigm has no labels.
    """
    if strategy == "labelled":
        if split.paradigm == "ul":
            raise DataError("paradigm 'ul' has no labels to train on; use fpl, ifpl or grip")
        return [0]
    _check_whole(1, pseudolabels_per_class=k)
    if strategy == "fpl":
        return [k]
    if strategy == "ifpl":
        return [k] * num_iterations
    # Candidates: in TRZSL the unseen ones.
    ks = growing_schedule(len(split.unlabelled), len(split.candidates), num_iterations)
    if ks[0] < 1:  # where the released code fails on an empty board
        raise DataError(
            f"GRIP starts with K = 0: {len(split.unlabelled)} unlabelled images in {num_iterations} iterations over "
            f"{len(split.candidates)} classes. Use more images or fewer iterations."
        )
    return ks


def epoch_learning_rates(peak: float, epochs: int = 150, warmup_epochs: int = 5) -> np.ndarray:
    """Learning rate of every epoch [epochs] float64: linear from exactly 0, then half a cosine down.

    lr(e) = peak*e/W for e < W, else peak*(1+cos(pi*(e-W)/(E-W)))/2, the released code's schedule.

    >>> epoch_learning_rates(0.1, 4, 2)
    array([0.  , 0.05, 0.1 , 0.05])
    """
    if not 0 <= warmup_epochs < epochs:
        raise DataError(f"warmup_epochs {warmup_epochs} must be 0 or more and less than epochs {epochs}")
    return np.array(
        [
            peak * e / warmup_epochs  # exactly 0 in the first epoch, which only gathers momentum
            if e < warmup_epochs
            else peak * (1 + math.cos(math.pi * (e - warmup_epochs) / (epochs - warmup_epochs))) / 2
            for e in range(epochs)
        ]
    )


def check_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels [N] as int64; `LabelError` unless all lie in 0..C-1."""
    values = np.asarray(labels)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise LabelError(f"labels are {values.dtype} of shape {values.shape}, expected integers [N]")
    outside = np.flatnonzero((values < 0) | (values >= num_classes))
    if len(outside):
        raise LabelError(
            f"label {values[outside[0]]} of image {outside[0]} lies outside 0..{num_classes - 1} "
            f"({len(outside)} such labels)"
        )
    return values.astype(np.int64)
