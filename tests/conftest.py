"""Every test runs with 8 host devices, strict dtype promotion, and no implicit rank promotion."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def golden() -> Path:
    """Folder of the reference outputs that are kept in the repository."""
    return GOLDEN


@pytest.fixture
def shared() -> Path:
    """Folder with real images and features beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with real images and features is not beside this checkout")
    return SHARED


@pytest.fixture
def data_mesh() -> jax.sharding.Mesh:
    """Eight host devices along one axis named "data"."""
    return jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
