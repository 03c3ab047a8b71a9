"""Anchored GDA and the rule against StatA without graph, written straightforwardly in PyTorch on the same features.

    python experiments/bench_adapt.py --scale 0.1      # 5,000 x 512 x 100; 1 is ImageNet's 50,000 x 512 x 1,000

A and B in turn, round after round; medians and ratios; compile time apart. Needs PyTorch; with faiss the exact graph of
neighbours is timed against it, too.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxzs import adapt, report

RESULTS = Path(__file__).parent / "results"
ROUNDS = 10  # of labels and parameters, of both


def features(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around class directions: 50,000 images and 1,000 classes times `scale`, 512 wide."""
    n, e, c = round(50_000 * scale), 512, max(10, round(1000 * scale))
    rng = np.random.default_rng(0)
    unit = lambda a: (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32)  # noqa: E731
    classes = unit(rng.normal(size=(c, e)))
    images = classes[np.arange(n) % c] + 2.0 * rng.standard_normal((n, e), np.float32) / np.sqrt(e)
    return unit(images), unit(classes + rng.normal(size=(c, e)) / np.sqrt(e))


def stata_in_torch(x: Any, z: Any) -> Any:
    """StatA without graph as its equations read, class by class: no product of matrices stands in for a sum."""
    import torch

    y = torch.softmax(100 * x @ z.T, dim=1)
    initial = sum((y[:, c, None] * (x - z[c]) ** 2).sum(0) for c in range(len(z))) / len(x)
    mu, var = z, initial.expand(len(z), -1)
    for _ in range(ROUNDS):
        ll = torch.stack([-0.5 * (((x - mu[c]) ** 2 / var[c]).sum(1) + var[c].log().sum()) for c in range(len(z))], 1)
        labels = torch.softmax(100 * x @ z.T + ll / 50, dim=1)
        counts = torch.bincount(labels.argmax(1), minlength=len(z)).float()
        beta = (counts / (1 + counts))[:, None]
        means = torch.nn.functional.normalize(labels.T @ x / labels.sum(0)[:, None].clamp_min(1e-30), dim=1)
        mu = torch.nn.functional.normalize(beta * means + (1 - beta) * z, dim=1)
        scatter = torch.stack([(labels[:, c, None] * (x - mu[c]) ** 2).sum(0) for c in range(len(z))])
        scatter = scatter / labels.sum(0)[:, None].clamp_min(1e-30)
        var = beta * scatter + (1 - beta) * (initial + (z - mu) ** 2)
    return labels


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def calls(x: np.ndarray, z: np.ndarray) -> dict[str, Callable[[], Any]]:
    try:
        import torch
    except ImportError:
        sys.exit("bench_adapt.py compares with PyTorch: pip install torch")
    on_torch, on_jax = (torch.tensor(x), torch.tensor(z)), (jax.numpy.asarray(x), jax.numpy.asarray(z))
    found: dict[str, Callable[[], Any]] = {
        "StatA in PyTorch": lambda: stata_in_torch(*on_torch),
        "StatA, no graph": lambda: adapt.stata(*on_jax, neighbours=0, iterations=ROUNDS),
        "anchored GDA": lambda: adapt.anchored_gda(*on_jax, rounds=ROUNDS),
        "the rule": lambda: adapt.fit(*on_jax).head,
        "graph": lambda: adapt.nearest_neighbours(on_jax[0], 3),
    }
    try:
        import faiss
    except ImportError:
        return found

    def graph() -> Any:
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        return index.search(x, 4)

    return found | {"graph in faiss": graph}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.1, help="of ImageNet's 50,000 images and 1,000 classes")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    x, z = features(arguments.scale)
    timed = calls(x, z)
    compile_seconds = {name: seconds(call) for name, call in timed.items()}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(arguments.rounds):
        for name, call in timed.items():
            times[name].append(seconds(call))
    median = {name: float(np.median(own)) for name, own in times.items()}
    rows = [
        {"method": name, "seconds": own, "first": compile_seconds[name], "less time": median["StatA in PyTorch"] / own}
        for name, own in median.items()
    ]
    command = shlex.join(["python", "experiments/bench_adapt.py", "--scale", str(arguments.scale)])
    shape = {"images": len(x), "width": x.shape[1], "classes": len(z), "rounds": ROUNDS}
    report.write_record(arguments.out / "bench_adapt.json", command=command, settings=shape, metrics={"rows": rows})
    table = report.markdown_table(tuple(rows[0]), [list(row.values()) for row in rows], 3)
    (arguments.out / "bench_adapt.md").write_text(f"# Adaptation\n\n`{command}`; {shape}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
