"""Images of any size in batches of few shapes: resized to whole patches, padded, masked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from jaxzs.clip import Model
from jaxzs.clip.preprocess import ImagePreprocessor, to_rgb
from jaxzs.errors import DataError, ImageError
from jaxzs.patch.settings import check_whole

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from PIL import Image

_ATTENTION_BYTES = 2 * 2**30  # of one layer's attention maps, which bounds what a batch takes
_STEPS = 4  # an octave: sides are padded by less than a quarter
_WASTE = 1.5  # patches of a program that is there already, for each of an image's own
MOST_OFFSETS = 8  # 64 times the work
_PROGRAM = 2**15  # patches whose encoding takes about as long as compiling another program

Sides = tuple[int, int]  # rows and columns of patches
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Batching:
    """How images are put together.

    batch_size: images per program call, at most; fewer where their attention would not fit.
    step: grids are padded to multiples of so many patches, long sides to a quarter of an octave, and images that never
      fill a batch share grids, so that few shapes are compiled; 1 pads nothing, and only images of equal size share a
      batch.
    scales: sizes of each image relative to its own, whose scores are averaged. The paper has one, 1.0.
    offsets: n looks at each image from n x n origins, moved by n-ths of a patch. Scores are averaged, and maps on a
      grid n times as fine: n^2 times the work. The paper has one.
    max_patches: an image of more patches is scaled to fit, or refused.
    resize: whether it is scaled. Boxes and masks come back in the image's own size.
    notice: told, in a line, of images that are scaled and of shapes that are compiled, which takes seconds each.
    mesh: devices to divide each batch over; every device works on its own rows. None: one device.
    on_error: told the number of each image that cannot be used, which is then left out; None: it raises.

    >>> patch.Batching(batch_size=4, scales=(1.0, 1.5)).max_patches
    4096
    >>> patch.Batching(scales=())
    Traceback (most recent call last):
    jaxzs.errors.DataError: scales are (), expected numbers above 0, at most 16
    """

    batch_size: int = 8
    step: int = 8
    scales: tuple[float, ...] = (1.0,)
    offsets: int = 1
    max_patches: int = 4096
    resize: bool = True
    notice: Callable[[str], None] | None = None
    mesh: Mesh | None = None
    on_error: Callable[[int, ImageError], None] | None = None

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size)
        check_whole("step", self.step)
        check_whole("max_patches", self.max_patches, least=4)  # a grid of 2x2
        check_whole("offsets", self.offsets, most=MOST_OFFSETS)
        scales = np.asarray(self.scales)
        if (
            scales.ndim != 1
            or scales.dtype.kind not in "iuf"
            or not len(scales)
            or not ((scales > 0) & (scales <= 16)).all()
        ):
            raise DataError(f"scales are {self.scales}, expected numbers above 0, at most 16")
        object.__setattr__(self, "scales", tuple(scales.tolist()))  # a list of them, too

    @property
    def views(self) -> int:
        """How often an image is looked at: at every scale from every origin."""
        return len(self.scales) * self.offsets**2

    @property
    def devices(self) -> int:
        """How many share a batch, whose size is a multiple of them."""
        return 1 if self.mesh is None else self.mesh.size

    def unpadded(self) -> Batching:
        """The same, where only images of equal grids share a batch."""
        return dataclasses.replace(self, step=1)

    def check_one_view(self, what: str) -> None:
        """`DataError` where several are asked for of what takes one."""
        if self.views > 1:
            raise DataError(f"scales are {self.scales} and offsets {self.offsets}: {what} take each image once")

    def say(self, line: str) -> None:
        """Pass a line to whoever wants to know."""
        if self.notice is not None:
            self.notice(line)


DEFAULT_BATCHING = Batching()
SIXTEEN = Batching(batch_size=16)  # windows, or photos of one size: small, and never padded
# Keywords of earlier versions, and what is written today.
OF_BATCHING = {name: f"batching=patch.Batching({name}=...)" for name in ("mesh", "on_error")}


def patch_aligned_size(height: int, width: int, patch_size: int, scale: float = 1.0) -> tuple[int, int]:
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
    resize: bool = True,
) -> np.ndarray:
    """One image as pixels [H,W,3] float32 whose sides are multiples of the patch size, normalised.

    image: PIL image or array as `model.preprocess` takes them; resized by Pillow's bicubic filter on 8 bits, sides
    rounded up. An image of more than `max_patches` patches is made smaller, or refused where `resize` is False.
    Raises `ImageError` for that, for an image without area, and below two patches a side.

    >>> model = jaxzs.load("demo")
    >>> patch.prepare_image(np.zeros((60, 90, 3), np.uint8), model.preprocessor, patch_size=8).shape
    (64, 96, 3)
    >>> patch.prepare_image(np.zeros((3000, 4000, 3), np.uint8), model.preprocessor, patch_size=8).shape
    (440, 584, 3)
    """
    from PIL import Image

    rgb = to_rgb(image)
    height, width = patch_aligned_size(rgb.height, rgb.width, patch_size, scale)
    rows, columns = height // patch_size, width // patch_size
    if min(rows, columns) < 2:
        raise ImageError(
            f"{rgb.height}x{rgb.width} pixels are {rows}x{columns} patches of {patch_size}; at least "
            f"2x2 are needed to tell places apart: enlarge it",
            python="or, to tag it, raise the scale",
            command="or, to tag it, raise --scales",
        )
    if rows * columns > max_patches:
        if not resize:
            raise _too_large(rgb, rows * columns, max_patches)
        height, width = fitting_size(height, width, patch_size, max_patches)
    if (height, width) != (rgb.height, rgb.width):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return preprocessor.normalize(np.asarray(rgb))


def fitting_size(height: int, width: int, patch_size: int, max_patches: int) -> Sides:
    """The largest sides of about this shape, whole patches and at least two, that hold `max_patches` at most.

    >>> fitting_size(3008, 4000, 16, 4096)
    (880, 1168)
    """
    rows, columns = height / patch_size, width / patch_size
    shrink = math.sqrt(max_patches / (rows * columns))
    short = max(2, math.floor(min(rows, columns) * shrink))
    long = min(max_patches // short, max(2, math.floor(max(rows, columns) * shrink)))
    sides = (short, long) if rows <= columns else (long, short)
    return sides[0] * patch_size, sides[1] * patch_size


def _too_large(rgb: Image.Image, patches: int, max_patches: int) -> ImageError:
    attention = patches**2 * 4 / 2**30
    scale = math.floor(100 * math.sqrt(max_patches / patches)) / 100
    return ImageError(
        f"{rgb.height}x{rgb.width} pixels are {patches} patches, more than {max_patches}; each attention map would "
        f"take {attention:.1f} GiB. Scale the image by {scale:.2f}, or cut it into pieces",
        python="or raise max_patches, or let it be resized",
        command="or raise --max-patches, or leave --no-resize out",
    )


class Piece(NamedTuple):
    """One image at one scale from one origin, ready for the encoder. view: its place, scale by scale."""

    number: int
    view: int
    image: Image.Image  # RGB, as given
    pixels: np.ndarray  # [H,W,3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as given."""
        return self.image.height, self.image.width

    def grid(self, patch_size: int) -> Sides:
        """Rows and columns of its patches."""
        return self.pixels.shape[0] // patch_size, self.pixels.shape[1] // patch_size


