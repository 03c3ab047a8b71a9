"""A patch classifier learned without labels, against the official code of PIAA."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

import jaxzs
from jaxzs.clip import encode_image, normalize
from jaxzs.errors import DataError
from jaxzs.patch import (
    Batching,
    PatchClassifier,
    dense_features,
    encoded_patches,
    learn_patch_classifier,
    tag_images_with,
    tag_texts,
    tag_with,
)
from jaxzs.patch.learned import Bank, Patches, discriminant, kept, log_entropy

FILE = Path(__file__).parent / "golden" / "patch" / "piaa.npz"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


def learned(features, **options) -> PatchClassifier:
    return learn_patch_classifier(features, golden()["text_proxies"], **{"per_class": int(golden()["k"])} | options)


def assert_same(found: PatchClassifier, weights: np.ndarray, bias: np.ndarray) -> None:
    """Within 1e-4 of the largest: an inverse in float32, in the original as well."""
    np.testing.assert_allclose(found.weights, weights.T, atol=1e-4 * np.abs(weights).max())
    np.testing.assert_allclose(found.bias, bias, atol=1e-4 * np.abs(bias).max())


def empty(classes: int, K: int, E: int) -> Bank:
    return Bank(jnp.zeros((classes, K, E)), jnp.full((classes, K), jnp.inf), jnp.zeros((classes, K)))


@pytest.mark.usefixtures("optimized")
def test_first_discriminant():
    assert_same(learned(golden()["patch_features"], temperature=None), golden()["first_W"], golden()["first_b"])


@pytest.mark.usefixtures("optimized")
def test_as_the_original():
    found = learned(golden()["patch_features"], temperature=float(golden()["temperature"]))
    assert_same(found, golden()["W"], golden()["b"])


@pytest.mark.usefixtures("optimized")
def test_the_bank_is_the_best_of_all():
    """Of every class, whatever the blocks; the original orders those whose float32 entropy is 0 in its own way."""
    text, (C, E) = normalize(jnp.asarray(golden()["text_proxies"])), golden()["text_proxies"].shape
    bank = empty(C, int(golden()["k"]), E)
    for block in np.split(golden()["patch_features"], [5, 6, 20]):
        bank = kept(bank, jnp.asarray(block.reshape(-1, E)), text, jnp.float32(60))
    expected = golden()["first_bank"].reshape(bank.features.shape)
    for found, rows in zip(np.asarray(bank.features), expected, strict=True):
        np.testing.assert_allclose(found[np.lexsort(found.T)], rows[np.lexsort(rows.T)], atol=1e-6)
    assert (np.diff(bank.log_entropy, axis=1) >= 0).all()


@pytest.mark.parametrize("classes", [2, 3, 50])
def test_entropies_are_exact_however_certain(classes):
    """Against float64 with more digits than it needs: from even odds to margins of 400, where exp underflows."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(size=(40, classes)) * scale for scale in (1e-3, 1.0, 10.0, 40.0, 200.0)])
    logits = logits.astype(np.float32)
    d = logits.astype(np.longdouble) - logits.max(1, keepdims=True)
    p = np.exp(d) / np.exp(d).sum(1, keepdims=True)
    others = np.sort(d, axis=1)[:, :-1]  # without the best
    exact = np.log(np.log1p(np.exp(others).sum(1)) - (p * d).sum(1))
    # A logit of 400 has a spacing of 3e-5 in float32, which its logarithm of an entropy inherits.
    np.testing.assert_allclose(log_entropy(jnp.asarray(logits)), exact, rtol=1e-6, atol=1e-5)
    assert exact.min() < -87  # an entropy that float32 cannot hold


