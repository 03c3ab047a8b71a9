"""Images of any size to tags: resizing, batches of few shapes, order, scales, devices, unusable images."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patch_golden import CONFIG, FOLDER, TEXTS, F, compilations, params
from PIL import Image

import jaxzs
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.errors import DataError, ImageError
from jaxzs.patch import Batching, Tagging, encoded_patches, prepare_image, segment_dense, tag, tag_images
from jaxzs.patch.batching import finer, fitting_size, merged, moved, patch_aligned_size, stacks
from jaxzs.patch.images import _on_device

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


@pytest.mark.slow
def test_every_image_as_if_alone(model):
    """Three grids share one padded program; results come with the right numbers and on their own grids."""
    sizes = [(60, 41), (64, 64), (33, 58), (47, 52)]
    images = [photo(*size, seed) for seed, size in enumerate(sizes)]
    batching = Batching(batch_size=3, step=8)
    before = _on_device._cache_size()
    found = list(tag_images(model, images, TEXTS, num_foreground=F, batching=batching))
    assert _on_device._cache_size() == before + 1
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


@pytest.mark.slow
def test_scales_are_averaged(model):
    image, scales = photo(60, 62), (1.0, 0.5)
    single = [
        next(
            tag_images(
                model, [image], TEXTS, num_foreground=F,
                batching=Batching(1, scales=(scale,)), settings=Tagging(relative_threshold=0.4),
            )
        )
        for scale in scales
    ]  # fmt: skip
    [both] = tag_images(
        model, [image], TEXTS, num_foreground=F,
        batching=Batching(1, scales=scales), settings=Tagging(relative_threshold=0.4),
    )  # fmt: skip
    mean = np.mean([tagged.scores for tagged in single], axis=0)
    np.testing.assert_allclose(both.scores, mean, rtol=1e-6)
    np.testing.assert_array_equal(both.tags, mean > mean.min() + 0.4 * np.ptp(mean))
    np.testing.assert_array_equal(both.refined, single[0].refined)


ORIGINS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # in halves of a patch


@pytest.mark.slow
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_origins_are_averaged(model, scales):
    image, some = photo(64, 48), Tagging(relative_threshold=0.4)
    pixels = [prepare_image(image, PREPROCESS, 8, scale=scale) for scale in scales]
    views = [moved(one, down, right) for one in pixels for down in (0, 4) for right in (0, 4)]
    alone = [tag(model.params, view[None], TEXTS, CONFIG, some, num_foreground=F) for view in views]
    [found] = tag_images(model, [image], TEXTS, some, num_foreground=F, batching=Batching(offsets=2, scales=scales))
    # Sums over padded rows take another order: 2e-5 of the largest value.
    mean = np.mean([one.scores[0] for one in alone], axis=0)
    np.testing.assert_allclose(found.scores, mean, atol=2e-5)
    np.testing.assert_array_equal(found.tags, mean > mean.min() + 0.4 * np.ptp(mean))
    assert found.refined.shape[:2] == found.coarse.shape[:2] == (16, 12)
    maps = np.stack([np.asarray(one.refined[0]).reshape(8, 6, -1) for one in alone[:4]])  # of the first scale
    for row, column in ((0, 0), (5, 7), (10, 3), (13, 10)):  # the patch over this cell, in each of the four
        over = [maps[view, (row + down) // 2, (column + right) // 2] for view, (down, right) in enumerate(ORIGINS)]
        np.testing.assert_allclose(found.refined[row, column], np.mean(over, axis=0), atol=2e-5)


@given(side=st.integers(2, 5), offsets=st.integers(1, 4), seed=st.integers(0, 9))
def test_finer_maps_lie_where_the_image_is(side, offsets, seed):
    # An image of one value for each fine cell, seen by patches that take the mean of theirs.
    cells = np.random.default_rng(seed).normal(size=(side * offsets, side * offsets))
    views = [moved(cells, down, right) for down in range(offsets) for right in range(offsets)]
    found = finer([view.reshape(side, offsets, side, offsets).mean((1, 3)) for view in views], offsets)
    assert found.shape == cells.shape
    # Away from the rim: the mean of all patches that hold the cell, a triangle of weights around it.
    weights = offsets - np.abs(np.arange(1 - offsets, offsets))
    for at in range(offsets, offsets * (side - 1)):
        around = slice(at - offsets + 1, at + offsets)
        expected = (cells[around, around] * np.outer(weights, weights)).sum() / offsets**4
        np.testing.assert_allclose(found[at, at], expected, rtol=1e-9, atol=1e-9)


def test_offsets_out_of_range():
    for offsets in (0, -1, 9):
        with pytest.raises(DataError, match="offsets is"):
            Batching(offsets=offsets)


@pytest.mark.slow
def test_divided_over_devices(model, data_mesh):
    images = [photo(60, 60, seed) for seed in range(11)]  # not a multiple of the devices
    batching = Batching(batch_size=8)
    alone = list(tag_images(model, images, TEXTS, num_foreground=F, batching=batching))
    shared = list(
        tag_images(model, images, TEXTS, num_foreground=F, batching=dataclasses.replace(batching, mesh=data_mesh))
    )
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
    batching = Batching(max_patches=1000, resize=False)
    with pytest.raises(ImageError, match="image 0: .*" + match):
        list(tag_images(model, [image], TEXTS, num_foreground=F, batching=batching))


def test_unusable_images_are_passed_over(model):
    errors: dict[int, ImageError] = {}
    images = [np.zeros((1, 1, 3), np.uint8), Image.fromarray(photo(60, 60)), photo(4, 4)]
    found = list(
        tag_images(
            model, images, TEXTS, num_foreground=F,
            batching=Batching(batch_size=8, on_error=errors.__setitem__),
        )
    )  # fmt: skip
    assert [tagged.number for tagged in found] == [1]
    assert sorted(errors) == [0, 2]


def test_batching_is_checked():
    with pytest.raises(DataError, match="at least 1"):
        Batching(batch_size=0)
    with pytest.raises(DataError, match="scales"):
        dataclasses.replace(Batching(), scales=())


# Heights and widths of 27 images that strangers had in one folder.
MIXED = [
    (422, 550), (201, 346), (64, 224), (49, 85), (527, 145), (587, 429), (403, 342), (477, 622), (366, 419),
    (601, 375), (529, 206), (41, 442), (554, 276), (60, 372), (477, 498), (145, 547), (557, 93), (364, 53),
    (219, 88), (293, 328), (56, 281), (114, 43), (442, 44), (428, 355), (1, 1), (60, 3000), (900, 20),
]  # fmt: skip


def test_many_sizes_are_few_programs(model):
    """One program for each of 26 sizes took minutes of compiling; every image still is in its place, whole."""
    lines: list[str] = []
    errors: dict[int, ImageError] = {}
    images = [np.full((*size, 3), number, np.uint8) for number, size in enumerate(MIXED)]
    found = list(stacks(model, images, Batching(notice=lines.append, on_error=errors.__setitem__)))
    shapes = {stack.pixels.shape for stack in found}
    assert len(shapes) <= 5
    assert [line.split()[0] for line in lines] == ["image", *["compiling"] * len(shapes)]
    assert lines[0] == "image 7 of 622x477 pixels is looked at in 576x448, as 4096 patches hold"
    assert list(errors) == [24]
    assert sorted(piece.number for stack in found for piece in stack.pieces) == [n for n in range(27) if n != 24]
    for stack in found:
        for piece, (rows, columns), mask in zip(stack.pieces, stack.grids, stack.mask, strict=False):
            assert piece.pixels.shape[:2] == (8 * rows, 8 * columns)
            assert mask.sum() == rows * columns == mask[:rows, :columns].sum()
        assert not stack.mask[len(stack.pieces) :].any()
        assert stack.mask[0].size <= 2 * 4096


@given(
    st.dictionaries(st.tuples(st.integers(2, 300), st.integers(2, 300)), st.integers(1, 9), max_size=40),
    st.integers(4, 9000),
)
def test_merged_groups_hold_all_of_theirs(sizes, max_patches):
    waiting = {grid: [grid] * count for grid, count in sizes.items()}
    groups = merged(waiting, set(), max_patches)
    assert sorted(grid for members in groups.values() for grid in members) == sorted(itertools.chain(*waiting.values()))
    for (rows, columns), members in groups.items():
        assert all(own[0] <= rows and own[1] <= columns for own in members)
        assert rows * columns <= max(max_patches, *(own[0] * own[1] for own in members))


@given(st.integers(1, 6000), st.integers(1, 6000), st.integers(4, 5000), st.sampled_from([8, 14, 16]))
def test_large_photos_are_made_to_fit(height, width, max_patches, size):
    height, width = patch_aligned_size(height, width, size)
    rows, columns = (side // size for side in fitting_size(height, width, size, max_patches))
    assert min(rows, columns) >= 2
    assert rows * columns <= max_patches
    if min(height, width) / max(height, width) > 0.2 and max_patches > 1000:  # about the shape it had
        assert abs(np.log(rows / columns) - np.log(height / width)) < 0.1


@pytest.mark.slow
def test_photos_of_any_size(model):
    """Scaled to fit, with a line that says so; places come back in the photo's own size."""
    lines: list[str] = []
    image = photo(300, 500)
    batching = Batching(batch_size=1, max_patches=64, notice=lines.append)
    [found] = tag_images(model, [image], TEXTS, num_foreground=F, batching=batching)
    assert found.size == (300, 500)
    assert found.refined.shape[0] * found.refined.shape[1] <= 64
    assert (found.boxes >= 0).all()
    assert (found.boxes <= 1).all()
    assert "image 0 of 500x300 pixels is looked at in 80x48, as 64 patches hold" in lines[0]


