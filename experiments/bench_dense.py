"""Dense maps and tags by a learned classifier: jaxzs against the same steps in PyTorch, in turn in one process.

    python -m experiments.bench_dense --out experiments/results/bench_dense.json

Needs torch beside jaxzs. ViT-B/16 with random weights. Dense maps: NACLIP's last block on photos of 336x448 pixels,
positions interpolated, cosines with 21 names. Tags: SCLIP's last block and the ordinary one on photos of 224x224 pixels
after one pass through the eleven blocks before, then the classifier of PIAA. Both sides take a batch at a time, PyTorch
by its own fused attention and with the three projections packed into one. The first call, which compiles, is
apart; results are compared as a check.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import clip, patch
from jaxzs.patch.dense import DenseTask, dense_and_whole, last_of, neighbourhood_bias
from jaxzs.patch.learned import Weighing
from jaxzs.report import markdown_table, write_record
from jaxzs.report.records import processor

CONFIGS = {
    "ViT-B/16": clip.ARCHITECTURES["ViT-B/16"],
    "tiny": clip.CLIPConfig(vision=clip.VisionConfig(64, 128, 3, 2, 64, 16), projection_dim=32),
}
NAMES, CLASSES = 21, 45


class TorchDense:
    """The tower in PyTorch, a batch at a time: weights of a parameter tree, in one type."""

    def __init__(self, params: Any, config: clip.CLIPConfig, dtype: str, device: str) -> None:
        import torch

        self.torch, self.functional = torch, torch.nn.functional
        self.vision, self.dtype, self.device = config.vision, getattr(torch, dtype), device
        self.tensor = lambda leaf: torch.tensor(np.asarray(leaf), device=device).to(self.dtype)
        tree = params["vision_model"]
        self.embedding = jax.tree.map(self.tensor, tree["embeddings"])
        self.kernel = self.embedding["patch_embedding"]["kernel"].permute(3, 2, 0, 1).contiguous()
        self.norms = {name: self.both(tree[name]) for name in ("pre_layrnorm", "post_layernorm")}
        layers = tree["encoder"]["layers"]
        self.layers = [self.layer(layers[str(number)]) for number in range(len(layers))]
        self.projection = self.tensor(np.asarray(params["visual_projection"]["kernel"]).T).contiguous()

    def both(self, norm: Any) -> tuple[Any, Any]:
        return self.tensor(norm["scale"]), self.tensor(norm["bias"])

    def linear(self, *dense: Any) -> tuple[Any, Any]:
        """Weight [out,in] and bias [out] of one layer, or of several packed into one."""
        weight = np.concatenate([np.asarray(one["kernel"]).T for one in dense])
        return self.tensor(weight).contiguous(), self.tensor(np.concatenate([np.asarray(one["bias"]) for one in dense]))

    def layer(self, tree: Any) -> dict[str, Any]:
        own = tree["self_attn"]
        return {
            "norm1": self.both(tree["layer_norm1"]),
            "norm2": self.both(tree["layer_norm2"]),
            "qkv": self.linear(own["q_proj"], own["k_proj"], own["v_proj"]),
            "out": self.linear(own["out_proj"]),
            "fc1": self.linear(tree["mlp"]["fc1"]),
            "fc2": self.linear(tree["mlp"]["fc2"]),
        }

    def normed(self, x: Any, norm: tuple[Any, Any]) -> Any:
        return self.functional.layer_norm(x, (x.shape[-1],), *norm, self.vision.layer_norm_eps)

    def heads(self, x: Any, layer: dict[str, Any]) -> tuple[Any, Any, Any]:
        """q, k, v [B,H,T,D/H] of x [B,T,D]."""
        B, T, _ = x.shape
        packed = self.functional.linear(self.normed(x, layer["norm1"]), *layer["qkv"])
        q, k, v = packed.view(B, T, 3, self.vision.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def mixed(self, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        return self.functional.scaled_dot_product_attention(q, k, v, bias)

    def out(self, mixed: Any, layer: dict[str, Any]) -> Any:
        return self.functional.linear(mixed.transpose(1, 2).flatten(2), *layer["out"])

    def finished(self, x: Any, mixed: Any, layer: dict[str, Any]) -> Any:
        x = x + self.out(mixed, layer)
        y = self.functional.linear(self.normed(x, layer["norm2"]), *layer["fc1"])
        return x + self.functional.linear(y * (1.702 * y).sigmoid(), *layer["fc2"])

    def before_last(self, pixels: Any) -> Any:
        """[B,3,H,W] -> [B,T,D], what enters the last block."""
        size, native = self.vision.patch_size, self.vision.grid
        patches = self.functional.conv2d(pixels.to(self.dtype), self.kernel, stride=size)
        grid, table = patches.shape[-2:], self.embedding["position_embedding"]["embedding"]
        if tuple(grid) != native:
            scale = tuple((new + 0.1) / old for new, old in zip(grid, native, strict=True))
            square = table[1:].float().T.reshape(1, -1, *native)
            resized = self.functional.interpolate(square, scale_factor=scale, mode="bicubic")
            table = self.torch.cat([table[:1], resized.flatten(2)[0].T.to(self.dtype)])
        first = self.embedding["class_embedding"].expand(len(pixels), 1, -1)
        x = self.torch.cat([first, patches.flatten(2).transpose(1, 2)], 1) + table
        x = self.normed(x, self.norms["pre_layrnorm"])
        for layer in self.layers[:-1]:
            x = self.finished(x, self.mixed(*self.heads(x, layer)), layer)
        return x

    def projected(self, x: Any) -> Any:
        """Normalised features in float32: [...,D] -> [...,E]."""
        features = self.functional.linear(self.normed(x, self.norms["post_layernorm"]), self.projection)
        return self.functional.normalize(features.float(), dim=-1)

    def dense_scores(self, pixels: Any, texts: Any, bias: Any) -> Any:
        """NACLIP: [B,3,H,W] -> [B,P,N]; bias [T,T] of the neighbourhood."""
        last, x = self.layers[-1], self.before_last(pixels)
        _, k, v = self.heads(x, last)
        return self.projected(self.out(self.mixed(k, k, v, bias.to(self.dtype)), last)[:, 1:]) @ texts.T

    def tag_scores(self, pixels: Any, classifier: tuple[Any, Any, Any], weighing: Weighing) -> Any:
        """PIAA: [B,3,S,S] -> [B,C]."""
        weights, bias, texts = classifier
        last, x = self.layers[-1], self.before_last(pixels)
        q, k, v = self.heads(x, last)
        both = self.mixed(q, q, v) + self.mixed(k, k, v)
        patches = self.projected(self.finished(x, both, last)[:, 1:])
        token = self.finished(x[:, :1], self.mixed(q[:, :, :1], k, v), last)[:, 0]  # the class token alone
        logits = patches @ weights.T + bias
        best = (logits / weighing.softness).softmax(-1).amax(1)
        by_patches = (weighing.sharpness * best).softmax(-1)
        by_whole = (weighing.global_scale * self.projected(token) @ texts.T).softmax(-1)
        return weighing.global_share * by_whole + (1 - weighing.global_share) * by_patches


Calls = dict[str, Callable[[], np.ndarray]]


def dense_calls(params: Any, config: clip.CLIPConfig, pixels: np.ndarray, texts: np.ndarray) -> Calls:
    """Calls that make dense maps of the same photos, [B,P,N]."""
    import torch

    device, size = _device(), config.vision.patch_size
    images = torch.tensor(pixels.transpose(0, 3, 1, 2), device=device)
    grid = pixels.shape[1] // size, pixels.shape[2] // size
    bias = torch.tensor(np.asarray(neighbourhood_bias(grid, 5.0)), device=device)
    names, on_device = torch.tensor(texts, device=device), jnp.asarray(pixels)

    @torch.inference_mode()
    def by_torch(tower: TorchDense) -> np.ndarray:
        return tower.dense_scores(images, names, bias).cpu().numpy()

    def by_jaxzs(dtype: Any) -> np.ndarray:
        numerics = clip.Numerics(dtype)
        return np.asarray(patch.dense_scores(params, on_device, texts, config, attention="naclip", numerics=numerics))

    return _four(by_torch, by_jaxzs, params, config)


def tag_calls(params: Any, config: clip.CLIPConfig, pixels: np.ndarray, texts: np.ndarray) -> Calls:
    """Calls that tag the same photos by the same classifier, [B,C]."""
    import torch

    device, rng = _device(), np.random.default_rng(1)
    images = torch.tensor(pixels.transpose(0, 3, 1, 2), device=device)
    weights = (300 * texts + rng.standard_normal(texts.shape)).astype(np.float32)
    bias = rng.standard_normal(len(texts)).astype(np.float32)
    classifier = patch.PatchClassifier(jnp.asarray(weights), jnp.asarray(bias), jnp.asarray(texts))
    theirs = tuple(torch.tensor(one, device=device) for one in (weights, bias, texts))
    on_device, last = jnp.asarray(pixels), last_of("csa", None, "bicubic_offset", config)

    @torch.inference_mode()
    def by_torch(tower: TorchDense) -> np.ndarray:
        return tower.tag_scores(images, theirs, Weighing()).cpu().numpy()

    def by_jaxzs(dtype: Any) -> np.ndarray:
        task = DenseTask(config, last, clip.Numerics(dtype))
        patches, whole = dense_and_whole(params, on_device, jnp.float32(5), task=task)
        return np.asarray(patch.tag_with(classifier, patches, whole))

    return _four(by_torch, by_jaxzs, params, config)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _four(by_torch: Callable, by_jaxzs: Callable, params: Any, config: clip.CLIPConfig) -> Calls:
    return {
        **{f"torch {d}": functools.partial(by_torch, TorchDense(params, config, d, _device())) for d in DTYPES},
        **{f"jaxzs {d}": functools.partial(by_jaxzs, dtype) for d, dtype in DTYPES.items()},
    }


DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def measured(calls: Calls, rounds: int) -> dict[str, dict[str, float]]:
    """Of each call: seconds a batch, how many times as fast as torch, seconds to compile, difference of results."""
    first, results = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        results[name] = call()
        first[name] = time.perf_counter() - start
    wall: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}  # of all threads: other work hardly touches it
    for _ in range(rounds):
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - cpu)
    exact = results["torch float32"]
    # Both of a round suffer when the machine is shared: the median of the ratios of the rounds.
    ratio = lambda seconds, one, of: statistics.median(  # noqa: E731
        a / b for a, b in zip(seconds[of], seconds[one], strict=True)
    )
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(busy[name]),
            "times_torch": ratio(wall, name, f"torch {name.split()[1]}"),
            "cpu_times_torch": ratio(busy, name, f"torch {name.split()[1]}"),
            "compile_seconds": max(0.0, first[name] - statistics.median(wall[name])),
            "difference": float(np.abs(results[name] - exact).max() / np.abs(exact).max()),
        }
        for name in calls
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="ViT-B/16")
    parser.add_argument("--photos", type=int, default=2, help="in a batch of dense maps")
    parser.add_argument("--tagged", type=int, default=8, help="in a batch of tags")
    parser.add_argument("--size", default="336x448", help="of dense maps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON of the record; the table beside it")
    options = parser.parse_args()
    import torch

    config = CONFIGS[options.model]
    params = clip.random_params(jax.random.key(0), config)
    rng, side = np.random.default_rng(0), config.vision.image_size
    height, width = (int(length) for length in options.size.split("x"))
    texts = rng.standard_normal((CLASSES, config.projection_dim)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    work = {
        f"dense maps, {options.photos} photos of {options.size}, {NAMES} names": dense_calls(
            params, config, draw(options.photos, height, width, 3), texts[:NAMES]
        ),
        f"tags, {options.tagged} photos of {side}x{side}, {CLASSES} classes": tag_calls(
            params, config, draw(options.tagged, side, side, 3), texts
        ),
    }
    figures = {name: measured(calls, options.rounds) for name, calls in work.items()}
    rows = [
        [
            name,
            program,
            one["seconds"],
            one["cpu_seconds"],
            one["times_torch"],
            one["cpu_times_torch"],
            f"{one['compile_seconds']:.1f}" if program.startswith("jaxzs") else "",
            f"{one['difference']:.0e}",
        ]
        for name, programs in figures.items()
        for program, one in programs.items()
    ]
    header = ["work", "program", "s a batch", "CPU s", "x torch of that type", "CPU x", "compile s", "difference"]
    table = markdown_table(header, rows)
    title = f"{options.model}, random weights, {options.rounds} rounds in turn, {processor()}"
    title += "; differences are from torch float32"
    print(title, table, sep="\n\n")
    if options.out is not None:
        command = shlex.join(["python", "-m", "experiments.bench_dense", *sys.argv[1:]])
        settings = {**vars(options), "out": options.out.name, "torch": torch.__version__}
        write_record(options.out, command=command, settings=settings, metrics=figures)
        options.out.with_suffix(".md").write_text(f"`{command}`\n\n{title}\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
