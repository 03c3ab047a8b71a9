"""Prompts, tags and dense maps on towers that are not CLIP's: right, or refused by name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import _read, assert_near, images_of, reference

from jaxzs import clip, patch, prompt
from jaxzs.errors import ConfigError, JaxzsError, TextError
from jaxzs.patch.reidentify import region_tokens

POOLED = ["hf_siglip", "clipa"]  # a MAP head; a mean of the patches
SLOW = pytest.mark.slow


def siglip():
    (params, config), ref = _read("hf_siglip"), reference("hf_siglip")
    return params, config, ref


def padded(rows: list[list[int]], length: int, end: int = 1) -> np.ndarray:
    return np.array([row + [end] * (length - len(row)) for row in rows], np.int32)


@pytest.mark.parametrize("share_context", [True, False])
@pytest.mark.parametrize("name", ["hf_siglip", "clipa"])
def test_a_textual_prompt_of_words_is_those_words(name, share_context):
    """In both directions and at the fixed length: every place sees the prompt, and the padding counts."""
    params, config = _read(name)
    names, words, length = [[7, 8, 9], [12]], [5, 6], config.text.max_position_embeddings
    table = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    ids = prompt.placeholder_ids(padded(names, length), 2, config.text)
    assert ids.shape == (2, length)
    modality = prompt.TextPrompt(length=2, share_context=share_context)
    prefix = jnp.asarray(table[np.array(words)], jnp.float32)
    found = prompt.text_features(params, prefix, ids, config, modality=modality)
    expected = clip.encode_text(params, padded([words + name for name in names], length), config)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["worldwide_eos", "rn_quickgelu"])
def test_a_textual_prompt_of_causal_towers_follows_the_start_token(name):
    """Whatever ends a text: the first end token with higher ids about it (MetaCLIP 2), or the highest (a ResNet's)."""
    params, config = _read(name)
    start, end, words = config.text.bos_token_id, config.text.eos_token_id, [5, 6]
    rows = np.array([[start, 7, 8, 9, end], [start, 12, end, end, end]], np.int32)
    ids = prompt.placeholder_ids(rows, 2, config.text)
    prefix = jnp.asarray(
        params["text_model"]["embeddings"]["token_embedding"]["embedding"][np.array(words)], jnp.float32
    )
    with jax.default_matmul_precision("highest"):
        found = prompt.text_features(params, prefix, ids, config)
        whole = np.concatenate([rows[:, :1], np.tile(words, (2, 1)), rows[:, 1:]], axis=1).astype(np.int32)
        assert_near(found, np.asarray(clip.encode_text(params, whole, config)))


def test_a_prompt_without_room_is_refused():
    _, config, _ = siglip()
    ids = padded([[7] * (config.text.max_position_embeddings - 2)], config.text.max_position_embeddings)
    assert prompt.placeholder_ids(ids, 1, config.text).shape == ids.shape  # one end stays
    with pytest.raises(TextError, match=r"class 0 leaves room for 1 of 16 tokens, and the prompt has 2"):
        prompt.placeholder_ids(ids, 2, config.text)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLED)
def test_a_visual_prompt_changes_the_patches_and_is_not_pooled(name):
    params, config = _read(name)
    pixels, first = images_of(name), int(config.vit.class_token)
    plain = clip.encode_image(params, pixels, config)
    none = prompt.image_features(params, jnp.zeros((0, config.vit.hidden_size)), pixels, config)
    np.testing.assert_array_equal(none, plain)
    prefix = jax.random.normal(jax.random.key(0), (3, config.vit.hidden_size))
    found = prompt.image_features(params, prefix, pixels, config)
    assert np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()
    turned = prompt.image_features(params, prefix[::-1], pixels, config)
    np.testing.assert_allclose(turned, found, atol=2e-6 * np.abs(found).max())  # sums in another order
    # Mean and head read patches alone: with no block that mixes tokens the prompt is not seen at all.
    tokens = jax.random.normal(jax.random.key(1), (1, first + 16, config.vit.hidden_size))
    prompted = jnp.concatenate([tokens[:, :first], jnp.full((1, 3, tokens.shape[2]), 9.0), tokens[:, first:]], axis=1)
    alone = clip.model.pool_image(params["vision_model"], prompted, config.vit, prefix=3)
    same = clip.model.pool_image(params["vision_model"], tokens, config.vit)
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


