"""Every method of `adapt`: the reference outputs, and the six properties that all methods share.

tests/golden/adapt holds outputs of the official codes on synthetic features (agda/, fewshot/ and own_*: float64
transcriptions); `synthetic_open` has 12 classes of which 4 are present.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzs import adapt, parallel, proxy
from jaxzs.adapt import discriminant, online
from jaxzs.errors import ConfigError, DataError, LabelError

SETS = ("synthetic", "synthetic_open")
POSTERIOR = 2e-5  # absolute: float32 logits of up to 100, times softmax's slope of at most 1/4
RELATIVE = 1e-5  # of the largest score: sums of float32 products in another order


@functools.cache
def stored(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parent / "golden" / "adapt" / f"{name}.npz"))


def assert_scores(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def assert_posterior(found, expected, atol=POSTERIOR):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert np.array_equal(np.argmax(found, axis=1), np.argmax(expected, axis=1))


@pytest.mark.parametrize("name", SETS)
def test_discriminants_equal_their_references(name):
    g = stored(name)
    x, z = g["image_features"], g["text_proxies"]
    for rounds in (1, 5):
        head = adapt.anchored_gda(x, z, rounds=rounds)
        assert_scores(adapt.scores(head, x), g[f"agda/own_logits_{rounds}"])
    for prior in ("uniform", "count"):
        head = adapt.gda_em(x, z, rounds=2, prior=prior)
        assert_posterior(jax.nn.softmax(adapt.scores(head, x)), g[f"gda/own_em_{prior}_2"])
    for shots in (1, 4):
        rows = g[f"fewshot/shot_index_{shots}"]
        head = adapt.few_shot(x[rows], g["labels"][rows], z)
        assert_scores(adapt.scores(head, x), g[f"fewshot/logits_{shots}"])
    if name == "synthetic":  # the official code asks for shots of every class
        rows = g["gda/shot_index"]
        for alpha in ("0.01", "1", "100"):
            head = adapt.gda(x[rows], g["labels"][rows], z, alpha=float(alpha))
            assert_scores(adapt.scores(head, x), g[f"gda/logits_alpha{alpha}"])


@pytest.mark.parametrize("name", SETS)
def test_transduction_equals_its_references(name):
    g = stored(name)
    x, z = g["image_features"], g["text_proxies"]
    for iterations in (0, 1, 2, 10):
        assert_posterior(adapt.stata(x, z, iterations=iterations).posterior, g[f"stata/z_{iterations}"])
        head = adapt.transclip(x, z, iterations=iterations)
        assert_posterior(head.posterior, g[f"transclip/own_z_{iterations}"])
        np.testing.assert_allclose(head.means, g[f"transclip/own_mu_{iterations}"], rtol=0, atol=2e-6)  # unit rows
        np.testing.assert_allclose(head.variances[0], g[f"transclip/own_var_{iterations}"], rtol=1e-5)
    assert_posterior(adapt.stata(x, z, soft=True).posterior, g["stata/z_10_soft_beta"])
    assert_posterior(adapt.stata(x, z, anchor=10.0).posterior, g["stata/z_10_alpha10"])
    assert_posterior(adapt.stata(x, z, laplacian=0.0).posterior, g["stata/z_10_no_laplacian"])
    head = adapt.stata(x, z, neighbours=0)  # by blocks
    assert_posterior(head.posterior, g["stata/z_10_no_laplacian"])
    assert_posterior(jax.nn.softmax(adapt.scores(head, x)), g["stata/z_10_no_laplacian"])
    if name == "synthetic":  # the official code cannot run where a class is absent
        assert_posterior(adapt.transclip(x, z).posterior, g["transclip/z_10"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_graph_and_propagation_equal_their_references(name):
    g = stored(name)
    x, z = g["image_features"], g["text_proxies"]
    for block_size in (64, 1000):  # blocks that do not divide N, and one of all
        graph = adapt.nearest_neighbours(x, 3, block_size=block_size)
        assert np.array_equal(graph.index, g["stata/knn_index"])
        np.testing.assert_allclose(graph.similarity, g["stata/knn_value"], rtol=0, atol=1e-6)  # cosines
    assert_posterior(adapt.zlap(x, z), g["zlap/scores"])
    assert_posterior(adapt.zlap(x, z, rescale=True), g["zlap/scores_scaled"])
    other = adapt.zlap(x, z, neighbours=10, alpha=0.7, power=3.0)
    assert_posterior(other, g["zlap/scores_k10_alpha.7_gamma3"])


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", SETS)
def test_streams_equal_their_references(name):
    g = stored(name)
    x, z, order = g["image_features"], g["text_proxies"], g["onzeta/order"]
    published = online.OnZeta(marginal=1.0, horizon=len(x))
    found = adapt.onzeta(x[order], z, published)
    # rounding is carried on from image to image: 1e-5 to the float64 form, 2e-4 to the official float32 code
    assert_posterior(found.probabilities, g["onzeta/own_combined_label"], 5e-5)
    if name == "synthetic":
        assert_posterior(found.probabilities, g["onzeta/combined_label"], 3e-4)
    first = adapt.onzeta(x[order[:10]], z, published)
    np.testing.assert_allclose(first.state.potentials, g["onzeta/own_rho_10"], rtol=1e-5, atol=1e-5)
    found = adapt.tda(x, z)
    assert_posterior(found.probabilities, jax.nn.softmax(g["tda/own_online_logits"], axis=-1))
    score = lambda v: online.tda_scores(found.state, v, z, online.TDA())  # noqa: E731
    after = jax.nn.softmax(jax.vmap(score)(jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))))
    assert_posterior(after, g["tda/probabilities_after_whole_batch"])


# Each as a function of features, text, mask and one number, to an array [N,...]. Few rounds: properties, not accuracy.
def _shots(fit: Callable[..., adapt.Head], x, z, mask, **options):
    labels = jnp.where(mask, jnp.arange(len(x)) % 5, -1)  # the last class has no shot
    return adapt.scores(fit(x, labels, z, **options), x, mask=mask)


METHODS: dict[str, Callable[..., jax.Array]] = {
    "anchored_gda": lambda x, z, m, t: adapt.scores(
        adapt.anchored_gda(x, z, temperature=t, rounds=2, mask=m), x, mask=m
    ),
    "gda_em": lambda x, z, m, t: adapt.scores(adapt.gda_em(x, z, temperature=t, rounds=2, mask=m), x, mask=m),
    "few_shot": lambda x, z, m, t: _shots(adapt.few_shot, x, z, m, temperature=t),
    "gda": lambda x, z, m, t: _shots(adapt.gda, x, z, m, temperature=t, alpha=1.0),
    "stata": lambda x, z, m, t: adapt.stata(x, z, temperature=t, iterations=2, mask=m).posterior,
    "stata, no graph": lambda x, z, m, t: (
        adapt.stata(x, z, temperature=t, iterations=2, neighbours=0, mask=m).posterior
    ),
    "transclip": lambda x, z, m, t: adapt.transclip(x, z, temperature=t, iterations=2, mask=m).posterior,
    "zlap": lambda x, z, m, t: adapt.zlap(x, z, alpha=10 * t, mask=m),
    "onzeta": lambda x, z, m, t: (
        adapt.onzeta(x, z, online.OnZeta(temperature=t, marginal=0.1, marginal_rate=1.0), mask=m).probabilities
    ),
    "tda": lambda x, z, m, t: adapt.tda(x, z, online.TDA(positive=100 * t), mask=m).probabilities,
    "stata per batch": lambda x, z, m, t: (
        online.stata(x, z, online.StatA(temperature=t, batch=32, iterations=2), mask=m).probabilities
    ),
    "proxies": lambda x, z, m, t: adapt.scores(
        adapt.proxies(x, z, proxy.Settings(solver="closed_form", label_temperature=t), mask=m), x, mask=m
    ),
}
N, T = 96, 0.02


@functools.cache
def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    g = stored("synthetic")
    return g["image_features"][:N], g["text_proxies"], np.ones(N, bool)


@functools.cache
def expected(name: str) -> np.ndarray:
    return np.asarray(METHODS[name](*inputs(), T))


def close(name, found):
    # of scores up to 100, or of probabilities; rounding is carried on through rounds of labels and solves, by OnZeta
    # from each of 96 images to the next, through steps of its class potentials
    atol = 1e-3 if name == "onzeta" else 1e-5
    np.testing.assert_allclose(found, expected(name), rtol=0, atol=atol * max(1, np.abs(expected(name)).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_jitted_and_vmapped_over_a_number(name):
    x, z, mask = inputs()
    sweep = jax.jit(jax.vmap(lambda t: METHODS[name](x, z, mask, t)))
    found = sweep(jnp.array([T, 2 * T]))
    close(name, found[0])
    assert np.abs(found[1] - found[0]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_what_stands_in_padded_rows_does_not_matter(name):
    x, z, _ = inputs()
    padded = np.concatenate([x, np.full((8, x.shape[1]), np.nan, np.float32)])
    found = METHODS[name](padded, z, np.arange(N + 8) < N, T)
    close(name, found[:N])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_sharded_over_all_devices(name):
    x, z, _ = inputs()
    rows, mask = parallel.shard_rows(x, parallel.make_mesh())
    close(name, METHODS[name](rows, z, mask, T))


@pytest.mark.parametrize("name", METHODS)
def test_scale_of_the_features_does_not_matter(name):
    x, z, mask = inputs()
    close(name, METHODS[name](3 * x, 0.2 * z, mask, T))


@pytest.mark.slow
def test_half_precision_features_are_taken():
    x, z, _ = inputs()
    for dtype in (np.float16, jnp.bfloat16):
        head = adapt.anchored_gda(x.astype(dtype), z.astype(dtype))
        assert head.weights.dtype == jnp.float32
        assert np.isfinite(adapt.scores(head, x.astype(dtype))).all()


@pytest.mark.slow
def test_chunks_from_the_host_give_the_same():
    x, z, _ = inputs()
    chunks = lambda: iter([x[:40], x[40:50], x[50:]])  # noqa: E731
    found = adapt.anchored_gda(chunks, z, temperature=T, rounds=2)
    close("anchored_gda", adapt.scores(found, x))
    found = adapt.stata(chunks, z, temperature=T, iterations=2, neighbours=0)
    assert found.posterior is None
    close("stata, no graph", jax.nn.softmax(adapt.scores(found, x)))


def test_sharded_rows_are_summed_where_they_lie():
    """No array of features of all images, and nothing of [N,C], on any device."""
    x, z, _ = inputs()
    rows, mask = parallel.shard_rows(np.tile(x, (4, 1)), parallel.make_mesh())
    from jaxzs.adapt.discriminant import _numbers, anchored_rounds
    from jaxzs.adapt.images import _compiled
    from jaxzs.proxy.rows import Rows
    from jaxzs.proxy.settings import DEFAULTS, for_rows, in_float32

    own, text = Rows(mask, features=rows), jnp.asarray(z)
    blocks = for_rows(in_float32(DEFAULTS), own, len(z))
    blocks = dataclasses.replace(blocks, block_size=16)
    numbers = (_numbers(T, 1.0, 1.0), jnp.int32(2), None)
    lowered = _compiled.lower(own, text, numbers, blocks, method=anchored_rounds, choices=())
    text = lowered.compile().as_text()
    assert "all-gather" not in text
    assert f"f32[{len(rows)},{len(z)}]" not in text
    assert f"f32[{len(rows) // 8},{len(z)}]" not in text
    assert "all-reduce" in text


# Degenerate and hostile input


@pytest.mark.slow
def test_one_image_one_shot_and_duplicates_give_finite_answers():
    x, z, _ = inputs()
    for rows in (x[:1], np.repeat(x[:1], 5, axis=0), x[:2]):
        for head in (adapt.anchored_gda(rows, z), adapt.stata(rows, z), adapt.transclip(rows, z)):
            assert np.isfinite(adapt.scores(head, x)).all()
    one = adapt.few_shot(x[:1], np.array([2]), z)  # no spread at all: the text
    assert_scores(adapt.scores(one, x), np.asarray(adapt.scores(adapt.text_head(z), x)))
    for shots in (6, 2):  # one a class, of all and of two classes
        head = adapt.few_shot(x[:shots], np.arange(shots), z)
        assert np.isfinite(adapt.scores(head, x)).all()
    official = adapt.gda(x[:6], np.arange(6), z, alpha=1.0)  # no covariance: the text less a constant
    difference = np.asarray(adapt.scores(official, x)) - np.asarray(adapt.scores(adapt.text_head(z), x))
    np.testing.assert_allclose(difference, -np.log(6), rtol=0, atol=1e-4)  # of scores of 100


def near_duplicates(spread: float, images: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [N,16] that differ by `spread` from one image of their class, labels [N], texts [3,16]."""
    rng = np.random.default_rng(0)
    z = unit64(rng.normal(size=(3, 16)) + 0.5)
    labels = rng.integers(0, 3, images)
    x = unit64(z + 0.1 * rng.normal(size=z.shape))[labels] + spread / 4 * rng.normal(size=(images, 16))
    return x.astype(np.float32), labels, z.astype(np.float32)


