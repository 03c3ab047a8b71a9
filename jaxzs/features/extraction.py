"""Writing a feature store: every image encoded once, chunk by chunk, continued where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxzs
from jaxzs import parallel
from jaxzs.clip import Model
from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics, dense
from jaxzs.clip.model import vision_tower
from jaxzs.data.batches import Batch, batches, shard
from jaxzs.data.sources import Source, digest
from jaxzs.errors import ConfigError, DataError, renamed
from jaxzs.features.store import FeatureStore, checksum
from jaxzs.files import write_json

DTYPES = ("float32", "float16", "bfloat16")
_FORMAT = 1  # of the files; another number is another store
_IN_FLIGHT = 2  # batches on the device while the next is decoded


@renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)")
def extract(
    model: Model,
    source: Source,
    root: str | Path,
    *,
    dtype: str = "float32",
    numerics: Numerics = Numerics(),
    tokens: bool = False,
    batch_size: int = 64,
    chunk_size: int = 1024,
    threads: int = 2,
    max_skipped: int = 100,
    progress: bool = False,
) -> FeatureStore:
    """Encode every image of a source into a store, continuing one that was begun.

    Args:
      model: a loaded checkpoint.
      source: `jaxzs.data.open_source(...)`, or anything of that form.
      root: folder of stores; this one is `<root>/<key>`.
      dtype: the features are stored in: "float32", "float16" or "bfloat16".
      numerics: of the encoder's products, float32 by default.
      tokens: store all tokens of the last block, too ([n,1+P,D] an image, before the post-LayerNorm).
      batch_size: images per encoder call, rounded up to a multiple of this process's devices.
      chunk_size: items per chunk, rounded up to whole batches: what is lost at most when killed.
      threads: that decode and preprocess.
      max_skipped: unreadable images in the store, of all runs, before it stops with an error; with several processes
        in the part of each.
      progress: show a bar on stderr, when that is a terminal.

    Returns:
      The complete `FeatureStore`. With several processes each one computes its own part on its own devices
      and waits for the others.

    Raises:
      DataError: more unreadable images than allowed, features that are not finite, a full disk.
      ConfigError: an unknown dtype.

    >>> source = data.open_source("photos")
    >>> store = features.extract(jaxzs.load("demo"), source, "features")
    >>> store.num_items, store.complete
    (30, True)
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if len(source) == 0:
        raise DataError("the source holds no images")
    store = _store(model, source, Path(root).expanduser(), dtype, numerics, tokens, batch_size, chunk_size)
    part, parts = jax.process_index(), jax.process_count()
    own = shard(store.num_chunks, part, parts)
    with _lock(store.path / f"part-{part}-of-{parts}.lock"):
        _sweep(store, own)
        known = {number: _skipped_in(store, number) for number in own}
        missing = [number for number in own if known[number] is None]
        skipped = [error for errors in known.values() for error in errors or ()]
        _check_skipped(skipped, max_skipped)
        encode = _encoder(model, numerics, tokens, store.settings["batch_size"])
        _write_chunks(store, model, source, encode, missing, threads, skipped, max_skipped, progress)
    parallel.barrier(f"features {store.path.name}")
    return store


def key_of(settings: dict[str, Any]) -> str:
    """The key of a store: 16 hexadecimal digits of a hash of what determines its values.

    >>> store = features.extract(jaxzs.load("demo"), data.open_source("photos"), "features")
    >>> features.key_of(store.settings) == store.path.name
    True
    """
    return digest({name: settings[name] for name in _DETERMINING})[:16]


_DETERMINING = (
    "format", "jaxzs", "weights", "architecture", "preprocessing", "source", "num_items", "dtype", "compute_dtype",
    "matmul_precision", "backend", "tokens",
)  # fmt: skip


