"""Preprocessing against transformers' own CLIPImageProcessorPil, on images of every kind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxzs.clip.config import VisionConfig
from jaxzs.clip.preprocess import MAX_PIXELS, ImagePreprocessor, resized_shape, to_8_bits
from jaxzs.errors import ConfigError, ImageError

# Equal arithmetic, rounded at the same places: no tolerance is needed.


def reference(images: Any, **config: Any) -> np.ndarray:
    """Pixels [B, H, W, 3] of transformers' processor with this preprocessor_config.json."""
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip", reason="needs transformers 5")
    pixels = module.CLIPImageProcessorPil(**config)(images, return_tensors="np")["pixel_values"]
    return np.asarray(pixels).transpose(0, 2, 3, 1)


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth random image with some sharp edges, uint8 [H, W, C]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2 + height // 8, 2 + width // 8, channels), np.uint8)
    smooth = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    return smooth + rng.integers(0, 20, (height, width, channels), np.uint8)  # wraps: edges


RGB = Image.fromarray(photo(61, 83))


def with_transparency(image: Image.Image, value: Any) -> Image.Image:
    image = image.copy()
    image.info["transparency"] = value
    return image


KINDS = {
    "RGB": RGB,
    "L": RGB.convert("L"),
    "1": RGB.convert("1"),
    "P": RGB.convert("P"),
    "P adaptive": RGB.quantize(7),
    "RGBA": Image.fromarray(photo(61, 83, 4)),
    "LA": Image.fromarray(photo(61, 83, 4)).convert("LA"),
    "PA": Image.fromarray(photo(61, 83, 4)).convert("LA").convert("PA"),
    "CMYK": RGB.convert("CMYK"),
    "YCbCr": RGB.convert("YCbCr"),
    "HSV": RGB.convert("HSV"),
    "P, one transparent entry": with_transparency(RGB.quantize(16), 3),
    "P, graded transparency": with_transparency(RGB.quantize(16), bytes(range(0, 256, 16))),
    "L, one transparent level": with_transparency(RGB.convert("L"), 17),
    "RGB, one transparent colour": with_transparency(RGB, RGB.getpixel((5, 5))),
    "array": photo(50, 70),
    "array, tall": photo(70, 50),
    "array, one channel": photo(50, 70, 1),
    "array, alpha": photo(50, 70, 4),
    "array, not contiguous": photo(70, 50).transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_equals_the_reference(kind: str) -> None:
    image = KINDS[kind]
    pixels = ImagePreprocessor()(image)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 224, 224, 3)
    np.testing.assert_array_equal(pixels, reference(image))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    size=st.one_of(st.integers(1, 70), st.tuples(st.integers(1, 70), st.integers(1, 70))),
    crop=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    resample=st.integers(0, 5),
    do_resize=st.booleans(),
)
def test_every_size_crop_and_filter_equals_the_reference(
    height: int, width: int, size: Any, crop: Any, resample: int, do_resize: bool
) -> None:
    preprocess = ImagePreprocessor(size=size, crop_size=crop, resample=resample, do_resize=do_resize)
    image = Image.fromarray(photo(height, width, seed=height))
    np.testing.assert_array_equal(preprocess(image), reference(image, **preprocess.to_json()))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"size": 64, "crop_size": 48, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": [40, 56], "crop_size": [32, 50]},
        {"size": {"height": 30, "width": 20}, "do_center_crop": False},
        {"do_resize": False, "crop_size": {"height": 90, "width": 31}},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [100, 110, 120.5], "image_std": [3, 4, 5]},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.5, "resample": 2},
        {"rescale_factor": 1 / 127.5, "do_convert_rgb": None},
        {"do_convert_rgb": False, "size": {"shortest_edge": 97}},
    ],
)
def test_every_form_of_configuration_equals_the_reference(config: dict[str, Any]) -> None:
    preprocess = ImagePreprocessor.from_json(config)
    pixels = preprocess(RGB)
    np.testing.assert_array_equal(pixels, reference(RGB, **config))
    # What is written back means the same to both.
    assert ImagePreprocessor.from_json(preprocess.to_json()) == preprocess
    np.testing.assert_array_equal(pixels, reference(RGB, **preprocess.to_json()))


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["oxford_pets", "voc2012", "cifar10", "mnist"])
def test_real_images_equal_the_reference(name: str, every: int, shared: Any) -> None:
    from jaxzs.data import find_images, open_image

    preprocess = ImagePreprocessor.from_json(shared / "golden" / "tokenizer" / "preprocessor_config.json")
    paths = find_images(shared / "data" / name)[::every]
    for start in range(0, len(paths), 50):
        images = [open_image(path) for path in paths[start : start + 50]]
        np.testing.assert_array_equal(preprocess(images), reference(images), err_msg=str(start))
    assert len(paths) >= 50 // every


