"""Masks of digits and capital letters: from matplotlib's fonts and from hand-written stroke skeletons.

A mask is uint8 [S, S], 255 where there is ink. Difficulty runs from 0 (upright, centred, clean) to 1.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from experiments.demo_world.captions import GLYPHS

# Fonts that ship with matplotlib, without the symbol and display fonts; the last group never appears in training.
TRAIN_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmb10", "cmr10", "cmss10",
)  # fmt: skip
TEST_FONTS = (
    "DejaVuSans-BoldOblique",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralBolIta",
    "cmtt10",
    "DejaVuSansMono-Oblique",
)

# Skeletons: ways of writing each glyph, strokes separated by ";", points "x y" in a 100 x 100 box (y down), joined
# by a smooth curve; "|" is a corner.
SKELETONS = {
    "0": (
        "50 0 15 20 5 50 15 80 50 100 85 80 95 50 85 20 50 0",
        "70 10 45 2 15 25 5 60 25 95 55 98 85 75 92 40 75 10 50 4",
        "60 0 30 25 20 60 35 98 55 95 75 60 78 25 60 0",
        "40 3 12 30 8 65 30 97 62 97 90 65 88 30 62 5 50 12",
        "62 6 40 0 18 18 8 55 22 92 48 100 78 82 90 48 84 16 66 2 52 8",
    ),
    "1": (
        "50 0 50 100",
        "25 25 | 55 0 | 55 100",
        "30 22 | 52 0 | 52 100 ; 22 100 82 100",
        "62 0 40 100",
        "47 0 53 50 50 100",
        "40 14 | 54 0 | 50 100",
        "20 34 45 16 56 0 | 54 100 ; 30 98 78 100",
    ),
    "2": (
        "10 25 25 5 55 0 82 15 85 38 60 65 30 85 10 100 | 92 100",
        "12 22 35 2 65 3 85 22 78 48 50 75 25 92 10 95 12 82 30 80 55 92 75 100 95 92",
        "15 15 45 0 78 10 85 32 65 60 10 98 | 50 96 95 98",
        "10 8 50 0 86 12 60 50 | 12 98 | 92 96",
        "12 28 20 8 50 0 80 12 80 40 50 70 12 92 40 88 70 98 95 88",
        "20 30 22 8 52 0 76 18 70 48 45 78 18 100 | 85 94",
    ),
    "3": (
        "10 12 40 0 75 8 80 28 65 44 40 48 | 70 52 90 72 75 94 45 100 8 88",
        "12 2 | 85 2 | 45 42 | 75 50 90 72 72 95 40 100 8 88",
        "15 10 50 0 80 18 70 40 48 48 80 60 85 82 55 100 10 92",
        "15 15 45 0 78 12 78 35 50 47 | 85 58 88 84 55 100 12 90",
        "15 12 50 0 80 18 65 42 42 50 38 44 55 44 85 62 82 90 45 100 12 90",
        "20 6 60 0 82 20 58 44 30 50 | 68 50 80 70 60 92 15 100",
    ),
    "4": (
        "22 0 12 55 | 88 55 ; 70 15 66 100",
        "62 0 | 5 68 | 95 68 ; 66 0 66 100",
        "15 5 12 40 25 55 55 55 82 48 ; 82 0 80 50 75 100",
        "70 100 | 72 0 | 8 62 | 92 60",
        "25 2 18 30 20 50 50 54 80 50 ; 78 8 72 55 70 100",
        "18 0 | 15 45 | 80 45 ; 80 0 | 78 100",
        "40 0 25 30 8 58 | 95 52 ; 66 28 60 100",
        "20 8 15 40 35 52 72 42 ; 80 2 70 45 58 100",
    ),
    "5": (
        "82 2 | 25 2 | 18 42 | 45 36 78 45 88 68 75 92 45 100 10 90",
        "25 5 20 45 | 45 38 80 48 88 72 68 96 35 100 8 88 ; 25 5 85 2",
        "85 5 50 2 25 10 20 35 45 45 75 55 82 78 60 98 12 95",
        "80 0 30 4 | 22 45 | 55 40 85 60 70 95 15 98",
        "28 12 22 48 50 44 80 60 75 90 40 100 10 92 ; 35 5 88 0",
        "90 0 | 40 2 | 25 42 55 46 72 66 58 90 10 100",
        "35 0 28 40 55 45 72 68 55 95 15 96 ; 35 2 92 8",
    ),
    "6": (
        "70 0 35 20 12 55 15 85 45 100 80 90 85 65 60 50 30 55 14 75",
        "60 0 20 45 8 75 25 98 60 98 82 80 70 58 40 55 15 72",
        "78 8 50 2 22 25 10 60 20 92 52 100 85 85 82 60 55 48 22 60 12 72",
        "45 0 25 35 18 70 30 98 58 96 68 75 52 60 28 68 20 80",
        "80 0 40 28 14 66 30 98 64 96 74 72 54 62 26 82",
        "30 0 18 40 15 75 32 100 65 95 78 72 58 58 32 66 18 82",
    ),
    "7": (
        "8 4 | 90 4 | 40 100",
        "8 4 | 88 2 60 45 45 100",
        "10 4 | 88 4 | 42 100 ; 28 50 80 48",
        "12 20 | 12 4 | 90 4 60 50 48 100",
        "8 12 25 3 50 8 88 2 | 62 45 42 100",
        "10 5 | 90 3 60 40 40 100 ; 25 52 75 46",
        "15 10 | 78 0 | 75 40 68 100",
        "8 22 22 2 50 6 90 0 | 55 50 35 100 ; 30 48 78 52",
    ),
    "8": (
        "78 15 50 0 22 14 28 35 55 50 82 70 72 95 45 100 18 90 22 66 50 48 78 28 78 15",
        "50 0 25 8 22 28 38 45 62 45 78 28 75 8 50 0 ; 50 47 20 58 15 82 38 100 62 100 85 82 80 58 50 47",
        "50 46 22 30 30 5 60 0 78 18 65 40 35 58 18 80 38 100 68 97 80 75 50 46",
        "85 12 55 2 25 12 30 38 70 60 80 85 50 100 20 85 30 60 65 38 72 14",
        "72 5 45 2 30 20 45 42 60 65 52 95 25 98 15 78 40 52 68 28 72 8",
        "88 6 60 0 32 10 34 32 56 52 70 76 52 100 26 92 28 68 52 48 84 22",
    ),
    "9": (
        "82 18 60 0 28 5 12 30 30 52 62 48 82 22 | 80 60 72 100",
        "80 12 45 0 15 18 20 45 50 52 78 30 80 10 | 78 60 60 92 25 98",
        "78 20 50 2 20 15 18 42 48 50 76 30 ; 80 5 78 50 76 100",
        "75 20 55 2 28 12 22 38 42 50 68 35 75 15 | 60 60 40 100",
        "80 15 50 0 18 20 25 48 58 50 80 25 85 15 | 86 55 70 90 40 100 15 88",
        "70 8 40 0 18 22 30 44 58 38 74 10 | 66 52 62 100",
        "86 0 45 4 20 28 34 48 62 40 84 4 | 62 52 44 100",
    ),
    "A": ("5 100 | 50 0 | 95 100 ; 22 62 78 62", "10 100 20 40 50 0 80 40 90 100 ; 14 58 86 58"),
    "B": (
        "15 0 15 100 ; 15 0 60 2 80 22 60 45 15 48 | 70 52 90 75 65 100 15 100",
        "20 100 | 18 0 55 0 70 25 20 48 75 60 80 90 20 100",
    ),
    "C": ("88 15 55 0 18 22 8 55 25 90 60 100 90 85", "80 8 40 5 12 45 30 92 85 92"),
    "D": ("15 0 15 100 ; 15 0 65 5 92 45 70 95 15 100", "18 100 | 15 2 60 6 85 50 60 95 12 98"),
    "E": (
        "88 0 | 15 0 | 15 100 | 90 100 ; 15 48 75 48",
        "80 5 45 0 20 20 50 45 | 15 65 25 95 60 100 88 88",
    ),
    "F": ("88 0 | 15 0 | 15 100 ; 15 48 75 48", "20 2 20 100 ; 12 2 92 0 ; 18 46 70 44"),
    "G": (
        "88 18 50 0 12 25 8 65 35 98 75 95 90 60 | 55 60",
        "85 12 40 2 10 45 25 92 65 96 85 70 85 55 | 85 100 ; 55 56 92 56",
    ),
    "H": ("12 0 12 100 ; 88 0 88 100 ; 12 50 88 50", "18 0 14 100 ; 82 4 86 100 ; 14 54 84 46"),
    "I": ("50 0 50 100 ; 22 0 78 0 ; 22 100 78 100", "50 0 50 100 ; 30 2 70 2 ; 30 98 70 98"),
    "J": ("75 0 75 70 60 98 30 98 12 78", "30 0 95 0 ; 66 0 66 75 45 100 12 82"),
    "K": ("15 0 15 100 ; 85 0 15 55 ; 35 42 90 100", "18 0 18 100 ; 80 4 | 22 50 | 85 98"),
    "L": ("18 0 | 18 100 | 88 100", "22 0 18 60 20 98 | 85 95"),
    "M": ("8 100 | 12 0 | 50 65 | 88 0 | 92 100", "8 100 | 25 0 | 50 80 | 75 0 | 92 100"),
    "N": ("12 100 | 12 0 | 88 100 | 88 0", "15 100 18 2 | 82 98 | 86 0"),
    "O": ("50 0 12 20 2 50 12 80 50 100 88 80 98 50 88 20 50 0", "60 2 20 12 5 50 25 92 65 98 95 60 85 15 55 2"),
    "P": ("15 0 15 100 ; 15 0 65 2 88 26 65 52 15 54", "20 100 | 20 4 60 0 82 24 60 48 20 50"),
    "Q": (
        "50 0 12 20 2 50 12 80 50 100 88 80 98 50 88 20 50 0 ; 60 70 98 104",
        "55 0 15 15 5 50 20 90 60 96 92 65 88 20 50 0 ; 55 60 80 90 100 98",
    ),
    "R": ("15 0 15 100 ; 15 0 65 2 85 25 65 50 15 52 ; 45 52 90 100", "20 100 | 18 2 60 0 80 24 58 46 22 50 | 88 100"),
    "S": ("85 15 55 0 20 8 18 35 50 48 82 64 80 92 45 100 12 86", "80 8 40 2 20 28 55 50 80 75 55 100 15 92"),
    "T": ("5 0 95 0 ; 50 0 50 100", "8 4 92 0 ; 52 2 48 100"),
    "U": ("12 0 12 60 28 95 50 100 72 95 88 60 88 0", "15 0 18 70 45 98 80 75 85 0 | 88 100"),
    "V": ("5 0 | 50 100 | 95 0", "8 2 40 70 50 98 | 60 65 92 0"),
    "W": ("2 0 | 26 100 | 50 25 | 74 100 | 98 0", "4 0 15 90 40 90 50 30 | 62 92 85 90 96 0"),
    "X": ("8 0 92 100 ; 92 0 8 100", "12 2 50 50 90 98 ; 86 0 50 52 10 100"),
    "Y": ("5 0 | 50 50 | 95 0 ; 50 50 50 100", "10 0 | 48 52 ; 90 0 30 100"),
    "Z": ("8 0 | 92 0 | 8 100 | 92 100", "10 4 | 88 2 | 12 98 | 92 96 ; 30 52 70 50"),
}  # fmt: skip


def _smooth(points: np.ndarray, samples: int = 5) -> np.ndarray:
    """Catmull-Rom curve through points [N, ...], `samples` points per piece."""
    if len(points) == 2:
        return points
    closed = np.array_equal(points[0], points[-1])
    before = points[-2] if closed else 2 * points[0] - points[1]
    after = points[1] if closed else 2 * points[-1] - points[-2]
    p = np.concatenate([before[None], points, after[None]])
    t = (np.arange(samples) / samples).reshape(1, -1, *([1] * (points.ndim - 1)))
    p0, p1, p2, p3 = (p[i : len(p) - 3 + i, None] for i in range(4))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, *points.shape[1:]), points[-1:]])


@cache
def _skeleton(glyph: str, variant: int) -> tuple[np.ndarray, np.ndarray, tuple[slice, ...]]:
    """A skeleton as (control points [N, 2] in the unit box, curve matrix [M, N], rows of each smooth piece).

    The curve through the points is linear in them: curve = matrix @ points.
    """
    points: list[list[float]] = []
    pieces: list[list[int]] = []  # numbers of the control points of each smooth piece
    for stroke in SKELETONS[glyph][variant].split(";"):
        corner: list[int] = []  # a piece after a corner starts where the last one ended
        for text in stroke.split("|"):
            new = np.array(text.split(), float).reshape(-1, 2) / 100
            piece = corner + list(range(len(points), len(points) + len(new)))
            points.extend(new.tolist())
            corner = piece[-1:]
            if len(piece) > 1:
                pieces.append(piece)
    identity = np.eye(len(points))
    curves = [_smooth(identity[piece]) for piece in pieces]
    ends = np.cumsum([0] + [len(c) for c in curves])
    rows = tuple(slice(a, b) for a, b in itertools.pairwise(ends))
    return np.array(points), np.concatenate(curves), rows


def _affine(rng: np.random.Generator, difficulty: float) -> np.ndarray:
    """Random slant, rotation and anisotropic scale, [2, 2]."""
    angle = rng.normal(0, 0.14 * difficulty)
    slant = rng.normal(0, 0.05 + 0.25 * difficulty)
    stretch = np.exp(rng.normal(0, 0.05 + 0.2 * difficulty))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]]) @ np.array([[stretch, -slant], [0, 1 / stretch]])


def stroke_mask(glyph: str, size: int, rng: np.random.Generator, difficulty: float = 1.0) -> np.ndarray:
    """A hand-written glyph, uint8 [S, S]: jittered, bent, slanted skeleton drawn with a round pen.

    >>> stroke_mask("7", 48, np.random.default_rng(0)).shape
    (48, 48)
    """
    points, matrix, rows = _skeleton(glyph, int(rng.integers(len(SKELETONS[glyph]))))
    jitter = 0.012 + 0.03 * difficulty * rng.random()
    affine = _affine(rng, difficulty) * np.array([[rng.uniform(0.55, 0.95)], [1.0]])
    bend = rng.normal(0, 0.03 * difficulty, (2, 2))  # a slow wave along each axis
    phase = rng.uniform(0, 2 * np.pi, (2, 2))
    curve = matrix @ (points + rng.normal(0, jitter, points.shape)) - 0.5
    curve = (curve + (bend * np.sin(2 * np.pi * curve[:, :, None] + phase)).sum(1)) @ affine.T
    low, high = curve.min(0), curve.max(0)
    height = size * rng.uniform(0.78 - 0.25 * difficulty, 0.86 + 0.08 * difficulty)
    scale = min(height / max(high[1] - low[1], 0.3), 0.94 * size / max(high[0] - low[0], 0.1))
    pen = scale * rng.uniform(0.07 - 0.025 * difficulty, 0.13 + 0.09 * difficulty)
    scale *= 1 - 0.5 * pen / size
    slack = np.maximum(size - (high - low) * scale - pen, 0)
    shift = slack * (0.5 + rng.uniform(-0.45, 0.45, 2) * difficulty) + 0.5 * pen
    up = 2  # drawn twice as large, then reduced: anti-aliasing
    image = Image.new("L", (size * up, size * up))
    draw = ImageDraw.Draw(image)
    radius = 0.5 * pen * up
    pixels = ((curve - low) * scale + shift) * up
    for piece in rows:
        line = [tuple(p) for p in pixels[piece].tolist()]
        draw.line(line, fill=255, width=max(1, round(2 * radius)), joint="curve")
        for x, y in (line[0], line[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image.reduce(up))


@cache
def _font_glyph(font: str, glyph: str) -> Image.Image:
    """A glyph of a font, 96 pixels high before cropping to its ink."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    drawn = ImageFont.truetype(str(path), 80)
    image = Image.new("L", (160, 160))
    ImageDraw.Draw(image).text((80, 80), glyph, font=drawn, fill=255, anchor="mm")
    return image.crop(image.getbbox())


