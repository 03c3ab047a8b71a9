"""Drawings composed into images: one thing, or several beside each other, on grounds from white to cluttered.

Images are float32 [S,S,3] in [0, 1]; masks are bool [S,S]. Hardness runs from 0, a large thing on white, to 1: with
hard images from the start a network stays at chance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.art_world import sprites


class Artists:
    """Drawings by some artists, ready to be composed: premultiplied, at three sizes so that reducing them is smooth."""

    def __init__(self, drawings: list[np.ndarray]) -> None:
        self.drawn = np.stack([d.any((1, 2, 3)) for d in drawings])  # [A,C]
        self._levels = []
        for size in (sprites.SIZE, sprites.SIZE // 2, sprites.SIZE // 4):
            images = [
                [Image.fromarray(one).convert("RGBa").resize((size, size), Image.Resampling.BOX) for one in d]
                for d in drawings
            ]
            self._levels.append(images)

    @property
    def things(self) -> int:
        return self.drawn.shape[1]

    def drawing(self, thing: int, pixels: float, rng: np.random.Generator) -> Image.Image:
        """One artist's drawing of a thing, at the level for a width of so many pixels."""
        artist = rng.choice(np.flatnonzero(self.drawn[:, thing]))
        level = int(np.clip(math.floor(math.log2(sprites.SIZE / max(pixels, 1.0))), 0, 2))
        return self._levels[level][artist][thing]


class Place(NamedTuple):
    """Where and how a drawing stands: centre and width as shares of the side, turn in radians, mirrored or not."""

    x: float
    y: float
    width: float
    turn: float
    mirrored: bool
    stretch: float


def paste(
    canvas: np.ndarray, drawing: Image.Image, place: Place, colours: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The drawing over a canvas, its colours through a [4,3] affine map if given: (canvas, coverage [S,S])."""
    side, source = len(canvas), drawing.width
    scale = source / (place.width * side)
    c, s = math.cos(place.turn) * scale, math.sin(place.turn) * scale
    mirror = -1.0 if place.mirrored else 1.0
    a, b, d, e = mirror * c * place.stretch, mirror * s * place.stretch, -s / place.stretch, c / place.stretch
    x, y = place.x * side, place.y * side
    inverse = (a, b, source / 2 - a * x - b * y, d, e, source / 2 - d * x - e * y)  # output pixel -> source pixel
    placed = drawing.transform((side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    layer = np.asarray(placed, np.float32) / 255
    colour, cover = layer[..., :3], layer[..., 3:]
    if colours is not None:  # the map of premultiplied colours: its constant part counts as far as the thing covers
        colour = np.clip(colour @ colours[:3] + cover * colours[3], 0, cover)
    return canvas * (1 - cover) + colour, cover[..., 0]


def ground(side: int, rng: np.random.Generator) -> np.ndarray:
    """Near white for a third, else two colours shading into each other under coarse noise."""
    if rng.random() < 0.35:
        return np.broadcast_to(rng.uniform(0.93, 1, 3).astype(np.float32), (side, side, 3))
    angle, line = rng.uniform(0, 2 * np.pi), np.linspace(0, 1, side, dtype=np.float32)
    ramp = ((np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None] + 1) / 2).astype(np.float32)[..., None]
    first, second = rng.random((2, 3), np.float32)
    coarse = np.clip(127.5 + 60 * rng.standard_normal((6, 6, 3)), 0, 255).astype(np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
    return np.clip(first * (1 - ramp) + second * ramp + noise * np.float32(rng.uniform(0, 0.5)), 0, 1)


def colour_map(rng: np.random.Generator) -> np.ndarray:
    """A random change of colours as an affine map [4,3]: mixing, saturation (sometimes none), contrast, brightness."""
    mix = np.eye(3) + rng.standard_normal((3, 3)) * 0.12 * rng.random()
    saturation = 0.0 if rng.random() < 0.08 else rng.uniform(0.3, 1.5)
    grey = np.full((3, 3), 1 / 3)
    contrast = rng.uniform(0.7, 1.35)
    matrix = (grey + (np.eye(3) - grey) * saturation) @ mix * contrast
    return np.concatenate([matrix, np.full((1, 3), 0.5 - 0.5 * contrast + rng.normal() * 0.1)]).astype(np.float32)


def damaged(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the images untouched; the others with their colours changed as a whole and a little noise."""
    if rng.random() < 0.5:
        return image
    colours = colour_map(rng)
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(0.04 * rng.random())
    return np.clip(image @ colours[:3] + colours[3] + noise, 0, 1)


def single(
    artists: Artists, thing: int, side: int, rng: np.random.Generator, hardness: float = 1.0, recolour: bool = True
) -> tuple[np.ndarray, list[int]]:
    """One thing, sometimes larger than the image, sometimes before a small other one: (image, every thing in it)."""
    hard = rng.random() < hardness
    width = (
        rng.uniform(1.0, 1.5) if rng.random() < 0.15 * hardness else rng.uniform(1 - 0.6 * hardness * rng.random(), 1.0)
    )
    image, there = (ground(side, rng) if hard else np.full((side, side, 3), 0.97, np.float32)), [thing]
    if hard and rng.random() < 0.3:
        other = int(rng.integers(artists.things))
        image, there = (
            paste(image, artists.drawing(other, 0.3 * side, rng), _anywhere(rng, 0.3, 0.4, 0.5), None)[0],
            [thing, other],
        )
    place = _anywhere(rng, width, 0.1 * hardness, 0.06 + 0.24 * hardness)
    image, _ = paste(
        image,
        artists.drawing(thing, width * side, rng),
        place,
        colour_map(rng) if recolour and rng.random() < 0.7 * hardness else None,
    )
    return (damaged(image, rng) if hard and recolour else image), there


def _anywhere(rng: np.random.Generator, width: float, offset: float, turn: float) -> Place:
    x, y = 0.5 + rng.uniform(-offset, offset, 2)
    return Place(x, y, width, rng.normal() * turn, bool(rng.random() < 0.5), float(np.exp(rng.normal() * 0.08)))


def scene(
    artists: Artists,
    things: list[int],
    side: int,
    rng: np.random.Generator,
    widths: tuple[float, float] = (0.25, 0.5),
    recolour: bool = True,
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Several things that hardly cover each other: (image, the things that found room, masks bool [K,S,S])."""
    image, there, masks = ground(side, rng), [], []
    taken: list[Place] = []
    for thing in things:
        for _ in range(20):  # places; then the thing is left out
            width = rng.uniform(*widths)
            x, y = rng.uniform(0.42 * width, 1 - 0.42 * width, 2)
            if all(math.hypot(x - p.x, y - p.y) > 0.42 * (width + p.width) for p in taken):
                break
        else:
            continue
        place = Place(x, y, width, rng.normal() * 0.25, bool(rng.random() < 0.5), float(np.exp(rng.normal() * 0.08)))
        colours = colour_map(rng) if recolour and rng.random() < 0.5 else None
        image, cover = paste(image, artists.drawing(thing, width * side, rng), place, colours)
        masks = [mask & (cover < 0.5) for mask in masks] + [cover >= 0.5]
        taken.append(place)
        there.append(thing)
    return (damaged(image, rng) if recolour else image), there, np.stack(masks)
