"""The embedded checkpoint: an ordinary CLIP that knows its world, and the steps that trained it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzs
from experiments import demo_world, train_demo_clip
from experiments.demo_clip_objective import image_outputs, multi_positive_loss, window_positions
from experiments.demo_world import batches, captions
from experiments.demo_world.captions import DIGITS, SHAPES
from experiments.train_demo_clip import Recipe
from jaxzs import data, zeroshot
from jaxzs.clip.model import position_table
from jaxzs.errors import TextError

DEMO = Path(jaxzs.__file__).parent / "assets" / "demo"


@pytest.fixture(scope="module")
def model():
    return jaxzs.load("demo")


def accuracy(model, images, labels, names, templates) -> float:
    features = zeroshot.image_features(model, model.preprocess(list(images)))
    text = zeroshot.text_proxies(model, names, templates)
    return float((np.asarray(zeroshot.predict(features, text)) == labels).mean())


def test_files_fit_in_four_megabytes():
    names = {file.name for file in DEMO.iterdir()}
    assert names >= {
        "config.json", "flax_model.msgpack", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json", "model_card.json", "README.md",
    }  # fmt: skip
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 4_000_000


def test_real_digits_are_recognised(model):
    """Real scans, never seen in training; the figures in the model card are on all of them."""
    images, labels = data.samples.digits()
    templates = model.card["templates"]["digits"]
    assert accuracy(model, images[::4], labels[::4], model.card["classes"]["digits"], templates) > 0.8


@pytest.mark.slow
def test_rendered_test_world_is_recognised(model):
    templates = data.template_set("imagenet7")
    assert accuracy(model, *demo_world.shapes(120), list(SHAPES), templates) > 0.8
    digits = model.card["templates"]["digits"]
    assert accuracy(model, *demo_world.digits(120), list(DIGITS), digits) > 0.7


def test_unknown_words_are_refused(model):
    model.check_words(["a photo of a red circle.", *model.card["classes"]["letters"]])
    with pytest.raises(TextError, match="cat"):
        model.check_words(["a photo of a cat"])
    with pytest.raises(
        TextError, match=r"knows 135 words, such as zero, one, letter A, letter B, circle, .* and would"
    ):
        model.check_words(["cat"])
    with pytest.raises(TextError, match="knows 339 words, such as cat, dog, and would guess"):
        jaxzs.load("art").check_words(["bird"])


def test_card_describes_the_checkpoint(model):
    run = model.card["training"]
    assert run["logit_scale"] == pytest.approx(model.logit_scale, rel=1e-3)  # float16
    assert run["config"] == json.loads((DEMO / "config.json").read_text())
    for names in model.card["classes"].values():
        model.check_words(names)


def test_multi_positive_loss_by_hand():
    logits = jnp.array([[1.0, 2.0, 0.5, 3.0], [0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 0.0]])
    positive = jnp.array([[True, True, False, False], [False] * 4, [True, False, False, False]])
    negative = jnp.array([[False, False, True, False], [True] * 4, [False] * 4])
    # The second row has no positive; the third has no negative, and so a loss of 0.
    expected = 0.5 * np.mean([np.log(1 + np.exp(0.5 - 1.0)), np.log(1 + np.exp(0.5 - 2.0))])
    loss, gradient = jax.jit(jax.value_and_grad(multi_positive_loss))(logits, positive, negative)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 3], 0)  # true of the image, not its own
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.slow
def test_local_features_are_those_that_tagging_uses(model):
    """Training's value-only block is the one of `jaxzs.patch`."""
    from jaxzs import patch
    from jaxzs.clip import normalize

    images = demo_world.scenes(2).images
    pixels = jnp.asarray(model.preprocess(list(images)))
    config, grid = model.config, patch.full_grid(2, *model.config.vision.grid)
    outputs = jax.jit(lambda params: image_outputs(params, pixels, config, None, True))
    local = jax.jit(lambda params: patch.local_tower(params, pixels, config, grid).tokens)
    own_image, own_patches = outputs(model.params)
    tokens = normalize(local(model.params))
    np.testing.assert_allclose(own_patches, tokens[:, 1:], atol=2e-5)  # other order of operations
    np.testing.assert_allclose(own_image, zeroshot.image_features(model, np.asarray(pixels)), atol=2e-5)


def test_a_window_of_the_larger_table_is_a_part_of_it(model):
    vision, tree = model.config.vision, model.params["vision_model"]
    window_at = jax.jit(lambda corner: window_positions(tree, vision, corner))
    native = window_at(jnp.array([-1, -1]))
    np.testing.assert_array_equal(native, position_table(tree, vision, vision.grid))
    rows = 2 * vision.grid[0]
    whole = position_table(tree, vision, (rows, rows), "bilinear")[1:].reshape(rows, rows, -1)
    window = window_at(jnp.array([2, 5]))
    np.testing.assert_array_equal(
        window[1:].reshape(*vision.grid, -1), whole[2 : 2 + vision.grid[0], 5 : 5 + vision.grid[1]]
    )


@pytest.fixture
def _optax_promotes():
    """optax's cosine schedule mixes integers and floats; our own code runs strictly in all other tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_optax_promotes")
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    # Two programs only: without long texts and large images.
    plan = batches.Plan(steps=6, batch=8, filler_share=0.0, large_share=0.0)
    recipe = Recipe(warmup=1)
    stream = batches.rendered
    straight, _, whole = train_demo_clip.train(tmp_path / "a", plan, recipe)

    def stops(*args, **options):
        for step, item in enumerate(stream(*args, **options)):
            if step == 3:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(train_demo_clip, "rendered", stops)
    monkeypatch.setattr(train_demo_clip, "LOG_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        train_demo_clip.train(tmp_path / "b", plan, recipe, save_every=0.0)
    monkeypatch.setattr(train_demo_clip, "rendered", stream)
    resumed, _, progress = train_demo_clip.train(tmp_path / "b", plan, recipe)
    assert progress["images"] == whole["images"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), resumed, straight)
    with pytest.raises(SystemExit, match="other settings"):
        train_demo_clip.train(tmp_path / "b", plan._replace(batch=16), recipe)


def test_vocabulary_is_that_of_the_captions(model):
    assert model.vocabulary == {w for w in captions.vocabulary() if w.isalnum()}