def test_saturated_patches_keep_their_order():
    """Probabilities are 1 and 0 in float32, whatever the angle: the more certain patch is kept all the same."""
    text, scale = jnp.eye(2), jnp.float32(200)
    angles = np.radians([8.0, 4.0, 12.0])  # from the first class; given in this order
    patches = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1), jnp.float32)
    p = jax.nn.softmax(scale * patches @ text.T)
    assert p.tolist() == [[1.0, 0.0]] * 3
    bank = kept(empty(2, 3, 2), patches, text, scale)
    np.testing.assert_allclose(bank.features[0], patches[jnp.array([1, 0, 2])], atol=1e-6)
    assert (np.diff(bank.log_entropy[0]) > 1).all()
    later = kept(kept(empty(2, 1, 2), patches[:1], text, scale), patches[1:], text, scale)  # in blocks
    np.testing.assert_allclose(later.features[0, 0], patches[1], atol=1e-6)


def test_one_class_is_certain_of_everything():
    bank = kept(empty(1, 3, 2), jnp.eye(2), jnp.eye(2)[:1], jnp.float32(60))
    assert bank.log_entropy.tolist() == [[-np.inf, -np.inf, np.inf]]
    found = learn_patch_classifier(np.eye(2, dtype=np.float32)[None], np.eye(2, dtype=np.float32)[:1], per_class=3)
    assert np.isfinite(found.weights).all()


@pytest.mark.usefixtures("optimized")
def test_blocks_of_a_store_change_nothing():
    whole = learned(golden()["patch_features"])
    streamed = learned(iter(np.split(golden()["patch_features"], 6)))
    for one, other in zip(whole, streamed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(np.abs(one).max()))


def test_scores_of_images():
    classifier = PatchClassifier(
        jnp.asarray(golden()["W"].T), jnp.asarray(golden()["b"]), normalize(jnp.asarray(golden()["text_proxies"]))
    )
    found = tag_with(classifier, golden()["patch_features"][:12], golden()["global_features"])
    np.testing.assert_allclose(found, golden()["own_scores"], atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


def test_vmap_over_numbers():
    classifier = learned(golden()["patch_features"])
    images, whole = golden()["patch_features"][:3], golden()["global_features"][:3]
    at = jax.vmap(lambda share: tag_with(classifier, images, whole, global_share=share))(jnp.array([0.0, 0.1, 1.0]))
    np.testing.assert_allclose(at[1], tag_with(classifier, images, whole), atol=1e-6)
    assert np.abs(at[0] - at[2]).max() > 1e-3


@pytest.mark.slow
def test_classes_without_patches_keep_their_text():
    """Absent from the bank, or with a single patch, whose deviation is no number in the original."""
    text = jnp.eye(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)) * 0.1, jnp.float32) + jnp.array([[1.0, 0, 0]])
    label = jnp.zeros(20, jnp.int32)
    weights, bias = discriminant(Patches(x, label, jnp.ones(20), jnp.ones(20, bool)), text)
    assert np.isfinite(weights).all()
    assert np.isfinite(bias).all()
    far = jnp.asarray(np.eye(3, dtype=np.float32)[[0] * 10 + [1] * 10 + [2]])[:, None]  # one patch of the last class
    noise = np.random.default_rng(1).normal(size=far.shape).astype(np.float32) * 0.05
    found = learn_patch_classifier(far + noise, text, per_class=10)
    assert np.isfinite(found.weights).all()
    assert np.isfinite(found.bias).all()


