"""open_clip's own models, written by open_clip and read here; what is written here, read by open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from torch_models import assert_near, randomize

from jaxzs import clip
from jaxzs.clip.layout import TOWERS
from jaxzs.clip.open_clip import read_open_clip
from jaxzs.clip.weights import StoredLeaf, _audit, _stored_parts, _wanted
from jaxzs.errors import ConfigError

TRANSFORMERS = "5."

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

_TEXT = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}
_VIT = {"image_size": 32, "patch_size": 8, "width": 48, "head_width": 16, "layers": 2}
_RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32}
_CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
_SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}

# model_cfg as open_clip has it, tiny; but for timm's tower, of which there is no tiny one.
MODELS: dict[str, dict[str, Any]] = {
    "ViT": {"embed_dim": 24, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "ViT, quick_gelu, a remainder of pixels": {
        "embed_dim": 24, "quick_gelu": True, "vision_cfg": {**_VIT, "image_size": 37}, "text_cfg": _TEXT
    },
    "ViT, trained with sigmoids": {
        "embed_dim": 24, "custom_text": True, "init_logit_bias": -10, "vision_cfg": _VIT, "text_cfg": _TEXT
    },
    "MetaCLIP 2": {
        "embed_dim": 24, "custom_text": True, "vision_cfg": {**_VIT, "mlp_ratio": 3.3},
        "text_cfg": {**_TEXT, "pool_type": "eos", "eos_id": 2},
    },
    "CLIPA": {
        "embed_dim": 24, "custom_text": True, "vision_cfg": {**_VIT, **_CLIPA},
        "text_cfg": {**_TEXT, "pool_type": "last", "no_causal_mask": True},
    },
    "ResNet": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": _RESNET, "text_cfg": _TEXT},
    "SigLIP": {
        "embed_dim": 768, "custom_text": True, "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": 224, "timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False,
            "timm_pool": "map", "timm_proj": "none",
        },
        "text_cfg": {**_TEXT, **_SIGLIP_TEXT},
    },
}  # fmt: skip


def build(open_clip, values: dict[str, Any], folder: Path):
    """The torch model of a `model_cfg`, at random."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    randomize(model)
    return model


def write(model, values: dict[str, Any], folder: Path, safe: bool) -> None:
    """As open_clip lays out a repository of the hub, less its tokenizer."""
    import torch
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    if safe:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    else:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    save_config_for_hf(model, folder / "open_clip_config.json", model_config=values)


