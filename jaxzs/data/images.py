"""Image files: finding them, and opening them safely. Every file is taken as untrusted input."""

from __future__ import annotations

import glob
import io
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxzs.clip.files import known_stranger
from jaxzs.clip.preprocess import MAX_PIXELS, ImagePreprocessor
from jaxzs.errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm",
))  # fmt: skip
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # Pillow tries no other decoder
MAX_FILE_BYTES = 512 * 2**20  # MAX_PIXELS uncompressed, with room for metadata

ORIENTATION_TAG = 0x0112  # EXIF: how the camera was held
_PILLOW_WARNINGS = threading.Lock()


class ImageBatch(NamedTuple):
    """Some images ready for the encoder, and the files they came from."""

    pixels: np.ndarray  # [B, H, W, 3] float32
    paths: list[Path]  # B of them


# Finding


def find_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Paths of the images in folders (with all below them), files and globs: sorted, each once.

    In folders and globs, hidden files and files without an image suffix are passed over; a file named
    in full is always taken. Symbolic links are followed, loops are not. Raises `DataError` when a
    source does not exist or there is no image at all.

    >>> paths = data.find_images("photos")
    >>> len(paths), paths[0].as_posix()
    (30, 'photos/one/0.png')
    >>> data.find_images("no/such/folder")
    Traceback (most recent call last):
    jaxzs.errors.DataError: no such file or folder: no/such/folder; name folders, image files or globs
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found: set[Path] = set()
    for source in listed:
        path = Path(source).expanduser()
        if path.is_dir():
            found.update(_walk(path))
        elif path.exists():
            found.add(path)
        elif glob.has_magic(str(path)):
            for match in map(Path, glob.glob(str(path), recursive=True)):
                if match.is_dir():
                    found.update(_walk(match))
                elif _looks_like_image(match.name):
                    found.add(match)
        else:
            raise DataError(f"no such file or folder: {source}; name folders, image files or globs")
    if not found:
        raise DataError(
            f"no images in {', '.join(map(str, listed)) or 'an empty list'}: looked for files ending in "
            f"{' '.join(sorted(SUFFIXES))}"
        )
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    visited: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:  # a link back up, or a second link to it
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(here, name) for name in files if _looks_like_image(name))


def _looks_like_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def class_from_subfolder(paths: Sequence[Path], root: str | Path) -> list[str] | None:
    """The class name of each image where a folder is laid out as root/class/image; otherwise None.

    None too when all images lie in one subfolder, which then says nothing about classes.

    >>> data.class_from_subfolder(data.find_images("photos"), "photos")[::10]
    ['one', 'two', 'zero']
    """
    root = Path(root)
    if not all(path.is_relative_to(root) for path in paths):
        return None
    below = [path.relative_to(root).parts for path in paths]
    if any(len(parts) != 2 for parts in below):
        return None
    names = [parts[0] for parts in below]
    return names if len(set(names)) > 1 else None


# Opening


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file as a PIL image, decoded and turned upright by its EXIF orientation.

    JPEG, PNG, GIF, BMP, TIFF, WebP and PPM; of an animation the first frame. The size in the header is
    checked before pixels are allocated. Raises `ImageError`, naming the file, when it is missing,
    damaged, truncated, no image, or of more than `max_pixels` pixels.

    >>> data.open_image("photos/one/0.png").size
    (8, 8)
    >>> data.open_image("photos/one")
    Traceback (most recent call last):
    jaxzs.errors.ImageError: photos/one is not a file
    """
    path = Path(path)
    content = _read_file(path)
    if (stranger := known_stranger(content)) is not None:
        raise ImageError(f"{path} is {stranger}")
    try:
        image = _decode(content, max_pixels)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Exception as error:  # the decoders raise almost anything on damaged data
        reason = str(error) or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image, it is damaged: {reason}") from error
    return image


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ImageError(f"{path} is not a file")
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{path} has {size:,} bytes, more than {MAX_FILE_BYTES:,} are refused")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error


def _decode(content: bytes, max_pixels: int) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    with _quiet_pillow():
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(f"no image of a known format ({', '.join(FORMATS)})") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"refused, it would not fit into memory: {error}") from error
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"its header says {image.width:,} x {image.height:,} pixels, more than "
                f"{max_pixels:,} are refused: scale it down first"
            )
        if image.width * image.height == 0:
            raise ImageError(f"it has no pixels ({image.width} x {image.height})")
        is_tiff = image.format == "TIFF"
        if is_tiff:  # Pillow reads metadata, and may warn, while it decodes these
            image.load()
    image.load()  # pixels, outside of the lock
    turn = None
    if not is_tiff:  # which Pillow has turned while loading
        with _quiet_pillow():
            turn = _turn_upright(image)
    # A plain image that no longer holds the file, nor says that it is still to be turned.
    upright = image.copy() if turn is None else image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        upright.info.pop(key, None)
    return upright


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    """The transposition that undoes the EXIF orientation."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata of an intact picture
        return None


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Mutes Pillow's remarks on damaged metadata and large headers, which are dealt with here.

    Filters are shared by all threads: the lock keeps those that open images from restoring each
    other's. Held while headers are parsed, not while pixels are decoded.
    """
    with _PILLOW_WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def load_images(
    paths: Sequence[str | Path],
    preprocess: ImagePreprocessor,
    *,
    batch_size: int = 32,
    on_error: Callable[[Path, ImageError], None] | None = None,
    threads: int = 2,
) -> Generator[ImageBatch, None, None]:
    """Batches of preprocessed images in the order of `paths`, read ahead in threads.

    Every batch but the last has `batch_size` images. `on_error(path, error)` is told of each unreadable
    file, which is then left out; without it the first one raises its `ImageError`.

    >>> paths = [*data.find_images("photos/one"), "not/there.png"]
    >>> unreadable = []
    >>> batches = data.load_images(
    ...     paths, jaxzs.load("demo").preprocess, batch_size=8, on_error=lambda *why: unreadable.append(why)
    ... )
    >>> [(batch.pixels.shape, batch.paths[0].name) for batch in batches]
    [((8, 48, 48, 3), '0.png'), ((2, 48, 48, 3), '8.png')]
    >>> unreadable[0][0].name
    'there.png'
    """

    def read(path: Path) -> np.ndarray:
        image = open_image(path)
        try:
            return preprocess(image)  # [1, H, W, 3]
        except ImageError as error:
            raise ImageError(f"{path}: {error.__cause__ or error}") from error

    def in_order(pool: ThreadPoolExecutor) -> Iterator[tuple[Path, Future[np.ndarray]]]:
        ahead: deque[tuple[Path, Future[np.ndarray]]] = deque()
        for path in map(Path, paths):
            ahead.append((path, pool.submit(read, path)))
            if len(ahead) > 2 * batch_size:
                yield ahead.popleft()
        yield from ahead

    pool = ThreadPoolExecutor(max_workers=max(1, threads))
    try:
        rows: list[np.ndarray] = []
        names: list[Path] = []
        for path, future in in_order(pool):
            try:
                rows.append(future.result())
                names.append(path)
            except ImageError as error:
                if on_error is None:
                    raise
                on_error(path, error)
            if len(rows) == batch_size:
                yield ImageBatch(np.concatenate(rows), names)
                rows, names = [], []
        if rows:
            yield ImageBatch(np.concatenate(rows), names)
    finally:
        pool.shutdown(cancel_futures=True)