def _store(
    model: Model,
    source: Source,
    root: Path,
    dtype: str,
    numerics: Numerics,
    tokens: bool,
    batch_size: int,
    chunk_size: int,
) -> FeatureStore:
    """The store's folder with its settings, made now or found. A begun store keeps its own batches and chunks."""
    batch_size = parallel.padded_length(batch_size, jax.local_device_count())
    settings = {
        "format": _FORMAT,
        "jaxzs": jaxzs.__version__,
        "weights": model.fingerprint,
        "architecture": digest(dataclasses.asdict(model.config)),
        "preprocessing": model.preprocessor.fingerprint,
        "source": source.identity,
        "num_items": len(source),
        "dtype": dtype,
        "compute_dtype": "float32" if numerics.compute_dtype is None else jnp.dtype(numerics.compute_dtype).name,
        "matmul_precision": _precision(numerics),
        "backend": jax.default_backend(),
        "tokens": tokens,
        # From here on: not part of the key.
        "model": model.name,
        "normalized": False,
        "embedding": model.config.projection_dim,
        "label_names": list(source.label_names),
        "multi_label": source.multi_label,
        "batch_size": batch_size,
        "chunk_size": parallel.padded_length(chunk_size, batch_size),
    }
    path = root / key_of(settings)
    if parallel.is_main_process() and not (path / "store.json").is_file():
        write_json(path / "store.json", settings)
    parallel.barrier(f"settings {path.name}")
    try:
        settings = json.loads((path / "store.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path / 'store.json'}: {error}; delete that folder") from error
    return FeatureStore(path, settings)


def _precision(numerics: Numerics) -> str:
    """Of the products, as the key of a store names it."""
    default = getattr(jax.config, "jax_default_matmul_precision", None)
    return str(numerics.precision or default or "default")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when the process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # Windows: without the lock two processes do the same work twice, and nothing worse
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _skipped_in(store: FeatureStore, number: int) -> list[str] | None:
    """The unreadable images of a chunk that is there and matches its checksums; a damaged one is removed."""
    try:
        return store.chunk(number).skipped
    except DataError:
        shutil.rmtree(store.folder(number), ignore_errors=True)
        return None


def _check_skipped(skipped: Sequence[str], allowed: int) -> None:
    if len(skipped) > allowed:
        raise DataError(
            f"{len(skipped)} images cannot be read, more than the {allowed} allowed; the first: "
            + "; ".join(skipped[:5])
        )


def _sweep(store: FeatureStore, numbers: Sequence[int]) -> None:
    """Remove what killed processes left of these chunks."""
    for number in numbers:
        for leftover in store.path.glob(f".chunk-{number:06d}.*"):
            shutil.rmtree(leftover, ignore_errors=True)


Encode = Callable[[np.ndarray], tuple[jax.Array, jax.Array | None]]


def _encoder(model: Model, numerics: Numerics, tokens: bool, batch_size: int) -> Encode:
    """pixels [B,S,S,3] -> (features [B,E], tokens [B,1+P,D] or None), spread over this process's devices."""
    devices = jax.local_devices()
    mesh = parallel.make_mesh(devices=devices)
    params = parallel.place_parameters(
        {name: model.params[name] for name in ("vision_model", "visual_projection")}, model.config, mesh
    )
    where = parallel.sharding(mesh, ("images", None, None, None), (batch_size, 1, 1, 1))

    def encode(pixels: np.ndarray) -> tuple[jax.Array, jax.Array | None]:
        return encode_batch(params, jax.device_put(pixels, where), model.config, numerics, tokens)

    return encode


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def encode_batch(
    params: Any, pixels: jax.Array, config: CLIPConfig, numerics: Numerics, tokens: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Features [B,E] as `clip.encode_image` gives them, and all tokens [B,1+P,D] on request."""
    tower = vision_tower(params, pixels, config, numerics=numerics)
    features = dense(params["visual_projection"], tower.pooled, numerics)
    return features, tower.tokens if tokens else None


def _write_chunks(
    store: FeatureStore,
    model: Model,
    source: Source,
    encode: Encode,
    numbers: Sequence[int],
    threads: int,
    skipped: Sequence[str],
    max_skipped: int,
    progress: bool,
) -> None:
    """One pass over the items of the missing chunks; each chunk is written when its last batch is back.

    skipped: the unreadable images of the chunks that are there.
    """
    from tqdm import tqdm

    chunk_size, batch_size = store.settings["chunk_size"], store.settings["batch_size"]
    items: list[int] = []
    ends: dict[int, int] = {}  # batches read when a chunk is complete -> its number
    for number in numbers:
        first, end = number * chunk_size, min((number + 1) * chunk_size, store.num_items)
        items += range(first, end)
        items += [-1] * (-len(items) % batch_size)  # a chunk begins with a new batch
        ends[len(items) // batch_size] = number
    size = model.config.vision.image_size
    loaded = batches(source, model.preprocess, batch_size, image_shape=(size, size, 3), indices=items, threads=threads)
    errors = list(skipped)
    done: list[Encoded] = []
    with tqdm(total=len(items), unit="image", disable=None if progress else True) as bar:
        for count, encoded in enumerate(_pipelined(loaded, encode, store.settings["dtype"]), 1):
            errors += encoded.batch.errors
            _check_skipped(errors, max_skipped)
            done.append(encoded)
            bar.update(batch_size)
            if count in ends:
                _write_chunk(store, ends[count], done)
                done = []


class Encoded(NamedTuple):
    """A batch without its pixels, and what the encoder gave for its readable rows."""

    batch: Batch
    features: np.ndarray
    tokens: np.ndarray | None


def _pipelined(loaded: Iterator[Batch], encode: Encode, dtype: str) -> Iterator[Encoded]:
    """Encoded batches in order: while the device computes, the next batch is read."""
    pending: deque[tuple[Batch, jax.Array, jax.Array | None]] = deque()

    def rows(x: jax.Array, mask: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # seen, and refused, when the chunk is written
            kept: np.ndarray = np.asarray(x)[mask].astype(jnp.dtype(dtype))
        return kept

    def fetch() -> Encoded:
        batch, features, tokens = pending.popleft()
        every = None if tokens is None else rows(tokens, batch.mask)
        return Encoded(batch, rows(features, batch.mask), every)

    for batch in loaded:
        pending.append((batch._replace(pixels=batch.pixels[:0]), *encode(batch.pixels)))
        if len(pending) > _IN_FLIGHT:
            yield fetch()
    while pending:
        yield fetch()


def _write_chunk(store: FeatureStore, number: int, done: Sequence[Encoded]) -> None:
    """A chunk, written beside its place, made durable, and put there by one rename."""
    features = np.concatenate([part.features for part in done])
    if not np.isfinite(features.astype(np.float32)).all():
        raise DataError(
            f"features of chunk {number} are not finite: {store.settings['dtype']} may be too narrow for them, or "
            "the checkpoint is damaged"
        )
    arrays = {"features.npy": features, "labels.npy": _labels(store, done)}
    if store.settings["tokens"]:
        arrays["tokens.npy"] = np.concatenate([part.tokens for part in done])
    place = store.folder(number)
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=store.path))
    try:
        sums = {}
        for name, array in arrays.items():
            stored = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
            with open(temporary / name, "wb") as file:
                np.save(file, stored)
                file.flush()
                os.fsync(file.fileno())
            sums[name] = checksum(temporary / name)
        record = {
            "sha256": sums,
            "ids": [name for part in done for name in _readable(part.batch, part.batch.ids)],
            "indices": [int(i) for part in done for i in part.batch.indices[part.batch.mask]],
            "skipped": [error for part in done for error in part.batch.errors],
        }
        write_json(temporary / "chunk.json", {**record, "sha256_of_this": digest(record)})
        temporary.chmod(0o755)
        try:
            os.rename(temporary, place)
        except OSError:
            if not (place / "chunk.json").is_file():
                raise  # otherwise another process was first, with the same chunk
    except OSError as error:
        raise DataError(
            f"cannot write chunk {number} of the feature store {store.path}: {error.strerror or error}. Nothing that "
            "was there is lost; make room and run again to continue"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _readable(batch: Batch, values: Sequence[Any]) -> list[Any]:
    return [value for value, ok in zip(values, batch.mask, strict=True) if ok]


def _labels(store: FeatureStore, done: Sequence[Encoded]) -> np.ndarray:
    """Labels of the readable items: [n] int32, or [n,C] bool."""
    listed = [labels for part in done for labels in _readable(part.batch, part.batch.labels)]
    if not store.settings["multi_label"]:
        return np.array([labels[0] if labels else -1 for labels in listed], np.int32)
    several = np.zeros((len(listed), len(store.label_names)), bool)
    for row, labels in enumerate(listed):
        several[row, list(labels)] = True
    return several
