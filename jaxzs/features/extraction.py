"""Writing a feature store: every image encoded once, chunk by chunk, continued where it was interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
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

from jaxzs import parallel
from jaxzs.clip import Model, place_parameters
from jaxzs.clip.config import CLIPConfig
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import project_image, vision_tower
from jaxzs.clip.naflex import Pixels
from jaxzs.data.batches import Batch, batches, shard
from jaxzs.data.sources import Source, digest
from jaxzs.errors import DataError, renamed
from jaxzs.features.settings import CHECKSUM, Extraction, key_of, read_settings, settings_of, write_once
from jaxzs.features.store import FeatureStore, checksum
from jaxzs.files import write_json

_IN_FLIGHT = 2  # batches on the device while the next is decoded


@renamed(compute_dtype="numerics=clip.Numerics(compute_dtype)")
def extract(
    model: Model,
    source: Source,
    root: str | Path,
    choices: Extraction = Extraction(),
    *,
    progress: bool = False,
    **changes: Any,
) -> FeatureStore:
    """Encode every image of a source into a store, continuing one that was begun.

    Args:
      model: a loaded checkpoint.
      source: `jaxzs.data.open_source(...)`, or anything of that form.
      root: folder of stores; this one is `<root>/<key>`.
      choices: types on disk and of the products, sizes of batches and chunks.
      progress: show a bar on stderr, when that is a terminal.
      changes: fields of `choices` by their names, such as `chunk_size=256`.

    Returns:
      The complete `FeatureStore`. With several processes each one computes its own part on its own devices
      and waits for the others. A complete store is only read, also in a place that cannot be written.

    Raises:
      DataError: more unreadable images than allowed, features that are not finite, a full disk, a damaged `store.json`.
      ConfigError: a choice out of range; the tokens of a NaFlex checkpoint, which are not equally many of each image.

    >>> source = data.open_source("photos")
    >>> store = features.extract(jaxzs.load("demo"), source, "features")
    >>> store.num_items, store.complete
    (30, True)
    """
    choices = dataclasses.replace(choices, **changes)
    if choices.tokens:
        model.config.check_one_size()  # else rows of padding would be kept for tokens
    if len(source) == 0:
        raise DataError("the source holds no images")
    store = _store(model, source, Path(root).expanduser(), choices)
    part, parts = jax.process_index(), jax.process_count()
    own = shard(store.num_chunks, part, parts)  # numbers of this process's chunks
    # A lock a part: the processes of one run do not wait for each other, two runs of the same part do.
    with _lock(store.path / f"part-{part}-of-{parts}.lock"):
        _sweep(store, own)  # under the lock: no other run of this part is writing them
        known = {number: _skipped_in(store, number) for number in own}  # None where a chunk is missing or damaged
        skipped = [error for errors in known.values() for error in errors or ()]
        # Those of earlier runs count: else every run would be allowed as many again.
        _check_skipped(skipped, choices.max_skipped)
        missing = [number for number in own if known[number] is None]  # not falsy: a whole chunk has an empty list
        if missing:
            work = _Work(model, source, store, choices)
            _write_chunks(work, missing, skipped, progress)
    # Before it the parts of other processes may not be there yet.
    parallel.barrier(f"features {store.path.name}")
    return store


class _Work(NamedTuple):
    """What one call of `extract` works on. A begun store keeps its own batches and chunks, whatever is chosen."""

    model: Model
    source: Source
    store: FeatureStore
    choices: Extraction


def _store(model: Model, source: Source, root: Path, choices: Extraction) -> FeatureStore:
    """The store's folder with its settings, made now or found."""
    settings = settings_of(model, source, choices)
    path = root / key_of(settings)
    # One writes. All read it from the disk: a store that was begun keeps the batches that it was begun with.
    if parallel.is_main_process():
        write_once(path / "store.json", settings)
    parallel.barrier(f"settings {path.name}")
    return FeatureStore(path, read_settings(path / "store.json"))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when the process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # Windows: without the lock two processes do the same work twice, and nothing worse
        yield
        return
    file = _open_lock(path)
    try:
        if file is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        if file is not None:
            os.close(file)  # unlocks; the file stays, for if it were removed two could hold "the" lock


