"""Makes the reference checkpoints and outputs in `clip/`, with HuggingFace's own Flax and torch CLIP.

Needs transformers 4.57.6 (the last with FlaxCLIPModel), flax 0.12.8, jax 0.10.2, torch 2.13; not jaxzs:

    python tests/golden/make_clip_goldens.py [--quickgelu FOLDER]

`gelu_first_eos` and `odd_sizes` are random models whose every parameter matters (biases, layer norms, attention far
from uniform); `variants/` is gelu_first_eos in every storage format. `quickgelu_legacy_eos`, made in the same way
from a seed that is not kept, is copied from FOLDER without the arrays that repeat others.

ref_image.npz   pixel_values_nchw, last_hidden_state, pooler_output, hidden_states_i, attention_i (first image),
                image_features, image_features_f64 (torch in float64)
ref_text.npz    CASE/: input_ids, attention_mask (absent where none was passed), last_hidden_state, pooler_output,
                hidden_states_i (some cases), text_features, text_embeds, image_embeds, logits_per_image,
                logits_per_text, *_f64; and contrastive_loss_f64 (first 3 rows of the first case, all 3 images)
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.serialization import msgpack_restore, to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    FlaxCLIPModel,
)
from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model

jax.config.update("jax_default_matmul_precision", "highest")
HERE = Path(__file__).parent / "clip"

GELU_FIRST_EOS = CLIPConfig(
    projection_dim=24,
    text_config={
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, "vocab_size": 64, "hidden_act": "gelu", "projection_dim": 24,
        "bos_token_id": 50, "eos_token_id": 51, "pad_token_id": 51,
    },
    vision_config={
        "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "patch_size": 8, "image_size": 32, "hidden_act": "gelu", "projection_dim": 24,
    },
)  # fmt: skip
# Head widths that are not powers of two, a patch of 14, and copies of projection_dim that must not count.
ODD_SIZES = CLIPConfig(
    projection_dim=20,
    text_config={
        "hidden_size": 35, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 5,
        "max_position_embeddings": 20, "vocab_size": 67, "hidden_act": "quick_gelu", "projection_dim": 512,
        "layer_norm_eps": 1e-6, "bos_token_id": 60, "eos_token_id": 61, "pad_token_id": 1,
    },
    vision_config={
        "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 3,
        "patch_size": 14, "image_size": 70, "hidden_act": "gelu", "projection_dim": 768,
        "layer_norm_eps": 1e-6,
    },
)  # fmt: skip


def random_params(config: CLIPConfig, seed: int) -> dict:
    """Random weights under which a wrong bias, scale, head order, activation or epsilon shows in the features."""
    rng = np.random.default_rng(seed)
    shapes = flatten_dict(FlaxCLIPModel(config, _do_init=False).init_weights(
        jax.random.key(0), ((1, 8), (1, config.vision_config.image_size, config.vision_config.image_size, 3))
    ), sep="/")  # fmt: skip
    leaves = {}
    for path, leaf in sorted(shapes.items()):
        noise = rng.standard_normal(leaf.shape)
        owner, name = ["", *path.split("/")][-2:]
        if path == "logit_scale":
            value = np.array(2.7)
        elif name == "scale":
            value = 1 + 0.2 * noise
        elif name == "bias":
            value = 0.1 * noise
        elif name == "embedding" or name == "class_embedding":
            value = 0.02 * noise  # small, so that the epsilon of the first layer norm matters
        elif owner in ("q_proj", "k_proj"):
            value = 1.2 * noise / np.sqrt(leaf.shape[0])  # attention far from uniform
        elif owner == "patch_embedding":
            value = 0.02 * noise / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            value = noise / np.sqrt(leaf.shape[0])
        leaves[path] = value.astype(np.float32)
    return unflatten_dict(leaves, sep="/")


def text_cases(config: CLIPConfig) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Token ids and masks: padding of every kind, ids above the end token, and a mask with a hole."""
    rng = np.random.default_rng(7)
    text = config.text_config
    length, bos, eos = text.max_position_embeddings, text.bos_token_id, text.eos_token_id

    def rows(length: int, counts: list[int], pad: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(counts), length), pad, np.int32)
        mask = np.zeros((len(counts), length), np.int32)
        for row, count in enumerate(counts):
            body = rng.integers(2, bos, count)
            body[count // 2] = text.vocab_size - 1  # above eos: argmax pooling would stop here
            ids[row, : count + 2] = [bos, *body, eos]
            mask[row, : count + 2] = 1
        return ids, mask

    full = [3, length - 2, 7, 1]
    eos_ids, eos_mask = rows(length, full, eos)
    zero_ids, zero_mask = rows(length, full, 0)
    short_ids, short_mask = rows(12, [3, 10, 5, 8], 1)
    hole_mask = short_mask.copy()
    hole_mask[:, 2] = 0
    return {
        "pad_eos_mask": (eos_ids, eos_mask),
        "pad_eos_nomask": (eos_ids, None),
        "pad_zero_nomask": (zero_ids, None),
        "pad_zero_mask": (zero_ids, zero_mask),
        "short12_pad1_mask": (short_ids, short_mask),
        "hole_mask": (short_ids, hole_mask),
    }


def torch_model(config: CLIPConfig, params: dict, dtype: torch.dtype) -> CLIPModel:
    torch.set_default_dtype(dtype)  # the causal mask is made in the default dtype
    config = copy.deepcopy(config)  # saving a model notes its dtype in the configuration
    config.dtype = dtype
    model = load_flax_weights_in_pytorch_model(CLIPModel._from_config(config), params)
    return model.to(dtype).eval()


def reference_outputs(folder: Path, config: CLIPConfig, params: dict) -> None:
    """ref_image.npz and ref_text.npz of one model, and agreement.json: how far Flax is from torch in float64."""
    flax = FlaxCLIPModel(config, _do_init=False)
    exact = torch_model(config, params, torch.float64)
    size = config.vision_config.image_size
    pixels = np.random.default_rng(5).standard_normal((3, 3, size, size)).astype(np.float32)
    agreement = {}

    vision = lambda module, x: module.vision_model(  # noqa: E731
        pixel_values=x, output_hidden_states=True, output_attentions=True
    )
    outputs = flax.module.apply({"params": params}, pixels.transpose(0, 2, 3, 1), method=vision)
    with torch.no_grad():
        image_features = exact.get_image_features(torch.from_numpy(pixels).double()).numpy()
    image = {
        "pixel_values_nchw": pixels,
        "last_hidden_state": outputs.last_hidden_state,
        "pooler_output": outputs.pooler_output,
        **{f"hidden_states_{i}": h for i, h in enumerate(outputs.hidden_states)},
        **{f"attention_{i}": a[:1] for i, a in enumerate(outputs.attentions)},
        "image_features": flax.get_image_features(pixels, params=params),
        "image_features_f64": image_features,
    }
    agreement["image_features"] = float(np.abs(image["image_features"] - image_features).max())

    text = {}
    for name, (ids, mask) in text_cases(config).items():
        both = flax(ids, pixels, attention_mask=mask, params=params)
        module_mask = np.ones_like(ids) if mask is None else mask
        tower = flax.module.apply(
            {"params": params}, ids, module_mask, jnp.arange(ids.shape[1])[None],
            method=lambda module, *args: module.text_model(*args, output_hidden_states=True),
        )  # fmt: skip
        torch_mask = None if mask is None else torch.from_numpy(mask).long()
        with torch.no_grad():
            double = exact(torch.from_numpy(ids).long(), torch.from_numpy(pixels).double(), torch_mask)
            features = exact.get_text_features(torch.from_numpy(ids).long(), torch_mask).numpy()
        case = {
            "input_ids": ids,
            "pooler_output": tower.pooler_output,
            "text_features": flax.get_text_features(ids, mask, params=params),
            "logits_per_image": both.logits_per_image,
            "logits_per_text": both.logits_per_text,
            "text_embeds": both.text_embeds,
            "image_embeds": both.image_embeds,
            "text_features_f64": features,
            "logits_per_image_f64": double.logits_per_image.numpy(),
            "last_hidden_state": tower.last_hidden_state,
        }
        if mask is not None:
            case["attention_mask"] = mask
        if name in ("pad_eos_mask", "hole_mask"):
            case |= {f"hidden_states_{i}": h for i, h in enumerate(tower.hidden_states)}
        agreement[f"{name} text_features"] = float(np.abs(case["text_features"] - features).max())
        agreement[f"{name} logits"] = float(np.abs(case["logits_per_image"] - case["logits_per_image_f64"]).max())
        text |= {f"{name}/{key}": value for key, value in case.items()}
        if name == "pad_eos_mask":
            logits = double.logits_per_text[:3]
            diagonal = torch.arange(3)
            loss = torch.nn.functional.cross_entropy
            text["contrastive_loss_f64"] = ((loss(logits, diagonal) + loss(logits.T, diagonal)) / 2).numpy()

    np.savez_compressed(folder / "ref_image.npz", **{k: np.asarray(v) for k, v in image.items()})
    np.savez_compressed(folder / "ref_text.npz", **{k: np.asarray(v) for k, v in text.items()})
    (folder / "agreement.json").write_text(json.dumps(agreement, indent=1) + "\n")
    assert max(agreement.values()) < 1e-5, agreement


def save_flax(folder: Path, config: CLIPConfig, params: dict, **options) -> None:
    FlaxCLIPModel(config, _do_init=False).save_pretrained(folder, params=params, **options)


def make_model(name: str, config: CLIPConfig, seed: int) -> dict:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    params = random_params(config, seed)
    save_flax(folder, config, params)
    reference_outputs(folder, config, msgpack_restore((folder / "flax_model.msgpack").read_bytes()))
    return params


def make_variants(config: CLIPConfig, params: dict) -> None:
    """The same weights in every format, as the libraries themselves write them."""
    root = HERE / "variants"
    shutil.rmtree(root, ignore_errors=True)
    torch32 = torch_model(config, params, torch.float32)
    torch32.save_pretrained(root / "safetensors_torch")
    save_flax(root / "safetensors_flax", config, params, safe_serialization=True)
    save_flax(root / "sharded_flax", config, params, max_shard_size="80KB")
    torch32.save_pretrained(root / "sharded_safetensors", max_shard_size="80KB")
    torch_bin = root / "torch_bin"
    torch32.config.save_pretrained(torch_bin)
    state = torch32.state_dict()
    for tower, length in (("text", 16), ("vision", 17)):  # buffers that older versions stored
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    torch.save(state, torch_bin / "pytorch_model.bin")

    with tempfile.TemporaryDirectory() as temporary:
        torch32.save_pretrained(temporary)
        CLIPVisionModelWithProjection.from_pretrained(temporary).save_pretrained(root / "vision_only")
        CLIPTextModelWithProjection.from_pretrained(temporary).save_pretrained(root / "text_only")

    reduced = {}
    ids, mask = text_cases(config)["pad_eos_mask"]
    pixels = np.load(HERE / "gelu_first_eos/ref_image.npz")["pixel_values_nchw"]
    for name, dtype in (("bf16", jnp.bfloat16), ("fp16", jnp.float16)):
        small = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)  # noqa: B023
        (root / name).mkdir()
        config.save_pretrained(root / name)
        (root / name / "flax_model.msgpack").write_bytes(to_bytes(small))
        upcast = jax.tree.map(lambda leaf: leaf.astype(np.float32), small)
        flax = FlaxCLIPModel(config, _do_init=False)
        reduced[f"{name}/image_features"] = flax.get_image_features(pixels, params=upcast)
        reduced[f"{name}/text_features"] = flax.get_text_features(ids, mask, params=upcast)
        torch_model(config, upcast, torch.float32).to(
            torch.bfloat16 if name == "bf16" else torch.float16
        ).save_pretrained(root / f"{name}_safetensors")
    np.savez_compressed(root / "ref_reduced.npz", **reduced)


def copy_quickgelu(source: Path) -> None:
    folder = HERE / "quickgelu_legacy_eos"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "flax_model.msgpack", "ref_image.npz", "agreement.json"):
        shutil.copyfile(source / name, folder / name)
    reference = dict(np.load(source / "ref_text.npz"))
    for name in list(reference):
        repeats = name.startswith(("pad_eos_nomask/", "pad_zero_")) and "last_hidden" in name
        if repeats or (name.startswith("short16") and "hidden_states" in name):
            del reference[name]
    np.savez_compressed(folder / "ref_text.npz", **reference)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quickgelu", type=Path, help="folder of the original quickgelu_legacy_eos")
    arguments = parser.parse_args()
    if arguments.quickgelu:
        copy_quickgelu(arguments.quickgelu)
    params = make_model("gelu_first_eos", GELU_FIRST_EOS, seed=1)
    make_variants(GELU_FIRST_EOS, params)
    make_model("odd_sizes", ODD_SIZES, seed=2)
