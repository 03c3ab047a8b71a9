"""Random models of transformers' own classes, of every family that it has: CLIP, MetaCLIP 2, SigLIP, NaFlex."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from torch_models import assert_near, randomize

import jaxzs
from jaxzs import clip, data
from jaxzs.classification import Encoding, encode_source

TRANSFORMERS = ("4.57.", "5.")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

_TEXT = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 12,
}  # fmt: skip
_VISION = {
    "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WIDE = {**_TEXT, "hidden_size": 48}  # SigLIP's images have no projection: both are as wide as the shared space
# Class, configuration of the texts, of the images.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "CLIP": ("CLIP", {**_TEXT, "eos_token_id": 99}, _VISION),
    "CLIP, gelu": ("CLIP", {**_TEXT, "eos_token_id": 99, "hidden_act": "gelu"}, {**_VISION, "hidden_act": "gelu"}),
    "MetaCLIP 2": ("MetaClip2", {**_TEXT, "eos_token_id": 2}, _VISION),
    "SigLIP": ("Siglip", _WIDE, _VISION),
    "SigLIP, a narrow text tower": ("Siglip", {**_TEXT, "projection_size": 48}, _VISION),
    "SigLIP 2, NaFlex": ("Siglip2", _WIDE, {**_VISION, "num_patches": 16}),
}


def write(name: str, folder: Path):
    """The torch model, its random weights and its configuration in a folder."""
    import transformers

    kind, text, vision = MODELS[name]
    more = {} if kind.startswith("Siglip") else {"projection_dim": 24}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    model = getattr(transformers, f"{kind}Model")(config)
    randomize(model)
    model.save_pretrained(folder)
    return model


def inputs(name: str) -> tuple[dict[str, np.ndarray], Any, np.ndarray]:
    """Images as torch takes them, the same as jaxzs takes them, and ids of texts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 99, (4, 12))
    ids[:, -1] = 99  # CLIP's end token; SigLIP reads this place whatever it holds
    ids[:, 6] = 2 if name == "MetaCLIP 2" else 50  # there the end, whatever higher ids there are
    if "NaFlex" not in name:
        pixels = rng.standard_normal((3, 32, 32, 3)).astype(np.float32)
        return {"pixel_values": pixels.transpose(0, 3, 1, 2)}, pixels, ids
    patches = rng.standard_normal((3, 20, 8 * 8 * 3)).astype(np.float32)
    shapes = np.array([[4, 5], [3, 6], [7, 2]])  # none of them the square that the positions were learned on
    mask = np.arange(20)[None] < shapes.prod(1)[:, None]
    torch_inputs = {"pixel_values": patches, "pixel_attention_mask": mask.astype(np.int64), "spatial_shapes": shapes}
    return torch_inputs, clip.Patches(patches, mask, shapes), ids


def features(outputs) -> np.ndarray:
    """transformers 5 gives an output, 4 the array."""
    return getattr(outputs, "pooler_output", outputs).numpy()


def theirs(model, images: dict[str, np.ndarray], ids: np.ndarray) -> tuple[np.ndarray, ...]:
    import torch

    with torch.no_grad():
        images = {key: torch.from_numpy(value) for key, value in images.items()}
        texts = torch.from_numpy(ids)
        logits = model(input_ids=texts, **images).logits_per_image
        return features(model.get_image_features(**images)), features(model.get_text_features(texts)), logits.numpy()


def ours(folder: Path, images: Any, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    params, config = clip.read_checkpoint(folder)
    with jax.default_matmul_precision("highest"):
        own = clip.encode_image(params, images, config), clip.encode_text(params, ids, config)
        logits = clip.logits_per_image(*own, params["logit_scale"], params.get("logit_bias"))
    return (*map(np.asarray, own), np.asarray(logits))


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_is_read(name, tmp_path):
    """Features, and logits with scale and bias."""
    model = write(name, tmp_path)
    images, own_images, ids = inputs(name)
    for own, other in zip(ours(tmp_path, own_images, ids), theirs(model, images, ids), strict=True):
        assert own.std() > 0
        assert_near(own, other)


def test_files_of_any_aspect(tmp_path):
    """NaFlex from image files to features: transformers' own processor and model against a source that is encoded."""
    import torch
    import transformers

    kind = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
    model = write("SigLIP 2, NaFlex", tmp_path)
    processor = kind(patch_size=8, max_num_patches=20, do_convert_rgb=True)
    processor.save_pretrained(tmp_path)
    rng, files = np.random.default_rng(0), []
    # transformers 4 resizes positions by torch, which gives every row of one column the first row's.
    line = (1000, 130) if transformers.__version__.startswith("4.") else (1000, 10)
    for number, (shape, mode) in enumerate(
        [((1, 1), "RGB"), ((10, 1000), "L"), (line, "RGBA"), ((60, 61), "P"), ((300, 200), "LA"), ((33, 57), "1")]
    ):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).convert(mode).save(files[-1])
    inputs = processor([Image.open(file) for file in files], return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        other = features(model.get_image_features(**inputs))
    found, _, unreadable = encode_source(
        jaxzs.load(tmp_path, towers=("vision",)),
        data.open_images(files),
        Encoding(3, clip.Numerics(precision="highest")),
    )
    assert not unreadable
    assert_near(np.asarray(found), other / np.linalg.norm(other, axis=1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(name, tmp_path):
    """No key missing, none unexpected, and the features of the model that it was made from."""
    model = write(name, tmp_path / "theirs")
    clip.write_checkpoint(tmp_path / "ours", *clip.read_checkpoint(tmp_path / "theirs"), format="safetensors")
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    images, _, ids = inputs(name)
    for own, other in zip(theirs(again.eval(), images, ids), theirs(model, images, ids), strict=True):
        assert_near(own, other)
