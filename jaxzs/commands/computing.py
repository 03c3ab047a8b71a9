"""What a command computes on, and the compiled programs that it keeps for the next one.

All of it is done when a command runs and undone when it ends, never when the library is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxzs.errors import ConfigError
from jaxzs.files import cache_folder

if TYPE_CHECKING:
    from jaxzs.commands.options import ComputeOptions

_WORTH_KEEPING = 0.1  # seconds of compiling; jax's own 1 would leave out most programs of a small model
_MOST_BYTES = 2**30  # of all programs together; then the oldest go


@contextlib.contextmanager
def computing(options: Any) -> Iterator[None]:
    """The device that is asked for, and the compile cache, around a command that computes."""
    from jaxzs.commands.options import ComputeOptions

    if not isinstance(options, ComputeOptions):  # a command that only reads and writes files
        yield
        return
    if options.device is not None:
        _use(options.device, check=not getattr(options, "distributed", False))
    with compile_cache(options):
        yield


def _use(device: str, *, check: bool) -> None:
    """Raise `ConfigError` where jax has no such device. Several processes find each other before they look."""
    import jax

    before = _set({"jax_platforms": device})  # of effect only before the first computation
    if not check:
        return
    try:
        found = jax.default_backend()
    except Exception as error:  # each kind of plugin fails in its own way
        _set(before)
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = {"gpu": "; for GPUs pip install 'jaxzs[cuda]'", "tpu": "; for TPUs pip install 'jaxzs[tpu]'"}
        raise ConfigError(f"--device {device}: jax finds none here ({reason}){remedy.get(device, '')}") from error
    if found != device:  # jax had begun before
        _set(before)
        raise ConfigError(f"--device {device}: this process computes on {found} already")


@contextlib.contextmanager
def compile_cache(options: ComputeOptions) -> Iterator[None]:
    """Programs compiled in the block are kept for later runs, and taken from there.

    Not with --no-cache, not where the user has a cache of their own (`JAX_COMPILATION_CACHE_DIR`) or has forbidden it,
    nor where none can be kept safely. A cache costs or saves time, never the result.
    """
    # What the user has told jax itself is left alone.
    folder = None if options.no_cache or _is_set("cache_dir") or not _is_set("enable") else private_folder()
    if folder is None:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache

    changes: dict[str, Any] = {"jax_compilation_cache_dir": str(folder)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        changes["jax_persistent_cache_min_compile_time_secs"] = _WORTH_KEEPING
    before = _set(changes)
    compilation_cache.reset_cache()  # whether there is one is otherwise decided once a process
    try:
        with warnings.catch_warnings():
            # A cache that cannot be read or written costs seconds, nothing else.
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            yield
    finally:
        _set(before)
        compilation_cache.reset_cache()


def _is_set(what: Literal["cache_dir", "enable"]) -> bool:
    """What the user has told jax, by variables of the environment or in this process."""
    import jax

    name = {"cache_dir": "jax_compilation_cache_dir", "enable": "jax_enable_compilation_cache"}[what]
    return bool(getattr(jax.config, name))


def _set(changes: dict[str, Any]) -> dict[str, Any]:
    """Sets options of jax; returns what they were."""
    import jax

    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    return before


def private_folder() -> Path | None:
    """Folder of compiled programs, made for this user alone; None where it cannot be, or is not, theirs alone.

    What lies in it is executed, so nobody else may be able to write there.
    """
    root = cache_folder()
    if root is None:
        return None
    folder = root / "compiled" / _machine()
    try:
        for made in (root, folder.parent, folder):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Programs are executed, so nobody else may write here; the folder above may be one that is shared.
            if made != root:
                _check_private(made)
        _prune(folder)
    except OSError:  # then nothing is kept
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _check_private(folder: Path) -> None:
    """Raise `OSError` unless it is a folder of this user that nobody else can write to."""
    status = folder.lstat()  # of a link itself, not of where it leads
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or others:
        raise PermissionError(f"{folder} is not this user's alone")


def _machine() -> str:
    """Name for the kind of processor: programs for one may not run on another that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")  # x86, Arm
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


def _prune(folder: Path) -> None:
    """Programs that were kept first go where all of them take too much room."""
    kept = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)  # oldest first
    total = sum(file.stat().st_size for file in kept)
    for file in kept:
        if total <= _MOST_BYTES:
            return
        total -= file.stat().st_size
        if file.is_file():
            file.unlink(missing_ok=True)  # another run may have been here before
