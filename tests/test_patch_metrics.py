"""Tagging metrics against the original's figures, scikit-learn and direct evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_golden import FOLDER
from sklearn.metrics import average_precision_score, f1_score

from jaxzs.errors import DataError, LabelError
from jaxzs.patch.metrics import (
    average_precision,
    calibrate_thresholds,
    f1,
    mean_average_precision,
    segmentation_report,
    tag_report,
)


@pytest.fixture(scope="module")
def unit():
    return dict(np.load(FOLDER / "unit.npz"))


def tags_at(scores: np.ndarray, relative: float | np.ndarray) -> np.ndarray:
    lowest, highest = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    return scores > lowest + relative * (highest - lowest)


def test_average_precision_of_the_original(unit):
    np.testing.assert_allclose(average_precision(unit["ap_pred"], unit["ap_label"]), unit["ap"], rtol=1e-6)
    mean = mean_average_precision(unit["ap_pred"], unit["ap_label"])
    assert mean == pytest.approx(float(unit["mAP"]), rel=1e-9)


@pytest.mark.parametrize(
    ("average", "relative", "key"),
    [
        ("overall", 0.5, "f1_overall"),
        ("category", 0.5, "f1_category"),
        ("sample", 0.5, "f1_sample"),
        ("overall", 0.1, "f1_rel01"),
    ],
)
def test_f1_of_the_original(unit, average, relative, key):
    found = f1(tags_at(unit["ap_pred"], relative), unit["ap_label"], average)
    np.testing.assert_allclose(found, unit[key], rtol=1e-7)


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_scikit_learn_agrees_without_ties(seed):
    random = np.random.default_rng(seed)
    scores, labels = random.random((17, 4)), random.integers(0, 2, (17, 4))
    labels[0] = 1  # every class has a positive
    np.testing.assert_allclose(average_precision(scores, labels), average_precision_score(labels, scores, average=None))
    tags = scores > 0.5
    # TagCLIP adds 1e-9 to the counts.
    assert f1(tags, labels).f1 == pytest.approx(f1_score(labels, tags, average="micro"), abs=1e-8)


def test_nothing_right_is_zero():
    assert f1(np.array([[True, False]]), np.array([[0, 1]])) == (0.0, 0.0, 0.0)


def test_nothing_to_evaluate_is_named():
    scores, nothing = np.random.default_rng(0).random((3, 2)), np.zeros((3, 2), int)
    for call in (mean_average_precision, lambda *both: tag_report(both[0], both[1], both[1], ["a", "b"])):
        with pytest.raises(LabelError, match="nothing to evaluate"):
            call(scores, nothing)
    with pytest.raises(LabelError, match="more than once: a"):
        tag_report(scores, nothing, nothing + 1, ["a", "a"])
    with pytest.raises(DataError, match="no pixel has a true label"):
        segmentation_report([np.zeros((2, 2), int)], [np.full((2, 2), 255)], ["a"])


@pytest.mark.parametrize(
    ("predicted", "truth", "match"),
    [
        ([[0, 1]], [[0, 2]], "true labels must be 0 to 1.*found 2"),
        ([[0, 1]], [[0, -1]], "true labels must be 0 to 1.*found -1"),
        ([[0, 3]], [[0, 1]], "predicted labels must be 0 to 1.*found 3"),
        ([[0, -1]], [[0, 1]], "predicted labels must be 0 to 1.*found -1"),
        ([[0.5, 1]], [[0, 1]], "whole numbers"),
        ([[0, 1]], [[0, np.nan]], "whole numbers"),
        ([[0, 1], [0, 1]], [[0, 1]], "more predicted label maps than true ones"),
        ([[0, 1]], [[0]], "a label map is"),
    ],
)
def test_labels_outside_of_the_classes(predicted, truth, match):
    """A true label that no class has is a mistake, not void."""
    with pytest.raises((LabelError, DataError), match=match):
        segmentation_report(list(map(np.array, predicted)), list(map(np.array, truth)), ["a", "b"])


def test_void_is_ignored():
    report = segmentation_report([np.array([0, 1, 1])], [np.array([0, 1, 255])], ["a", "b"])
    assert report["mIoU"] == 1
    assert segmentation_report([np.array([0, 1])], [np.array([0, -1])], ["a", "b"], void=-1)["pixel_accuracy"] == 1


def test_report_names_both_definitions(unit):
    scores, labels = unit["ap_pred"], unit["ap_label"]
    names = [f"class {i}" for i in range(scores.shape[1])]
    report = tag_report(scores, tags_at(scores, 0.5), labels, names)
    present = labels.any(0)
    assert (~present).sum() == 1  # which the two definitions treat differently
    assert report["mAP"] == pytest.approx(float(unit["mAP"]))
    assert report["mAP_sklearn"] == pytest.approx(average_precision_score(labels[:, present], scores[:, present]))
    assert report["f1_micro_sklearn"] == pytest.approx(report["f1_overall"]["f1"], abs=1e-8)
    assert report["per_class"]["class 0"]["ap"] == pytest.approx(float(unit["ap"][0]), rel=1e-6)


@pytest.mark.slow
@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_calibrated_thresholds_are_the_best(seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, (25, 3))
    labels[0], labels[1] = 1, 0  # positives and negatives in every class
    scores = (labels * 0.3 + random.random((25, 3))).astype(np.float32)
    thresholds = calibrate_thresholds(scores, labels)
    found = f1_score(labels, tags_at(scores, thresholds[None]), average=None, zero_division=0)
    for fixed in np.linspace(0, 0.99, 34):
        other = f1_score(labels, tags_at(scores, fixed), average=None, zero_division=0)
        assert (found >= other - 1e-6).all()


def test_bad_input_is_named():
    with pytest.raises(DataError, match=r"\(2, 3\) and labels \(3, 2\)"):
        average_precision(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(LabelError, match="0 or 1"):
        f1(np.zeros((2, 3)), np.full((2, 3), 255))
    with pytest.raises(DataError, match="image 1 are not finite"):
        average_precision(np.array([[0.0], [np.nan]]), np.ones((2, 1)))
    with pytest.raises(DataError, match="overall, category, sample"):
        f1(np.zeros((1, 1)), np.zeros((1, 1)), "macro")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, bool])
def test_whole_scores_rank_as_real_ones(dtype):
    """The negative of an unsigned 0 is 0, the best rank of all, and that of -128 in 8 bits is itself."""
    lowest = np.iinfo(dtype).min if dtype is not bool else 0
    scores = np.array([[lowest], [1], [lowest], [1]]).astype(dtype)
    labels = np.array([[1], [0], [0], [1]])
    np.testing.assert_array_equal(average_precision(scores, labels), average_precision(scores.astype(float), labels))
    assert average_precision(scores, labels)[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_average_precision(scores, labels) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize("scores", [np.array([["a"], ["b"]]), np.array([[1j], [2]]), np.array([[None], [1]])])
def test_scores_that_are_no_numbers_are_named(scores):
    with pytest.raises(DataError, match="expected real numbers"):
        average_precision(scores, np.array([[1], [0]]))
