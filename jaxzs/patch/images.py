"""Images of any size to tags: resizing to whole patches, batches of few shapes, several scales, several devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxzs.clip import Model
from jaxzs.clip.model import Params
from jaxzs.clip.preprocess import ImagePreprocessor, to_rgb
from jaxzs.errors import DataError, ImageError
from jaxzs.patch.grid import full_grid
from jaxzs.patch.tags import Tags, decide, tag

_ATTENTION_BYTES = 2 * 2**30  # of one layer's attention maps, which bounds what a batch takes


class ImageTags(NamedTuple):
    """Tags of one image, as NumPy arrays on its own grid.

    number: its place among the images given. size: (height, width) as given.
    scores, tags, threshold: [F]. reidentified, probability: [F] second looks.
    refined: [rows,columns,C] scores after dual masking. coarse: the same before.
    boxes: [F,4] (top, bottom, left, right) as fractions of the image, where each class scores high.

    With several scales, scores are their mean, and everything that has places is from the first scale.
    """

    number: int
    size: tuple[int, int]
    scores: np.ndarray
    tags: np.ndarray
    threshold: np.ndarray
    reidentified: np.ndarray
    probability: np.ndarray
    coarse: np.ndarray
    refined: np.ndarray
    boxes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batching:
    """How images are put together.

    batch_size: images per program call, at most; fewer where their attention would not fit.
    step: grids are padded to multiples of so many patches, so that few shapes are compiled; 1 pads nothing, and only
      images of equal size share a batch.
    scales: sizes of each image relative to its own, whose scores are averaged. The paper has one, 1.0.
    max_patches: an image of more patches is refused.
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


def patch_aligned_size(
    height: int, width: int, patch_size: int, scale: float = 1.0
) -> tuple[int, int]:
    """Each side, scaled, rounded up to a multiple of the patch size: the original never crops or pads.

    >>> patch_aligned_size(375, 500, 16)
    (384, 512)
    """
    up = lambda side: patch_size * math.ceil(round(side * scale / patch_size, 6))  # noqa: E731
    return up(height), up(width)


