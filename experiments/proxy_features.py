"""Proxy learning on real CLIP features: text proxy, plain and Sinkhorn labels, auto gamma, every solver.

    python experiments/proxy_features.py --features FOLDER

FOLDER holds `.npz` files with image_features [N,E], labels [N], text_features [C,E] and perhaps
test_image_features and test_labels. Transductive: accuracy on the images that the proxies were fitted on,
without their labels. Held out: accuracy of the same proxies on the test images.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import metrics, proxy, report

RESULTS = Path(__file__).parent / "results"
LABELS = {"plain (gamma 1)": 1.0, "Sinkhorn (gamma 0)": 0.0, "Sinkhorn (auto)": "auto"}
SOLVERS = ("closed_form", "fast", "reference")
HEADER = (
    "data set",
    "labels",
    "gamma",
    "solver",
    "transductive %",
    "held out %",
    "passes",
    "objective",
    "seconds",
)


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


def run(path: Path, seed: int, repeats: int) -> list[dict]:
    """All rows of one data set."""
    stored = np.load(path)
    x, z = unit(stored["image_features"]), unit(stored["text_features"])
    y = jnp.asarray(stored["labels"], jnp.int32)
    held_out = None
    if "test_image_features" in stored:
        held_out = (
            unit(stored["test_image_features"]),
            jnp.asarray(stored["test_labels"], jnp.int32),
        )
    name = path.stem.split("_")[0]

    def row(kind, gamma, solver, proxies, passes=0.0, objective=None, seconds=0.0):
        return {
            "data set": name,
            "labels": kind,
            "gamma": gamma,
            "solver": solver,
            "transductive %": percent(x, y, proxies),
            "held out %": None if held_out is None else percent(*held_out, proxies),
            "passes": passes,
            "objective": objective,
            "seconds": seconds,
        }

    rows = [row("text proxy", None, "none", z)]
    for kind, gamma in LABELS.items():
        key = jax.random.key(seed)
        chosen = float(proxy.choose_gamma(x, z, key=key)) if gamma == "auto" else gamma
        for solver in SOLVERS:

            def solve(x, z, key, gamma=gamma, solver=solver):
                similarity = jnp.matmul(x, z.T, precision="highest")
                labels = proxy.pseudo_labels(similarity, gamma=gamma, key=key, image_features=x)
                return proxy.learn_proxies(x, z, labels, solver=solver)

            compiled = jax.jit(solve).lower(x, z, key).compile()
            result, seconds = timed(compiled, (x, z, key), 1 if solver == "reference" else repeats)
            rows.append(
                row(
                    kind,
                    chosen,
                    solver,
                    result.proxies,
                    float(result.passes),
                    float(result.objective[-1]),
                    seconds,
                )
            )
            print(" | ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, help="folder with .npz files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the halves of gamma=auto")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    arguments = parser.parse_args()

    paths = sorted(arguments.features.glob("*.npz"))
    if not paths:
        sys.exit(f"no .npz files in {arguments.features}")
    rows = [row for path in paths for row in run(path, arguments.seed, arguments.repeats)]
    table = report.markdown_table(HEADER, [[_cell(row[h]) for h in HEADER] for row in rows], 3)
    command = (
        f"python experiments/proxy_features.py --features FOLDER --repeats {arguments.repeats}"
    )
    record = report.write_record(
        arguments.out / "proxy_features.json",
        command=command,
        settings={
            "files": [path.name for path in paths],
            "seed": arguments.seed,
            "label_temperature": 0.01,
            "temperature": 0.04,
            "confidence": 0.6,
            "repeats": arguments.repeats,
        },
        metrics={"rows": rows},
    )
    text = (
        "# Proxies on real CLIP ViT-B/32 features\n\n"
        f"`{command}`; {record['device']}, jax {record['versions']['jax']}, float32, seed "
        f"{arguments.seed}.\nTransductive: accuracy on the images that the proxies were fitted on, labels "
        "unseen; held out: the same proxies on\nother images. Passes: pairs of [N,E]x[E,C] products. "
        "Seconds: labels and solver, compiled before, median\n"
        f'of {arguments.repeats} (reference: 1). The prompt is only "a <name>": compare methods with each '
        "other, not with published tables.\n\n"
    )
    (arguments.out / "proxy_features.md").write_text(text + table + "\n")
    print(text + table)


def _cell(value):
    return "" if value is None else value


if __name__ == "__main__":
    main()
