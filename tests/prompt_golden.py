"""Reference checkpoint and outputs of the original prompt-tuning code, as the tests of `jaxzs.prompt` read them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import clip
from jaxzs.prompt.joint import JointPrompt
from jaxzs.prompt.text import TextPrompt
from jaxzs.prompt.visual import VisualPrompt

FOLDER = Path(__file__).parent / "golden" / "prompt_tuning"
# The reference checkpoint's joint block has width 32. The trajectories were made with float32 throughout.
MODALITIES = {"text": TextPrompt(), "image": VisualPrompt(), "multi": JointPrompt(width=32, half=False)}


@functools.cache
def checkpoint():
    """(params, config) of the reference checkpoint: 3 + 3 layers of width 64."""
    params, config = clip.read_checkpoint(FOLDER / "model")
    return jax.tree.map(jnp.asarray, params), config


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one reference file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def meta() -> dict:
    return json.loads((FOLDER / "meta.json").read_text())


def nhwc(images: np.ndarray) -> jax.Array:
    """Reference images are channels first."""
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def prompts_of(values: dict[str, np.ndarray], prefix: str):
    """A prompt pytree from the arrays whose names start with `prefix`, in the original code's layout."""
    leaf = {k.removeprefix(prefix): jnp.asarray(v) for k, v in values.items() if k.startswith(prefix)}
    if "prefix" in leaf:
        width = leaf["prefix"].shape[-1]
        return {"prefix": leaf["prefix"].reshape(-1, width)}
    linear = lambda name: {"kernel": leaf[f"{name}.weight"].T, "bias": leaf[f"{name}.bias"]}  # noqa: E731
    norm = lambda name: {"scale": leaf[f"{name}.weight"], "bias": leaf[f"{name}.bias"]}  # noqa: E731
    block = "transformer.resblocks.0." if "transformer.resblocks.0.ln_1.weight" in leaf else "jt.resblocks.0."
    qkv = zip(
        "qkv",
        jnp.split(leaf[f"{block}attn.in_proj_weight"].T, 3, axis=1),
        jnp.split(leaf[f"{block}attn.in_proj_bias"], 3),
        strict=True,
    )
    return {
        "text": leaf["coop_embeddings"][0],
        "visual": leaf["vpt_embeddings"][0],
        "text_in": linear("proj_coop_pre"),
        "text_out": linear("proj_coop_post"),
        "visual_in": linear("proj_vpt_pre"),
        "visual_out": linear("proj_vpt_post"),
        "block": {
            "layer_norm1": norm(f"{block}ln_1"),
            "self_attn": {f"{n}_proj": {"kernel": k, "bias": b} for n, k, b in qkv}
            | {"out_proj": linear(f"{block}attn.out_proj")},
            "layer_norm2": norm(f"{block}ln_2"),
            "mlp": {"fc1": linear(f"{block}mlp.c_fc"), "fc2": linear(f"{block}mlp.c_proj")},
        },
    }


def assert_near(actual, expected, relative: float) -> None:
    """Within `relative` of the largest reference value, leaf by leaf.

    A leaf below 1e-3 of the largest leaf is judged by that: the gradient of a key bias is zero in exact arithmetic, and
    what is there is rounding.
    """
    floor = 1e-3 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=relative * max(np.abs(e).max(), floor))
