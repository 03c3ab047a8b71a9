"""Checkpoints are untrusted input: whatever is in them, a valid load or a named error, and no large allocation."""

from __future__ import annotations

import json
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest

from jaxzs.clip.config import CLIPConfig, TextConfig, VisionConfig
from jaxzs.clip.params import abstract_params, flatten, unflatten
from jaxzs.clip.weights import read_checkpoint, write_checkpoint
from jaxzs.errors import JaxzsError

# So small that most bytes of a file are structure, not numbers.
CONFIG = CLIPConfig(
    text=TextConfig(4, 6, 1, 2, 9, 5, eos_token_id=8, bos_token_id=7),
    vision=VisionConfig(6, 8, 1, 3, image_size=4, patch_size=2),
    projection_dim=3,
)
FILES = {"flax": "flax_model.msgpack", "safetensors": "model.safetensors"}
LARGEST = 8 * 2**20  # bytes allocated at any time; the files have 20 kB


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> dict[str, Path]:
    """A valid checkpoint in each format."""
    rng = np.random.default_rng(0)
    params = unflatten(
        {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in flatten(abstract_params(CONFIG))}
    )
    folders = {}
    for format in FILES:
        folders[format] = tmp_path_factory.mktemp(format)
        write_checkpoint(folders[format], params, CONFIG, format=format)
        read_checkpoint(folders[format])
    return folders


@pytest.fixture(autouse=True)
def _no_large_allocation():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGEST, f"{peak} bytes were allocated"


def outcome(folder: Path) -> str:
    """What reading ends in; anything but a valid load or an error of ours propagates and fails the test."""
    try:
        read_checkpoint(folder, place=lambda path, array: np.array(array))
    except JaxzsError as error:
        return type(error).__name__
    return "loaded"


# --- random damage -------------------------------------------------------------------------------------------------


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    for position in rng.integers(0, len(content), rng.integers(1, 4)):
        damaged[position] ^= 1 << rng.integers(8)
    return bytes(damaged)


def overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    """A run of bytes that tend to mean large lengths, deep nesting or nothing."""
    position = rng.integers(0, len(content))
    run = bytes(rng.choice([0x00, 0xFF, 0x81, 0xC9, 0xDF, 0xDB, 0x7B, 0x5B], rng.integers(1, 9)))
    return content[:position] + run + content[position + len(run) :]


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(0, len(content))]


def insert_or_delete(content: bytes, rng: np.random.Generator) -> bytes:
    position, count = rng.integers(0, len(content)), rng.integers(1, 20)
    if rng.random() < 0.5:
        return content[:position] + rng.bytes(count) + content[position:]
    return content[:position] + content[position + count :]


def move(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(content), 2))
    target = rng.integers(0, len(content))
    rest = content[:start] + content[end:]
    return rest[:target] + content[start:end] + rest[target:]


DAMAGES: list[Callable] = [flip, overwrite, truncate, insert_or_delete, move]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("format", FILES)
def test_damaged_weights(format, damage, intact, tmp_path):
    folder = Path(shutil.copytree(intact[format], tmp_path / "damaged"))
    content = (folder / FILES[format]).read_bytes()
    rng = np.random.default_rng(1)
    outcomes = []
    for _ in range(40):
        (folder / FILES[format]).write_bytes(damage(content, rng))
        outcomes.append(outcome(folder))
    assert outcomes.count("CheckpointError") > 10  # the damage did reach the structure


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_configuration(damage, intact, tmp_path):
    folder = Path(shutil.copytree(intact["flax"], tmp_path / "damaged"))
    content = (folder / "config.json").read_bytes()
    rng = np.random.default_rng(2)
    outcomes = []
    for _ in range(40):
        (folder / "config.json").write_bytes(damage(content, rng))
        outcomes.append(outcome(folder))
    assert outcomes.count("loaded") < 40


# --- numbers that lie ----------------------------------------------------------------------------------------------

