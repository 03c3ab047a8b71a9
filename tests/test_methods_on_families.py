"""Prompts, tags and dense maps on towers that are not CLIP's: right, or refused by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import _read, assert_near, images_of, reference

from jaxzs import clip, patch, prompt
from jaxzs.errors import ConfigError, JaxzsError, TextError


def siglip():
    (params, config), ref = _read("hf_siglip"), reference("hf_siglip")
    return params, config, ref


def padded(rows: list[list[int]], length: int, end: int = 1) -> np.ndarray:
    return np.array([row + [end] * (length - len(row)) for row in rows], np.int32)


@pytest.mark.parametrize("share_context", [True, False])
def test_a_textual_prompt_of_words_is_those_words(share_context):
    """In both directions and at the fixed length: every place sees the prompt, and the padding counts."""
    params, config, _ = siglip()
    names, words, length = [[7, 8, 9], [12]], [5, 6], config.text.max_position_embeddings
    table = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    ids = prompt.placeholder_ids(padded(names, length), 2, config.text)
    assert ids.shape == (2, length)
    modality = prompt.TextPrompt(length=2, share_context=share_context)
    prefix = jnp.asarray(table[np.array(words)], jnp.float32)
    found = prompt.text_features(params, prefix, ids, config, modality=modality)
    expected = clip.encode_text(params, padded([words + name for name in names], length), config)
    np.testing.assert_array_equal(found, expected)


def test_a_prompt_without_room_is_refused():
    _, config, _ = siglip()
    ids = padded([[7] * (config.text.max_position_embeddings - 2)], config.text.max_position_embeddings)
    assert prompt.placeholder_ids(ids, 1, config.text).shape == ids.shape  # one end stays
    with pytest.raises(TextError, match=r"class 0 leaves room for 1 of 16 tokens, and the prompt has 2"):
        prompt.placeholder_ids(ids, 2, config.text)


def test_a_visual_prompt_changes_the_patches_and_is_not_pooled():
    params, config, _ = siglip()
    pixels = images_of("hf_siglip")
    plain = clip.encode_image(params, pixels, config)
    none = prompt.image_features(params, jnp.zeros((0, config.vit.hidden_size)), pixels, config)
    np.testing.assert_array_equal(none, plain)
    prefix = jax.random.normal(jax.random.key(0), (3, config.vit.hidden_size))
    found = prompt.image_features(params, prefix, pixels, config)
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()
    turned = prompt.image_features(params, prefix[::-1], pixels, config)
    np.testing.assert_allclose(turned, found, atol=2e-6 * np.abs(found).max())  # sums in another order
    # The MAP head reads patches alone: with no block that mixes tokens the prompt is not seen at all.
    alone = clip.model.pool_image(
        params["vision_model"], jnp.ones((1, 19, config.vit.hidden_size)).at[:, :3].set(9.0), config.vit, prefix=3
    )
    same = clip.model.pool_image(params["vision_model"], jnp.ones((1, 16, config.vit.hidden_size)), config.vit)
    np.testing.assert_allclose(alone, same, rtol=1e-6)


def test_dense_features_of_siglip_come_through_its_head():
    """With the attention it was trained with they are what the head makes of each patch as its only key."""
    params, config, ref = siglip()
    pixels = images_of("hf_siglip")
    with jax.default_matmul_precision("highest"):
        ordinary = patch.dense_features(params, pixels, config, attention="ordinary")
    assert_near(ordinary, ref["local_map"])
    near = patch.dense_features(params, pixels, config)
    assert near.shape == ordinary.shape
    assert np.isfinite(near).all()


@pytest.mark.parametrize("name", ["hf_siglip", "clipa", "rn_quickgelu", "hf_siglip2_naflex"])
def test_tags_of_other_towers_are_refused_by_name(name):
    params, config = _read(name)
    text = np.eye(3, config.projection_dim, dtype=np.float32)
    with pytest.raises(ConfigError, match=r"class token|ResNet|NaFlex"):
        patch.tag(params, images_of(name), text, config, num_foreground=3)


@pytest.mark.parametrize("name", ["rn_quickgelu", "hf_siglip2_naflex"])
def test_what_needs_pixels_and_tokens_is_refused_by_name(name):
    params, config = _read(name)
    images = images_of(name)
    for call in (
        lambda: patch.dense_features(params, images, config),
        lambda: patch.local_tower(params, images, config, patch.full_grid(1, 2, 2)),
        lambda: prompt.image_features(params, jnp.zeros((1, 8)), images, config),
        lambda: prompt.VisualPrompt().constant_images(params, images, config),
    ):
        with pytest.raises(JaxzsError):
            call()