def unit64(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.5e-3, 1e-2])
def test_copies_of_a_few_images_are_labelled(spread):
    """The scatter is a difference of sums, which rounds to negative spreads where images hardly differ."""
    x, labels, z = near_duplicates(spread)
    for head in (adapt.anchored_gda(x, z), adapt.gda_em(x, z), adapt.few_shot(x, labels, z)):
        assert np.array_equal(adapt.scores(head, x).argmax(1), labels)  # as the text alone has them


def test_no_scatter_that_rounding_makes_is_inverted():
    below_zero = jnp.diag(jnp.array([1e-5, -1e-5, 1e-5]))
    for leaf in discriminant.discriminant(jnp.eye(3), below_zero, jnp.float32(1e-3)):
        assert not leaf.any()


@pytest.mark.parametrize("spread", [2e-3, 2e-2, 0.2])
def test_shots_that_hardly_differ_are_told_apart_as_published(spread):
    x, labels, z = near_duplicates(spread)
    head = adapt.gda(x, labels, z, alpha=1.0)
    v, text = unit64(x), unit64(z)
    means = np.stack([v[labels == c].mean(axis=0) for c in range(3)])
    cov = np.cov((v - means[labels]).T)
    precision = 16 * np.linalg.inv((len(v) - 1) * cov + np.trace(cov) * np.eye(16))
    bias = np.log(1 / 3) - 0.5 * np.sum(means @ precision * means, axis=1)
    expected = v @ text.T / 0.01 + v @ precision @ means.T + bias
    # Float32 of unit vectors says differences of 2e-3 to 3e-5.
    np.testing.assert_allclose(adapt.scores(head, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_many_images_weigh_as_much_against_the_text_as_some():
    """The published shrinkage alone would leave nothing but the text of many images."""
    x, z, _ = inputs()
    few = adapt.anchored_gda(
        np.tile(x, (21, 1)), z, anchor=21.0, rounds=1
    )  # 2,016 images: above the number that counts
    many = adapt.anchored_gda(np.tile(x, (105, 1)), z, anchor=105.0, rounds=1)
    np.testing.assert_allclose(
        many.weights, few.weights, rtol=0, atol=1e-4 * np.abs(few.weights).max()
    )  # sums of 10,080


def test_duplicates_are_neighbours_and_missing_ones_count_nothing():
    x = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    graph = adapt.nearest_neighbours(x, 5)
    assert graph.index[:2, 0].tolist() == [1, 0]
    assert np.all(graph.similarity[:, 2:] == 0)
    masked = adapt.nearest_neighbours(x, 2, mask=np.array([True, True, False]))
    assert masked.index[:2, 0].tolist() == [1, 0]
    assert np.all(masked.similarity[:2, 1] == 0)  # padding is nobody's neighbour


@pytest.mark.slow
def test_shots_beside_unlabelled_images_are_images_of_their_class():
    x, z, _ = inputs()
    certain = functools.partial(adapt.anchored_gda, temperature=1e-4, rounds=2)  # labels are the text's, without doubt
    labels = np.asarray(adapt.scores(adapt.text_head(z), x).argmax(1))
    together = np.asarray(adapt.scores(certain(x, z), x))
    shots = adapt.Shots(np.concatenate([x[:12], x[:3]]), np.concatenate([labels[:12], [-1, -1, -1]]))
    assert_scores(adapt.scores(certain(x[12:], z, shots=shots), x), together)
    other = adapt.Shots(x[:12], (labels[:12] + 1) % len(z))
    assert np.abs(adapt.scores(certain(x[12:], z, shots=other), x) - together).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onzeta", "tda", "stata per batch"])
def test_a_stream_cut_anywhere_goes_on_as_if_it_had_not_been(name):
    x, z, _ = inputs()
    method = {"onzeta": adapt.onzeta, "tda": adapt.tda, "stata per batch": online.stata}[name]
    settings = {"onzeta": online.OnZeta(horizon=N), "tda": online.TDA(), "stata per batch": online.StatA(batch=32)}[
        name
    ]
    whole = method(x, z, settings)
    first = method(x[:32], z, settings)
    rest = method(x[32:], z, settings, state=first.state)
    both = np.concatenate([first.probabilities, rest.probabilities])
    np.testing.assert_allclose(both, whole.probabilities, rtol=0, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), rest.state, whole.state)
    *_, last = online.stream(iter([x[:32], x[32:64], x[64:]]), z, settings)
    np.testing.assert_allclose(last.probabilities, whole.probabilities[64:], rtol=0, atol=1e-6)


def test_onzeta_asks_for_no_marginal_unless_told():
    x, z, _ = inputs()
    labels = stored("synthetic")["labels"][:N]
    sorted_rows = np.argsort(labels, kind="stable")
    default = adapt.onzeta(x[sorted_rows], z)
    assert np.all(default.state.potentials == 0)
    published = adapt.onzeta(x[sorted_rows], z, online.OnZeta(marginal=1.0, horizon=N))
    assert np.any(published.state.potentials > 0)


@pytest.mark.slow
def test_errors_name_what_is_wrong():
    x, z, _ = inputs()
    labels = np.zeros(N, np.int32)
    for error, message, call in [
        (DataError, "feature sizes", lambda: adapt.anchored_gda(x, z[:, :8])),
        (DataError, "feature sizes", lambda: adapt.scores(adapt.text_head(z), x[:, :8])),
        (DataError, "not finite", lambda: adapt.stata(x * np.float32(np.nan), z)),
        (DataError, "1 class", lambda: adapt.text_head(z[:1])),
        (DataError, "two axes", lambda: adapt.transclip(x[0], z)),
        (DataError, "mask leaves no row", lambda: adapt.anchored_gda(x, z, mask=np.zeros(N, bool))),
        (DataError, "floating-point", lambda: adapt.zlap(x.astype(np.int32), z)),
        (DataError, "no images", lambda: adapt.anchored_gda(lambda: iter([]), z)),
        (LabelError, r"shot_labels\[0\] is 9", lambda: adapt.few_shot(x, labels + 9, z)),
        (LabelError, "no shot has a label", lambda: adapt.few_shot(x, labels - 1, z)),
        (LabelError, "one whole number", lambda: adapt.gda(x, labels.astype(np.float32), z, alpha=1.0)),
        (LabelError, "one whole number", lambda: adapt.anchored_gda(x, z, shots=adapt.Shots(x, labels[:4]))),
        (ConfigError, "temperature is 0", lambda: adapt.anchored_gda(x, z, temperature=0)),
        (ConfigError, "rounds is 0", lambda: adapt.anchored_gda(x, z, rounds=0)),
        (ConfigError, "anchor is -1", lambda: adapt.stata(x, z, anchor=-1)),
        (ConfigError, "weight is -1", lambda: adapt.few_shot(x, labels, z, weight=-1)),
        (ConfigError, "neighbours is 1.5", lambda: adapt.stata(x, z, neighbours=1.5)),
        (ConfigError, "iterations is -1", lambda: adapt.transclip(x, z, iterations=-1)),
        (ConfigError, "prior is 'some'", lambda: adapt.gda_em(x, z, prior="some")),
        (ConfigError, "alpha is 2", lambda: adapt.zlap(x, z, alpha=2)),
        (ConfigError, "neighbours=0", lambda: adapt.stata(lambda: iter([x]), z)),
        (ConfigError, "no mask", lambda: adapt.anchored_gda(lambda: iter([x]), z, mask=np.ones(N, bool))),
        (ConfigError, "marginal is 2", lambda: adapt.onzeta(x, z, online.OnZeta(marginal=2))),
        (ConfigError, "expected TDA", lambda: adapt.tda(x, z, online.OnZeta())),
        (ConfigError, "expected OnZeta", lambda: next(online.stream([x], z, "tda"))),
        (DataError, "a batch has shape", lambda: next(online.stream([x[0]], z))),
    ]:
        with pytest.raises(error, match=message):
            call()
