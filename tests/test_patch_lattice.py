"""The permutohedral lattice against exact sums, and the CRF on it against pydensecrf and the exact kernel."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_golden import compilations

from jaxzs.errors import DataError, ImageError
from jaxzs.patch import CRF, Dense, Segmenting, dense_crf, pixel_labels
from jaxzs.patch.lattice import blur, build, padded
from jaxzs.patch.windows import labels_of_scores

FILE = Path(__file__).parent / "golden" / "patch" / "crf.npz"
LATTICE = CRF(kernel="lattice")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    """A scene of three labels, and what pydensecrf2 1.1 makes of it (CLIP-ES's settings)."""
    return dict(np.load(FILE))


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5]), st.floats(0.01, 30))
@settings(max_examples=25)
def test_points_are_mixtures_of_corners(seed, d, spread):
    """Weights from 0 to 1 that sum to 1; every neighbour of a corner has it as its other one."""
    points = np.random.default_rng(seed).normal(size=(60, d)) * spread
    lattice = build(points)
    # Coordinates up to a few hundred in float32 are good to 1e-4 of a cell.
    assert lattice.weights.min() > -1e-3
    np.testing.assert_allclose(lattice.weights.sum(1), 1, atol=1e-4)
    M = lattice.neighbours.shape[2]
    assert lattice.corners.min() == 0
    assert lattice.corners.max() == M - 1
    for before, after in lattice.neighbours:
        there = np.flatnonzero(before < M)
        np.testing.assert_array_equal(after[before[there]], there)


@pytest.mark.parametrize("d", [2, 5])
def test_blur_is_about_the_gaussian(d):
    """Up to a constant, which the CRF's normalisation takes out; the lattice is an approximation to a few percent."""
    points = np.random.default_rng(0).random((3000, d)).astype(np.float32) * 3
    values = np.stack([np.sin(points[:, 0]) + 2, np.ones(len(points))], 1).astype(np.float32)
    exact = np.exp(-0.5 * np.square(points[:, None] - points[None]).sum(-1)) @ values
    found = np.asarray(jax.jit(blur)(build(points), values))
    ratio = found[:, 0] / found[:, 1] / (exact[:, 0] / exact[:, 1])
    assert np.abs(ratio - 1).max() < 0.05
    assert np.corrcoef(found[:, 1], exact[:, 1])[0, 1] > 0.98


def test_padding_changes_nothing():
    points = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    values = np.random.default_rng(1).normal(size=(100, 2)).astype(np.float32)
    lattice = build(points)
    alone = blur(lattice, jnp.asarray(values))
    more = padded(lattice, 128, lattice.neighbours.shape[2] + 50)
    with_padding = blur(more, jnp.asarray(np.pad(values, ((0, 28), (0, 0)), constant_values=7.0)))
    np.testing.assert_array_equal(with_padding[:100], alone)
    assert not np.asarray(with_padding[100:]).any()


def test_as_pydensecrf():
    """The same algorithm: sums in another order, and the hash table there."""
    expected = golden()
    found = np.asarray(dense_crf(expected["probabilities"], expected["image"], LATTICE))
    np.testing.assert_allclose(found, expected["field"], atol=1e-4)
    assert (found.argmax(0) == expected["field"].argmax(0)).mean() > 0.999
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_as_pydensecrf_itself():
    """Where it is installed, on other settings than the golden file's."""
    reference = pytest.importorskip("pydensecrf.densecrf", reason="pip install pydensecrf2")
    image, C = np.array(golden()["image"][:40, :33]), 4
    probabilities = np.random.default_rng(0).random((C, 40, 33)).astype(np.float32)
    field = reference.DenseCRF2D(33, 40, C)
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probabilities, 1e-5, 1)).reshape(C, -1)))
    field.addPairwiseGaussian(sxy=2, compat=1)
    field.addPairwiseBilateral(sxy=20, srgb=8, rgbim=np.ascontiguousarray(image), compat=5)
    expected = np.array(field.inference(5)).reshape(C, 40, 33)
    settings = CRF(
        kernel="lattice", iterations=5, smooth_sigma=2.0, smooth_weight=1.0, bilateral_sigma=20.0, colour_sigma=8.0,
        bilateral_weight=5.0,
    )  # fmt: skip
    np.testing.assert_allclose(dense_crf(probabilities, image, settings), expected, atol=1e-3)


def test_labels_as_the_exact_kernel():
    probabilities, image = golden()["probabilities"], golden()["image"]
    exact = dense_crf(probabilities, image, CRF(kernel="exact"))
    assert (np.asarray(exact).argmax(0) == golden()["field"].argmax(0)).mean() > 0.99


