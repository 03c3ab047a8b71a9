"""Patch classification as a program: padding, masks, capacity, jit, vmap, many devices, bad input."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from patch_golden import CONFIG, TEXTS, C, F, params, pixels, small

from jaxzs.clip import Numerics
from jaxzs.errors import ConfigError, DataError, ImageError, LabelError
from jaxzs.patch import Tagging, default_attention_layers, default_votes, tag
from jaxzs.patch.tags import Tags

run = functools.partial(tag, config=CONFIG, num_foreground=F)


def assert_same(actual: Tags, expected: Tags) -> None:
    """Values within 2e-5 of the largest, decisions equal: the same numbers, summed in another order."""
    for name, one, other in zip(Tags._fields, actual, expected, strict=True):
        if one.dtype == jnp.float32:
            scale = float(np.abs(other).max())
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.fixture(scope="module")
def tagged() -> Tags:
    return run(params(), pixels(8, 7, 9), TEXTS)


@pytest.mark.slow
def test_something_is_tested(tagged):
    """The random model has second looks, boxes of several sizes, and images with several tags."""
    assert 8 < int(tagged.reidentified.sum()) < 8 * F
    assert len(np.unique(np.asarray(tagged.boxes)[np.asarray(tagged.reidentified)], axis=0)) > 5
    assert (tagged.tags.sum(1) > 1).any()
    np.testing.assert_array_equal(tagged.probability > 0, tagged.reidentified)


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "keep_border"), [(False, True), (True, False)])
def test_padded_equals_unpadded(exact, keep_border):
    grids = [(7, 9), (5, 4), (6, 6)]  # (6, 6) is the native grid
    alone = [pixels(1, *grid, seed=i) for i, grid in enumerate(grids)]
    together = np.full((4, 8 * 8, 8 * 12, 3), 7.0, np.float32)  # neither zero nor harmless
    mask = np.zeros((4, 8, 12), bool)
    for i, (rows, columns) in enumerate(grids):
        together[i, : 8 * rows, : 8 * columns] = alone[i][0]
        mask[i, :rows, :columns] = True
    options = Tagging(exact=exact, keep_border=keep_border, relative_threshold=0.3)
    padded = run(params(), together, TEXTS, settings=options, mask=mask)
    looked = 0
    for i, (rows, columns) in enumerate(grids):
        expected = run(params(), alone[i], TEXTS, settings=options)
        looked += int(expected.reidentified.sum())
        cut = lambda a: a[i : i + 1].reshape(1, 8, 12, C)[:, :rows, :columns].reshape(1, -1, C)  # noqa: B023, E731
        found = jax.tree.map(lambda a: a[i : i + 1], padded)  # noqa: B023
        found = found._replace(coarse=cut(padded.coarse), refined=cut(padded.refined))
        assert_same(found, expected)
    assert looked > 3
    # The last image is padding: nothing, and nothing that is not a number.
    assert not padded.tags[3].any()
    assert not padded.scores[3].any()
    chex.assert_tree_all_finite(padded)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [3, 64])
def test_capacity_changes_nothing(tagged, capacity):
    assert int(tagged.reidentified.sum()) % 3, "a last call that is not full"
    assert_same(run(params(), pixels(8, 7, 9), TEXTS, settings=Tagging(capacity=capacity)), tagged)


@pytest.mark.slow
def test_compiled_once_for_all_numbers():
    traced = jax.jit(
        chex.assert_max_traces(
            lambda pixels, texts, threshold: run(
                params(), pixels, texts, settings=Tagging(relative_threshold=threshold)
            ),
            n=1,
        )
    )
    for seed, threshold in enumerate((0.2, 0.5, 0.9)):
        traced(pixels(2, 3, 4, seed), TEXTS + np.float32(seed), threshold)


@pytest.mark.slow
def test_vmap_over_settings():
    images, thresholds = pixels(3, 4, 5), jnp.array([0.2, 0.5, 0.8])
    votes = jnp.array([1, 2, 2])
    at = jax.vmap(lambda settings: run(params(), images, TEXTS, settings=settings))(
        Tagging(relative_threshold=thresholds, votes=votes)
    )
    for i in range(3):
        settings = Tagging(relative_threshold=float(thresholds[i]), votes=int(votes[i]))
        expected = run(params(), images, TEXTS, settings=settings)
        assert_same(jax.tree.map(lambda a: a[i], at), expected)  # noqa: B023
    assert len({int(n) for n in at.tags.sum((1, 2))}) > 1


@pytest.mark.slow
def test_sharded_over_devices(tagged, data_mesh):
    images = jax.device_put(pixels(8, 7, 9), NamedSharding(data_mesh, PartitionSpec("data")))
    found = run(params(), images, TEXTS)
    assert_same(found, tagged)


def test_scale_of_text_features_is_irrelevant(tagged):
    assert_same(run(params(), pixels(8, 7, 9), 17 * TEXTS), tagged)


@pytest.mark.slow
def test_bfloat16_is_close(tagged):
    """Products to 8 bits, magnified by sharp attention and the scale 20: most patches keep their class."""
    found = run(params(), pixels(8, 7, 9), TEXTS, numerics=Numerics(jnp.bfloat16))
    difference = np.abs(found.coarse - tagged.coarse)
    assert 0 < difference.mean() < 0.005
    assert (found.coarse.argmax(-1) == tagged.coarse.argmax(-1)).mean() > 0.95
    assert (found.scores.argmax(1) == tagged.scores.argmax(1)).mean() >= 0.75


def test_thresholds_of_each_class(tagged):
    found = run(params(), pixels(8, 7, 9), TEXTS, settings=Tagging(tag_threshold=np.full(F, 0.5)))
    assert_same(found, tagged)
    thresholds = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    found = run(params(), pixels(8, 7, 9), TEXTS, settings=Tagging(tag_threshold=thresholds))
    np.testing.assert_array_equal(found.reidentified, tagged.reidentified)
    assert found.tags.sum() > tagged.tags.sum()


@pytest.mark.slow
def test_same_scores_everywhere_are_no_nan():
    same = np.repeat(TEXTS[:1], C, axis=0)
    found = run(params(), pixels(2, 4, 4), same)
    chex.assert_tree_all_finite(found)
    assert found.tags.sum(1).min() >= 1
    blank = run(params(), 0 * pixels(2, 4, 4), TEXTS)
    chex.assert_tree_all_finite(blank)


@pytest.mark.slow
def test_renormalized_attention_makes_probabilities():
    found = run(params(), pixels(2, 7, 9), TEXTS, settings=Tagging(renormalize=True, keep_border=True))
    plain = run(params(), pixels(2, 7, 9), TEXTS, settings=Tagging(keep_border=True))
    assert (found.refined.max((1, 2)) > plain.refined.max((1, 2))).all()
    assert float(found.refined.max()) <= 1.0 + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("vision", [{"patch_size": 14, "image_size": 28}, {"num_hidden_layers": 1}])
def test_other_towers(vision):
    config = small(**vision)
    size = config.vision.patch_size
    images = np.random.default_rng(0).normal(size=(2, 3 * size, 4 * size, 3)).astype(np.float32)
    found = tag(params(config), images, TEXTS, config, settings=Tagging(exact=True), num_foreground=F)
    chex.assert_tree_all_finite(found)
    assert found.coarse.shape == (2, 12, C)


def test_defaults_by_depth():
    assert (default_attention_layers(12), default_votes(12)) == ((8, 9, 10), 4)
    assert default_attention_layers(12, "all") == tuple(range(11))
    assert (default_attention_layers(5), default_votes(5)) == ((1, 2, 3), 2)
    assert (default_attention_layers(1), default_votes(1)) == ((0,), 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pixels": pixels(1, 4, 4)[..., :1]}, ImageError, "channels last"),
        ({"pixels": pixels(1, 4, 4).astype(int)}, ImageError, "normalised floats"),
        ({"pixels": pixels(1, 4, 4)[:, :30]}, ImageError, "30x32, expected multiples"),
        ({"pixels": pixels(1, 1, 4)}, ImageError, "1x4 patches of 8; at least 2x2"),
        ({"pixels": pixels(1, 4, 4)[:0]}, ImageError, "at least one image"),
        ({"text_features": TEXTS[:, :8]}, DataError, r"expected \[C,16\]"),
        ({"num_foreground": 0}, LabelError, "expected 1 to 7"),
        ({"num_foreground": 8}, LabelError, "expected 1 to 7"),
        ({"settings": Tagging(attention_layers=[2])}, DataError, "from 0 to 1"),
        ({"settings": Tagging(attention_layers=[])}, DataError, "from 0 to 1"),
        ({"settings": Tagging(tag_threshold=np.zeros(3))}, DataError, r"one number or \[5\]"),
        ({"settings": Tagging(votes=99)}, DataError, "votes is 99, expected 1 to 2"),
        (
            {"pixels": np.where(np.arange(32)[:, None] == 5, np.nan, pixels(1, 4, 4))},
            ImageError,
            "image 0 .* row 0, column 5",
        ),
        ({"text_features": np.full_like(TEXTS, np.inf)}, DataError, "row 0 is not finite"),
        ({"text_features": TEXTS * (np.arange(C)[:, None] != 3)}, DataError, "row 3 is all zeros"),
        ({"text_features": TEXTS.astype(int)}, DataError, "expected floats"),
        ({"mask": np.ones((1, 4, 5), bool)}, ImageError, "one entry a patch"),
        ({"mask": np.eye(4, dtype=bool)[None]}, ImageError, "rectangle"),
        ({"mask": np.arange(4)[None, :, None] < np.ones((1, 1, 4))}, ImageError, "2x2"),
    ],
)
def test_bad_input_is_named(change, error, match):
    arguments = {
        "params": params(), "pixels": pixels(1, 4, 4), "text_features": TEXTS,
        "config": CONFIG, "num_foreground": F,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        tag(**(arguments | change))


@pytest.mark.slow
def test_config_stays_static():
    """Two equal configurations share one compiled program."""
    from jaxzs.patch.tags import tag_program

    tag(params(), pixels(1, 2, 3), TEXTS, CONFIG, num_foreground=F)
    before = tag_program._cache_size()
    tag(params(), pixels(1, 2, 3), TEXTS, dataclasses.replace(CONFIG), num_foreground=F)
    assert tag_program._cache_size() == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"relative_threshold": 50}, "fraction from 0 to 1"),
        ({"relative_threshold": np.nan}, "fraction from 0 to 1"),
        ({"relative_threshold": "0.5"}, "is a text"),
        ({"capacity": 0}, "at least 1"),
        ({"votes": 0}, "votes is 0"),
        ({"votes": -1}, "votes is -1"),
        ({"votes": 1.5}, "whole number"),
    ],
)
def test_settings_are_checked_once(change, match):
    with pytest.raises(DataError, match=match):
        Tagging(**change)


def test_settings_are_pytrees():
    """Numbers are leaves, everything else belongs to the structure, and unflattening placeholders is no error."""
    settings = Tagging(votes=2, attention_layers=[0, 1], exact=True)
    assert jax.tree.leaves(settings) == [2, 0.5]
    assert jax.tree.structure(settings) != jax.tree.structure(Tagging(votes=2, exact=True))
    assert jax.tree.map(lambda _: object(), settings).attention_layers == (0, 1)


@pytest.mark.parametrize("old", [{"votes": 2}, {"exact": True}, {"compute_dtype": jnp.bfloat16}])
def test_old_keywords_name_the_new_spelling(old):
    with pytest.raises(ConfigError, match=r"tag has no argument \w+ any more; write (settings=patch.Tagg|numerics=)"):
        run(params(), pixels(1, 3, 4), TEXTS, **old)


@pytest.mark.slow
def test_padding_may_hold_anything(tagged):
    """What is not looked at may be no number: it changes nothing, and makes nothing else no number."""
    images, mask = np.full((8, 72, 96, 3), np.nan, np.float32), np.zeros((8, 9, 12), bool)
    images[:, :56, :72], mask[:, :7, :9] = pixels(8, 7, 9), True
    found = run(params(), images, TEXTS, mask=mask)
    chex.assert_tree_all_finite(found)
    np.testing.assert_allclose(found.scores, tagged.scores, atol=2e-5)
