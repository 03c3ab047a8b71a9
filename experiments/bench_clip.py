"""Image encoders of every family: jaxzs beside PyTorch and onnxruntime, equal weights, in turn in one process.

    python -m experiments.bench_clip --out experiments/results/bench_clip.json

Needs torch, transformers and, for ResNets, open_clip beside jaxzs (the environment `interop5` of .ci/run has them);
with onnxruntime and onnx a third one takes part. ViTs run in transformers, ResNets in open_clip. Weights are random:
throughput does not depend on them, and all features are compared as a check.

Everything runs on one core, `--core`: with several, PyTorch's threads spin while they wait, and take the cores from
whoever is measured next. Seconds are the process's own on that core, so that what else the machine does hardly counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise folders of weights are asked for on the hub

Encoder = Callable[[], Any]  # encodes the batch and returns the features as a NumPy array
FAMILIES = ("ViT-B/16", "SigLIP-B/16", "RN50")


def torch_tower(folder: Path, is_resnet: bool) -> Any:
    """The image tower of the checkpoint in the library that owns its layout: a module of pixels NCHW."""
    import torch

    if is_resnet:
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}").visual.eval()
    from transformers import AutoModel

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder)

        def forward(self, pixels):
            return self.model.get_image_features(pixel_values=pixels).pooler_output

    return Tower().eval()


def torch_encoder(tower: Any, pixels: Any, dtype_name: str) -> Encoder:
    import torch

    dtype = getattr(torch, dtype_name)
    tower, batch = tower.to(dtype), torch.tensor(pixels.transpose(0, 3, 1, 2)).to(dtype)

    @torch.inference_mode()
    def encode() -> Any:
        return tower(batch).float().numpy()

    return encode


def onnx_encoder(tower: Any, pixels: Any, folder: Path) -> Encoder | None:
    """onnxruntime on what PyTorch exports; None where one of the packages is missing."""
    try:
        import onnx  # noqa: F401 # the export needs it
        import onnxruntime
    except ImportError:
        return None
    import torch

    batch = pixels.transpose(0, 3, 1, 2).copy()
    file, attention = folder / "tower.onnx", torch.nn.attention
    with torch.inference_mode(), attention.sdpa_kernel(attention.SDPBackend.MATH):
        torch.onnx.export(tower, (torch.from_numpy(batch),), file, input_names=["pixels"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"pixels": batch})[0]


def jax_encoder(params: Any, config: Any, pixels: Any, compute_dtype: Any) -> Encoder:
    import jax.numpy as jnp
    import numpy as np

    from jaxzs import clip

    on_device, numerics = jnp.asarray(pixels), clip.Numerics(compute_dtype)
    return lambda: np.asarray(clip.encode_image(params, on_device, config, numerics=numerics))


def encoders_of(name: str, pixels: Any, folder: Path) -> dict[str, Encoder]:
    """What is measured of one family, on random weights of its published shape."""
    import copy

    import jax
    import jax.numpy as jnp

    from jaxzs import clip

    config = clip.ARCHITECTURES[name]
    params = clip.random_params(jax.random.key(0), config)
    is_resnet = isinstance(config.vision, clip.ResNetConfig)
    clip.write_checkpoint(folder, params, config, format="open_clip" if is_resnet else "safetensors")
    tower = torch_tower(folder, is_resnet)
    encoders = {
        "torch float32": torch_encoder(tower, pixels, "float32"),
        "onnxruntime float32": onnx_encoder(tower, pixels, folder),
        "jaxzs float32": jax_encoder(params, config, pixels, None),
        "torch bfloat16": torch_encoder(copy.deepcopy(tower), pixels, "bfloat16"),
        "jaxzs bfloat16": jax_encoder(params, config, pixels, jnp.bfloat16),
    }
    return {key: encode for key, encode in encoders.items() if encode is not None}


def interleave(encoders: Mapping[str, Encoder], rounds: int) -> dict[str, list[float]]:
    """Seconds of the core for each call, one encoder after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.process_time()
            encode()
            seconds[name].append(time.process_time() - start)
    return seconds


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Images a second, ratios to torch's float32, and how far the features are from each other."""
    import numpy as np

    from jaxzs import clip

    size = clip.ARCHITECTURES[name].vision.image_size
    pixels = np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        encoders = encoders_of(name, pixels, Path(folder))
        first, features = {}, {}
        for key, encode in encoders.items():  # compiles, and warms up
            start = time.process_time()
            features[key] = encode()
            first[key] = time.process_time() - start
        seconds = interleave(encoders, rounds)
    reference = features["torch float32"]
    return {
        key: {
            "images_per_second": batch / statistics.median(seconds[key]),
            # Of the rounds, not of the medians: a shared machine slows all of a round.
            "times_torch_float32": statistics.median(
                a / b for a, b in zip(seconds["torch float32"], seconds[key], strict=True)
            ),
            "first_call_extra_seconds": max(0.0, first[key] - statistics.median(seconds[key])),
            "relative_difference": float(np.abs(features[key] - reference).max() / np.abs(reference).max()),
        }
        for key in encoders
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    from jaxzs.report import markdown_table

    rows: list[Sequence[Any]] = []
    for name, encoders in found.items():
        rows += [(name, key, *(f"{values[of]:.3g}" for of in _SHOWN)) for key, values in encoders.items()]
    return markdown_table(["model", "encoder", *_SHOWN.values()], rows)


_SHOWN = {
    "images_per_second": "images/s",
    "times_torch_float32": "x torch float32",
    "first_call_extra_seconds": "first call, extra s",
    "relative_difference": "difference of features, relative",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), help="shapes of clip.ARCHITECTURES")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0, help="the one that everything runs on")
    parser.add_argument("--out", type=Path, help="JSON record, and a table beside it (.md)")
    options = parser.parse_args()
    os.sched_setaffinity(0, {options.core})  # before anything makes a thread

    import torch
    import transformers

    from experiments.torch_peers import importable_torchvision
    from jaxzs.report import write_record
    from jaxzs.report.records import processor

    held, start = importable_torchvision(), time.perf_counter()
    torch.set_num_threads(1)
    found = {}
    for name in options.models:
        found[name] = measure(name, options.batch, options.rounds)
        print(name, {key: round(values["times_torch_float32"], 2) for key, values in found[name].items()}, flush=True)
    del held
    told = f"{processor()}, one core, batch {options.batch}, {options.rounds} rounds in turn"
    print(told, table(found), sep="\n\n")
    if options.out is None:
        return
    numbers = f"--batch {options.batch} --rounds {options.rounds}"
    command = f"python -m experiments.bench_clip --models {' '.join(options.models)} {numbers}"
    settings = {"batch": options.batch, "rounds": options.rounds}
    peers = {"torch": torch.__version__, "transformers_peer": transformers.__version__}
    seconds = {"run": time.perf_counter() - start}
    write_record(options.out, command=command, settings=settings | peers, metrics=found, seconds=seconds)
    options.out.with_suffix(".md").write_text(f"# Image encoders\n\n{told}:\n\n    {command}\n\n{table(found)}")


if __name__ == "__main__":
    main()
