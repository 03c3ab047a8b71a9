"""Images to pixels: resize, centre crop, rescale, normalise, as the library that owns a checkpoint's layout does.

Driven by a model's `preprocessor_config.json`, on Pillow and NumPy alone: transformers' own processors want torchvision
or round elsewhere. The resampling is Pillow's on 8-bit pixels, so the result is equal to the reference to the last bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxzs.clip.files import read_json
from jaxzs.errors import ConfigError, ImageError
from jaxzs.files import from_json

if TYPE_CHECKING:
    from PIL import Image

    from jaxzs.clip.config import ResNetConfig, VisionConfig

# Most pixels of an image, before and after resizing; the limit from which Pillow warns (1 GiB / 12).
MAX_PIXELS = 89_478_485
_STRIP_PIXELS = 2**20  # converted at once
MAX_SIDE = 8192  # of a model's input; the largest published CLIP reads 448

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers

RGB = tuple[float, float, float]

# What a file leaves out depends on the class that it was written for; CLIP's are the defaults of `ImagePreprocessor`.
_HALF = (0.5, 0.5, 0.5)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "Bit": {},  # the same as CLIP's, number for number
    # SigLIP squashes; its files say nothing of crops, and CLIP's default would cut every size to 224.
    "Siglip": {"size": (224, 224), "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
    "Blip": {"size": (384, 384), "do_center_crop": False},  # with CLIP's mean and std
    "ViT": {"size": (224, 224), "do_center_crop": False, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
}
# What a file of a class not known must say for itself.
_DECISIVE = ("size", "resample", "rescale_factor", "image_mean", "image_std", "do_center_crop")
_STEEPEST = 1e5  # of a pixel after normalisation; 8-bit levels, never rescaled, give at most 950


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """What is done to an image before the encoder sees it. The defaults are those of CLIP at 224 pixels.

    size: an int is the length of the shortest edge, a pair is (height, width) whatever the aspect.
    crop_size: (height, width) of the centre crop; an image smaller than it is padded with black.
    resample: Pillow's number of the filter: 3 is bicubic, 2 bilinear.
    crop_rounding: of half a pixel at the edge of the crop: "down" in transformers, to "even" in open_clip.
    letterbox: the pair `size` is a box that the whole image is fitted into, the rest black ("longest" in open_clip).

    Raises `ConfigError` on unfit numbers, and where all grey levels would come out alike or beyond float32.

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
    crop_rounding: Literal["down", "even"] = "down"
    letterbox: bool = False

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else self.size
        for name, value in (("size", sides), ("crop_size", self.crop_size)):
            if not all(_is_int(side) and 1 <= side <= MAX_SIDE for side in value):
                raise ConfigError(f"{name} must be 1 to {MAX_SIDE} pixels, got {value}")
        if not (_is_int(self.resample) and 0 <= self.resample <= 5):
            raise ConfigError(f"resample must be one of Pillow's 0 to 5, got {self.resample!r}")
        if self.letterbox and isinstance(self.size, int):
            raise ConfigError("letterbox needs (height, width) as size")
        for name in ("rescale_factor", "image_mean", "image_std"):
            value = getattr(self, name)
            if not all(math.isfinite(v) for v in (value if isinstance(value, tuple) else (value,))):
                raise ConfigError(f"{name} must be finite, got {value}")
        if not all(std > 0 for std in self.image_std):
            raise ConfigError(f"image_std must be positive, got {self.image_std}")
        self._check_levels()

    def _check_levels(self) -> None:
        """A picture must survive: a std of 1e-40 gives infinities, a rescale factor of 1e-38 one grey for all."""
        with np.errstate(all="ignore"):
            table = self._table()  # [3,256]
            black_to_white = np.abs(table[:, 255] - table[:, 0]).min()  # of the flattest channel
        if not (np.abs(table) < _STEEPEST).all() or not black_to_white > 1 / _STEEPEST:
            raise ConfigError(
                f"rescale_factor {self.rescale_factor:g}, image_mean {self.image_mean} and image_std {self.image_std} "
                f"make pixels from {table.min():g} to {table.max():g}, which no encoder can read"
            )

    @property
    def output_shape(self) -> tuple[int, int] | None:
        """(height, width) of every image that comes out; None where it depends on the image."""
        if self.do_center_crop:
            return self.crop_size
        return self.size if self.do_resize and isinstance(self.size, tuple) else None

    @classmethod
    def for_tower(
        cls, folder: str | Path, vision: VisionConfig | ResNetConfig, open_clip: Mapping[str, Any] | None = None
    ) -> ImagePreprocessor:
        """The preprocessing that the files in a folder ask for, checked against the tower that reads its pixels.

        open_clip: `preprocess_cfg` of the `open_clip_config.json` where that layout is read, {} for OpenAI's own files.
        Else `processor_config.json`, which transformers 5 writes, rules over `preprocessor_config.json`. Without either
        what is usual for the family, at the tower's size, and a warning that this is a guess.
        Raises `ConfigError`, naming the file, where what comes out does not fit the tower.

        >>> config = jaxzs.load("demo").config
        >>> clip.ImagePreprocessor.for_tower(clip.find_checkpoint("demo"), config.vision).output_shape
        (48, 48)
        """
        side = vision.image_size
        if open_clip is not None:
            return cls.from_open_clip(open_clip, side)
        file = ruling_file(Path(folder))
        if file is None:
            return cls._guess(folder, vision)
        read = cls.from_json(file)
        if read.output_shape != (side, side):
            made = "x".join(map(str, read.output_shape or ())) or "of each image's own size (no crop)"
            raise ConfigError(
                f"{file}: makes pixels {made}, the vision tower of config.json takes {side}x{side}: size, crop_size "
                "and do_center_crop must give the tower's size"
            )
        if getattr(vision, "num_channels", 3) != 3:
            raise ConfigError(
                f"{Path(folder) / 'config.json'}: the vision tower takes {vision.num_channels} channels, "
                "images are prepared with 3 (RGB)"
            )
        return read

    @classmethod
    def _guess(cls, folder: str | Path, vision: VisionConfig | ResNetConfig) -> ImagePreprocessor:
        side, siglip = vision.image_size, getattr(vision, "pooling", "class") == "map"
        warnings.warn(
            f"{folder} has neither processor_config.json nor preprocessor_config.json: images are prepared as "
            f"{'SigLIP' if siglip else 'CLIP'} does by default, at {side} pixels, which is a guess. Copy the file "
            "from the source of the weights",
            stacklevel=4,
        )
        usual = {**_DEFAULTS["Siglip"], "size": (side, side)} if siglip else {"size": side}
        return cls(crop_size=(side, side), **usual)

    @classmethod
    def from_json(cls, source: Mapping[str, Any] | str | Path) -> ImagePreprocessor:
        """From a `preprocessor_config.json`: its dict or its path.

        Absent keys are the defaults of the class that `image_processor_type` names, CLIP's where it is absent, as are
        null sizes and numbers; a null switch is off, except that images are converted to RGB. The early forms
        `"size": 224`, `"crop_size": 224` and the nested form of `processor_config.json` are read too.
        Raises `ConfigError`, naming the file and the key.

        >>> clip.ImagePreprocessor.from_json({"size": 336, "crop_size": 336}).crop_size
        (336, 336)
        >>> clip.ImagePreprocessor.from_json({"image_processor_type": "SiglipImageProcessor"}).output_shape
        (224, 224)
        """
        if isinstance(source, Mapping):
            values, where = source, "preprocessor configuration"
        else:
            values, where = read_json(Path(source), ConfigError), str(source)
        nested = values.get("image_processor")
        values = nested if isinstance(nested, Mapping) else values
        # Both give another meaning to the size, but the second one none to an object.
        named = isinstance(values.get("size"), Mapping)
        for switch in ("use_square_size",) if named else ("use_square_size", "default_to_square"):
            if values.get(switch):
                raise ConfigError(f"{where}: {switch} is set, which is not supported: write size as height and width")
        known = {field.name for field in dataclasses.fields(cls)}
        stated = {key: _plain(key, values[key], where) for key in values if key in known}
        stated = {key: value for key, value in stated.items() if value is not None}
        return from_json(cls, {**_defaults(values, stated, where), **stated}, where, ConfigError)

    @classmethod
    def from_open_clip(cls, preprocess_cfg: Mapping[str, Any], image_size: int | Sequence[int]) -> ImagePreprocessor:
        """From `preprocess_cfg` of an `open_clip_config.json`; `image_size` is that of its `vision_cfg`.

        Absent keys are open_clip's defaults. Unlike open_clip, images are converted to RGB before they are resized, and
        transparency is laid on white. Raises `ConfigError`, naming the key.

        >>> clip.ImagePreprocessor.from_open_clip({"interpolation": "bilinear", "resize_mode": "squash"}, 32).size
        (32, 32)
        """
        where = "open_clip_config.json: preprocess_cfg"
        preprocess_cfg = {key: value for key, value in preprocess_cfg.items() if value is not None}
        mode, filter_ = preprocess_cfg.get("resize_mode", "shortest"), preprocess_cfg.get("interpolation", "bicubic")
        if mode not in ("shortest", "squash", "longest"):
            raise ConfigError(f"{where}.resize_mode is {mode!r:.40}, expected shortest, squash or longest")
        if filter_ not in ("bicubic", "bilinear"):
            raise ConfigError(f"{where}.interpolation is {filter_!r:.40}, expected bicubic or bilinear")
        if (fill := preprocess_cfg.get("fill_color", 0)) not in (0, [0, 0, 0]):
            raise ConfigError(f"{where}.fill_color is {fill!r:.40}, expected 0")
        shape = list(image_size) if isinstance(image_size, Sequence) else [image_size] * 2
        if mode == "shortest" and shape[:1] != shape[1:]:
            raise ConfigError(f"{where}.resize_mode shortest with image_size {shape}: only squares are supported")
        values: dict[str, Any] = {
            "size": shape[0] if mode == "shortest" else shape,
            "crop_size": shape,
            "resample": BICUBIC if filter_ == "bicubic" else BILINEAR,
            "do_center_crop": mode == "shortest",  # "squash" gives the size exactly, "longest" is padded to it
            "crop_rounding": "even",  # int(round(x / 2)) in open_clip: halves go to the even number
            "letterbox": mode == "longest",
        }
        for key, name in (("mean", "image_mean"), ("std", "image_std")):
            if key in preprocess_cfg:
                values[name] = _plain(name, preprocess_cfg[key], where)
        return from_json(cls, values, where, ConfigError)

    def to_json(self) -> dict[str, Any]:
        """The dict of a `preprocessor_config.json`; `from_json(to_json())` is the identity."""
        values = dataclasses.asdict(self)
        if isinstance(self.size, int):
            values["size"] = {"shortest_edge": self.size}
        else:
            values["size"] = {"height": self.size[0], "width": self.size[1]}
        values["crop_size"] = {"height": self.crop_size[0], "width": self.crop_size[1]}
        values["image_mean"], values["image_std"] = list(self.image_mean), list(self.image_std)
        for added in ("crop_rounding", "letterbox"):  # written where they say something: fingerprints stay as they were
            if values[added] == getattr(ImagePreprocessor, added):
                del values[added]
        # transformers' class with these settings; crop_rounding and letterbox are this package's own.
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
                pixels = np.empty((len(listed), *resized.shape), np.float32)  # [B,H,W,3]
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
                shape = letterboxed_shape if self.letterbox else resized_shape
                height, width = shape(rgb.height, rgb.width, self.size)  # type: ignore[arg-type]
                if (height, width) != (rgb.height, rgb.width):
                    rgb = rgb.resize((width, height), resample=self.resample)  # Pillow: width first
            if self.do_center_crop or self.letterbox:
                rgb = self._crop(rgb, self.size if self.letterbox else self.crop_size)  # type: ignore[arg-type]
        except MemoryError as cause:
            raise ImageError(f"no memory to resize {rgb.height} x {rgb.width} pixels") from cause
        return np.asarray(rgb)  # [H,W,3]

    def _crop(self, rgb: Image.Image, shape: tuple[int, int]) -> Image.Image:
        """The middle of an image; Pillow fills with zeros what lies outside."""
        height, width = shape
        # `//` rounds down, also below zero: half of what open_clip pads is rounded down before its sign.
        if self.crop_rounding == "even" and not self.letterbox:
            left, top = round((rgb.width - width) / 2), round((rgb.height - height) / 2)
        elif self.letterbox:
            left, top = -((width - rgb.width) // 2), -((height - rgb.height) // 2)
        else:
            left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
        return rgb.crop((left, top, left + width, top + height))

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
        # float64 times a Python number, then float32: as transformers rescales.
        scaled = (levels * self.rescale_factor if self.do_rescale else levels).astype(np.float32)
        table = np.broadcast_to(scaled, (3, 256))
        if self.do_normalize:
            mean = np.array(self.image_mean, np.float32)[:, None]  # [3,1]
            std = np.array(self.image_std, np.float32)[:, None]  # [3,1]
            table = (table - mean) / std  # [3,256]
        return np.ascontiguousarray(table)


def _look_up(table: np.ndarray, pixels: np.ndarray, out: np.ndarray) -> None:
    # 8-bit levels have 256 results a channel: looked up they are equal to the arithmetic on pixels, and cheaper.
    for channel in range(3):
        out[..., channel] = table[channel][pixels[..., channel]]  # [256] gathered to [...]


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
        shape = size, int(size * width / height)  # 298.67 becomes 298
    else:
        shape = int(size * height / width), size
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ImageError(
            f"{height} x {width} pixels would be resized to {shape[0]:,} x {shape[1]:,}, more than "
            f"{MAX_PIXELS:,} pixels in all: crop it first"
        )
    return shape


def letterboxed_shape(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the whole image inside a box, at least one pixel each.

    >>> letterboxed_shape(375, 500, (48, 48))
    (36, 48)
    """
    factor = max(height / box[0], width / box[1])
    return max(1, round(height / factor)), max(1, round(width / factor))  # round, as in open_clip


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
        image.load()  # Pillow opens lazily: damaged data show here
        if image.mode == "RGB" and image.info.get("transparency") is None:
            return image
        if not convert:
            raise ImageError(f"it has mode {image.mode}, but do_convert_rgb is false: RGB expected")
        if image.mode.startswith(("I", "F")):  # `convert` would saturate them
            return _deep_to_rgb(image)
        # Palette and grey images may carry their transparency beside the pixels.
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            return _opaque(image)
        return image.convert("RGB")
    except ImageError:
        raise
    except Exception as cause:  # Pillow decodes here, and raises almost anything on damaged data
        raise ImageError(f"cannot read it as RGB from mode {image.mode}: {cause}") from cause


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """First row and pixels of each strip of whole rows: copies of all of a large image would need gigabytes."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits (modes I and F) as RGB."""
    from PIL import Image

    sixteen_bits = image.mode.startswith("I;16")
    # Two passes: the full scale is that of the whole image, strips of their own scale would show as bands.
    ends = [(float(levels.min()), float(levels.max())) for _, strip in _strips(image) for levels in [np.asarray(strip)]]
    lows, highs = np.transpose(ends)
    full = _full_scale(lows.min(), highs.max(), floats=image.mode == "F", sixteen_bits=sixteen_bits)
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(Image.fromarray(_scaled(np.asarray(strip), full)).convert("RGB"), (0, top))
    return rgb


def _opaque(image: Image.Image) -> Image.Image:
    """A transparent image on white, as RGB."""
    from PIL import Image

    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


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
        array = array.reshape(array.shape[:2])  # [H,W]
    elif channels == 4:  # the arithmetic of the reference on arrays, not that of Pillow
        alpha = array[..., 3:] / 255  # [H,W,1]
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
    floats = image.dtype.kind == "f"
    return _scaled(image, _full_scale(float(image.min()), float(image.max()), floats=floats, sixteen_bits=sixteen_bits))


def _full_scale(low: float, high: float, *, floats: bool, sixteen_bits: bool) -> float:
    full = 65535.0
    if not sixteen_bits:
        full = 1.0 if high <= 1 and floats else 255.0 if high <= 255 else full
    if not 0 <= low <= high <= full:  # also false for NaN
        raise ImageError(f"grey levels reach from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535")
    return full


def _scaled(levels: np.ndarray, full: float) -> np.ndarray:
    scaled: np.ndarray = np.round(levels * np.float64(255 / full)).astype(np.uint8)
    return scaled


def _as_list(images: Any) -> Sequence[Any]:
    """A single image or a batched array as a sequence of images."""
    if isinstance(images, (list, tuple)):
        return images
    if getattr(images, "ndim", None) == 4:
        return list(np.asarray(images))  # [B,H,W,C] -> B times [H,W,C]
    return [images]


# Reading the keys of the JSON file


def ruling_file(folder: Path) -> Path | None:
    """The file that decides, as transformers 5 chooses; older processor_config.json say nothing about images."""
    processor = folder / "processor_config.json"
    if processor.is_file() and isinstance(read_json(processor, ConfigError).get("image_processor"), Mapping):
        return processor
    file = folder / "preprocessor_config.json"
    return file if file.is_file() else None


def _defaults(values: Mapping[str, Any], stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the class that wrote the file fills in. Of a class that is not known nothing may be left to it."""
    kind = values.get("image_processor_type") or values.get("feature_extractor_type") or "CLIPImageProcessor"
    if not isinstance(kind, str):
        raise ConfigError(f"{where}: image_processor_type is {kind!r:.80}, expected a name")
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", kind)  # older names, other backends
    if kind == "Siglip2":
        raise ConfigError(
            f"{where}: a processor of variable numbers of patches (NaFlex), the tower takes images of one size"
        )
    needed = _DECISIVE if stated.get("do_center_crop") is False else (*_DECISIVE, "crop_size")
    if kind not in _DEFAULTS and (absent := [key for key in needed if key not in stated]):
        raise ConfigError(
            f"{where}: image_processor_type {values['image_processor_type']!r:.80} is none of "
            f"{', '.join(f'{name}ImageProcessor' for name in _DEFAULTS)}, and the file leaves out {', '.join(absent)}"
        )
    return dict(_DEFAULTS.get(kind, {}))


def _plain(key: str, value: Any, where: str) -> Any:
    """A value in the one form that `from_json` checks, whatever version wrote it; None for what is left out."""
    if value is None and key.startswith("do_"):
        return key == "do_convert_rgb"
    if key in ("image_mean", "image_std") and not isinstance(value, (list, tuple)):
        return None if value is None else [value] * 3
    if isinstance(value, Mapping) and key in ("size", "crop_size"):
        if set(value) == {"height", "width"}:
            return [value["height"], value["width"]]
        if set(value) != {"shortest_edge"} or key == "crop_size":
            allowed = "the keys height and width" + (", or shortest_edge" if key == "size" else "")
            raise ConfigError(f"{where}: {key} is {dict(value)!r:.200}, expected {allowed}")
        return value["shortest_edge"]
    return [value] * 2 if key == "crop_size" and not isinstance(value, (list, tuple, type(None))) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
