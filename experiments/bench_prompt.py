"""One step of textual prompt tuning against the same step written straightforwardly in PyTorch, in turn on one machine.

ViT-B/32 sizes with random weights, 50 classes, prefix 16, batch 16. PyTorch: transformers' CLIP, text tower over all
77 positions of all classes, image tower over the batch, backward to the prefix, SGD. jaxzs: the same loss and gradient
with image features computed once, texts cut, positions 0..K computed once for all classes. Both in float32 on CPU.

    python -m experiments.bench_prompt --steps 3      # needs torch and transformers in the same environment

Reports medians and ratios of the interleaved steps, the largest difference of loss and gradient, peak memory of each
in a process of its own, and one whole FPL training (features cached, 150 epochs) as a ratio of measured step times.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import __version__, clip
from jaxzs.prompt import Frozen, Optimisation, Task, TextPrompt, placeholder_ids
from jaxzs.prompt.training import Items, chunk_batches, runs, shuffled, start, train_chunk
from jaxzs.report import write_record

C, B, K = 50, 16, 16
LONGEST_NAME = 5


def inputs(layers: int, seed: int = 0) -> dict[str, Any]:
    """Random weights, names of 1 to 5 tokens, pixels, labels and a prefix, all of ViT-B/32 sizes."""
    config = clip.CLIPConfig(
        text=clip.TextConfig(num_hidden_layers=layers), vision=clip.VisionConfig(num_hidden_layers=layers)
    )
    rng = np.random.default_rng(seed)
    text = config.text
    bare = np.full((C, 2 + LONGEST_NAME), 0)
    bare[:, 0] = text.bos_token_id
    for c, length in enumerate(rng.integers(1, LONGEST_NAME + 1, C)):
        bare[c, 1 : 1 + length] = rng.integers(1000, 40_000, length)
        bare[c, 1 + length] = text.eos_token_id
    size = config.vision.image_size
    return {
        "config": config,
        "params": clip.random_params(jax.random.key(seed), config),
        "ids": placeholder_ids(bare, K, text),
        "pixels": rng.standard_normal((B, size, size, 3), np.float32),
        "labels": rng.integers(0, C, B),
        "prefix": 0.02 * rng.standard_normal((K, text.hidden_size), np.float32),
    }


# --- jaxzs --------------------------------------------------------------------------------------------


def jaxzs_step(given: dict[str, Any]) -> Callable[[], tuple]:
    """A compiled step: returns a function giving (loss, gradient), the first momentum without weight decay."""
    modality = TextPrompt(K)
    config, params = given["config"], given["params"]
    ids = jnp.asarray(given["ids"])
    template = jnp.asarray(np.random.default_rng(1).standard_normal((C, config.projection_dim), np.float32))
    frozen = Frozen(params, ids, template, template)
    images = modality.constant_images(params, given["pixels"], config)
    state = start({"prefix": jnp.asarray(given["prefix"])[None]})
    settings = Optimisation(0.1, 1, 0, B, weight_decay=0.0, steps_per_chunk=1)
    items = [Items(np.arange(B), given["labels"], np.zeros(B, bool))]
    rates = np.full((1, 1), 0.1)
    batches = jax.tree.map(jnp.asarray, chunk_batches(items, shuffled(0), 0, rates, settings))
    run = runs([(1.0, 0.0)], np.ones((1, C), bool), settings)
    task = Task(modality, config)

    def step() -> tuple:
        new, losses = train_chunk(task, state, batches, run, frozen, images)
        gradient = new.optimiser[1].trace["prefix"][0]
        return float(losses[0, 0]), np.asarray(gradient)

    return step


def encoder(given: dict[str, Any]) -> Callable[[], Any]:
    """Image features of one batch, compiled."""
    run = functools.partial(clip.encode_image, given["params"], given["pixels"], given["config"])
    jax.block_until_ready(run())
    return lambda: jax.block_until_ready(run())


# --- PyTorch -------------------------------------------------------------------------------------------


def torch_model(given: dict[str, Any], folder: Path) -> Any:
    """transformers' CLIPModel with the same weights."""
    from transformers import CLIPModel

    clip.write_checkpoint(folder, given["params"], given["config"], format="safetensors")
    return CLIPModel.from_pretrained(folder, attn_implementation="sdpa").eval().requires_grad_(False)


