"""Classify-then-segment against the reference outputs of CLIP-ES; the dense CRF against direct evaluation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patch_golden import FOLDER, assert_close, case, checkpoint, pixels_of, unit

from jaxzs.errors import DataError, ImageError
from jaxzs.patch import CRF, Segmenting, default_affinity_layers, default_attention_layers
from jaxzs.patch.crf import _kernel_product, clip_es_colours, dense_crf
from jaxzs.patch.grid import grid_from_mask
from jaxzs.patch.metrics import segmentation_report
from jaxzs.patch.segmentation import affinity, enlarge, label_map, segment

CASES = ("0", "1", "4")


@functools.cache
def cam(number: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"cam{number}.npz"))


@functools.cache
def segmented(number: str):
    params, config = checkpoint()
    tagging, expected = case(f"case{number}"), cam(number)
    voc = str(tagging["dataset"]).startswith("voc")
    return segment(
        params,
        pixels_of(tagging),
        tagging["text_features"],
        expected["cam_bg_text"],
        expected["cam_tags"][None],
        config,
        Segmenting(
            box_threshold=0.4 if voc else 0.7, affinity_layers=default_affinity_layers(12, last=not voc), exact=True
        ),
    )


@pytest.mark.parametrize("number", CASES)
def test_maps(number):
    found, expected = segmented(number), cam(number)
    assert_close(found.probability[0], expected["cam_prob"])
    assert_close(found.activation[0], expected["cam_gray"])
    np.testing.assert_array_equal(found.box_mask[0], expected["cam_box_mask"])
    assert_close(found.refined[0], expected["cam_refined"])


@pytest.mark.parametrize("number", CASES)
def test_labels(number):
    expected, tagging = cam(number), case(f"case{number}")
    maps = enlarge(segmented(number).maps[0], *tagging["image_u8"].shape[:2])
    assert maps.dtype == np.float16
    np.testing.assert_allclose(maps[:, ::4, ::4].astype(np.float32), expected["cam_highres_sub"], atol=1e-3)
    stuff = str(tagging["dataset"]) == "cocostuff"
    labels = label_map(maps, expected["cam_tags"], background=not stuff)
    # Half precision makes equal scores of nearly equal ones: pixels on borders between labels.
    assert (labels == expected["label_map"]).mean() > 0.999


def test_affinity_layers():
    assert default_affinity_layers(12) == tuple(range(4, 11))
    assert default_affinity_layers(12, last=True) == tuple(range(4, 12))
    assert default_affinity_layers(5) == (2, 3)
    assert default_affinity_layers(1) == (0,)
    assert default_attention_layers(5) == (1, 2, 3)


@pytest.mark.slow
def test_padding_and_absent_tags_change_nothing():
    params, config = checkpoint()
    tagging, expected, alone = case("case4"), cam("4"), segmented("4")
    rows, columns = (int(side) for side in tagging["grid"])
    pixels = np.full((1, 16 * (rows + 2), 16 * (columns + 2), 3), 5.0, np.float32)
    pixels[0, : 16 * rows, : 16 * columns] = pixels_of(tagging)[0]
    mask = np.zeros((1, rows + 2, columns + 2), bool)
    mask[0, :rows, :columns] = True
    tags = np.concatenate([expected["cam_tags"], [-1]])[None]
    found = segment(
        params, pixels, tagging["text_features"], expected["cam_bg_text"], tags, config,
        Segmenting(box_threshold=0.7, affinity_layers=default_affinity_layers(12, last=True), exact=True),
        mask=mask,
    )  # fmt: skip
    assert_close(found.maps[0, :-1, :rows, :columns], np.asarray(alone.maps[0]))
    assert not np.asarray(found.maps[0, -1]).any()
    assert not np.asarray(found.maps[:, :, rows:]).any()


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_affinity_of_padding_is_zero(layers):
    """Compiled as one program, two divisions by a tiny float were one by its square, which is 0."""
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :3, :2] = True  # and an image of padding
    grid = grid_from_mask(jnp.asarray(mask))
    attention = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 2, 17, 17)))
    attention = jnp.where(jnp.pad(grid.patches, ((0, 0), (1, 0)))[None, :, None, :], attention, 0.0)
    found = jax.jit(affinity, static_argnums=2)(tuple(attention), grid, layers)
    pairs = grid.patches[:, :, None] & grid.patches[:, None, :]
    assert np.isfinite(found).all()
    assert not np.asarray(found)[~np.asarray(pairs)].any()
    # doubly stochastic up to the three normalisations, and so is its square
    np.testing.assert_allclose(np.asarray(found[0]).sum(1)[np.asarray(grid.patches[0])], 1, atol=0.1)


def test_no_tags_is_background():
    assert not label_map(np.zeros((0, 3, 4), np.float16), []).any()
    with pytest.raises(DataError, match="without tags"):
        label_map(np.zeros((0, 3, 4), np.float16), [], background=False)


def test_mean_intersection_over_union():
    data = unit()
    report = segmentation_report(data["iou_pred"], data["iou_gt"], [f"c{i}" for i in range(8)])
    assert report["mIoU"] == pytest.approx(float(data["iou_mean"]), rel=1e-9)
    assert report["pixel_accuracy"] == pytest.approx(float(data["iou_pixel_acc"]), rel=1e-9)
    per_class = [report["per_class"][f"c{i}"] for i in range(8)]
    np.testing.assert_allclose(np.array(per_class, float), data["iou_class"], rtol=1e-7)


# --- the dense CRF ----------------------------------------------------------------------------------


def crf_directly(probabilities: np.ndarray, image: np.ndarray, iterations: int = 10) -> np.ndarray:
    """Kraehenbuehl and Koltun's mean field with N x N kernels in float64."""
    C, height, width = probabilities.shape
    y, x = np.mgrid[:height, :width].astype(float)
    place = np.stack([y, x], -1).reshape(-1, 2)
    colour = image.reshape(-1, 3).astype(float)
    square = lambda f: np.square(f[:, None] - f[None]).sum(-1)  # noqa: E731
    kernels = [(3.0, np.exp(-0.5 * square(place))), (4.0, np.exp(-0.5 * (square(place / 67) + square(colour / 3))))]
    unary = -np.log(np.clip(probabilities, 1e-5, 1)).reshape(C, -1).T

    def softmax(z):
        z = np.exp(z - z.max(1, keepdims=True))
        return z / z.sum(1, keepdims=True)

    field = softmax(-unary)
    for _ in range(iterations):
        logits = -unary
        for weight, kernel in kernels:
            norm = 1 / np.sqrt(kernel.sum(1) + 1e-20)
            logits = logits + weight * norm[:, None] * (kernel @ (norm[:, None] * field))
        field = softmax(logits)
    return field.T.reshape(C, height, width)


