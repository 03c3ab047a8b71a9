"""Compile every main program for TPU hosts and pods that are not there, and check memory and communication.

    pip install "jaxzs[tpu-check]"      # in an environment of its own: libtpu must not meet the tests
    python -m experiments.tpu_compile --out experiments/results/scale.json

libtpu's compiler runs on the CPU; `topologies` describes the chips. A program that does not fit into the chip's memory,
or that communicates otherwise than it should, is an error: the exit code is 1.
"""

from __future__ import annotations

import os

# Before libtpu loads: no TPU here, and no metadata server to ask.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxzs import clip, parallel, proxy
from jaxzs.clip.model import normalize
from jaxzs.clip.params import abstract_params, flatten, unflatten
from jaxzs.report import markdown_table

GIB = 2**30
HBM = {"v5e": 16e9, "v6e": 32e9, "v5p": 95e9}  # bytes a chip, as published
HOSTS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")
POD = "v5e:16x16"

_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
B16 = clip.CLIPConfig(vision=clip.VisionConfig(patch_size=16))
L14_336 = clip.CLIPConfig(
    text=clip.TextConfig(**_TEXT),
    vision=clip.VisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    projection_dim=768,
)
IMAGENET_TRAIN = 1_281_167
BILLION = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled: a function, its abstract arguments on a mesh, and what it may communicate."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    largest: int  # bytes of the largest collective allowed; 0: none at all


# --- programs -----------------------------------------------------------------------------------------------


def on_mesh(mesh: Mesh, shape: Sequence[int], dtype: Any, axes: Sequence[str | None]) -> Any:
    """An abstract array with its sharding."""
    where = parallel.sharding(mesh, axes, shape)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)


def parameters(
    config: clip.CLIPConfig, mesh: Mesh, placement: parallel.Placement = "replicated"
) -> Any:
    """Abstract bfloat16 parameters."""
    places = dict(flatten(parallel.parameter_shardings(config, mesh, placement)))
    leaves = flatten(abstract_params(config, jnp.bfloat16))
    return unflatten(
        {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[p]) for p, x in leaves}
    )


def encode_images(name: str, config: clip.CLIPConfig, per_chip: int, mesh: Mesh) -> Program:
    size, batch = config.vision.image_size, per_chip * mesh.size
    pixels = on_mesh(mesh, (batch, size, size, 3), jnp.float32, ("images", None, None, None))

    def encode(params: Any, pixels: Any) -> Any:
        return clip.encode_image(params, pixels, config, compute_dtype=jnp.bfloat16)

    return Program(
        f"encode {name}, {per_chip} images a chip", encode, (parameters(config, mesh), pixels), 0
    )


