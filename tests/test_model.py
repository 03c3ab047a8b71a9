"""The encoders against HuggingFace's FlaxCLIPModel, and against themselves under jit, vmap, grad and sharding."""

from __future__ import annotations

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzs import clip
from jaxzs.clip.model import position_table, resize_weights
from jaxzs.clip.params import flatten
from jaxzs.errors import ConfigError, ImageError, TextError
from tests.tiny_model import tiny_model

# FlaxCLIPModel in float32 is itself within 1e-5 of float64 on these weights (values of order 1 to 5); two correct
# float32 implementations that sum in another order stay within 2e-5 of each other.
ATOL = 2e-5
GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("quickgelu_legacy_eos", "gelu_first_eos", "odd_sizes")


@functools.cache
def checkpoint(name: str):
    return clip.read_checkpoint(GOLDEN / "clip" / name)


@functools.cache
def reference(name: str, which: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "clip" / name / f"ref_{which}.npz") as file:
        return dict(file)


def pixels_of(name: str) -> np.ndarray:
    return reference(name, "image")["pixel_values_nchw"].transpose(0, 2, 3, 1)


def text_cases(name: str) -> list[str]:
    return sorted({key.split("/")[0] for key in reference(name, "text") if "/" in key})


def all_text_cases() -> list[tuple[str, str]]:
    present = [name for name in CHECKPOINTS if (GOLDEN / "clip" / name / "ref_text.npz").exists()]
    return [(name, case) for name in present for case in text_cases(name)]


def close(actual, expected, atol=ATOL):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_array_of_the_vision_tower(name):
    (params, config), expected = checkpoint(name), reference(name, "image")
    tower = jax.jit(clip.vision_tower, static_argnums=2)(params, pixels_of(name), config)
    close(tower.tokens, expected["last_hidden_state"])
    close(tower.pooled, expected["pooler_output"])
    assert len(tower.hidden) == config.vision.num_hidden_layers + 1
    for layer, hidden in enumerate(tower.hidden):
        if f"hidden_states_{layer}" in expected:
            close(hidden, expected[f"hidden_states_{layer}"])
    for layer, attention in enumerate(tower.attention):
        if f"attention_{layer}" in expected:
            close(attention[:1], expected[f"attention_{layer}"])
    features = clip.encode_image(params, pixels_of(name), config)
    close(features, expected["image_features"])
    close(features, expected["image_features_f64"])