def scene(height: int = 20, width: int = 23):
    random = np.random.default_rng(0)
    image = np.full((height, width, 3), 40.0)
    image[5:15, 6:17] = (200, 120, 30)
    image += random.normal(0, 4, image.shape)
    inside = np.zeros((height, width))
    inside[4:14, 8:19] = 1  # shifted against what is seen
    score = np.clip(0.35 + 0.3 * inside + random.normal(0, 0.1, inside.shape), 0, 1)
    probabilities = np.stack([1 - score, score, 0.1 * np.ones_like(score)]).astype(np.float32)
    return probabilities, np.clip(image, 0, 255).astype(np.uint8)


def test_crf_is_the_direct_evaluation():
    probabilities, image = scene()
    found = dense_crf(probabilities, image, CRF(kernel="exact"))
    # Exponents up to a thousand in float32 are good to 1e-4.
    np.testing.assert_allclose(found, crf_directly(probabilities, image), atol=2e-3)
    truth = np.zeros(image.shape[:2], bool)
    truth[5:15, 6:17] = True
    right = lambda p: ((np.asarray(p).argmax(0) == 1) == truth).mean()  # noqa: E731
    assert right(found) > right(probabilities) + 0.03


def test_crf_blocks_change_nothing(monkeypatch):
    random = np.random.default_rng(0)
    targets, sources, values = (
        jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((33, 5), (20, 5), (20, 3))
    )
    whole = _kernel_product(targets, sources, values, "highest")
    monkeypatch.setattr("jaxzs.patch.crf._BLOCK_ELEMENTS", 100)  # 5 rows at a time, the last 3
    np.testing.assert_allclose(_kernel_product(targets, sources, values, "highest"), whole, rtol=1e-5)


def test_crf_strided_is_close():
    probabilities, image = scene()
    exact, strided = (dense_crf(probabilities, image, CRF(kernel="exact", stride=stride)) for stride in (1, 2))
    assert (exact.argmax(0) == strided.argmax(0)).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["exact", "lattice"])
def test_crf_has_a_gradient(kernel):
    probabilities, image = scene(6, 7)
    settings = CRF(iterations=2, kernel=kernel)
    slope = jax.grad(lambda p: dense_crf(p, image, settings)[1].sum())(jnp.asarray(probabilities))
    step = np.zeros_like(probabilities)
    step[1, 3, 3] = 1e-3
    difference = (
        dense_crf(probabilities + step, image, settings)[1].sum()
        - dense_crf(probabilities - step, image, settings)[1].sum()
    ) / 2e-3
    assert float(slope[1, 3, 3]) == pytest.approx(float(difference), rel=0.02)


def test_crf_rejects_what_does_not_fit():
    with pytest.raises(ImageError, match="same height and width"):
        dense_crf(np.ones((2, 3, 4), np.float32), np.zeros((4, 3, 3), np.uint8))
    with pytest.raises(DataError, match=r"stride is .*whole number of at least 1"):
        dense_crf(np.ones((2, 3, 4), np.float32), np.zeros((3, 4, 3), np.uint8), CRF(stride=0))


def test_wrapped_colours():
    white = clip_es_colours(np.full((1, 1, 3), 255, np.uint8))
    assert white.tolist() == [[[150, 138, 132]]]
    assert clip_es_colours(np.zeros((1, 1, 3), np.uint8)).tolist() == [[[152, 140, 134]]]
