"""Images to pixels: resize, centre crop, rescale, normalise, as HuggingFace's CLIPImageProcessorPil does.

Driven by a model's `preprocessor_config.json`, on Pillow and NumPy alone. The resampling is Pillow's
on 8-bit pixels, so the result is equal to the reference to the last bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxzs.clip.files import read_json
from jaxzs.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from PIL import Image

# Most pixels of an image, before and after resizing; the limit from which Pillow warns (1 GiB / 12).
MAX_PIXELS = 89_478_485
MAX_SIDE = 8192  # of a model's input; the largest published CLIP reads 448

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number

RGB = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """What is done to an image before the encoder sees it. The defaults are those of CLIP at 224 pixels.

    `size`: an int is the length of the shortest edge, a pair is (height, width) whatever the aspect.
    `crop_size`: (height, width) of the centre crop; an image smaller than it is padded with black.
    `resample`: Pillow's number of the filter, 3 is bicubic. Raises `ConfigError` on unfit numbers.

    >>> preprocess = clip.ImagePreprocessor()
    >>> pixels = preprocess(np.zeros((300, 400, 3), np.uint8))
    >>> pixels.shape, pixels.dtype
    ((1, 224, 224, 3), dtype('float32'))
    """

    size: int | tuple[int, int] = 224
    crop_size: tuple[int, int] = (224, 224)
    resample: int = BICUBIC
    rescale_factor: float = 1 / 255
    image_mean: RGB = OPENAI_CLIP_MEAN
    image_std: RGB = OPENAI_CLIP_STD
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else self.size
        for name, value in (("size", sides), ("crop_size", self.crop_size)):
            if not all(_is_int(side) and 1 <= side <= MAX_SIDE for side in value):
                raise ConfigError(f"{name} must be 1 to {MAX_SIDE} pixels, got {value}")
        if not (_is_int(self.resample) and 0 <= self.resample <= 5):
            raise ConfigError(f"resample must be one of Pillow's 0 to 5, got {self.resample!r}")
        for name in ("rescale_factor", "image_mean", "image_std"):
            value = getattr(self, name)
            if not all(math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"{name} must be finite, got {value}")
        if not all(std > 0 for std in self.image_std):
            raise ConfigError(f"image_std must be positive, got {self.image_std}")

    @classmethod
    def from_json(cls, source: Mapping[str, Any] | str | Path) -> ImagePreprocessor:
        """From a `preprocessor_config.json`: its dict or its path.

        Absent keys are CLIP's defaults, as are null sizes and numbers; a null switch is off. The early forms
        `"size": 224`, `"crop_size": 224` and the nested form of `processor_config.json` are read too.
        Raises `ConfigError`, naming the file and the key.

        >>> clip.ImagePreprocessor.from_json({"size": 336, "crop_size": 336}).crop_size
        (336, 336)
        """
        if isinstance(source, Mapping):
            values, where = source, "preprocessor configuration"
        else:
            values, where = read_json(Path(source), ConfigError), str(source)
        nested = values.get("image_processor")
        values = nested if isinstance(nested, Mapping) else values
        readers = {"int": _int, "float": _float, "bool": _bool, "RGB": _three_floats}
        special = {"size": _resize_size, "crop_size": _height_width}
        read: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name not in values or (values[field.name] is None and field.type != "bool"):
                continue
            reader = special.get(field.name) or readers[str(field.type)]
            try:
                read[field.name] = reader(values[field.name])
            except (TypeError, ValueError, OverflowError, KeyError) as cause:
                raise ConfigError(f"{where}: {field.name} is {values[field.name]!r:.200}, expected {cause}") from cause
        try:
            return cls(**read)
        except ConfigError as cause:
            raise ConfigError(f"{where}: {cause}") from cause

    def to_json(self) -> dict[str, Any]:
        """The dict of a `preprocessor_config.json`; `from_json(to_json())` is the identity."""
        values = dataclasses.asdict(self)
        if isinstance(self.size, int):
            values["size"] = {"shortest_edge": self.size}
        else:
            values["size"] = {"height": self.size[0], "width": self.size[1]}
        values["crop_size"] = {"height": self.crop_size[0], "width": self.crop_size[1]}
        values["image_mean"], values["image_std"] = list(self.image_mean), list(self.image_std)
        return {"image_processor_type": "CLIPImageProcessor", **values}

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON: equal for equal preprocessing."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __call__(self, images: Any) -> np.ndarray:
        """Pixels [B, H, W, 3], float32, of one image or of several.

        `images`: a PIL image, a uint8 or uint16 array ([H,W] grey, [H,W,C] or [B,H,W,C] with C = 1, 3
        or 4), or a sequence of those. Transparency is laid on white. Departures from the reference,
        which saturates them: 16-bit grey is divided by 257; PIL modes I and F are taken as 0 to 1
        (F only), 0 to 255 or 0 to 65535, the smallest of these that holds the image.
        Arrays and PIL images are not rotated by their EXIF data (`jaxzs.data.open_image` does).
        Raises `ImageError`, saying which image is unfit and why.

        >>> images = [np.zeros((8, 8), np.uint8), np.zeros((9, 7, 4), np.uint8)]
        >>> clip.ImagePreprocessor()(images).shape
        (2, 224, 224, 3)
        """
        listed = _as_list(images)
        if not listed:
            raise ImageError("no images were given")
        table = self._table()  # [3, 256]
        pixels: np.ndarray | None = None
        for index, image in enumerate(listed):
            try:
                resized = self.resize(image)  # [H, W, 3] uint8
            except ImageError as cause:
                raise ImageError(f"image {index}: {cause}") from cause
            if pixels is None:
                pixels = np.empty((len(listed), *resized.shape), np.float32)
            elif pixels.shape[1:] != resized.shape:
                raise ImageError(
                    f"image {index} comes out as {resized.shape[:2]} pixels, image 0 as "
                    f"{pixels.shape[1:3]}: without do_center_crop or a fixed (height, width) as size, "
                    "images of different shapes cannot share a batch"
                )
            _look_up(table, resized, pixels[index])
        assert pixels is not None
        return pixels

    def resize(self, image: Any) -> np.ndarray:
        """One image converted to RGB, resized and cropped: [H, W, 3], uint8, not yet normalised."""
        rgb = to_rgb(image, self.do_convert_rgb)
        try:
            if self.do_resize:
                height, width = resized_shape(rgb.height, rgb.width, self.size)
                if (height, width) != (rgb.height, rgb.width):
                    rgb = rgb.resize((width, height), resample=self.resample)
            if self.do_center_crop:
                # Pillow fills with zeros what lies outside; `//` rounds down, also below zero.
                height, width = self.crop_size
                left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
                rgb = rgb.crop((left, top, left + width, top + height))
        except MemoryError as cause:
            raise ImageError(f"no memory to resize {rgb.height} x {rgb.width} pixels") from cause
        return np.asarray(rgb)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Rescale and normalise uint8 RGB pixels [..., 3] of any shape: float32, same shape."""
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.shape[-1:] != (3,):
            raise ImageError(f"expected uint8 [..., 3], got {pixels.dtype} {list(pixels.shape)}")
        normalized = np.empty(pixels.shape, np.float32)
        _look_up(self._table(), pixels, normalized)
        return normalized

    def _table(self) -> np.ndarray:
        """What becomes of the 256 levels in each channel, [3, 256], rounded where the reference rounds."""
        levels = np.arange(256, dtype=np.float64)
        scaled = (levels * self.rescale_factor if self.do_rescale else levels).astype(np.float32)
        table = np.broadcast_to(scaled, (3, 256))
        if self.do_normalize:
            mean = np.array(self.image_mean, np.float32)[:, None]
            std = np.array(self.image_std, np.float32)[:, None]
            table = (table - mean) / std
        return np.ascontiguousarray(table)


