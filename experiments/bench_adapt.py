"""Adaptation against the published methods as their equations read, in PyTorch, and the graph against faiss.

    python -m experiments.bench_adapt --scale 0.1                 # 5,000 x 512 x 100; 1 is 50,000 x 512 x 1,000
    python -m experiments.bench_adapt --memory 100000 1000000     # a store of float16 features on disk

A and B in turn, round after round, in one process; medians and ratios; the first call, which compiles, apart. Needs
PyTorch; with faiss the exact graph of neighbours is timed against it, too. StatA and TransCLIP are without graph on
both sides. `--memory`: peak resident memory of a process that fits a head to N images of 512 features in a feature
store, which reads chunk by chunk. What was measured before is kept in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxzs import adapt, report

RESULTS = Path(__file__).parent / "results"
ROUNDS = 10  # of labels and parameters, of all
SHARE = 1 / 50  # what the official codes divide log-likelihoods by
CHUNK = 16_384  # images of a chunk on disk


def unit(a: np.ndarray) -> np.ndarray:
    return (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32)


def features(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around class directions: 50,000 images and 1,000 classes times `scale`, 512 wide."""
    n, e, c = round(50_000 * scale), 512, max(10, round(1000 * scale))
    rng = np.random.default_rng(0)
    classes = unit(rng.normal(size=(c, e)))
    images = classes[np.arange(n) % c] + 2.0 * rng.standard_normal((n, e), np.float32) / np.sqrt(e)
    return unit(images), unit(classes + rng.normal(size=(c, e)) / np.sqrt(e))


# --- PyTorch ----------------------------------------------------------------------------------------------------


def stata_in_torch(x: Any, z: Any) -> Any:
    """StatA as its equations read, class by class: no product of matrices stands in for a sum."""
    import torch

    y = torch.softmax(100 * x @ z.T, dim=1)
    initial = sum((y[:, c, None] * (x - z[c]) ** 2).sum(0) for c in range(len(z))) / len(x)
    mu, var = z, initial.expand(len(z), -1)
    for _ in range(ROUNDS):
        ll = torch.stack([-0.5 * (((x - mu[c]) ** 2 / var[c]).sum(1) + var[c].log().sum()) for c in range(len(z))], 1)
        labels = torch.softmax(100 * x @ z.T + SHARE * ll, dim=1)
        mu, var = stata_moments_in_torch(x, z, labels, initial)
    return labels


def stata_moments_in_torch(x: Any, z: Any, labels: Any, initial: Any) -> tuple[Any, Any]:
    import torch

    counts = torch.bincount(labels.argmax(1), minlength=len(z)).float()
    beta = (counts / (1 + counts))[:, None]
    mass = labels.sum(0)[:, None].clamp_min(1e-30)
    means = torch.nn.functional.normalize(labels.T @ x / mass, dim=1)
    mu = torch.nn.functional.normalize(beta * means + (1 - beta) * z, dim=1)
    scatter = torch.stack([(labels[:, c, None] * (x - mu[c]) ** 2).sum(0) for c in range(len(z))]) / mass
    return mu, beta * scatter + (1 - beta) * (initial + (z - mu) ** 2)


def transclip_in_torch(x: Any, z: Any) -> Any:
    """TransCLIP in the same way: one variance for all classes, means of the 8 surest images to begin with."""
    import torch

    normalize = torch.nn.functional.normalize
    y = torch.softmax(100 * x @ z.T, dim=1)
    best, rows = y.T.topk(8, dim=1)
    mu = normalize((best[:, :, None] * x[rows]).sum(1), dim=1)
    var = torch.full_like(x[0], 1 / x.shape[1])
    for _ in range(ROUNDS):
        ll = torch.stack([-0.5 * ((x - mu[c]) ** 2 / var).sum(1) for c in range(len(z))], 1)
        labels = torch.softmax(100 * x @ z.T + SHARE * ll, dim=1)
        mu = normalize(labels.T @ x / labels.sum(0)[:, None].clamp_min(1e-30), dim=1)
        var = sum((labels[:, c, None] * (x - mu[c]) ** 2).sum(0) for c in range(len(z))) / labels.sum()
    return labels


