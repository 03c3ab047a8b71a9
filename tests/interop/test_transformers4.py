"""Checkpoints cross by file into the libraries that define the formats, and back."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzs import clip
from jaxzs.clip.params import random_params
from jaxzs.clip.weights import fingerprint, read_checkpoint, write_checkpoint
from jaxzs.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden/clip"
MODELS = ("quickgelu_legacy_eos", "gelu_first_eos", "odd_sizes")
TRANSFORMERS = "4.57."
TOLERANCE = 2e-5  # float32 on both sides, features of order 1 to 5, logits of order 10

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # other people's deprecations
    pytest.mark.usefixtures("plain_jax"),
]


def inputs(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels NCHW, token ids and a mask with a hole, of the golden model in `folder`."""
    texts = np.load(folder / "ref_text.npz")
    pixels = np.load(folder / "ref_image.npz")["pixel_values_nchw"]
    return pixels, texts["hole_mask/input_ids"], texts["hole_mask/attention_mask"]


def our_features(folder: Path, pixels, ids, mask) -> tuple[np.ndarray, np.ndarray]:
    params, config = read_checkpoint(folder, dtype=jnp.float32)
    image = clip.encode_image(params, pixels.transpose(0, 2, 3, 1), config)
    return np.asarray(image), np.asarray(clip.encode_text(params, ids, config, mask))


def torch_features(folder: Path, pixels, ids, mask) -> tuple[np.ndarray, np.ndarray, dict]:
    import torch
    from transformers import CLIPModel

    model, info = CLIPModel.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    with torch.no_grad():
        image = model.eval().get_image_features(torch.from_numpy(pixels)).numpy()
        text = model.get_text_features(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).numpy()
    return image, text, info


def flax_features(folder: Path, pixels, ids, mask) -> tuple[np.ndarray, np.ndarray, dict]:
    from flax.traverse_util import flatten_dict
    from transformers import FlaxCLIPModel

    model, params = FlaxCLIPModel.from_pretrained(folder, _do_init=False)
    loaded = set(flatten_dict(params))
    keys = {"missing_keys": set(model.required_params) - loaded, "unexpected_keys": loaded - set(model.required_params)}
    features = jax.jit(
        lambda params: (
            model.get_image_features(pixels, params=params),
            model.get_text_features(ids, mask, params=params),
        )
    )(params)
    return *map(np.asarray, features), keys


def assert_close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["safetensors", "flax", "safetensors-flax"])
def test_written_checkpoints_load_without_a_missing_key(name, format, tmp_path):
    """Read the golden checkpoint, write it, load it with transformers: same features, all keys accounted for."""
    params, config = read_checkpoint(GOLDEN / name)
    write_checkpoint(tmp_path, params, config, format=format)
    data = inputs(GOLDEN / name)
    load = torch_features if format == "safetensors" else flax_features
    image, text, keys = load(tmp_path, *data)
    assert not keys["missing_keys"]
    assert not keys["unexpected_keys"]
    our_image, our_text = our_features(tmp_path, *data)
    assert_close(our_image, image)
    assert_close(our_text, text)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("format", ["safetensors", "flax"])
def test_half_precision_crosses_unchanged(dtype, format, tmp_path):
    params, config = read_checkpoint(GOLDEN / "odd_sizes", dtype=dtype)
    write_checkpoint(tmp_path, params, config, format=format)
    data = inputs(GOLDEN / "odd_sizes")
    if format == "safetensors":
        import torch
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(tmp_path, torch_dtype="auto")
        kinds = {parameter.dtype for parameter in model.parameters()}
        assert kinds == {torch.float16 if dtype == jnp.float16 else torch.bfloat16}
        theirs = torch_features(tmp_path, *data)[:2]
    else:
        from flax.serialization import msgpack_restore
        from transformers import CLIPConfig, FlaxCLIPModel

        stored = msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes())
        assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype(dtype)}
        upcast = jax.tree.map(lambda leaf: leaf.astype(np.float32), stored)
        model = FlaxCLIPModel(CLIPConfig.from_pretrained(tmp_path), _do_init=False)
        theirs = (
            model.get_image_features(data[0], params=upcast),
            model.get_text_features(data[1], data[2], params=upcast),
        )
    for ours, other in zip(our_features(tmp_path, *data), theirs, strict=True):
        assert_close(ours, other)