def font_mask(
    glyph: str, size: int, rng: np.random.Generator, difficulty: float = 1.0, *, fonts: tuple[str, ...] = TRAIN_FONTS
) -> np.ndarray:
    """A printed glyph, uint8 [S, S]: slanted, rotated, stretched, made bolder or thinner."""
    ink = _font_glyph(fonts[int(rng.integers(len(fonts)))], glyph)
    height = size * rng.uniform(0.7 - 0.25 * difficulty, 0.8 + 0.12 * difficulty)
    matrix = _affine(rng, 0.7 * difficulty)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(ink.size) / 2
    extent = np.ptp(corners @ matrix.T, axis=0)
    scale = min(height / extent[1], 0.92 * size / extent[0])
    slack = size - extent * scale
    centre = 0.5 * size + slack * rng.uniform(-0.45, 0.45, 2) * difficulty
    inverse = np.linalg.inv(matrix * scale)
    offset = np.array(ink.size) / 2 - inverse @ centre
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    image = ink.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    weight = rng.random()
    if weight < 0.2 * difficulty:
        image = image.filter(ImageFilter.MaxFilter(3))
    elif weight < 0.3 * difficulty:
        image = image.filter(ImageFilter.GaussianBlur(1))
    return np.asarray(image)


def glyph_mask(
    glyph: int,
    size: int,
    rng: np.random.Generator,
    difficulty: float = 1.0,
    *,
    held_out: bool = False,
    handwritten: float = 0.4,
) -> np.ndarray:
    """Mask of glyph number `glyph` (index into GLYPHS), written by hand with probability `handwritten`, else printed.

    >>> glyph_mask(7, 48, np.random.default_rng(0)).dtype
    dtype('uint8')
    """
    if rng.random() < handwritten:
        return stroke_mask(GLYPHS[glyph], size, rng, difficulty)
    return font_mask(GLYPHS[glyph], size, rng, difficulty, fonts=TEST_FONTS if held_out else TRAIN_FONTS)


