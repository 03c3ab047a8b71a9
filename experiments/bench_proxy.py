"""How fast the proxy solvers reach the objective that the reference has after 2,000 iterations.

    python experiments/bench_proxy.py --features FOLDER --scale 0.05      # real features, and a small ImageNet
    python experiments/bench_proxy.py --scale 1                           # ImageNet shape: 50,000 x 768 x 1,000

One run measures all solvers in turn, round after round, and reports medians and ratios; compile time apart.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import metrics, proxy, report
from jaxzs.proxy.fit import learn as learn_in_memory
from jaxzs.proxy.rows import Rows
from jaxzs.proxy.settings import in_float32

Solver: TypeAlias = Callable[[], proxy.ProxyResult]
RESULTS = Path(__file__).parent / "results"
HEADER = (
    "data set",
    "N x E x C",
    "solver",
    "passes",
    "objective",
    "reaches it",
    "accuracy %",
    "compile s",
    "seconds",
    "fewer passes",
    "less time",
)


def unit(x: np.ndarray) -> jax.Array:
    """Rows of unit length, float32."""
    x = np.asarray(x, np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def imagenet_like(scale: float, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random features of ImageNet shape: 50,000 images and 1,000 classes times `scale`, 768 wide.

    Images lie around their class's direction plus an offset common to all images (the modality gap); class
    directions have a spectrum that falls off, as those of CLIP do.
    """
    n, e, c = round(50_000 * scale), 768, max(10, round(1000 * scale))
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, e + 1) ** -0.5
    classes = rng.normal(size=(c, e)) * spectrum
    truth = np.arange(n) % c
    gap = 2.0 * rng.normal(size=(1, e)) * spectrum
    noise = rng.standard_normal((n, e), np.float32) * np.float32(1.2) * spectrum.astype(np.float32)
    text = classes + 0.7 * rng.normal(size=(c, e)) * spectrum + 2.0 * rng.normal(size=(1, e)) * spectrum
    return unit(classes[truth] + noise + gap), unit(text), jnp.asarray(truth, jnp.int32)


@jax.jit
def objective(x: jax.Array, labels: jax.Array, proxies: jax.Array) -> jax.Array:
    """Cross-entropy by its definition, with full-precision products, the same for all solvers."""
    logits = jnp.matmul(x, proxies.T, precision="highest") / jnp.float32(0.04)
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.mean(jnp.sum(proxy.round_labels(labels) * log_q, axis=-1))


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def bench(name: str, x: jax.Array, z: jax.Array, y: jax.Array, rounds: int, iterations: int) -> list[dict]:
    """One data set: all solvers to the reference's final objective."""
    labels = proxy.pseudo_labels(jnp.matmul(x, z.T, precision="highest"))
    learn = functools.partial(proxy.learn_proxies, x, z, labels)
    rows, half = Rows(jnp.ones(len(x), bool), x), in_float32(proxy.Settings(product_dtype=jnp.bfloat16))
    results: dict[str, proxy.ProxyResult] = {}
    first_seconds: dict[str, float] = {}

    def compile_all(solvers: dict[str, Solver]) -> None:
        for solver, call in solvers.items():
            start = time.perf_counter()
            results[solver] = jax.block_until_ready(call())
            first_seconds[solver] = time.perf_counter() - start

    solvers: dict[str, Solver] = {
        "reference": functools.partial(learn, solver="reference", iterations=iterations),
        "closed form": functools.partial(learn, solver="closed_form"),
        "fast, default cap": learn,
        "fast bfloat16, default cap": functools.partial(learn_in_memory, rows, z, labels, half),
    }
    compile_all(solvers)
    aim = float(objective(x, labels, results["reference"].proxies))
    reached = np.flatnonzero(np.asarray(results["fast, default cap"].objective) <= aim)
    if len(reached) and reached[0]:
        to_aim = functools.partial(learn, iterations=int(reached[0]))
        more: dict[str, Solver] = {
            "fast, to the objective": to_aim,
            "fast bfloat16, as many passes": functools.partial(to_aim, product_dtype=jnp.bfloat16),
        }
        compile_all(more)
        solvers |= more

    times: dict[str, list[float]] = {solver: [] for solver in solvers}
    for _ in range(rounds):
        for solver, call in solvers.items():
            times[solver].append(seconds_of(call))

    rows = []
    for solver, result in results.items():
        seconds = float(np.median(times[solver]))
        value = float(objective(x, labels, result.proxies))
        scores = jnp.matmul(x, result.proxies.T, precision="highest")
        passes = float(result.passes)
        # float32 objectives made of logits up to 25 are known to about 1e-6
        reaches = "yes" if value <= aim + 1e-6 else f"no, {value - aim:+.1e}"
        rows.append(
            {
                "data set": name,
                "N x E x C": f"{x.shape[0]} x {x.shape[1]} x {z.shape[0]}",
                "solver": solver,
                "passes": passes,
                "objective": value,
                "reaches it": reaches,
                "accuracy %": 100 * float(metrics.top_k_accuracy(scores, y)),
                "compile s": max(first_seconds[solver] - seconds, 0.0),
                "seconds": seconds,
                "fewer passes": iterations / passes if passes else "",
                "less time": float(np.median(times["reference"])) / seconds,
            }
        )
        print(" | ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, help="folder with .npz files of real features")
    parser.add_argument("--scale", type=float, help="of random features of ImageNet shape")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of timing")
    parser.add_argument("--iterations", type=int, default=2000, help="of the reference solver")
    parser.add_argument("--seed", type=int, default=0, help="of the random features")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--name", default="bench_proxy", help="file name of the results")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is that of a first run

    sets = []
    for path in sorted(arguments.features.glob("*.npz")) if arguments.features else []:
        stored = np.load(path)
        y = jnp.asarray(stored["labels"], jnp.int32)
        sets.append((path.stem.split("_")[0], unit(stored["image_features"]), unit(stored["text_features"]), y))
    if arguments.scale:
        sets.append((f"ImageNet shape x {arguments.scale:g}", *imagenet_like(arguments.scale, arguments.seed)))
    if not sets:
        sys.exit("nothing to measure: give --features FOLDER with .npz files, or --scale")
    rows = [row for name, x, z, y in sets for row in bench(name, x, z, y, arguments.rounds, arguments.iterations)]

    command = ["python", "experiments/bench_proxy.py"]
    command += ["--features", "FOLDER"] if arguments.features else []
    command += ["--scale", f"{arguments.scale:g}"] if arguments.scale else []
    command += ["--rounds", str(arguments.rounds), "--iterations", str(arguments.iterations)]
    record = report.write_record(
        arguments.out / f"{arguments.name}.json",
        command=shlex.join(command),
        settings={"seed": arguments.seed, "rounds": arguments.rounds, "gamma": 0.0},
        metrics={"rows": rows},
    )
    table = report.markdown_table(HEADER, [[row[h] for h in HEADER] for row in rows], 4)
    text = (
        "# Proxy solvers: passes and seconds to the reference's objective\n\n"
        f"`{shlex.join(command)}`; {record['device']}, jax {record['versions']['jax']}, seed {arguments.seed}.\n"
        f"The objective to reach is that of the reference after {arguments.iterations} iterations, Sinkhorn labels "
        "with gamma 0. A pass is one pair of\n[N,E]x[E,C] products. Seconds are medians of interleaved runs, compile "
        "time apart. Ratios are against the reference.\n\n"
    )
    (arguments.out / f"{arguments.name}.md").write_text(text + table + "\n")
    print(text + table)


if __name__ == "__main__":
    main()