def torch_step(given: dict[str, Any], folder: Path) -> Callable[[], tuple]:
    """The step as one writes it: embed 77 positions, overwrite 1..K, both towers, cross-entropy, backward, SGD."""
    import torch
    from transformers.modeling_attn_mask_utils import _create_4d_causal_attention_mask

    model = torch_model(given, folder)
    T = given["config"].text.max_position_embeddings
    ids = np.zeros((C, T), np.int64)
    ids[:, : given["ids"].shape[1]] = given["ids"]
    ids = torch.tensor(ids)
    ends = (ids == given["config"].text.eos_token_id).int().argmax(-1)
    pixels = torch.tensor(given["pixels"].transpose(0, 3, 1, 2).copy())
    labels = torch.tensor(given["labels"])

    def step() -> tuple:
        prefix = torch.nn.Parameter(torch.tensor(given["prefix"]))
        sgd = torch.optim.SGD([prefix], lr=0.1, momentum=0.9)
        text = model.text_model
        tokens = text.embeddings.token_embedding(ids)
        tokens = torch.cat([tokens[:, :1], prefix.expand(C, -1, -1), tokens[:, 1 + K :]], dim=1)
        x = tokens + text.embeddings.position_embedding.weight[None]
        mask = _create_4d_causal_attention_mask((C, T), x.dtype, x.device)
        x = text.encoder(inputs_embeds=x, causal_attention_mask=mask).last_hidden_state
        x = text.final_layer_norm(x)[torch.arange(C), ends]
        texts = torch.nn.functional.normalize(model.text_projection(x), dim=-1)
        with torch.no_grad():
            images = torch.nn.functional.normalize(model.get_image_features(pixels), dim=-1)
        value = torch.nn.functional.cross_entropy(model.logit_scale.exp() * images @ texts.T, labels)
        value.backward()
        gradient = prefix.grad.numpy().copy()
        sgd.step()
        return value.item(), gradient

    return step


# --- measuring -----------------------------------------------------------------------------------------


def timed(step: Callable[[], tuple]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all threads) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def high_water_mark() -> float:
    """Peak resident MiB of this process alone; getrusage would count what its parent held when it forked."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_memory(which: str, folder: Path, layers: int) -> float:
    """Peak resident MiB of a process that takes two steps."""
    command = [
        sys.executable,
        "-m",
        "experiments.bench_prompt",
        "--only",
        which,
        "--layers",
        str(layers),
        "--folder",
        str(folder),
    ]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(found.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="interleaved pairs of steps")
    parser.add_argument("--folder", type=Path, default=Path("bench_prompt_checkpoint"))
    parser.add_argument("--layers", type=int, default=12, help="fewer only to see that it runs")
    parser.add_argument("--only", choices=("jaxzs", "torch"), help="two steps of one, print peak MiB")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurement out")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    given = inputs(options.layers)
    if options.only:
        step = jaxzs_step(given) if options.only == "jaxzs" else torch_step(given, options.folder)
        step(), step()
        print(high_water_mark())
        return
    ours, theirs = jaxzs_step(given), torch_step(given, options.folder)
    (loss, gradient), (expected, reference) = ours(), theirs()
    difference = np.abs(gradient - reference).max() / np.abs(reference).max()
    print(f"loss {loss:.6f} / {expected:.6f}, gradient differs by {difference:.1e} of its largest entry")
    pairs = [(timed(ours), timed(theirs)) for _ in range(options.steps)]
    median = lambda side, clock: statistics.median(p[side][clock] for p in pairs)  # noqa: E731
    # FPL, SSL, 50 classes: 80 % of 16 pseudolabels and of 2 labels a class. jaxzs encodes the pool's images once.
    items = int(0.8 * 16 * C) + int(0.8 * 2 * C)
    steps = 150 * -(-items // B)
    encoding = statistics.median(timed(encoder(given))[0] for _ in range(3)) * -(-items // B)
    fpl = median(0, 0) * steps + encoding, median(1, 0) * steps
    figures = {
        "jaxzs_step_seconds": median(0, 0),
        "torch_step_seconds": median(1, 0),
        "ratio_wall": statistics.median(b[0] / a[0] for a, b in pairs),
        "ratio_cpu": statistics.median(b[1] / a[1] for a, b in pairs),
        "loss": [loss, expected],
        "gradient_difference": float(difference),
        "fpl_steps": steps,
        "fpl_hours_from_step_times": {"jaxzs": fpl[0] / 3600, "torch": fpl[1] / 3600},
        "fpl_ratio": fpl[1] / fpl[0],
        "layers": options.layers,
        "jaxzs": __version__,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
    }
    print(f"ratio {figures['ratio_wall']:.1f} by wall time, {figures['ratio_cpu']:.1f} by CPU time", flush=True)
    if not options.no_memory:
        figures["peak_mib"] = {name: peak_memory(name, options.folder, options.layers) for name in ("jaxzs", "torch")}
    print(json.dumps(figures, indent=2))
    if options.out:
        write_record(
            options.out,
            command=shlex.join(["python", "-m", "experiments.bench_prompt", *sys.argv[1:]]),
            settings={"steps": options.steps, "layers": options.layers, "classes": C, "batch": B},
            metrics=figures,
        )


if __name__ == "__main__":
    main()