def test_batches_of_every_form_are_the_single_images() -> None:
    preprocess = ImagePreprocessor(size=32, crop_size=(32, 32))
    images = [photo(40, 50, seed=s) for s in range(3)]
    single = np.concatenate([preprocess(image) for image in images])
    np.testing.assert_array_equal(preprocess(images), single)
    np.testing.assert_array_equal(preprocess(np.stack(images)), single)
    np.testing.assert_array_equal(preprocess(tuple(map(Image.fromarray, images))), single)
    mixed = preprocess([images[0], Image.fromarray(images[1]), images[2]])
    np.testing.assert_array_equal(mixed, single)


def test_jax_arrays_and_grey_arrays_are_images_too() -> None:
    import jax.numpy as jnp

    preprocess = ImagePreprocessor(size=32, crop_size=(32, 32))
    image = photo(40, 50)
    np.testing.assert_array_equal(preprocess(jnp.asarray(image)), preprocess(image))
    np.testing.assert_array_equal(preprocess(jnp.asarray(image)[None]), preprocess(image))
    grey = preprocess(image[..., 0])
    np.testing.assert_array_equal(grey, preprocess(image[..., :1]))
    np.testing.assert_array_equal(grey, preprocess(image[..., [0, 0, 0]]))


def test_pixels_of_any_shape_are_normalized_alike() -> None:
    preprocess = ImagePreprocessor(size=(24, 40), do_center_crop=False)
    image = photo(33, 47)
    resized = preprocess.resize(image)
    assert resized.shape == (24, 40, 3)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(preprocess.normalize(resized)[None], preprocess(image))
    mean, std = (np.array(preprocess.image_mean, np.float32), np.array(preprocess.image_std, np.float32))
    expected = (resized / np.float32(255) - mean) / std
    # float32: rescaling in another order moves the last bits
    np.testing.assert_allclose(preprocess.normalize(resized), expected, rtol=0, atol=1e-6)
    with pytest.raises(ImageError, match=r"uint8 \[\.\.\., 3\]"):
        preprocess.normalize(image[..., 0])


def test_more_than_8_bits_are_scaled_not_saturated() -> None:
    preprocess = ImagePreprocessor(size=32, crop_size=(32, 32))
    levels = photo(40, 40, 1)[..., 0]
    expected = preprocess(levels)
    wide = levels.astype(np.uint16) * 257
    kinds = {
        "I;16": Image.fromarray(wide),
        "I, 16 bits": Image.fromarray(wide.astype(np.int32)),
        "I, 8 bits": Image.fromarray(levels.astype(np.int32)),
        "F, 8 bits": Image.fromarray(levels.astype(np.float32)),
        "F, 0 to 1": Image.fromarray((levels / 255).astype(np.float32)),
        "F, 16 bits": Image.fromarray(wide.astype(np.float32)),
        "array": wide,
        "array, three channels": np.stack([wide] * 3, axis=-1),
    }
    for kind, image in kinds.items():
        np.testing.assert_array_equal(preprocess(image), expected, err_msg=kind)
    for bad in (np.array([[-1.0, 5]]), np.array([[0.0, 1e6]]), np.array([[np.nan, 1]])):
        with pytest.raises(ImageError, match="grey levels reach from"):
            preprocess(Image.fromarray(bad.astype(np.float32)))


