"""What a store is made with: the choices of an extraction, and `store.json`, which is believed only when checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxzs import parallel
from jaxzs._version import __version__
from jaxzs.clip import Model
from jaxzs.clip.layers import Numerics
from jaxzs.data.sources import Source, digest
from jaxzs.errors import ConfigError, DataError
from jaxzs.files import write_json

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES = get_args(Dtype)
FORMAT = "jaxzs.features/2"  # of the files; 1, a number, was without checksum of the settings
CHECKSUM = "sha256_of_this"
_REMEDY = "delete that folder and extract the features again"

# What determines the values, and so the key. Everything else in store.json is covered by its checksum alone.
_DETERMINING = (
    "format", "jaxzs", "weights", "architecture", "preprocessing", "source", "num_items", "dtype", "compute_dtype",
    "matmul_precision", "backend", "tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Extraction:
    """How images become a store.

    Args:
      dtype: the features are stored in: "float32", "float16" or "bfloat16".
      numerics: type and precision of the encoder's products.
      tokens: store all tokens of the last block, too ([n,1+P,D] an image, before the post-LayerNorm).
      batch_size: images per encoder call, rounded up to a multiple of this process's devices.
      chunk_size: items per chunk, rounded up to whole batches: what is lost at most when killed.
      threads: that decode and preprocess; 0 reads in the calling thread.
      max_skipped: unreadable images in the store, of all runs, before it stops with an error; with several processes
        in the part of each.

    Raises:
      ConfigError: an unknown dtype, a number out of range.

    >>> features.Extraction(dtype="float16").chunk_size
    1024
    >>> features.Extraction(chunk_size=0)
    Traceback (most recent call last):
    jaxzs.errors.ConfigError: chunk_size is 0, expected a whole number of at least 1
    """

    dtype: Dtype = "float32"
    numerics: Numerics = Numerics()
    tokens: bool = False
    batch_size: int = 64
    chunk_size: int = 1024
    threads: int = 2
    max_skipped: int = 100

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        for name, least in (("batch_size", 1), ("chunk_size", 1), ("threads", 0), ("max_skipped", 0)):
            if not _whole(least)(value := getattr(self, name)):
                raise ConfigError(f"{name} is {value!r}, expected a whole number of at least {least}")


def settings_of(model: Model, source: Source, choices: Extraction) -> dict[str, Any]:
    """What goes into `store.json`: all that determines the features, then what describes them."""
    batch_size = parallel.padded_length(choices.batch_size, jax.local_device_count())  # as many rows on each device
    compute_dtype, precision = choices.numerics.compute_dtype, choices.numerics.precision
    return {
        "format": FORMAT,
        "jaxzs": __version__,
        "weights": model.fingerprint,
        "architecture": digest(model.config.as_json()),
        "preprocessing": model.preprocessor.fingerprint,
        "source": source.identity,
        "num_items": len(source),
        "dtype": choices.dtype,
        "compute_dtype": "float32" if compute_dtype is None else jnp.dtype(compute_dtype).name,
        "matmul_precision": str(precision or getattr(jax.config, "jax_default_matmul_precision", None) or "default"),
        "backend": jax.default_backend(),  # CPUs and GPUs round differently
        "tokens": choices.tokens,
        # From here on: not part of the key.
        "model": model.name,
        "normalized": False,  # as `encode_image` gives them
        "embedding": model.config.projection_dim,
        "label_names": list(source.label_names),
        "multi_label": source.multi_label,
        "batch_size": batch_size,
        "chunk_size": parallel.padded_length(choices.chunk_size, batch_size),  # no batch is in two chunks
    }


def key_of(settings: Mapping[str, Any]) -> str:
    """The key of a store: 16 hexadecimal digits of a hash of what determines its values.

    >>> store = features.extract(jaxzs.load("demo"), data.open_source("photos"), "features")
    >>> features.key_of(store.settings) == store.path.name
    True
    """
    return digest({name: settings[name] for name in _DETERMINING})[:16]


# --- store.json -------------------------------------------------------------------------------------------------


def write_once(path: Path, settings: Mapping[str, Any]) -> None:
    """Write `store.json` unless it is there: of two processes that begin a store together, one decides its chunks.

    The file appears whole, and by a link, which fails where another process was first.
    """
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".store.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write_json(temporary, {**settings, CHECKSUM: digest(settings)})
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
            except OSError:  # a file system without hard links: a rename is all it has
                os.rename(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """`store.json` without its checksum. Raises `DataError` unless it is what was written, in the folder of its key."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {_REMEDY}") from error
    return parse_settings(content, path)


def parse_settings(content: bytes, path: Path) -> dict[str, Any]:
    """The settings in the content of `path`; see `read_settings`."""
    try:
        stored = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}; {_REMEDY}") from error
    if not isinstance(stored, dict):
        raise DataError(f"{path} is damaged: it holds no settings; {_REMEDY}")
    # Before the checksum: another version's may well be of other things, and "damaged" would be a wrong answer.
    if stored.get("format") != FORMAT:
        raise DataError(
            f"{path} is of format {stored.get('format')!r}, this version of jaxzs reads {FORMAT!r}; extract the "
            "features again, which makes a new store, or read it with the version that wrote it "
            f"({str(stored.get('jaxzs'))[:20]})"
        )
    if stored.pop(CHECKSUM, None) != digest(stored):
        raise DataError(f"{path} does not match its checksum; {_REMEDY}")
    unfit = [name for name, fits in _FITS.items() if not fits(stored.get(name))]
    if unfit:
        raise DataError(f"{path} is damaged: unfit {', '.join(unfit)}; {_REMEDY}")
    # Intact, but copied into the folder of another store.
    if key_of(stored) != path.parent.name:
        raise DataError(f"{path} is of another store; its folder must be named {key_of(stored)}, as it was made")
    return stored


def _whole(least: int) -> Callable[[Any], bool]:
    # True is an int of Python; JSON's numbers are exact below 2^53.
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53


def _of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# A checksum says that nothing changed by accident; types and ranges are looked at all the same.
_FITS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_DETERMINING, _of(str)),
    **dict.fromkeys(("num_items", "embedding", "batch_size", "chunk_size"), _whole(1)),
    **dict.fromkeys(("tokens", "multi_label", "normalized"), _of(bool)),
    "dtype": lambda value: value in DTYPES,
    "label_names": _texts,
}
