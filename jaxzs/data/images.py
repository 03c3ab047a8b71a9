"""Opening image files safely. Every file is taken as untrusted input."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxzs.clip.files import known_stranger
from jaxzs.clip.preprocess import MAX_PIXELS
from jaxzs.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

# Pillow tries no other decoder; the last two where it has them (HEIF with the package pillow-heif).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "HEIF")
MAX_FILE_BYTES = 512 * 2**20  # MAX_PIXELS uncompressed, with room for metadata
LARGE_PIXELS = 2**25  # 128 MiB as RGB, which Pillow keeps in 4 bytes; larger ones are opened one at a time

ORIENTATION_TAG = 0x0112  # EXIF: how the camera was held
_PILLOW_WARNINGS = threading.Lock()
_LARGE_IMAGE = threading.Lock()
_thread = threading.local()


_PLUGINS = ("Jpeg", "Png", "Gif", "Bmp", "Tiff", "WebP", "Ppm", "Avif")


@functools.cache
def decoders() -> tuple[str, ...]:
    """Those of FORMATS that this installation can decode."""
    from PIL import Image, features

    for plugin in _PLUGINS:
        with contextlib.suppress(ImportError):  # Avif is younger than the oldest Pillow that is supported
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    # Registered by Pillow also where it was built without the library that decodes them.
    optional = {name for name in ("WEBP", "AVIF") if name in Image.OPEN and not features.check(name.lower())}
    return tuple(name for name in FORMATS if name in Image.OPEN and name not in optional)


def is_image_file(path: Path) -> bool:
    """Whether a file begins as an image that can be decoded here; False too where it cannot be read."""
    from PIL import Image

    try:
        if not path.is_file():  # pipes and devices could block
            return False
        with open(path, "rb") as file, _quiet_pillow():
            head = file.read(16)  # as much as Pillow shows its decoders
            accepted = [Image.OPEN[name][1] for name in decoders()]
            # Cheap, so that thousands of text files are not parsed.
            if not any(accept is None or accept(head) for accept in accepted):
                return False
            file.seek(0)
            Image.open(file, formats=decoders())  # the header only
    except Exception:  # of the file system, and the decoders raise almost anything
        return False
    return True


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture file as a PIL image, decoded and turned upright by its EXIF orientation.

    JPEG, PNG, GIF, BMP, TIFF, WebP and PPM, AVIF and HEIF where Pillow can; of an animation the first frame. The size
    in the header is checked before pixels are allocated. Raises `ImageError`, naming the file, when it is missing,
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
        raise ImageError(f"{shown_name(path)} is {stranger}")
    try:
        image = _decode(_without_metadata(content), max_pixels)
    except ImageError as error:
        raise ImageError(f"{shown_name(path)}: {error}") from error
    except Exception as error:  # the decoders raise almost anything on damaged data
        reason = str(error) or type(error).__name__
        raise ImageError(f"{shown_name(path)} cannot be read as an image, it is damaged: {reason}") from error
    return image


def shown_name(path: str | Path) -> str:
    """A file's name for messages: bytes that are not UTF-8 as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def one_large_at_a_time() -> Iterator[None]:
    """Inside, `open_image` of this thread waits with an image above LARGE_PIXELS until no other thread holds one.

    To be held until the image is preprocessed, so that memory does not grow with the number of threads.
    """
    _thread.waits, _thread.holds = True, False
    try:
        yield
    finally:
        _thread.waits = False
        if _thread.holds:
            _give_back_memory()
            _LARGE_IMAGE.release()


