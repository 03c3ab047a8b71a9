"""Components and boxes against SciPy, position sampling against torch's rule, crops against direct evaluation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from jaxzs.clip.model import resize_weights
from jaxzs.patch.boxes import component_reach, min_max, tight_boxes, union_of_boxes
from jaxzs.patch.grid import full_grid, grid_from_mask
from jaxzs.patch.refine import dual_masking
from jaxzs.patch.reidentify import crop_pixels, crop_region, nearest_indices


def boxes_by_scipy(foreground: np.ndarray, cut: int = 1) -> np.ndarray:
    rows, columns = foreground.shape
    mask = np.zeros_like(foreground)
    labels, _ = ndimage.label(foreground, np.ones((3, 3)))
    for y, x in ndimage.find_objects(labels):
        mask[y.start : min(y.stop, rows - cut), x.start : min(x.stop, columns - cut)] = True
    return mask


@given(st.integers(0, 10_000), st.floats(0.1, 0.7), st.booleans())
@settings(max_examples=20, deadline=None)
def test_union_of_boxes(seed, density, keep_border):
    foreground = np.random.default_rng(seed).random((2, 3, 9, 11)) < density
    found = union_of_boxes(jnp.asarray(foreground), full_grid(2, 9, 11), keep_border=keep_border)
    cut = 0 if keep_border else 1
    expected = np.array([[boxes_by_scipy(m, cut) for m in image] for image in foreground])
    np.testing.assert_array_equal(found, expected)


def test_snake_is_followed_to_its_end():
    """A component whose pixels are far apart along the path, though near each other on the grid."""
    snake = np.zeros((1, 1, 9, 9), bool)
    snake[0, 0, ::2] = True
    snake[0, 0, 1::4, -1] = True
    snake[0, 0, 3::4, 0] = True
    first, last = component_reach(jnp.asarray(snake), -2)
    assert (np.asarray(first)[snake] == 0).all()
    assert (np.asarray(last)[snake] == 8).all()


def test_boxes_end_at_the_true_grid():
    valid = np.zeros((1, 6, 7), bool)
    valid[0, :4, :5] = True
    grid = grid_from_mask(jnp.asarray(valid))
    assert (int(grid.rows[0]), int(grid.columns[0])) == (4, 5)
    everything = jnp.asarray(valid)[:, None]
    assert union_of_boxes(everything, grid)[0, 0].sum() == 3 * 4
    assert tight_boxes(everything, grid)[0, 0].tolist() == [0, 3, 0, 4]
    assert tight_boxes(everything, grid, keep_border=True)[0, 0].tolist() == [0, 4, 0, 5]
    last_row = everything & (jnp.arange(6) == 3)[None, None, :, None]
    top, bottom, _, _ = tight_boxes(last_row, grid)[0, 0]
    assert top == bottom, "empty: only the last row"
    top, bottom, _, _ = tight_boxes(jnp.zeros_like(everything), grid, keep_border=True)[0, 0]
    assert top == bottom, "empty: nothing at all"


def test_constant_map_is_zero():
    patches = jnp.ones((1, 4), bool)
    np.testing.assert_array_equal(min_max(jnp.full((1, 4, 2), 0.3), patches), np.zeros((1, 4, 2)))


@functools.cache
def min_max_as(kind: str):
    """`min_max` of [B,P,C] scores: op by op, compiled, or image by image."""
    one_by_one = jax.vmap(lambda scores, patches: min_max(scores[None], patches[None])[0])
    return {"eager": min_max, "compiled": jax.jit(min_max), "vmapped": jax.jit(one_by_one)}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager", "compiled", "vmapped"])
@pytest.mark.parametrize("shape", [(3, 2, 1), (1, 9, 30), (2, 2000, 200), (4, 63, 7)])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8)
def test_the_largest_is_one(kind, shape, seed):
    """To the last bit: the grey level of the largest is 255 and not 254, and every value is the true quotient."""
    random = np.random.default_rng(seed)
    scores = (random.random(shape) * random.choice([1e-6, 0.3, 40.0], shape[-1])).astype(np.float32)
    patches = np.arange(shape[1]) < random.integers(2, shape[1] + 1, (shape[0], 1))  # [B,P] some are padding
    found = np.asarray(min_max_as(kind)(jnp.asarray(scores), jnp.asarray(patches)))
    inside = patches[:, :, None]
    shifted = np.where(inside, scores - np.where(inside, scores, np.inf).min(1, keepdims=True), 0).astype(np.float32)
    np.testing.assert_array_equal(found, shifted / shifted.max(1, keepdims=True))
    assert (found.max(1) == 1).all()
    assert (np.asarray(jax.jit(lambda u: (255.0 * u).astype(jnp.int32))(found)).max(1) == 255).all()


@pytest.mark.parametrize("grid", [(3, 5), (5, 17), (3, 17)])
def test_mean_of_dual_masking_is_the_quotient(grid):
    """k of n patches at 1: 255 k / n is a whole number, which the product with 1/n would miss and truncation drop."""
    num = grid[0] * grid[1]
    coarse = (np.arange(num)[:, None] < np.arange(1, num)[None]).astype(np.float32)[None]  # [1,P,C], k ones each
    refined = jax.jit(dual_masking)(jnp.eye(num)[None], jnp.asarray(coarse), full_grid(1, *grid))
    exact = np.trunc(255 * (coarse.sum(1, dtype=np.float32) / np.float32(num)))
    foreground = (255 * coarse) > exact[:, None]
    expected = [boxes_by_scipy(foreground[0, :, c].reshape(grid)).ravel() for c in range(num - 1)]
    np.testing.assert_array_equal(refined.box_mask[0], np.array(expected))


@pytest.mark.parametrize("box", [(0, 6, 0, 8), (1, 3, 2, 7), (4, 5, 7, 8), (0, 6, 3, 4)])
def test_crop_is_the_bilinear_resize(box):
    pixels = np.random.default_rng(0).normal(size=(2, 48, 64, 3)).astype(np.float32)
    top, bottom, left, right = (8 * side for side in box)
    piece = pixels[1, top:bottom, left:right]
    down, across = (resize_weights(n, 40, "bilinear") for n in piece.shape[:2])
    expected = np.einsum("yr,rcd,xc->yxd", down, piece, across)
    crop = jax.jit(crop_pixels, static_argnums=(3, 4))(pixels, 1, jnp.asarray(box), 8, 40)
    # Positions up to 64 in float32 are exact to 4e-6, and neighbours differ by up to 8.
    np.testing.assert_allclose(crop, expected, atol=3e-5)


def test_nearest_neighbours():
    table = nearest_indices(200, 14)
    exact = np.arange(14)[None] * np.arange(201)[:, None] // 14
    odd = np.flatnonzero((table != exact).any(1))
    assert odd.tolist() == [62, 124], "where float32 falls just below the integer"
    region = jnp.asarray(np.random.default_rng(0).random((9, 9)) < 0.5)
    piece = np.asarray(region)[2:7, 1:9]
    expected = piece[np.arange(14) * 5 // 14][:, np.arange(14) * 8 // 14]
    found = crop_region(region, jnp.array([2, 7, 1, 9]), (14, 14)).reshape(14, 14)
    np.testing.assert_array_equal(found, expected)