def test_a_model_of_our_own_crosses(tmp_path):
    """Random weights of our own initialisation, written both ways: torch and Flax agree with us."""
    _, config = read_checkpoint(GOLDEN / "gelu_first_eos")
    params = random_params(jax.random.key(3), config)
    data = inputs(GOLDEN / "gelu_first_eos")
    write_checkpoint(tmp_path / "torch", params, config, format="safetensors")
    write_checkpoint(tmp_path / "flax", params, config, format="flax")
    ours = our_features(tmp_path / "torch", *data)
    for theirs in (torch_features(tmp_path / "torch", *data), flax_features(tmp_path / "flax", *data)):
        assert_close(ours[0], theirs[0])
        assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "flax", "flax-safetensors"])
def test_what_transformers_saves_is_read(kind, sharded, tmp_path):
    """Every format that transformers 4.57 can save, from the same weights, gives the same fingerprint."""
    from transformers import CLIPModel, FlaxCLIPModel

    source = GOLDEN / "gelu_first_eos"
    params, config = read_checkpoint(source)
    size = {"max_shard_size": "80KB"} if sharded else {}
    if kind.startswith("flax"):
        model, loaded = FlaxCLIPModel.from_pretrained(source, _do_init=False)
        safe = kind == "flax-safetensors"  # transformers writes these in one file, whatever the size
        model.save_pretrained(tmp_path, params=loaded, safe_serialization=safe, **size)
    else:
        model = CLIPModel.from_pretrained(GOLDEN / "variants/safetensors_torch")
        model.save_pretrained(tmp_path, safe_serialization=kind == "safetensors", **size)
    if sharded and kind != "flax-safetensors":
        assert len(list(tmp_path.glob("*.index.json"))) == 1
    assert fingerprint(*read_checkpoint(tmp_path)) == fingerprint(params, config)


def test_towers_saved_alone_are_read(tmp_path):
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    source = GOLDEN / "variants/safetensors_torch"
    full, _ = read_checkpoint(source)
    for tower, kind in (("vision", CLIPVisionModelWithProjection), ("text", CLIPTextModelWithProjection)):
        kind.from_pretrained(source).save_pretrained(tmp_path / tower)
        params, _ = read_checkpoint(tmp_path / tower, towers=(tower,))
        jax.tree.map(np.testing.assert_array_equal, params, {name: full[name] for name in params})


# --- pytorch_model.bin: tensors only, nothing executed -----------------------------------------------------------


def copy_config(folder: Path) -> Path:
    (folder / "config.json").write_bytes((GOLDEN / "gelu_first_eos/config.json").read_bytes())
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_files(dtype, tmp_path):
    import torch

    stored = torch.load(GOLDEN / "variants/torch_bin/pytorch_model.bin", weights_only=True)
    assert "text_model.embeddings.position_ids" in stored
    half = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value for name, value in stored.items()
    }
    torch.save(half, copy_config(tmp_path))
    params, _ = read_checkpoint(tmp_path)
    expected, _ = read_checkpoint(GOLDEN / "gelu_first_eos", dtype=jnp.dtype(dtype))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_pickle_is_executed(form, tmp_path):
    import torch

    target = tmp_path / "executed"
    file = copy_config(tmp_path)
    if form == "pickle":
        file.write_bytes(pickle.dumps({"weights": Attack(target)}))
    else:
        new = form == "zip"
        torch.save({"weights": Attack(target)}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"nothing is run|never executed"):
        read_checkpoint(tmp_path)
    assert not target.exists()


def test_torch_files_that_lie_about_sizes(tmp_path):
    import torch

    file = copy_config(tmp_path)
    torch.save({"a": torch.zeros(()).expand(1 << 20, 1 << 20)}, file)
    with pytest.raises(CheckpointError, match="claims more elements than are stored"):
        read_checkpoint(tmp_path)
    torch.save([torch.zeros(3)], file)
    with pytest.raises(CheckpointError, match="0 stored"):
        read_checkpoint(tmp_path)
    torch.save({"a": torch.zeros(3).to_sparse(), "b": 3}, file)
    with pytest.raises(CheckpointError, match="nothing is run"):
        read_checkpoint(tmp_path)


def test_compressed_and_damaged_torch_files(tmp_path):
    """torch never compresses; a compressed record could unpack to any size."""
    source = GOLDEN / "variants/torch_bin/pytorch_model.bin"
    file = copy_config(tmp_path)
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for entry in stored.infolist():
            made.writestr(entry.filename, stored.read(entry))
    with pytest.raises(CheckpointError, match="compressed data"):
        read_checkpoint(tmp_path)

    content = source.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] = rng.integers(256)
        if rng.random() < 0.5:
            start = len(content) - rng.integers(1, 12_000)  # the directory of the zip file
            damaged[start] ^= 1 << rng.integers(8)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(4, len(damaged))]
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            read_checkpoint(tmp_path)