def _give_back_memory() -> None:
    """glibc keeps what a thread has freed for that thread; gigabytes would pile up, once for each thread."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _wait_if_large(pixels: int) -> None:
    # A thread that holds the lock must not ask for it again: it would wait for itself.
    if pixels > LARGE_PIXELS and getattr(_thread, "waits", False) and not _thread.holds:
        _LARGE_IMAGE.acquire()
        _thread.holds = True


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ImageError(f"{shown_name(path)} is not a file")
        # Before a byte is read.
        if size > MAX_FILE_BYTES:
            raise ImageError(f"{shown_name(path)} has {size:,} bytes, more than {MAX_FILE_BYTES:,} are refused")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"cannot read {shown_name(path)}: {getattr(error, 'strerror', None) or error}") from error


def _decode(content: bytes, max_pixels: int) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    with _quiet_pillow():
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=decoders())
        except UnidentifiedImageError as error:
            raise ImageError(f"no image of a known format ({', '.join(decoders())})") from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"refused, it would not fit into memory: {error}") from error
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"its header says {image.width:,} x {image.height:,} pixels, more than "
                f"{max_pixels:,} are refused: scale it down first"
            )
        if image.width * image.height == 0:
            raise ImageError(f"it has no pixels ({image.width} x {image.height})")
    # Here the size is known and no pixel is allocated yet.
    _wait_if_large(image.width * image.height)
    is_tiff = image.format == "TIFF"
    if is_tiff:  # Pillow reads metadata, and may warn, while it decodes these
        with _quiet_pillow():
            image.load()
    image.load()  # pixels, outside of the lock
    turn = None
    if not is_tiff:  # which Pillow has turned while loading
        with _quiet_pillow():
            turn = _turn_upright(image)
    # A plain image that no longer holds the file, nor says that it is still to be turned. It shares the pixels.
    upright: Image.Image = image._new(image.im) if turn is None else image.transpose(turn)
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        upright.info.pop(key, None)
    return upright


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    """The transposition that undoes the EXIF orientation."""
    from PIL.Image import Transpose

    # EXIF's number -> what undoes it; 1 is upright, from 5 on width and height change places.
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


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Mutes Pillow's remarks on damaged metadata and large headers, which are dealt with here.

    Filters are shared by all threads: the lock keeps those that open images from restoring each
    other's. Held while headers are parsed, not while pixels are decoded.
    """
    with _PILLOW_WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


# --- PNG metadata -----------------------------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION_TEXTS = (b"Raw profile type exif", b"Raw profile type APP1", b"XML:com.adobe.xmp")
_MOST_METADATA = 2**20  # bytes of one chunk


def _without_metadata(content: bytes) -> bytes:
    """A PNG file with what its pixels depend on, and what says how the camera was held.

    Texts and colour profiles may be compressed from many megabytes or have a wrong checksum; Pillow then refuses the
    picture, which is intact. Animations are left with their first frame.
    """
    if not content.startswith(_PNG):
        return content
    view, place = memoryview(content), len(_PNG)
    kept: list[memoryview] = []
    texts: set[bytes] = set()  # kinds of text that were kept
    while place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        chunk = view[place : place + size + 12]  # size, kind, data, checksum
        needed = kind[0] & 0x20 == 0 or kind == b"tRNS"  # a capital letter: critical
        if needed or _says_orientation(kind, chunk[8:-4], chunk[-4:], texts):
            kept.append(chunk)
        place += size + 12
    return b"".join([_PNG, *kept, view[place:]])


def _says_orientation(kind: bytes, data: memoryview, checksum: memoryview, texts: set[bytes]) -> bool:
    """Whether an intact chunk holds EXIF or XMP of at most a megabyte, and is the first of its kind."""
    if kind not in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") or len(data) > _MOST_METADATA:
        return False
    keyword, _, text = (kind, b"", b"") if kind == b"eXIf" else bytes(data).partition(b"\0")
    if keyword in texts or keyword not in (b"eXIf", *_ORIENTATION_TEXTS):
        return False
    # Pillow refuses the whole picture for a wrong checksum of a text.
    if zlib.crc32(data, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
        return False
    texts.add(keyword)
    if kind == b"iTXt":
        return text[:1] == b"\0"  # not compressed, as XMP has to be
    return kind != b"zTXt" or _unpacks_small(text[1:])  # after the byte that names the method


def _unpacks_small(compressed: bytes) -> bool:
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(compressed, _MOST_METADATA)  # at most so much is unpacked
    except zlib.error:
        return False
    return unpacking.eof  # False where there is more