NONSENSE = [-1, 0, 1, 7, 10**30, 2.5, 1e308, float("nan"), float("inf"), "7", "", None, True, [], [3], {}, {"a": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("section", [None, "text_config", "vision_config"])
def test_nonsense_in_the_configuration(section, intact, tmp_path):
    folder = Path(shutil.copytree(intact["safetensors"], tmp_path / "nonsense"))
    for key in CONFIG.to_hf()[section] if section else CONFIG.to_hf():
        for value in NONSENSE:
            values = CONFIG.to_hf()
            (values[section] if section else values)[key] = value
            (folder / "config.json").write_text(json.dumps(values))
            outcome(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"projection_dim": ' + b"9" * 5000 + b', "model_type": "clip"}',
        b"\xff\xfe{\x00}\x00",
        b'{"model_type": "\xff"}',
        b'{"model_type": ["clip"]}',
        b"[]",
        b"null",
        b"\0" * 1000,
        b"{}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_configurations_that_are_none(content, intact, tmp_path):
    folder = Path(shutil.copytree(intact["flax"], tmp_path / "bad"))
    (folder / "config.json").write_bytes(content)
    assert outcome(folder) == "ConfigError"


# --- msgpack made to hurt ------------------------------------------------------------------------------------------


def array(shape: object, dtype: object = "float32", content: object = b"\0\0\0\0") -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))


def one_leaf(leaf: object) -> bytes:
    return msgpack.packb({"logit_scale": leaf})


NAME = b"\x81\xa1a"  # {"a": ...
MSGPACK_BOMBS = {
    "nested maps": NAME * 100_000,
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "name of 4 GB": b"\x81\xdb\xff\xff\xff\xff",
    "extension of 4 GB": NAME + b"\xc9\xff\xff\xff\xff\x01",
    "array of 4 billion": NAME + b"\xdd\xff\xff\xff\xff",
    "bytes of 4 GB": NAME + b"\xc9\x00\x00\x00\x20\x01\x93\x90\xa7float32\xc6\xff\xff\xff\xff",
    "negative dimension": one_leaf(array([-1])),
    "dimension of 2^63": one_leaf(array([2**63])),
    "product of 2^60": one_leaf(array([2**30, 2**30])),
    "product that wraps to 1": one_leaf(array([2**32 + 1, 2**32 - 1])),
    "fractional dimension": one_leaf(array([1.0])),
    "shape is a string": one_leaf(array("11")),
    "many dimensions": one_leaf(array([1] * 15)),
    "more dimensions": one_leaf(array([1] * 100)),
    "zero and huge": one_leaf(array([0, 2**39], content=b"")),
    "objects": one_leaf(array([1], "object", b"\0" * 8)),
    "unknown type": one_leaf(array([1], "U1000000")),
    "type is a number": one_leaf(array([], 3)),
    "content is a string": one_leaf(array([], "float32", "0000")),
    "empty extension": one_leaf(msgpack.ExtType(1, b"")),
    "scalar extension": one_leaf(msgpack.ExtType(3, b"abc")),
    "complex": one_leaf(msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))),
    "number": one_leaf(3),
    "list": one_leaf([1, 2]),
    "nothing": one_leaf(None),
    "number as name": msgpack.packb({3: array([])}),
    "same name twice": b"\x82" + 2 * one_leaf(array([]))[1:],
    "name with slashes": msgpack.packb({"a//b/": {"": array([])}, "a": {"/b": {"": array([])}}}),
    "name that is no UTF-8": b"\x81\xa2\xff\xfe" + msgpack.packb(array([])),
    "many leaves": msgpack.packb({str(k): array([]) for k in range(3000)}),
    "list at the top": msgpack.packb([array([])]),
}


@pytest.mark.parametrize("kind", MSGPACK_BOMBS)
def test_hostile_msgpack(kind, intact, tmp_path):
    folder = Path(shutil.copytree(intact["flax"], tmp_path / "bad"))
    (folder / FILES["flax"]).write_bytes(MSGPACK_BOMBS[kind])
    assert outcome(folder) == "CheckpointError"


# --- safetensors made to hurt --------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"\0\0\0\0", claimed: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if claimed is None else claimed) + encoded + data


