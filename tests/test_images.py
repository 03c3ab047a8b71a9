"""Finding image files and opening them: upright, safely, and with errors that name the file."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxzs.clip.preprocess import ImagePreprocessor, to_rgb
from jaxzs.data import Batch, batches, find_images, open_files, open_folder, open_image, open_images, search_images
from jaxzs.data.images import decoders
from jaxzs.errors import DataError, ImageError

SMALL = ImagePreprocessor(size=32, crop_size=(32, 32))


def picture(height: int = 40, width: int = 56, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encoded(format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Opening


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_read_as_written(format: str, tmp_path: Path) -> None:
    # By content: the suffix does not matter.
    image = open_image(write(tmp_path / "image.jpg", encoded(format)))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))


@pytest.mark.parametrize("format", ["JPEG", "GIF", "WEBP"])
def test_lossy_formats_are_read_as_pillow_reads_them(format: str, tmp_path: Path) -> None:
    content = encoded(format)
    image = open_image(write(tmp_path / "image", content))
    expected = Image.open(io.BytesIO(content))
    assert image.mode == expected.mode
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(format: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(format, exif=exif, lossless=True)
    image = open_image(write(tmp_path / "turned", content))
    known = encoded("JPEG" if format == "JPEG" else "PNG", exif=exif)  # lossless, as the others
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(known)))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert image.size == ((56, 40) if orientation <= 4 else (40, 56))
    # Nothing is left that would turn it a second time.
    again = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(again, np.asarray(image))


def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    content = encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    image = open_image(write(tmp_path / "exif.jpg", content))
    assert image.size == (56, 40)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [picture(seed=seed) for seed in range(3)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        content = encoded(format, frames[0], save_all=True, append_images=frames[1:], **options)
        image = open_image(write(tmp_path / format, content))
        first = np.asarray(image.convert("RGB"), np.int32)
        # GIF has 256 colours; the other frames are far off.
        assert np.abs(first - np.asarray(frames[0], np.int32)).mean() < 10
        assert np.abs(first - np.asarray(frames[1], np.int32)).mean() > 30


def test_a_palette_keeps_its_transparency(tmp_path: Path) -> None:
    content = encoded("PNG", picture().quantize(4), transparency=0)
    image = open_image(write(tmp_path / "p.png", content))
    expected = Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(SMALL(image), SMALL(expected))
    assert image.info["transparency"] is not None


def test_16_bit_files_are_scaled(tmp_path: Path) -> None:
    grey = np.asarray(picture().convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    for format in ("PNG", "TIFF"):
        image = open_image(write(tmp_path / "wide", encoded(format, wide)))
        np.testing.assert_array_equal(SMALL(image), SMALL(grey))


def test_one_pixel_is_an_image(tmp_path: Path) -> None:
    image = open_image(write(tmp_path / "dot.png", encoded("PNG", Image.new("RGB", (1, 1), "red"))))
    assert SMALL(image).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\0" * 4000, "all zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs pointer"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "HTML page"),
        (b"hello", "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (encoded("PNG")[:-100], "damaged: "),
        (encoded("JPEG")[:-100], "damaged: .*truncated"),
        (encoded("BMP")[:-100], "damaged: .*truncated"),
        (encoded("GIF")[:-400], "damaged: .*truncated"),
        (encoded("TIFF")[:-100], "damaged: |no image"),
        (encoded("WEBP")[:-100], "damaged: |no image"),
        (encoded("PNG")[:20], "damaged: |no image"),
    ],
)
def test_unreadable_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.png", content)
    with pytest.raises(ImageError, match=message) as caught:
        open_image(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.png: No such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="is not a file"):
        open_image(tmp_path)


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(600 * 2**20)
    with pytest.raises(ImageError, match="629,145,600 bytes"):
        open_image(path)


# Headers that lie about the size


def png_header(width: int, height: int) -> bytes:
    chunks = b""
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" * 100)),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + kind + data
        chunks += struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def patched(content: bytes, offset: int, layout: str, *values: int) -> bytes:
    data = bytearray(content)
    struct.pack_into(layout, data, offset, *values)
    return bytes(data)


JPEG = encoded("JPEG")
WEBP = encoded("WEBP", lossless=True)
TIFF = encoded("TIFF")
BOMBS = {
    "PNG, 9 Gpixel": png_header(95_000, 95_000),
    "PNG, 144 Mpixel": png_header(12_000, 12_000),
    "BMP": patched(encoded("BMP"), 18, "<ii", 50_000, 50_000),
    "GIF": patched(encoded("GIF"), 6, "<HH", 65_000, 65_000),
    "JPEG": patched(JPEG, JPEG.index(b"\xff\xc0") + 5, ">HH", 60_000, 60_000),
    "PPM": b"P6 70000 70000 255\n" + b"\0" * 100,
    "WEBP": patched(WEBP, 21, "<I", 16382 | 16382 << 14),
    "TIFF": TIFF.replace(struct.pack("<HHII", 256, 4, 1, 56), struct.pack("<HHII", 256, 4, 1, 60_000)).replace(
        struct.pack("<HHII", 257, 4, 1, 40), struct.pack("<HHII", 257, 4, 1, 60_000)
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs_are_refused_without_memory(name: str, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = write(tmp_path / "bomb", BOMBS[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="refused") as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert any(character.isdigit() for character in str(caught.value).split(str(path))[1])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 100_000, f"{grown} KiB were touched for a file of {len(BOMBS[name])} bytes"


def mutations(content: bytes, count: int, seed: int) -> list[bytes]:
    """Copies with bytes flipped, cut, doubled, or 32 bits in the first part set to an extreme."""
    rng = np.random.default_rng(seed)
    mutated = []
    for number in range(count):
        data = bytearray(content)
        place = int(rng.integers(0, len(data)))
        if number % 4 == 0:
            for _ in range(int(rng.integers(1, 8))):
                data[int(rng.integers(0, len(data)))] ^= int(rng.integers(1, 256))
        elif number % 4 == 1:
            del data[place:]
        elif number % 4 == 2:
            start = int(rng.integers(0, min(120, len(data) - 4)))
            data[start : start + 4] = [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\1\0\1"][number % 3]
        else:
            data[place:place] = data[: int(rng.integers(1, 200))]
        mutated.append(bytes(data))
    return mutated


GREY = picture().convert("L")
FUZZED = {
    "JPEG": encoded("JPEG"),
    "JPEG progressive, EXIF": encoded(
        "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    ),
    "PNG": encoded("PNG"),
    "PNG palette": encoded("PNG", picture().quantize(8), transparency=bytes(8)),
    "GIF animated": encoded("GIF", save_all=True, append_images=[picture(seed=1)]),
    "BMP": encoded("BMP", GREY),
    "TIFF": encoded("TIFF"),
    "TIFF deflated": encoded("TIFF", compression="tiff_adobe_deflate"),
    "WEBP": encoded("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "WEBP animated": encoded("WEBP", save_all=True, append_images=[picture(seed=1)]),
    "PPM": encoded("PPM"),
}


def image_or_error(path: Path) -> Image.Image | ImageError:
    try:
        return open_image(path, max_pixels=1_000_000)
    except ImageError as error:
        return error


@pytest.mark.parametrize("kind", FUZZED)
def test_mutated_files_give_an_image_or_a_named_error(kind: str, tmp_path: Path) -> None:
    opened = 0
    contents = mutations(FUZZED[kind], 40, seed=len(kind))
    for content in contents:
        image = image_or_error(write(tmp_path / "mutated", content))
        if isinstance(image, ImageError):
            assert str(tmp_path / "mutated") in str(image)
            continue
        opened += 1
        try:
            assert SMALL(image).shape == (1, 32, 32, 3)
        except ImageError:
            assert max(image.size) > 1000  # a long thin image, too large once resized
    assert opened < len(contents)


def test_warnings_of_the_caller_stay_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "image.png", encoded("PNG"))
    before = list(warnings.filters)

    def open_many() -> None:
        for _ in range(20):
            open_image(path)

    workers = [threading.Thread(target=open_many) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert warnings.filters == before


# Finding


def tree(root: Path, *names: str) -> None:
    for name in names:
        write(root / name, encoded("PNG"))


def names(paths: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def test_folders_files_and_globs(tmp_path: Path) -> None:
    tree(tmp_path, "b/2.PNG", "b/1.jpeg", "a/deep/er/3.webp", "c.tif", "b/x[1].png")
    tree(tmp_path, "b/notes.txt", ".hidden.png", ".cache/4.png", "__MACOSX/._5.png", "b/.6.png")
    everything = ["a/deep/er/3.webp", "b/1.jpeg", "b/2.PNG", "b/x[1].png", "c.tif"]
    assert names(find_images(tmp_path), tmp_path) == everything
    assert names(find_images(str(tmp_path)), tmp_path) == everything
    pattern = str(tmp_path / "**" / "*")
    assert names(find_images([pattern, tmp_path / "b"]), tmp_path) == everything
    assert names(find_images(str(tmp_path / "b" / "*")), tmp_path) == everything[1:4]
    # A file that is named is taken, whatever it is called.
    assert names(find_images(tmp_path / "b" / "notes.txt"), tmp_path) == ["b/notes.txt"]
    assert names(find_images(tmp_path / "b" / "x[1].png"), tmp_path) == ["b/x[1].png"]
    # Hidden means hidden below the folder that was asked for.
    assert names(find_images(tmp_path / ".cache"), tmp_path) == [".cache/4.png"]


def test_nothing_found_is_a_named_error(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", b"")
    for sources, message in (
        (tmp_path, r"no images in .*\.png"),
        (tmp_path / "*.png", "no images in"),
        ([], "an empty list"),
        (tmp_path / "absent", "no such file or folder: .*absent"),
    ):
        with pytest.raises(DataError, match=message):
            find_images(sources)


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    tree(tmp_path, "elsewhere/1.png", "root/a/2.png")
    root = tmp_path / "root"
    os.symlink(tmp_path / "elsewhere", root / "b")
    os.symlink(root, root / "a" / "loop")
    os.symlink(tmp_path / "gone.png", root / "dangling.png")
    assert names(find_images(root), root) == ["a/2.png", "b/1.png", "dangling.png"]


def test_images_are_known_by_content(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpe", "b.jfif", "c.JPG")
    for name in ("d.heic", "e.avif", "f", "g.jpg_large", "h.1"):
        write(tmp_path / name, encoded("JPEG"))
    write(tmp_path / "real.avif", encoded("AVIF")) if "AVIF" in decoders() else None
    for name in ("table.csv", "readme", "BM", "x.bin", "y.bin"):
        write(tmp_path / name, b"BM" if name == "BM" else b"P5 is not\n a picture")
    found = search_images(tmp_path)
    assert len(found.paths) == 8 + ("AVIF" in decoders())
    assert found.passed_over.suffixes == {".csv": 1, "": 2, ".bin": 2}
    assert found.passed_over.notices() == [
        "passed over 5 files that cannot be read as images: no suffix 2, .bin 2, .csv 1"
    ]
    assert found.passed_over.record() == {"suffixes": {".bin": 2, ".csv": 1, "none": 2}}
    assert all(open_image(path).size == (56, 40) for path in found.paths)


def test_what_systems_leave_is_passed_over(tmp_path: Path) -> None:
    tree(tmp_path, "one/1.png", "two/2.png", "@eaDir/1.png/THUMB.png", "one/__MACOSX/1.png", "lost+found/3.png")
    write(tmp_path / "one" / "Thumbs.db", b"")
    write(tmp_path / "labels.csv", b"")
    (tmp_path / "three").mkdir()
    (tmp_path / "four" / ".cache").mkdir(parents=True)
    found = search_images(tmp_path)
    assert names(found.paths, tmp_path) == ["one/1.png", "two/2.png"]
    assert [Path(name).name for name in found.passed_over.system_folders] == ["@eaDir", "lost+found", "__MACOSX"]
    assert [Path(name).name for name in found.passed_over.empty_folders] == ["four", "three"]
    assert found.passed_over.suffixes == {}
    assert names(find_images(tmp_path / "@eaDir"), tmp_path) == ["@eaDir/1.png/THUMB.png"]  # where it is asked for


def test_unreadable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a/1.png", "b/2.png")
    scan = os.scandir

    def refuse(path: Any) -> Any:  # a test may run as root, who may read everything
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = search_images(tmp_path)
    assert names(found.paths, tmp_path) == ["a/1.png"]
    assert found.passed_over.unreadable_folders == (f"{tmp_path / 'b'} (Permission denied)",)
    assert "all that they hold is missing" in found.passed_over.notices()[0]


def test_a_stray_has_no_class(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/{number}.png" for name in ("one", "two") for number in range(3)), "cover.png")
    source = open_images(tmp_path)
    assert source.label_names == ("one", "two")
    assert [source.labels[i] for i in (0, 1, 6)] == [(), (0,), (1,)]  # cover.png comes first
    assert source.passed_over.strays == (str(tmp_path / "cover.png"),)
    folder = open_folder(tmp_path)
    assert (len(folder), folder.passed_over.strays) == (6, ("cover.png",))
    assert source.files[0] == str(tmp_path / "cover.png")
    tree(tmp_path, "back.png")
    assert open_images(tmp_path).label_names == ()  # no longer clear what is a stray


def test_class_per_subfolder(tmp_path: Path) -> None:
    def classes(*below: str) -> tuple[str, ...]:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        tree(root, *below)
        source = open_images(root)
        expected = [path.split("/")[0] for path in sorted(below)] if source.label_names else [""] * len(below)
        assert [source.label_names[of[0]] if of else "" for of in source.labels] == expected
        return source.label_names

    assert classes("cat/1.png", "dog/1.png", "cat/2.png") == ("cat", "dog")
    assert classes("10/1.png", "9/1.png") == ("9", "10")
    assert classes("cat/1.png", "cat/2.png") == ()
    assert classes("cat/1.png", "2.png", "dog/1.png") == ()
    assert classes("train/cat/1.png", "train/dog/2.png") == ()


# Loading


def loaded(paths: list[Path], preprocess: ImagePreprocessor = SMALL, **more: Any) -> list[Batch]:
    return list(batches(open_files(paths), preprocess, 4, **more))


def test_loading_keeps_order_and_lists_what_is_unreadable(tmp_path: Path) -> None:
    for number in range(7):
        write(tmp_path / f"{number}.png", encoded("PNG", picture(seed=number)))
    write(tmp_path / "3.png", b"damaged")
    found = loaded(find_images(tmp_path))
    assert [batch.mask.tolist() for batch in found] == [[True, True, True, False], [True, True, True, False]]
    expected = np.concatenate([SMALL(picture(seed=seed)) for seed in (0, 1, 2, 4, 5, 6)])
    np.testing.assert_array_equal(np.concatenate([batch.pixels[batch.mask] for batch in found]), expected)
    assert ["3.png" in error for batch in found for error in batch.errors] == [True]


def test_loading_names_the_file_that_cannot_be_preprocessed(tmp_path: Path) -> None:
    path = write(tmp_path / "line.png", encoded("PNG", Image.new("L", (60_000, 1))))
    [batch] = loaded([path], ImagePreprocessor())
    assert re.search(r"line\.png: 1 x 60000 pixels would be resized", batch.errors[0])


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_what_cannot_be_read_is_one_image_less(tmp_path: Path) -> None:
    """Links to nothing and to themselves, a file that goes away, a name that is no text."""
    tree(tmp_path, "a.png", "gone.png")
    os.symlink(tmp_path / "nothing.png", tmp_path / "dangling.png")
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")), encoded("PNG"))
    paths = find_images(tmp_path)
    source = open_files(paths)
    identity = source.identity
    (tmp_path / "gone.png").unlink()
    read = list(batches(source, SMALL, 4))
    assert [source.files[i] for batch in read for i in batch.indices[batch.mask]] == [str(paths[0]), str(paths[1])]
    errors = [error for batch in read for error in batch.errors]
    assert [Path(path).name in error for path, error in zip(paths[2:], errors, strict=True)] == [True] * 3
    assert open_files(paths).identity != identity  # the file that is gone
    assert open_folder(tmp_path).files == tuple(path.name for path in find_images(tmp_path))


def test_names_that_are_no_text_are_shown_as_bytes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    with pytest.raises(ImageError, match=r"caf\\xe9\.png: No such file") as refused:
        open_image(path)
    str(refused.value).encode()


# Memory


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "F", "I"])
def test_conversion_by_strips_is_that_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    if mode in ("RGBA", "LA"):
        image = Image.fromarray(rng.integers(0, 256, (23, 17, len(mode)), np.uint8), mode)
    elif mode == "P":
        image = picture(23, 17).quantize(8)
        image.info["transparency"] = 3
    else:
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((rng.random((23, 17)) * 60_000).astype(kind))
    whole = np.asarray(to_rgb(image))
    monkeypatch.setattr("jaxzs.clip.preprocess._STRIP_PIXELS", 50)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), whole)


def test_nan_in_one_strip_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxzs.clip.preprocess._STRIP_PIXELS", 8)
    levels = np.zeros((9, 8), np.float32)
    levels[5, 3] = np.nan
    with pytest.raises(ImageError, match="from nan to nan"):
        to_rgb(Image.fromarray(levels))


def test_one_large_image_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxzs.data.images.LARGE_PIXELS", 100)
    for number in range(6):
        write(tmp_path / f"{number}.png", encoded("PNG", picture(seed=number)))
    together, most = set(), [0]

    def preprocess(image: Image.Image) -> np.ndarray:
        together.add(threading.get_ident())
        most[0] = max(most[0], len(together))
        time.sleep(0.02)
        together.discard(threading.get_ident())
        return SMALL(image)

    read = list(batches(open_files(find_images(tmp_path)), preprocess, 3, threads=4))
    assert sum(int(batch.mask.sum()) for batch in read) == 6
    assert most == [1]
    many = [open_image(path) for path in find_images(tmp_path)]  # as many as anyone likes to hold
    assert len(many) == 6


# PNG metadata


def png_with(*extra: tuple[bytes, bytes], broken: bool = False) -> bytes:
    """A picture with chunks behind its header."""
    content = encoded("PNG")
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ broken)
        for kind, data in extra
    )
    return content[:33] + chunks + content[33:]


ZEROS = zlib.compress(bytes(2 * 2**20))
METADATA = {
    "text": [(b"zTXt", b"Comment\0\0" + ZEROS)],
    "unicode": [(b"iTXt", b"Comment\0\1\0\0\0" + ZEROS)],
    "profile": [(b"iCCP", b"icc\0\0" + ZEROS)],
    "many texts": [(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(900_000)))] * 80,
    "orientation": [(b"zTXt", b"Raw profile type exif\0\0" + ZEROS)],
    "exif": [(b"eXIf", bytes(3 * 2**20))],
}


@pytest.mark.parametrize("kind", METADATA)
@pytest.mark.parametrize("broken", [False, True])
def test_metadata_does_not_lose_the_picture(kind: str, broken: bool, tmp_path: Path) -> None:
    image = open_image(write(tmp_path / "image.png", png_with(*METADATA[kind], broken=broken)))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))


def test_wrong_checksums_of_pixels_are_damage(tmp_path: Path) -> None:
    content = bytearray(encoded("PNG"))
    content[29] ^= 1  # of the header
    with pytest.raises(ImageError, match=r"damaged|no image"):
        open_image(write(tmp_path / "image.png", bytes(content)))
