"""The drop-in for transformers' Flax CLIP, against its recorded outputs; and the modules of linen and nnx.

`tests/interop/test_flax_models.py` runs the same code on the real classes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import CONFIG, tiny_model

import jaxzs.flax
from jaxzs import clip
from jaxzs.errors import CheckpointError, ConfigError
from jaxzs.flax import (
    FlaxCLIPModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxCLIPVisionModel,
    linen,
    nnx,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("quickgelu_legacy_eos", "gelu_first_eos", "odd_sizes")
ATOL = 2e-5  # float32 on both sides, features of order 1 to 5, logits of order 10; as in test_model.py
CLASSES = [FlaxCLIPModel, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxCLIPVisionModel]
IDS = np.array([[1, 5, 6, 63], [1, 7, 63, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
PIXELS = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)


def recorded(name: str, case: str = "hole_mask"):
    """(pixels NCHW, ids, mask, outputs of the vision tower, outputs of the text tower and of both)."""
    texts, images = (dict(np.load(GOLDEN / "clip" / name / f"ref_{kind}.npz")) for kind in ("text", "image"))
    texts = {key.split("/")[1]: value for key, value in texts.items() if key.startswith(f"{case}/")}
    return images["pixel_values_nchw"], texts["input_ids"], texts.get("attention_mask"), images, texts


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=ATOL)


def listed(values, prefix):
    return [values[key] for key in sorted(values) if key.startswith(prefix)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint as transformers would have written it."""
    path = tmp_path_factory.mktemp("tiny")
    clip.write_checkpoint(path, tiny_model().params, CONFIG)
    return path


@pytest.mark.parametrize("case", ["hole_mask", "pad_zero_nomask"])
@pytest.mark.parametrize("name", NAMES)
def test_both_towers(name, case):
    pixels, ids, mask, images, texts = recorded(name, case)
    model = FlaxCLIPModel.from_pretrained(GOLDEN / "clip" / name)
    found = model(ids, pixels, mask, output_hidden_states=True, output_attentions=True)
    for key in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(found[key], texts[key])
    close(found.vision_model_output.last_hidden_state, images["last_hidden_state"])
    close(found.vision_model_output.pooler_output, images["pooler_output"])
    close(found.text_model_output[1], texts["pooler_output"])
    for own, expected in zip(found.vision_model_output.hidden_states, listed(images, "hidden_states"), strict=True):
        close(own, expected)
    for own, expected in zip(found.vision_model_output.attentions, listed(images, "attention_"), strict=True):
        close(own[:1], expected)
    for own, expected in zip(found.text_model_output.hidden_states, listed(texts, "hidden_states"), strict=False):
        close(own, expected)
    close(model.get_text_features(ids, mask), texts["text_features"])
    close(model.get_image_features(pixels), images["image_features"])


def test_single_towers():
    pixels, ids, mask, images, texts = recorded("gelu_first_eos")
    folder = GOLDEN / "clip" / "gelu_first_eos"
    vision = FlaxCLIPVisionModel.from_pretrained(folder)(pixels)
    close(vision.pooler_output, images["pooler_output"])
    text = FlaxCLIPTextModel.from_pretrained(folder)(input_ids=ids, attention_mask=mask)
    close(text.last_hidden_state, texts["last_hidden_state"])
    projected = FlaxCLIPTextModelWithProjection.from_pretrained(folder)(ids, mask)
    close(projected.text_embeds, texts["text_features"])
    assert text.keys() == ("last_hidden_state", "pooler_output")
    assert projected.keys() == ("text_embeds", "last_hidden_state")


def test_outputs_by_attribute_name_and_place(folder):
    model = FlaxCLIPModel.from_pretrained(folder)
    output = model(IDS, PIXELS, MASK)
    assert output[0] is output.logits_per_image is output["logits_per_image"]
    assert list(output) == list(output.keys()) == [name for name, _ in output.items()]
    assert "text_embeds" in output
    assert len(output[:2]) == 2
    assert isinstance(output[5], tuple)
    plain = model(IDS, PIXELS, MASK, return_dict=False)
    assert jax.tree.structure(plain) == jax.tree.structure(output.to_tuple())
    jax.tree.map(np.testing.assert_array_equal, plain, output.to_tuple())
    none = output.replace(text_model_output=None)
    assert len(none) == 5
    with pytest.raises(KeyError):
        output["nothing"]