def inputs(values: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels NCHW; ids of random words, the end token (or the lowest id that ends) at several places, padding of 0."""
    rng, text = np.random.default_rng(0), values["text_cfg"]
    side, length, vocabulary = values["vision_cfg"]["image_size"], text["context_length"], text["vocab_size"]
    ids = rng.integers(3, vocabulary - 1, (4, length))
    for row, end in enumerate((3, 7, length - 1, 5)):
        ids[row, end:] = 0
        ids[row, end] = text["eos_id"] if text.get("pool_type") == "eos" else vocabulary - 1
    return rng.standard_normal((3, 3, side, side)).astype(np.float32), ids


def theirs(model, pixels: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Features of images and texts, not normalised, and logits with scale and bias."""
    import torch

    with torch.no_grad():
        images, texts = torch.from_numpy(pixels), torch.from_numpy(ids)
        logits, _ = model.get_logits(images, texts)
        return model.encode_image(images).numpy(), model.encode_text(texts).numpy(), logits.numpy()


def ours(path: Path, pixels: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    params, config = clip.read_checkpoint(path)
    with jax.default_matmul_precision("highest"):
        images = clip.encode_image(params, pixels.transpose(0, 2, 3, 1), config)
        texts = clip.encode_text(params, ids, config)
        logits = clip.logits_per_image(images, texts, params["logit_scale"], params.get("logit_bias"))
    return np.asarray(images), np.asarray(texts), np.asarray(logits)


def assert_equal(own: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    for mine, yours in zip(own, other, strict=True):
        assert_near(mine, yours)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_what_open_clip_writes_is_read(open_clip, name, safe, tmp_path):
    model = build(open_clip, MODELS[name], tmp_path / "built")
    write(model, MODELS[name], tmp_path, safe)
    data = inputs(MODELS[name])
    assert_equal(ours(tmp_path, *data), theirs(model, *data))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "SigLIP"])  # refused by name: test_families.py
def test_open_clip_reads_what_is_written(open_clip, name, tmp_path):
    """A folder of ours is a model of open_clip's, and its features are those of the model it was made from."""
    model = build(open_clip, MODELS[name], tmp_path / "built")
    write(model, MODELS[name], tmp_path / "built", safe=True)
    params, config = clip.read_checkpoint(tmp_path / "built")
    clip.write_checkpoint(tmp_path / "ours", params, config, "open_clip")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    data = inputs(MODELS[name])
    assert_equal(theirs(again, *data), theirs(model, *data))


@pytest.mark.parametrize("name", ["ViT", "ViT, quick_gelu, a remainder of pixels"])
def test_transformers_reads_what_is_written_of_open_clip(open_clip, name, tmp_path):
    """A CLIP pooled at the highest id is that of transformers with the legacy end token, whatever ends a text."""
    import torch
    import transformers

    model = build(open_clip, MODELS[name], tmp_path / "built")
    write(model, MODELS[name], tmp_path / "built", safe=True)
    clip.write_checkpoint(tmp_path / "ours", *clip.read_checkpoint(tmp_path / "built"), "safetensors")
    again, info = transformers.CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    pixels, ids = inputs(MODELS[name])
    ids[2, -1] -= 1  # a text that ends with another token than the last of the vocabulary
    with torch.no_grad():
        images = again.eval().get_image_features(torch.from_numpy(pixels))
        texts = again.get_text_features(torch.from_numpy(ids))
    own = [getattr(features, "pooler_output", features).numpy() for features in (images, texts)]
    assert_equal(own, theirs(model, pixels, ids)[:2])


def test_a_training_checkpoint(open_clip, tmp_path):
    """What open_clip's training saves: state of the optimiser beside, names behind "module."."""
    import torch

    model = build(open_clip, MODELS["ViT"], tmp_path / "built")
    write(model, MODELS["ViT"], tmp_path, safe=True)
    (tmp_path / "open_clip_model.safetensors").unlink()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    data = inputs(MODELS["ViT"])
    assert_equal(ours(tmp_path / "epoch_3.pt", *data), theirs(model, *data))


@pytest.mark.parametrize("tower", ["ViT", "ResNet"])
def test_a_torchscript_archive_as_openai_published(open_clip, tower, tmp_path):
    """Matrices in float16, a program beside them that is never run, and no configuration."""
    import torch

    values = {**MODELS[tower], "quick_gelu": True, "text_cfg": {**_TEXT, "width": 64, "heads": 1}}
    vision = {"ViT": {"width": 64, "head_width": 64, "image_size": 32}, "ResNet": {"head_width": 64}}[tower]
    values["vision_cfg"] = {**values["vision_cfg"], **vision}  # OpenAI's heads are of 64 everywhere
    model = build(open_clip, values, tmp_path / "built")
    open_clip.model.convert_weights_to_fp16(model)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    data = inputs(values)
    # The file's own numbers, in float32: those of float16 products are no reference.
    assert_equal(ours(tmp_path / "model.pt", *data), theirs(model.float(), *data))


def test_every_published_configuration_is_read_or_refused(open_clip, tmp_path):
    """Names and shapes of all arrays of all models that open_clip lists, on a device without numbers."""
    import torch

    read, refused = [], []
    for name in open_clip.list_models():
        values = open_clip.get_model_config(name)
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
        try:
            config = read_open_clip(tmp_path / "open_clip_config.json")
        except ConfigError:
            refused.append(name)
            vision, text = values["vision_cfg"], values["text_cfg"]
            timm = vision.get("timm_model_name", "siglip")
            other = {"multimodal_cfg", "hf_model_name", "ls_init_value"} & {*values, *vision, *text}
            assert other or "siglip" not in timm, name
            continue
        read.append(name)
        with torch.device("meta"):
            state = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False, device="meta").state_dict()
        stored = {
            key: StoredLeaf(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."), lambda: np.empty(()))
            for key, leaf in state.items()
        }
        _audit(name, _wanted(config, TOWERS), _stored_parts(config, stored, TOWERS), stored, (), TOWERS)
    assert len(read) >= 80  # of 144 of version 3.3.0
    assert {"ViT-H-14-CLIPA-336", "RN50x64", "ViT-SO400M-14-SigLIP", "ViT-H-14-worldwide"} <= {*read}
    assert {"coca_ViT-B-32", "convnext_base_w", "EVA02-B-16", "MobileCLIP-B", "roberta-ViT-B-32"} <= {*refused}
