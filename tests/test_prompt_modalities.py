"""The three modalities: reference values, and every faster path equal to the plain one, also in the gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompt_golden import MODALITIES, assert_near, checkpoint, load, meta, nhwc, prompts_of

from jaxzs import clip
from jaxzs.errors import TextError
from jaxzs.prompt import joint, modality, objective, text, visual

# Relative to the largest value: float32 rounding through six layers; an independent float32 implementation in
# PyTorch differs from these values by 1.4e-6 (features) and 5.3e-6 (gradients).
FEATURES, GRADIENTS = 1e-5, 2e-5


def frozen_of(values) -> modality.Frozen:
    params, config = checkpoint()
    ids = values["token_ids"]
    template = clip.encode_text(params, jnp.asarray(load("zeroshot")["token_ids"], jnp.int32), config)
    return modality.Frozen(params, jnp.asarray(ids, jnp.int32), template, template)


@pytest.mark.parametrize("length", [16, 4])
@pytest.mark.parametrize("share_context", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_text_features(length, share_context, cut):
    params, config = checkpoint()
    golden = load("text_prefix")
    ids = golden[f"p{length}_token_ids"]
    if cut:
        ids = ids[:, : golden[f"p{length}_eot"].max() + 1]
    for tag in ("", "_big"):
        prefix = jnp.asarray(golden[f"p{length}_prefix{tag}"][0])
        found = text.text_features(params, prefix, ids, config, modality=text.TextPrompt(share_context=share_context))
        assert_near(found, golden[f"p{length}_features{tag}"], FEATURES)
    # With the same rounding points; a value on the border between two float16 numbers may fall to either side.
    half = text.text_features(
        params,
        jnp.asarray(golden[f"p{length}_prefix"][0]),
        ids,
        config,
        modality=text.TextPrompt(share_context=share_context, half=True),
    )
    assert_near(half, golden[f"p{length}_features_halfinput"], 5e-3)


@pytest.mark.parametrize("length", [16, 4])
def test_placeholders_are_the_original_layout(length):
    golden = load("text_prefix")
    original = golden[f"p{length}_token_ids"]
    bare = np.concatenate([original[:, :1], original[:, 1 + length :]], axis=1)  # start, name, end
    _, config = checkpoint()
    ids = text.placeholder_ids(bare, length, config.text)
    assert ids.shape[1] == golden[f"p{length}_eot"].max() + 1
    learned = slice(1, 1 + length)
    np.testing.assert_array_equal(np.delete(ids, learned, 1), np.delete(original[:, : ids.shape[1]], learned, 1))
    assert (ids[:, learned] == meta()["sot"]).all()


def test_name_too_long_for_the_context():
    _, config = checkpoint()
    ids = np.full((2, 70), 5)
    ids[:, 0], ids[0, 3], ids[1, 60:] = 510, 511, 511
    assert text.placeholder_ids(ids, 16, config.text).shape == (2, 77)
    with pytest.raises(TextError, match=r"class 1 has 59 tokens.* 78, and this checkpoint takes 77"):
        text.placeholder_ids(ids, 17, config.text)


@pytest.mark.parametrize("length", [16, 4])
def test_image_features(length):
    params, config = checkpoint()
    golden = load("visual_prefix")
    prefix, pixels = jnp.asarray(golden[f"p{length}_prefix"]), nhwc(golden["images"])
    assert_near(visual.image_features(params, prefix, pixels, config), golden[f"p{length}_features"], FEATURES)
    kept = visual.VisualPrompt().constant_images(params, pixels, config)
    assert_near(
        jax.jit(visual.read_prompted, static_argnums=3)(params, prefix, kept, config),
        golden[f"p{length}_features"],
        FEATURES,
    )


def test_no_prompt_is_plain_clip():
    params, config = checkpoint()
    golden = load("zeroshot")
    frozen = frozen_of(load("loss_grad_text"))
    pixels = nhwc(golden["images"])
    for prompt in MODALITIES.values():
        kept = prompt.constant_images(params, pixels, config)
        assert_near(
            jax.jit(prompt.plain_features, static_argnums=2)(frozen, kept, config), golden["image_features"], FEATURES
        )
    assert_near(frozen.text_features, golden["text_features"], FEATURES)


@pytest.mark.slow
def test_joint_prefixes():
    params, config = checkpoint()
    golden = load("multimodal")
    prompts = prompts_of(golden, "")
    for tag, half, tolerance in (("f32", False, FEATURES), ("half", True, 5e-3)):
        prefixes = joint.joint_prefixes(prompts, half=half)
        assert_near(prefixes, (golden[f"{tag}_coop_out"][0], golden[f"{tag}_vpt_out"][0]), tolerance)
        assert_near(
            text.text_features(params, prefixes[0], golden["token_ids"], config),
            golden[f"{tag}_text_features"],
            tolerance,
        )
        assert_near(
            visual.image_features(params, prefixes[1], nhwc(golden["images"]), config),
            golden[f"{tag}_image_features"],
            tolerance,
        )
    pairs = joint.joint_prefixes(prompts, half=False)
    sequence = joint.joint_prefixes(prompts, half=False, pairing="sequence")
    assert [p.shape for p in pairs] == [s.shape for s in sequence]
    assert not np.allclose(pairs[0], sequence[0], atol=1e-3)  # the two really differ


@jax.jit
def step(task, prompts, frozen, images, labels, second, weights, mask):
    """((loss, logits), gradient) of one batch."""

    def value(prompts):
        logits = modality.class_logits(task, prompts, frozen, images)
        return objective.loss(logits, labels, second, weights, mask), logits

    return jax.value_and_grad(value, has_aux=True)(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODALITIES)
def test_loss_and_gradient(name):
    _, config = checkpoint()
    golden = load(f"loss_grad_{name}")
    prompt, frozen = MODALITIES[name], frozen_of(golden)
    prompts = prompts_of(golden, "param.")
    images = prompt.constant_images(frozen.params, nhwc(golden["images"]), config)
    task = modality.Task(prompt, config)
    for tag in ("ssl_full", "ssl_unl_only", "ssl_lab_only", "trzsl_full", "ul_full"):
        rows, paradigm = golden[f"{tag}_idx"], tag.split("_")[0]
        # Padded to one shape: rows that do not count change neither the loss nor the gradient.
        padded = np.concatenate([rows, np.full(8 - len(rows), 3)])
        mask = jnp.arange(8) < len(rows)
        labels = jnp.asarray(golden["labels"][padded], jnp.int32)
        balance = jnp.float32(golden[f"{tag}_balance"])
        one = jnp.float32(1)
        weights, second = {
            "ssl": ((balance, one), jnp.asarray(golden["is_unlabeled"][padded])),
            "trzsl": ((one, balance), labels >= int(golden["n_seen_classes"])),
            "ul": ((0 * one, one), jnp.ones(8, bool)),
        }[paradigm]
        (value, logits), gradient = step(task, prompts, frozen, images[padded], labels, second, weights, mask)
        assert_near(logits[: len(rows)], golden[f"{tag}_logits"], FEATURES)
        assert_near(value, golden[f"{tag}_loss"], FEATURES)
        assert_near(gradient, prompts_of(golden, f"{tag}_grad."), GRADIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_shared_context_is_exact_in_the_gradient(recompute):
    params, config = checkpoint()
    golden = load("text_prefix")
    ids = golden["p16_token_ids"]
    prefix = jnp.asarray(golden["p16_prefix_big"][0])
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(6, 32)), jnp.float32)

    @jax.grad
    def run(p, share_context, recompute=False):
        how = text.TextPrompt(share_context=share_context, recompute=recompute)
        features = text.text_features(params, p, ids, config, modality=how)
        return (features * weights).sum()

    plain = run(prefix, False)
    shared = run(prefix, True, recompute)
    assert_near(shared, plain, GRADIENTS)


@pytest.mark.slow
def test_recompute_changes_nothing():
    params, config = checkpoint()
    golden = load("visual_prefix")
    prefix, pixels = jnp.asarray(golden["p4_prefix"]), nhwc(golden["images"][:2])

    @jax.grad
    def run(p, recompute):
        features = visual.image_features(params, p, pixels, config, recompute=recompute)
        return jnp.square(features).sum()

    assert_near(run(prefix, True), run(prefix, False), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODALITIES)
def test_vmapped_prompts(name):
    _, config = checkpoint()
    golden = load(f"loss_grad_{name}")
    prompt, frozen = MODALITIES[name], frozen_of(golden)
    images = prompt.constant_images(frozen.params, nhwc(golden["images"][:3]), config)
    several = [prompt.init(jax.random.key(seed), config) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    run = jax.jit(lambda p: modality.class_logits(modality.Task(prompt, config), p, frozen, images))
    assert_near(jax.vmap(run)(stacked), jnp.stack([run(p) for p in several]), FEATURES)


@pytest.mark.slow
def test_bfloat16_towers_agree_roughly():
    # bfloat16 has 8 bits: three layers of products leave about a percent. Judged by cosine, not by value.
    _, config = checkpoint()
    golden = load("loss_grad_multi")
    prompt, frozen = MODALITIES["multi"], frozen_of(golden)
    prompts = prompts_of(golden, "param.")
    run = jax.jit(prompt.class_features, static_argnums=(2, 3))
    exact = run(prompts, frozen, config, clip.Numerics())
    rough = run(prompts, frozen, config, clip.Numerics(jnp.bfloat16))
    cosine = (clip.normalize(exact) * clip.normalize(rough)).sum(-1)
    assert cosine.min() > 0.999
    assert not np.array_equal(exact, rough)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODALITIES)
def test_initial_scale(name):
    config = clip.CLIPConfig()
    prompts = {"text": text.TextPrompt(), "image": visual.VisualPrompt(), "multi": joint.JointPrompt()}[name].init(
        jax.random.key(1), config
    )
    if name == "multi":
        assert {k: v.shape for k, v in prompts.items() if k in ("text", "visual")} == {
            "text": (4, 512),
            "visual": (4, 768),
        }
        limit = (6 / (3 * 32**2 + 768)) ** 0.5
        assert 0.9 * limit < np.abs(prompts["visual"]).max() <= limit
        assert np.abs(prompts["text_in"]["kernel"]).max() <= 512**-0.5
        assert np.abs(prompts["block"]["self_attn"]["q_proj"]["kernel"]).max() <= (6 / (4 * 128)) ** 0.5
        return
    deviation = {"text": 0.02, "image": 768**-0.5}[name]
    # 16 x 512 draws: the sample's deviation is within a few percent
    assert np.std(prompts["prefix"]) == pytest.approx(deviation, rel=0.05)
