"""Every layout through `jaxzs.load`: its own ids and its own preprocessing, not those of another layout."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxzs
from jaxzs.clip.naflex_images import PatchPreprocessor
from jaxzs.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = GOLDEN / "families"
TEXTS = [
    "a photo of a cat.",
    "A Photo of a DOG,  twice",
    "x",
    "the quick brown fox jumps over the lazy dog again and again",
    "it's 42 caf\u00e9s",
]


@pytest.mark.parametrize(
    "layout", ["vit_gelu", "vit_quickgelu_remainder_bin", "vit_customtext_bias", "rn_quickgelu", "openai_vit/model.pt"]
)
def test_ids_of_open_clip_layouts(layout: str) -> None:
    pytest.importorskip("ftfy")
    path = FAMILIES / layout
    model = jaxzs.load(path)
    with np.load((path if path.is_dir() else path.parent) / "ref.npz") as stored:
        ids, _ = model.tokenizer(TEXTS, pad_to=model.config.text.max_position_embeddings, truncate=True)
        np.testing.assert_array_equal(ids, stored["input_ids"])
    assert model.tokenizer.clean == "open_clip lower"
    assert model.preprocessor.crop_rounding == "even"
    assert model.preprocessor.output_shape == (model.config.vision.image_size,) * 2


@pytest.mark.parametrize(("layout", "family"), [("hf_siglip", "siglip"), ("hf_siglip2_gemma", "gemma")])
def test_ids_of_siglip_layouts(layout: str, family: str) -> None:
    model = jaxzs.load(FAMILIES / layout)
    published = json.loads((GOLDEN / "tokens" / "ids.json").read_text(encoding="utf-8"))[family]
    for text, ids in zip(published["texts"], published["ids"], strict=True):
        if text:
            assert model.tokenizer([text], truncate=True)[0].tolist() == [ids], text
    short, mask = model.tokenize(["x"])
    assert short.shape == (1, model.config.text.max_position_embeddings)
    assert mask.sum() < short.size
    assert not model.preprocessor.do_center_crop


def test_a_file_of_openai_needs_nothing_beside_it(tmp_path: Path) -> None:
    # The tiny tower has 600 tokens: the packaged byte pairs are refused by their number, not guessed.
    shutil.copy(FAMILIES / "openai_vit" / "model.pt", tmp_path)
    with pytest.raises(CheckpointError, match=r"merges\.txt\.gz gives ids up to 49407, the model has 600 token"):
        jaxzs.load(tmp_path / "model.pt")
    assert jaxzs.load(tmp_path / "model.pt", towers=("vision",)).preprocessor.crop_rounding == "even"


def test_a_tokenizer_that_is_named_only_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match="names 'bert-base-uncased': put that one's files beside it"):
        jaxzs.load(FAMILIES / "clipa")


def test_naflex_images_are_patches() -> None:
    model = jaxzs.load(FAMILIES / "hf_siglip2_naflex", towers=("vision",))
    assert isinstance(model.preprocessor, PatchPreprocessor)
    images = model.preprocess(np.zeros((30, 50, 3), np.uint8))
    assert images.values.shape == (1, 16, 192)
    assert jaxzs.clip.encode_image(model.params, images, model.config).shape == (1, 32)
    assert "images of any aspect" in repr(model)
    with pytest.raises(ConfigError, match="NaFlex"):  # visual prompts, tags and masks take images of one size
        model.config.check_one_size()


def test_the_packaged_byte_pairs_are_small_and_whole() -> None:
    file = Path(jaxzs.__file__).parent / "assets" / "bpe" / "merges.txt.gz"
    assert file.stat().st_size < 2**18
    assert len(gzip.decompress(file.read_bytes()).decode().splitlines()) == 48_894
