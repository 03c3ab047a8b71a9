"""Image encoder throughput: jaxzs against transformers' torch CLIP, equal weights, in turn in one process.

    python experiments/bench_clip.py --out experiments/results/bench_clip.json

Needs torch and a transformers with CLIPModel beside jaxzs (the interop environment of .ci/run has them). Weights are
random: throughput does not depend on them, and the features of the two are compared as a check.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import clip
from jaxzs.report import markdown_table, write_record


def torch_encoder(folder: Path, pixels: np.ndarray, dtype_name: str) -> Callable[[], np.ndarray]:
    """The same checkpoint in transformers' CLIPModel; returns a call that encodes `pixels`."""
    import torch
    from transformers import CLIPModel

    dtype = getattr(torch, dtype_name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CLIPModel.from_pretrained(folder).to(device=device, dtype=dtype).eval()
    batch = torch.tensor(pixels.transpose(0, 3, 1, 2)).to(device=device, dtype=dtype)

    @torch.inference_mode()
    def encode() -> np.ndarray:
        features = model.get_image_features(pixel_values=batch)
        features = getattr(features, "pooler_output", features)  # transformers 5 returns a tuple
        return features.float().cpu().numpy()

    return encode


def jax_encoder(
    params: Any, config: clip.CLIPConfig, pixels: np.ndarray, compute_dtype: Any
) -> Callable[[], np.ndarray]:
    """jaxzs on the same pixels; returns a call that encodes them."""
    on_device = jnp.asarray(pixels)

    def encode() -> np.ndarray:
        return np.asarray(clip.encode_image(params, on_device, config, numerics=clip.Numerics(compute_dtype)))

    return encode


def interleave(encoders: dict[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, A and B in turn, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=clip.ARCHITECTURES, default="ViT-B/32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    config = clip.ARCHITECTURES[options.model]
    params = clip.random_params(jax.random.key(0), config)
    size = config.vision.image_size
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((options.batch, size, size, 3)).astype(np.float32)

    with tempfile.TemporaryDirectory() as folder:
        clip.write_checkpoint(Path(folder), params, config, format="safetensors")
        encoders = {
            "torch float32": torch_encoder(Path(folder), pixels, "float32"),
            "jaxzs float32": jax_encoder(params, config, pixels, None),
            "torch bfloat16": torch_encoder(Path(folder), pixels, "bfloat16"),
            "jaxzs bfloat16": jax_encoder(params, config, pixels, jnp.bfloat16),
        }
        first = {}
        features = {}
        for name, encode in encoders.items():
            start = time.perf_counter()
            features[name] = encode()
            first[name] = time.perf_counter() - start
        difference = float(np.abs(features["torch float32"] - features["jaxzs float32"]).max())
        seconds = interleave(encoders, options.rounds)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # A shared machine slows both of a round: the median of the ratios of each round is steadier than
    # the ratio of the medians.
    ratio = lambda a, b: statistics.median(  # noqa: E731
        x / y for x, y in zip(seconds[a], seconds[b], strict=True)
    )
    rows = [
        [name, options.batch / median, ratio("torch float32", name), max(0.0, first[name] - median)]
        for name, median in medians.items()
    ]
    header = ["encoder", "images/s", "x torch float32", "first call, extra s"]
    print(f"{options.model}, batch {options.batch}, {size} px, {options.rounds} rounds in turn")
    print(markdown_table(header, rows))
    print(f"largest difference of the float32 features: {difference:.1e}")
    if options.out is not None:
        import torch
        import transformers

        write_record(
            options.out,
            command=f"python experiments/bench_clip.py --model {options.model} --batch {options.batch}",
            settings={
                "config": dataclasses.asdict(config),
                "batch": options.batch,
                "rounds": options.rounds,
                "torch": torch.__version__,
                "transformers_peer": transformers.__version__,
            },
            metrics={
                "images_per_second": {name: options.batch / m for name, m in medians.items()},
                "ratio_float32": ratio("torch float32", "jaxzs float32"),
                "ratio_bfloat16": ratio("torch bfloat16", "jaxzs bfloat16"),
                "ratio_jaxzs_bfloat16_to_torch_float32": ratio("torch float32", "jaxzs bfloat16"),
                "max_difference_float32": difference,
            },
            seconds=medians,
        )


if __name__ == "__main__":
    main()
