"""Label maps of images of any size: as if each were alone, on one device and on eight."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from patch_golden import CONFIG, TEXTS, compilations, params

from jaxzs import parallel
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.errors import DataError
from jaxzs.patch import CRF, Batching, Segmenting, label_map, pixel_labels, prepare_image, segment, segment_images
from jaxzs.patch.batching import moved

NAMES, BACKGROUND = TEXTS[:5], TEXTS[5:]
TAGS = [[0, 3], [1], [], [4, 2, 0], [3], [2, 1], [0], [4], [1, 2, 3], [0], [2]]


@pytest.fixture(scope="module")
def model():
    return SimpleNamespace(params=params(), config=CONFIG, preprocessor=ImagePreprocessor())


@pytest.fixture(scope="module")
def images():
    """Eleven, no multiple of the devices, of many sizes on grids of at most 8x8 patches."""
    rng = np.random.default_rng(0)
    sizes = [(int(rng.integers(30, 65)), int(rng.integers(30, 65))) for _ in TAGS]
    coarse = [rng.integers(0, 256, (11, 11, 3)) for _ in sizes]
    return [
        np.kron(blocks, np.ones((6, 6, 1)))[:height, :width].astype(np.uint8)
        for blocks, (height, width) in zip(coarse, sizes, strict=True)
    ]


def masks_of(model, images, mesh=None, settings=Segmenting(), batching=Batching(batch_size=8)):  # noqa: B008
    found = list(
        segment_images(model, images, TAGS, NAMES, BACKGROUND, settings, batching=replace(batching, mesh=mesh))
    )
    return sorted(found, key=lambda mask: mask.number)


def assert_equal(found, expected, largest_part: float) -> None:
    """Maps within 2e-5, sums in another order; labels but on borders, which half precision may move."""
    assert [mask.number for mask in found] == [mask.number for mask in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.tags, other.tags)
        np.testing.assert_allclose(one.maps, other.maps, atol=2e-5)
        np.testing.assert_allclose(one.activation, other.activation, atol=2e-5)
        assert (one.labels != other.labels).mean() <= largest_part


@pytest.mark.slow
def test_every_image_as_if_alone(model, images):
    found = masks_of(model, images)
    assert [mask.number for mask in found] == list(range(len(images)))
    for mask, image, own in zip(found, images, TAGS, strict=True):
        assert mask.labels.shape == image.shape[:2]
        assert set(np.unique(mask.labels)) <= {0, *(c + 1 for c in own)}
        if mask.number not in (3, 8):  # each alone is a program of its own
            continue
        pixels = prepare_image(image, model.preprocessor, 8)[None]
        tags = np.array([[*own, -1]])
        alone = segment(model.params, pixels, NAMES, BACKGROUND, tags, CONFIG)
        np.testing.assert_allclose(mask.maps, alone.maps[0, : len(own)], atol=2e-5)
    assert not found[2].labels.any()  # an image without tags is background


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"model": 2}])
def test_divided_over_devices(model, images, shape):
    """A batch of 8 over 8 devices, the second one padded with 5 images of nothing; all axes of a mesh are used."""
    mesh = parallel.make_mesh(**shape)
    assert_equal(masks_of(model, images, mesh), masks_of(model, images), 1e-3)


@pytest.mark.slow
def test_nothing_is_padded_where_the_original_is_followed(model, images):
    """On eight devices the batch of one is filled up, and nothing else changes."""
    options = {"settings": Segmenting(exact=True), "batching": Batching(batch_size=1)}
    few = images[:1]
    mesh = parallel.make_mesh()
    assert_equal(masks_of(model, few, mesh, **options), masks_of(model, few, **options), 1e-3)


@pytest.mark.slow
def test_sharpened_maps_divided_over_devices(model, images):
    settings = Segmenting(crf=CRF(stride=4, iterations=2))
    found = masks_of(model, images[:1], parallel.make_mesh(), settings)
    assert_equal(found, masks_of(model, images[:1], settings=settings), 1e-3)


def test_a_second_call_compiles_nothing(model, images):
    mesh = parallel.make_mesh()
    masks_of(model, images[:3], mesh)
    with compilations() as compiled:
        masks_of(model, images[:3], mesh, Segmenting(box_threshold=0.3))
    assert not compiled


@pytest.mark.parametrize("mesh", [False, True])
def test_unknown_tags_are_refused(model, images, mesh):
    batching = Batching(mesh=parallel.make_mesh() if mesh else None)
    for tags, match in (
        ([[5]], "tags range from 5 to 5, expected 0 to 4"),
        ([[0.9]], "expected a list of class numbers"),
        ([0], "expected a list of class numbers"),
        ({1: [0]}, "there are no tags for image 0"),
    ):
        found = segment_images(model, images[:1], tags, NAMES, BACKGROUND, batching=batching)
        with pytest.raises(DataError, match=match):
            list(found)


def test_filling_is_no_tag(model, images):
    [filled] = segment_images(model, images[:1], np.array([[3, -1, -1]]), NAMES, BACKGROUND)
    [alone] = segment_images(model, images[:1], [[3]], NAMES, BACKGROUND)
    np.testing.assert_array_equal(filled.tags, [3])
    np.testing.assert_array_equal(filled.labels, alone.labels)


def test_origins_are_averaged(model):
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    [found] = masks_of(model, [image], batching=Batching(offsets=2))
    [plain] = masks_of(model, [image])
    assert found.maps.shape == (len(plain.tags), 16, 12)
    assert found.labels.shape == plain.labels.shape
    origins = [(0, 0), (0, 1), (1, 0), (1, 1)]  # in halves of a patch
    views = [masks_of(model, [moved(image, 4 * down, 4 * right)])[0].maps for down, right in origins]
    pairs = zip(views, origins, strict=True)
    over = np.mean([maps[:, (5 + down) // 2, (7 + right) // 2] for maps, (down, right) in pairs], axis=0)
    # Sums over padded rows take another order: 2e-5 of the largest value.
    np.testing.assert_allclose(found.maps[:, 5, 7], over, atol=2e-5)


def test_one_scale_only(model, images):
    with pytest.raises(DataError, match=r"at one, 1\.0"):
        masks_of(model, images, batching=Batching(scales=(1.0, 2.0)))


@pytest.mark.parametrize(
    ("maps", "tags", "match"),
    [
        (np.ones((2, 4, 4)), [0], r"shape \(2, 4, 4\), expected \[1,rows,columns\]"),
        (np.ones((4, 4)), [0], "a map for each tag"),
        (np.ones((1, 0, 4)), [0], "a map for each tag"),
        (np.full((1, 4, 4), np.nan), [0], "maps are not all finite"),
        (np.ones((1, 4, 4)), [-1], "from -1 to -1, expected 0 at least"),
        (np.ones((1, 4, 4)), [0.9], "expected a list of class numbers"),
        (np.ones((1, 4, 4)), ["cat"], "expected a list of class numbers"),
    ],
)
def test_maps_and_tags_that_do_not_fit(maps, tags, match):
    """Each of these was a label map: of the first class, of background, or of the class that 0.9 rounds down to."""
    for found in (lambda: pixel_labels(np.zeros((8, 8, 3), np.uint8), maps, tags), lambda: label_map(maps, tags)):
        with pytest.raises(DataError, match=match):
            found()
