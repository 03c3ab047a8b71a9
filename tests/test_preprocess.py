"""Preprocessing against transformers' own CLIPImageProcessorPil, on images of every kind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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
        ({"size": [1, 2, 3]}, "height and width"),
        ({"crop_size": {"shortest_edge": 224}}, "height and width"),
        ({"crop_size": 2.5}, "whole number"),
        ({"crop_size": [10, -1]}, "1 to 8192"),
        ({"resample": 9}, "0 to 5"),
        ({"resample": "bicubic"}, "whole number"),
        ({"do_resize": 1}, "true or false"),
        ({"rescale_factor": float("nan")}, "finite"),
        ({"image_mean": [1, 2]}, "one number or three"),
        ({"image_mean": [1, 2, "x"]}, "a number"),
        ({"image_std": [1, 0, 1]}, "positive"),
        ({"image_std": 10**400}, "image_std"),
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