@pytest.mark.parametrize("kernel", ["lattice", "exact"])
def test_several_photos_at_once(kernel):
    probabilities, image = golden()["probabilities"][:, :12, :14], golden()["image"][:12, :14]
    photos = np.stack([probabilities, probabilities[::-1]]), np.stack([image, 255 - image])
    settings = CRF(kernel=kernel, iterations=3)
    together = dense_crf(*photos, settings)
    for i in range(2):
        np.testing.assert_allclose(together[i], dense_crf(photos[0][i], photos[1][i], settings), atol=1e-6)


def test_photos_of_many_sizes_share_programs():
    probabilities, image = golden()["probabilities"], np.full_like(golden()["image"], 80)
    dense_crf(probabilities[:, :40, :30], image[:40, :30], LATTICE)
    with compilations() as compiled:
        for height, width in ((41, 29), (30, 40), (39, 31)):
            dense_crf(probabilities[:, :height, :width], image[:height, :width], LATTICE)
    assert not compiled


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("shape", [(20, 30), (1, 1), (1, 9)])
def test_one_colour(shape, colour):
    """Nothing to tell pixels apart but their places: the labels are smoothed, and nothing is not a number."""
    image = np.full((*shape, 3), colour, np.uint8)
    probabilities = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    found = np.asarray(dense_crf(probabilities, image, LATTICE))
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    if min(shape) > 1:
        assert len(np.unique(found.argmax(0))) <= len(np.unique(probabilities.argmax(0)))
        assert found[0].std() < probabilities[0].std()
    certain = np.asarray(dense_crf(np.stack([np.ones(shape), np.zeros(shape)]), image, LATTICE))
    assert (certain.argmax(0) == 0).all()


def test_one_label():
    image = golden()["image"][:5, :6]
    np.testing.assert_array_equal(dense_crf(np.full((1, 5, 6), 0.3, np.float32), image, LATTICE), np.ones((1, 5, 6)))


def test_traced_photos_go_to_the_exact_kernel():
    probabilities, image = golden()["probabilities"][:, :6, :7], golden()["image"][:6, :7]
    slope = jax.grad(lambda photo: dense_crf(probabilities, photo, CRF(iterations=2))[1].sum())(
        jnp.asarray(image, jnp.float32)
    )
    assert np.isfinite(slope).all()
    with pytest.raises(DataError, match="traced here: take 'exact'"):
        jax.jit(lambda photo: dense_crf(probabilities, photo, LATTICE))(image)


def test_limits_are_named(monkeypatch):
    probabilities, image = golden()["probabilities"], golden()["image"]
    with pytest.raises(DataError, match="standard deviations are too small"):
        dense_crf(probabilities, image, CRF(kernel="lattice", colour_sigma=1e-4))
    with pytest.raises(DataError, match="expected one of auto, lattice, exact"):
        CRF(kernel="fast")
    with pytest.raises(DataError, match="stride is of the exact kernel"):
        CRF(kernel="lattice", stride=2)
    with pytest.raises(DataError, match="colour_sigma is 0"):
        CRF(colour_sigma=0)
    for levels in (np.full((4, 4, 3), -0.5, np.float32), np.full((4, 4, 3), 1e30), np.full((4, 4, 3), 256)):
        for kernel in ("exact", "lattice"):
            with pytest.raises(ImageError, match=r"the image's levels are from .* expected 0 to 255"):
                dense_crf(np.full((2, 4, 4), 0.5, np.float32), levels, CRF(kernel=kernel))
    with pytest.raises(ImageError, match="not all finite"):
        dense_crf(np.full_like(probabilities, np.nan), image)
    monkeypatch.setattr("jaxzs.patch.crf.MOST_POINTS", 1000)
    with pytest.raises(ImageError, match="more than the 1000 that a CRF takes"):
        dense_crf(probabilities, image, LATTICE)


def test_large_photos_are_sharpened_smaller(monkeypatch):
    """What does not fit is done at a smaller size, and labels come back at the photo's own."""
    monkeypatch.setattr("jaxzs.patch.crf.MOST_POINTS", 1000)
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 200
    maps = np.array([[[0.1, 0.3, 0.8, 0.9]]], np.float32)
    labels = pixel_labels(image, maps, [4], Segmenting(crf=CRF()))
    assert labels.shape == (60, 80)
    np.testing.assert_array_equal(labels[30], np.where(np.arange(80) < 40, 0, 5))
    scores = np.moveaxis(np.concatenate([1 - maps, maps]), 0, -1)  # of two names
    dense = labels_of_scores(scores, image, np.array([-1, 4]), Dense(crf=CRF()))
    np.testing.assert_array_equal(dense, labels)


def test_lists_are_arrays():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    probabilities = np.full((2, 4, 6), 0.5, np.float32)
    probabilities[:, 1, 1] = 0.9, 0.1
    found = dense_crf(probabilities.tolist(), image.tolist(), CRF(kernel="exact"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, dense_crf(probabilities, image, CRF(kernel="exact")))
