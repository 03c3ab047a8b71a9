"""Weight files, opened without trusting them: safetensors, Flax msgpack, torch zip files.

Each opener returns what the file holds by name, with shape and dtype from its headers; no array is read until
`StoredLeaf.read` is called, and safetensors and msgpack leaves are then views into the memory-mapped file. Every
length in a header is checked against the file's size first, and nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxzs.clip.files import known_stranger
from jaxzs.errors import CheckpointError, DependencyError

FLOATS: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_MAX_HEADER_BYTES = 16 * 2**20  # that of the largest CLIP takes 0.2 MB
_MAX_LEAVES = 100_000
_MAX_DEPTH = 16  # the deepest leaf of a CLIP lies 8 levels down


@dataclass(frozen=True)
class StoredLeaf:
    """One array in a weight file, not read yet. dtype is the stored name; only `FLOATS` can be read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def open_weights(path: Path) -> dict[str, StoredLeaf]:
    """What a weight file holds, by name; the format is told from the content, not from the file's name.

    Raises `CheckpointError` for anything that is not a whole, well-formed safetensors, Flax msgpack or torch zip
    file, and `DependencyError` for a torch file where torch is not installed.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            if (stranger := known_stranger(start)) is not None:
                raise CheckpointError(f"{path} is {stranger}. Or give the hub id, to download it again.")
            if start.startswith(b"PK\x03\x04"):
                return _open_torch(path)
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start[4:9] == b"\0\0\0\0{" and size >= 10:  # a header of less than 4 GB, in JSON
        return _open_safetensors(path, buffer)
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise CheckpointError(
            f"{path}: a pickle file (torch before 1.6); pickles are never executed. Save it again with a "
            "current torch (torch.save) or as safetensors."
        )
    if start[0] in range(0x80, 0x90) or start[0] in (0xDE, 0xDF):
        return _open_msgpack(path, buffer)
    raise CheckpointError(
        f"{path}: not a weight file: starts with {start[:16]!r}, which is neither safetensors, Flax msgpack nor "
        "a torch zip file. Download it again."
    )


def _parse_header(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name occurs twice in one object")
        return dict(pairs)

    try:
        header = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return header


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape)


def _view(buffer: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    flat = np.frombuffer(buffer, FLOATS[dtype], count=math.prod(shape), offset=offset)
    return flat.reshape(shape)


# --- safetensors: 8 bytes header length, JSON header, then the leaves without gaps -------------------------------


def _open_safetensors(path: Path, buffer: mmap.mmap) -> dict[str, StoredLeaf]:
    (header_size,) = struct.unpack("<Q", buffer[:8])
    if header_size > min(_MAX_HEADER_BYTES, len(buffer) - 8):
        raise CheckpointError(
            f"{path}: the safetensors header claims {header_size} bytes, the file has {len(buffer)}; "
            "truncated or damaged. Download it again."
        )
    header = _parse_header(path, buffer[8 : 8 + header_size])
    header.pop("__metadata__", None)
    data_start = 8 + header_size
    leaves: dict[str, StoredLeaf] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": shape, "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise CheckpointError(f"{path}: malformed header entry for {name[:200]!r}")
        dtype = SAFETENSORS_DTYPES.get(dtype, dtype[:20])
        if not _is_shape(shape) or not 0 <= begin <= end:
            raise CheckpointError(f"{path}: impossible shape or offsets for {name[:200]!r}")
        if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != end - begin:
            raise CheckpointError(f"{path}: {name[:200]!r} is {dtype} {tuple(shape)} but has {end - begin} bytes")
        leaves[name] = _mapped_leaf(buffer, data_start + begin, tuple(shape), dtype)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: leaves overlap or leave gaps at byte {data_start + begin}")
        position = end
    _check_end(path, data_start + position, len(buffer))
    return leaves


def _mapped_leaf(buffer: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: str) -> StoredLeaf:
    return StoredLeaf(shape, dtype, lambda: _view(buffer, offset, shape, dtype))


def _check_not_truncated(path: Path, end: int, size: int) -> None:
    if end > size:
        raise CheckpointError(
            f"{path}: truncated: its headers ask for {end} bytes, the file has {size}. Download it again."
        )


def _check_end(path: Path, end: int, size: int) -> None:
    _check_not_truncated(path, end, size)
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after the end of the weights; damaged")


# --- Flax msgpack: nested maps of strings; an array is extension 1 around [shape, dtype name, bytes] --------------

_FLAX_ARRAY = 1


def _open_msgpack(path: Path, buffer: mmap.mmap) -> dict[str, StoredLeaf]:
    leaves: dict[str, StoredLeaf] = {}
    scan = _MsgpackScan(path, buffer)

    def read_map(prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{path}: maps nested deeper than {_MAX_DEPTH}; not a CLIP")
        for _ in range(scan.map_length()):
            name = prefix + scan.string()
            if scan.at_map():
                read_map(name + "/", depth + 1)
                continue
            if name in leaves:
                raise CheckpointError(f"{path}: {name[:200]!r} occurs twice")
            leaves[name] = scan.array(name)
            if len(leaves) > _MAX_LEAVES:
                raise CheckpointError(f"{path}: more than {_MAX_LEAVES} leaves; not a CLIP")

    read_map("", 1)
    _check_end(path, scan.position, len(buffer))
    return leaves


class _MsgpackScan:
    """Walks over msgpack headers without building objects, so that lengths are checked and arrays stay on disk."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.position = path, buffer, 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        _check_not_truncated(self.path, self.position, len(self.buffer))
        return self.buffer[start : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def length(self, kind: str, fixed: range, sized: Mapping[int, int]) -> int:
        """Length of a map, array, string or byte string: within its first byte or in the next 1, 2 or 4."""
        byte = self.number(1)
        if byte in fixed:
            return byte - fixed.start
        if byte not in sized:
            raise CheckpointError(
                f"{self.path}: damaged: byte {self.position - 1} is {byte:#04x} where a {kind} is expected"
            )
        return self.number(sized[byte])

    def at_map(self) -> bool:
        byte = self.buffer[self.position : self.position + 1]
        return bool(byte) and (byte[0] in range(0x80, 0x90) or byte[0] in (0xDE, 0xDF))

    def map_length(self) -> int:
        return self.length("map", range(0x80, 0x90), {0xDE: 2, 0xDF: 4})

    def string(self) -> str:
        length = self.length("string", range(0xA0, 0xC0), {0xD9: 1, 0xDA: 2, 0xDB: 4})
        if length > 1000:
            raise CheckpointError(f"{self.path}: a name of {length} bytes; not a CLIP")
        return self.take(length).decode("utf-8", errors="replace")

    def integer(self) -> int:
        return self.length("length", range(0x80), {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})

    def array(self, name: str) -> StoredLeaf:
        fixed_extensions = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
        byte = self.number(1)
        if byte in fixed_extensions:
            size = fixed_extensions[byte]
        elif byte in (0xC7, 0xC8, 0xC9):
            size = self.number({0xC7: 1, 0xC8: 2, 0xC9: 4}[byte])
        else:
            raise CheckpointError(f"{self.path}: {name[:200]!r} is not an array (byte {byte:#04x})")
        code = self.number(1)
        end = self.position + size
        if code != _FLAX_ARRAY:
            raise CheckpointError(f"{self.path}: {name[:200]!r} is not an array (extension {code})")
        if self.length("list", range(0x90, 0xA0), {}) != 3:
            raise CheckpointError(f"{self.path}: malformed header of {name[:200]!r}")
        shape = [self.integer() for _ in range(self.length("list", range(0x90, 0xA0), {}))]
        dtype = self.string()
        count = self.length("byte string", range(0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
        offset, self.position = self.position, self.position + count
        if self.position != end or not _is_shape(shape):
            raise CheckpointError(f"{self.path}: lengths in the header of {name[:200]!r} disagree")
        _check_not_truncated(self.path, end, len(self.buffer))
        if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != count:
            raise CheckpointError(f"{self.path}: {name[:200]!r} is {dtype} {tuple(shape)} but has {count} bytes")
        return _mapped_leaf(self.buffer, offset, tuple(shape), dtype)


# --- torch zip files: read by torch itself, tensors only ----------------------------------------------------------


def _open_torch(path: Path) -> dict[str, StoredLeaf]:
    try:
        import torch
    except ImportError as error:
        raise DependencyError(
            f"{path}: reading pytorch_model.bin needs torch: pip install 'jaxzs[torch]' (or "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu for the CPU build), or convert "
            "the file to safetensors."
        ) from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise DependencyError(
            f"{path}: torch {torch.__version__} can be made to execute code even with weights_only=True "
            "(CVE-2025-32434): pip install 'torch>=2.6'"
        )
    _check_zip(path)
    try:  # weights_only refuses everything but tensors; mmap leaves them on disk
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises about ten kinds on damaged files
        raise CheckpointError(
            f"{path}: torch refuses it as a file of tensors only (weights_only=True): {str(error)[:300]}"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: a dict of tensors is expected, got {type(state).__name__}")
    return {str(name): _torch_leaf(path, str(name), tensor) for name, tensor in state.items()}


def _check_zip(path: Path) -> None:
    """torch stores its records uncompressed; a compressed one could unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: truncated or damaged zip file ({error})") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path}: compressed records, which torch never writes; refused")


def _torch_leaf(path: Path, name: str, tensor: Any) -> StoredLeaf:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise CheckpointError(f"{path}: {name[:200]!r} is not a dense tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {name[:200]!r} claims more elements than are stored")

    def read() -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # unknown to numpy: pass the bits
            return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.detach().numpy()

    return StoredLeaf(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), read)
