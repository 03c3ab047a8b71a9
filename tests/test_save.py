"""Whole models written and read back: weights, configuration, texts and pixels as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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


def test_half_a_model_is_not_saved(tmp_path):
    model = jaxzs.load("demo", towers=("vision",))
    with pytest.raises(CheckpointError, match="without one of its towers"):
        clip.save(model, tmp_path)
    with pytest.raises(jaxzs.errors.TextError, match="without its text tower"):
        model.tokenize(["a cat"])
