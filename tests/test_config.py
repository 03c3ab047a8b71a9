"""Configurations of published checkpoints, round trips, and everything that can be wrong with one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxzs.clip import CLIPConfig, TextConfig, VisionConfig
from jaxzs.errors import ConfigError

# What differs from HuggingFace's defaults in the config.json of published checkpoints.
PUBLISHED = {
    "openai ViT-B/32": (
        {"text_config": {"eos_token_id": 2, "bos_token_id": 0}, "text_config_dict": None},
        CLIPConfig(text=TextConfig(eos_token_id=2, bos_token_id=0)),
    ),
    "openai ViT-B/16": (
        {"text_config": {"eos_token_id": 2}, "vision_config": {"patch_size": 16}},
        CLIPConfig(text=TextConfig(eos_token_id=2), vision=VisionConfig(patch_size=16)),
    ),
    "openai ViT-L/14@336": (
        {
            "projection_dim": 768,
            "text_config": {"hidden_size": 768, "projection_dim": 512},
            "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            "vision_config": {"projection_dim": 512},
            "vision_config_dict": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "image_size": 336,
            },
        },
        CLIPConfig(
            text=TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
            vision=VisionConfig(1024, 4096, 24, 16, 336, 14),
            projection_dim=768,
        ),
    ),
    "laion ViT-B/32": (
        {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}},
        CLIPConfig(text=TextConfig(hidden_act="gelu"), vision=VisionConfig(hidden_act="gelu")),
    ),
    "TinyCLIP 8M/16": (
        {
            "projection_dim": 512,
            "text_config": {
                "hidden_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "intermediate_size": 1024,
            },
            "vision_config": {
                "hidden_size": 256,
                "num_hidden_layers": 10,
                "num_attention_heads": 4,
                "intermediate_size": 1024,
                "patch_size": 16,
            },
        },
        CLIPConfig(text=TextConfig(256, 1024, 3, 4), vision=VisionConfig(256, 1024, 10, 4, patch_size=16)),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_read_with_their_omitted_defaults(name):
    values, expected = PUBLISHED[name]
    assert CLIPConfig.from_hf({"model_type": "clip", **values}) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_round_trip_through_json(name, tmp_path):
    config = PUBLISHED[name][1]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert CLIPConfig.from_hf(tmp_path) == config
    assert hash(CLIPConfig.from_hf(config.to_hf())) == hash(config)


def test_transformers_reads_what_is_written_back():
    transformers = pytest.importorskip("transformers")
    config = PUBLISHED["openai ViT-L/14@336"][1]
    read = transformers.CLIPConfig.from_dict(config.to_hf())
    assert read.projection_dim == 768
    assert read.vision_config.image_size == 336
    assert read.text_config.num_attention_heads == 12
    assert CLIPConfig.from_hf(read.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, "model_type is 'blip'"),
        ({"text_config": {"hidden_size": 510}}, "not a multiple"),
        ({"text_config": {"hidden_size": "512"}}, "text_config.hidden_size is '512', expected a whole number"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "expected 1 to 256"),
        ({"text_config": {"vocab_size": 512}}, "outside the vocabulary"),
        ({"text_config": []}, None),  # an empty list is no configuration, but no harm either
        ({"text_config": [1]}, "text_config is list, expected an object"),
        ({"vision_config": {"patch_size": 0}}, "expected 1 to"),
        ({"vision_config": {"patch_size": 448}}, "exceeds image_size"),
        ({"vision_config": {"hidden_act": "relu"}}, "is not one of quick_gelu"),
        ({"vision_config": {"layer_norm_eps": -1.0}}, "layer_norm_eps"),
        ({"projection_dim": True}, "projection_dim is True, expected a whole number"),
        ({"logit_scale_init_value": float("inf")}, "expected a finite number"),
    ],
)
def test_unfit_configurations_are_named(change, message):
    values = {"model_type": "clip", **change}
    if message is None:
        assert CLIPConfig.from_hf(values) == CLIPConfig()
    else:
        with pytest.raises(ConfigError, match=message):
            CLIPConfig.from_hf(values)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"1"])
def test_a_file_that_is_no_configuration_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        CLIPConfig.from_hf(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = ("projection_dim", "text_config", "vision_config", "text_config_dict", "model_type")
TOWER_KEYS = ("hidden_size", "num_attention_heads", "image_size", "hidden_act", "eos_token_id")


@given(st.dictionaries(st.sampled_from(KEYS), json_values | st.dictionaries(st.sampled_from(TOWER_KEYS), json_values)))
def test_any_json_gives_a_configuration_or_a_named_error(values):
    try:
        config = CLIPConfig.from_hf({"model_type": "clip", **values})
    except ConfigError:
        return
    assert CLIPConfig.from_hf(config.to_hf()) == config
