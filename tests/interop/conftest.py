"""Needs torch and transformers beside jaxzs: 4.57 (the last with FlaxCLIPModel) or 5; open_clip with 5; see .ci/run.

Each test file names the versions that it is for in `TRANSFORMERS` and is left out where another one is installed.
Without torch all are skipped, without open_clip its own; with JAXZS_REQUIRE_INTEROP=1 they run, and fail, instead.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.torch_peers import importable_torchvision

# Otherwise transformers asks the hub about every local folder, and waits for an answer.
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads spin while they wait, which takes the cores from everybody else; these models are tiny.
os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).parent
REQUIRED = os.environ.get("JAXZS_REQUIRE_INTEROP") == "1"


@pytest.fixture(scope="session", autouse=True)
def torchvision_can_be_imported() -> Iterator[None]:
    """Beside a torch without CUDA, too."""
    held = importable_torchvision()
    yield
    del held


@pytest.fixture(scope="session")
def open_clip(torchvision_can_be_imported: None) -> Any:
    """The library."""
    if not REQUIRED:
        pytest.importorskip("open_clip")
    import open_clip

    return open_clip


@pytest.fixture
def plain_jax() -> Iterator[None]:
    """transformers' Flax code promotes types and ranks implicitly; our own runs strictly in all other tests."""
    with (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.default_matmul_precision("highest"),
    ):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    installed = importlib.metadata.version("transformers")
    if importlib.util.find_spec("torch") is None:
        if not REQUIRED:
            for item in ours:
                if not getattr(item.module, "NEEDS_TORCH", True) and installed.startswith(item.module.TRANSFORMERS):
                    continue
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))
        return
    others = {item for item in ours if not installed.startswith(item.module.TRANSFORMERS)}
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=list(others))
