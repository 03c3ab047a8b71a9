"""Files of the other layouts, damaged at random and with intent: a valid load or a named error, nothing run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jaxzs
from jaxzs.clip import read_checkpoint
from jaxzs.clip.torch_zip import open_torch
from jaxzs.errors import CheckpointError, JaxzsError

GOLDEN = Path(__file__).parent / "golden" / "families"
FILES = {
    "open_clip safetensors": ("vit_gelu", "open_clip_model.safetensors"),
    "open_clip bin": ("vit_quickgelu_remainder_bin", "open_clip_pytorch_model.bin"),
    "open_clip configuration": ("vit_customtext_bias", "open_clip_config.json"),
    "OpenAI": ("openai_vit", "model.pt"),
    "OpenAI, ResNet": ("openai_rn", "model.pt"),
    "ResNet": ("rn_quickgelu", "open_clip_model.safetensors"),
    "big_vision": ("openclip_siglip", "big_vision.npz"),
    "siglip": ("hf_siglip", "model.safetensors"),
    "siglip configuration": ("hf_siglip", "config.json"),
    "NaFlex configuration": ("hf_siglip2_naflex", "config.json"),
}


def outcome(path: Path) -> str:
    try:
        read_checkpoint(path, place=lambda path, array: np.array(array))
    except JaxzsError as error:
        return type(error).__name__
    return "loaded"


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind, tmp_path):
    """Bits flipped and runs overwritten where the structure is: at both ends, and in the pickle."""
    name, file = FILES[kind]
    for source in ("open_clip_config.json", "config.json", file, "model.safetensors", "open_clip_model.safetensors"):
        if (GOLDEN / name / source).is_file():
            shutil.copy(GOLDEN / name / source, tmp_path)
    if kind == "big_vision":
        (tmp_path / "open_clip_config.json").unlink()  # sizes from the shapes
    path = tmp_path / file
    content, rng = path.read_bytes(), np.random.default_rng(0)
    ends = min(len(content) // 2, 12_000)
    places = np.r_[0:ends, len(content) - ends : len(content)]
    seen = set()
    for trial in range(60):
        damaged = bytearray(content)
        for place in rng.choice(places, rng.integers(1, 4)):
            damaged[place] = damaged[place] ^ (1 << rng.integers(8)) if trial % 2 else rng.integers(256)
        path.unlink()
        path.write_bytes(bytes(damaged[: len(damaged) - (trial % 7 == 0) * 9]))
        seen.add(outcome(path if "configuration" not in kind else tmp_path))
    assert seen - {"loaded"}, "no damage was noticed"


@pytest.mark.parametrize("name", ["vit_gelu", "hf_siglip", "hf_siglip2_naflex"])
def test_damaged_preprocessing(name, tmp_path):
    """A photo becomes pixels, finite ones, or an error says why not, whatever the file says of its preparation."""
    shutil.copytree(GOLDEN / name, tmp_path / "model")
    open_clip = tmp_path / "model" / "open_clip_config.json"
    path = open_clip if open_clip.is_file() else tmp_path / "model" / "preprocessor_config.json"
    content, rng, seen = path.read_bytes(), np.random.default_rng(0), set()
    start = content.find(b"preprocess_cfg") if path == open_clip else 0
    for _ in range(80):
        damaged = bytearray(content)
        for place in rng.integers(start, len(content), rng.integers(1, 3)):
            damaged[place] = rng.choice(np.frombuffer(b'0159-.e"[]{}:, anull', np.uint8))  # mostly still JSON
        path.write_bytes(bytes(damaged))
        try:
            model = jaxzs.load(tmp_path / "model", towers=("vision",))
            pixels = model.preprocess(np.zeros((20, 30, 3), np.uint8))
            assert np.isfinite(getattr(pixels, "values", pixels)).all()
            seen.add("loaded")
        except JaxzsError as error:
            seen.add(type(error).__name__)
    assert seen - {"loaded"}, "no damage was noticed"


# --- hostile torch archives ----------------------------------------------------------------------------------------


class _Runs:
    """A pickle that would run a program."""

    def __reduce__(self):
        return os.system, ("touch /tmp/jaxzs-was-run",)


def archive(path: Path, tree: bytes, *, compression: int = zipfile.ZIP_STORED, **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", tree)
        for name, content in others.items():
            file.writestr(f"model/{name}", content)
    return path


def nested(depth: int) -> dict:
    tree: dict = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def cyclic() -> dict:
    """Two dicts that hold each other many times: billions of paths through few objects."""
    one, other = {}, {}
    for i in range(50):
        one[f"k{i}"], other[f"k{i}"] = other, one
    return one


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, kind: str = "FloatStorage") -> bytes:
    """The pickle of {"logit_scale": tensor}, as torch writes it, of a storage "0" with 4 numbers."""
    stream = io.BytesIO()
    stream.write(b"\x80\x02}X\x0b\x00\x00\x00logit_scale")
    stream.write(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage" + f"ctorch\n{kind}\n".encode())
    stream.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ")
    numbers = lambda values: b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"  # noqa: E731
    stream.write(b"I%d\n" % offset + numbers(shape) + numbers(strides) + b"\x89}tRs.")
    return stream.getvalue()


HOSTILE = {
    "a program": (pickle.dumps({"a": _Runs()}), {}, "refers to 'posix.system'|refers to 'nt.system'"),
    "a builtin": (b"\x80\x02cbuiltins\neval\n.", {}, "refers to 'builtins.eval'"),
    "an attribute of a module": (b"\x80\x04\x8c\x05torch\x8c\x07os.path\x93.", {}, "refers to 'torch.os.path'"),
    "deep": (pickle.dumps(nested(60)), {}, "nested too deeply"),
    "not a pickle": (b"nothing", {}, "damaged"),
    "a storage that is absent": (tensor((4,), (1,)), {}, "missing"),
    "a short storage": (tensor((4,), (1,)), {"data/0": b"1234"}, "not of the length"),
    "too many elements": (tensor((5,), (1,)), {"data/0": bytes(16)}, "outside its storage"),
    "strides of 0": (tensor((2**40,), (0,)), {"data/0": bytes(16)}, "more elements than are stored"),
    "a negative stride": (tensor((4,), (-1,), 3), {"data/0": bytes(16)}, "outside its storage"),
    "a negative offset": (tensor((1,), (1,), -1), {"data/0": bytes(16)}, "outside its storage"),
    "an unknown type": (tensor((4,), (1,), 0, "QuantStorage"), {"data/0": bytes(16)}, "torch.QuantStorage"),
    "another byte order": (tensor((4,), (1,)), {"data/0": bytes(16), "byteorder": b"big"}, "little-endian"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives(kind, tmp_path):
    tree, others, message = HOSTILE[kind]
    archive(tmp_path / "pytorch_model.bin", tree, **others)
    shutil.copy(GOLDEN / "hf_siglip" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)
    assert not Path("/tmp/jaxzs-was-run").exists()


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_state_of_an_optimizer_is_left_unread(key, tmp_path):
    """Beside the model in the files of a training, where it was a name too many for each moment of each leaf."""
    word = lambda text: b"X" + len(text).to_bytes(4, "little") + text.encode()  # noqa: E731
    leaf = tensor((4,), (1,))[2:-1]  # without the pickle's beginning and its end
    both = b"\x80\x02}" + word("optimizer") + leaf + b"s" + word(key) + leaf + b"s."
    archive(tmp_path / "pytorch_model.bin", both, **{"data/0": bytes(16)})
    assert [*open_torch(tmp_path / "pytorch_model.bin")] == ["logit_scale"]


def test_dicts_that_hold_each_other_end(tmp_path):
    archive(tmp_path / "pytorch_model.bin", pickle.dumps(cyclic()))
    shutil.copy(GOLDEN / "hf_siglip" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="every array that is expected"):
        read_checkpoint(tmp_path)


def test_compressed_data_is_refused(tmp_path):
    archive(tmp_path / "pytorch_model.bin", pickle.dumps({}), compression=zipfile.ZIP_DEFLATED)
    shutil.copy(GOLDEN / "hf_siglip" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="compressed data"):
        read_checkpoint(tmp_path)


def test_training_checkpoints_of_open_clip(tmp_path):
    """Without its JSON beside it a file cannot tell its activation, and says so."""
    stored = tensor((4,), (1,))
    archive(tmp_path / "epoch_1.pt", stored, **{"data/0": bytes(16)})
    with pytest.raises(JaxzsError, match=r"open_clip_config\.json"):
        read_checkpoint(tmp_path / "epoch_1.pt")
