"""Images of any size in batches of few shapes: resized to whole patches, padded, masked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxzs.clip import Model
from jaxzs.clip.preprocess import ImagePreprocessor, to_rgb
from jaxzs.errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL import Image

_ATTENTION_BYTES = 2 * 2**30  # of one layer's attention maps, which bounds what a batch takes


@dataclasses.dataclass(frozen=True)
class Batching:
    """How images are put together.

    batch_size: images per program call, at most; fewer where their attention would not fit.
    step: grids are padded to multiples of so many patches, so that few shapes are compiled; 1 pads nothing, and only
      images of equal size share a batch.
    scales: sizes of each image relative to its own, whose scores are averaged. The paper has one, 1.0.
    max_patches: an image of more patches is refused.

    >>> patch.Batching(batch_size=4, scales=(1.0, 1.5)).max_patches
    4096
    >>> patch.Batching(scales=())
    Traceback (most recent call last):
    jaxzs.errors.DataError: scales are (), expected numbers above 0, at most 16
    """

    batch_size: int = 8
    step: int = 8
    scales: tuple[float, ...] = (1.0,)
    max_patches: int = 4096

    def __post_init__(self) -> None:
        if min(self.batch_size, self.step, self.max_patches) < 1:
            raise DataError("batch_size, step and max_patches must be at least 1")
        if not self.scales or not all(0 < scale <= 16 for scale in self.scales):
            raise DataError(f"scales are {self.scales}, expected numbers above 0, at most 16")


DEFAULT_BATCHING = Batching()


def patch_aligned_size(height: int, width: int, patch_size: int, scale: float = 1.0) -> tuple[int, int]:
    """Each side, scaled, rounded up to a multiple of the patch size: the original never crops or pads.

    >>> patch_aligned_size(375, 500, 16)
    (384, 512)
    """
    up = lambda side: patch_size * math.ceil(round(side * scale / patch_size, 6))  # noqa: E731
    return up(height), up(width)


def prepare_image(
    image: Any, preprocessor: ImagePreprocessor, patch_size: int, *, scale: float = 1.0, max_patches: int = 4096
) -> np.ndarray:
    """One image as pixels [H,W,3] float32 whose sides are multiples of the patch size, normalised.

    image: PIL image or array as `model.preprocess` takes them; resized by Pillow's bicubic filter on 8 bits, sides
    rounded up. Raises `ImageError` for an image without area, below two patches a side, or above `max_patches`.

    >>> model = jaxzs.load("demo")
    >>> patch.prepare_image(np.zeros((60, 90, 3), np.uint8), model.preprocessor, patch_size=8).shape
    (64, 96, 3)
    """
    from PIL import Image

    rgb = to_rgb(image)
    height, width = patch_aligned_size(rgb.height, rgb.width, patch_size, scale)
    rows, columns = height // patch_size, width // patch_size
    if min(rows, columns) < 2:
        raise ImageError(
            f"{rgb.height}x{rgb.width} pixels are {rows}x{columns} patches of {patch_size}; at least "
            f"2x2 are needed to tell places apart: enlarge it, or raise the scale"
        )
    if rows * columns > max_patches:
        attention = (rows * columns) ** 2 * 4 / 2**30
        raise ImageError(
            f"{rgb.height}x{rgb.width} pixels are {rows * columns} patches, more than {max_patches}; each "
            f"attention map would take {attention:.1f} GiB. Scale the image by "
            f"{math.floor(100 * math.sqrt(max_patches / (rows * columns))) / 100:.2f}, cut it into "
            "pieces, or raise max_patches"
        )
    if (height, width) != (rgb.height, rgb.width):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return preprocessor.normalize(np.asarray(rgb))


class Piece(NamedTuple):
    """One image at one of the scales, ready for the encoder. scale: its place among the scales."""

    number: int
    scale: int
    image: Image.Image  # RGB, as given
    pixels: np.ndarray  # [H,W,3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as given."""
        return self.image.height, self.image.width


class Stack(NamedTuple):
    """Images of one padded grid; batch rows beyond `pieces` are padding.

    grids: true rows and columns of each piece. pixels: [B,H,W,3]. mask: [B,rows,columns] bool.
    """

    pieces: list[Piece]
    grids: list[tuple[int, int]]
    pixels: np.ndarray
    mask: np.ndarray


def stacks(
    model: Model,
    images: Iterable[Any],
    batching: Batching,
    *,
    padded: bool = True,
    multiple: int = 1,
    on_error: Callable[[int, ImageError], None] | None = None,
) -> Iterator[Stack]:
    """Batches of images that share a padded grid, as soon as there are enough of them; the rest at the end.

    padded: False lets only images of equal grids share a batch. multiple: of which the batch sizes are.
    on_error: told the number of each image that cannot be used, which is then left out; without it, it raises.
    """
    patch_size, step = model.config.vision.patch_size, batching.step if padded else 1
    waiting: dict[tuple[int, int], list[Piece]] = {}
    for piece in _pieces(model, images, batching, on_error):
        height, width, _ = piece.pixels.shape
        grid = (step * math.ceil(height / patch_size / step), step * math.ceil(width / patch_size / step))
        waiting.setdefault(grid, []).append(piece)
        size = _batch_size(grid, model, batching, multiple)
        if len(waiting[grid]) == size:
            yield _stack(waiting.pop(grid), grid, size, patch_size)
    for grid, pieces in waiting.items():
        yield _stack(pieces, grid, _batch_size(grid, model, batching, multiple), patch_size)


def _pieces(
    model: Model, images: Iterable[Any], batching: Batching, on_error: Callable[[int, ImageError], None] | None
) -> Iterator[Piece]:
    for number, image in enumerate(images):
        try:
            rgb = to_rgb(image)
            pixels = [
                prepare_image(
                    rgb,
                    model.preprocessor,
                    model.config.vision.patch_size,
                    scale=scale,
                    max_patches=batching.max_patches,
                )
                for scale in batching.scales
            ]
        except ImageError as error:
            if on_error is None:
                raise ImageError(f"image {number}: {error}") from error
            on_error(number, error)
            continue
        for place, at_scale in enumerate(pixels):
            yield Piece(number, place, rgb, at_scale)


def _batch_size(grid: tuple[int, int], model: Model, batching: Batching, multiple: int) -> int:
    """Images per call on this grid: fewer than asked for where the attention maps of all heads would be too much."""
    maps = model.config.vision.num_attention_heads * (1 + grid[0] * grid[1]) ** 2 * 4
    size = max(1, min(batching.batch_size, _ATTENTION_BYTES // maps))
    return multiple * math.ceil(size / multiple)


def _stack(pieces: list[Piece], grid: tuple[int, int], size: int, patch_size: int) -> Stack:
    """Pad to the grid and to `size` images."""
    pixels = np.zeros((size, grid[0] * patch_size, grid[1] * patch_size, 3), np.float32)
    mask = np.zeros((size, *grid), bool)
    grids = []
    for row, piece in enumerate(pieces):
        height, width, _ = piece.pixels.shape
        grids.append((height // patch_size, width // patch_size))
        pixels[row, :height, :width] = piece.pixels
        mask[row, : grids[row][0], : grids[row][1]] = True
    return Stack(pieces, grids, pixels, mask)