def _open_lock(path: Path) -> int | None:
    """The lock file, neither followed nor emptied: whoever may write here could have laid a link to another file.

    None in a place that is only read: what is missing could not be written there anyhow.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        raise DataError(f"cannot open the lock {path}: {error.strerror}; it must be a file, remove it") from error


def _skipped_in(store: FeatureStore, number: int) -> list[str] | None:
    """The unreadable images of a chunk that is there and matches its checksums; a damaged one is removed."""
    try:
        return store.chunk(number).skipped
    except DataError:
        shutil.rmtree(store.folder(number), ignore_errors=True)  # its images are read and encoded again
        return None


def _check_skipped(skipped: Sequence[str], allowed: int) -> None:
    if len(skipped) > allowed:
        raise DataError(
            f"{len(skipped)} image{'s' * (len(skipped) > 1)} cannot be read, more than the {allowed} allowed; "
            f"the first: {'; '.join(skipped[:5])}"
        )


def _sweep(store: FeatureStore, numbers: Sequence[int]) -> None:
    """Remove what killed processes left of these chunks."""
    for number in numbers:
        for leftover in store.path.glob(f".chunk-{number:06d}.*"):
            shutil.rmtree(leftover, ignore_errors=True)


Encode = Callable[[Pixels], tuple[jax.Array, jax.Array | None]]


def _encoder(work: _Work) -> Encode:
    """pixels [B,S,S,3] -> (features [B,E], tokens [B,1+P,D] or None), spread over this process's devices."""
    model, choices, batch_size = work.model, work.choices, work.store.settings["batch_size"]
    # This process's devices alone: each process encodes its own chunks, at its own pace.
    mesh = parallel.make_mesh(devices=jax.local_devices())
    # Of the vision side only, so that the text tower takes no memory of the devices.
    params = place_parameters(
        {name: model.params[name] for name in model.params if name.startswith("vis")}, model.config, mesh
    )
    where = parallel.sharding(mesh, ("images",), (batch_size,))  # images whole, also of several arrays

    def encode(pixels: Pixels) -> tuple[jax.Array, jax.Array | None]:
        return encode_batch(params, jax.device_put(pixels, where), model.config, choices.numerics, choices.tokens)

    return encode


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def encode_batch(
    params: Any, pixels: Pixels, config: CLIPConfig, numerics: Numerics, tokens: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Features [B,E] as `clip.encode_image` gives them, and all tokens [B,1+P,D] on request."""
    tower = vision_tower(params, pixels, config, numerics=numerics)  # pooled [B,D], tokens [B,1+P,D]
    features = project_image(params, tower.pooled, numerics)  # [B,E]
    return features, tower.tokens if tokens else None


def _write_chunks(work: _Work, numbers: Sequence[int], skipped: Sequence[str], progress: bool) -> None:
    """One pass over the items of the missing chunks; each chunk is written when its last batch is back.

    skipped: the unreadable images of the chunks that are there.
    """
    from tqdm import tqdm

    store = work.store
    items, ends = _items_of(store, numbers)
    errors, done = list(skipped), []
    with tqdm(
        total=sum(item >= 0 for item in items), unit="image", desc="encode images", disable=None if progress else True
    ) as bar:
        for count, encoded in enumerate(_pipelined(_loaded(work, items), _encoder(work), store.settings["dtype"]), 1):
            errors += encoded.batch.errors
            # At every batch: a wrong folder is told in seconds, not when all of it has been tried.
            _check_skipped(errors, work.choices.max_skipped)
            done.append(encoded)
            bar.update(int((encoded.batch.indices >= 0).sum()))
            if count in ends:  # batches come in order: `done` holds all of this chunk
                _write_chunk(store, ends[count], done)
                done = []


def _items_of(store: FeatureStore, numbers: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """Items of these chunks in whole batches, -1 for padding; and how many batches end which chunk."""
    items: list[int] = []
    ends: dict[int, int] = {}
    for number in numbers:
        items += store.items_of(number)
        items += [-1] * (-len(items) % store.settings["batch_size"])  # a chunk begins with a new batch
        ends[len(items) // store.settings["batch_size"]] = number
    return items, ends


def _loaded(work: _Work, items: Sequence[int]) -> Iterator[Batch]:
    """Batches of these items, read and preprocessed in threads."""
    return batches(
        work.source,
        work.model.preprocess,
        work.store.settings["batch_size"],
        indices=items,
        threads=work.choices.threads,
    )


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
            kept: np.ndarray = np.asarray(x)[mask].astype(jnp.dtype(dtype))  # waits for the device; [n,E] or [n,1+P,D]
        return kept

    def fetch() -> Encoded:
        batch, features, tokens = pending.popleft()
        every = None if tokens is None else rows(tokens, batch.mask)
        return Encoded(batch, rows(features, batch.mask), every)

    for batch in loaded:
        # `encode` returns at once, before the device is done; `fetch` is what waits.
        pending.append((batch._replace(pixels=np.empty(0, np.float32)), *encode(batch.pixels)))
        if len(pending) > _IN_FLIGHT:
            yield fetch()
    while pending:
        yield fetch()


def _write_chunk(store: FeatureStore, number: int, done: Sequence[Encoded]) -> None:
    """A chunk, written beside its place, made durable, and put there by one rename."""
    features = np.concatenate([part.features for part in done])  # [n,E]
    if not np.isfinite(features.astype(np.float32)).all():  # float16 ends at 65504
        raise DataError(
            f"features of chunk {number} are not finite: {store.settings['dtype']} may be too narrow for them, or "
            "the checkpoint is damaged"
        )
    arrays = {"features.npy": features, "labels.npy": _labels(store, done)}
    if store.settings["tokens"]:
        arrays["tokens.npy"] = np.concatenate([part.tokens for part in done])  # [n,1+P,D]
    place = store.folder(number)
    # In the store's own folder: a rename is atomic within one file system only.
    temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=store.path))
    try:
        sums = {}
        for name, array in arrays.items():
            # .npy does not know bfloat16: it would come back as two bytes without meaning.
            stored = array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
            with open(temporary / name, "wb") as file:
                np.save(file, stored)
                file.flush()
                os.fsync(file.fileno())  # else a rename may be on the disk before what it names
            sums[name] = checksum(temporary / name)
        record = {
            "sha256": sums,
            "ids": [name for part in done for name in _readable(part.batch, part.batch.ids)],
            "indices": [int(i) for part in done for i in part.batch.indices[part.batch.mask]],
            "skipped": [error for part in done for error in part.batch.errors],
        }
        write_json(temporary / "chunk.json", {**record, CHECKSUM: digest(record)})
        # mkdtemp lets nobody else in; stores are shared.
        temporary.chmod(0o755)
        try:
            os.rename(temporary, place)
        except OSError:
            if not (place / "chunk.json").is_file():
                raise  # otherwise another process was first, with the same chunk
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot write chunk {number} of the feature store {store.path}: {reason}. "
            "Nothing that was there is lost; make room and run again to continue"
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
    several = np.zeros((len(listed), len(store.label_names)), bool)  # [n,C]
    for row, labels in enumerate(listed):
        several[row, list(labels)] = True
    return several
