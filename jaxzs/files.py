"""Writing files so that an interruption never leaves half a file under its final name; arrays with a description."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxzs.errors import DataError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving without an error it becomes `path`.

    Raises `DataError` naming the file when the folder cannot be written or the disk is full; what stood under
    `path` before is then still there.

    >>> path = Path("results.json")
    >>> with atomic_path(path) as temporary:
    ...     _ = temporary.write_text("{}")
    >>> path.read_text()
    '{}'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_arrays(path: str | Path, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Arrays, and JSON values in the header, in one safetensors file, atomically."""
    from safetensors.numpy import save_file

    host = {name: np.ascontiguousarray(np.asarray(array)) for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(host, temporary, metadata={"jaxzs": json.dumps(values, allow_nan=False)})


def read_arrays(path: str | Path, writer: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_arrays` wrote. Raises `DataError` naming the file, and `writer` as what makes such files."""
    from safetensors import SafetensorError, safe_open

    remedy = f"name a file that {writer} has written"
    try:
        with safe_open(path, framework="numpy") as file:
            values = json.loads((file.metadata() or {}).get("jaxzs", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a safetensors file, or is damaged: {error}; {remedy}") from error
    return arrays, values if isinstance(values, dict) else {}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
