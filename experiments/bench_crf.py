"""The dense CRF on a lattice against pydensecrf2, in turn in one process: seconds of a photo, by number of labels.

    python -m experiments.bench_crf --out experiments/results/bench_crf.json

Needs pydensecrf2 beside jaxzs (it compiles from source). CLIP-ES's settings, 10 iterations. Both are given the same
photo and the same probabilities, as arrays on the host, and give probabilities of the same shape. Without --photo the
photo is drawn: smooth regions with edges, shading and the noise of a camera. The first call, which compiles, is apart.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from jaxzs.patch import CRF, dense_crf
from jaxzs.report import markdown_table, write_record
from jaxzs.report.records import processor


def drawn_photo(height: int, width: int) -> np.ndarray:
    """Regions of a few colours, shaded, with noise: [H,W,3] uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 60 + 2, width // 60 + 2, 3), np.uint8)
    regions = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    shade = Image.fromarray(rng.integers(0, 90, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    soft = np.asarray(regions.filter(ImageFilter.GaussianBlur(1.5)), np.float32) + np.asarray(shade, np.float32) - 45
    return np.clip(soft + rng.normal(0, 3, soft.shape), 0, 255).astype(np.uint8)


def drawn_probabilities(labels: int, height: int, width: int) -> np.ndarray:
    """Smooth maps that sum to 1, as patches give them: [C,H,W] float32."""
    rng = np.random.default_rng(labels)
    coarse = rng.normal(0, 2, (labels, height // 16 + 1, width // 16 + 1)).astype(np.float32)
    maps = np.stack(
        [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR)) for one in coarse]
    )
    maps = np.exp(maps - maps.max(0))
    return (maps / maps.sum(0)).astype(np.float32)


def by_pydensecrf(probabilities: np.ndarray, photo: np.ndarray, settings: CRF) -> np.ndarray:
    """[C,H,W] -> [C,H,W], as CLIP-ES calls it."""
    from pydensecrf import densecrf

    labels, height, width = probabilities.shape
    field = densecrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(-np.log(np.clip(probabilities, 1e-5, 1)).reshape(labels, -1).astype(np.float32))
    field.addPairwiseGaussian(sxy=settings.smooth_sigma, compat=settings.smooth_weight)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sigma, srgb=settings.colour_sigma, rgbim=photo, compat=settings.bilateral_weight
    )
    return np.asarray(field.inference(settings.iterations), np.float32).reshape(probabilities.shape)


def in_turn(calls: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the clock and of the processor's time, those of the first call apart, and differences of results."""
    first, results, wall, busy = {}, {}, {name: [] for name in calls}, {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            results[name] = call()
            seconds = time.perf_counter() - start
            if not turn:
                first[name] = seconds
                continue
            wall[name].append(seconds)
            busy[name].append(time.process_time() - cpu)
    reference = next(iter(calls))
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(busy[name]),
            "ratio": statistics.median(b / a for a, b in zip(wall[reference], wall[name], strict=True)),
            "cpu_ratio": statistics.median(b / a for a, b in zip(busy[reference], busy[name], strict=True)),
            "compile_seconds": max(0.0, first[name] - statistics.median(wall[name])),
            "difference": float(np.abs(results[name] - results[reference]).max()),
            "same_labels": float((results[name].argmax(0) == results[reference].argmax(0)).mean()),
        }
        for name in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photo", type=Path, help="a file; by default one is drawn")
    parser.add_argument("--size", default="375x500", help="height and width of the one that is drawn")
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 5, 21])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON of the record; the table beside it")
    options = parser.parse_args()
    settings = CRF(kernel="lattice")
    if options.photo is None:
        photo = drawn_photo(*(int(side) for side in options.size.split("x")))
    else:
        photo = np.ascontiguousarray(Image.open(options.photo).convert("RGB"))
    figures = {}
    for labels in options.labels:
        maps = drawn_probabilities(labels, *photo.shape[:2])
        calls = {
            "pydensecrf2": lambda maps=maps: by_pydensecrf(maps, photo, settings),
            "jaxzs": lambda maps=maps: np.asarray(dense_crf(maps, photo, settings)),
        }
        figures[f"{labels} labels"] = in_turn(calls, options.rounds)
    header = ["labels", "program", "s", "CPU s", "x pydensecrf2", "CPU x", "compile s", "difference", "same label, %"]
    rows = [
        [
            name,
            program,
            one["seconds"],
            one["cpu_seconds"],
            one["ratio"],
            one["cpu_ratio"],
            one["compile_seconds"],
            f"{one['difference']:.0e}",
            100 * one["same_labels"],
        ]
        for name, programs in figures.items()
        for program, one in programs.items()
    ]
    title = (
        f"A photo of {photo.shape[0]}x{photo.shape[1]}, 10 iterations, {options.rounds} rounds in turn, {processor()}"
    )
    print(title, markdown_table(header, rows), sep="\n\n")
    if options.out is not None:
        command = shlex.join(["python", "-m", "experiments.bench_crf", *sys.argv[1:]])
        stated = {**vars(options), "out": options.out.name, "photo": options.photo and options.photo.name}
        write_record(options.out, command=command, settings=stated, metrics=figures)
        text = f"`{command}`\n\n{title}\n\n{markdown_table(header, rows)}\n"
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
