"""Importing jaxzs is light, lazy and quiet; names, versions and lower bounds agree with each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import jaxzs

ROOT = Path(__file__).parents[1]
# Loaded only inside the functions that use them: together they take longer to import than jax.
HEAVY = {
    "PIL",
    "flax",
    "grain",
    "matplotlib",
    "orbax",
    "sklearn",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "transformers",
}
SUBMODULES = sorted(set(jaxzs.__all__) - {"Model", "load", "__version__"})


def _modules_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter, where every warning is an error, after running `code`."""
    report = "import sys, json; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_jaxzs_loads_no_framework():
    assert _modules_after("import jaxzs") & (HEAVY | {"jax", "numpy", "optax", "chex"}) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBMODULES)
def test_each_public_submodule_imports_first_and_alone(name: str):
    loaded = _modules_after(f"import jaxzs; module = jaxzs.{name}; assert module.__doc__")
    assert loaded & HEAVY == set()


def test_command_line_help_does_not_import_jax():
    loaded = _modules_after(
        "from jaxzs.cli import main\n"
        "assert main(['--help']) == 0\n"
        "try:\n"
        "    code = main(['classify', '--help'])\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        "assert not code, code"
    )
    assert loaded & (HEAVY | {"jax", "optax", "chex"}) == set()


def test_public_names():
    assert set(jaxzs.__all__) <= set(dir(jaxzs))
    assert jaxzs.load is jaxzs.clip.load
    assert jaxzs.Model is jaxzs.clip.Model


def test_unknown_attribute_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'jaxzs' has no attribute 'no_such_name'$"):
        _ = jaxzs.no_such_name
    assert not hasattr(jaxzs, "no_such_name")
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from jaxzs import no_such_name")


def test_installed_version_is_the_version_of_the_source():
    try:
        installed = version("jaxzs")
    except PackageNotFoundError:
        pytest.skip("jaxzs is not installed here: pip install -e .")
    assert installed == jaxzs.__version__
    assert f"## [{jaxzs.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_floor_constraints_equal_the_lower_bounds():
    """.ci/floor.txt, where the fast tests run on the oldest versions, pins what pyproject.toml promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    bounds = dict(requirement.split(">=") for requirement in requirements)  # fails without a bound
    pinned = re.findall(r"^([\w-]+)==(\S+)", (ROOT / ".ci" / "floor.txt").read_text(), re.M)
    assert {name: bound for name, bound in pinned if name in bounds} == bounds