class Stack(NamedTuple):
    """Images of one padded grid; batch rows beyond `pieces` are padding.

    grids: true rows and columns of each piece. pixels: [B,H,W,3]. mask: [B,rows,columns] bool.
    """

    pieces: list[Piece]
    grids: list[tuple[int, int]]
    pixels: np.ndarray
    mask: np.ndarray


def stacks(model: Model, images: Iterable[Any], batching: Batching) -> Iterator[Stack]:
    """Batches of images that share a padded grid, as soon as there are enough of them; the rest at the end."""
    pads = batching.step > 1
    waiting: dict[Sides, list[Piece]] = {}
    filled: set[Sides] = set()  # grids whose full batch is compiled
    shapes = _Shapes(model, batching)
    views_of = functools.partial(_views_of, model, batching)
    for piece in itertools.chain.from_iterable(usable(images, views_of, batching)):
        own = piece.grid(model.config.vision.patch_size)
        grid = _shared_grid(own, batching.step, filled) if pads else own
        waiting.setdefault(grid, []).append(piece)
        if len(waiting[grid]) == shapes.full(grid):
            filled.add(grid)
            yield shapes.stack(waiting.pop(grid), grid, shapes.full(grid))
    for grid, pieces in (merged(waiting, filled, batching.max_patches) if pads else waiting).items():
        full = shapes.full(grid)
        for start in range(0, len(pieces), full):
            some = pieces[start : start + full]
            once = grid not in filled and len(pieces) <= full  # few images of a shape of their own: a small batch
            yield shapes.stack(some, grid, shapes.fewest(len(some), full) if once else full)


