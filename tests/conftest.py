"""Every test runs with 8 host devices, strict dtype promotion, and no implicit rank promotion."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Some 10,000 small programs are compiled once and run once: what LLVM would make faster is not worth its time, nor a
# thread for each function. Commands that tests start inherit both.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1"
jax.config.update("jax_disable_most_optimizations", True)
# Large programs are kept between runs; to write a small one takes longer than to compile it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _kept = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(_kept))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# The first example of a test compiles, and a loaded machine is slow: neither is a failure.
settings.register_profile("jaxzs", deadline=None)
settings.load_profile("jaxzs")

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True, scope="module")
def free_compiled_programs() -> Iterator[None]:
    """Forget compiled programs after each file: each takes memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compiled as users have it: for results that hang on the last bit, as the order of saturated scores does."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


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


@pytest.fixture(scope="session")
def digit_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ten real scanned digits of each of the classes one, two and zero: `photos/` in documentation."""
    from PIL import Image

    from jaxzs.data import samples

    folder = tmp_path_factory.mktemp("photos")
    images, labels = samples.digits()
    for digit, name in enumerate(("zero", "one", "two")):
        (folder / name).mkdir()
        for number, image in enumerate(images[labels == digit][:10]):
            Image.fromarray(image).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete CLIP of random weights: 32-pixel images, byte-level tokens, 16 features."""
    from tokenizers import pre_tokenizers

    from jaxzs import clip

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32, "crop_size": 32}))
    config = clip.CLIPConfig(
        text=clip.TextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokens),
            max_position_embeddings=40,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
        ),
        vision=clip.VisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        projection_dim=16,
    )
    params = clip.random_params(jax.random.key(0), config)
    # Large enough weights that features of different images and texts differ visibly.
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim == 2 else leaf, params)
    clip.write_checkpoint(folder, params, config)
    return folder