def prepare_image(
    image: Any,
    preprocessor: ImagePreprocessor,
    patch_size: int,
    *,
    scale: float = 1.0,
    max_patches: int = 4096,
) -> np.ndarray:
    """One image as pixels [H,W,3] float32 whose sides are multiples of the patch size, normalised.

    image: PIL image or array as `model.preprocess` takes them; resized by Pillow's bicubic filter on 8 bits, sides
    rounded up. Raises `ImageError` for an image without area, below two patches a side, or above `max_patches`.
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


def tag_images(
    model: Model,
    images: Iterable[Any],
    text_features: jax.Array | np.ndarray,
    *,
    num_foreground: int,
    batching: Batching = Batching(),
    mesh: Mesh | None = None,
    on_error: Callable[[int, ImageError], None] | None = None,
    **options: Any,
) -> Iterator[ImageTags]:
    """Tags of many images of any sizes, batch by batch; read lazily, in the order in which batches fill up.

    Args:
      model: a loaded checkpoint.
      images: PIL images or uint8 arrays.
      text_features: [C,E], foreground first.
      num_foreground: F.
      batching: sizes of batches, padding, scales. With `exact=True` among the options nothing is padded.
      mesh: devices to divide each batch over; every device works on its own images. Default: one device.
      on_error: told the number of each image that cannot be used, which is then left out; by default it raises.
      options: of `jaxzs.patch.tag`.

    Yields:
      `ImageTags`; `number` says of which image.

    Raises:
      ImageError: an image that cannot be used, with its number, unless there is `on_error`.

    >>> model = jaxzs.load("demo")
    >>> texts = jaxzs.zeroshot.text_proxies(model, ["circle", "square"])
    >>> [found.tags.shape for found in tag_images(model, [np.zeros((60, 90, 3), np.uint8)], texts, num_foreground=2)]
    [(2,)]
    """
    step = 1 if options.get("exact") else batching.step
    shards = 1 if mesh is None else mesh.size
    run = _program(model, jnp.asarray(text_features), num_foreground, mesh, options)
    pieces = _pieces(model, images, batching, on_error)
    parts: dict[int, dict[int, ImageTags]] = {}  # by image and scale
    for grid, batch in _batches(pieces, model, batching, step):
        size = shards * math.ceil(_batch_size(grid, model, batching) / shards)
        for piece, found in zip(batch, _tag_batch(run, batch, grid, size, model), strict=True):
            of_image = parts.setdefault(piece.number, {})
            of_image[piece.scale] = found
            if len(of_image) == len(batching.scales):
                scales = [of_image[place] for place in range(len(of_image))]
                yield _mean_of_scales(scales, options) if len(scales) > 1 else found
                del parts[piece.number]


class _Piece(NamedTuple):
    """One image at one of the scales, ready for the encoder. scale: its place among the scales."""

    number: int
    scale: int
    size: tuple[int, int]
    pixels: np.ndarray


def _pieces(
    model: Model,
    images: Iterable[Any],
    batching: Batching,
    on_error: Callable[[int, ImageError], None] | None,
) -> Iterator[_Piece]:
    patch_size = model.config.vision.patch_size
    for number, image in enumerate(images):
        try:
            rgb = to_rgb(image)
            pixels = [
                prepare_image(
                    rgb,
                    model.preprocessor,
                    patch_size,
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
            yield _Piece(number, place, (rgb.height, rgb.width), at_scale)


def _batches(
    pieces: Iterable[_Piece], model: Model, batching: Batching, step: int
) -> Iterator[tuple[tuple[int, int], list[_Piece]]]:
    """Images that share a padded grid, as soon as there are enough of them; the rest at the end."""
    size = model.config.vision.patch_size
    waiting: dict[tuple[int, int], list[_Piece]] = {}
    for piece in pieces:
        height, width, _ = piece.pixels.shape
        grid = step * math.ceil(height / size / step), step * math.ceil(width / size / step)
        waiting.setdefault(grid, []).append(piece)
        if len(waiting[grid]) == _batch_size(grid, model, batching):
            yield grid, waiting.pop(grid)
    yield from waiting.items()


def _batch_size(grid: tuple[int, int], model: Model, batching: Batching) -> int:
    """Images per call on this grid: fewer than asked for where the attention maps of all heads would be too much."""
    maps = model.config.vision.num_attention_heads * (1 + grid[0] * grid[1]) ** 2 * 4
    return max(1, min(batching.batch_size, _ATTENTION_BYTES // maps))


def _tag_batch(
    run: Any, batch: Sequence[_Piece], grid: tuple[int, int], size: int, model: Model
) -> Iterator[ImageTags]:
    """Pad to the grid and to `size` images, run the program, and cut every image's result out of it."""
    patch = model.config.vision.patch_size
    pixels = np.zeros((size, grid[0] * patch, grid[1] * patch, 3), np.float32)
    mask = np.zeros((size, *grid), bool)
    for row, piece in enumerate(batch):
        height, width, _ = piece.pixels.shape
        pixels[row, :height, :width] = piece.pixels
        mask[row, : height // patch, : width // patch] = True
    found: Any = jax.device_get(run(pixels, mask))
    for row, piece in enumerate(batch):
        rows, columns = piece.pixels.shape[0] // patch, piece.pixels.shape[1] // patch
        coarse, refined = (
            part[row].reshape(*grid, -1)[:rows, :columns] for part in (found.coarse, found.refined)
        )
        yield ImageTags(
            number=piece.number,
            size=piece.size,
            scores=found.scores[row],
            tags=found.tags[row],
            threshold=found.threshold[row],
            reidentified=found.reidentified[row],
            probability=found.probability[row],
            coarse=coarse,
            refined=refined,
            boxes=found.boxes[row] / np.array([rows, rows, columns, columns]),
        )


def _program(
    model: Model,
    text_features: jax.Array,
    num_foreground: int,
    mesh: Mesh | None,
    options: Mapping[str, Any],
) -> Callable[[np.ndarray, np.ndarray], Tags]:
    """`tag` as a function of pixels and mask, divided over the mesh where there is one."""

    def run(params: Params, pixels: Any, texts: Any, mask: Any) -> Tags:
        return tag(
            params,
            pixels,
            texts,
            model.config,
            num_foreground=num_foreground,
            mask=mask,
            **options,
        )

    if mesh is None:
        return lambda pixels, mask: run(model.params, pixels, text_features, mask)
    # Each device tags its own images, with encoder calls of its own for their candidates: nothing is exchanged.
    shared, divided = PartitionSpec(), PartitionSpec(mesh.axis_names)
    sharded = jax.jit(
        jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(shared, divided, shared, divided),
            out_specs=divided,
            check_vma=False,  # the loops inside start from constants, which are the same everywhere
        )
    )
    params = jax.device_put(model.params, NamedSharding(mesh, shared))
    texts = jax.device_put(text_features, NamedSharding(mesh, shared))
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, divided))
    return lambda pixels, mask: sharded(params, place(pixels), texts, place(mask))


def _mean_of_scales(scales: Sequence[ImageTags], options: Mapping[str, Any]) -> ImageTags:
    """Scores averaged over scales, and tags decided anew; everything with places is the first scale's."""
    scores = np.stack([found.scores for found in scales]).mean(0, dtype=np.float32)
    relative = options.get("tag_threshold")
    relative = options.get("relative_threshold", 0.5) if relative is None else relative
    fraction = jnp.broadcast_to(jnp.asarray(relative, jnp.float32), scores.shape)
    tags, threshold = decide(jnp.asarray(scores)[None], fraction, full_grid(1, 2, 2))
    return scales[0]._replace(
        scores=scores, tags=np.asarray(tags[0]), threshold=np.asarray(threshold[0])
    )