TEXTS = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)


def texts_of(config) -> np.ndarray:
    return TEXTS[:, : config.projection_dim]


@pytest.mark.parametrize("name", ["hf_siglip", *(pytest.param(name, marks=SLOW) for name in ("clipa", "vit_gelu"))])
def test_local_mode_keeps_what_is_at_each_place(name):
    """Tokens are those of the value path, by other code (MaskCLIP's, with residual and MLP); scores their softmax."""
    (params, config), pixels = _read(name), images_of(name)
    with jax.default_matmul_precision("highest"):
        grid = patch.full_grid(len(pixels), *config.vit.grid)
        local = jax.jit(patch.local_tower, static_argnames="config")(params, pixels, config=config, grid=grid)
        values = patch.dense_features(params, pixels, config, attention="v", reduced=False)  # [B,P,E]
    first = int(config.vit.class_token)
    assert_near(local.tokens[:, first:], values)
    coarse = patch.coarse_scores(local.tokens, texts_of(config), params["logit_scale"], first)
    cosine = np.einsum(
        "bpe,ce->bpc", *(x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (values, texts_of(config)))
    )
    np.testing.assert_allclose(coarse, jax.nn.softmax(jnp.exp(params["logit_scale"]) * cosine), atol=1e-4)
    between = patch.fuse_attention(local.attention, grid.patches, layers=(0,), votes=1)
    assert between.shape == (len(pixels), 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLED)
def test_a_second_look_reads_the_region_alone(name):
    """All patches: the image's feature. One patch: what the pooling makes of it as all there is, by other code."""
    (params, config), pixels = _read(name), images_of(name)
    with jax.default_matmul_precision("highest"):
        whole = region_tokens(params, pixels, jnp.ones((len(pixels), 16), bool), config)
        one = region_tokens(params, jnp.tile(pixels[:1], (16, 1, 1, 1)), jnp.eye(16, dtype=bool), config)
        alone = patch.dense_features(params, pixels[:1], config, attention="ordinary")[0]
        assert_near(whole, clip.encode_image(params, pixels, config))
    assert_near(one, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLED)
def test_tags_of_other_towers(name):
    """Scores and tags; and the same for an image in the corner of a larger grid, whose padding holds anything."""
    (params, config), pixels = _read(name), images_of(name)[:2]
    with jax.default_matmul_precision("highest"):
        plain = patch.tag(params, pixels, texts_of(config), config, num_foreground=4)
        wide = np.full((2, 48, 40, 3), 7.0, np.float32)
        wide[:, :32, :32], mask = pixels, np.zeros((2, 6, 5), bool)
        mask[:, :4, :4] = True
        padded = patch.tag(params, wide, texts_of(config), config, num_foreground=4, mask=mask)
    assert plain.tags.any(1).all()
    assert plain.reidentified.any()
    np.testing.assert_allclose(padded.scores, plain.scores, rtol=2e-4)  # softmax of 100 times a cosine's rounding
    np.testing.assert_array_equal(padded.tags, plain.tags)
    np.testing.assert_allclose(
        padded.coarse.reshape(2, 6, 5, -1)[:, :4, :4].reshape(2, 16, -1), plain.coarse, rtol=2e-4, atol=1e-6
    )


@pytest.mark.slow
def test_activation_maps_of_a_mean():
    """CLIPA's own reading is a mean of patches: the maps of its tags, by the gradient, are not flat."""
    params, config = _read("clipa")
    text = texts_of(config)
    found = patch.segment(params, images_of("clipa"), text[:3], text[3:], np.array([[0, 1], [2, -1], [1, -1]]), config)
    assert found.maps.shape == (3, 2, 4, 4)
    np.testing.assert_allclose(found.probability.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.activation.max((2, 3)), [[1, 1], [1, 0], [1, 0]], atol=1e-5)


def model_of(name: str) -> clip.Model:
    """A model that takes photos: no tokenizer is asked for."""
    params, config = _read(name)
    preprocessor = clip.ImagePreprocessor(size=config.vision.image_size, crop_size=(config.vision.image_size,) * 2)
    return clip.Model(params, config, None, preprocessor, name, {})  # type: ignore[arg-type]


