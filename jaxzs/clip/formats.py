"""Weight files, opened without trusting them: safetensors, Flax msgpack, torch zip files, numpy's .npz.

Each opener returns what the file holds by name, with shape and dtype from its headers. But for msgpack, which flax
reads as a whole, no array is read until `StoredLeaf.read` is called, and is then a view into the memory-mapped file.
Every length in a header is checked against the file's size first, and nothing in a file is ever executed.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxzs.clip.files import known_stranger
from jaxzs.clip.torch_zip import open_torch
from jaxzs.errors import CheckpointError

FLOATS: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_MAX_HEADER_BYTES = 16 * 2**20  # that of the largest CLIP takes 0.2 MB
_MAX_LEAVES = 100_000
_MAX_MSGPACK_BYTES = 16 * 2**30
_MAX_NAME = 1000
_MAX_BLOCKS = 256  # of a stacked tower, as many as a configuration may ask for
_MAX_DEPTH = 16  # the deepest leaf of a CLIP lies 8 levels down


@dataclass(frozen=True)
class StoredLeaf:
    """One array in a weight file, not read yet. dtype is the stored name; only `FLOATS` can be read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def open_weights(path: Path) -> dict[str, StoredLeaf]:
    """What a weight file holds, by name; the format is told from the content, not from the file's name.

    Raises `CheckpointError` for anything that is not a whole, well-formed file of one of these formats.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            if (stranger := known_stranger(start)) is not None:
                raise CheckpointError(f"{path} is {stranger}. Or give the hub id, to download it again.")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a file that the system says is empty, though it can be read
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if start.startswith(b"PK\x03\x04"):
        return _open_zip(path, buffer)
    if start[4:9] == b"\0\0\0\0{" and size >= 10:  # a header of less than 4 GB, in JSON
        return _open_safetensors(path, buffer)
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # a bare pickle: PROTO and its version
        raise CheckpointError(
            f"{path}: a pickle file (torch before 1.6); pickles are never executed. Save it again with a "
            "current torch (torch.save) or as safetensors."
        )
    if start[0] in range(0x80, 0x90) or start[0] in (0xDE, 0xDF):  # msgpack's maps
        return _open_msgpack(path, size)
    raise CheckpointError(
        f"{path}: not a weight file: starts with {start[:16]!r}, which is none of safetensors, Flax msgpack, a "
        "torch zip file and .npz. Download it again."
    )


def _parse_header(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):  # readers differ in which of two they take
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
    return isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape)  # True is no length


def _view(buffer: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    flat = np.frombuffer(buffer, FLOATS[dtype], count=math.prod(shape), offset=offset)
    return flat.reshape(shape)


# Read here and not by the safetensors library, which copies into arrays of its own: here a leaf goes from the mapped
# file straight to the devices, bfloat16 needs no torch, and a header is audited before anything is allocated.
# --- safetensors: 8 bytes header length, JSON header, then the leaves without gaps -------------------------------


def _open_safetensors(path: Path, buffer: mmap.mmap) -> dict[str, StoredLeaf]:
    (header_size,) = struct.unpack("<Q", buffer[:8])
    if header_size > min(_MAX_HEADER_BYTES, len(buffer) - 8):
        raise CheckpointError(
            f"{path}: the safetensors header claims {header_size} bytes, the file has {len(buffer)}; "
            "truncated or damaged. Download it again."
        )
    header = _parse_header(path, buffer[8 : 8 + header_size])
    header.pop("__metadata__", None)  # says who wrote it; here the names decide
    data_start = 8 + header_size
    leaves: dict[str, StoredLeaf] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": shape, "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise CheckpointError(f"{path}: malformed header entry for {name[:200]!r}")
        dtype = SAFETENSORS_DTYPES.get(dtype, dtype[:20])  # of others the audit tells, by this name
        if not _is_shape(shape) or not 0 <= begin <= end:
            raise CheckpointError(f"{path}: impossible shape or offsets for {name[:200]!r}")
        if dtype in FLOATS and math.prod(shape) * FLOATS[dtype].itemsize != end - begin:
            raise CheckpointError(f"{path}: {name[:200]!r} is {dtype} {tuple(shape)} but has {end - begin} bytes")
        leaves[name] = _mapped_leaf(buffer, data_start + begin, tuple(shape), dtype)
        spans.append((begin, end))
    # In this format leaves neither overlap nor leave gaps: other offsets are damage, or hide something.
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


# --- Flax msgpack --------------------------------------------------------------------------------------------------


def _open_msgpack(path: Path, size: int) -> dict[str, StoredLeaf]:
    """By flax itself, which needs the whole file in memory; what it may hold is audited as that of any other format."""
    from flax.serialization import msgpack_restore

    if size > _MAX_MSGPACK_BYTES:
        raise CheckpointError(
            f"{path}: {size:,} bytes of msgpack, read at most {_MAX_MSGPACK_BYTES:,}; save it as safetensors, whose "
            "leaves are read one by one"
        )
    try:
        tree = msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack, numpy and flax raise about ten kinds on damaged files
        raise CheckpointError(
            f"{path}: truncated or damaged Flax msgpack of {path.stat().st_size} bytes "
            f"({str(error)[:200] or type(error).__name__}). Download it again."
        ) from error
    leaves: dict[str, StoredLeaf] = {}
    for name, leaf in _arrays(tree, "", path):
        leaves[name] = StoredLeaf(leaf.shape, leaf.dtype.name, functools.partial(np.asarray, leaf))
        if len(leaves) > _MAX_LEAVES:
            raise CheckpointError(f"{path}: more than {_MAX_LEAVES} leaves; not a CLIP")
    return leaves


def _arrays(node: Any, name: str, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Leaves of what flax has restored, by their paths. Only nested maps of arrays are expected."""
    if name.count("/") > _MAX_DEPTH:
        raise CheckpointError(f"{path}: maps nested deeper than {_MAX_DEPTH}; not a CLIP")
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _arrays(value, f"{name}/{key}" if name else str(key)[:_MAX_NAME], path)
    elif isinstance(node, np.ndarray | np.generic) and name:
        yield name, np.asarray(node)
    elif not isinstance(node, int | float):  # counters of a training state
        raise CheckpointError(f"{path}: {name[:200]!r} is {type(node).__name__}, expected an array")


