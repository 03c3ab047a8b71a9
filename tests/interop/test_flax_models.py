"""The same code on transformers' Flax CLIP and on `jaxzs.flax`: one import changed, equal outputs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxzs.flax

GOLDEN = Path(__file__).parents[1] / "golden/clip"
MODELS = ("quickgelu_legacy_eos", "gelu_first_eos", "odd_sizes")
KINDS = ("FlaxCLIPModel", "FlaxCLIPTextModel", "FlaxCLIPTextModelWithProjection", "FlaxCLIPVisionModel")
TRANSFORMERS, NEEDS_TORCH = "4.57.", False
ATOL = 2e-5  # float32 on both sides, hidden states of order 10, logits of order 10

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("plain_jax")]


def classes(kind: str):
    import transformers

    return getattr(transformers, kind), getattr(jaxzs.flax, kind)


def arguments(kind: str, name: str) -> dict[str, np.ndarray]:
    texts, images = (np.load(GOLDEN / name / f"ref_{part}.npz") for part in ("text", "image"))
    text = {key: texts[f"hole_mask/{key}"] for key in ("input_ids", "attention_mask")}
    pixels = {"pixel_values": images["pixel_values_nchw"]}
    return {"FlaxCLIPModel": {**text, **pixels}, "FlaxCLIPVisionModel": pixels}.get(kind, text)


def assert_equal(theirs, ours) -> None:
    """Names, order, shapes, types and values, of outputs within outputs and of tuples."""
    if hasattr(theirs, "keys"):
        assert list(theirs.keys()) == list(ours.keys())
        for key in theirs:
            assert_equal(theirs[key], ours[key])
            assert_equal(getattr(theirs, key), getattr(ours, key))
        return
    if isinstance(theirs, tuple):
        assert len(theirs) == len(ours)
        for a, b in zip(theirs, ours, strict=True):
            assert_equal(a, b)
        return
    assert theirs.shape == ours.shape
    assert theirs.dtype == ours.dtype
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "options", [{}, {"output_hidden_states": True, "output_attentions": True}, {"return_dict": False}]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_equal_outputs(name, kind, options):
    # Of a whole CLIP's folder the text class there takes the width from the text part, which is not always right.
    width = json.loads((GOLDEN / name / "config.json").read_text())["projection_dim"]
    entries = {"projection_dim": width} if kind.endswith("Projection") else {}
    theirs, ours = (made.from_pretrained(GOLDEN / name, **entries) for made in classes(kind))
    given = arguments(kind, name)
    a, b = theirs(**given, **options), ours(**given, **options)
    assert_equal(a, b)
    assert_equal(a[0], b[0])
    assert len(a) == len(b)
    assert jax.tree.structure(theirs.params) == jax.tree.structure(ours.params)
    assert theirs.config.to_dict() == ours.config.to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_equal_features(name):
    theirs, ours = (made.from_pretrained(GOLDEN / name) for made in classes("FlaxCLIPModel"))
    given = arguments("FlaxCLIPModel", name)
    pixels, ids, mask = given["pixel_values"], given["input_ids"], given["attention_mask"]
    assert_equal(theirs.get_image_features(pixels), ours.get_image_features(pixels))
    assert_equal(theirs.get_text_features(ids, mask), ours.get_text_features(ids, mask))
    places = np.broadcast_to(np.arange(ids.shape[1])[::-1], ids.shape)
    assert_equal(theirs.get_text_features(ids, mask, places), ours.get_text_features(ids, mask, places))
    assert_equal(theirs.get_text_features(ids, params=ours.params), ours.get_text_features(ids, params=theirs.params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [False, True])
def test_folders_cross_in_both_directions(kind, safe, tmp_path):
    made = classes(kind)
    given = arguments(kind, "gelu_first_eos")
    for writer, reader in (made, made[::-1]):
        model = writer.from_pretrained(GOLDEN / "gelu_first_eos")
        folder = tmp_path / writer.__module__
        model.save_pretrained(folder, safe_serialization=safe)
        other = reader.from_pretrained(folder)
        assert_equal(model(**given)[0], other(**given)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_signatures(kind):
    theirs, ours = classes(kind)
    for method in ("__call__", "get_text_features", "get_image_features", "init_weights", "to_bf16"):
        if hasattr(theirs, method):
            expected = list(inspect.signature(getattr(theirs, method)).parameters)
            assert list(inspect.signature(getattr(ours, method)).parameters) == expected
    wanted = set(inspect.signature(theirs.save_pretrained).parameters) - {"kwargs"}
    assert wanted <= set(inspect.signature(ours.save_pretrained).parameters)


def test_equal_gradients():
    theirs, ours = (made.from_pretrained(GOLDEN / "gelu_first_eos") for made in classes("FlaxCLIPModel"))
    given = arguments("FlaxCLIPModel", "gelu_first_eos")

    def gradient(model):
        loss = lambda params: jnp.square(model(**given, params=params).logits_per_image).mean()  # noqa: E731
        return jax.grad(loss)(dict(model.params))

    a, b = gradient(theirs), gradient(ours)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(a))
    for own, other in zip(jax.tree.leaves(b), jax.tree.leaves(a), strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-5 * largest)


def test_bfloat16():
    theirs, ours = (made.from_pretrained(GOLDEN / "odd_sizes", dtype=jnp.bfloat16) for made in classes("FlaxCLIPModel"))
    given = arguments("FlaxCLIPModel", "odd_sizes")
    a, b = theirs(**given), ours(**given)
    assert a.text_embeds.dtype == b.text_embeds.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(b.image_embeds), np.float32(a.image_embeds), atol=0.05)  # 8 bits, two ways
