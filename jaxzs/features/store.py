"""Reading a feature store: chunks, memory-mapped and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxzs.data.batches import shard
from jaxzs.data.sources import digest
from jaxzs.errors import DataError


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
    >>> proxy.fit_chunks(store.features, text, gamma=0.0).proxies.shape  # chunk by chunk
    (3, 64)
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

    def chunk(self, number: int, *, verify: bool = True) -> Chunk:
        """One chunk, memory-mapped. Raises `DataError` when it is missing or differs from its checksums."""
        folder = self.folder(number)
        try:
            record = _read_record(folder, verify)
            dtype = np.dtype(jnp.dtype(self.settings["dtype"]))
            features = _load(folder / "features.npy", dtype)
            tokens = _load(folder / "tokens.npy", dtype) if self.settings["tokens"] else None
            labels = np.load(folder / "labels.npy")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"chunk {number} of the feature store {self.path} is missing or damaged ({error}); extract the "
                "features again: only what is missing is computed"
            ) from error
        indices = np.array(record["indices"], np.int64)
        return Chunk(features, labels, indices, record["ids"], record["skipped"], tokens)

    def chunks(self, *, part: int = 0, parts: int = 1, verify: bool = True) -> Iterator[Chunk]:
        """All chunks in order, or those of one process: part `part` of `parts`. One at a time is in memory."""
        for number in shard(self.num_chunks, part, parts):
            yield self.chunk(number, verify=verify)

    def features(self, *, part: int = 0, parts: int = 1) -> Iterator[np.ndarray]:
        """The features [n,E] of each chunk in order: what `proxy.fit_chunks` takes. Checksums are not looked at."""
        for chunk in self.chunks(part=part, parts=parts, verify=False):
            yield chunk.features

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

    def folder(self, number: int) -> Path:
        return self.path / f"chunk-{number:06d}"


def open_store(path: str | Path) -> FeatureStore:
    """A store by its folder, or by a folder that holds just one store.

    Raises `DataError` when there is none, several, or an unfinished one.

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
    try:
        settings = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / 'store.json'}: {error}") from error
    store = FeatureStore(folder, settings)
    if not store.complete:
        raise DataError(f"the feature store {folder} is not finished; run the extraction again to continue it")
    return store


def _read_record(folder: Path, verify: bool) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "chunk.json").read_text(encoding="utf-8"))
    body = {key: value for key, value in record.items() if key != "sha256_of_this"}
    if verify and record["sha256_of_this"] != digest(body):
        raise ValueError("chunk.json does not match its checksum")
    for name, expected in record["sha256"].items() if verify else ():
        if checksum(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return record


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path, dtype: np.dtype) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array.view(dtype)  # bfloat16, which .npy does not know, is stored as uint16