# --- numpy's .npz: big_vision --------------------------------------------------------------------------------------


def _open_npz(path: Path, archive: zipfile.ZipFile, buffer: mmap.mmap) -> dict[str, StoredLeaf]:
    """Arrays of a zip of .npy files, which numpy.savez does not compress: mapped, like the other formats."""
    leaves: dict[str, StoredLeaf] = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: compressed arrays; save them with numpy.savez")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            header = file.tell()
        dtype = FLOATS["bfloat16"] if dtype.str == "|V2" else dtype  # numpy has no name for it
        if header + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise CheckpointError(f"{path}: {entry.filename[:200]!r} claims {shape}, but has {entry.file_size} bytes")
        # Behind the local header, whose lengths of name and extra field are its own.
        head = buffer[entry.header_offset : entry.header_offset + 30]
        start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        _check_not_truncated(path, start + entry.file_size, len(buffer))
        name = dtype.name if dtype.isnative and not fortran else f"{dtype.str} in Fortran order"
        leaves[entry.filename.removesuffix(".npy")] = _mapped_leaf(buffer, start + header, tuple(shape), name)
    return _unstacked(leaves)


def _unstacked(stored: dict[str, StoredLeaf]) -> dict[str, StoredLeaf]:
    """Blocks that were trained in a scan lie stacked on a leading axis: each under the name it has without one."""
    leaves: dict[str, StoredLeaf] = {}
    for name, leaf in stored.items():
        if "/encoderblock/" not in name or not leaf.shape:
            leaves[name] = leaf
            continue
        for i in range(min(leaf.shape[0], _MAX_BLOCKS)):
            own = name.replace("/encoderblock/", f"/encoderblock_{i}/")
            leaves[own] = StoredLeaf(leaf.shape[1:], leaf.dtype, functools.partial(_row, leaf, i))
    return leaves


def _row(leaf: StoredLeaf, i: int) -> np.ndarray:
    row: np.ndarray = leaf.read()[i]
    return row


# --- torch zip files -----------------------------------------------------------------------------------------------


def _open_zip(path: Path, buffer: mmap.mmap) -> dict[str, StoredLeaf]:
    """numpy's archive or torch's, told by what their entries are called."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if names and all(name.endswith(".npy") for name in names):
                return _open_npz(path, archive, buffer)
    except CheckpointError:
        raise
    except (
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        EOFError,
        RuntimeError,
        TypeError,
        SyntaxError,
    ) as error:
        raise CheckpointError(f"{path}: truncated or damaged zip file ({str(error)[:200]})") from error
    return {name: StoredLeaf(*leaf) for name, leaf in open_torch(path).items()}
