"""Passes over the images: what a method says it took is how often its chunks were read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapt_methods import inputs, stored

from jaxzs import adapt, proxy
from jaxzs.adapt import gaussian
from jaxzs.evaluation import Labelled, Run, measure
from jaxzs.proxy.rows import Blocks, Counted, Rows, count

CHECK = 1  # reading of chunks that looks for their sizes and for values that are not finite; not counted


class Source:
    """Chunks of features that count how often they are read from the first to the last."""

    def __init__(self, x: np.ndarray):
        self.parts, self.read = np.array_split(x, 3), 0

    def __call__(self):
        yield from self.parts
        self.read += 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero-shot", "gda", "closed_form", "proxy", "stata", "auto"])
def test_passes_are_the_readings_of_the_chunks(method):
    x, z, _ = inputs()
    source = Source(x)
    found = adapt.fit(source, z, method=method, temperature=0.05)
    assert source.read == (0 if method == "zero-shot" else CHECK + float(found.passes))
    if method != "stata":  # in memory it has a graph, and reads more
        assert float(adapt.fit(x, z, method=method, temperature=0.05).passes) == float(found.passes)


@pytest.mark.slow
def test_both_sides_of_the_rule_are_counted():
    """Also where runs are vmapped, and both sides are computed."""
    g = stored("synthetic_open")
    few = g["image_features"][: 2 * len(g["text_proxies"]) - 1], g["text_proxies"]
    uniform = np.tile(np.eye(4, dtype=np.float32), (8, 1)), np.eye(4, dtype=np.float32)
    for (x, z), method in ((few, "gda"), (uniform, "closed_form")):
        source = Source(x)
        found = adapt.fit(source, z)
        assert found.choice.method == method
        assert source.read == CHECK + float(found.passes)
        several = jax.vmap(lambda t, x=x, z=z: adapt.fit(x, z, temperature=t).passes)(jnp.array([0.01, 0.01]))
        assert several.tolist() == [float(found.passes)] * 2


def test_passes_of_a_table_are_the_readings_of_the_chunks():
    x, z, _ = inputs()
    data = Labelled("made", x, stored("synthetic")["labels"][: len(x)], z, "identity", temperature=0.05)
    [found] = measure(data, "uniform", [Run()])
    source = Source(x)
    proxy.fit_chunks(source, z, logit_scale=1 / 0.05)
    assert source.read == CHECK + found.metrics["passes"]
    [text] = measure(data, "zero-shot", [Run()])
    assert text.metrics["passes"] == 0
    assert {figure.passes for figure in text.figures} == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stata", "transclip"])
def test_passes_with_a_graph_are_counted_one_by_one(method, monkeypatch):
    """Not compiled, so that loops run in Python: every function that reads the features of all rows says so."""
    x, z, _ = inputs()
    reads = []

    def counting(function):
        def run(*args, **options):
            # of `scores_of` and `graph_of` the features; of the sums the rows
            arrays = [a.features if isinstance(a, Rows) else a for a in args]
            assert any(isinstance(a, jax.Array) and a.shape == x.shape for a in arrays)
            reads.append(function.__name__)
            return function(*args, **options)

        return run

    for name in ("scores_of", "moments", "graph_of"):
        monkeypatch.setattr(gaussian, name, counting(getattr(gaussian, name)))
    with jax.disable_jit():
        getattr(adapt, method)(x, z, temperature=0.05, iterations=2)
    assert reads.count("graph_of") == 1  # so few rows are one block
    assert len(reads) == gaussian.passes_with_graph(len(x), 2)
    assert gaussian.passes_with_graph(5000, 2) == gaussian.passes_with_graph(len(x), 2) + 2  # of 2048 rows each


def test_loops_and_branches_are_counted_as_often_as_they_run():
    def run(limit):
        counted = Counted(Blocks(Rows(jnp.ones(6, bool)), 2))
        state = counted.loops.fori_loop(0, limit, lambda i, total: total + counted(count), counted(count))
        state = counted.loops.while_loop(lambda total: total < 40, lambda total: total + counted(count), state)
        state = counted.loops.cond(limit > 1, lambda: state + counted(count), lambda: state)
        return state, counted.passes, counted.num_images

    # 6 + 6 a pass of the loop, until 42; one branch has a pass, the other has none
    assert [float(n) for n in jax.jit(run)(3)] == [48, 8, 6]
    assert [float(n) for n in jax.jit(run)(0)] == [42, 7, 6]
    assert jax.vmap(run)(jnp.array([3, 0]))[1].tolist() == [8, 7]
