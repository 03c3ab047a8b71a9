"""What the tests of patch classification share: the reference outputs, and a small random model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs.clip import CLIPConfig, TextConfig, VisionConfig, random_params
from jaxzs.clip.weights import read_checkpoint
from jaxzs.patch import default_attention_layers, full_grid

# --- reference outputs ------------------------------------------------------------------------------

FOLDER = Path(__file__).parent / "golden" / "tagclip"
CASES = ("case0", "case1", "case4")
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@functools.cache
def checkpoint():
    return read_checkpoint(FOLDER / "model_A")


@functools.cache
def case(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / f"{name}.npz"))


@functools.cache
def unit() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "unit.npz"))


def pixels_of(expected: dict[str, np.ndarray]) -> np.ndarray:
    return ((expected["resized_u8"].astype(np.float32) / 255 - MEAN) / STD)[None]


def settings(expected: dict[str, np.ndarray]) -> dict:
    """Layers and relative constant of the original's data set mode."""
    stuff = str(expected["dataset"]) == "cocostuff"
    return {
        "layers": default_attention_layers(12, "all" if stuff else "last"),
        "relative_threshold": 0.1 if stuff else 0.5,
    }


def grid_of(expected: dict[str, np.ndarray]):
    return full_grid(1, *(int(side) for side in expected["grid"]))


def assert_close(actual, expected, tolerance: float = 2e-5) -> None:
    """Within 2e-5 of the array's maximum: 12 float32 layers, summed in another order than the original's."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * scale)


# --- a small random model ---------------------------------------------------------------------------

F, C = 5, 7


def small(**vision) -> CLIPConfig:
    chosen = {"image_size": 48, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2}
    chosen |= {"intermediate_size": 64, "num_hidden_layers": 2} | vision
    text = TextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=8, max_position_embeddings=4, eos_token_id=7,
    )  # fmt: skip
    return CLIPConfig(text=text, vision=VisionConfig(**chosen), projection_dim=16)


CONFIG = small()


@functools.cache
def params(config: CLIPConfig = CONFIG):
    tree = random_params(jax.random.key(3), config)
    # Sharper than a fresh initialisation: patches must differ for boxes to exist.
    tree["logit_scale"] = jnp.log(jnp.float32(20.0))
    for layer in tree["vision_model"]["encoder"]["layers"].values():
        for name in ("q_proj", "k_proj"):
            layer["self_attn"][name]["kernel"] = 4 * layer["self_attn"][name]["kernel"]
    return tree


def pixels(num: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    shape = (num, 8 * rows, 8 * columns, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TEXTS = np.random.default_rng(1).normal(size=(C, 16)).astype(np.float32)


# --- what is compiled -------------------------------------------------------------------------------

_compiled: list[str] = []


@functools.cache
def _watch() -> None:
    """Listeners cannot be taken back by public means: one serves all tests."""
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: _compiled.append(event) if event.endswith("backend_compile_duration") else None
    )


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What was compiled inside, programs of the persistent cache included."""
    _watch()
    before, found = len(_compiled), []
    yield found
    found += _compiled[before:]