def stata_by_products(x: Any, z: Any) -> Any:
    """StatA by products of matrices in PyTorch, as jaxzs has it: what of the ratio is arithmetic."""
    import torch

    normalize, text, squares = torch.nn.functional.normalize, 100 * x @ z.T, x * x
    around = lambda labels, mu: labels.T @ squares - 2 * mu * (labels.T @ x) + labels.sum(0)[:, None] * mu**2  # noqa: E731
    initial = around(torch.softmax(text, 1), z).sum(0) / len(x)
    mu, var = z, initial.expand(len(z), -1)
    for _ in range(ROUNDS):
        constant = (mu**2 / var + var.log()).sum(1)
        labels = torch.softmax(text - 0.5 * SHARE * (squares @ (1 / var).T - 2 * x @ (mu / var).T + constant), 1)
        counts = torch.bincount(labels.argmax(1), minlength=len(z)).float()
        beta, mass = (counts / (1 + counts))[:, None], labels.sum(0)[:, None].clamp_min(1e-30)
        mu = normalize(beta * normalize(labels.T @ x / mass, dim=1) + (1 - beta) * z, dim=1)
        var = beta * around(labels, mu) / mass + (1 - beta) * (initial + (z - mu) ** 2)
    return labels


# --- time ---------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Of a clock, and of all processors together."""
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - start, time.process_time() - cpu


def calls(x: np.ndarray, z: np.ndarray) -> dict[str, Callable[[], Any]]:
    try:
        import torch
    except ImportError:
        sys.exit("bench_adapt.py compares with PyTorch: pip install torch")
    torch.set_num_threads(os.cpu_count() or 1)
    on_torch, on_jax = (torch.tensor(x), torch.tensor(z)), (jax.numpy.asarray(x), jax.numpy.asarray(z))
    found: dict[str, Callable[[], Any]] = {
        "StatA, PyTorch, as it reads": lambda: stata_in_torch(*on_torch),
        "TransCLIP, PyTorch, as it reads": lambda: transclip_in_torch(*on_torch),
        "StatA, PyTorch, by products": lambda: stata_by_products(*on_torch),
        "StatA, jaxzs": lambda: adapt.stata(*on_jax, neighbours=0, iterations=ROUNDS),
        "TransCLIP, jaxzs": lambda: adapt.transclip(*on_jax, neighbours=0, iterations=ROUNDS),
        "anchored GDA, jaxzs": lambda: adapt.anchored_gda(*on_jax, rounds=ROUNDS),
        "the rule, jaxzs": lambda: adapt.fit(*on_jax).head,
        "graph, jaxzs": lambda: adapt.nearest_neighbours(on_jax[0], 3),
    }
    try:
        import faiss
    except ImportError:
        return found

    def graph() -> Any:
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        return index.search(x, 4)[1][:, 1:]

    return found | {"graph, faiss": graph}


def agreement(found: dict[str, Any]) -> dict[str, float]:
    """That both sides compute the same: share of equal labels, and of equal neighbours."""
    equal = {}
    for name, own in found.items():
        if "PyTorch" in name:
            ours = np.asarray(found[f"{name.split(',')[0]}, jaxzs"].posterior)
            equal[f"labels of {name}"] = float((np.asarray(own).argmax(1) == ours.argmax(1)).mean())
    if "graph, faiss" in found:
        own = np.asarray(found["graph, jaxzs"].index)
        equal["neighbours of faiss"] = float((own == found["graph, faiss"]).mean())
    return equal


def compare(scale: float, rounds: int) -> dict[str, Any]:
    x, z = features(scale)
    timed = calls(x, z)
    first, found = {}, {}
    for name, call in timed.items():
        start = time.perf_counter()
        found[name] = jax.block_until_ready(call())
        first[name] = time.perf_counter() - start
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, call in timed.items():
            times[name].append(seconds(call))
    median = {name: float(np.median([wall for wall, _ in own])) for name, own in times.items()}
    of_processor = {name: float(np.median([cpu for _, cpu in own])) for name, own in times.items()}
    rows: list[dict[str, Any]] = []
    for name, own in median.items():
        against = "graph, faiss" if name.startswith("graph") else "StatA, PyTorch, as it reads"
        less = median[against] / own if against in median else None
        cpu = of_processor[name]
        less_cpu = of_processor[against] / cpu if against in median else None
        row = {"method": name, "seconds": own, "CPU seconds": cpu, "first call": first[name]}
        rows.append(row | {"times less": less, "times less, CPU": less_cpu})
    shape = {"images": len(x), "width": x.shape[1], "classes": len(z), "rounds": ROUNDS, "repeats": rounds}
    return {"shape": shape, "rows": rows, "agreement": agreement(found)}


# --- memory -------------------------------------------------------------------------------------------------------


