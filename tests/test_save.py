"""Whole models written and read back: weights, configuration, texts and pixels as before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

import jaxzs
from jaxzs import clip
from jaxzs.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parent / "golden" / "families"
TEXTS = ["a photo of a Cat, twice", "x"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "open_clip"])
@pytest.mark.parametrize("name", ["vit_gelu", "hf_siglip", "hf_siglip2_gemma", "openai_vit", "rn_quickgelu"])
def test_a_saved_model_is_the_same_model(name, format, tmp_path):
    model = jaxzs.load(GOLDEN / name)
    if format == "open_clip" and "siglip" in name:
        with pytest.raises(ConfigError, match="cannot be written for open_clip"):
            clip.save(model, tmp_path, format)
        return
    again = jaxzs.load(clip.save(model, tmp_path, format))
    image = np.random.default_rng(0).integers(0, 256, (61, 90, 3)).astype(np.uint8)
    np.testing.assert_array_equal(again.preprocess(image), model.preprocess(image))
    for before, after in zip(model.tokenize(TEXTS), again.tokenize(TEXTS), strict=True):
        np.testing.assert_array_equal(after, before)
    exact = format != "open_clip" or name != "rn_quickgelu"  # a BatchNorm that does nothing rounds
    features = [clip.encode_image(m.params, m.preprocess(image), m.config) for m in (model, again)]
    np.testing.assert_allclose(*features, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


@pytest.mark.parametrize("name", ["hf_siglip", "hf_siglip2_gemma", "vit_gelu", "openai_vit"])
def test_transformers_gives_a_saved_model_the_same_texts(name, tmp_path):
    """SigLIP's was of a class that reads another file, SigLIP 2's padded on the left, and "!" was taken for padding."""
    transformers = pytest.importorskip("transformers")
    model = jaxzs.load(clip.save(jaxzs.load(GOLDEN / name), tmp_path / "once"))
    clip.save(model, tmp_path / "twice")  # what was put into the pipeline is not put there again
    files = [(tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("once", "twice")]
    assert files[0] == files[1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "twice")
    for text in ("x! A cat", "Its a_DOG,  ok", "a photo"):
        ids, mask = model.tokenize([text])
        made = theirs([text], padding="max_length", max_length=model.config.text.max_position_embeddings)["input_ids"]
        if "siglip" in name:  # which reads the padding, so that no mask may be made of it
            assert made == ids.tolist(), text
            assert "attention_mask" not in theirs([text])
        else:
            assert made[0][: mask.sum()] == ids[0][: mask.sum()].tolist(), text


def test_capitals_that_a_tokenizer_tells_apart_are_kept(tmp_path):
    """As MetaCLIP 2's does: open_clip's file had lower case, the rule of OpenAI's byte pairs."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁A", -2.0), ("▁cat", -3.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    text = clip.TextConfig(32, 64, 1, 2, 7, 12, eos_token_id=2, pooling="eos")
    config = clip.CLIPConfig(text, clip.VisionConfig(32, 64, 1, 2, 48, 16), 16)
    model = jaxzs.load("demo")
    model = dataclasses.replace(
        model,
        params=clip.random_params(jax.random.key(0), config),
        config=config,
        tokenizer=clip.Tokenizer(backend, 12, 12, 0, 2, 1),
    )
    ids = model.tokenize(["A cat", "a cat cat"])[0]
    assert ids.tolist() == [[0, 5, 6, 2, 1], [0, 4, 6, 6, 2]]
    for format in ("safetensors", "open_clip", "flax"):
        again = jaxzs.load(clip.save(model, tmp_path / format, format))
        np.testing.assert_array_equal(again.tokenize(["A cat", "a cat cat"])[0], ids)
    assert again.config == config


def test_open_clip_is_told_of_another_tokenizer(tmp_path):
    """It takes OpenAI's byte pairs, with ids of its own, unless a name says that the folder has others."""
    clip.save(jaxzs.load("demo"), tmp_path, "open_clip")
    text = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text["hf_tokenizer_name"] == "demo"
    again = jaxzs.load(tmp_path)
    assert again.tokenize(["the digit one"])[0].tolist() == [jaxzs.load("demo").tokenizer.encode("the digit one")]
    clip.save(again, tmp_path / "further", "open_clip")
    clip.save(again, tmp_path / "back")


def test_half_a_model_is_not_saved(tmp_path):
    model = jaxzs.load("demo", towers=("vision",))
    with pytest.raises(CheckpointError, match="without one of its towers"):
        clip.save(model, tmp_path)
    with pytest.raises(jaxzs.errors.TextError, match="without its text tower"):
        model.tokenize(["a cat"])


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("there", "format", "why"),
    [
        ("hf_siglip", "open_clip", "cannot be written for open_clip"),  # the model itself is refused
        ("demo", "flax", "model.safetensors, which would be read instead"),
        ("demo", "open_clip", "model.safetensors, which would be read instead"),  # once written, and never read
    ],
)
def test_a_refused_folder_is_left_as_it_was(there, format, why, tmp_path):
    clip.save(jaxzs.load("demo"), tmp_path)
    before = _contents(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=why):
        clip.save(jaxzs.load("art" if there == "demo" else GOLDEN / there), tmp_path, format)
    assert _contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model_card.json", "processor_config.json", "added_tokens.json", "spiece.model"])
def test_files_of_another_model_are_not_taken_over(name, tmp_path):
    """Each is read where it is, and not written by a model that has none: another's preprocessing, words, card."""
    (tmp_path / name).write_text("{}")
    model = dataclasses.replace(jaxzs.load("demo"), card={})
    with pytest.raises(CheckpointError, match=f"already holds {name}, which would be read beside"):
        clip.save(model, tmp_path)
    assert sorted(_contents(tmp_path)) == [name]


@pytest.mark.parametrize("mode", ["safetensors", "open_clip"])
@pytest.mark.parametrize(
    "changes",
    [
        {"size": (48, 48)},  # squashed, though the file speaks of a crop
        {"size": (48, 48), "do_center_crop": False},
        {"size": 64},
        {"size": (64, 64)},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 0},
        {"do_resize": False},
        {"size": (48, 48), "do_center_crop": False, "letterbox": True},
        {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.25, 0.5), "resample": 2},
    ],
)
def test_preprocessing_is_kept_or_refused(changes, mode, tmp_path):
    """open_clip's file cannot say all of it: what it cannot say was left out without a word."""
    model = jaxzs.load("demo")
    model = dataclasses.replace(model, preprocessor=dataclasses.replace(model.preprocessor, **changes))
    kept = mode == "safetensors" or changes.get("size") == (48, 48) or "image_mean" in changes
    if not kept:
        with pytest.raises(CheckpointError, match="its preprocessing cannot be written"):
            clip.save(model, tmp_path, mode)
        assert not _contents(tmp_path)
        return
    again = jaxzs.load(clip.save(model, tmp_path, mode))
    for shape in ((60, 90, 3), (90, 60, 3), (48, 48, 3)):  # even margins: halves of a pixel are rounded otherwise there
        image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        np.testing.assert_array_equal(again.preprocess(image), model.preprocess(image))


def test_the_side_that_long_texts_lose_is_kept(tmp_path):
    model = jaxzs.load("demo")
    model = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, cut_left=True))
    clip.save(model, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["truncation_side"] == "left"
    assert jaxzs.load(tmp_path).tokenizer.cut_left
