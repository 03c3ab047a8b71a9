"""Images inside the package, with their truth: scanned digits, and things and scenes drawn by an artist.

The digits are scikit-learn's (UCI "Optical Recognition of Handwritten Digits"). The things and scenes are composed of
Microsoft's Fluent emoji (MIT licence) by `experiments/art_world/tests.py`, which also says how.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(str(importlib.resources.files("jaxzs") / "assets" / "art_images"))
COLUMNS = 24  # tiles in a row of a contact sheet


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 scanned handwritten digits, white on black: ([1797,8,8] uint8, labels [1797] of 0 to 9).

    >>> images, labels = data.samples.digits()
    >>> images.shape, int(labels.max())
    ((1797, 8, 8), 9)
    """
    from sklearn.datasets import load_digits

    scanned = load_digits()
    return np.round(scanned.images * (255 / 16)).astype(np.uint8), scanned.target  # 0 to 16 as scanned


def things() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """600 pictures of a hundred everyday things: ([600,72,72,3] uint8, labels [600], class names).

    >>> images, labels, names = data.samples.things()
    >>> images.shape, names[labels[0]]
    ((600, 72, 72, 3), 'cat')
    """
    index = _index()
    labels = np.array(index["things"]["labels"])
    return _tiles("things.webp", index["things"]["side"], len(labels)), labels, tuple(index["names"])


class SceneSamples(NamedTuple):
    """Scenes of three to five things each.

    images: [48,96,96,3] uint8. tags: [48,100] bool, what is there. masks: [48,96,96] uint8, 0 for the background,
    1 + thing elsewhere. names: of the hundred things.
    """

    images: np.ndarray
    tags: np.ndarray
    masks: np.ndarray
    names: tuple[str, ...]


def scenes() -> SceneSamples:
    """48 scenes of the same things, with true tags and masks.

    >>> found = data.samples.scenes()
    >>> found.images.shape, int(found.tags[0].sum())
    ((48, 96, 96, 3), 4)
    """
    index = _index()
    listed, side, names = index["scenes"]["tags"], index["scenes"]["side"], tuple(index["names"])
    tags = np.zeros((len(listed), len(names)), bool)
    for row, there in zip(tags, listed, strict=True):
        row[there] = True
    images, masks = (_tiles(name, side, len(listed)) for name in ("scenes.webp", "masks.png"))
    return SceneSamples(images, tags, masks, names)


def _index() -> dict[str, Any]:
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


def _tiles(file: str, side: int, number: int) -> np.ndarray:
    """The first tiles of a contact sheet, row by row: [N,S,S] or [N,S,S,3]."""
    from PIL import Image

    with Image.open(FOLDER / file) as sheet:
        pixels = np.asarray(sheet)
    rows = [np.split(row, COLUMNS, axis=1) for row in np.split(pixels, len(pixels) // side)]
    return np.stack([tile for row in rows for tile in row][:number])