def test_calls_are_pure_functions_of_the_parameters(folder):
    model = FlaxCLIPModel.from_pretrained(folder)
    double = jax.tree.map(lambda x: 2 * x, model.params)
    other = model.get_image_features(PIXELS, params=double)
    assert not np.allclose(other, model.get_image_features(PIXELS), atol=1e-3)
    loss = lambda params: model(IDS, PIXELS, MASK, params=params).logits_per_image.sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(model.params)
    assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
    model.params = double
    np.testing.assert_array_equal(model.get_image_features(PIXELS), other)
    with pytest.raises(CheckpointError, match="names and shapes"):
        model.params = {**double, "logit_scale": jnp.ones(2)}


def test_places_of_the_callers_own(folder):
    model = FlaxCLIPTextModel.from_pretrained(folder)
    plain = model(IDS, MASK)
    places = np.broadcast_to(np.arange(4), (2, 4))
    close(model(IDS, MASK, position_ids=places).last_hidden_state, plain.last_hidden_state)
    moved = model(IDS, MASK, position_ids=places + np.array([[0], [3]]))
    close(moved.pooler_output[0], plain.pooler_output[0])
    assert not np.allclose(moved.pooler_output[1], plain.pooler_output[1], atol=1e-3)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("safe", [False, True])
def test_saved_and_read_again(folder, tmp_path, kind, safe):
    model = kind.from_pretrained(folder)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [kind.__name__]
    if safe:  # transformers takes no [1] for a number
        stored = load_file(tmp_path / "model.safetensors")
        assert all(len(own.shape) for name, own in stored.items() if name != "logit_scale")
        assert stored.get("logit_scale", np.float32(0)).shape == ()
    again = kind.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.config.to_dict() == model.config.to_dict()


def test_a_tower_without_projection_of_torch(folder, tmp_path):
    """As the text encoders of image generators lie on the hub: torch names, one tower, no projection."""
    model = FlaxCLIPTextModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").unlink()
    clip.write_checkpoint(tmp_path / "whole", tiny_model().params, CONFIG, "safetensors")
    arrays = load_file(tmp_path / "whole" / "model.safetensors")
    save_file({k: v for k, v in arrays.items() if k.startswith("text_model")}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, FlaxCLIPTextModel.from_pretrained(tmp_path).params, model.params)
    with pytest.raises(CheckpointError, match=r"missing .*text_projection"):
        FlaxCLIPTextModelWithProjection.from_pretrained(tmp_path)


def test_outside_parameters_types_and_settings(folder):
    model, params = FlaxCLIPVisionModel.from_pretrained(folder, dtype=jnp.bfloat16, _do_init=False)
    with pytest.raises(ConfigError, match="_do_init=False"):
        model(PIXELS)
    half = model.to_bf16(params)
    output = model(PIXELS, params=half)
    assert output.pooler_output.dtype == jnp.bfloat16
    assert jax.tree.leaves(half)[0].dtype == jnp.bfloat16
    verbose = FlaxCLIPVisionModel.from_pretrained(folder, output_hidden_states=True)
    assert len(verbose(PIXELS).hidden_states) == 2
    with pytest.raises(ConfigError, match="has no argument typo"):
        FlaxCLIPVisionModel.from_pretrained(folder, typo=True)
    with pytest.raises(ConfigError, match="channels first"):
        verbose(PIXELS.transpose(0, 2, 3, 1))
    with pytest.raises(ConfigError, match="uploads nothing"):
        verbose.save_pretrained("x", push_to_hub=True)


def test_made_from_a_configuration(folder):
    config = FlaxCLIPModel.from_pretrained(folder).config
    first, same, other = (FlaxCLIPModel(config, seed=seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first.params, same.params)
    assert not np.array_equal(first.params["text_projection"]["kernel"], other.params["text_projection"]["kernel"])
    config.vision_config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="no dropout"):
        first(IDS, PIXELS, train=True)


def test_a_second_call_compiles_nothing(folder):
    from jaxzs.flax import models

    first = FlaxCLIPModel.from_pretrained(folder)
    first(IDS, PIXELS, MASK)
    before = models._both._cache_size()
    FlaxCLIPModel.from_pretrained(folder)(IDS, PIXELS, MASK)
    assert models._both._cache_size() == before


