"""Two real processes on loopback, four devices each, against one with eight: equal results, each reads its part."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
    import json, sys, time
    sys.path.insert(0, {tests!r})
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", {devices})
    import numpy as np
    from functools import partial
    from tiny_model import noise, tiny_model
    from jaxzs import adapt, clip, data, features, parallel, prompt, proxy

    process, processes = int(sys.argv[1]), int(sys.argv[2])
    several = parallel.initialize(sys.argv[3], processes, process) if processes > 1 else False
    assert several == (processes > 1)
    assert parallel.initialize() == several if several else True
    mesh = parallel.make_mesh()
    N, model = 61, tiny_model()

    # Encoding: every process reads and encodes its part of the images into one store.
    read = []

    class Watched:
        images = noise(N)

        def __len__(self):
            return N

        def __getitem__(self, index):
            read.append(int(index))
            return self.images[index], int(index) % 5

    source = data.from_object(Watched(), identity="watched", label_names=list("abcde"))
    store = features.extract(model, source, {root!r}, batch_size=8, chunk_size=8, threads=0)
    whole = store.arrays()

    # Rows: a global array from what each process has.
    first, end, _ = parallel.process_rows(N, mesh)
    local = whole.features[first : min(end, N)]
    x, mask = parallel.rows_of_processes(local, N, mesh)
    text = clip.normalize(whole.features[:5])
    z = parallel.replicate(text, mesh)
    result = proxy.fit(x, z, proxy.Settings(iterations=4), mask=mask)
    parts = partial(store.features, part=process, parts=processes)
    streamed = proxy.fit_chunks(parts, np.asarray(text), proxy.Settings(iterations=4))
    proxies = parallel.gather(result.proxies)

    # Heads solve with covariances, which enlarge rounding: of the same bits in every run, not of encoded images.
    drawn = np.random.default_rng(0).normal(size=(N + 5, 12)).astype(np.float32)
    names = np.asarray(clip.normalize(drawn[:5]))
    points = np.asarray(clip.normalize(names[np.arange(N) % 5] + 0.3 * drawn[5:]))
    some, _ = parallel.rows_of_processes(points[first : min(end, N)], N, mesh)
    z, chunks = parallel.replicate(names, mesh), lambda: np.array_split(points, 8)[process::processes]
    by_rule, streamed_rule = adapt.fit(some, z, mask=mask), adapt.fit(chunks, names)
    adapted = {{
        "gda": adapt.anchored_gda(some, z, mask=mask, rounds=2),
        "gda_chunks": adapt.anchored_gda(chunks, names, rounds=2),
        "rule": jax.tree.map(lambda leaf: leaf / by_rule.scale, by_rule.head),
        "rule_chunks": jax.tree.map(lambda leaf: leaf / streamed_rule.scale, streamed_rule.head),
        "stata": adapt.stata(some, z, mask=mask, neighbours=0, iterations=2)._replace(posterior=None),
    }}
    heads = {{name: np.concatenate([np.ravel(parallel.gather(leaf)) for leaf in jax.tree.leaves(head)])
             for name, head in adapted.items()}}
    gamma = parallel.gather(by_rule.choice.gamma)

    def accuracy(x, w, labels, mask):
        hits = (x @ w.T).argmax(-1) == labels
        return (hits & mask).sum() / mask.sum()

    # Prompts: every batch over all processes, the state written by the first.
    pool = prompt.Pool(whole.features, np.asarray(whole.labels, np.int64))
    modality = prompt.TextPrompt(2)
    ids = np.array([[1, 1, 1, 7, 63], [1, 1, 1, 8, 63], [1, 1, 1, 9, 63], [1, 1, 1, 10, 63], [1, 1, 1, 11, 63]])
    names = clip.encode_text(model.params, ids[:, [0, 3, 4]], model.config)
    frozen = prompt.Frozen(model.params, ids, np.asarray(names), np.asarray(names))
    plan = prompt.Plan("grip", iterations=2, optimisation=prompt.Optimisation(0.05, 2, 0, 8, steps_per_chunk=8))
    # Slow writing: the other process must not look for the state before it is on disk.
    written = prompt.resuming.write_arrays
    prompt.resuming.write_arrays = lambda *arguments: (time.sleep(0.5), written(*arguments))
    state = {root!r} + "/state.safetensors"
    running = prompt.Running(mesh=mesh, resume=state)
    task, split = prompt.Task(modality, model.config), prompt.ul_split(N, 5)
    tuned = prompt.fit(task, frozen, pool, [split], plan, running)
    again = prompt.fit(task, frozen, pool, [split], plan, running)  # from the finished state
    prefix = parallel.gather(tuned.prompts["prefix"])
    assert (parallel.gather(again.prompts["prefix"]) == prefix).all()

    labels, _ = parallel.rows_of_processes(whole.labels[first : min(end, N)], N, mesh)
    metric = float(jax.jit(accuracy)(x, parallel.replicate(proxies, mesh), labels, mask))
    parallel.barrier("done")
    np.savez(
        {root!r} + f"/result-{{processes}}-{{process}}.npz",
        features=whole.features,
        gathered=parallel.gather(x)[:N],
        proxies=proxies,
        streamed=np.asarray(streamed.proxies),
        accuracy=metric,
        prefix=prefix,
        gamma=gamma,
        **heads,
        read=np.array(sorted(read)),
        main=parallel.is_main_process(),
    )
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(root: Path, processes: int) -> list[dict[str, np.ndarray]]:
    root.mkdir()
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(root), devices=8 // processes)
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(number), str(processes), address],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        for number in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)
    files = [root / f"result-{processes}-{number}.npz" for number in range(processes)]
    return [dict(np.load(file)) for file in files]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, and of two."""
    root = tmp_path_factory.mktemp("runs")
    return launch(root / "one", 1)[0], launch(root / "two", 2)


