"""Seconds an image of segmentation, by stage: maps of all tags at once against one backward pass a tag, and the CRF.

    python experiments/bench_segment.py --out experiments/results/bench_segment.json

Needs torch beside jaxzs. ViT-B/16 with random weights. The PyTorch side computes the activation map of one tag at a
time, as the original does, with a fresh forward and backward pass of the last block for each; both run in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import clip, patch
from jaxzs.patch import CRF, dense_crf, segment
from jaxzs.patch.cam import CamTexts, class_activation_maps
from jaxzs.report import markdown_table, write_record

try:  # run as a file, or as a module of experiments
    from bench_patch import CONFIGS, TorchTagger
except ImportError:
    from experiments.bench_patch import CONFIGS, TorchTagger

BACKGROUND = 25


class TorchMaps(TorchTagger):
    """Activation maps one tag at a time."""

    def maps(self, pixels: Any, texts: Any, num_tags: int) -> np.ndarray:
        """[K,P] of one image [3,H,W]; texts [K+M,E], the tags first."""
        torch, vision = self.torch, self.config.vision
        size, depth = vision.patch_size, vision.num_hidden_layers
        layers = self.params["vision_model"]["encoder"]["layers"]
        with torch.no_grad():
            grid = (pixels.shape[1] // size, pixels.shape[2] // size)
            x = self.embed(pixels, grid)
            for layer in range(depth - 1):
                x, _ = self.block(x, layers[str(layer)], need_weights=True)
        last, maps = layers[str(depth - 1)], []
        for tag in range(num_tags):
            y = self.norm(x, last["layer_norm1"]).detach().requires_grad_(True)
            z = self.block_after_norm(x, y, last)
            feature = self.project(z)[1:].mean(0)
            probability = self.probabilities(feature[None], texts)[0, tag]
            (gradient,) = torch.autograd.grad(probability, y)
            weights = gradient[1:].mean(0)
            maps.append((y[1:] @ weights).detach().relu())
        return torch.stack(maps).cpu().numpy()

    def block_after_norm(self, x: Any, y: Any, weights: Any) -> Any:
        """The last block from the output y of its first LayerNorm on; x is what enters the residual."""
        heads, attention = self.config.vision.num_attention_heads, weights["self_attn"]
        q, k, v = (self.linear(y, attention[f"{name}_proj"]).view(len(x), heads, -1).transpose(0, 1) for name in "qkv")
        mixed = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        z = x + self.linear(mixed.transpose(0, 1).reshape(x.shape), attention["out_proj"])
        y = self.linear(self.norm(z, weights["layer_norm2"]), weights["mlp"]["fc1"])
        return z + self.linear(y * (1.702 * y).sigmoid(), weights["mlp"]["fc2"])


class Seconds(NamedTuple):
    """Of one call: on the clock, and of all threads of this process, which other work on the machine hardly touches."""

    wall: float
    cpu: float


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each call, one after the other in every round; the first call, which compiles, is not counted."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            if turn:
                seconds[name].append(Seconds(time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def median(values: list[Seconds], part: str) -> float:
    return statistics.median(getattr(value, part) for value in values)


def ratio(slow: list[Seconds], values: list[Seconds], part: str) -> float:
    """How many times as long the first takes: the median over rounds."""
    pairs = zip(slow, values, strict=True)
    return statistics.median(getattr(a, part) / getattr(b, part) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="ViT-B/16")
    parser.add_argument("--size", default="384x512")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tags", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--crf-sizes", nargs="+", default=["96x128", "192x256"])
    parser.add_argument("--crf-strides", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CONFIGS[options.model]
    params = clip.random_params(jax.random.key(0), config)
    height, width = (int(side) for side in options.size.split("x"))
    size = config.vision.patch_size
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((options.batch, height, width, 3)).astype(np.float32)
    on_device = jnp.asarray(pixels)
    grid = patch.full_grid(options.batch, height // size, width // size)
    tagger = TorchMaps(params, config, device)
    images = torch.tensor(pixels.transpose(0, 3, 1, 2), device=device)
    rows, figures = [], {}

    @jax.jit
    def maps(params: Any, pixels: Any, texts: Any) -> Any:
        B, K = pixels.shape[0], texts.shape[0] - BACKGROUND
        texts = jnp.broadcast_to(texts[None], (B, *texts.shape))
        present = jnp.ones((B, K), bool)
        return class_activation_maps(params, pixels, CamTexts(texts, present), config, grid).maps

    for num_tags in options.tags:
        texts = rng.standard_normal((num_tags + BACKGROUND, config.projection_dim))
        texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
        names = torch.tensor(texts, device=device)
        tags = np.tile(np.arange(num_tags), (options.batch, 1))
        calls = {
            "torch, maps tag by tag": lambda: [
                tagger.maps(image, names, num_tags)  # noqa: B023
                for image in images
            ],
            "jaxzs, maps": lambda: maps(params, on_device, texts),  # noqa: B023
            "jaxzs, maps and affinity": lambda: segment(
                params, on_device, texts[:num_tags], texts[num_tags:], tags, config  # noqa: B023
            ),
        }  # fmt: skip
        seconds = in_turn(calls, options.rounds)
        slow = seconds["torch, maps tag by tag"]
        for name, values in seconds.items():
            figures[f"{name}, {num_tags} tags"] = {
                "seconds_per_image": median(values, "wall") / options.batch,
                "cpu_seconds_per_image": median(values, "cpu") / options.batch,
                "ratio": ratio(slow, values, "wall"),
                "cpu_ratio": ratio(slow, values, "cpu"),
            }
            rows.append([f"{name}, {num_tags} tags", options.size, *figures[f"{name}, {num_tags} tags"].values()])
    for crf_size in options.crf_sizes:
        shape = tuple(int(side) for side in crf_size.split("x"))
        photo = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
        scores = rng.random((3, *shape), np.float32)
        calls = {
            f"CRF, stride {stride}": lambda stride=stride: dense_crf(scores, photo, CRF(stride=stride))  # noqa: B023
            for stride in options.crf_strides
        }
        for name, values in in_turn(calls, options.rounds).items():
            figures[f"{name}, {crf_size}"] = {
                "seconds_per_image": median(values, "wall"),
                "cpu_seconds_per_image": median(values, "cpu"),
            }
            rows.append([name, crf_size, *figures[f"{name}, {crf_size}"].values(), "", ""])
    print(f"{options.model}, batch {options.batch}, {options.rounds} rounds in turn")
    header = ["stage", "image", "s an image", "CPU s", "x torch", "CPU x torch"]
    print(markdown_table(header, rows, digits=3))
    if options.out is not None:
        write_record(
            options.out,
            command=f"python experiments/bench_segment.py --model {options.model} --batch {options.batch}",
            settings={**vars(options), "out": options.out.name, "torch": torch.__version__},
            metrics=figures,
        )


if __name__ == "__main__":
    main()