@given(st.integers(0, 65535))
def test_16_bit_levels_round_to_the_nearest(level: int) -> None:
    scaled = int(to_8_bits(np.array([level], np.uint16), sixteen_bits=True)[0])
    assert abs(scaled * 257 - level) <= 128


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "no images"),
        (np.zeros((8, 8, 3), np.float32), "uint8 array, got float32"),
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((8, 8, 2), np.uint8), "channels last"),
        (np.zeros((5,), np.uint8), "channels last"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "channels last"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        ("cat.jpg", "open_image"),
        ([np.zeros((8, 8, 3), np.uint8), None], "image 1: expected a PIL image"),
        (Image.new("RGB", (60000, 2)), "60000 pixels would be resized to 224 x 6,720,000"),
    ],
)
def test_unfit_images_are_named_errors(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ImagePreprocessor()(image)


def test_unfit_batches_are_named_errors() -> None:
    free = ImagePreprocessor(do_center_crop=False)
    with pytest.raises(ImageError, match=r"image 1 comes out as \(224, 336\)"):
        free([photo(50, 50), photo(50, 75)])
    with pytest.raises(ImageError, match="do_convert_rgb is false"):
        ImagePreprocessor(do_convert_rgb=False)(Image.new("L", (9, 9)))


def test_damaged_pixel_data_is_a_named_error(tmp_path: Any) -> None:
    RGB.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ImageError, match="image 0: cannot read it as RGB"):
        ImagePreprocessor()(image)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "large"}, "size is 'large', expected"),
        ({"size": {"longest_edge": 5}}, "shortest_edge"),
        ({"size": True}, "size is True"),
        ({"size": 0}, "1 to 8192"),
        ({"size": 10**9}, "1 to 8192"),
        ({"size": [1, 2, 3]}, "size has 3 entries, expected 2"),
        ({"crop_size": {"shortest_edge": 224}}, "height and width"),
        ({"crop_size": 2.5}, "whole number"),
        ({"crop_size": [10, -1]}, "1 to 8192"),
        ({"resample": 9}, "0 to 5"),
        ({"resample": "bicubic"}, "whole number"),
        ({"do_resize": 1}, "true or false"),
        ({"rescale_factor": float("nan")}, "finite"),
        ({"image_mean": [1, 2]}, "image_mean has 2 entries, expected 3"),
        ({"image_mean": [1, 2, "x"]}, r"image_mean\[2\] is 'x', expected a finite number"),
        ({"image_std": [1, 0, 1]}, "positive"),
        ({"image_std": 10**400}, "image_std"),
        # Finite, but no picture is left: infinite pixels, or one level for all.
        ({"image_std": 1e-40}, "which no encoder can read"),
        ({"image_std": [1e-20, 1, 1]}, "which no encoder can read"),
        ({"image_std": 1e30}, "which no encoder can read"),
        ({"rescale_factor": 1e38}, "which no encoder can read"),
        ({"rescale_factor": 1e-38}, "which no encoder can read"),
        ({"rescale_factor": 0}, "which no encoder can read"),
        ({"image_mean": 1e38}, "which no encoder can read"),
        ({"image_processor_type": 5}, "image_processor_type is 5, expected a name"),
        ({"use_square_size": True}, "use_square_size is set"),
        ({"size": 48, "default_to_square": True}, "default_to_square is set"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "NaFlex"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 224, "do_center_crop": True},
            "'ConvNextImageProcessor' is none of CLIPImageProcessor, .* leaves out resample, .*, crop_size",
        ),
    ],
)
def test_unfit_configurations_are_named_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePreprocessor.from_json(config)