@pytest.mark.parametrize("number", [1, 2])
def test_next_to_nothing_is_no_nan(number):
    x = np.ones((1, number, 4), np.float32)
    found = learn_patch_classifier(x, np.eye(4, dtype=np.float32), per_class=5)
    assert np.isfinite(found.weights).all()
    assert np.isfinite(found.bias).all()


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4, 0.3])
def test_scores_by_hardly_any_patches_are_numbers(images, noise):
    """Patches that are alike but for rounding, or a single sure one a class: no spread to divide by."""
    rng, text = np.random.default_rng(0), np.eye(4, 16, dtype=np.float32)
    drawn = text[rng.integers(0, 3, (images, 9))] + noise * rng.normal(size=(images, 9, 16))
    x = np.asarray(normalize(jnp.asarray(drawn, jnp.float32)))
    found = learn_patch_classifier(x, text)
    assert float(jnp.abs(found.weights).max()) < 1e9
    scores = tag_with(found, x, x.mean(1))
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)  # float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"patch_features": np.ones((2, 3, 4), int)}, "expected floats"),
        ({"patch_features": np.ones((2, 3), np.float32)}, r"\[images,P,E\]"),
        ({"patch_features": np.full((2, 3, 4), np.nan, np.float32)}, "not all finite"),
        ({"patch_features": np.ones((2, 3, 5), np.float32)}, "5 numbers a patch, text_proxies 4"),
        ({"patch_features": []}, "no patches to learn from"),
        ({"per_class": 0}, "at least 1"),
        ({"per_class": 2.5}, "whole number"),
        ({"patch_features": [[[1.0, 2.0]]], "text_proxies": [[1.0, 2.0]]}, "text_proxies are list"),
        ({"temperature": 0.0}, "above 0"),
        ({"scale": np.inf}, "above 0"),
    ],
)
def test_bad_input_is_named(change, match):
    arguments = {"patch_features": np.ones((2, 3, 4), np.float32), "text_proxies": np.eye(4, dtype=np.float32)} | change
    with pytest.raises(DataError, match=match):
        learn_patch_classifier(**arguments)


def photos(number: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 90, (number, 2)).tolist()
    return [np.kron(rng.integers(0, 256, (9, 9, 3)), np.ones((10, 10, 1)))[:h, :w].astype(np.uint8) for h, w in sizes]


@pytest.mark.parametrize("side", [None, 48, 80])
def test_one_pass_gives_patches_and_images(side):
    """What `dense_features` and `encode_image` give in two; rows that only fill up a batch are zeros."""
    model, images = jaxzs.load("demo"), photos(3)
    [batch] = encoded_patches(model, images, side=side, batching=Batching(4))
    assert (batch.numbers, batch.sizes) == ([0, 1, 2], [image.shape[:2] for image in images])
    side = side or model.config.vision.image_size
    squashed = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    pixels = model.preprocessor.normalize(np.stack([np.asarray(one) for one in squashed]))
    patches = dense_features(model.params, pixels, model.config, attention="csa")
    np.testing.assert_allclose(batch.patches[:3], patches, atol=1e-5 * float(jnp.abs(patches).max()))
    if side == model.config.vision.image_size:  # another size has positions of its own
        whole = encode_image(model.params, pixels, model.config)
        np.testing.assert_allclose(batch.whole[:3], whole, atol=1e-5 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("side", [0, 8, 50, -48, 520, 48.0])
def test_sides_that_are_no_grid(side):
    with pytest.raises(DataError, match=rf"side is {side}, expected a multiple of the patch size 8 from 16 to 512"):
        next(encoded_patches(jaxzs.load("demo"), photos(1), side=side))


@pytest.mark.slow
def test_divided_over_devices(data_mesh):
    """Encoded, learned and tagged on eight devices as on one: a batch of four becomes eight, one a device."""
    model, images = jaxzs.load("demo"), photos(11)
    texts = tag_texts(model, ["circle", "square", "star"], ["ground"], ["a picture of a {}."])

    def tagged(mesh):
        batches = list(encoded_patches(model, images, batching=Batching(4, mesh=mesh)))
        features = np.concatenate([batch.patches[: len(batch.numbers)] for batch in batches])
        if mesh is not None:
            padded = np.concatenate([features, features[:5]])  # sixteen rows can be divided
            features = jax.device_put(padded, NamedSharding(mesh, PartitionSpec("data")))[:11]
        classifier = learn_patch_classifier(features, texts, per_class=16)
        grid = model.config.vision.grid
        return classifier, list(tag_images_with(classifier, batches, grid, num_foreground=3))

    (alone, one), (shared, eight) = tagged(None), tagged(data_mesh)
    # An inverse in float32: as far from the original, too.
    np.testing.assert_allclose(shared.weights, alone.weights, atol=1e-4 * float(jnp.abs(alone.weights).max()))
    assert [found.number for found in eight] == list(range(11))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(b.scores, a.scores, atol=1e-5)
        np.testing.assert_array_equal(b.tags, a.tags)