def warp(masks: np.ndarray, rng: np.random.Generator, amplitude: np.ndarray) -> np.ndarray:
    """Bend masks [N, S, S] by smooth random displacements of about `amplitude` [N] pixels; float32 [N, S, S]."""
    n, size = masks.shape[:2]
    coarse = rng.normal(0, 1, (2, n, 4, 4)).astype(np.float32) * amplitude[None, :, None, None]
    weights = _interpolation(4, size)
    shift = np.einsum("ya,dnab,xb->dnyx", weights, coarse, weights)  # [2, N, S, S]
    grid = np.arange(size, dtype=np.float32)
    y = np.clip(grid[:, None] + shift[0], 0, size - 1.001)
    x = np.clip(grid[None, :] + shift[1], 0, size - 1.001)
    y0, x0 = y.astype(np.int32), x.astype(np.int32)
    fy, fx = y - y0, x - x0
    flat = masks.reshape(-1).astype(np.float32)
    index = (np.arange(n, dtype=np.int32)[:, None, None] * size + y0) * size + x0
    top = flat[index] * (1 - fx) + flat[index + 1] * fx
    bottom = flat[index + size] * (1 - fx) + flat[index + size + 1] * fx
    return top * (1 - fy) + bottom * fy


@cache
def _interpolation(coarse: int, size: int) -> np.ndarray:
    """Linear interpolation from `coarse` knots to `size` pixels, [size, coarse]."""
    position = np.linspace(0, coarse - 1, size)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(coarse))).astype(np.float32)