def test_configuration_files(tmp_path: Any) -> None:
    preprocess = ImagePreprocessor(size=336, crop_size=(336, 336))
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(preprocess.to_json()))
    assert ImagePreprocessor.from_json(file) == preprocess
    assert ImagePreprocessor.from_json({"image_processor": preprocess.to_json()}) == preprocess
    for content, message in (
        (b"", "empty"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"size":', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b'{"size": "big"}', "size is 'big'"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            ImagePreprocessor.from_json(file)
        assert str(file) in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        ImagePreprocessor.from_json(tmp_path / "absent.json")


def test_null_sizes_and_numbers_are_the_defaults() -> None:
    nulls = {"size": None, "crop_size": None, "image_std": None, "rescale_factor": None}
    assert ImagePreprocessor.from_json(nulls) == ImagePreprocessor()


def test_fingerprint_tells_configurations_apart() -> None:
    first = ImagePreprocessor()
    assert first.fingerprint == ImagePreprocessor.from_json(first.to_json()).fingerprint
    assert first.fingerprint != ImagePreprocessor(resample=2).fingerprint
    assert first.fingerprint != ImagePreprocessor(size=(224, 224)).fingerprint


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 500))
def test_resized_shape_keeps_the_aspect(height: int, width: int, size: int) -> None:
    if max(height, width) / min(height, width) * size * size > MAX_PIXELS - size:
        return
    new_height, new_width = resized_shape(height, width, size)
    assert min(new_height, new_width) == size
    assert abs(new_height * width - new_width * height) <= max(height, width)


# Files that rule, and the tower


