"""Images of any size to tags: resizing, batches of few shapes, order, scales, devices, unusable images."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from patch_golden import CONFIG, FOLDER, TEXTS, F, params
from PIL import Image

from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.errors import DataError, ImageError
from jaxzs.patch import Batching, prepare_image, tag, tag_images
from jaxzs.patch.batching import patch_aligned_size
from jaxzs.patch.tags import _tag

PREPROCESS = ImagePreprocessor()


@pytest.fixture(scope="module")
def model():
    return SimpleNamespace(params=params(), config=CONFIG, preprocessor=PREPROCESS)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3))
    return np.kron(coarse, np.ones((6, 6, 1)))[:height, :width].astype(np.uint8)


@pytest.mark.parametrize("name", ["case0", "case1", "case4"])
def test_resized_as_the_original_does(name):
    expected = np.load(FOLDER / f"{name}.npz")
    pixels = prepare_image(expected["image_u8"], PREPROCESS, 16)
    resized = PREPROCESS.normalize(expected["resized_u8"])
    np.testing.assert_array_equal(pixels, resized)


def test_sizes_round_up():
    assert patch_aligned_size(375, 500, 16) == (384, 512)
    assert patch_aligned_size(384, 512, 16) == (384, 512)
    assert patch_aligned_size(10, 10, 7, scale=2.1) == (21, 21)


def test_every_image_as_if_alone(model):
    """Three grids share one padded program; results come with the right numbers and on their own grids."""
    sizes = [(60, 41), (64, 64), (33, 58), (47, 52)]
    images = [photo(*size, seed) for seed, size in enumerate(sizes)]
    batching = Batching(batch_size=3, step=8)
    before = _tag._cache_size()
    found = list(tag_images(model, images, TEXTS, num_foreground=F, batching=batching))
    assert _tag._cache_size() == before + 1
    assert [tagged.number for tagged in found] == [0, 1, 2, 3]
    assert [tagged.size for tagged in found] == sizes
    for tagged, image in zip(found, images, strict=True):
        rows, columns = patch_aligned_size(*image.shape[:2], 8)
        assert tagged.refined.shape[:2] == (rows // 8, columns // 8)
    pixels = prepare_image(images[2], PREPROCESS, 8)[None]
    alone = tag(model.params, pixels, TEXTS, CONFIG, num_foreground=F)
    # Sums over padded rows take another order: 2e-5 of the largest value.
    np.testing.assert_allclose(found[2].scores, alone.scores[0], atol=2e-5)
    np.testing.assert_array_equal(found[2].tags, alone.tags[0])
    shape = found[2].refined.shape
    np.testing.assert_allclose(found[2].refined, alone.refined[0].reshape(shape), atol=2e-5)
    sides = np.array([shape[0], shape[0], shape[1], shape[1]])
    np.testing.assert_allclose(found[2].boxes * sides, alone.boxes[0], atol=1e-6)


def test_scales_are_averaged(model):
    image, scales = photo(60, 62), (1.0, 0.5)
    single = [
        next(
            tag_images(
                model, [image], TEXTS, num_foreground=F,
                batching=Batching(1, scales=(scale,)), relative_threshold=0.4,
            )
        )
        for scale in scales
    ]  # fmt: skip
    [both] = tag_images(
        model, [image], TEXTS, num_foreground=F,
        batching=Batching(1, scales=scales), relative_threshold=0.4,
    )  # fmt: skip
    mean = np.mean([tagged.scores for tagged in single], axis=0)
    np.testing.assert_allclose(both.scores, mean, rtol=1e-6)
    np.testing.assert_array_equal(both.tags, mean > mean.min() + 0.4 * np.ptp(mean))
    np.testing.assert_array_equal(both.refined, single[0].refined)


def test_divided_over_devices(model, data_mesh):
    images = [photo(60, 60, seed) for seed in range(11)]  # not a multiple of the devices
    batching = Batching(batch_size=8)
    alone = list(tag_images(model, images, TEXTS, num_foreground=F, batching=batching))
    shared = list(tag_images(model, images, TEXTS, num_foreground=F, batching=batching, mesh=data_mesh))
    assert sum(int(tagged.reidentified.sum()) for tagged in alone) > 5
    for one, other in zip(alone, shared, strict=True):
        assert one.number == other.number
        np.testing.assert_allclose(other.scores, one.scores, atol=2e-5)
        np.testing.assert_array_equal(other.tags, one.tags)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((1, 1, 3), np.uint8), "1x1 pixels are 1x1 patches"),
        (np.zeros((8, 90, 3), np.uint8), "1x12 patches"),
        (np.zeros((400, 400, 3), np.uint8), "2500 patches, more than 1000.*Scale the image by 0.63"),
        ("photo.jpg", "is a path"),
    ],
)
def test_unusable_images(model, image, match):
    batching = Batching(max_patches=1000)
    with pytest.raises(ImageError, match="image 0: .*" + match):
        list(tag_images(model, [image], TEXTS, num_foreground=F, batching=batching))


def test_unusable_images_are_passed_over(model):
    errors: dict[int, ImageError] = {}
    images = [np.zeros((1, 1, 3), np.uint8), Image.fromarray(photo(60, 60)), photo(4, 4)]
    found = list(
        tag_images(
            model, images, TEXTS, num_foreground=F,
            batching=Batching(batch_size=8), on_error=errors.__setitem__,
        )
    )  # fmt: skip
    assert [tagged.number for tagged in found] == [1]
    assert sorted(errors) == [0, 2]


def test_batching_is_checked():
    with pytest.raises(DataError, match="at least 1"):
        Batching(batch_size=0)
    with pytest.raises(DataError, match="scales"):
        dataclasses.replace(Batching(), scales=())