@pytest.mark.parametrize(("name", "case"), all_text_cases())
def test_every_array_of_the_text_tower_and_the_logits(name, case):
    (params, config), stored = checkpoint(name), reference(name, "text")
    expected = {key.split("/")[1]: value for key, value in stored.items() if key.startswith(f"{case}/")}
    ids, mask = expected["input_ids"], expected.get("attention_mask")
    tower = jax.jit(clip.text_tower, static_argnums=2)(params, ids, config, mask)
    close(tower.pooled, expected["pooler_output"])
    if "last_hidden_state" in expected:
        close(tower.tokens, expected["last_hidden_state"])
    for layer, hidden in enumerate(tower.hidden):
        if f"hidden_states_{layer}" in expected:
            close(hidden, expected[f"hidden_states_{layer}"])
    features = clip.encode_text(params, ids, config, mask)
    close(features, expected["text_features"])
    close(features, expected["text_features_f64"])
    close(clip.normalize(features), expected["text_embeds"])
    images = clip.encode_image(params, pixels_of(name), config)
    close(clip.normalize(images), expected["image_embeds"])
    logits = clip.logits_per_image(images, features, params["logit_scale"])
    close(logits, expected["logits_per_image"])
    close(logits.T, expected["logits_per_text"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_contrastive_loss(name):
    params, config = checkpoint(name)
    stored = reference(name, "text")
    first = "pad_eos_mask"
    features = clip.encode_text(params, stored[f"{first}/input_ids"], config, stored[f"{first}/attention_mask"])
    images = clip.encode_image(params, pixels_of(name), config)
    logits = clip.logits_per_image(images, features[:3], params["logit_scale"])
    close(clip.contrastive_loss(logits), stored["contrastive_loss_f64"])


def test_a_mask_that_hides_a_token_changes_the_features():
    params, config = checkpoint("quickgelu_legacy_eos")
    stored = reference("quickgelu_legacy_eos", "text")
    ids, mask = stored["hole_mask/input_ids"], stored["hole_mask/attention_mask"]
    masked = clip.encode_text(params, ids, config, mask)
    assert np.abs(masked - clip.encode_text(params, ids, config)).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_cutting_behind_the_longest_text_changes_nothing(name):
    params, config = checkpoint(name)
    ids = reference(name, "text")["pad_zero_nomask/input_ids"]
    ends = np.asarray(clip.model.end_positions(ids, config.text)) + 1
    ids, end = ids[ends <= np.median(ends)], int(np.median(ends))
    assert 0 < end < ids.shape[1]
    # Equal but for the order in which the shorter sums are taken.
    cut = clip.encode_text(params, ids[:, :end], config)
    close(cut, clip.encode_text(params, ids, config), atol=1e-5)


@pytest.mark.slow
def test_vmap_jit_and_sharding_agree(data_mesh):
    params, config = checkpoint("gelu_first_eos")
    size = config.vision.image_size
    pixels = jax.random.normal(jax.random.key(0), (16, size, size, 3))
    plain = clip.encode_image(params, pixels, config)
    pairs = jax.vmap(lambda x: clip.encode_image(params, x, config))(pixels.reshape(8, 2, size, size, 3))
    close(pairs.reshape(plain.shape), plain, atol=1e-5)
    sharded = clip.encode_image(params, jax.device_put(pixels, NamedSharding(data_mesh, P("data"))), config)
    assert len(sharded.sharding.device_set) == 8
    close(sharded, plain, atol=1e-5)

    ids = jnp.tile(reference("gelu_first_eos", "text")["pad_eos_mask/input_ids"], (4, 1))
    texts = clip.encode_text(params, ids, config)
    sharded = clip.encode_text(params, jax.device_put(ids, NamedSharding(data_mesh, P("data"))), config)
    close(sharded, texts, atol=1e-5)


@pytest.mark.slow
def test_gradient_equals_finite_differences():
    params, config = checkpoint("gelu_first_eos")
    size = config.vision.image_size
    pixels = jax.random.normal(jax.random.key(1), (2, size, size, 3))
    ids = reference("gelu_first_eos", "text")["pad_eos_mask/input_ids"][:2]

    def loss(params):
        images = clip.encode_image(params, pixels, config, numerics=clip.Numerics(precision="highest"))
        texts = clip.encode_text(params, ids, config, numerics=clip.Numerics(precision="highest"))
        return clip.contrastive_loss(clip.logits_per_image(images, texts, params["logit_scale"]))

    @jax.jit
    def slopes(params):
        gradient = jax.grad(loss)(params)
        norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
        along = [jax.tree.map(lambda p, g, s=s: p + s * g / norm, params, gradient) for s in steps]
        return norm, (loss(along[0]) - loss(along[1])) / (steps[0] - steps[1])

    steps = (1e-4, -1e-4)
    slope, difference = slopes(params)
    # Central differences: the third derivative gives 5e-5 here, float32 rounding of the loss over the step 1e-4.
    np.testing.assert_allclose(difference, slope, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_reduced_precision_products_accumulate_in_float32(dtype):
    params, config = checkpoint("quickgelu_legacy_eos")
    pixels = pixels_of("quickgelu_legacy_eos")
    exact = clip.encode_image(params, pixels, config)
    reduced = clip.encode_image(params, pixels, config, numerics=clip.Numerics(dtype))
    assert reduced.dtype == jnp.float32
    cosine = (clip.normalize(exact) * clip.normalize(reduced)).sum(-1)
    assert cosine.min() > 0.9995  # 8 bits of mantissa over four layers
    assert np.abs(exact - reduced).max() > 1e-4  # and the option does something
    jaxpr = jax.make_jaxpr(lambda p: clip.vision_tower(p, pixels, config, numerics=clip.Numerics(dtype)).pooled)(params)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) >= 4 * 8
    for product in products:
        assert {v.aval.dtype for v in product.invars} == {jnp.dtype(dtype)}
        assert product.outvars[0].aval.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_storage_type_is_not_the_compute_type(dtype):
    params, config = checkpoint("gelu_first_eos")
    stored = jax.tree.map(lambda x: x.astype(dtype), params)
    upcast = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    pixels = pixels_of("gelu_first_eos")
    close(clip.encode_image(stored, pixels, config), clip.encode_image(upcast, pixels, config), 1e-6)


def test_one_program_for_one_shape():
    params, config = checkpoint("odd_sizes")
    pixels = pixels_of("odd_sizes")
    clip.encode_image(params, pixels, config)
    compiled = clip.model._encode_image._cache_size()
    for _ in range(3):
        clip.encode_image(params, pixels + np.float32(1), config)
    assert clip.model._encode_image._cache_size() == compiled


def test_what_is_not_used_is_not_computed():
    params, config = checkpoint("quickgelu_legacy_eos")
    pixels = pixels_of("quickgelu_legacy_eos")
    pooled = jax.jit(lambda p: clip.vision_tower(p, pixels, config).pooled).lower(params).compile()
    everything = jax.jit(lambda p: clip.vision_tower(p, pixels, config)).lower(params).compile()
    assert pooled.memory_analysis().output_size_in_bytes < everything.memory_analysis().output_size_in_bytes / 10


@pytest.mark.parametrize("case", ["grow", "shrink", "mixed", "one"])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_interpolation_equals_torch(case, method):
    with np.load(GOLDEN / "clip" / "interpolation.npz") as file:
        table, expected = file[f"{case}/table"], file[f"{case}/{method}"]
    down = resize_weights(table.shape[0], expected.shape[0], method)
    across = resize_weights(table.shape[1], expected.shape[1], method)
    resized = np.einsum("yr,rcd,xc->yxd", down, table, across)
    np.testing.assert_allclose(resized, expected, rtol=0, atol=2e-6)  # float32 sums of 16 terms


@pytest.mark.slow
def test_other_image_sizes_with_interpolated_positions():
    params, config = checkpoint("quickgelu_legacy_eos")
    pixels = jnp.zeros((2, 96, 80, 3))
    with pytest.raises(ImageError, match=r"96x80.*takes 64x64.*interpolate_positions=True"):
        clip.encode_image(params, pixels, config)
    assert clip.encode_image(params, pixels, config, interpolate_positions=True).shape == (2, 32)
    table = position_table(params["vision_model"], config.vision, (6, 5))
    native = params["vision_model"]["embeddings"]["position_embedding"]["embedding"]
    assert table.shape == (31, 96)
    np.testing.assert_array_equal(table[0], native[0])
    same = clip.encode_image(params, pixels[:, :64, :64], config, interpolate_positions=True)
    np.testing.assert_array_equal(same, clip.encode_image(params, pixels[:, :64, :64], config))


def test_random_parameters_have_the_checkpoint_tree():
    _, config = checkpoint("odd_sizes")
    params = clip.random_params(jax.random.key(0), config)
    expected = dict(flatten(clip.abstract_params(config)))
    assert {path: leaf.shape for path, leaf in flatten(params)} == {path: leaf.shape for path, leaf in expected.items()}
    again = clip.random_params(jax.random.key(0), config)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    features = clip.encode_image(params, pixels_of("odd_sizes"), config)
    assert np.isfinite(features).all()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((2, 3, 64, 64), np.float32), "channels last"),
        (np.zeros((64, 64, 3), np.float32), r"expected \[B,H,W,3\]"),
        (np.zeros((2, 64, 64, 3), np.uint8), "expected normalised floats"),
        (np.zeros((2, 60, 64, 3), np.float32), "60x64"),
    ],
)
def test_unfit_pixels_are_named(pixels, message):
    params, config = checkpoint("quickgelu_legacy_eos")
    with pytest.raises(ImageError, match=message):
        clip.encode_image(params, pixels, config)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros(5, np.int32), None, r"expected integers \[B,T\]"),
        (np.zeros((1, 5), np.float32), None, "expected integers"),
        (np.zeros((1, 78), np.int32), None, "takes 1 to 77"),
        (np.full((1, 5), 512), None, "the vocabulary has 512"),
        (np.full((1, 5), -1), None, "range from -1"),
        (np.zeros((1, 5), np.int32), np.ones((1, 4), np.int32), "must be equal"),
    ],
)
def test_unfit_token_ids_are_named(ids, mask, message):
    params, config = checkpoint("quickgelu_legacy_eos")
    with pytest.raises(TextError, match=message):
        clip.encode_text(params, ids, config, mask)


