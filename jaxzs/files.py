"""Files: written so that an interruption never leaves half of one; arrays with a description; JSON as dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxzs.errors import DataError, JaxzsError

_T = TypeVar("_T")


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
            os.fsync(file.fileno())  # on disk before it takes the place of what is there
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


CHECKSUM = "sha256"  # among the values of a file of arrays; what earlier versions wrote has none


def write_arrays(path: str | Path, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Arrays, and JSON values in the header, in one safetensors file, atomically; with a checksum of both."""
    from safetensors.numpy import save_file

    host = {name: np.ascontiguousarray(np.asarray(array)) for name, array in arrays.items()}
    header = json.dumps({**values, CHECKSUM: _checksum(host, values)}, allow_nan=False)
    with atomic_path(path) as temporary:
        save_file(host, temporary, metadata={"jaxzs": header})


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
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a safetensors file, or is damaged: {error}; {remedy}") from error
    values = values if isinstance(values, dict) else {}
    body = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != _checksum(arrays, body):
        raise DataError(f"{path} is damaged: it does not match its checksum; {remedy}")
    return arrays, values


def _checksum(arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> str:
    # Sorted, because a header that is read back need not keep the order it was written in.
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """Where to keep what can be computed again: `JAXZS_CACHE`, or jaxzs/ in the user's cache; None without a home."""
    if folder := os.environ.get("JAXZS_CACHE"):
        return Path(folder)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # a relative one is to be ignored, says the XDG specification
        return Path(shared) / "jaxzs"
    try:
        return Path.home() / ".cache" / "jaxzs"
    except RuntimeError:  # a user whom the machine does not know, as in a container
        return None


def _umask() -> int:
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    return mask


# --- JSON as dataclasses --------------------------------------------------------------------------------


def from_json(kind: type[_T], values: Any, where: str, error: type[JaxzsError], *, ignore_unknown: bool = False) -> _T:
    """A dataclass from the JSON object of its fields, each checked against its annotation.

    Args:
      kind: the dataclass. Its annotations may be int, float, str, bool, None, Any, Literal, tuples, lists, mappings of
        texts, unions and other dataclasses. A whole number will do for a float; every number must be finite.
      values: what `json.loads` gave.
      where: the place, for messages.
      error: of these.
      ignore_unknown: pass over keys that are no fields.

    Raises `error` for a missing, an unknown or an unfit value, and for what the dataclass itself refuses.

    >>> from_json(jaxzs.report.PerClass, {"data": "digits"}, "run.json", jaxzs.errors.RecordError)
    Traceback (most recent call last):
    jaxzs.errors.RecordError: run.json lacks 'method'
    """
    if not isinstance(values, Mapping):
        raise error(f"{where} is {_shown(values)}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in values if name not in fields]
    if unknown and not ignore_unknown:
        raise error(f"{where} has {_shown(unknown[0])}, expected only {', '.join(fields)}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise error(f"{where} lacks {name!r}")
    hints = typing.get_type_hints(kind)
    parsed = {name: _parsed(hints[name], values[name], f"{where}.{name}", error) for name in fields if name in values}
    try:
        return kind(**parsed)
    except JaxzsError as cause:  # a rule between its fields
        raise error(f"{where}: {cause}") from cause


def _parsed(hint: Any, value: Any, where: str, error: type[JaxzsError]) -> Any:
    """One value as its annotation wants it; `error` names the place and what was expected there."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where, error)  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        return _parsed_union(arguments, value, where, error)
    if origin in (tuple, list, Sequence):
        return _parsed_list(origin, arguments, value, where, error)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _parsed(arguments[1], entry, f"{where}[{_shown(key)}]", error) for key, entry in value.items()}
    expected = f"one of {', '.join(map(repr, arguments))}" if origin is typing.Literal else _EXPECTED[origin or hint]
    if not (value in arguments if origin is typing.Literal else _is_plain(hint, value)):
        raise error(f"{where} is {_shown(value)}, expected {expected}")
    return float(value) if hint is float else value


_EXPECTED: Mapping[Any, str] = {
    int: "a whole number", float: "a finite number", str: "a text", bool: "true or false",
    dict: "an object", Mapping: "an object",
}  # fmt: skip


def _is_plain(hint: Any, value: Any) -> bool:
    """Whether a value is of a plain type: a bool is no number, and a number of 400 digits is no float."""
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # False for NaN
    return type(value) is hint


def _parsed_union(alternatives: tuple[Any, ...], value: Any, where: str, error: type[JaxzsError]) -> Any:
    if value is None and types.NoneType in alternatives:
        return None
    *first, last = (hint for hint in alternatives if hint is not types.NoneType)
    for hint in first:
        with contextlib.suppress(error):
            return _parsed(hint, value, where, error)
    return _parsed(last, value, where, error)


def _parsed_list(kind: Any, hints: tuple[Any, ...], value: Any, where: str, error: type[JaxzsError]) -> Any:
    if not isinstance(value, list | tuple):
        raise error(f"{where} is {_shown(value)}, expected a list")
    fixed = kind is tuple and hints[-1] is not Ellipsis
    if fixed and len(value) != len(hints):
        raise error(f"{where} has {len(value)} entries, expected {len(hints)}")
    each = hints if fixed else (hints[0],) * len(value)
    parsed = [
        _parsed(hint, entry, f"{where}[{i}]", error) for i, (hint, entry) in enumerate(zip(each, value, strict=True))
    ]
    return parsed if kind is list else tuple(parsed)


def _shown(value: Any) -> str:
    return repr(value)[:100] if isinstance(value, int | float | str | None) else type(value).__name__
