"""Every step of patch classification against the reference outputs of the original implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patch_golden import CASES, MEAN, STD, assert_close, case, checkpoint, grid_of, pixels_of, settings, unit

from jaxzs.patch import (
    Tagging,
    attention_votes,
    coarse_scores,
    dual_masking,
    find_candidates,
    full_grid,
    fuse_attention,
    fuse_scores,
    local_tower,
    reidentify,
    tag,
)
from jaxzs.patch.boxes import above_threshold, component_reach, min_max, union_of_boxes
from jaxzs.patch.reidentify import best_scores, crop_pixels, crop_region, region_tokens
from jaxzs.patch.tower import local_positions


@functools.cache
def local(name: str):
    expected = case(name)
    params, config = checkpoint()
    run = jax.jit(functools.partial(local_tower, config=config, half_positions=True))
    return run(params, jnp.asarray(pixels_of(expected)), grid=grid_of(expected))


def attention_of(name: str):
    expected = case(name)
    return fuse_attention(local(name).attention, grid_of(expected).patches, settings(expected)["layers"], 4)


@pytest.mark.parametrize("name", CASES)
def test_pixels(name):
    expected = case(name)
    pixels = pixels_of(expected)[0].transpose(2, 0, 1)[:, ::8, ::8]
    np.testing.assert_allclose(pixels, expected["pixel_values_sub"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_positions(name):
    params, config = checkpoint()
    expected = case(name)
    table = local_positions(params["vision_model"], config.vision, grid_of(expected), "half")
    # Where the float32 value lies halfway between two halves, its last bit decides: one half's spacing apart.
    different = np.asarray(table[0]) != expected["pos_embed_used"]
    assert different.mean() < 2e-4
    np.testing.assert_allclose(table[0], expected["pos_embed_used"], rtol=2.0**-10)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", CASES)
def test_local_mode(name):
    assert_close(local(name).tokens[0], case(name)["tokens_embed"])


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    expected, attention = case(name), local(name).attention
    assert_close(np.stack([a[0, ::24] for a in attention]), expected["attn_rows"])
    means = np.stack([a[0, 1:, 1:].mean() for a in attention])
    np.testing.assert_allclose(means, expected["attn_layer_mean"], rtol=2e-5)
    votes = attention_votes(attention, grid_of(expected).patches)[0]
    different = np.asarray(votes) != expected["attn_votes"]
    # An entry that equals its layer's mean up to rounding may be counted or not; none decides anything.
    assert different.mean() < 1e-4
    np.testing.assert_array_equal(votes >= 4, expected["attn_votes"] >= 4)
    assert_close(attention_of(name)[0], expected["attn_fused"])


@pytest.mark.parametrize("name", CASES)
def test_coarse_scores(name):
    expected, (params, _) = case(name), checkpoint()
    np.testing.assert_allclose(np.exp(params["logit_scale"]), expected["logit_scale_exp"], rtol=1e-6)
    scores = coarse_scores(local(name).tokens, expected["text_features"], params["logit_scale"])
    assert_close(scores[0], expected["scores_coarse"])


@pytest.mark.parametrize("name", CASES)
def test_dual_masking(name):
    expected, (params, _) = case(name), checkpoint()
    coarse = coarse_scores(local(name).tokens, expected["text_features"], params["logit_scale"])
    refined = jax.jit(dual_masking)(attention_of(name), coarse, grid_of(expected))
    assert_close(refined.spread[0], expected["scores_attn"])
    np.testing.assert_array_equal(refined.box_mask[0], expected["dmar_box_mask"])
    assert_close(refined.scores[0], expected["dmar_scores"])
    best = best_scores(refined.scores, int(expected["num_classes"]), grid_of(expected))
    assert_close(best[0], expected["dmar_max"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_component_boxes(name):
    expected, grid = case(name), grid_of(case(name))
    spread = jnp.asarray(expected["scores_attn"])[None]
    relative = min_max(spread, grid.patches)
    maps = relative[0].T.reshape(-1, *grid.shape)
    foreground = above_threshold(maps, maps.mean((1, 2)))
    (top, bottom), (left, right) = (component_reach(foreground, axis) for axis in (-2, -1))
    rows, columns = grid.shape
    found = set()
    for label, row, column in np.argwhere(foreground):
        pixel = label, row, column
        box = (top[pixel], min(bottom[pixel] + 1, rows - 1), left[pixel], min(right[pixel] + 1, columns - 1))
        found.add((int(label), *(int(side) for side in box)))
    # Boxes of components nested in the holes of others are not listed by the original.
    reference = {tuple(int(side) for side in box) for box in expected["dmar_boxes"]}
    assert reference <= found

    def holds(outer, inner):
        (c, y0, y1, x0, x1), (other, v0, v1, u0, u1) = outer, inner
        return c == other and y0 <= v0 and v1 <= y1 and x0 <= u0 and u1 <= x1

    assert all(any(holds(box, inner) for box in reference) for inner in found - reference)


def candidates_of(name: str):
    expected = case(name)
    return find_candidates(
        jnp.asarray(expected["dmar_scores"])[None],
        int(expected["num_classes"]),
        settings(expected)["relative_threshold"],
        grid_of(expected),
        stop_at_empty=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_candidates(name):
    expected, found = case(name), candidates_of(name)
    np.testing.assert_allclose(found.threshold[0], expected["cwr_threshold"], rtol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(found.chosen[0]), expected["cwr_candidates"])
    done = np.flatnonzero(found.accepted[0])
    assert len(done) == int(expected["cwr_done"])
    np.testing.assert_array_equal(found.boxes[0, done], expected["cwr_boxes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_second_look(name):
    params, config = checkpoint()
    expected, found = case(name), candidates_of(name)
    pixels = jnp.asarray(pixels_of(expected))
    done = np.flatnonzero(found.accepted[0])
    crops = jnp.stack([crop_pixels(pixels, 0, found.boxes[0, c], 16, 224) for c in done])
    regions = jnp.stack([crop_region(found.region[0, c], found.boxes[0, c], (14, 14)) for c in done])
    np.testing.assert_array_equal(regions, expected["cwr_region"])
    tokens = jax.jit(functools.partial(region_tokens, config=config))(params, crops, regions)
    assert_close(tokens, expected["cwr_cls_embed"])
    probability = reidentify(params, pixels, jnp.asarray(expected["text_features"]), found, config, capacity=2)
    assert_close(probability[0, done], expected["cwr_prob"])


@pytest.mark.parametrize("name", CASES)
def test_tags(name):
    params, config = checkpoint()
    expected = case(name)
    options = settings(expected)
    tags = tag(
        params,
        pixels_of(expected),
        expected["text_features"],
        config,
        Tagging(
            attention_layers=options["layers"], relative_threshold=options["relative_threshold"], exact=True, capacity=2
        ),
        num_foreground=int(expected["num_classes"]),
    )
    assert_close(tags.coarse[0], expected["scores_coarse"])
    assert_close(tags.refined[0], expected["dmar_scores"])
    np.testing.assert_array_equal(np.flatnonzero(tags.reidentified[0]), expected["cwr_candidates"])
    assert_close(tags.scores[0], expected["final_scores"])
    np.testing.assert_allclose(tags.threshold[0, 0], expected["tag_threshold"], rtol=2e-5)
    np.testing.assert_array_equal(tags.tags[0], expected["tags"])


@pytest.mark.parametrize(("key", "grid"), [("pos_10x17", (10, 17)), ("pos_14x14", (14, 14))])
def test_interpolated_positions(key, grid):
    _, config = checkpoint()
    tree = {"embeddings": {"position_embedding": {"embedding": jnp.asarray(unit()["pos_in"])}}}
    table = local_positions(tree, config.vision, full_grid(1, *grid))[0]
    # The clean table; its rounding is the original's, but for the native grid, which tagging never rounds.
    np.testing.assert_array_equal(np.asarray(table).astype(np.float16).astype(np.float32), unit()[key])


def test_box_mask():
    maps = jnp.asarray(unit()["box_map"], jnp.float32)
    foreground = above_threshold(maps, jnp.asarray(unit()["box_thr"]))
    mask = union_of_boxes(foreground[:, None], full_grid(24, 7, 9))[:, 0]
    np.testing.assert_array_equal(mask, unit()["box_mask"])


@pytest.mark.slow
def test_dual_masking_alone():
    grid = full_grid(1, *(int(side) for side in unit()["dmar_grid"]))
    attention, coarse = (jnp.asarray(unit()[key])[None] for key in ("dmar_attn", "dmar_coarse"))
    assert_close(dual_masking(attention, coarse, grid).scores[0], unit()["dmar_out"])


@pytest.mark.slow
@pytest.mark.parametrize(("logits", "out"), [("cwr_logits", "cwr_abort_out"), ("cwr_logits2", "cwr_out2")])
def test_empty_box_ends_the_loop(logits, out):
    params, config = checkpoint()
    data = unit()
    pixels = ((data["cwr_image_u8"].astype(np.float32) / 255 - MEAN) / STD)[None]
    grid, refined, F = full_grid(1, 6, 8), jnp.asarray(data[logits])[None], 4
    found = find_candidates(refined, F, 0.5, grid, stop_at_empty=True)
    text = jnp.asarray(data["cwr_text"])
    probability = reidentify(params, jnp.asarray(pixels), text, found, config, capacity=3)
    best = best_scores(refined, F, grid)
    assert_close(fuse_scores(best, probability, found.accepted)[0], data[out])
    if logits == "cwr_logits":
        assert_close(best[0], data["cwr_max"])
        skipping = find_candidates(refined, F, 0.5, grid)
        assert skipping.accepted.sum() > found.accepted.sum()