def test_a_text_without_end_token_is_named():
    params, config = checkpoint("gelu_first_eos")
    with pytest.raises(TextError, match="no end token"):
        clip.encode_text(params, np.zeros((1, 5), np.int32), config)


def test_normalise_keeps_zero_rows():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(clip.normalize(x), np.float32([[0.6, 0.8], [0, 0]]))
    twice = jax.jit(lambda x: clip.normalize(clip.normalize(x)))  # compilers merge the two divisions
    np.testing.assert_allclose(twice(x), np.float32([[0.6, 0.8], [0, 0]]), rtol=3e-7)


def test_the_shared_reference_is_the_one_in_the_repository(shared: Path):
    name = "golden/clip/quickgelu_legacy_eos/ref_image.npz"
    with np.load(shared / name) as original:
        for key in original.files:
            if key in reference("quickgelu_legacy_eos", "image"):
                np.testing.assert_array_equal(original[key], reference("quickgelu_legacy_eos", "image")[key])


def test_old_keywords_name_the_new_one():
    """A `ConfigError` and not Python's TypeError, for every encoder and tower."""
    for function in (clip.encode_image, clip.encode_text, clip.vision_tower, clip.text_tower):
        with pytest.raises(ConfigError, match=r"write numerics=clip\.Numerics\(compute_dtype\)"):
            function({}, None, None, compute_dtype=jnp.bfloat16)


