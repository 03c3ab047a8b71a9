"""Masks without tags: windows of many photos in one program, labels in strips, devices, names, thresholds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patch_golden import CONFIG, TEXTS, compilations, params

from jaxzs.clip.model import resize_weights
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.errors import DataError, ImageError, LabelError
from jaxzs.patch import CRF, Batching, Dense, dense_scores, segment_dense
from jaxzs.patch.windows import _starts, labels_of_scores

SETTINGS = Dense(short_side=64)
EIGHT = Batching(batch_size=8)


@pytest.fixture(scope="module")
def model():
    return SimpleNamespace(params=params(), config=CONFIG, preprocessor=ImagePreprocessor())


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3))
    return np.kron(coarse, np.ones((6, 6, 1)))[:height, :width].astype(np.uint8)


PHOTOS = [photo(64, 80, 0), photo(100, 64, 1), photo(64, 64, 2), photo(30, 41, 3)]


@given(st.integers(2, 40), st.integers(2, 20), st.integers(1, 20))
def test_windows_cover_everything(length, window, stride):
    length, stride = max(length, window), min(stride, window)
    starts = _starts(length, window, stride)
    assert starts[0] == 0
    assert starts[-1] == length - window
    assert max(np.diff(starts), default=0) <= stride


def test_scores_are_means_over_windows(model):
    """Of each patch, of all windows that hold it, computed window by window."""
    [mask] = segment_dense(model, PHOTOS[:1], TEXTS, SETTINGS, batching=EIGHT)
    pixels = model.preprocessor.normalize(PHOTOS[0])
    total, count = np.zeros((8, 10, len(TEXTS))), np.zeros((8, 10, 1))
    for y in _starts(64, 48, 24):
        for x in _starts(80, 48, 24):
            found = dense_scores(model.params, pixels[None, y : y + 48, x : x + 48], TEXTS, CONFIG)
            here = slice(y // 8, y // 8 + 6), slice(x // 8, x // 8 + 6)
            total[here] += np.asarray(found).reshape(6, 6, -1)
            count[here] += 1
    np.testing.assert_allclose(mask.scores, total / count, atol=1e-5)
    assert count.max() > 1


def test_labels_in_strips_are_labels_at_once(model, monkeypatch):
    """The best of the enlarged scores, however few rows are held at a time."""
    scores = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    picture = photo(37, 43)
    down, across = resize_weights(4, 37, "bilinear"), resize_weights(5, 43, "bilinear")
    large = np.einsum("yr,rcn,xc->yxn", down, scores, across)
    classes = np.array([0, 1, 2, 0, -1, -1], np.int32)
    expected = classes[large.argmax(-1)] + 1
    for limit in (1, 1000, 2**22):
        monkeypatch.setattr("jaxzs.patch.windows._STRIP", limit)
        found = labels_of_scores(scores, picture, classes, Dense())
        assert (found == expected).mean() > 0.998  # ties of float32 sums in another order
    probability = np.exp(40 * large) / np.exp(40 * large).sum(-1, keepdims=True)
    found = labels_of_scores(scores, picture, classes, Dense(threshold=0.9))
    assert (found == np.where(probability.max(-1) < 0.9, 0, expected)).mean() > 0.998
    assert (found == 0).sum() > (expected == 0).sum()


def test_photos_of_many_sizes_are_one_program(model):
    list(segment_dense(model, PHOTOS[:1], TEXTS, SETTINGS, batching=EIGHT))
    with compilations() as compiled:
        masks = list(segment_dense(model, PHOTOS, TEXTS, SETTINGS, batching=EIGHT))
    assert not compiled
    assert [mask.number for mask in masks] == [0, 1, 2, 3]
    assert [mask.labels.shape for mask in masks] == [image.shape[:2] for image in PHOTOS]
    alone = [next(segment_dense(model, [image], TEXTS, SETTINGS, batching=EIGHT)) for image in PHOTOS]
    for one, other in zip(masks, alone, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        assert (one.labels == other.labels).mean() > 0.995


def test_divided_over_devices(model, data_mesh):
    alone = list(segment_dense(model, PHOTOS, TEXTS, SETTINGS, batching=EIGHT))
    shared = list(segment_dense(model, PHOTOS, TEXTS, SETTINGS, batching=replace(EIGHT, mesh=data_mesh)))
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
        assert (one.labels == other.labels).mean() > 0.995


def test_several_names_of_a_class(model):
    classes = [0, 1, 1, 0, 2, -1, -1]
    [mask] = segment_dense(model, PHOTOS[:1], TEXTS, SETTINGS, classes=classes, batching=EIGHT)
    [by_name] = segment_dense(model, PHOTOS[:1], TEXTS, SETTINGS, batching=EIGHT)
    np.testing.assert_array_equal(mask.labels, np.array([0, *(np.array(classes) + 1)])[by_name.labels])
    np.testing.assert_array_equal(mask.present, [label for label in np.unique(mask.labels) if label])
    [stuff] = segment_dense(model, PHOTOS[:1], TEXTS, Dense(short_side=64, background=False), batching=EIGHT)
    np.testing.assert_array_equal(stuff.labels, by_name.labels - 1)


def test_crf_keeps_to_the_labels_found(model):
    settings = Dense(short_side=64, crf=CRF(iterations=2))
    [mask] = segment_dense(model, PHOTOS[:1], TEXTS, settings, batching=EIGHT)
    [plain] = segment_dense(model, PHOTOS[:1], TEXTS, SETTINGS, batching=EIGHT)
    assert set(np.unique(mask.labels)) <= set(np.unique(plain.labels))


def test_unusable_images(model):
    errors: dict[int, ImageError] = {}
    images = [np.zeros((2, 200, 3), np.uint8), PHOTOS[0], np.zeros((0, 4, 3), np.uint8)]
    found = list(segment_dense(model, images, TEXTS, SETTINGS, batching=replace(EIGHT, on_error=errors.__setitem__)))
    assert [mask.number for mask in found] == [1]
    assert sorted(errors) == [0, 2]
    with pytest.raises(ImageError, match=r"image 0: .*too long and thin"):
        list(segment_dense(model, images, TEXTS, SETTINGS, batching=EIGHT))


@pytest.mark.parametrize(
    ("settings", "options", "error", "match"),
    [
        ({"window": 20}, {}, DataError, "multiple of the patch size 8"),
        ({"window": 16, "stride": 24}, {}, DataError, "no gaps"),
        ({"threshold": 0.1, "background": False}, {}, DataError, "needs a background"),
        ({}, {"classes": [0, 1]}, LabelError, "each of 7 names"),
        ({}, {"classes": [-2] * 7}, LabelError, "go down to -2"),
        ({}, {"classes": [0.5] * 7}, LabelError, "whole number"),
    ],
)
def test_bad_input_is_named(model, settings, options, error, match):
    with pytest.raises(error, match=match):
        list(segment_dense(model, PHOTOS[:1], TEXTS, Dense(**settings), **options))


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention": "x"},
        {"short_side": 0},
        {"short_side": 96.5},
        {"stride": 8.0},
        {"window": "48"},
        {"threshold": 2.0},
        {"scale": -1.0},
        {"neighbourhood": np.nan},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(DataError):
        Dense(**wrong)