@pytest.mark.slow
def test_a_second_call_compiles_nothing(model, data_mesh):
    images = [photo(60, 60, seed) for seed in range(3)]
    for mesh in (None, data_mesh):
        batching = Batching(batch_size=8, mesh=mesh)
        list(tag_images(model, images, TEXTS, Tagging(votes=1), num_foreground=F, batching=batching))
        with compilations() as compiled:
            settings = Tagging(votes=2, relative_threshold=0.4)
            list(tag_images(model, images, TEXTS, settings, num_foreground=F, batching=batching))
        assert not compiled
    with compilations() as compiled:
        jax.jit(lambda x: 2 * x + 17)(1.0)
    assert compiled, "the counter counts"


@pytest.mark.parametrize("several", [Batching(offsets=2), Batching(scales=(1.0, 2.0))])
def test_masks_without_tags_and_encoded_patches_take_each_image_once(several):
    demo = jaxzs.load("demo")
    with pytest.raises(DataError, match="masks without tags take each image once"):
        next(segment_dense(demo, [photo(64, 48)], np.ones((2, 64), np.float32), batching=several))
    with pytest.raises(DataError, match="encoded patches take each image once"):
        next(encoded_patches(demo, [photo(64, 48)], batching=several))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 2.5}, {"batch_size": "2"}, {"offsets": 1.5}, {"offsets": 9}, {"max_patches": 1e4}, {"step": 0.5},
        {"scales": 1.0}, {"scales": ("1",)}, {"scales": (np.nan,)}, {"scales": ()},
    ],
)  # fmt: skip
def test_settings_of_batching_are_numbers_of_their_kind(wrong):
    """A look from 1.5 origins would have been averaged over 2.25 of them."""
    with pytest.raises(DataError, match=f"{next(iter(wrong))} (is|are) .* expected"):
        Batching(**wrong)


def test_scales_may_be_a_list():
    assert Batching(scales=[1, 0.5]) == Batching(scales=(1.0, 0.5))  # type: ignore[arg-type]