def test_linen_and_nnx_modules():
    model = tiny_model()
    pixels = PIXELS.transpose(0, 2, 3, 1)
    image = clip.encode_image(model.params, pixels, CONFIG)
    expected = clip.logits_per_image(image, clip.encode_text(model.params, IDS, CONFIG), model.params["logit_scale"])
    module, variables = linen.CLIP(CONFIG), {"params": model.params}
    np.testing.assert_allclose(module.apply(variables, pixels, IDS), expected, rtol=1e-6)
    np.testing.assert_array_equal(module.apply(variables, pixels, method="encode_image"), image)
    drawn = jax.eval_shape(module.init, jax.random.key(0), pixels, IDS)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, model.params)
    own = nnx.CLIP(CONFIG, model.params)
    np.testing.assert_allclose(own(pixels, IDS), expected, rtol=1e-6)
    fresh = nnx.nnx.eval_shape(lambda: nnx.CLIP(CONFIG, rngs=nnx.nnx.Rngs(0)))
    assert jax.tree.map(lambda x: x.shape, fresh.tree) == jax.tree.map(jnp.shape, model.params)
    gradient = nnx.nnx.grad(lambda module: module.encode_text(IDS).sum())(own)
    assert len(jax.tree.leaves(gradient)) == len(jax.tree.leaves(model.params))


@pytest.mark.parametrize("kind", CLASSES[:3], ids=lambda kind: kind.__name__)
def test_the_end_token_of_metaclip_2(kind, tmp_path):
    """Its 2 is a token, and not CLIP's sign for the highest id, which it had become in what was saved."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, pooling="eos", eos_token_id=2))
    clip.write_checkpoint(tmp_path / "whole", tiny_model().params, config)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == "metaclip_2"
    ids = np.array([[1, 63, 6, 2], [1, 7, 2, 0]])
    model = kind.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "saved")
    texts = FlaxCLIPTextModel.from_pretrained(tmp_path / "saved")(ids).pooler_output
    close(texts, clip.text_tower(tiny_model().params, ids, config).pooled)
    transformers = pytest.importorskip("transformers")
    whole = transformers.MetaClip2Config.from_pretrained(tmp_path / "whole")
    for given in (whole, whole.text_config):
        assert FlaxCLIPTextModel(given, _do_init=False)._config.text == config.text
    with pytest.raises(ConfigError, match="a configuration of 'siglip'"):
        FlaxCLIPModel(transformers.SiglipConfig())


def test_a_model_without_text_projection_is_refused(tmp_path):
    text = dataclasses.replace(CONFIG.text, projection=False)
    config = dataclasses.replace(CONFIG, text=text, projection_dim=text.hidden_size)
    clip.write_checkpoint(tmp_path, clip.random_params(jax.random.key(0), config), config)
    with pytest.raises(ConfigError, match="has a text projection, this model none"):
        FlaxCLIPModel.from_pretrained(tmp_path)
    assert FlaxCLIPTextModel.from_pretrained(tmp_path)(IDS).pooler_output.shape == (2, config.projection_dim)


def test_the_names_of_transformers():
    assert set(jaxzs.flax.__all__) >= {kind.__name__ for kind in CLASSES}


@pytest.mark.parametrize("name", ["vit_gelu", "openai_vit"])
def test_a_layout_without_config_json_is_saved_with_its_own(name, tmp_path):
    """transformers 5 gives ViT-B/32 for a folder without one: `config` was that, and so was what was saved."""
    model = FlaxCLIPModel.from_pretrained(GOLDEN / "families" / name)
    own = model._config
    assert model.config.vision_config.image_size == own.vision.image_size == 32
    assert model.config.text_config.hidden_act == own.text.hidden_act
    model.save_pretrained(tmp_path)
    again = FlaxCLIPModel.from_pretrained(tmp_path)
    ids = np.array([[598, 5, 6, 599], [598, 9, 599, 0]])
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected = model(ids, pixels).logits_per_image
    np.testing.assert_array_equal(again(ids, pixels).logits_per_image, expected)
    # Places [1,T] stand for all texts, as in transformers.
    moved = model(ids, pixels, position_ids=np.arange(4)[None]).logits_per_image
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)  # another program
