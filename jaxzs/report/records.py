"""The record of a run: one JSON file that says what was run, on what, with what, and what came out.

    schema        1
    command       what gave the numbers, as typed
    settings      all that determines the results: options, seeds, templates
    model         name and fingerprint of the checkpoint; null where there is none
    data          name, fingerprint and number of images of the data; null where there are none
    metrics, figures, per_class, convergence, pseudolabels, confusion, reliability    what was measured
                  (`jaxzs.report.results`)
    cells         parts of a sweep: each with its identity, seconds, revision, date and results (`jaxzs.report.sweep`)
    seconds       compile, run, and perhaps stages
    versions, device, processor, backend, num_devices, matmul_precision, git_revision, date    where and when

More keys may follow, such as the `results` of each image that the commands write. Records of before the schema have a
command, settings and metrics only; they are read as they are.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxzs._version import __version__
from jaxzs.errors import RecordError
from jaxzs.files import write_json
from jaxzs.report import results as shapes
from jaxzs.report.results import Results

if TYPE_CHECKING:
    from jaxzs.clip import Model

SCHEMA = 1  # of what is written; 0 is what came before there was one
_RECORDED = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")
_REQUIRED: dict[str, tuple[type, ...]] = {
    "command": (str,),
    "settings": (dict,),
    "metrics": (dict,),
    "seconds": (dict,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "model": (dict, type(None)),
    "data": (dict, type(None)),
    "cells": (dict,),
    "versions": (dict,),
    "device": (str,),
    "processor": (str,),
    "backend": (str,),
    "num_devices": (int,),
    "git_revision": (str, type(None)),
    "date": (str,),
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A record as read. results: those of the record and of all its cells. schema: 0 before there was one.

    raw: the whole JSON object.
    """

    path: Path
    schema: int
    command: str
    settings: Mapping[str, Any]
    model: Mapping[str, Any] | None
    data: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    results: Results
    cells: Mapping[str, Any]
    raw: Mapping[str, Any]


def environment() -> dict[str, Any]:
    """Versions, device and git revision of this run, ready for JSON.

    >>> report.environment()["versions"]["jaxzs"] == jaxzs.__version__
    True
    """
    import jax

    versions = {"jaxzs": __version__, "python": platform.python_version()}
    for name in _RECORDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package
    return {
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "backend": jax.default_backend(),
        "num_devices": jax.device_count(),
        "matmul_precision": getattr(jax.config, "jax_default_matmul_precision", None) or "default",
        "git_revision": git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Name of this machine's processor, and the bfloat16 instructions that it has."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor() or platform.machine() or "unknown"
    entries = dict(line.split(":", 1) for line in described.splitlines() if ":" in line)
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    flags = set(entries.get("flags", entries.get("Features", "")).split())
    known = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last is Arm's
    name = entries.get("model name") or platform.machine()
    return f"{name} ({', '.join(known) or 'no bfloat16 instructions'})"


def model_entry(model: Model) -> dict[str, str]:
    """What a record says of a checkpoint.

    >>> report.model_entry(jaxzs.load("demo"))["name"]
    'demo'
    """
    return {"name": model.name, "fingerprint": model.fingerprint}


def data_entry(name: str, fingerprint: str, images: int) -> dict[str, Any]:
    """What a record says of its data; fingerprint: e.g. a source's `identity`.

    >>> source = data.open_source("photos")
    >>> report.data_entry("photos", source.identity, len(source))["images"]
    30
    """
    return {"name": name, "fingerprint": fingerprint, "images": images}


def write_record(
    path: str | Path | None,
    *,
    command: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    results: Results | None = None,
    model: Model | None = None,
    data: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write one run's JSON record atomically and return it; with None as path only return it.

    command: what gave the numbers. settings: JSON values, paths as text. results: what was measured, or only metrics.
    data: from `data_entry`. seconds: by stage, from `measured`. Raises `RecordError` for what could not be read again,
    `DataError` when the file cannot be written.

    >>> record = report.write_record(
    ...     "run.json", command="python run.py", settings={"gamma": 0.0}, metrics={"accuracy": 93.0}
    ... )
    >>> record["metrics"], "device" in record
    ({'accuracy': 93.0}, True)
    """
    measured = Results(metrics or {}) if results is None else results
    record = {
        "schema": SCHEMA,
        "command": command,
        "settings": json_values(settings),
        "model": None if model is None else model_entry(model),
        "data": None if data is None else dict(data),
        **measured.as_json(),
        "seconds": dict(seconds or {}),
        **more,
        **environment(),
    }
    record = json_values(record)
    # What could not be read back is not written.
    parse_record(record, Path(path or "record"))
    if path is not None:
        write_json(path, record)
    return record


def json_values(value: Any) -> Any:
    """Tuples as lists, paths as text, null for numbers that are not finite: what reading the JSON gives back."""
    # NaN and infinities are no JSON, though Python writes them: other readers would refuse the file.
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def read_record(path: str | Path) -> Record:
    """Read and check the record of a run.

    Raises `RecordError` naming the file and the entry: no such file, no JSON, no record, a schema of a later version.

    >>> figure = report.Figure("digits", "zero-shot", "accuracy", 83.1)
    >>> _ = report.write_record(
    ...     "run.json", command="python run.py", settings={}, results=report.Results(figures=(figure,))
    ... )
    >>> report.read_record("run.json").results.figures[0].method
    'zero-shot'
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not valid JSON, or is cut off: {error}") from error
    return parse_record(raw, path)


def parse_record(raw: Any, path: Path) -> Record:
    """Check a JSON value; `path` is only named."""
    if not isinstance(raw, dict):
        raise RecordError(f"{path} is not the record of a run: it holds no JSON object")
    schema = raw.get("schema", 0)
    if not isinstance(schema, int) or isinstance(schema, bool) or not schema >= 0:
        raise RecordError(f"{path}: schema is {schema!r}, expected {SCHEMA}")
    if schema > SCHEMA:
        raise RecordError(f"{path} is of schema {schema}, this version of jaxzs knows up to {SCHEMA}; update jaxzs")
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise RecordError(f"{path} is not the record of a run: it lacks {', '.join(missing)}")
    # Before there was a schema, other keys could hold anything.
    for name, kinds in (_REQUIRED | (_OPTIONAL if schema else {})).items():
        if name in raw and not isinstance(raw[name], kinds):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise RecordError(f"{path}: {name} is {type(raw[name]).__name__}, expected {wanted}")
    found = [shapes.parse(raw, str(path))]
    cells = raw.get("cells", {}) if schema else {}
    for key, cell in cells.items():
        seconds = cell.get("seconds") if isinstance(cell, dict) else None
        whole = isinstance(seconds, dict) and all(isinstance(own, int | float) for own in seconds.values())
        if not whole or not isinstance(cell.get("identity"), str):
            raise RecordError(f"{path}: cells[{key!r}] lacks its identity or its seconds")
        found.append(shapes.parse(cell, f"{path}: cells[{key!r}]"))
    return Record(
        path=path,
        schema=schema,
        command=raw["command"],
        settings=raw["settings"],
        model=raw.get("model") if schema else None,
        data=raw.get("data") if schema else None,
        seconds=raw["seconds"],
        results=dataclasses.replace(shapes.joined(found), metrics=raw["metrics"]),
        cells=cells,
        raw=raw,  # with what a command adds of its own
    )


def git_revision() -> str | None:
    """Revision of the checkout that jaxzs runs from; None for an installed package."""
    folder = Path(__file__).parents[1]  # the package
    if not (folder.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