def _look_up(table: np.ndarray, pixels: np.ndarray, out: np.ndarray) -> None:
    for channel in range(3):
        out[..., channel] = table[channel][pixels[..., channel]]


def resized_shape(height: int, width: int, size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) after resizing: `size` itself, or the shortest edge brought to `size`.

    The longer edge is rounded down, as in HuggingFace. Raises `ImageError` when the result, of a very
    long and thin image, would have more than `MAX_PIXELS` pixels.

    >>> resized_shape(375, 500, 224)
    (224, 298)
    """
    if isinstance(size, tuple):
        return size
    if height < width:
        shape = size, int(size * width / height)
    else:
        shape = int(size * height / width), size
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ImageError(
            f"{height} x {width} pixels would be resized to {shape[0]:,} x {shape[1]:,}, more than "
            f"{MAX_PIXELS:,} pixels in all: crop it first"
        )
    return shape


# Images of every kind to 8-bit RGB


def to_rgb(image: Any, convert: bool = True) -> Image.Image:
    """A PIL image or array as an 8-bit RGB PIL image; transparency is laid on white.

    `convert=False`: anything but RGB is refused. Raises `ImageError`.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = _from_array(image)
    if image.width * image.height == 0:
        raise ImageError(f"the image has no pixels ({image.height} x {image.width})")
    try:
        image.load()
        if image.mode == "RGB" and image.info.get("transparency") is None:
            return image
        if not convert:
            raise ImageError(f"it has mode {image.mode}, but do_convert_rgb is false: RGB expected")
        if image.mode.startswith(("I", "F")):
            wide = np.asarray(image)
            image = Image.fromarray(to_8_bits(wide, sixteen_bits=image.mode.startswith("I;16")))
        # Palette and grey images may carry their transparency beside the pixels.
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as cause:  # Pillow decodes here, and raises almost anything on damaged data
        raise ImageError(f"cannot read it as RGB from mode {image.mode}: {cause}") from cause