def test_dense_features_of_a_resnet_are_its_attention_pool_place_by_place():
    """MaskCLIP's reading, in a model's own size and any other, and what is made of it."""
    (params, config), ref = _read("rn_quickgelu"), reference("rn_quickgelu")
    with jax.default_matmul_precision("highest"):
        assert_near(patch.dense_features(params, images_of("rn_quickgelu"), config), ref["dense_no_positions"])
        wide = jnp.tile(images_of("rn_quickgelu"), (1, 1, 2, 1))
        assert patch.dense_features(params, wide, config, attention="v").shape == (3, 2 * 4, config.projection_dim)
    scores = patch.dense_scores(params, images_of("rn_quickgelu"), texts_of(config), config)
    assert scores.shape == (3, 4, 5)
    with pytest.raises(ConfigError, match="attention is 'naclip'; the image tower is a ResNet"):
        patch.dense_features(params, wide, config, attention="naclip")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rn_quickgelu", *POOLED])
def test_masks_without_tags_and_learned_tags(name):
    """From photos to labels, and to tags by what their patches taught."""
    model = model_of(name)
    photos = list(np.random.default_rng(0).integers(0, 256, (3, 80, 100, 3), np.uint8))
    masks = list(patch.segment_dense(model, photos, texts_of(model.config), patch.Dense(short_side=96)))
    assert [mask.labels.shape for mask in masks] == [(80, 100)] * 3
    batches = list(patch.encoded_patches(model, photos))
    classifier = patch.learn_patch_classifier(
        [batch.patches[:3] for batch in batches], texts_of(model.config), per_class=4
    )
    found = list(patch.tag_images_with(classifier, batches, model.config.vision.grid, num_foreground=4))
    assert [tagged.tags.any() for tagged in found] == [True] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("rn_quickgelu", "a ResNet, which has no tokens that attend"), ("hf_siglip2_naflex", "NaFlex")],
)
def test_tags_without_attention_between_patches_are_refused_by_name(name, message):
    model, photos = model_of(name), [np.zeros((64, 64, 3), np.uint8)]
    params, config, text = model.params, model.config, texts_of(model.config)
    with pytest.raises(ConfigError, match=message):
        patch.tag(params, images_of(name), text, config, num_foreground=3)
    with pytest.raises(ConfigError, match=message):
        list(patch.tag_images(model, photos, text, num_foreground=3))


@pytest.mark.parametrize(
    ("name", "message"),
    [("rn_quickgelu", "a ResNet"), ("hf_siglip2_naflex", "NaFlex"), ("hf_siglip", "through a MAP head")],
)
def test_activation_maps_of_other_towers_are_refused_by_name(name, message):
    model, photos = model_of(name), [np.zeros((64, 64, 3), np.uint8)]
    text = texts_of(model.config)
    with pytest.raises(ConfigError, match=message):
        patch.segment(model.params, images_of(name), text[:3], text[3:], np.zeros((3, 1), int), model.config)
    with pytest.raises(ConfigError, match=message):
        list(patch.segment_images(model, photos, {0: [0]}, text[:3], text[3:]))


def test_dense_features_of_naflex_are_refused():
    params, config = _read("hf_siglip2_naflex")
    with pytest.raises(ConfigError, match="NaFlex"):
        patch.dense_features(params, images_of("hf_siglip2_naflex"), config)
    for use in (patch.encoded_patches, functools.partial(patch.segment_dense, text_features=texts_of(config))):
        with pytest.raises(ConfigError, match="NaFlex"):
            next(iter(use(model_of("hf_siglip2_naflex"), [np.zeros((64, 64, 3), np.uint8)])))


@pytest.mark.parametrize("name", ["rn_quickgelu", "hf_siglip2_naflex"])
def test_what_needs_pixels_and_tokens_is_refused_by_name(name):
    params, config = _read(name)
    images = images_of(name)
    for call in (
        lambda: patch.local_tower(params, images, config, patch.full_grid(1, 2, 2)),
        lambda: prompt.image_features(params, jnp.zeros((1, 8)), images, config),
        lambda: prompt.VisualPrompt().constant_images(params, images, config),
    ):
        with pytest.raises(JaxzsError):
            call()
