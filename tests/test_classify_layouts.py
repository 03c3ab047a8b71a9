"""`jaxzs classify` on a tiny checkpoint of every layout, as the library that owns it lays it out on disk."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from test_families import GOLDEN, _small_timm_tower

import jaxzs
from jaxzs import clip
from jaxzs.cli import main

__all__ = ["_small_timm_tower"]  # a fixture that all tests here use

# Published apart from the weights, and too large to be here: those of this alphabet are made by the tests.
LETTERS = [*string.ascii_lowercase]


def of_bert(folder: Path) -> None:
    """bert-base-uncased's kind, which CLIPA takes: WordPiece."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')


def of_xlm_v(folder: Path) -> None:
    """facebook/xlm-v-base's kind, which MetaCLIP 2 takes: Unigram between <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *LETTERS, "."]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer", **special}))


def of_gemma(folder: Path) -> None:
    """Gemma's kind, which SigLIP 2 takes: byte pairs, no start token."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *LETTERS, "."]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:4]])
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer", **special}))


def of_siglip(folder: Path) -> None:
    shutil.copy(GOLDEN / "hf_siglip" / "spiece.model", folder)


def nothing(folder: Path) -> None:
    """The tokenizer is there already."""


LAYOUTS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "SigLIP": ("hf_siglip", "model.safetensors", nothing),
    "SigLIP 2": ("hf_siglip2_gemma", "model.safetensors", nothing),
    "SigLIP 2, NaFlex": ("hf_siglip2_naflex", "model.safetensors", of_gemma),
    "open_clip": ("vit_gelu", "open_clip_model.safetensors", nothing),
    "open_clip, .bin": ("vit_quickgelu_remainder_bin", "open_clip_pytorch_model.bin", nothing),
    "open_clip, custom text and a bias": ("vit_customtext_bias", "open_clip_model.safetensors", nothing),
    "MetaCLIP 2": ("worldwide_eos", "open_clip_model.safetensors", of_xlm_v),
    "CLIPA": ("clipa", "open_clip_model.safetensors", of_bert),
    "ResNet in a folder of timm's": ("rn_quickgelu", "open_clip_model.safetensors", nothing),
    "SigLIP of timm": ("openclip_siglip", "open_clip_model.safetensors", of_siglip),
    "big_vision": ("openclip_siglip", "big_vision.npz", of_siglip),
    "OpenAI, ViT": ("openai_vit", "model.pt", nothing),
    "OpenAI, ResNet": ("openai_rn", "model.pt", nothing),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_libraries(layout, digit_photos, tmp_path, capsys):
    """Of the weights in that layout alone."""
    name, weights, tokenizer = LAYOUTS[layout]
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / name, folder)
    for other in ("model.safetensors", "open_clip_model.safetensors", "big_vision.npz"):
        if other != weights:
            (folder / other).unlink(missing_ok=True)
    tokenizer(folder)
    classify(folder / weights if weights == "big_vision.npz" else folder, digit_photos, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["flax", "safetensors", "safetensors-flax"])
def test_layouts_of_huggingface(format, digit_photos, tmp_path, capsys):
    classify(clip.save(jaxzs.load(GOLDEN / "vit_gelu"), tmp_path / "model", format), digit_photos, capsys)


def classify(path: Path, digit_photos: Path, capsys) -> None:
    """Images in, a label and a probability for each out."""
    photos = sorted(digit_photos.rglob("*.png"))[:4]
    arguments = ["classify", *map(str, photos), "--labels", "cat,dog,ox", "--templates", "{}"]  # few tokens
    assert main([*arguments, "--model", str(path), "--method", "zero-shot", "--json", "--no-cache"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [Path(row["path"]) for row in results] == photos
    for row in results:
        assert row["label"] in {"cat", "dog", "ox"}
        assert 1 / 3 <= row["score"] <= 1
