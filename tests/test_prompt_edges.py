"""Every numerical function of `jaxzs.prompt` on the edges of what it can be given: a named error or finite numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, tiny_model

from jaxzs import prompt, report
from jaxzs.errors import DataError, JaxzsError, LabelError

PARAMS = tiny_model().params
LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 3, 0, 1])
SECOND = jnp.array([False, False, False, True, True, True])
FIRST_ROW, NOT_FIRST = jnp.arange(6) == 0, jnp.arange(6) > 0
ALL_BUT_LAST = jnp.array([True, True, True, False])
PROBABILITIES = np.asarray(jax.nn.softmax(LOGITS))
SPOILED = np.where(np.arange(6)[:, None] == 1, np.float32(np.nan), PROBABILITIES)
IDS = np.array([[1, 1, 1, 7, 63], [1, 1, 1, 8, 63]])  # start, two places, name, end
PREFIX, VISUAL = jnp.ones((2, 16)), jnp.ones((2, 24))
PIXELS = np.zeros((2, 16, 16, 3), np.float32)
NAN = float("nan")


def loss(logits=LOGITS, labels=LABELS, second=SECOND, weights=(1.0, 1.0), mask=None, class_mask=None):
    """Value and gradient, so that NaN in either is seen."""
    return jax.value_and_grad(prompt.loss)(logits, labels, second, weights, mask, class_mask)


def select(probabilities=PROBABILITIES, k=2, mask=None):
    return prompt.select_pseudolabels(probabilities, k, mask), prompt.select_top_k(probabilities, k, mask)


def text(prefix=PREFIX, ids=IDS):
    return prompt.text_features(PARAMS, prefix, ids, CONFIG)


def image(prefix=VISUAL, pixels=PIXELS):
    return prompt.image_features(PARAMS, prefix, pixels, CONFIG)


# Of each case: whether numbers come out ("finite"), or which named error.
CASES = {
    "loss": {
        "as it is": (lambda: loss(), "finite"),
        "label -1": (lambda: loss(labels=LABELS.at[0].set(-1)), LabelError),
        "label C": (lambda: loss(labels=LABELS.at[0].set(4)), LabelError),
        "label C, masked": (lambda: loss(labels=LABELS.at[0].set(4), mask=NOT_FIRST), "finite"),
        "label -1, masked": (lambda: loss(labels=LABELS.at[0].set(-1), mask=NOT_FIRST), "finite"),
        "labels float": (lambda: loss(labels=LABELS.astype(jnp.float32)), LabelError),
        "labels too few": (lambda: loss(labels=LABELS[:3]), LabelError),
        "groups as integers": (lambda: loss(second=SECOND.astype(jnp.int32)), DataError),
        "NaN logits": (lambda: prompt.loss(LOGITS * NAN, LABELS, SECOND), DataError),
        "NaN row, masked": (lambda: loss(LOGITS.at[0].set(NAN), mask=NOT_FIRST), "finite"),
        "inf row, masked": (lambda: loss(LOGITS.at[0].set(jnp.inf), mask=NOT_FIRST), "finite"),
        "NaN row in a group of weight 0": (lambda: loss(LOGITS.at[3].set(NAN), weights=(1.0, 0.0)), "finite"),
        "class without competitor, weight 0": (lambda: loss(weights=(1.0, 0.0), class_mask=ALL_BUT_LAST), "finite"),
        "class without competitor": (lambda: loss(class_mask=ALL_BUT_LAST), LabelError),
        "class without competitor, masked": (lambda: loss(mask=~SECOND, class_mask=ALL_BUT_LAST), "finite"),
        "NaN of a class that does not compete": (
            lambda: loss(LOGITS.at[:, 3].set(NAN), mask=~SECOND, class_mask=ALL_BUT_LAST),
            "finite",
        ),
        "no class competes": (lambda: loss(class_mask=jnp.zeros(4, bool)), LabelError),
        "all masked": (lambda: loss(mask=jnp.zeros(6, bool)), "finite"),
        "mask too short": (lambda: loss(mask=jnp.ones(5, bool)), DataError),
        "mask of rows": (lambda: loss(mask=jnp.array([0, 2, 4])), DataError),
        "no row": (lambda: loss(LOGITS[:0], LABELS[:0], SECOND[:0]), "finite"),
        "one class": (lambda: loss(LOGITS[:, :1], LABELS * 0), "finite"),
        "no class": (lambda: loss(LOGITS[:, :0], LABELS * 0), DataError),
        "1e37": (lambda: loss(LOGITS * 1e37), "finite"),
        "float16": (lambda: loss(LOGITS.astype(jnp.float16)), "finite"),
        "integers": (lambda: prompt.loss(LOGITS.astype(jnp.int32), LABELS, SECOND), DataError),
        "a vector": (lambda: loss(LOGITS[0]), DataError),
        "weight NaN": (lambda: loss(weights=(NAN, 1.0)), DataError),
    },
    "selection": {
        "as it is": (lambda: select(), "finite"),
        "k 0": (lambda: select(k=0), DataError),
        "k -1": (lambda: select(k=-1), DataError),
        "k 2.5": (lambda: select(k=2.5), DataError),
        "k NaN": (lambda: select(k=NAN), DataError),
        "k text": (lambda: select(k="2"), DataError),
        "k beyond N": (lambda: select(k=100), "finite"),
        "k of NumPy": (lambda: select(k=np.int64(2)), "finite"),
        "NaN": (lambda: select(PROBABILITIES * NAN), DataError),
        "NaN, masked": (lambda: select(SPOILED, 2, np.arange(6) != 1), "finite"),
        "one class": (lambda: select(PROBABILITIES[:, :1]), "finite"),
        "no class": (lambda: select(PROBABILITIES[:, :0]), DataError),
        "no image": (lambda: select(PROBABILITIES[:0]), DataError),
        "one image": (lambda: select(PROBABILITIES[:1]), "finite"),
        "all masked": (lambda: select(mask=np.zeros(6, bool)), DataError),
        "mask too short": (lambda: select(mask=np.ones(3, bool)), DataError),
        "mask too long": (lambda: select(mask=np.ones(9, bool)), DataError),
        "mask of rows": (lambda: select(mask=np.array([0, 2, 4])), DataError),
        "mask of zeros and ones": (lambda: select(mask=np.ones(6, int)), DataError),
        "mask NaN": (lambda: select(mask=np.full(6, NAN)), DataError),
        "float16": (lambda: select(PROBABILITIES.astype(np.float16)), "finite"),
        "bfloat16": (lambda: select(jnp.asarray(PROBABILITIES, jnp.bfloat16)), "finite"),
        "big endian": (lambda: select(PROBABILITIES.astype(">f4")), "finite"),
        "integers": (lambda: select((10 * PROBABILITIES).astype(int)), "finite"),
        "complex": (lambda: select(PROBABILITIES.astype(complex)), DataError),
        "objects": (lambda: select(PROBABILITIES.astype(object)), DataError),
        "ties": (lambda: select(np.full((6, 4), 0.25)), "finite"),
        "a vector": (lambda: select(PROBABILITIES[0]), DataError),
        "strided": (lambda: select(np.repeat(PROBABILITIES, 2, 1)[:, ::2]), "finite"),
    },
    "features of texts": {
        "as it is": (lambda: text(), "finite"),
        "one class": (lambda: text(ids=IDS[:1]), "finite"),
        "no class": (lambda: text(ids=IDS[:0]), JaxzsError),
        "prefix of another width": (lambda: text(jnp.ones((2, 7))), DataError),
        "prefix without rows": (lambda: text(jnp.ones((0, 16))), "finite"),
        "prefix longer than the texts": (lambda: text(jnp.ones((9, 16))), DataError),
        "prefix a vector": (lambda: text(jnp.ones(16)), DataError),
        "prefix of integers": (lambda: text(jnp.ones((2, 16), jnp.int32)), DataError),
        "ids a vector": (lambda: text(ids=IDS[0]), JaxzsError),
        "ids float": (lambda: text(ids=IDS.astype(np.float32)), JaxzsError),
        "ids outside the vocabulary": (lambda: text(ids=IDS + 60), JaxzsError),
        "ids without an end": (lambda: text(ids=np.minimum(IDS, 9)), JaxzsError),
        "ids too long": (lambda: text(ids=np.tile(IDS, 9)), JaxzsError),
        "NaN prefix": (lambda: text(PREFIX * NAN), DataError),
        "zero prefix": (lambda: text(PREFIX * 0), "finite"),
    },
    "features of images": {
        "as it is": (lambda: image(), "finite"),
        "no image": (lambda: image(pixels=PIXELS[:0]), JaxzsError),
        "prefix of another width": (lambda: image(jnp.ones((2, 7))), DataError),
        "prefix a vector": (lambda: image(jnp.ones(24)), DataError),
        "NaN prefix": (lambda: image(VISUAL * NAN), DataError),
        "uint8 pixels": (lambda: image(pixels=PIXELS.astype(np.uint8)), JaxzsError),
        "pixels of another size": (lambda: image(pixels=PIXELS[:, :8]), JaxzsError),
        "one image without batch": (lambda: image(pixels=PIXELS[0]), JaxzsError),
        "channels first": (lambda: image(pixels=PIXELS.transpose(0, 3, 1, 2)), JaxzsError),
    },
    "constants": {
        "no image": (lambda: prompt.constant_images(prompt.TextPrompt(2), PARAMS, PIXELS[:0], CONFIG), DataError),
        "batch size 0": (
            lambda: prompt.constant_images(prompt.TextPrompt(2), PARAMS, PIXELS, CONFIG, batch_size=0), JaxzsError,
        ),
        "other size": (
            lambda: prompt.constant_images(prompt.VisualPrompt(2), PARAMS, PIXELS[:, :8], CONFIG), JaxzsError,
        ),
        "uint8": (
            lambda: prompt.constant_images(prompt.VisualPrompt(2), PARAMS, PIXELS.astype(np.uint8), CONFIG), JaxzsError,
        ),
    },
    "places": {
        "no end": (lambda: prompt.placeholder_ids(np.array([[1, 7, 8]]), 2, CONFIG.text), JaxzsError),
        "a vector": (lambda: prompt.placeholder_ids(np.array([1, 7, 63]), 2, CONFIG.text), JaxzsError),
        "no text": (lambda: prompt.placeholder_ids(np.zeros((0, 3), int), 2, CONFIG.text), JaxzsError),
        "length -1": (lambda: prompt.placeholder_ids(IDS, -1, CONFIG.text), JaxzsError),
        "length NaN": (lambda: prompt.placeholder_ids(IDS, NAN, CONFIG.text), JaxzsError),
        "floats": (lambda: prompt.placeholder_ids(IDS * 1.0, 2, CONFIG.text), JaxzsError),
    },
    "schedules and weights": {
        "no image": (lambda: prompt.growing_schedule(0, 3), "finite"),
        "no class": (lambda: prompt.growing_schedule(10, 0), DataError),
        "images NaN": (lambda: prompt.growing_schedule(NAN, 3), DataError),
        "classes 2.5": (lambda: prompt.growing_schedule(10, 2.5), DataError),
        "images -1": (lambda: prompt.growing_schedule(-1, 2), DataError),
        "iterations NaN": (lambda: prompt.growing_schedule(10, 2, NAN), DataError),
        "labelled NaN": (lambda: prompt.balance_weights("ssl", "fpl", "text", NAN, 3), DataError),
        "pseudolabelled NaN": (lambda: prompt.balance_weights("ssl", "fpl", "text", 3, NAN), DataError),
        "labelled infinite": (lambda: prompt.balance_weights("ssl", "grip", "text", float("inf"), 3), DataError),
    },
    "splits": {
        "no class": (lambda: prompt.ul_split(5, 0), JaxzsError),
        "no image": (lambda: prompt.ul_split(0, 3), JaxzsError),
        "labels NaN": (lambda: prompt.ssl_split(np.full(9, NAN), 3), LabelError),
        "labels -1": (lambda: prompt.ssl_split(np.full(9, -1), 3), LabelError),
        "per class 0": (lambda: prompt.ssl_split(np.arange(9) % 3, 3, 0), JaxzsError),
        "per class -1": (lambda: prompt.ssl_split(np.arange(9) % 3, 3, -1), JaxzsError),
        "seen outside": (lambda: prompt.trzsl_split(np.arange(9) % 3, 3, seen=[5]), DataError),
        "seen twice": (lambda: prompt.trzsl_split(np.arange(9) % 3, 3, seen=[0, 0]), "finite"),
        "one class": (lambda: prompt.trzsl_split(np.zeros(9, int), 1), JaxzsError),
    },
    "evaluation": {
        "nothing": (lambda: prompt.evaluate(np.zeros(0, int), np.zeros(0, int)), DataError),
        "lengths": (lambda: prompt.evaluate(np.zeros(3, int), np.zeros(2, int)), DataError),
        "floats": (lambda: prompt.evaluate(np.full(3, NAN), np.zeros(3, int)), DataError),
        "label -1": (lambda: prompt.evaluate(np.zeros(3, int), np.array([0, -1, 0])), DataError),
        "robin hood of lengths": (
            lambda: report.robin_hood(np.zeros(3, int), np.zeros(2, int), np.arange(3)), DataError,
        ),
        "robin hood of nothing": (
            lambda: report.robin_hood(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int)), DataError,
        ),
    },
}  # fmt: skip
FLAT = [(group, name, *case) for group, cases in CASES.items() for name, case in cases.items()]


@pytest.mark.parametrize(("run", "expected"), [case[2:] for case in FLAT], ids=[f"{g}: {n}" for g, n, *_ in FLAT])
def test_edges(run, expected):
    if expected != "finite":
        with pytest.raises(expected):
            run()
        return
    for leaf in jax.tree.leaves(run()):
        if isinstance(leaf, np.ndarray | jax.Array | float):
            assert np.isfinite(np.asarray(leaf, np.float64)).all()


def test_inside_a_trace_a_masked_row_is_no_nan():
    """There no error can be raised: what counts and is unfit makes the loss NaN or infinite, the rest is not seen."""
    step = jax.jit(jax.value_and_grad(prompt.loss))
    spoiled, wrong = LOGITS.at[0].set(jnp.nan), LABELS.at[0].set(9)
    value, gradient = step(spoiled, wrong, SECOND, (1.0, 1.0), NOT_FIRST)
    expected, plain = step(LOGITS, LABELS, SECOND, (1.0, 1.0), NOT_FIRST)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, plain)
    assert not gradient[0].any()
    for label in (-1, 4, 9):
        assert np.isnan(step(LOGITS, LABELS.at[0].set(label), SECOND)[0])
    weightless, gradient = step(LOGITS, LABELS, SECOND, (1.0, 0.0), None, ALL_BUT_LAST)
    assert np.isfinite(weightless)
    assert np.isfinite(gradient).all()
    assert np.isinf(step(LOGITS, LABELS, SECOND, (1.0, 1.0), None, ALL_BUT_LAST)[0])
