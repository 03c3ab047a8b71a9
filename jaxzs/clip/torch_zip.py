"""Tensors of a torch zip file, state dict or TorchScript archive, without torch and without running what it holds.

A torch zip is `ROOT/data.pkl`, a pickle whose persistent ids name storages, and `ROOT/data/KEY`, their bytes. The
pickle is read by an unpickler that knows a handful of constructors, gives an inert record for every class of a
TorchScript module (`__torch__....`) and refuses all else; the program text (`code/`) is never read. So OpenAI's .pt
files, which `torch.load(weights_only=True)` refuses and `torch.jit.load` would run, are read as data.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxzs.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_MAX_PICKLE = 64 * 2**20  # that of the largest CLIP takes 0.2 MB
_MAX_NODES = 100_000  # the largest CLIP has 1,300 leaves
_MAX_DEPTH = 24
_MODEL_KEYS = ("state_dict", "model_state_dict", "model")  # open_clip's name, and those of torch's own examples


class Storage(NamedTuple):
    """One entry of the archive: `length` numbers of a type."""

    dtype: np.dtype
    key: str
    length: int


class Tensor(NamedTuple):
    """A view into a storage, strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Module:
    """An inert stand-in for a TorchScript class: it keeps the attributes that the pickle gives it, and does nothing."""

    state: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state if isinstance(state, dict) else {}


def open_torch(path: Path) -> dict[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """{name: (shape, dtype, read)} of the tensors in a torch zip, read as views into the mapped file.

    Raises `CheckpointError` for anything that is not a whole archive of tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, entries = _entries(archive, path)
            pickled = archive.read(f"{root}/data.pkl")
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, RuntimeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: truncated or damaged zip file ({error})") from error
    try:
        tree = _Unpickler(io.BytesIO(pickled)).load()
        tensors = dict(_tensors(tree))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # whatever a damaged pickle makes of the few constructors
        raise CheckpointError(f"{path}: the pickle of its tensors is damaged: {str(error)[:200]}") from error
    buffer = np.memmap(path, np.uint8, "r")  # a page is read when a tensor in it is
    leaves = {}
    for name, tensor in tensors.items():
        start = _start(buffer, entries.get(f"{root}/data/{tensor.storage.key}"), tensor, f"{path}: {name[:200]!r}")
        leaves[name] = tensor.shape, tensor.storage.dtype.name, _reader(buffer, start, tensor)
    return leaves


def _entries(archive: zipfile.ZipFile, path: Path) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """The archive's root and entries. torch stores its data uncompressed: a compressed one could unpack to any size."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = {name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")}
    if len(roots) != 1 or len(entries) < len(archive.infolist()):
        raise CheckpointError(f"{path}: a zip file, but not one of torch: {len(roots)} entries are called data.pkl")
    root = roots.pop()
    for name, entry in entries.items():
        if name.startswith(f"{root}/data") and entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: compressed data, which torch never writes; refused")
    if entries[f"{root}/data.pkl"].file_size > _MAX_PICKLE:
        raise CheckpointError(f"{path}: a pickle of more than {_MAX_PICKLE:,} bytes; not a CLIP")
    order = entries.get(f"{root}/byteorder")
    if order is not None and (order.file_size > 10 or archive.read(order) != b"little"):
        raise CheckpointError(f"{path}: its numbers are not little-endian; save it again on another machine")
    return root, entries


class _Unpickler(pickle.Unpickler):
    """Makes tensors, dicts and inert modules, whatever the pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module.split(".")[0] == "__torch__":
            return _Module
        raise CheckpointError(
            f"its pickle refers to {f'{module}.{name}'[:200]!r}; only tensors are read, nothing is run"
        )

    def persistent_load(self, pid: Any) -> Storage:
        # The kind of the storage, its entry, a device, which is of no account here, and the number of elements.
        match pid:
            case ("storage", str(kind), str(key), str(), int(count)) if kind in _STORAGES and key.isalnum():
                return Storage(np.dtype(_STORAGES[kind]), key, count)
        raise CheckpointError(f"its pickle names a storage that torch does not write: {pid!r:.100}")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:  # *_: gradients and hooks
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 8:
        raise CheckpointError("its pickle describes a tensor as torch does not")
    return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,  # a Parameter is its data
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch.jit._pickle", f"build_{kind}list"): (lambda x: x) for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,  # the tag is a type of TorchScript's
    **{("torch", name): name for name in _STORAGES},
}


def _tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted name, as torch's `state_dict` calls them; every dict is entered once."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    while waiting:
        name, node, depth = waiting.pop()  # a stack of its own: no nesting can exhaust Python's
        if isinstance(node, Tensor):
            yield name, node
            continue
        items = node.__dict__.get("state", {}) if isinstance(node, _Module) else node
        if not isinstance(items, dict) or id(items) in seen:
            continue
        seen.add(id(items))
        if depth > _MAX_DEPTH or len(seen) + len(waiting) > _MAX_NODES:
            raise CheckpointError("its pickle is nested too deeply, or holds too much; not a CLIP")
        if depth == 0:  # training checkpoints hold the model beside the state of its optimizer
            items = next((items[key] for key in _MODEL_KEYS if isinstance(items.get(key), dict)), items)
        waiting += [(f"{name}.{key}" if name else str(key), value, depth + 1) for key, value in items.items()]


def _start(buffer: np.ndarray, entry: zipfile.ZipInfo | None, tensor: Tensor, what: str) -> int:
    """Where a tensor's storage begins in the file, after all lengths have been checked."""
    storage, size = tensor.storage, tensor.storage.dtype.itemsize
    if entry is None or entry.file_size != storage.length * size:
        raise CheckpointError(f"{what}: its storage {storage.key} is missing, or not of the length that is claimed")
    # The farthest element that the strides reach, none of them being negative.
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if min((*tensor.strides, *tensor.shape, tensor.offset)) < 0 or (0 not in tensor.shape and last >= storage.length):
        raise CheckpointError(f"{what} reaches outside its storage")
    if int(np.prod(tensor.shape, dtype=object)) > storage.length:  # strides of 0 would make much of little
        raise CheckpointError(f"{what} claims more elements than are stored")
    # The data begin behind the local header, whose extra field may be longer than the one of the directory.
    head = bytes(buffer[entry.header_offset : entry.header_offset + 30])
    start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if len(head) < 30 or start + entry.file_size > len(buffer):
        raise CheckpointError(f"{what}: truncated, or a damaged zip file")
    return start


def _reader(buffer: np.ndarray, start: int, tensor: Tensor) -> Callable[[], np.ndarray]:
    dtype = tensor.storage.dtype

    def read() -> np.ndarray:
        flat = buffer[start : start + tensor.storage.length * dtype.itemsize].view(dtype)[tensor.offset :]
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        # It checks nothing itself: `_start` has.
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    return read
