"""The demo checkpoint is an ordinary CLIP: transformers reads its tokenizer, its preprocessing and its weights."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import jaxzs
from jaxzs import clip

DEMO = Path(jaxzs.__file__).parent / "assets" / "demo"
TRANSFORMERS = ("4.", "5.")
TOLERANCE = 2e-5  # float32 on both sides; logits are some 25 times a cosine
TEXTS = ["the digit seven", "a photo of a red circle and a blue star on a striped background."]

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def test_transformers_gives_the_same_tokens_pixels_and_logits(tmp_path):
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from transformers import CLIPImageProcessorPil as CLIPImageProcessor
        except ImportError:  # transformers 4
            from transformers import CLIPImageProcessor

    model = jaxzs.load("demo")
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("flax_model.msgpack"))
    clip.write_checkpoint(folder, model.params, model.config, format="safetensors")
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 70, 3), dtype=np.uint8)

    theirs = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    with torch.no_grad():
        output = theirs(**tokens, pixel_values=pixels["pixel_values"])

    ids, mask = model.tokenize(TEXTS)
    own_pixels = model.preprocess(list(images))
    np.testing.assert_array_equal(ids, tokens["input_ids"].numpy())
    np.testing.assert_allclose(own_pixels, pixels["pixel_values"].numpy().transpose(0, 2, 3, 1), atol=1e-6)
    image = clip.encode_image(model.params, own_pixels, model.config)
    text = clip.encode_text(model.params, ids, model.config, mask)
    logits = clip.logits_per_image(image, text, model.params["logit_scale"])
    np.testing.assert_allclose(clip.normalize(image), output.image_embeds.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(clip.normalize(text), output.text_embeds.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(logits, output.logits_per_image.numpy(), atol=25 * TOLERANCE)