class _Shapes:
    """Sizes of batches, and which shapes were met before."""

    def __init__(self, model: Model, batching: Batching) -> None:
        vision = model.config.vision
        self.heads, self.patch_size = vision.num_attention_heads, vision.patch_size
        self.batching = batching
        self.met: set[tuple[Sides, int]] = set()

    def full(self, grid: Sides) -> int:
        """Images per call on this grid: fewer than asked for where the attention maps of all heads would not fit."""
        maps = self.heads * (1 + grid[0] * grid[1]) ** 2 * 4
        return self._whole(max(1, min(self.batching.batch_size, _ATTENTION_BYTES // maps)))

    def fewest(self, images: int, full: int) -> int:
        """The next power of two: padding a batch costs, and so does every other size of it."""
        return min(full, self._whole(1 << (images - 1).bit_length()))

    def _whole(self, size: int) -> int:
        return self.batching.devices * math.ceil(size / self.batching.devices)

    def stack(self, pieces: list[Piece], grid: Sides, size: int) -> Stack:
        """The pieces as a batch; a shape that was not met before is announced, since it will be compiled."""
        if (grid, size) not in self.met:
            self.met.add((grid, size))
            images = "1 image" if size == 1 else f"{size} images at once"
            self.batching.say(f"compiling for {grid[0]}x{grid[1]} patches, {images} (shape {len(self.met)})")
        return _stack(pieces, grid, size, self.patch_size)


def padded_side(side: int, step: int) -> int:
    """A side rounded up to a multiple of the step, and of a quarter of the octave it is in.

    >>> [padded_side(side, 8) for side in (5, 24, 33, 70, 130)]
    [8, 24, 40, 80, 160]
    """
    octave = 1 << max(0, (side - 1).bit_length() - 1)
    step = max(step, octave // _STEPS)
    return step * math.ceil(side / step)


def _shared_grid(own: Sides, step: int, filled: set[Sides]) -> Sides:
    """The padded grid of an image: one whose program is there, if it wastes little, or that of its rounded sides."""
    holds = [g for g in filled if g[0] >= own[0] and g[1] >= own[1] and g[0] * g[1] <= _WASTE * own[0] * own[1]]
    return min(holds, key=math.prod) if holds else (padded_side(own[0], step), padded_side(own[1], step))


def merged(waiting: Mapping[Sides, list[_T]], filled: Set[Sides], max_patches: int) -> dict[Sides, list[_T]]:
    """Groups that never filled a batch, put together where padding them costs less than compiling another program.

    Largest grids first; each group joins the grid that it makes the least dearer, which may grow for it, or starts
    its own. Of 27 images of 26 sizes from 40 to 3000 pixels four grids are made.

    >>> merged({(8, 16): [1], (16, 8): [2, 3], (2, 400): [4]}, set(), 4096)
    {(8, 400): [4, 1], (16, 8): [2, 3]}
    """
    groups: dict[Sides, list[_T]] = {}
    for grid, pieces in sorted(waiting.items(), key=lambda group: (-math.prod(group[0]), group[0])):
        alone = len(pieces) * math.prod(grid) + (0 if grid in filled else _PROGRAM)
        options = [(alone, grid, grid)]
        for other, members in groups.items():
            joint = max(other[0], grid[0]), max(other[1], grid[1])
            if other in filled and joint != other:
                continue  # its program is there for this size only
            if math.prod(joint) <= max(max_patches, math.prod(other)):
                dearer = (len(members) + len(pieces)) * math.prod(joint) - len(members) * math.prod(other)
                options.append((dearer, joint, other))
        _, joint, other = min(options, key=lambda option: option[0])
        groups[joint] = [*groups.pop(other, []), *groups.pop(joint, []), *pieces]
    return groups


def usable(images: Iterable[Any], prepare: Callable[[int, Any], _T], batching: Batching) -> Iterator[_T]:
    """What `prepare(number, image)` makes of each image that can be used; the others as `batching.on_error` has it."""
    for number, image in enumerate(images):
        try:
            prepared = prepare(number, image)
        except ImageError as error:
            if batching.on_error is None:
                raise ImageError(f"image {number}: {error}") from error
            batching.on_error(number, error)
            continue
        yield prepared  # outside of the try: what the caller raises is no fault of the image


def _views_of(model: Model, batching: Batching, number: int, image: Any) -> list[Piece]:
    rgb, patch_size = to_rgb(image), model.config.vision.patch_size
    steps = [patch_size * step // batching.offsets for step in range(batching.offsets)]  # pixels
    views = []
    for scale in batching.scales:
        pixels = prepare_image(
            rgb, model.preprocessor, patch_size, scale=scale, max_patches=batching.max_patches, resize=batching.resize
        )
        full = patch_aligned_size(rgb.height, rgb.width, patch_size, scale)
        if pixels.shape[:2] != full:
            asked = "" if scale == 1 else f" at scale {scale}"
            batching.say(
                f"image {number} of {rgb.width}x{rgb.height} pixels{asked} is looked at in "
                f"{pixels.shape[1]}x{pixels.shape[0]}, as {batching.max_patches} patches hold"
            )
        views += [moved(pixels, down, right) for down in steps for right in steps]
    return [Piece(number, view, rgb, pixels) for view, pixels in enumerate(views)]


def moved(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Pixels [H,W,...] moved so far; the first rows and columns are repeated, what leaves at the end is cut off.

    >>> moved(np.array([[1, 2, 3], [4, 5, 6]]), 1, 0).tolist()
    [[1, 2, 3], [1, 2, 3]]
    """
    if down == right == 0:
        return pixels  # as ever without offsets: no copy of every image
    padded = np.pad(pixels, ((down, 0), (right, 0), *[(0, 0)] * (pixels.ndim - 2)), mode="edge")
    return padded[: pixels.shape[0], : pixels.shape[1]]


def finer(maps: Sequence[np.ndarray], offsets: int) -> np.ndarray:
    """Maps [rows,columns,...] seen from offsets^2 origins, averaged on a grid so many times as fine.

    A fine cell is the mean of the patches that lay over it, one for each origin.

    >>> finer([np.array([[0.0, 4.0]]), np.array([[0.0, 2.0]]), *[np.array([[1.0, 1.0]])] * 2], 2).round(2).tolist()
    [[0.5, 1.0, 2.0, 2.0], [0.5, 1.0, 2.0, 2.0]]
    """

    def in_place(view: int) -> np.ndarray:
        """Fine cells of a view where the image has them; the end, which had left the picture, as the nearest."""
        down, right = divmod(view, offsets)
        large = maps[view].repeat(offsets, 0).repeat(offsets, 1)  # [n rows,n columns,...]
        return np.pad(large, ((0, down), (0, right), *[(0, 0)] * (large.ndim - 2)), mode="edge")[down:, right:]

    return functools.reduce(np.add, map(in_place, range(len(maps)))) / len(maps)  # one at a time: they are large


def whole_images(found: Iterable[tuple[Piece, _T]], views: int) -> Iterator[tuple[Piece, list[_T]]]:
    """What was found in all views of an image, in their order, as soon as the last of them is there."""
    parts: dict[int, dict[int, _T]] = {}  # by image and view
    for piece, one in found:
        of_image = parts.setdefault(piece.number, {})
        of_image[piece.view] = one
        if len(of_image) == views:
            del parts[piece.number]  # images arrive in no order: memory holds the unfinished ones
            yield piece, [of_image[view] for view in range(views)]


def _stack(pieces: list[Piece], grid: tuple[int, int], size: int, patch_size: int) -> Stack:
    """Pad to the grid and to `size` images."""
    pixels = np.zeros((size, grid[0] * patch_size, grid[1] * patch_size, 3), np.float32)
    mask = np.zeros((size, *grid), bool)
    grids = []
    for row, piece in enumerate(pieces):
        height, width, _ = piece.pixels.shape
        grids.append(piece.grid(patch_size))
        pixels[row, :height, :width] = piece.pixels
        mask[row, : grids[row][0], : grids[row][1]] = True
    return Stack(pieces, grids, pixels, mask)