def memory_of(num_images: int, dim: int, classes: int, method: str) -> dict[str, Any]:
    """Peak memory of this process while a head is fitted to N images on disk."""

    def peak() -> float:
        # Not of `getrusage`, which begins with the memory of the process that has started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024

    rng = np.random.default_rng(0)
    text = unit(rng.normal(size=(classes, dim)))
    with tempfile.NamedTemporaryFile(suffix=".f16") as file:  # gone with the block
        for start in range(0, num_images, CHUNK):
            n = min(CHUNK, num_images - start)
            rows = text[rng.integers(0, classes, n)] + 2 * rng.standard_normal((n, dim), np.float32) / np.sqrt(dim)
            file.write(unit(rows).astype(np.float16).tobytes())
        file.flush()

        def chunks() -> Iterator[np.ndarray]:
            # Opened anew for each chunk: pages of an open memory map would count as this process's memory.
            for start in range(0, num_images, CHUNK):
                n = min(CHUNK, num_images - start)
                yield np.fromfile(file.name, np.float16, n * dim, offset=2 * start * dim).reshape(n, dim)

        jax.block_until_ready(jax.numpy.zeros(()))
        before = peak()
        head = adapt.fit(chunks, text).head if method == "rule" else adapt.anchored_gda(chunks, text)
        jax.block_until_ready(head)
        return {
            "method": method,
            "images": num_images,
            "width": dim,
            "classes": classes,
            "MB on disk": num_images * dim * 2 / 2**20,
            "MB before": before,
            "MB peak": peak(),
        }


def in_a_process(*words: Any) -> dict[str, Any]:
    """Each in a process of its own: peaks do not go down."""
    command = [sys.executable, "-m", "experiments.bench_adapt", "--one-memory", *map(str, words)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.strip().splitlines()[-1])


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def text_of(metrics: dict[str, Any]) -> str:
    parts = ["# Adaptation", f"{metrics['processor']}, {os.cpu_count()} cores, float32."]
    if "compare" in metrics:
        own = metrics["compare"]
        rows = [list(row.values()) for row in own["rows"]]
        parts += [
            f"`python -m experiments.bench_adapt --scale {own['scale']:g}`: "
            + ", ".join(f"{name} {value:,}" for name, value in own["shape"].items())
            + '. Medians; the first call compiles. "times less": than StatA as it reads, of graphs than faiss.',
            report.markdown_table(tuple(own["rows"][0]), rows, 3),
            "Equal: " + ", ".join(f"{name} {100 * share:.2f} %" for name, share in own["agreement"].items()) + ".",
        ]
    if metrics.get("memory"):
        rows = [list(row.values()) for row in metrics["memory"]]
        parts += [
            "Peak memory of a process that fits a head to features on disk, in float16, chunk by chunk "
            "(`python -m experiments.bench_adapt --memory N ...`):",
            report.markdown_table(tuple(metrics["memory"][0]), rows, 0),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, help="of ImageNet's 50,000 images and 1,000 classes")
    parser.add_argument("--repeats", type=int, default=3, help="of timing")
    parser.add_argument("--memory", type=int, nargs="+", default=[], help="numbers of images")
    parser.add_argument("--method", choices=("gda", "rule"), default="gda", help="of --memory")
    parser.add_argument("--width", type=int, default=512, help="of --memory")
    parser.add_argument("--classes", type=int, default=100, help="of --memory")
    parser.add_argument("--one-memory", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.one_memory:
        number, dim, classes, method = arguments.one_memory
        print(json.dumps(memory_of(int(number), int(dim), int(classes), method)))
        return
    path = arguments.out / "bench_adapt.json"
    metrics = dict(report.read_record(path).results.metrics) if path.exists() else {}
    metrics["processor"] = processor()
    if arguments.scale:
        metrics["compare"] = {"scale": arguments.scale, **compare(arguments.scale, arguments.repeats)}
    kept = {
        json.dumps([row[k] for k in ("method", "images", "width", "classes")]): row for row in metrics.get("memory", ())
    }
    for number in arguments.memory:
        row = in_a_process(number, arguments.width, arguments.classes, arguments.method)
        kept[json.dumps([row[k] for k in ("method", "images", "width", "classes")])] = row
    metrics["memory"] = [kept[name] for name in sorted(kept)]
    command = shlex.join(["python", "-m", "experiments.bench_adapt", *sys.argv[1:]])
    report.write_record(path, command=command, settings={}, metrics=metrics)
    (arguments.out / "bench_adapt.md").write_text(text_of(metrics))
    print(text_of(metrics))


if __name__ == "__main__":
    main()
