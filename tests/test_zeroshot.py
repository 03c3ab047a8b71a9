"""Text proxies, prediction, and loading a checkpoint by name or path."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzs
from jaxzs import clip, zeroshot
from jaxzs.errors import CheckpointError, DataError, LabelError, TextError

NAMES = ("cat", "a long-haired dog", "7")
TEMPLATES = ("a photo of a {}.", "art of the {}.", "{}")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return jaxzs.load(tiny_checkpoint)


@pytest.mark.slow
def test_proxies_follow_the_definition(model):
    """Encode each filled template alone, normalise, average, normalise: written out literally."""
    expected = []
    for name in NAMES:
        features = []
        for template in TEMPLATES:
            ids, _ = model.tokenizer([template.format(name)], pad_to=40)
            feature = np.asarray(clip.encode_text(model.params, ids, model.config))[0]
            features.append(feature / np.linalg.norm(feature))
        mean = np.mean(features, axis=0)
        expected.append(mean / np.linalg.norm(mean))
    proxies = zeroshot.text_proxies(model, NAMES, TEMPLATES)
    # Equal but for the order of sums in batches of another size and length.
    np.testing.assert_allclose(proxies, expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 1000])
def test_batch_size_changes_nothing(model, batch_size):
    proxies = zeroshot.text_proxies(model, NAMES, TEMPLATES, batch_size=batch_size)
    reference = zeroshot.text_proxies(model, NAMES, TEMPLATES)
    np.testing.assert_allclose(proxies, reference, rtol=0, atol=2e-6)


def test_one_program_for_batches_of_one_length(model):
    names = [f"class {letter}" for letter in "abcdefghij"]
    zeroshot.text_proxies(model, names, ["the {}"], batch_size=4)
    compiled = clip.model._encode_text._cache_size()
    zeroshot.text_proxies(model, names[:7], ["the {}"], batch_size=4)
    assert clip.model._encode_text._cache_size() == compiled


def test_image_features_by_batches(model):
    pixels = np.random.default_rng(0).standard_normal((7, 32, 32, 3)).astype(np.float32)
    features = zeroshot.image_features(model, pixels, batch_size=3)
    expected = clip.normalize(clip.encode_image(model.params, pixels, model.config))
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-6)
    with pytest.raises(DataError, match="no images"):
        zeroshot.image_features(model, pixels[:0])


def test_similarity_ignores_scale_and_names_mismatches():
    x, w = (jax.random.normal(jax.random.key(0), (5, 8)), jax.random.normal(jax.random.key(1), (3, 8)))
    scaled = zeroshot.similarity(100 * x, w / 7)
    np.testing.assert_allclose(zeroshot.similarity(x, w), scaled, rtol=0, atol=1e-6)
    assert zeroshot.predict(x, w).tolist() == np.argmax(scaled, axis=1).tolist()
    with pytest.raises(DataError, match="of one E"):
        zeroshot.similarity(x, w[:, :7])


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "non-empty list"),
        ("cat", ["{}"], "non-empty list"),
        (["cat", " "], ["{}"], "number 1 is empty"),
        (["cat"], [], "non-empty list of texts"),
        (["cat"], ["a photo"], "exactly once"),
        (["cat"], ["{} {}"], "exactly once"),
    ],
)
def test_unfit_names_and_templates_are_named(names, templates, message):
    with pytest.raises(LabelError, match=message):
        zeroshot.fill_templates(names, templates)


def test_a_name_with_braces_is_taken_literally():
    assert zeroshot.fill_templates(["{x}"], ["a {}."]) == ["a {x}."]


def test_too_long_a_name_is_named(model):
    with pytest.raises(TextError, match="40"):
        zeroshot.text_proxies(model, ["x" * 100, "b"])


# --- loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_load_stores_the_type_asked_for(tiny_checkpoint, dtype):
    model = jaxzs.load(tiny_checkpoint, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    assert model.vocabulary is None
    assert model.logit_scale == pytest.approx(np.exp(2.6592), rel=1e-2)
    ids, mask = model.tokenize(["ab"])
    assert clip.encode_text(model.params, ids, model.config, mask).dtype == jnp.float32


def test_fingerprint_tells_weights_apart(tiny_checkpoint, model):
    assert jaxzs.load(tiny_checkpoint).fingerprint == model.fingerprint
    assert jaxzs.load(tiny_checkpoint, dtype=jnp.float16).fingerprint != model.fingerprint


def test_preprocessing_defaults_to_the_size_of_the_tower(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="which is a guess"):
        model = jaxzs.load(folder)
    assert model.preprocess(np.zeros((50, 40, 3), np.uint8)).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("words", [5, "red circle", {"red": 1}, [1, 2], [["red"]], [None]])
def test_words_of_the_model_card_must_be_words(words, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "model_card.json").write_text(json.dumps({"vocabulary": words}))
    with pytest.raises(CheckpointError, match=r"model_card\.json: vocabulary must be a list of words"):
        jaxzs.load(folder)


def test_words_outside_the_model_card_are_named(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "model_card.json").write_text(json.dumps({"vocabulary": ["red", "circle"]}))
    model = jaxzs.load(folder)
    model.check_words(["Red circle", "circle."])
    with pytest.raises(TextError, match=r"words: dog, tabby\..*load a real CLIP") as raised:
        model.check_words(["red", "tabby dog"])
    assert "--model openai" in raised.value.shown(on_command_line=True)
    (folder / "model_card.json").write_text("[]")
    with pytest.raises(CheckpointError, match="model_card"):
        jaxzs.load(folder)


# --- answers that could not be decided --------------------------------------------------------------------

PROJECTIONS = ("visual_projection", "text_projection")


def test_names_that_are_one_text_are_refused(model):
    demo = jaxzs.load("demo")
    for names in (["seven", "Seven"], ["one", "seven", "seven "], ["SEVEN", "one", "seven"]):
        with pytest.raises(LabelError, match="are one text for this checkpoint"):
            zeroshot.text_proxies(demo, names)
    # A published list may hold a name twice: its labels tell the classes apart.
    assert zeroshot.text_proxies(demo, ["seven", "one", "seven"]).shape == (3, 64)


def test_features_that_are_not_finite_are_named(model):
    huge = {name: {"kernel": jnp.full_like(model.params[name]["kernel"], 3e38)} for name in PROJECTIONS}
    broken = dataclasses.replace(model, params={**model.params, **huge})
    pixels = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with pytest.raises(DataError, match=r"features of text 0 are not finite"):
        zeroshot.text_proxies(broken, ["a", "b"])
    with pytest.raises(DataError, match=r"features of image 0 are not finite"):
        zeroshot.image_features(broken, pixels)


def test_pixels_that_are_not_finite_are_named(model):
    pixels = np.zeros((3, 32, 32, 3), np.float32)
    pixels[1, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"features of image 1 are not finite \(1 of 3 rows\)"):
        zeroshot.image_features(model, pixels)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], DataError, "class 'b' has length 0"),
        ([[1.0, 0.0], [1e-38, 0.0]], DataError, "class 'b' has length"),
        ([[3e38, 3e38], [1.0, 0.0]], DataError, "class 'a' is not finite"),
        ([[np.inf, 0.0], [1.0, 0.0]], DataError, "class 'a' is not finite"),
        ([[1.0, 2.0], [2.0, 4.0]], LabelError, "'a' and 'b' have the same proxy"),
    ],
)
def test_proxies_that_decide_nothing_are_named(rows, error, message):
    with pytest.raises(error, match=message):
        zeroshot.check_proxies(jnp.array(rows, jnp.float32), ["a", "b"])
    zeroshot.check_proxies(jnp.array([[1.0, 2.0], [2.0, 3.9]]), ["a", "b"])


def test_equal_proxies_are_found_among_many():
    rows = jax.random.normal(jax.random.key(0), (500, 16))
    zeroshot.check_proxies(rows)
    with pytest.raises(LabelError, match="'3' and '400'"):
        zeroshot.check_proxies(rows.at[400].set(rows[3]))