def _from_array(image: Any) -> Image.Image:
    """An array [H,W] or [H,W,C], uint8 or uint16, as a PIL image of mode L or RGB, alpha laid on white."""
    from PIL import Image

    if isinstance(image, (str, Path)):
        raise ImageError(f"{str(image)!r} is a path: open it with jaxzs.data.open_image")
    array = np.asarray(image)
    if array.dtype not in (np.uint8, np.uint16):
        raise ImageError(
            f"expected a PIL image or a uint8 array, got {array.dtype} {list(array.shape)}: bring it to "
            "0 to 255, e.g. np.uint8(np.round(255 * image)) for values from 0 to 1"
        )
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(f"expected [H,W] or [H,W,C] with C = 1, 3 or 4, channels last, got {list(array.shape)}")
    if array.size == 0:
        raise ImageError(f"the image has no pixels {list(array.shape)}")
    if array.dtype == np.uint16:
        array = to_8_bits(array, sixteen_bits=True)
    if channels == 1:
        array = array.reshape(array.shape[:2])
    elif channels == 4:  # the arithmetic of the reference on arrays, not that of Pillow
        alpha = array[..., 3:] / 255
        array = np.round(alpha * array[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


def to_8_bits(image: np.ndarray, sixteen_bits: bool) -> np.ndarray:
    """Grey levels of more than 8 bits, scaled to uint8. Plain conversion would saturate them.

    `sixteen_bits`: full scale is 65535. Otherwise full scale is the smallest of 1 (floats only),
    255 and 65535 that holds the image. Raises `ImageError` for values outside, and for NaN.

    >>> import numpy as np
    >>> to_8_bits(np.array([0, 257, 65535]), sixteen_bits=True)
    array([  0,   1, 255], dtype=uint8)
    """
    low, high = float(image.min()), float(image.max())
    full = 65535.0
    if not sixteen_bits:
        full = 1.0 if high <= 1 and image.dtype.kind == "f" else 255.0 if high <= 255 else full
    if not 0 <= low <= high <= full:  # also false for NaN
        raise ImageError(f"grey levels reach from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535")
    scaled: np.ndarray = np.round(image * np.float64(255 / full)).astype(np.uint8)
    return scaled


def _as_list(images: Any) -> Sequence[Any]:
    """A single image or a batched array as a sequence of images."""
    if isinstance(images, (list, tuple)):
        return images
    if getattr(images, "ndim", None) == 4:
        return list(np.asarray(images))
    return [images]


# Reading the keys of the JSON file; what they raise completes "expected ..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(value: Any) -> int:
    if not _is_int(value):
        raise TypeError("a whole number")
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("a number")
    return float(value)


def _bool(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise TypeError("true or false")
    return bool(value)


def _three_floats(value: Any) -> RGB:
    values = [_float(v) for v in value] if isinstance(value, (list, tuple)) else [_float(value)] * 3
    if len(values) != 3:
        raise ValueError("one number or three")
    return values[0], values[1], values[2]


def _height_width(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        if set(value) != {"height", "width"}:
            raise ValueError("the keys height and width")
        return _int(value["height"]), _int(value["width"])
    sides = list(value) if isinstance(value, (list, tuple)) else [value] * 2
    if len(sides) != 2:
        raise ValueError("one whole number, or height and width")
    return _int(sides[0]), _int(sides[1])


def _resize_size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, Mapping):
        if set(value) == {"shortest_edge"}:
            return _int(value["shortest_edge"])
        if set(value) != {"height", "width"}:
            raise ValueError("the key shortest_edge, or height and width")
    return _int(value) if _is_int(value) else _height_width(value)
