"""What a run leaves behind: a JSON record of settings, metrics, versions and device; Markdown tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxzs
from jaxzs.files import write_json

_RECORDED = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, device and git revision of this run, ready for JSON."""
    import jax

    versions = {"jaxzs": jaxzs.__version__, "python": platform.python_version()}
    for name in _RECORDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "num_devices": jax.device_count(),
        "matmul_precision": getattr(jax.config, "jax_default_matmul_precision", None) or "default",
        "git_revision": _git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_record(
    path: str | Path,
    *,
    command: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    seconds: Mapping[str, float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write one run's JSON record atomically and return it.

    command: what gave the numbers. settings, metrics: JSON values. seconds: by stage, compile apart from run.
    more: e.g. fingerprints of model and data. Raises `DataError` when the file cannot be written.
    """
    record = {
        "command": command,
        "settings": dict(settings),
        "metrics": dict(metrics),
        "seconds": dict(seconds or {}),
        **more,
        **environment(),
    }
    write_json(path, record)
    return record


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 2) -> str:
    """A Markdown table; floats are rounded to `digits`, columns aligned to read well as plain text too.

    >>> print(markdown_table(["method", "accuracy"], [["zero-shot", 87.123]]))
    | method    | accuracy |
    | :-------- | -------: |
    | zero-shot |    87.12 |
    """
    cells = [[_cell(value, digits) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    widths = [max(width, 4) for width in widths]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]
    line = lambda row: (  # noqa: E731
        "| "
        + " | ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        )
        + " |"
    )
    rule = [
        "-" * (width - 1) + ":" if to_right else ":" + "-" * (width - 1)
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(list(header)), line(rule), *map(line, cells)])


def _cell(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _git_revision() -> str | None:
    """Revision of the checkout that jaxzs runs from; None for an installed package."""
    folder = Path(__file__).parent
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
