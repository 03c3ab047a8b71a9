"""Dense features against the official code of SCLIP and NACLIP, and transcriptions of ClearCLIP and MaskCLIP."""

from __future__ import annotations

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxzs.clip import CLIPConfig, Numerics, TextConfig, VisionConfig, normalize
from jaxzs.errors import DataError, ImageError
from jaxzs.patch import dense_features, dense_scores

FILE = Path(__file__).parent / "golden" / "patch" / "attention.npz"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


@functools.cache
def tower():
    """Parameters of the golden tower, by OpenAI's names, in jaxzs's tree."""
    w = {key[2:]: value for key, value in golden().items() if key.startswith("w/")}
    size, patch, width, layers, heads, out = golden()["config"].tolist()
    linear = lambda name: {"kernel": w[name + ".weight"].T, "bias": w[name + ".bias"]}  # noqa: E731
    norm = lambda name: {"scale": w[name + ".weight"], "bias": w[name + ".bias"]}  # noqa: E731

    def layer(number: int) -> dict:
        own = f"transformer.resblocks.{number}."
        qkv = zip(
            ("q_proj", "k_proj", "v_proj"), np.split(w[own + "attn.in_proj_weight"], 3),
            np.split(w[own + "attn.in_proj_bias"], 3), strict=True,
        )  # fmt: skip
        attention = {name: {"kernel": weight.T, "bias": bias} for name, weight, bias in qkv}
        return {
            "self_attn": attention | {"out_proj": linear(own + "attn.out_proj")},
            "layer_norm1": norm(own + "ln_1"),
            "layer_norm2": norm(own + "ln_2"),
            "mlp": {"fc1": linear(own + "mlp.c_fc"), "fc2": linear(own + "mlp.c_proj")},
        }

    vision = {
        "embeddings": {
            "class_embedding": w["class_embedding"],
            "position_embedding": {"embedding": w["positional_embedding"]},
            "patch_embedding": {"kernel": w["conv1.weight"].transpose(2, 3, 1, 0)},
        },
        "pre_layrnorm": norm("ln_pre"),
        "post_layernorm": norm("ln_post"),
        "encoder": {"layers": {str(number): layer(number) for number in range(layers)}},
    }
    text = TextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=8, max_position_embeddings=4, eos_token_id=7,
    )  # fmt: skip
    config = CLIPConfig(
        text=text,
        vision=VisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=size, patch_size=patch, hidden_act="quick_gelu",
        ),
        projection_dim=out,
    )  # fmt: skip
    return {"vision_model": vision, "visual_projection": {"kernel": w["proj"]}}, config


def pixels_of(shape: str) -> np.ndarray:
    return golden()[f"{shape}/pixels"].transpose(0, 2, 3, 1)


CASES = {
    "vanilla_vanilla": {"attention": "ordinary"},
    "reduced_vanilla": {"attention": "ordinary", "reduced": True},
    "vanilla_csa": {"attention": "csa"},
    "reduced_kk": {"attention": "kk"},
    "reduced_naclip": {"attention": "naclip"},
    "vanilla_naclip": {"attention": "naclip", "reduced": False},
    "reduced_naclip_std2": {"neighbourhood": 2.0},
    "own_clearclip_qq": {"attention": "qq"},
    "own_maskclip_v": {"attention": "v"},
}


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_as_the_original(shape, name):
    """Within 1e-5 of the largest value: three float32 layers, summed in another order."""
    params, config = tower()
    expected = golden()[f"{shape}/{name}"][:, 1:]
    found = dense_features(params, pixels_of(shape), config, **CASES[name])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_exact_positions_are_an_option():
    params, config = tower()
    offset, exact = (
        dense_features(params, pixels_of("wide"), config, positions=kind) for kind in ("bicubic_offset", "bicubic")
    )
    difference = np.abs(offset - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.2  # the original samples elsewhere
    square = [
        dense_features(params, pixels_of("square"), config, positions=kind) for kind in ("bicubic_offset", "bicubic")
    ]
    np.testing.assert_array_equal(*square)  # nothing to sample


def test_scores_are_cosines():
    params, config = tower()
    texts = np.random.default_rng(0).normal(size=(5, config.projection_dim)).astype(np.float32)
    scores = dense_scores(params, pixels_of("wide"), 7 * texts, config, attention="csa")
    features = normalize(dense_features(params, pixels_of("wide"), config, attention="csa"))
    np.testing.assert_allclose(scores, features @ normalize(jnp.asarray(texts)).T, atol=1e-6)
    assert np.abs(scores).max() <= 1 + 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_transformations(data_mesh):
    """Jitted, vmapped over the neighbourhood, divided over eight devices, padded: the same numbers."""
    params, config = tower()
    images = np.concatenate([pixels_of("square")] * 4)
    alone = dense_features(params, images, config)
    shared = jax.device_put(images, NamedSharding(data_mesh, PartitionSpec("data")))
    np.testing.assert_allclose(dense_features(params, shared, config), alone, atol=2e-6)
    by_width = jax.vmap(lambda width: dense_features(params, images[:2], config, neighbourhood=width))
    found = by_width(jnp.array([2.0, 5.0]))
    expected = golden()["square/reduced_naclip_std2"][:, 1:]
    np.testing.assert_allclose(found[0], expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found[1], alone[:2], atol=2e-6)


def test_compiled_once():
    params, config = tower()
    run = jax.jit(
        chex.assert_max_traces(lambda pixels, width: dense_features(params, pixels, config, neighbourhood=width), n=1)
    )
    for seed, width in enumerate((2.0, 5.0)):
        run(pixels_of("square") + np.float32(seed), width)


def test_bfloat16_is_close():
    """Operands of 8 bits: cosines of patches with themselves stay near 1."""
    params, config = tower()
    full, half = (
        normalize(dense_features(params, pixels_of("wide"), config, numerics=Numerics(dtype)))
        for dtype in (None, jnp.bfloat16)
    )
    assert (full * half).sum(-1).min() > 0.99


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"attention": "best"}, DataError, "expected one of csa, qq, kk, v, naclip, ordinary"),
        ({"positions": "nearest"}, DataError, "bicubic_offset, bicubic"),
        ({"neighbourhood": 0.0}, DataError, "above 0"),
        ({"neighbourhood": np.nan}, DataError, "above 0"),
        ({"pixels": np.full((1, 32, 32, 3), np.nan, np.float32)}, ImageError, "not finite"),
        ({"pixels": np.zeros((1, 32, 30, 3), np.float32)}, ImageError, "multiples of the patch size"),
        ({"text_features": np.zeros((3, 20), np.float32)}, DataError, "all zeros"),
    ],
)
def test_bad_input_is_named(change, error, match):
    params, config = tower()
    texts = np.ones((3, config.projection_dim), np.float32)
    arguments = {"pixels": pixels_of("square"), "text_features": texts} | change
    with pytest.raises(error, match=match):
        dense_scores(params, config=config, **arguments)
