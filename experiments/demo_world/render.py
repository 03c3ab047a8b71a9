"""Coloured shapes on patterned backgrounds, glyphs on backgrounds, and the damage that images take.

Images are uint8 [S, S, 3]; object masks are uint8 [S, S], 0 for background and 1 + shape for a shape. Difficulty runs
from 0 (one large clean object) to 1.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from experiments.demo_world.captions import BACKGROUNDS, COLOURS, SHAPES, Content
from experiments.demo_world.ink import glyph_mask, warp

_PALETTE = np.array(list(COLOURS.values()), np.float32)


def _regular(corners: int, radius: float = 1.0, start: float = -90.0) -> np.ndarray:
    angle = np.deg2rad(start + np.arange(corners) * 360 / corners)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


@cache
def outline(shape: str) -> np.ndarray:
    """Corners of a shape's outline in [-1, 1]^2, [N, 2]; the ring's inner edge follows its outer one."""
    if shape in ("circle", "ring"):
        return _regular(48)
    if shape == "square":
        return np.array([[-0.85, -0.85], [0.85, -0.85], [0.85, 0.85], [-0.85, 0.85]])
    if shape == "triangle":
        return np.array([[0, -0.95], [0.98, 0.85], [-0.98, 0.85]])
    if shape == "diamond":
        return np.array([[0, -1.0], [0.68, 0], [0, 1.0], [-0.68, 0]])
    if shape == "star":
        points = np.empty((10, 2))
        points[0::2], points[1::2] = _regular(5), _regular(5, 0.42, -54)
        return points
    if shape == "cross":
        a = 0.33
        return np.array(
            [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]]
        )  # fmt: skip
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([np.sin(t) ** 3, -(y + 2.5) / 15], 1)
    if shape == "crescent":
        t = np.linspace(np.deg2rad(50), np.deg2rad(310), 40)
        outer = np.stack([np.cos(t), np.sin(t)], 1)
        inner = np.stack([0.36 + 0.78 * np.cos(t[::-1]), 0.82 * np.sin(t[::-1])], 1)
        return np.concatenate([outer, inner]) + np.array([[0.15, 0]])
    if shape == "arrow":
        return np.array([[-1, -0.3], [0.1, -0.3], [0.1, -0.8], [1, 0], [0.1, 0.8], [0.1, 0.3], [-1, 0.3]])
    if shape == "hexagon":
        return _regular(6, 1.0, 0)
    if shape == "bolt":
        return np.array([[0.25, -1], [-0.6, 0.15], [-0.05, 0.15], [-0.3, 1], [0.6, -0.2], [0.05, -0.2]])
    raise ValueError(f"unknown shape {shape!r}; the shapes are {', '.join(SHAPES)}")


def shape_mask(
    shape: str, radius: float, rng: np.random.Generator, difficulty: float = 1.0, *, line: float = 0.0
) -> np.ndarray:
    """A shape of about `radius` pixels, turned, stretched and bent a little; uint8 [M, M].

    line: 0 fills the shape; else only its outline is drawn, that many pixels wide (never in training).
    """
    points = outline(shape)
    turn = rng.normal(0, 0.02 + 0.16 * difficulty)
    if shape == "arrow":
        turn += rng.integers(4) * np.pi / 2 if difficulty > 0.3 else 0.0
    stretch = np.exp(rng.normal(0, 0.02 + 0.07 * difficulty))
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) * np.array([[stretch, 1 / stretch]]) * radius
    bend = 1 + rng.normal(0, 0.03 * difficulty, (len(points), 1)) * (len(points) < 20)
    up = 2
    half = int(np.ceil(radius * 1.35 + line)) + 1
    image = Image.new("L", (2 * half * up, 2 * half * up))
    draw = ImageDraw.Draw(image)

    def corners(scale: float = 1.0) -> list[tuple[float, float]]:
        return [tuple(p) for p in (((points * bend * scale) @ matrix.T + half) * up).tolist()]

    inner = rng.uniform(0.45, 0.6)
    if line:
        width = max(1, round(line * up))
        path = corners()
        draw.line([*path, *path[:2]], fill=255, width=width, joint="curve")
        if shape == "ring":
            path = corners(inner)
            draw.line([*path, *path[:2]], fill=255, width=width, joint="curve")
    else:
        draw.polygon(corners(), fill=255)
        if shape == "ring":
            draw.polygon(corners(inner), fill=0)
    return np.asarray(image.reduce(up))


@cache
def _grid(size: int) -> np.ndarray:
    """Row and column of every pixel, float32 [2, S, S]."""
    return np.mgrid[:size, :size].astype(np.float32)


def background(kind: int, size: int, rng: np.random.Generator, base: np.ndarray | None = None) -> np.ndarray:
    """A background of BACKGROUNDS[kind] in muted colours, float32 [S, S, 3]; base: its main colour [3]."""
    if base is None:
        grey = rng.uniform(20, 235)
        base = np.clip(grey + rng.normal(0, 22, 3), 0, 255)
    step = rng.choice([-1, 1]) * rng.uniform(30, 70)
    if not 10 < base.mean() + step < 245:
        step = -step
    other = np.clip(base + step + rng.normal(0, 8, 3), 0, 255)
    base, other = base.astype(np.float32), other.astype(np.float32)
    name = BACKGROUNDS[kind]
    if name == "plain":
        return np.broadcast_to(base, (size, size, 3)).copy()
    y, x = _grid(size)
    angle = rng.uniform(0, np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    phase = rng.uniform(0, 20, 2)
    period = rng.uniform(5, 9)
    if name == "striped":
        weight = ((along + np.float32(phase[0])) % period < period / 2).astype(np.float32)
    elif name == "checkered":
        cell = rng.uniform(4, 8)
        weight = ((x + phase[0]) // cell + (y + phase[1]) // cell) % 2
    elif name == "dotted":
        dx, dy = ((x + phase[0]) % period) - period / 2, ((y + phase[1]) % period) - period / 2
        weight = np.clip(period * 0.28 + 0.5 - np.hypot(dx, dy), 0, 1)
    elif name == "shaded":
        weight = (along - along.min()) / np.ptp(along)
        other = base + 1.5 * (other - base)
    else:  # noisy
        weight = 0.45 * rng.standard_normal((size, size), np.float32)
    weight = weight[:, :, None].astype(np.float32)
    return np.clip(base + weight * (other - base), 0, 255)


def scene(
    size: int,
    rng: np.random.Generator,
    *,
    min_objects: int = 0,
    max_objects: int = 3,
    difficulty: float = 1.0,
    line: float = 0.0,
    shapes: tuple[int, ...] = tuple(range(len(SHAPES))),
) -> tuple[np.ndarray, Content, np.ndarray]:
    """A scene of coloured shapes that do not overlap: (image float32 [S,S,3], its content, object mask uint8 [S,S]).

    >>> image, content, mask = scene(48, np.random.default_rng(0), min_objects=1)
    >>> image.shape, mask.shape, len(content.objects) > 0
    ((48, 48, 3), (48, 48), True)
    """
    kind = int(rng.integers(len(BACKGROUNDS))) if rng.random() < 0.25 + 0.75 * difficulty else 0
    grey = rng.uniform(20, 235)
    base = np.clip(grey + rng.normal(0, 22, 3), 0, 255)
    image = background(kind, size, rng, base)
    mask = np.zeros((size, size), np.uint8)
    distance = np.abs(_PALETTE - base).sum(1)
    visible = np.flatnonzero(distance > 130)  # an object must stand out from its background
    count = int(rng.integers(min_objects, max_objects + 1))
    largest = 0.42 * size if count <= 1 else 15.0 if count <= 3 else 13.0
    smallest = 8.0 + 4.0 * (1 - difficulty)
    placed: list[tuple[float, float, float]] = []
    objects = []
    for _ in range(count):
        for _attempt in range(20):
            radius = rng.uniform(smallest, max(largest, smallest + 1))
            x, y = (radius + max(size - 2 * radius, 0) * rng.random() for _ in range(2))
            if all(math.hypot(x - px, y - py) > 0.95 * (radius + pr) for px, py, pr in placed):
                break
            largest = max(smallest, largest * 0.93)
        else:
            continue
        placed.append((x, y, radius))
        shape, colour = (shapes[int(rng.integers(len(shapes)))], int(visible[rng.integers(len(visible))]))
        alpha = shape_mask(SHAPES[shape], radius, rng, difficulty, line=line)
        half = alpha.shape[0] // 2
        top, left = round(y) - half, round(x) - half
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + 2 * half, size), min(left + 2 * half, size)
        alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
        weight = alpha[:, :, None].astype(np.float32) / 255
        paint = np.clip(_PALETTE[colour] + rng.normal(0, 10, 3), 0, 255).astype(np.float32)
        image[y0:y1, x0:x1] += weight * (paint - image[y0:y1, x0:x1])
        mask[y0:y1, x0:x1][alpha > 127] = 1 + shape
        objects.append((shape, colour))
    return image, Content(objects=tuple(objects), background=kind), mask


def glyph_image(
    glyph: int, size: int, rng: np.random.Generator, difficulty: float = 1.0, *, held_out: bool = False
) -> tuple[np.ndarray, Content]:
    """A digit or letter, grey as a scan or coloured on any background: (image float32 [S,S,3], its content)."""
    alpha = glyph_mask(glyph, size, rng, difficulty, held_out=held_out).astype(np.float32)
    if rng.random() < 0.5 * difficulty:
        alpha = warp(alpha[None], rng, np.array([rng.uniform(0, 0.04) * size]))[0]
    alpha = alpha[:, :, None] / 255
    if rng.random() < 1 - 0.45 * difficulty:  # a scan: grey ink on grey paper
        ink, paper = rng.uniform(170, 255), rng.uniform(0, 60)
        if rng.random() < 0.3:
            ink, paper = paper, ink
        kind, ground = 0, np.full((size, size, 3), paper, np.float32)
        paint = np.full(3, ink, np.float32)
    else:
        kind = int(rng.integers(len(BACKGROUNDS))) if rng.random() < 0.5 else 0
        base = np.clip(rng.uniform(10, 245) + rng.normal(0, 30, 3), 0, 255)
        ground = background(kind, size, rng, base)
        for _ in range(20):
            paint = rng.uniform(0, 255, 3).astype(np.float32)
            if abs(paint.mean() - base.mean()) > 75:
                break
    if rng.random() < 0.25 * difficulty:  # clutter: pieces of other strokes at the border
        ground = _clutter(ground, rng)
    return ground + alpha * (paint - ground), Content(glyph=glyph, background=kind)


def _clutter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size = image.shape[0]
    canvas = Image.fromarray(image.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(1, 4))):
        side, at = int(rng.integers(4)), rng.uniform(0, size)
        start = ((at, 0), (at, size), (0, at), (size, at))[side]
        end = np.array(start) + rng.normal(0, 0.13 * size, 2)
        colour = tuple(int(c) for c in rng.uniform(0, 255, 3))
        draw.line([start, tuple(end)], fill=colour, width=int(rng.integers(1, 4)))
    return np.asarray(canvas).astype(np.float32)


def damage(image: np.ndarray, rng: np.random.Generator, difficulty: float = 1.0) -> np.ndarray:
    """What happens to training images: coarse scanning, blur, contrast, noise; float32 -> uint8 [S, S, 3]."""
    size = image.shape[0]
    if rng.random() < 0.3 * difficulty:  # scanned coarsely, enlarged again
        coarse = int(rng.uniform(0.17, 0.6) * size)
        small = Image.fromarray(image.astype(np.uint8)).resize((coarse, coarse), Image.Resampling.BOX)
        kind = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.BILINEAR
        image = np.asarray(small.resize((size, size), kind)).astype(np.float32)
    elif rng.random() < 0.2 * difficulty:
        blurred = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.3)))
        image = np.asarray(blurred).astype(np.float32)
    if rng.random() < 0.5 * difficulty:
        image = (image - 128) * rng.uniform(0.6, 1.15) + 128 + rng.normal(0, 12)
    if rng.random() < 0.5:
        image = image + np.float32(rng.uniform(0, 16) * difficulty) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def corrupt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Heavier damage than any in training, for tests: noise, blur, a grey block or low contrast; uint8 [S, S, 3]."""
    size = image.shape[0]
    image = image.astype(np.float32)
    kind = int(rng.integers(4))
    if kind == 0:
        image = image + rng.normal(0, 70, image.shape)
    elif kind == 1:
        image = np.asarray(Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 16)))
    elif kind == 2:
        y, x = rng.integers(0, size // 2, 2)
        image = image.copy()
        image[y : y + size // 2, x : x + size // 2] = rng.uniform(0, 255)
    else:
        image = (image - 128) * 0.15 + 128 + rng.normal(0, 8, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
