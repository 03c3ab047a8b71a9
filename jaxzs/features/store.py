"""Reading a feature store: chunks, memory-mapped and checked."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxzs.data.batches import shard
from jaxzs.data.sources import digest
from jaxzs.errors import DataError
from jaxzs.features.settings import CHECKSUM, read_settings


class Chunk(NamedTuple):
    """Some neighbouring items of a source, those that could be read."""

    features: np.ndarray  # [n,E] float32, float16 or bfloat16, memory-mapped
    labels: np.ndarray  # [n] int32, -1 for none; or [n,C] bool
    indices: np.ndarray  # [n] int64, numbers in the source
    ids: list[str]
    skipped: list[str]  # why the items of this chunk that are missing could not be read
    tokens: np.ndarray | None  # [n,1+P,D] where they were asked for, memory-mapped


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Features of one source by one model. Made by `extract`, opened again with `open_store`.

    path: the store's folder. settings: what is in `store.json`.

    >>> store = features.extract(jaxzs.load("demo"), data.open_source("photos"), "features")
    >>> everything = store.arrays()
    >>> everything.features.shape, everything.ids[0], int(everything.labels[0])
    ((30, 64), 'one/0.png', 0)
    >>> text = zeroshot.text_proxies(jaxzs.load("demo"), store.label_names, ["the digit {}."])
    >>> zeroshot.similarity(everything.features, text).shape
    (30, 3)
    """

    path: Path
    settings: dict[str, Any]

    @property
    def num_items(self) -> int:
        """Items of the source, those that could not be read included."""
        return int(self.settings["num_items"])

    @property
    def num_chunks(self) -> int:
        """Chunks of the complete store."""
        return -(-self.num_items // int(self.settings["chunk_size"]))

    @property
    def label_names(self) -> tuple[str, ...]:
        """The source's own names of its C classes."""
        return tuple(self.settings["label_names"])

    @property
    def complete(self) -> bool:
        """Whether every chunk is there (not whether it is undamaged: `chunk` looks)."""
        return all((self.folder(number) / "chunk.json").is_file() for number in range(self.num_chunks))

    def items_of(self, number: int) -> range:
        """Numbers in the source of the items of a chunk."""
        size = int(self.settings["chunk_size"])
        return range(number * size, min((number + 1) * size, self.num_items))

    def chunk(self, number: int, *, verify: bool = True) -> Chunk:
        """One chunk, memory-mapped. Raises `DataError` when it is missing, damaged, or in the place of another.

        verify: compare the arrays with their checksums; what describes them is always compared.
        """
        return self._chunk(number, checksum if verify else None)

    def _chunk(self, number: int, hashed: Callable[[Path], str] | None) -> Chunk:
        folder = self.folder(number)
        try:
            record = parse_record((folder / "chunk.json").read_bytes(), self.items_of(number))
            if hashed is not None:
                _check_files(folder, record["sha256"], self.files, hashed)
            return self._arrays_of(folder, record)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, EOFError) as error:
            raise DataError(
                f"chunk {number} of the feature store {self.path} is missing or damaged ({error}); extract the "
                "features again: only what is missing is computed"
            ) from error

    def _arrays_of(self, folder: Path, record: dict[str, Any]) -> Chunk:
        n, settings = len(record["indices"]), self.settings
        dtype = np.dtype(jnp.dtype(settings["dtype"]))
        features = _load(folder / "features.npy", dtype)
        labels = np.load(folder / "labels.npy")  # pickles are refused, as by default
        tokens = _load(folder / "tokens.npy", dtype) if settings["tokens"] else None
        expected = ((n, len(self.label_names)), np.bool_) if settings["multi_label"] else ((n,), np.int32)
        if features.shape != (n, settings["embedding"]) or (labels.shape, labels.dtype) != expected:
            raise ValueError(f"features {features.shape} and labels {labels.shape} are not those of {n} items")
        # How many tokens of which width is not in the settings: only the axes are compared.
        if tokens is not None and (tokens.ndim != 3 or len(tokens) != n):
            raise ValueError(f"tokens {tokens.shape} are not those of {n} items")
        indices = np.array(record["indices"], np.int64)
        return Chunk(features, labels, indices, record["ids"], record["skipped"], tokens)

    def chunks(self, *, part: int = 0, parts: int = 1, verify: bool = True) -> Iterator[Chunk]:
        """All chunks in order, or those of one process: part `part` of `parts`. One at a time is in memory."""
        for number in shard(self.num_chunks, part, parts):
            yield self.chunk(number, verify=verify)

    def features(self, *, part: int = 0, parts: int = 1) -> Iterator[np.ndarray]:
        """The features [n,E] of each chunk in order: what `proxy.fit_chunks` takes.

        The first of several passes looks at the checksums, later ones only where a file has changed since.
        """
        for number in shard(self.num_chunks, part, parts):
            yield self._chunk(number, _remembered_hash).features

    def arrays(self, *, verify: bool = True) -> Chunk:
        """Everything as one chunk in memory: features [N,E], labels, indices, ids, skipped, tokens."""
        listed = list(self.chunks(verify=verify))
        join = lambda name: np.concatenate([getattr(c, name) for c in listed])  # noqa: E731
        return Chunk(
            features=join("features"),
            labels=join("labels"),
            indices=join("indices"),
            ids=[name for c in listed for name in c.ids],
            skipped=[reason for c in listed for reason in c.skipped],
            tokens=join("tokens") if self.settings["tokens"] else None,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The arrays of a chunk."""
        return ("features.npy", "labels.npy", *["tokens.npy"] * self.settings["tokens"])

    def folder(self, number: int) -> Path:
        return self.path / f"chunk-{number:06d}"


def open_store(path: str | Path) -> FeatureStore:
    """A store by its folder, or by a folder that holds just one store.

    Raises `DataError` when there is none, several, an unfinished one, one of another format or a damaged one.

    >>> store = features.extract(jaxzs.load("demo"), data.open_source("photos"), "features")
    >>> features.open_store("features").path == store.path
    True
    """
    folder = Path(path).expanduser()
    if not (folder / "store.json").is_file():
        found = sorted(entry.parent for entry in folder.glob("*/store.json"))
        if len(found) != 1:
            raise DataError(
                f"{folder} holds {len(found)} feature stores, expected one"
                + (f": name one of {', '.join(entry.name for entry in found)}" if found else "")
            )
        folder = found[0]
    # Resolved: a link to a store may have any name, what it points to is named by the key.
    store = FeatureStore(folder, read_settings(folder.resolve() / "store.json"))
    if not store.complete:
        raise DataError(f"the feature store {folder} is not finished; run the extraction again to continue it")
    return store


# --- chunk.json -------------------------------------------------------------------------------------------------


def parse_record(content: bytes, items: range) -> dict[str, Any]:
    """`chunk.json` of these items of the source. Raises ValueError unless it is what was written, and of this chunk."""
    record: dict[str, Any] = json.loads(content.decode())
    if not isinstance(record, dict) or record.pop(CHECKSUM, None) != digest(record):
        raise ValueError("chunk.json does not match its checksum")
    # The checksum is no signature: whoever changes the file can make it anew, so that contents are looked at.
    indices, ids, skipped = record["indices"], record["ids"], record["skipped"]
    if any(type(index) is not int for index in indices) or not all(isinstance(one, str) for one in [*ids, *skipped]):
        raise ValueError("chunk.json holds other things than numbers and names")
    # A chunk of another place, or of another chunk size, names items that are not its own.
    inside = all(index in items for index in indices) and sorted(set(indices)) == indices
    if not inside or len(indices) != len(ids) or len(indices) + len(skipped) != len(items):
        raise ValueError(f"its items are not those from {items.start} to {items.stop - 1}")
    return record


def _check_files(folder: Path, sums: dict[str, str], files: tuple[str, ...], hashed: Callable[[Path], str]) -> None:
    for name in files:  # and not those that the record names: they may lie outside of its folder
        if hashed(folder / name) != sums[name]:
            raise ValueError(f"{name} does not match its checksum")


def checksum(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered_hash(path: Path) -> str:
    status = path.stat()
    # Another inode, size or time of writing is another file, which is hashed anew.
    return _hash_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=65_536)
def _hash_of(path: Path, *_version: int) -> str:
    return checksum(path)


def _load(path: Path, dtype: np.dtype) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r")  # [n,E] or [n,1+P,D]; pages are read when they are used
    stored = np.dtype(np.uint16) if dtype == jnp.bfloat16 else dtype  # bfloat16, which .npy does not know
    if array.dtype != stored:
        raise ValueError(f"{path.name} is {array.dtype}, expected {stored}")
    return array.view(dtype)