def entry(shape: object, begin: object = 0, end: object = 4, dtype: object = "F32") -> dict:
    return {"logit_scale": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


SAFETENSORS_BOMBS = {
    "header of 16 EB": safetensors({}, claimed=2**64 - 1),
    "header of 2 GB": safetensors({}, claimed=2**31),
    "header past the end": safetensors(entry([]), claimed=500),
    "nested lists": safetensors(b'{"a":' + b"[" * 100_000),
    "nested objects": safetensors(b'{"a":' * 100_000),
    "no JSON": safetensors(b"{what?"),
    "number of 5000 digits": safetensors(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"),
    "same name twice": safetensors(b'{"a":{},"a":{}}'),
    "entry is a list": safetensors({"a": []}),
    "entry lacks its type": safetensors({"a": {"shape": [], "data_offsets": [0, 4]}}),
    "negative dimension": safetensors(entry([-1])),
    "two negative dimensions": safetensors(entry([-1, -1])),
    "dimension of 2^63": safetensors(entry([2**63])),
    "product of 2^60": safetensors(entry([2**30, 2**30], 0, 2**62)),
    "fractional dimension": safetensors(entry([1.0])),
    "true as a dimension": safetensors(entry([True])),
    "shape is a string": safetensors(entry("1")),
    "shape is absent": safetensors(entry(None)),
    "negative offset": safetensors(entry([], -4, 0)),
    "offsets reversed": safetensors(entry([], 4, 0)),
    "fractional offset": safetensors(entry([], 0.0, 4.0)),
    "offsets past the end": safetensors(entry([], 4, 8)),
    "leaf of 4 EB": safetensors(entry([2**39, 2**21], 0, 2**62)),
    "unknown type": safetensors(entry([], dtype="F99")),
    "unknown type, huge": safetensors(entry([2**39], 0, 2**62, "F99")),
    "type is a list": safetensors(entry([], dtype=["F32"])),
    "eight-bit floats": safetensors(entry([4], dtype="F8_E4M3")),
    "overlap": safetensors({"a": entry([])["logit_scale"], "b": entry([])["logit_scale"]}),
    "gap": safetensors(entry([], 4, 8), b"\0" * 8),
    "no leaves": safetensors({}, b""),
    "many leaves": safetensors(
        {str(k): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(3000)}, b""
    ),
}


@pytest.mark.parametrize("kind", SAFETENSORS_BOMBS)
def test_hostile_safetensors(kind, intact, tmp_path):
    folder = Path(shutil.copytree(intact["safetensors"], tmp_path / "bad"))
    (folder / FILES["safetensors"]).write_bytes(SAFETENSORS_BOMBS[kind])
    assert outcome(folder) == "CheckpointError"


@pytest.mark.parametrize(
    "weight_map",
    [
        None, 3, [], "model.safetensors", {"a": 3}, {"a": None}, {"a": ["x"]}, {}, {"a": ""}, {"a": "."},
        {"a": ".."}, {"a": "/etc/hostname"}, {"a": "../x"}, {"a": "x/../../y"}, {"a": "x\0y"},
        {"a": "C:\\x"}, {"a": "x" * 5000}, {"a": "*"}, {"a": "config.json"},
        {"a": "model.safetensors.index.json"}, {str(k): f"shard-{k}" for k in range(5000)},
    ],
)  # fmt: skip
def test_hostile_index(weight_map, intact, tmp_path):
    folder = Path(shutil.copytree(intact["safetensors"], tmp_path / "bad"))
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert outcome(folder) == "CheckpointError"


# --- well-formed files of the wrong content ------------------------------------------------------------------------


def test_swapped_leaves(intact, tmp_path):
    """Two leaves that change places are found by their shapes wherever these differ."""
    folder = Path(shutil.copytree(intact["flax"], tmp_path / "swapped"))
    params, _ = read_checkpoint(folder)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params)}
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(40):
        one, other = rng.choice(sorted(leaves), 2, replace=False)
        swapped = {**leaves, one: leaves[other], other: leaves[one]}
        file = folder / FILES["flax"]
        file.write_bytes(msgpack.packb(_packable(unflatten(swapped))))
        differ = leaves[one].shape != leaves[other].shape
        assert outcome(folder) == ("CheckpointError" if differ else "loaded")
        found += differ
    assert found > 20


def _packable(tree: dict) -> dict:
    return {
        name: _packable(node) if isinstance(node, dict) else array(list(node.shape), node.dtype.name, node.tobytes())
        for name, node in tree.items()
    }


def test_a_large_configuration_allocates_nothing(intact, tmp_path):
    """Sizes in config.json are compared with the file's headers before any array is made."""
    folder = Path(shutil.copytree(intact["flax"], tmp_path / "large"))
    values = CONFIG.to_hf()
    values["text_config"] |= {"hidden_size": 16384, "vocab_size": 2_000_000, "num_hidden_layers": 200}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(JaxzsError) as caught:
        read_checkpoint(folder)
    missing = re.search(r"\((\d+) missing", str(caught.value))
    assert missing
    assert int(missing[1]) == 199 * 16
