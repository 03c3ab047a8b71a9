"""Needs torch and transformers beside jaxzs: 4.57 (the last with FlaxCLIPModel) or 5; see .ci/run.

Each test file names the version that it is for in `TRANSFORMERS` and is left out where another one is installed.
Without torch all are skipped; with JAXZS_REQUIRE_INTEROP=1 they then run, and fail, instead.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# Otherwise transformers asks the hub about every local folder, and waits for an answer.
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads spin while they wait, which takes the cores from everybody else; these models are tiny.
os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).parent


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
        if os.environ.get("JAXZS_REQUIRE_INTEROP") != "1":
            for item in ours:
                if not getattr(item.module, "NEEDS_TORCH", True) and installed.startswith(item.module.TRANSFORMERS):
                    continue
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))
        return
    others = {item for item in ours if not installed.startswith(item.module.TRANSFORMERS)}
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=list(others))
