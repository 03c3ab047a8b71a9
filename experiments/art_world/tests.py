"""Test images of the art world, drawn by the artist that training never saw; their colours are left as drawn.

    python -m experiments.art_world.tests --sprites jaxzs-out/art/sprites.npz

writes the contact sheets that come with the package (`jaxzs.data.samples`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.art_world import sprites
from experiments.art_world.names import EVERYDAY
from experiments.art_world.scenes import Artists, scene, single
from experiments.demo_world import Scenes
from experiments.demo_world.captions import Content
from jaxzs.data.samples import COLUMNS, FOLDER

_TEST = 5  # first word of every seed here; training has another


def unseen(path: str) -> Artists:
    """The artist that is never trained on."""
    return Artists([sprites.load(path)[sprites.UNSEEN]])


def things(
    artists: Artists, each: int, *, side: int = 48, seed: int = 0, classes: int = len(EVERYDAY), hardness: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """So many images of each of the first `classes` things: (uint8 [N,S,S,3], labels int64 [N]).

    hardness: 0 is large on white, 1 any ground, size and turn, sometimes behind a small other thing.
    """
    rng = np.random.default_rng([_TEST, seed, 0])
    labels = np.tile(np.arange(classes), each)
    images = [single(artists, int(label), side, rng, hardness, recolour=False)[0] for label in labels]
    return np.round(255 * np.stack(images)).astype(np.uint8), labels


def scenes(
    artists: Artists, num: int, *, size: int = 96, min_objects: int = 3, max_objects: int = 5, seed: int = 0
) -> Scenes:
    """Scenes of several of the everyday things with true tags and masks, as the demo world makes them of shapes."""
    rng = np.random.default_rng([_TEST, seed, 1])
    images, masks, tags, contents = [], [], np.zeros((num, len(EVERYDAY)), bool), []
    for number in range(num):
        wanted = rng.choice(len(EVERYDAY), int(rng.integers(min_objects, max_objects + 1)), replace=False).tolist()
        image, there, covers = scene(artists, wanted, size, rng, recolour=False)
        mask = np.zeros((size, size), np.uint8)
        for thing, cover in zip(there, covers, strict=True):
            mask[cover] = thing + 1
        images.append(np.round(255 * image).astype(np.uint8))
        masks.append(mask)
        tags[number, there] = True
        contents.append(Content(objects=tuple((thing, None) for thing in there)))
    return Scenes(np.stack(images), tags, np.zeros(num, np.int64), np.stack(masks), contents, tuple(EVERYDAY.values()))


def contact_sheet(tiles: np.ndarray) -> Image.Image:
    """Tiles [N,S,S] or [N,S,S,3], row by row; the last row is filled up with black."""
    missing = -len(tiles) % COLUMNS
    tiles = np.concatenate([tiles, np.zeros((missing, *tiles.shape[1:]), np.uint8)])
    rows = [np.concatenate(list(row), axis=1) for row in np.split(tiles, len(tiles) // COLUMNS)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", default="jaxzs-out/art/sprites.npz")
    parser.add_argument("--each", type=int, default=6, help="images of each everyday thing")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    artists = unseen(options.sprites)
    options.out.mkdir(parents=True, exist_ok=True)
    images, labels = things(artists, options.each, side=72)
    made = scenes(artists, options.scenes)
    for name, pictures in (("things", images), ("scenes", made.images)):
        contact_sheet(pictures).save(options.out / f"{name}.webp", quality=88, method=6)
    contact_sheet(made.masks).save(options.out / "masks.png", optimize=True)
    index = {
        "names": list(EVERYDAY.values()),
        "things": {"side": 72, "labels": labels.tolist()},
        "scenes": {"side": made.images.shape[1], "tags": [np.flatnonzero(row).tolist() for row in made.tags]},
    }
    (options.out / "index.json").write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {len(images)} things, {len(made.images)} scenes, {size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
