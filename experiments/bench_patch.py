"""Tagging throughput: jaxzs against the same algorithm per image and per candidate in PyTorch, in turn in one process.

    python experiments/bench_patch.py --out experiments/results/bench_patch.json

Needs torch and scipy beside jaxzs. ViT-B/16, 45 names, random weights (throughput does not depend on them). So that
both do equal work, the k classes with the highest scores are re-identified in every image, whatever their scores. The
PyTorch side loops as the original implementation does: over images, over classes in the dual masking, over
candidates in the re-identification. The scores of the two are compared as a check.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import clip, patch
from jaxzs.patch.boxes import tight_boxes
from jaxzs.patch.reidentify import best_scores
from jaxzs.report import markdown_table, write_record

CONFIGS = {
    "ViT-B/16": clip.ARCHITECTURES["ViT-B/16"],
    "tiny": clip.CLIPConfig(vision=clip.VisionConfig(64, 128, 4, 2, 64, 16), projection_dim=32),
}
FOREGROUND, NAMES = 20, 45


# --- jaxzs ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "candidates", "capacity", "numerics"))
def tag_batch(params, pixels, texts, config, candidates, capacity, numerics):
    """The steps of `jaxzs.patch.tag`, with a fixed number of candidates: [B,H,W,3] -> scores [B,F]."""
    size = config.vision.patch_size
    grid = patch.full_grid(len(pixels), pixels.shape[1] // size, pixels.shape[2] // size)
    layers = config.vision.num_hidden_layers
    local = patch.local_tower(params, pixels, config, grid, numerics=numerics)
    attention = patch.fuse_attention(
        local.attention, grid.patches, patch.default_attention_layers(layers), patch.default_votes(layers)
    )
    coarse = patch.coarse_scores(local.tokens, texts, params["logit_scale"])
    refined = patch.dual_masking(attention, coarse, grid).scores
    best = best_scores(refined, FOREGROUND, grid)
    found = patch.find_candidates(refined, FOREGROUND, 0.5, grid)
    chosen = best >= jax.lax.top_k(best, candidates)[0][:, -1:]
    found = found._replace(accepted=chosen, boxes=tight_boxes(found.region, grid, keep_border=True))
    probability = patch.reidentify(params, pixels, texts, found, config, capacity=capacity, numerics=numerics)
    return patch.fuse_scores(best, probability, found.accepted)


# --- PyTorch, per image and per candidate -----------------------------------------------------------


class TorchTagger:
    """The original's loops on PyTorch's own kernels, with the weights of a parameter tree."""

    def __init__(self, params: Any, config: clip.CLIPConfig, device: str) -> None:
        import torch

        self.torch, self.config, self.device = torch, config, device
        as_tensor = lambda leaf: torch.tensor(np.asarray(leaf), device=device)  # noqa: E731
        self.params = jax.tree.map(as_tensor, params)

    def linear(self, x, weights):
        y = x @ weights["kernel"]
        return y + weights["bias"] if "bias" in weights else y

    def norm(self, x, weights):
        eps = self.config.vision.layer_norm_eps
        shape = (x.shape[-1],)
        return self.torch.nn.functional.layer_norm(x, shape, weights["scale"], weights["bias"], eps)

    def block(self, x, weights, mask=None, need_weights=False, local=False):
        """One image [T,D]; returns tokens and, where asked for, the mean attention of the heads."""
        functional, heads = self.torch.nn.functional, self.config.vision.num_attention_heads
        y = self.norm(x, weights["layer_norm1"])
        attention = weights["self_attn"]
        q, k, v = (self.linear(y, attention[f"{name}_proj"]).view(len(x), heads, -1).transpose(0, 1) for name in "qkv")
        mean = None
        if need_weights:
            weight = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
            mean, mixed = weight.mean(0), v if local else weight @ v
        else:
            mixed = functional.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
        x = x + self.linear(mixed.transpose(0, 1).reshape(x.shape), attention["out_proj"])
        y = self.linear(self.norm(x, weights["layer_norm2"]), weights["mlp"]["fc1"])
        y = self.linear(y * (1.702 * y).sigmoid(), weights["mlp"]["fc2"])
        return x + y, mean

    def embed(self, pixels, grid):
        """[3,H,W] -> [T,D] after the pre-LayerNorm."""
        torch, vision = self.torch, self.config.vision
        tree = self.params["vision_model"]["embeddings"]
        kernel = tree["patch_embedding"]["kernel"].permute(3, 2, 0, 1)
        patches = torch.nn.functional.conv2d(pixels[None], kernel, stride=vision.patch_size)[0]
        x = torch.cat([tree["class_embedding"][None], patches.flatten(1).T])
        table = tree["position_embedding"]["embedding"]
        if grid != vision.grid:
            native = table[1:].T.reshape(1, -1, *vision.grid)
            resized = torch.nn.functional.interpolate(native, grid, mode="bilinear")
            table = torch.cat([table[:1], resized.flatten(2)[0].T])
        return self.norm(x + table, self.params["vision_model"]["pre_layrnorm"])

    def project(self, x):
        x = self.norm(x, self.params["vision_model"]["post_layernorm"])
        return self.linear(x, self.params["visual_projection"])

    def probabilities(self, features, texts):
        functional = self.torch.nn.functional
        scale = self.params["logit_scale"].exp()
        return (scale * functional.normalize(features, dim=-1) @ texts.T).softmax(-1)

    def image(self, pixels, texts, candidates):
        """Scores [F] of one image [3,H,W]."""
        torch, vision = self.torch, self.config.vision
        size, depth = vision.patch_size, vision.num_hidden_layers
        rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
        layers = self.params["vision_model"]["encoder"]["layers"]
        x, maps = self.embed(pixels, (rows, columns)), []
        for layer in range(depth):
            last = layer == depth - 1
            x, mean = self.block(x, layers[str(layer)], need_weights=True, local=last)
            maps.append(mean[1:, 1:])
        coarse = self.probabilities(self.project(x)[1:], texts)
        stacked = torch.stack(maps)
        votes = (stacked > stacked.mean((1, 2), keepdim=True)).sum(0)
        averaged = stacked[list(patch.default_attention_layers(depth))].mean(0)
        attention = averaged * (votes >= patch.default_votes(depth))
        refined = self.dual_masking(attention, coarse, rows, columns)
        scores = refined[:, :FOREGROUND].max(0).values
        for c in scores.topk(candidates).indices.tolist():
            probability = self.second_look(pixels, texts, refined[:, c].view(rows, columns), c)
            scores[c] = 0.5 * scores[c] + 0.5 * probability
        return scores

    def dual_masking(self, attention, coarse, rows, columns):
        from scipy import ndimage

        spread = attention @ coarse
        refined = spread.clone()
        for c in range(spread.shape[1]):
            u = spread[:, c] - spread[:, c].min()
            if not u.max() > 0:
                continue
            u = (u / u.max()).view(rows, columns)
            grey = (255 * u).int()
            foreground = grey > int(u.mean() * grey.max())
            labels, _ = ndimage.label(foreground.cpu().numpy(), np.ones((3, 3)))
            mask = self.torch.zeros(rows, columns, device=coarse.device)
            for y, x in ndimage.find_objects(labels):
                mask[y.start : min(y.stop, rows - 1), x.start : min(x.stop, columns - 1)] = 1
            refined[:, c] = (attention * mask.view(1, -1)) @ coarse[:, c]
        return refined

    def second_look(self, pixels, texts, scores, c):
        torch, vision = self.torch, self.config.vision
        size, side = vision.patch_size, vision.image_size
        u = scores - scores.min()
        region = u / u.max() > 0.5
        y, x = torch.nonzero(region, as_tuple=True)
        top, bottom, left, right = y.min(), y.max() + 1, x.min(), x.max() + 1
        crop = pixels[:, size * top : size * bottom, size * left : size * right]
        crop = torch.nn.functional.interpolate(crop[None], (side, side), mode="bilinear")[0]
        inside = region[top:bottom, left:right][None, None].float()
        inside = torch.nn.functional.interpolate(inside, vision.grid).flatten() > 0.5
        mask = torch.zeros(1 + len(inside), 1 + len(inside), device=pixels.device)
        mask[0, 1:] = torch.where(inside, 0.0, -1000.0)
        tokens = self.embed(crop, vision.grid)
        for layer in range(vision.num_hidden_layers):
            weights = self.params["vision_model"]["encoder"]["layers"][str(layer)]
            tokens, _ = self.block(tokens, weights, mask)
        return self.probabilities(self.project(tokens[:1]), texts)[0, c]


# --- how much of the machine is used ----------------------------------------------------------------


def encoder_products(config: clip.CLIPConfig, tokens: int) -> float:
    """Floating-point operations of the matrix products of one image in all blocks, attention included."""
    vision = config.vision
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    attention = 2 * tokens * vision.hidden_size
    return 2.0 * vision.num_hidden_layers * tokens * (weights + attention)


def work_per_image(config: clip.CLIPConfig, height: int, width: int, candidates: int) -> float:
    """Floating-point operations to tag one image: one pass over it and one over each candidate's crop."""
    size, (rows, columns) = config.vision.patch_size, config.vision.grid
    whole = encoder_products(config, 1 + height // size * (width // size))
    return whole + candidates * encoder_products(config, 1 + rows * columns)


def product_rate(config: clip.CLIPConfig, tokens: int, repeats: int = 7) -> float:
    """Operations per second of this machine's float32 matrix product, in the shape of the MLP: a bound for both."""
    D, M = config.vision.hidden_size, config.vision.intermediate_size
    product, x, weights = jax.jit(jnp.matmul), jnp.ones((tokens, D)), jnp.ones((D, M))
    product(x, weights).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, weights).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2.0 * tokens * D * M / min(seconds)


