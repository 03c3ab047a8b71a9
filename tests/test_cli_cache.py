"""The commands keep compiled programs: where, when not, and never beyond a command. And the choice of a device."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxzs.cli import main
from jaxzs.commands.classify import ClassifyOptions
from jaxzs.commands.computing import compile_cache, computing, private_folder
from jaxzs.errors import ConfigError
from jaxzs.files import cache_folder


@pytest.fixture(autouse=True)
def no_other_cache(monkeypatch, tmp_path):
    """As in a user's shell: jax has no cache of its own, and ours goes to a folder of the test."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAXZS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def compiled() -> float:
    """Compiles something, whatever this process has compiled before; worth keeping as of 0 seconds."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.clear_caches()
    try:
        return float(jax.jit(lambda x: jnp.sin(x) * 3)(1.0))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def kept(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*-cache")]


def test_programs_are_kept_in_a_private_folder(tmp_path):
    with compile_cache(ClassifyOptions()):
        compiled()
    assert kept(tmp_path / "xdg" / "jaxzs" / "compiled")
    for folder in (tmp_path / "xdg" / "jaxzs", *(tmp_path / "xdg" / "jaxzs").rglob("*")):
        if folder.is_dir():
            assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir is None, "the caller's jax is as it was"


def test_the_second_run_reads_what_the_first_has_kept(tmp_path):
    hits = []
    listen = lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None  # noqa: E731
    with compile_cache(ClassifyOptions()):
        compiled()
    jax.monitoring.register_event_listener(listen)
    with compile_cache(ClassifyOptions()):
        compiled()
    assert hits


def test_jaxzs_cache_moves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXZS_CACHE", str(tmp_path / "own"))
    with compile_cache(ClassifyOptions()):
        compiled()
    assert kept(tmp_path / "own")
    assert not (tmp_path / "xdg").exists()


def test_no_cache_keeps_nothing(tmp_path):
    with compile_cache(ClassifyOptions(no_cache=True)):
        compiled()
    assert list(tmp_path.iterdir()) == []


def test_the_users_own_cache_of_jax_is_used(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
    compilation_cache.reset_cache()
    with compile_cache(ClassifyOptions()):
        compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "users")
    assert kept(tmp_path / "users")
    assert not (tmp_path / "xdg").exists()


def test_a_place_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "x", Path("/proc/1/nowhere")):
        monkeypatch.setenv("JAXZS_CACHE", str(place))
        with compile_cache(ClassifyOptions()):
            assert compiled() == pytest.approx(2.5244, abs=1e-4)


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXZS_CACHE", str(tmp_path / "shared"))
    (tmp_path / "shared" / "compiled").mkdir(parents=True)
    (tmp_path / "shared" / "compiled").chmod(0o777)
    assert private_folder() is None
    (tmp_path / "shared" / "compiled").chmod(0o700)
    assert private_folder() is not None
    monkeypatch.setenv("JAXZS_CACHE", str(tmp_path / "linked"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "compiled").symlink_to(tmp_path / "shared")
    assert private_folder() is None


def test_a_damaged_program_is_compiled_again(tmp_path):
    with compile_cache(ClassifyOptions()):
        compiled()
        for path in (tmp_path / "xdg").rglob("*-cache"):
            path.write_bytes(b"damaged")
        with warnings.catch_warnings():
            assert compiled() == pytest.approx(2.5244, abs=1e-4)


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    with compile_cache(ClassifyOptions()):
        compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/jaxzs")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache_folder() is None


def test_importing_the_library_sets_nothing():
    code = "import jax, jaxzs, jaxzs.cli, jaxzs.zeroshot, jaxzs.proxy; print(jax.config.jax_compilation_cache_dir)"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() in ("None", "")


def test_commands_that_compute_nothing_make_no_cache(tmp_path, capsys):
    assert main(["datasets"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_named(capsys):
    before = jax.config.jax_platforms
    with computing(ClassifyOptions(device="cpu", no_cache=True)):
        pass
    with (
        pytest.raises(ConfigError, match="--device tpu: this process computes on cpu"),
        computing(ClassifyOptions(device="tpu")),
    ):
        pass
    jax.config.update("jax_platforms", before)


@pytest.mark.slow
def test_a_fresh_process_without_that_device_says_so():
    arguments = ["classify", "x", "--labels", "a,b", "--device", "gpu", "--no-cache"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "jaxzs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "no such file" in done.stderr:
        pytest.skip("there is a GPU here")
    assert done.returncode == 2
    assert "jaxzs classify: --device gpu: jax finds none here" in done.stderr
    assert "jaxzs[cuda]" in done.stderr
    assert "Traceback" not in done.stderr
