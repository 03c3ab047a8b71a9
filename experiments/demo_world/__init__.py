"""The demo world: captioned images of digits, letters and coloured shapes, rendered from a seed.

Everything that the demo checkpoint has ever seen comes from here, and so do its rendered test sets. Nothing
but NumPy, Pillow and the fonts inside matplotlib is needed, so that anyone can render the same images.
`train=True` renders the training world; the test world has other seeds and other fonts, and outline shapes,
which training never shows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.demo_world.captions import BACKGROUNDS, DIGITS, GLYPHS, LETTERS, SHAPES, Content
from experiments.demo_world.ink import glyph_mask, stroke_mask, warp
from experiments.demo_world.render import corrupt, damage, glyph_image, scene

__all__ = [
    "Scenes",
    "corrupted",
    "digits",
    "glyph_image",
    "glyph_mask",
    "glyphs",
    "letters",
    "outline_shapes",
    "scene",
    "scenes",
    "shapes",
    "stroke_mask",
    "warp",
]

# Outlined circles and rings cannot be told apart for certain: the outline set leaves rings out.
OUTLINE_SHAPES = tuple(s for s in SHAPES if s != "ring")
_TRAIN, _TEST = 1, 2  # first word of every seed: the two worlds never share a random stream


def _generator(seed: int, part: int, train: bool) -> np.random.Generator:
    return np.random.default_rng([_TRAIN if train else _TEST, seed, part])


def _labels(num: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Balanced labels in random order, int64 [N]."""
    return rng.permutation(np.arange(num) % classes)


def glyphs(
    num: int, *, size: int = 48, seed: int = 0, train: bool = False, first: int = 0, count: int = len(GLYPHS)
) -> tuple[np.ndarray, np.ndarray]:
    """Digits and letters: (images uint8 [N, S, S, 3], labels int64 [N] into GLYPHS[first : first + count]), balanced.

    >>> images, labels = glyphs(4)
    >>> images.shape, labels.shape
    ((4, 48, 48, 3), (4,))
    """
    rng = _generator(seed, 0, train)
    labels = _labels(num, count, rng)
    images = [damage(glyph_image(first + int(k), size, rng, held_out=not train)[0], rng) for k in labels]
    return np.stack(images), labels


def digits(num: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Digits zero to nine; options and result as `glyphs`."""
    return glyphs(num, first=0, count=len(DIGITS), **options)


def letters(num: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Capital letters; options and result as `glyphs`, labels into LETTERS."""
    return glyphs(num, first=len(DIGITS), count=len(LETTERS), **options)


def shapes(num: int, *, size: int = 48, seed: int = 0, train: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Single filled shapes: (images uint8 [N, S, S, 3], labels int64 [N] into SHAPES), balanced.

    >>> shapes(3)[0].shape
    (3, 48, 48, 3)
    """
    return _single_shapes(num, tuple(range(len(SHAPES))), 1, size, seed, train, lines=False)


def outline_shapes(num: int, *, size: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Single shapes of which only the outline is drawn, a style that training never shows; labels into OUTLINE_SHAPES.

    >>> outline_shapes(3)[1].shape
    (3,)
    """
    numbers = tuple(SHAPES.index(s) for s in OUTLINE_SHAPES)
    return _single_shapes(num, numbers, 2, size, seed, False, lines=True)


def _single_shapes(num, numbers, part, size, seed, train, lines):
    rng = _generator(seed, part, train)
    labels = _labels(num, len(numbers), rng)
    images = []
    for k in labels:
        line = rng.uniform(1.2, 2.6) if lines else 0.0
        image, _, _ = scene(size, rng, min_objects=1, max_objects=1, line=line, shapes=(numbers[int(k)],))
        images.append(damage(image, rng, 0.5))
    return np.stack(images), labels


def corrupted(kind: str, num: int, *, size: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Test images of "shapes" or "glyphs" damaged more heavily than any in training; images and labels as theirs."""
    if kind not in ("shapes", "glyphs"):
        raise ValueError(f"kind must be 'shapes' or 'glyphs', got {kind!r}")
    images, labels = (shapes if kind == "shapes" else glyphs)(num, size=size, seed=seed + 1)
    rng = _generator(seed, 3, False)
    return np.stack([corrupt(image, rng) for image in images]), labels


class Scenes(NamedTuple):
    """Scenes with several objects and what is truly in them.

    images: uint8 [N, S, S, 3]. tags: bool [N, F], which of `names` are there. backgrounds: int64 [N] into BACKGROUNDS.
    masks: uint8 [N, S, S], 0 for background, 1 + name elsewhere. contents: shape and colour of every object.
    """

    images: np.ndarray
    tags: np.ndarray
    backgrounds: np.ndarray
    masks: np.ndarray
    contents: list[Content]
    names: tuple[str, ...] = SHAPES


def scenes(
    num: int, *, size: int = 48, min_objects: int = 1, max_objects: int = 3, seed: int = 0, train: bool = False
) -> Scenes:
    """Scenes of several coloured shapes with true tags and true masks, at any size.

    >>> found = scenes(2, size=96, min_objects=3, max_objects=5)
    >>> found.images.shape, found.tags.shape, found.masks.shape
    ((2, 96, 96, 3), (2, 12), (2, 96, 96))
    """
    rng = _generator(seed, 1000 + size, train)
    images, contents, masks = [], [], []
    for _ in range(num):
        image, content, mask = scene(size, rng, min_objects=min_objects, max_objects=max_objects)
        images.append(damage(image, rng, 0.5))
        contents.append(content)
        masks.append(mask)
    tags = np.zeros((num, len(SHAPES)), bool)
    for i, content in enumerate(contents):
        tags[i, [shape for shape, _ in content.objects]] = True
    kinds = np.array([c.background for c in contents], np.int64)
    assert kinds.max(initial=0) < len(BACKGROUNDS)
    return Scenes(np.stack(images), tags, kinds, np.stack(masks), contents)
