"""Proxy learning on real CLIP features: text proxy, plain and Sinkhorn labels, auto gamma, every solver.

    python experiments/proxy_features.py --features FOLDER

FOLDER holds `.npz` files with image_features [N,E], labels [N], text_features [C,E] and perhaps
test_image_features and test_labels. With --skip-existing, rows that the record in --out holds already, of the same
features and settings, are not computed again. Transductive: accuracy on the images that the proxies were fitted on,
without their labels. Held out: accuracy of the same proxies on the test images.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import metrics, proxy, report
from jaxzs.report.curves import convergence

RESULTS = Path(__file__).parent / "results"
LABELS = {"plain (gamma 1)": 1.0, "Sinkhorn (gamma 0)": 0.0, "Sinkhorn (auto)": "auto"}
SOLVERS = ("closed_form", "fast", "reference")
HEADER = ("data set", "labels", "gamma", "solver", "transductive %", "held out %", "passes", "objective", "seconds")


def unit(x: np.ndarray) -> jax.Array:
    """Rows of unit length, float32."""
    x = np.asarray(x, np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def percent(features: jax.Array, labels: jax.Array, proxies: jax.Array) -> float:
    scores = jnp.matmul(features, proxies.T, precision="highest")
    return 100 * float(metrics.top_k_accuracy(scores, labels))


def timed(call, arguments: tuple, repeats: int) -> tuple[proxy.ProxyResult, float]:
    """What a compiled function returns, and the median of its wall-clock seconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(call(*arguments))
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


class Features:
    """One data set: unit features, labels, text proxies, and perhaps held-out images."""

    def __init__(self, path: Path) -> None:
        stored = np.load(path)
        self.name = path.stem.split("_")[0]
        self.x, self.z = unit(stored["image_features"]), unit(stored["text_features"])
        self.y = jnp.asarray(stored["labels"], jnp.int32)
        self.held_out = None
        if "test_image_features" in stored:
            labels = jnp.asarray(stored["test_labels"], jnp.int32)
            self.held_out = unit(stored["test_image_features"]), labels
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        self.entry = report.data_entry(path.name, content, len(self.y))


def measure(data: Features, kind: str, solver: str, seed: int = 0, repeats: int = 1) -> report.Results:
    """One row of the table: labels of a kind, one solver; the text proxies as they are with solver "none"."""
    gamma, result, seconds = None, None, 0.0
    proxies, curves = data.z, ()
    if solver != "none":
        gamma, key = LABELS[kind], jax.random.key(seed)

        def solve(x, z, key):
            similarity = jnp.matmul(x, z.T, precision="highest")
            labels = proxy.pseudo_labels(similarity, gamma=gamma, key=key, image_features=x)
            return proxy.learn_proxies(x, z, labels, solver=solver)

        arguments = (data.x, data.z, key)
        compiled = jax.jit(solve).lower(*arguments).compile()
        result, seconds = timed(compiled, arguments, 1 if solver == "reference" else repeats)
        proxies = result.proxies
        if solver != "closed_form":
            curves = (convergence(data.name, solver, result, kind),)
        if gamma == "auto":
            gamma = float(proxy.choose_gamma(data.x, data.z, key=key))
    method = "zero-shot" if result is None else f"proxies, {kind}, {solver}"
    figures = {"transductive": percent(data.x, data.y, proxies)}
    if data.held_out is not None:
        figures["held out"] = percent(*data.held_out, proxies)
    row = {
        "data set": data.name,
        "labels": kind,
        "gamma": gamma,
        "solver": solver,
        "transductive %": figures["transductive"],
        "held out %": figures.get("held out"),
        "passes": 0.0 if result is None else float(result.passes),
        "objective": None if result is None else float(result.objective[-1]),
        "seconds": seconds,
    }
    print(" | ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return report.Results(
        row, tuple(report.Figure(data.name, method, "accuracy", v, p) for p, v in figures.items()), convergence=curves
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, help="folder with .npz files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the halves of gamma=auto")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    parser.add_argument("--skip-existing", action="store_true", help="keep rows of the record")
    arguments = parser.parse_args()

    paths = sorted(arguments.features.glob("*.npz"))
    if not paths:
        sys.exit(f"no .npz files in {arguments.features}")
    command = ["python", "experiments/proxy_features.py", "--features", "FOLDER"]
    command += ["--repeats", str(arguments.repeats)]
    settings = {"label_temperature": 0.01, "temperature": 0.04, "confidence": 0.6}
    settings |= {"seed": arguments.seed, "repeats": arguments.repeats}
    sweep = report.Sweep(
        arguments.out / "proxy_features.json",
        command=shlex.join(command),
        settings=settings,
        skip_existing=arguments.skip_existing,
    )
    rows = []
    for path in paths:
        data = Features(path)
        of_solver = [("text proxy", "none")] + [(k, s) for k in LABELS for s in SOLVERS]
        for kind, solver in of_solver:
            compute = functools.partial(measure, data, kind, solver, arguments.seed, arguments.repeats)
            own = {"labels": kind, "solver": solver}
            cell = sweep.cell(f"{data.name}, {kind}, {solver}", compute, settings=own, data=data.entry)
            rows.append(cell.metrics)
    record = sweep.finish(report.Results({"rows": rows}))
    table = report.markdown_table(HEADER, [[_cell(row[h]) for h in HEADER] for row in rows], 3)
    text = (
        "# Proxies on real CLIP ViT-B/32 features\n\n"
        f"`{shlex.join(command)}`; {record['device']}, jax {record['versions']['jax']}, float32, seed "
        f"{arguments.seed}.\nTransductive: accuracy on the images that the proxies were fitted on, labels "
        "unseen; held out: the same proxies on\nother images. Passes: pairs of [N,E]x[E,C] products. "
        "Seconds: labels and solver, compiled before, median\n"
        f'of {arguments.repeats} (reference: 1). The prompt is only "a NAME": compare methods with each '
        "other, not with published tables.\n\n"
    )
    (arguments.out / "proxy_features.md").write_text(text + table + "\n")
    print(text + table)


def _cell(value):
    return "" if value is None else value


if __name__ == "__main__":
    main()