# --- in turn ----------------------------------------------------------------------------------------


def programs(
    params: Any, config: clip.CLIPConfig, pixels: np.ndarray, texts: np.ndarray, candidates: int, capacity: int
) -> dict[str, Callable[[], np.ndarray]]:
    """Calls that tag the same images."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tagger = TorchTagger(params, config, device)
    images = torch.tensor(pixels.transpose(0, 3, 1, 2), device=device)
    names = torch.tensor(texts, device=device)

    @torch.inference_mode()
    def by_torch() -> np.ndarray:
        return np.stack([tagger.image(image, names, candidates).cpu().numpy() for image in images])

    on_device, texts = jnp.asarray(pixels), jnp.asarray(texts)

    def by_jaxzs(dtype: Any) -> np.ndarray:
        numerics = clip.Numerics(dtype)
        return np.asarray(tag_batch(params, on_device, texts, config, candidates, capacity, numerics))

    return {
        "torch float32": by_torch,
        "jaxzs float32": functools.partial(by_jaxzs, None),
        "jaxzs bfloat16": functools.partial(by_jaxzs, jnp.bfloat16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="ViT-B/16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--capacity", type=int, help="candidates per encoder call; default: batch")
    parser.add_argument("--sizes", nargs="+", default=["224x224", "384x512"])
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    config = CONFIGS[options.model]
    params = clip.random_params(jax.random.key(0), config)
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((NAMES, config.projection_dim)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    rows, figures = [], {}
    for size in options.sizes:
        height, width = (int(side) for side in size.split("x"))
        shape = (options.batch, height, width, 3)
        pixels = rng.standard_normal(shape).astype(np.float32)
        for candidates in options.candidates:
            capacity = options.capacity or options.batch
            calls = programs(params, config, pixels, texts, candidates, capacity)
            scores = {name: call() for name, call in calls.items()}  # compiles, too
            difference = float(np.abs(scores["torch float32"] - scores["jaxzs float32"]).max())
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            work, bound = work_per_image(config, height, width, candidates), 0.0
            for _ in range(options.rounds):
                bound = max(bound, product_rate(config, options.batch * (1 + config.vision.num_patches)))
                for name, call in calls.items():
                    start = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - start)
            # Both of a round suffer when the machine is shared: the median of the ratios of the rounds.
            ratios = {
                name: statistics.median(a / b for a, b in zip(seconds["torch float32"], values, strict=True))
                for name, values in seconds.items()
            }
            rate = {name: options.batch / statistics.median(s) for name, s in seconds.items()}
            key = f"{size}, {candidates} candidates"
            used = {name: rate[name] * work / bound for name in calls}
            figures[key] = {
                "images_per_second": rate,
                "ratio": ratios,
                "difference": difference,
                "of_float32_products": used,
                "float32_products_per_second": bound,
            }
            rows += [
                [size, candidates, name, rate[name], ratios[name], used[name], f"{difference:.0e}"] for name in calls
            ]
            print(key, {name: round(ratio, 2) for name, ratio in ratios.items()}, flush=True)
    header = ["image", "candidates", "program", "images/s", "x torch float32"]
    header += ["of the machine's float32 products", "difference"]
    print(f"{options.model}, {NAMES} names, batch {options.batch}, {options.rounds} rounds in turn")
    print(markdown_table(header, rows))
    if options.out is not None:
        import torch

        write_record(
            options.out,
            command=f"python experiments/bench_patch.py --model {options.model} --batch {options.batch}",
            settings={**vars(options), "out": str(options.out), "torch": torch.__version__},
            metrics=figures,
        )


if __name__ == "__main__":
    main()