def write_processors(folder: Path, preprocessor: Any = None, processor: Any = None) -> Path:
    for name, content in (("preprocessor_config.json", preprocessor), ("processor_config.json", processor)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


CLIP_32 = ImagePreprocessor(32, (32, 32)).to_json()
SQUASH_32 = ImagePreprocessor((32, 32), resample=2, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, do_center_crop=False)
NESTED_32 = {"processor_class": "CLIPProcessor", "image_processor": SQUASH_32.to_json()}
FAST_32 = {  # as the fast processor of transformers 4 writes it
    **SQUASH_32.to_json(), "image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first",
    "default_to_square": False, "device": None, "do_pad": None, "pad_size": None, "return_tensors": None,
}  # fmt: skip
TOWER_32 = VisionConfig(image_size=32, patch_size=8)


def test_the_file_that_rules_is_that_of_transformers(tmp_path: Path) -> None:
    expected = SQUASH_32, ImagePreprocessor.from_json(CLIP_32)
    for number, (files, ruling) in enumerate(
        [
            ({"processor": NESTED_32}, 0),
            ({"preprocessor": SQUASH_32.to_json()}, 0),
            ({"preprocessor": CLIP_32, "processor": NESTED_32}, 0),
            ({"preprocessor": FAST_32}, 0),
            ({"processor": {"image_processor": FAST_32}}, 0),
            ({"preprocessor": CLIP_32, "processor": {"processor_class": "CLIPProcessor"}}, 1),  # of transformers 4
        ]
    ):
        (tmp_path / str(number)).mkdir()
        folder = write_processors(tmp_path / str(number), **files)
        assert ImagePreprocessor.for_tower(folder, TOWER_32) == expected[ruling], files


def test_without_a_file_the_preprocessing_is_a_guess_and_said_to_be(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="neither processor_config.json nor .* 32 pixels, which is a guess"):
        made = ImagePreprocessor.for_tower(tmp_path, TOWER_32)
    assert made == ImagePreprocessor(32, (32, 32))
    assert ImagePreprocessor.for_tower(tmp_path, TOWER_32, open_clip={}) == ImagePreprocessor(
        32, (32, 32), crop_rounding="even"
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (ImagePreprocessor(48, (48, 48)).to_json(), "makes pixels 48x48, the vision tower of config.json takes 32x32"),
        ({**CLIP_32, "do_center_crop": False}, "of each image's own size"),
        ({"image_processor_type": "CLIPImageProcessor"}, "makes pixels 224x224"),
        ({"size": 48, "crop_size": 8192}, "makes pixels 8192x8192"),
        ({"image_processor_type": "SiglipImageProcessor"}, "makes pixels 224x224"),
        ({"size": [32, 40], "do_center_crop": False}, "makes pixels 32x40"),
    ],
)
def test_pixels_that_do_not_fit_the_tower_are_refused_at_once(file: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: .*{message}"):
        ImagePreprocessor.for_tower(write_processors(tmp_path, file), TOWER_32)


def test_three_channels_are_what_images_have(tmp_path: Path) -> None:
    tower = dataclasses.replace(TOWER_32, num_channels=4)
    with pytest.raises(ConfigError, match="takes 4 channels, images are prepared with 3"):
        ImagePreprocessor.for_tower(write_processors(tmp_path, CLIP_32), tower)


def test_a_siglip_file_squashes_and_converts(tmp_path: Path) -> None:
    written = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    made = ImagePreprocessor.for_tower(write_processors(tmp_path, {**written, "do_convert_rgb": None}), TOWER_32)
    assert made == dataclasses.replace(SQUASH_32, resample=3)
    assert made(Image.new("L", (50, 40))).shape == (1, 32, 32, 3)


# open_clip's rules, against what open_clip 3.3 made of six photos


def open_clip_case(case: dict[str, Any]) -> ImagePreprocessor:
    return ImagePreprocessor.from_open_clip(case, case["size"])


def test_open_clip_and_siglip_pixels_equal_those_of_their_libraries(shared: Path) -> None:
    golden = shared / "golden" / "families" / "preprocess"
    described = json.loads((golden / "case.json").read_text())
    images = [Image.open(shared / "data" / name) for name in described["photos"]]
    compared = 0
    with np.load(golden / "pixels.npz") as stored:
        for name, case in described["cases"].items():
            if name.startswith("openclip_mode"):
                continue  # other rules for transparency and palettes: jaxzs converts before it resizes
            made = open_clip_case(case) if "resize_mode" in case else ImagePreprocessor.from_json(case["json"])
            for index, image in enumerate(images):
                np.testing.assert_array_equal(made.resize(image), stored[name][index], err_msg=f"{name} {index}")
                digest = hashlib.sha256(np.ascontiguousarray(made(image)[0]).tobytes()).hexdigest()
                assert digest == case["float32_nhwc_sha256"][index], (name, index)
                compared += 1
    assert compared == 66


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"resize_mode": "stretch"}, 32, "resize_mode is 'stretch', expected shortest, squash or longest"),
        ({"interpolation": "random"}, 32, "interpolation is 'random'"),
        ({"fill_color": 255}, 32, "fill_color is 255"),
        ({"mean": [1, 2]}, 32, "image_mean has 2 entries"),
        ({}, [32, 40], "only squares"),
        ({}, 10**6, "1 to 8192"),
        ({}, "32", "only squares|whole number"),
    ],
)
def test_unfit_open_clip_configurations_are_named(config: dict, size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImagePreprocessor.from_open_clip(config, size)


def test_what_open_clip_leaves_at_null_is_its_default() -> None:
    null = dict.fromkeys(["mean", "std", "interpolation", "resize_mode", "fill_color"])
    assert ImagePreprocessor.from_open_clip(null, 32) == ImagePreprocessor.from_open_clip({}, 32)


@given(side=st.integers(1, 90), extra=st.integers(0, 90), crop=st.integers(1, 60))
def test_half_a_pixel_of_the_crop_goes_to_the_even_side(side: int, extra: int, crop: int) -> None:
    made = ImagePreprocessor.from_open_clip({}, crop)
    image = Image.fromarray(photo(side, side + extra))
    _, width = resized_shape(side, side + extra, crop)
    whole = np.asarray(image.resize((width, crop), resample=3))
    left = round((width - crop) / 2)
    np.testing.assert_array_equal(made.resize(image), whole[:, left : left + crop])


def test_a_letterbox_holds_the_whole_image_in_black() -> None:
    made = ImagePreprocessor.from_open_clip({"resize_mode": "longest"}, [32, 56])
    pixels = made.resize(Image.new("RGB", (100, 20), (255, 255, 255)))  # to 56 x 11, (32 - 11) // 2 above it
    assert pixels.shape == (32, 56, 3)
    rows = (pixels == 255).all(axis=(1, 2))
    assert (np.flatnonzero(rows)[[0, -1]] == (10, 20)).all()
    assert not pixels[~rows].any()
    assert ImagePreprocessor.from_json(made.to_json()) == made
    assert "letterbox" not in ImagePreprocessor().to_json()  # earlier fingerprints hold
