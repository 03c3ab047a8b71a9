"""Images to patches for SigLIP 2 NaFlex (arXiv 2502.14786): any aspect, at most so many patches, padded with a mask.

As transformers' Siglip2ImageProcessor does, on Pillow and NumPy alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxzs.clip.config import VisionConfig
from jaxzs.clip.files import read_json
from jaxzs.clip.naflex import Patches
from jaxzs.clip.preprocess import BILINEAR, MAX_PIXELS, MAX_SIDE, ImagePreprocessor, ruling_file, to_rgb
from jaxzs.errors import ConfigError, ImageError

_NEAR = 1e-5  # where the search for the scale ends, as in the reference
_LARGEST_SCALE = 100.0  # small images are enlarged until they have their number of patches
_LEVELS = ImagePreprocessor(resample=BILINEAR, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


@dataclasses.dataclass(frozen=True)
class PatchPreprocessor:
    """What is done to an image before a NaFlex tower sees it. The defaults are those of SigLIP 2.

    levels: how pixels are rescaled and normalised, and Pillow's filter. patch_size: pixels a side.
    max_num_patches: to which every image is padded.

    >>> preprocess = clip.PatchPreprocessor(max_num_patches=16)
    >>> images = preprocess(np.zeros((300, 400, 3), np.uint8))
    >>> images.values.shape, int(images.mask.sum()), images.shapes.tolist()
    ((1, 16, 768), 12, [[3, 4]])
    """

    levels: ImagePreprocessor = _LEVELS
    patch_size: int = 16
    max_num_patches: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.patch_size <= 1024 or not 1 <= self.max_num_patches <= MAX_PIXELS // self.patch_size**2:
            raise ConfigError(f"patch_size {self.patch_size} with max_num_patches {self.max_num_patches}: out of range")

    @classmethod
    def for_tower(cls, folder: str | Path, vision: VisionConfig) -> PatchPreprocessor:
        """As the files in a folder ask for, checked against the tower. Raises `ConfigError`, naming the file."""
        file = ruling_file(Path(folder))
        if file is None:
            raise ConfigError(f"{folder} has neither processor_config.json nor preprocessor_config.json")
        read = read_json(file, ConfigError)
        values = read.get("image_processor", read)
        own = {key: values[key] for key in ("patch_size", "max_num_patches") if values.get(key) is not None}
        if bad := [key for key, value in own.items() if type(value) is not int]:
            raise ConfigError(f"{file}: {bad[0]} is {own[bad[0]]!r:.80}, expected a whole number")
        if values.get("do_resize") is False:
            raise ConfigError(f"{file}: do_resize is false: images are always resized to whole patches")
        # Of a SigLIP file in all but the filter that it leaves out.
        levels = {"resample": BILINEAR, **values, "image_processor_type": "SiglipImageProcessor"}
        try:
            made = cls(ImagePreprocessor.from_json(levels), **own)
        except ConfigError as cause:
            raise ConfigError(f"{file}: {cause}") from cause
        if made.patch_size != vision.patch_size:
            raise ConfigError(
                f"{file}: makes patches of {made.patch_size} pixels, the vision tower of config.json takes "
                f"{vision.patch_size}"
            )
        return made

    def to_json(self) -> dict[str, Any]:
        """The dict of the `preprocessor_config.json` that `for_tower` reads."""
        kept = ("do_convert_rgb", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std", "resample")
        levels = {key: value for key, value in self.levels.to_json().items() if key in kept}
        own = {"patch_size": self.patch_size, "max_num_patches": self.max_num_patches}
        return {"image_processor_type": "Siglip2ImageProcessor", **levels, **own}

    @property
    def fingerprint(self) -> str:
        """sha256 of the settings: equal for equal preprocessing."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __call__(self, images: Any) -> Patches:
        """`Patches` of one image or of several, as `ImagePreprocessor` takes them; raises `ImageError`."""
        listed = images if isinstance(images, list | tuple) else [images]
        if not listed:
            raise ImageError("no images were given")
        rows = [self._patches(image) for image in listed]
        values = np.zeros((len(rows), self.max_num_patches, 3 * self.patch_size**2), np.float32)  # [B,N,p*p*3]
        mask = np.zeros(values.shape[:2], bool)  # [B,N]
        for index, (patches, _) in enumerate(rows):
            values[index, : len(patches)], mask[index, : len(patches)] = patches, True
        return Patches(values, mask, np.array([grid for _, grid in rows], np.int32))

    def _patches(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """One image as patches [N,p*p*3], row by row, each in the order row, column, channel; and its grid."""
        size, rgb = self.patch_size, to_rgb(image)
        rows, columns = grid_within(rgb.height, rgb.width, size, self.max_num_patches)
        if max(rows, columns) * size > MAX_SIDE:
            raise ImageError(f"{rgb.height} x {rgb.width} pixels are too long and thin for patches: crop it first")
        # Squashed to whole patches, as the reference does: neither cropped nor padded.
        resized = rgb.resize((columns * size, rows * size), resample=self.levels.resample)
        pixels = self.levels.normalize(np.asarray(resized)).reshape(rows, size, columns, size, 3)  # [r,p,c,p,3]
        return pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1), (rows, columns)  # [N,p*p*3]


def grid_within(height: int, width: int, patch_size: int, most: int) -> tuple[int, int]:
    """Rows and columns of patches: the largest scale, by halving, at which both sides, rounded up, give at most `most`.

    >>> grid_within(300, 400, 16, 256)
    (14, 18)
    """

    def patches(scale: float, side: int) -> int:
        return max(1, math.ceil(side * scale / patch_size))

    # Step by step as transformers searches: another search could end one patch apart.
    low, high = _NEAR / 10, _LARGEST_SCALE  # `low` always fits: it begins with one patch
    while high - low >= _NEAR:
        scale = (low + high) / 2
        if patches(scale, height) * patches(scale, width) <= most:
            low = scale
        else:
            high = scale
    return patches(low, height), patches(low, width)