def test_a_model_is_a_pytree():
    """Its leaves are the parameters; the same model compiles once, mapped or not, and nothing else of it is lost."""
    model = tiny_model()
    count = chex.assert_max_traces(lambda model, x: clip.encode_image(model.params, x, model.config), n=1)
    jitted, x = jax.jit(count), np.zeros((1, *2 * (model.config.vision.image_size,), 3), np.float32)
    expected = clip.encode_image(model.params, x, model.config)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    for one in (model, jax.tree.map(jnp.asarray, model)):
        np.testing.assert_array_equal(jitted(one, x), expected)
    assert (jitted(doubled, x) != expected).all()
    assert doubled.tokenizer is model.tokenizer
    assert len(jax.tree.leaves(model)) == len(jax.tree.leaves(model.params))
    assert len(repr(model)) < 200
    np.testing.assert_allclose(jax.jit(lambda model: model.logit_scale)(model), model.logit_scale, rtol=1e-6)
    assert "\n" not in repr(model)


def test_arguments_in_another_order_and_empty_batches_are_named():
    """Not a ZeroDivisionError from inside the compiler, nor an IndexError."""
    (params, config), pixels = checkpoint("quickgelu_legacy_eos"), pixels_of("quickgelu_legacy_eos")
    ids = np.ones((1, 5), np.int32)
    for arguments in ((pixels, params, config), (params["vision_model"], pixels, config)):
        with pytest.raises(ConfigError, match=r"pass model\.params first"):
            clip.encode_image(*arguments)
    with pytest.raises(ConfigError, match=r"pass model\.config"):
        clip.encode_text(params, config, ids)
    with pytest.raises(ImageError, match="at least one image"):
        clip.encode_image(params, pixels[:0], config)
    with pytest.raises(ImageError, match="pixels are list"):
        clip.vision_tower(params, [1, 2], config)
    with pytest.raises(TextError, match="at least one text"):
        clip.encode_text(params, ids[:0], config)
    with pytest.raises(TextError, match="input_ids are list"):
        clip.text_tower(params, ["a cat"], config)
