"""The numerical functions of patch classification on the edges of their input: finite, or a named error."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patch_golden import CONFIG, TEXTS, F, params, pixels

from jaxzs.errors import JaxzsError
from jaxzs.patch import (
    CRF,
    Tagging,
    affinity,
    attention_votes,
    coarse_scores,
    decide,
    dense_crf,
    dense_scores,
    dual_masking,
    find_candidates,
    full_grid,
    fuse_attention,
    fuse_scores,
    grid_from_mask,
    learn_patch_classifier,
    segment,
    tag,
    tag_with,
)
from jaxzs.patch.boxes import min_max

IMAGES = pixels(2, 3, 4)
GRID = full_grid(2, 3, 4)


def all_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))


WRONG = {
    "NaN": lambda x: np.where(np.arange(x.shape[-1]) == 1, np.nan, x).astype(np.float32),
    "infinite": lambda x: np.where(np.arange(x.shape[-1]) == 1, np.inf, x).astype(np.float32),
    "whole numbers": lambda x: x.astype(np.int32),
    "complex": lambda x: x.astype(np.complex64),
    "empty": lambda x: x[:0],
    "flat": lambda x: x.reshape(-1),
}
CALLS = {
    "tag, pixels": lambda f: tag(params(), f(IMAGES), TEXTS, CONFIG, num_foreground=F),
    "tag, texts": lambda f: tag(params(), IMAGES, f(TEXTS), CONFIG, num_foreground=F),
    "segment, pixels": lambda f: segment(params(), f(IMAGES), TEXTS, TEXTS, np.zeros((2, 1), int), CONFIG),
    "segment, texts": lambda f: segment(params(), IMAGES, f(TEXTS), TEXTS, np.zeros((2, 1), int), CONFIG),
    "segment, background": lambda f: segment(params(), IMAGES, TEXTS, f(TEXTS), np.zeros((2, 1), int), CONFIG),
    "dense_scores, pixels": lambda f: dense_scores(params(), f(IMAGES), TEXTS, CONFIG),
    "dense_scores, texts": lambda f: dense_scores(params(), IMAGES, f(TEXTS), CONFIG),
    "learn, patches": lambda f: learn_patch_classifier(f(np.ones((2, 3, 4), np.float32)), np.eye(4, dtype=np.float32)),
    "learn, texts": lambda f: learn_patch_classifier(np.ones((2, 3, 4), np.float32), f(np.eye(4, dtype=np.float32))),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_wrong_arrays_are_named(call, wrong):
    with pytest.raises(JaxzsError):
        CALLS[call](WRONG[wrong])


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts", [TEXTS * 1e-20, TEXTS * 1e15, np.repeat(TEXTS[:1], 7, 0), -TEXTS, TEXTS.astype(np.float16)],
    ids=["tiny", "huge", "equal", "opposite", "half"],
)  # fmt: skip
def test_odd_texts_are_finite(texts):
    found = tag(params(), IMAGES, texts, CONFIG, num_foreground=F)
    assert all_finite(found)
    assert found.tags.any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e4])
def test_odd_pixels_are_finite(level):
    found = tag(params(), np.full_like(IMAGES, level), TEXTS, CONFIG, num_foreground=F)
    assert all_finite(found)


@pytest.mark.parametrize(
    "settings", [{"relative_threshold": 0.0}, {"relative_threshold": 1.0}, {"votes": 1}, {"votes": 2}]
)
def test_ends_of_ranges_are_finite(settings):
    found = tag(params(), IMAGES, TEXTS, CONFIG, Tagging(**settings), num_foreground=F)
    assert all_finite(found)
    assert found.tags.any(1).all()


@pytest.mark.slow
def test_images_of_padding():
    """All masked, one masked: the others are as they were, nothing is not a number, inside a trace too."""
    mask = np.zeros((2, 3, 4), bool)
    mask[0] = True
    run = jax.jit(functools.partial(tag, config=CONFIG, num_foreground=F))
    found = run(params(), np.where(mask.repeat(8, 1).repeat(8, 2)[..., None], IMAGES, np.nan), TEXTS, mask=mask)
    assert all_finite(found)
    assert not found.tags[1].any()
    assert all_finite(run(params(), IMAGES, TEXTS, mask=np.zeros_like(mask)))


def uniform(value: float = 1 / 13) -> jax.Array:
    return jnp.full((2, 13, 13), value, jnp.float32)


@pytest.mark.parametrize("scores", [0.0, 1.0, 1e-38, 3e38])
def test_constant_scores(scores):
    """Nothing stands out: no box, no candidate that is not one, no division by 0."""
    coarse = jnp.full((2, 12, 3), scores, jnp.float32)
    assert not np.asarray(min_max(coarse, GRID.patches)).any()
    refined = jax.jit(dual_masking)(uniform()[:, 1:, 1:], coarse, GRID)
    assert all_finite(refined)
    found = jax.jit(find_candidates, static_argnums=1)(coarse, 2, 0.5, GRID)
    assert not found.chosen.any()
    tags, threshold = decide(coarse[:, 0, :2], jnp.full(2, 0.5), GRID)
    assert tags.sum() == 2
    assert np.isfinite(threshold).all()


@pytest.mark.parametrize("value", [0.0, 1 / 13, 1.0])
def test_constant_attention(value):
    weights = (uniform(value),) * 2
    assert all_finite(affinity(weights, GRID, (0, 1)))
    assert all_finite(fuse_attention(weights, GRID.patches, (0, 1), 1, renormalize=True))
    assert attention_votes(weights, GRID.patches).max() == 0  # none is above the mean
    nothing = grid_from_mask(jnp.zeros((2, 3, 4), bool))
    assert not np.asarray(affinity(weights, nothing, (0,))).any()
    assert not np.asarray(attention_votes(weights, nothing.patches)).any()


def test_zero_tokens():
    """Cosines with nothing are 0: every class is as likely."""
    found = coarse_scores(jnp.zeros((1, 3, 16)), jnp.asarray(TEXTS), jnp.float32(4.0))
    np.testing.assert_allclose(found, 1 / len(TEXTS), rtol=1e-6)


def test_fused_scores_ignore_what_was_not_looked_at():
    best, nothing = jnp.array([[0.4, 0.2]]), jnp.array([[jnp.nan, 0.6]])
    np.testing.assert_allclose(fuse_scores(best, nothing, jnp.array([[False, True]])), [[0.4, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("kernel", ["lattice", "exact"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-38])
def test_certain_and_impossible_pixels(kernel, value):
    probabilities = np.full((2, 4, 5), value, np.float32)
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    for weight in (0.0, 1e3):
        found = dense_crf(probabilities, image, CRF(kernel=kernel, bilateral_weight=weight, iterations=3))
        assert np.isfinite(found).all()


@pytest.mark.slow
def test_learned_scores_of_nothing():
    classifier = learn_patch_classifier(np.ones((1, 2, 4), np.float32), np.eye(4, dtype=np.float32))
    assert np.isfinite(tag_with(classifier, np.zeros((1, 2, 4), np.float32), np.zeros((1, 4), np.float32))).all()
    with pytest.raises(JaxzsError):
        tag_with(classifier, np.full((1, 2, 4), np.nan, np.float32), np.zeros((1, 4), np.float32))
    with pytest.raises(JaxzsError):
        tag_with(classifier, np.zeros((1, 2, 5), np.float32), np.zeros((1, 4), np.float32))
    with pytest.raises(JaxzsError):
        tag_with(classifier, np.zeros((1, 2, 4), np.float32), np.zeros((1, 4), np.float32), global_share=2.0)