def text_proxies(num_classes: int, mesh: Mesh, config: clip.CLIPConfig = L14_336) -> Program:
    """Seven templates, averaged class by class; texts go through the tower 64 classes a chip at a time."""
    templates, length, step = 7, 32, 64
    classes = parallel.padded_length(num_classes, step * mesh.size)
    shape = (classes // (step * mesh.size), step * mesh.size, templates, length)
    ids = on_mesh(mesh, shape, jnp.int32, (None, "images", None, None))

    def proxies(params: Any, ids: Any) -> Any:
        def some(ids: Any) -> Any:
            texts = ids.reshape(-1, length)
            features = clip.encode_text(params, texts, config, compute_dtype=jnp.bfloat16)
            return normalize(normalize(features).reshape(-1, templates, features.shape[1]).mean(1))

        return jax.lax.map(some, ids)

    return Program(
        f"text proxies, {num_classes:,} classes", proxies, (parameters(config, mesh), ids), 0
    )


def fit(num_images: int, num_classes: int, mesh: Mesh, dtype: Any, dim: int = 768) -> Program:
    """The whole of proxy learning: Sinkhorn and the fast solver by blocks of images."""
    rows = parallel.padded_length(num_images, mesh.size)
    x = on_mesh(mesh, (rows, dim), dtype, ("images", None))
    mask = on_mesh(mesh, (rows,), jnp.bool_, ("images",))
    text = on_mesh(mesh, (num_classes, dim), jnp.float32, (None, None))

    def run(x: Any, mask: Any, text: Any) -> Any:
        return proxy.fit(x, text, mask=mask, mesh=mesh, product_dtype=jnp.bfloat16)

    kind = jnp.dtype(dtype).name
    title = f"proxy.fit, {num_images:,} images ({kind}), {num_classes:,} classes"
    # Label sums: P^T X, X^T X and vectors; a gradient is smaller.
    return Program(
        title, run, (x, mask, text), 4 * (num_classes * dim + dim * dim + 4 * (num_classes + dim))
    )


def learn(num_images: int, num_classes: int, mesh: Mesh, dim: int = 768) -> Program:
    """Sinkhorn's labels and the fast solver with all logits kept in memory."""
    rows = parallel.padded_length(num_images, mesh.size)
    x = on_mesh(mesh, (rows, dim), jnp.float32, ("images", None))
    mask = on_mesh(mesh, (rows,), jnp.bool_, ("images",))
    text = on_mesh(mesh, (num_classes, dim), jnp.float32, (None, None))

    def run(x: Any, mask: Any, text: Any) -> Any:
        similarity = normalize(x) @ normalize(text).T
        labels = proxy.pseudo_labels(similarity, mask=mask)
        return proxy.learn_proxies(x, text, labels, mask=mask, product_dtype=jnp.bfloat16)

    title = f"labels and logits in memory, {num_images:,} images, {num_classes:,} classes"
    return Program(
        title, run, (x, mask, text), 4 * (num_classes * dim + dim * dim + 4 * (num_classes + dim))
    )


def host_programs(mesh: Mesh) -> list[Program]:
    return [
        encode_images("ViT-B/16", B16, 128, mesh),
        encode_images("ViT-L/14@336", L14_336, 32, mesh),
        text_proxies(1000, mesh),
        text_proxies(21_841, mesh),
        learn(IMAGENET_TRAIN, 1000, mesh),
        fit(IMAGENET_TRAIN, 1000, mesh, jnp.float32),
        fit(IMAGENET_TRAIN, 21_841, mesh, jnp.float32),
    ]


def pod_programs(mesh: Mesh) -> list[Program]:
    return [
        *host_programs(mesh),
        fit(BILLION, 1000, mesh, jnp.bfloat16),
        fit(BILLION, 21_841, mesh, jnp.bfloat16),
    ]


# --- checks -----------------------------------------------------------------------------------------------------

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every collective of a compiled program, each counted once, as loops run it again and again."""
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({_KINDS})(?:-start)?\(", text):
        sizes = re.findall(r"\b(\w+)\[([\d,]*)\]", shapes)
        count = lambda dims: int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))  # noqa: E731
        found.append((kind, sum(_BYTES[dtype] * count(dims) for dtype, dims in sizes)))
    return found


def compile_program(program: Program, topology: str) -> dict[str, Any]:
    """Compile, measure, and say what is wrong, if anything."""
    start = time.perf_counter()
    compiled = jax.jit(program.function).lower(*program.arguments).compile()
    seconds = time.perf_counter() - start
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    # Arguments live through the call; temporaries are the peak of what the program allocates.
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    limit = HBM[topology.split(":")[0]]
    wrong = []
    if used > limit:
        wrong.append(f"needs {used / 1e9:.1f} of {limit / 1e9:.0f} GB a chip")
    if others := sorted(
        {kind for kind, _ in found} - ({"all-reduce"} if program.largest else set())
    ):
        wrong.append(f"unexpected {', '.join(others)}")
    if found and (largest := max(size for _, size in found)) > max(program.largest, 1):
        wrong.append(f"a collective of {largest:,} bytes, expected at most {program.largest:,}")
    return {
        "topology": topology,
        "program": program.name,
        "gigabytes_per_chip": used / 1e9,
        "arguments_gigabytes": memory.argument_size_in_bytes / 1e9,
        "hbm_gigabytes": limit / 1e9,
        "collectives": {
            kind: [s for k, s in found if k == kind] for kind in sorted({k for k, _ in found})
        },
        "gigaflops_of_one_iteration": (compiled.cost_analysis() or {}).get("flops", 0.0) / 1e9,
        "compile_seconds": seconds,
        "wrong": wrong,
    }


def check(topology: str, only: str = "") -> list[dict[str, Any]]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), (parallel.DATA, parallel.MODEL))
    programs = pod_programs(mesh) if mesh.size > 8 else host_programs(mesh)
    results = []
    for program in programs:
        if only not in program.name:
            continue
        try:
            results.append(compile_program(program, topology))
        except Exception as error:  # the compiler's own words, e.g. out of memory
            message = str(error).strip().splitlines()[0][:300]
            results.append({"topology": topology, "program": program.name, "wrong": [message]})
        print(json.dumps(results[-1]), flush=True)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        listed = "; ".join(
            f"{len(sizes)} {kind}, largest {max(sizes) / 1e6:.2f} MB"
            for kind, sizes in r.get("collectives", {}).items()
        )
        rows.append(
            (
                r["topology"],
                r["program"],
                f"{r['gigabytes_per_chip']:.2f} of {r['hbm_gigabytes']:.0f}"
                if "hbm_gigabytes" in r
                else "-",
                listed or "none",
                f"{r.get('compile_seconds', 0):.1f}",
                "; ".join(r["wrong"]) or "ok",
            )
        )
    return markdown_table(
        ["topology", "program", "GB a chip", "collectives", "compile s", "check"], rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=[*HOSTS, POD])
    parser.add_argument("--only", default="", help="compile programs whose name contains this")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    results = [
        result for topology in options.topologies for result in check(topology, options.only)
    ]
    print(table(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["wrong"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
