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

# Otherwise transformers asks the hub about every local folder, and waits for an answer.
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads spin while they wait, which takes the cores from everybody else; these models are tiny.
os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).parent
REQUIRED = os.environ.get("JAXZS_REQUIRE_INTEROP") == "1"


@pytest.fixture(scope="session", autouse=True)
def importable_torchvision() -> Iterator[None]:
    """PyPI's torchvision beside a torch without CUDA, where its compiled half cannot be loaded.

    open_clip and transformers import it for its transforms, which are pure Python. The import fails all the same, for
    two operators of detection that only the compiled half declares: declared here, and never called.
    """
    if (found := importlib.util.find_spec("torchvision")) is None:
        yield
        return
    import torch

    declared = torch.library.Library("torchvision", "FRAGMENT")  # for as long as it is held
    try:
        torch.ops.load_library(Path(str(found.origin)).parent / "_C.so")
    except OSError:
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    yield


@pytest.fixture(scope="session")
def open_clip(importable_torchvision: None) -> Any:
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