@pytest.mark.slow
def test_equal_features(runs):
    one, two = runs
    for each in two:
        # The batches are the same, spread over four devices instead of eight: float32 rounding.
        np.testing.assert_allclose(each["features"], one["features"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(each["gathered"], each["features"])
    np.testing.assert_array_equal(two[0]["features"], two[1]["features"])


@pytest.mark.slow
def test_equal_proxies_and_metrics(runs):
    one, two = runs
    for each in two:
        np.testing.assert_allclose(each["proxies"], one["proxies"], atol=1e-5)
        np.testing.assert_allclose(each["streamed"], one["proxies"], atol=1e-5)
        assert each["accuracy"] == one["accuracy"]
    np.testing.assert_array_equal(two[0]["proxies"], two[1]["proxies"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gda", "gda_chunks", "rule", "rule_chunks", "stata"])
def test_equal_heads(runs, name):
    one, two = runs
    # float32 sums over eight devices or over chunks, through two rounds of labels and solves, by the rule through five
    close = {"rtol": 0, "atol": 1e-5 * np.abs(one[name]).max()}
    for each in two:
        np.testing.assert_allclose(each[name], one[name], **close)
        np.testing.assert_allclose(each[name], one[name.removesuffix("_chunks")], **close)
        assert each["gamma"] == one["gamma"]
    np.testing.assert_array_equal(two[0][name], two[1][name])


@pytest.mark.slow
def test_equal_prompts(runs):
    one, two = runs
    for each in two:
        # Sums over eight devices in both; float32 over two short trainings.
        np.testing.assert_allclose(each["prefix"], one["prefix"], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(two[0]["prefix"], two[1]["prefix"])


@pytest.mark.slow
def test_each_process_reads_its_part(runs):
    one, two = runs
    assert one["read"].tolist() == list(range(61))
    parts = [each["read"].tolist() for each in two]
    assert parts[0] + parts[1] == list(range(61))
    assert min(map(len, parts)) > 20


@pytest.mark.slow
def test_one_process_writes_reports(runs):
    one, two = runs
    assert bool(one["main"])
    assert [bool(each["main"]) for each in two] == [True, False]
