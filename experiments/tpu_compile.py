"""Compile every main program for TPU hosts and pods that are not there, and check memory and communication.

    pip install "jaxzs[tpu-check]"      # in an environment of its own: libtpu must not meet the tests
    python -m experiments.tpu_compile --out experiments/results/scale.json

libtpu's compiler runs on the CPU; `topologies` describes the chips. A program that does not fit into the chip's memory,
or that communicates otherwise than it should, is an error: the exit code is 1. Rows of the same program (a hash of
what is given to the compiler), topology and compiler that `--out` holds already are kept, so that an interrupted run
continues.
"""

from __future__ import annotations

import os

# Before libtpu loads: no TPU here, no metadata server to ask, and no device that two runs could fight over.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import argparse
import collections
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzs import clip, parallel, patch, proxy
from jaxzs.adapt.choice import by_rule
from jaxzs.adapt.images import _compiled as run_method
from jaxzs.clip.layers import Numerics
from jaxzs.clip.model import normalize
from jaxzs.clip.params import abstract_params, flatten, unflatten
from jaxzs.clip.sharding import Placement
from jaxzs.files import write_json
from jaxzs.patch.dense import DenseTask
from jaxzs.patch.windows import window_scores
from jaxzs.prompt import Frozen, Task, TextPrompt, VisualPrompt
from jaxzs.prompt.training import Batches, Run, start, train_chunk
from jaxzs.proxy.fit import learn as learn_in_memory
from jaxzs.proxy.gamma import FEWEST_SPLITS
from jaxzs.proxy.rows import Rows
from jaxzs.proxy.settings import for_rows, in_float32
from jaxzs.report import markdown_table

HBM = {"v5e": 16e9, "v6e": 32e9, "v5p": 95e9}  # bytes a chip, as published
HOSTS = ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")
POD = "v5e:16x16"

IMAGENET_TRAIN = 1_281_167
BILLION = 1_000_000_000
BF16 = Numerics(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled: a function, its abstract arguments on a mesh, and what it may communicate.

    allowed: kinds of collectives and the bytes of the largest of each; any other is an error.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    allowed: Mapping[str, int] = dataclasses.field(default_factory=dict)


# --- programs -----------------------------------------------------------------------------------------------


def on_mesh(mesh: Mesh, shape: Sequence[int], dtype: Any, axes: Sequence[str | None]) -> Any:
    """An abstract array with its sharding."""
    where = parallel.sharding(mesh, axes, shape)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=where)


def parameters(config: clip.CLIPConfig, mesh: Mesh, placement: Placement = "replicated") -> Any:
    """Abstract bfloat16 parameters."""
    places = dict(flatten(clip.parameter_shardings(config, mesh, placement)))
    leaves = flatten(abstract_params(config, jnp.bfloat16))
    return unflatten({p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[p]) for p, x in leaves})


def on_all(mesh: Mesh, tree: Any) -> Any:
    """Abstract arrays of a pytree, whole on every device."""
    where = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def encode_images(name: str, per_chip: int, mesh: Mesh, placement: Placement = "replicated") -> Program:
    config = clip.ARCHITECTURES[name]
    size, batch = config.vision.image_size, per_chip * mesh.shape[parallel.DATA]
    pixels = on_mesh(mesh, (batch, size, size, 3), jnp.float32, ("images", None, None, None))

    def encode(params: Any, pixels: Any) -> Any:
        return clip.encode_image(params, pixels, config, numerics=clip.Numerics(jnp.bfloat16))

    title, arguments = f"encode {name}, {per_chip} images a chip", (parameters(config, mesh, placement), pixels)
    if placement == "replicated":
        return Program(title, encode, arguments)
    # Where parameters are split, weights travel, never images: matrix by matrix, gathered or sent around in pieces; or,
    # where pieces are small, many at once by an all-reduce with zeros.
    matrix = 2 * config.vit.intermediate_size * config.vit.hidden_size
    every = sum(2 * leaf.size for _, leaf in flatten(abstract_params(config)["vision_model"]))
    allowed = {"all-gather": matrix, "collective-permute": matrix, "all-reduce": every}
    return Program(f"{title}, parameters {placement}", encode, arguments, allowed)


def text_proxies(num_classes: int, mesh: Mesh, name: str = "ViT-L/14@336") -> Program:
    """Seven templates, averaged class by class; texts go through the tower at most 64 classes a chip at a time."""
    config, templates, length = clip.ARCHITECTURES[name], 7, 32
    step = min(64, -(-num_classes // mesh.size))
    classes = parallel.padded_length(num_classes, step * mesh.size)
    shape = (classes // (step * mesh.size), step * mesh.size, templates, length)
    ids = on_mesh(mesh, shape, jnp.int32, (None, "images", None, None))

    def proxies(params: Any, ids: Any) -> Any:
        def some(ids: Any) -> Any:
            texts = ids.reshape(-1, length)
            features = clip.encode_text(params, texts, config, numerics=clip.Numerics(jnp.bfloat16))
            return normalize(normalize(features).reshape(-1, templates, features.shape[1]).mean(1))

        return jax.lax.map(some, ids)

    title = f"text proxies {name}, {num_classes:,} classes, {templates} templates"
    return Program(title, proxies, (parameters(config, mesh), ids))


def _label_sums(num_classes: int, dim: int) -> dict[str, int]:
    """The largest all-reduce of proxy learning: P^T X, X^T X and vectors. A gradient is smaller."""
    return {"all-reduce": 4 * (num_classes * dim + dim * dim + 4 * (num_classes + dim))}


def fit(num_images: int, num_classes: int, mesh: Mesh, dtype: Any, dim: int = 768) -> Program:
    """The whole of proxy learning: Sinkhorn and the fast solver by blocks of images."""
    rows = parallel.padded_length(num_images, mesh.size)
    x = on_mesh(mesh, (rows, dim), dtype, ("images", None))
    mask = on_mesh(mesh, (rows,), jnp.bool_, ("images",))
    text = on_mesh(mesh, (num_classes, dim), jnp.float32, (None, None))

    def run(x: Any, mask: Any, text: Any) -> Any:
        rows = parallel.sharding(mesh, ("images", None), x.shape)
        return proxy.fit(x, text, proxy.Settings(product_dtype=jnp.bfloat16, sharding=rows), mask=mask)

    kind = jnp.dtype(dtype).name
    title = f"proxy.fit, {num_images:,} images ({kind}), {num_classes:,} classes"
    return Program(title, run, (x, mask, text), _label_sums(num_classes, dim))


def adapted(method: str, num_images: int, num_classes: int, mesh: Mesh, dtype: Any, dim: int = 768) -> Program:
    """A head by blocks of images: anchored GDA ("gda"), or the rule ("auto") with its choice among two splits."""
    rows = parallel.padded_length(num_images, mesh.size)
    x = on_mesh(mesh, (rows, dim), dtype, ("images", None))
    mask = on_mesh(mesh, (rows,), jnp.bool_, ("images",))
    folds = on_mesh(mesh, (rows, FEWEST_SPLITS), jnp.bool_, ("images", None))  # of so many images
    text = on_mesh(mesh, (num_classes, dim), jnp.float32, (None, None))
    temperature = jnp.float32(0.01)
    settings = in_float32(proxy.Settings(solver="closed_form"))

    def run(x: Any, mask: Any, folds: Any, text: Any) -> Any:
        own = Rows(mask, features=x, fold=folds)
        where = dataclasses.replace(settings, sharding=parallel.sharding(mesh, ("images", None), x.shape))
        numbers = (temperature, settings, None)
        blocks = for_rows(where, own, num_classes)
        return run_method(own, text, numbers, blocks, method=by_rule, choices=method)

    # P^T X of every split, half and balance at once, and X^T X of every half; anchored GDA has those of all images.
    sums = num_classes * dim + dim * dim + 4 * (num_classes + dim)
    halves = 2 * FEWEST_SPLITS
    largest = sums if method == "gda" else halves * (len(proxy.GAMMAS) * num_classes * (dim + 1) + dim * (dim + 4))
    name = {"gda": "adapt.anchored_gda", "auto": "adapt.fit, the rule"}[method]
    title = f"{name}, {num_images:,} images ({jnp.dtype(dtype).name}), {num_classes:,} classes"
    return Program(title, run, (x, mask, folds, text), {"all-reduce": 4 * largest})


def learn(num_images: int, num_classes: int, mesh: Mesh, dim: int = 768) -> Program:
    """Sinkhorn's labels and the fast solver with labels and logits of all images in memory."""
    rows = parallel.padded_length(num_images, mesh.size)
    x = on_mesh(mesh, (rows, dim), jnp.float32, ("images", None))
    mask = on_mesh(mesh, (rows,), jnp.bool_, ("images",))
    text = on_mesh(mesh, (num_classes, dim), jnp.float32, (None, None))

    def run(x: Any, mask: Any, text: Any) -> Any:
        similarity = normalize(x) @ normalize(text).T
        labels = proxy.pseudo_labels(similarity, mask=mask)
        settings = in_float32(proxy.Settings(product_dtype=jnp.bfloat16))
        return learn_in_memory(Rows(mask, features=x), text, labels, settings)

    title = f"pseudo_labels and learn_proxies, {num_images:,} images, {num_classes:,} classes"
    return Program(title, run, (x, mask, text), _label_sums(num_classes, dim))


def prompt_step(name: str, kind: str, mesh: Mesh, per_chip: int = 32) -> Program:
    """A chunk of training steps: 1,000 classes for a textual prompt, constant class features for a visual one.

    10,000 images lie on every chip as what no prompt changes: features, or embedded patches in bfloat16.
    """
    config, steps, classes, images = clip.ARCHITECTURES[name], 10, 1000, 10_000
    modality = TextPrompt() if kind == "textual" else VisualPrompt(recompute=True)
    batch = per_chip * mesh.shape[parallel.DATA]
    shape = lambda *lengths, dtype=jnp.float32: jax.ShapeDtypeStruct(lengths, dtype)  # noqa: E731
    features = shape(classes, config.projection_dim)
    ids = shape(classes, 1 + modality.length + 7, dtype=jnp.int32)
    frozen = Frozen(abstract_params(config, jnp.bfloat16), ids, features, features)
    size = config.vision.image_size
    constant = jax.eval_shape(
        lambda params, pixels: modality.constant_images(params, pixels, config, BF16),
        frozen.params,
        shape(images, size, size, 3),
    )
    constant = shape(*constant.shape, dtype=jnp.bfloat16)
    prompts = jax.eval_shape(lambda: modality.init(jax.random.key(0), config))
    state = jax.eval_shape(start, jax.tree.map(lambda x: shape(1, *x.shape), prompts))
    run = Run(shape(1), shape(1), shape(1, classes, dtype=jnp.bool_), shape(1), shape(1))
    rows = lambda dtype: on_mesh(mesh, (steps, 1, batch), dtype, (None, None, "images"))  # noqa: E731
    batches = Batches(rows(jnp.int32), rows(jnp.int32), rows(jnp.bool_), rows(jnp.bool_), on_all(mesh, shape(steps, 1)))
    state, run, frozen, constant = on_all(mesh, (state, run, frozen, constant))

    def chunk(state: Any, batches: Any, run: Any, frozen: Any, images: Any) -> Any:
        return train_chunk(Task(modality, config, BF16), state, batches, run, frozen, images)

    # The gradient of the class features [C,E], before it goes through the text tower, or of the prefix [K,D]; and
    # the loss, two numbers.
    width = config.vision.hidden_size
    largest = 4 * (max(classes * config.projection_dim, modality.length * width) + 2)
    return Program(
        f"{kind} prompt {name}, {classes:,} classes, {per_chip} images a chip",
        chunk,
        (state, batches, run, frozen, constant),
        {"all-reduce": largest},
    )


def tag(mesh: Mesh, per_chip: int = 8, grid: tuple[int, int] = (24, 32)) -> Program:
    """TagCLIP with re-identification: 384x512 pixels, VOC's 20 classes and 25 background names."""
    config, foreground, names = clip.ARCHITECTURES["ViT-B/16"], 20, 45
    size, batch = config.vision.patch_size, per_chip * mesh.size
    pixels = (batch, grid[0] * size, grid[1] * size, 3)
    texts = jax.ShapeDtypeStruct((names, config.projection_dim), jnp.float32)

    def run(shared: Any, pixels: Any, mask: Any) -> Any:
        params, texts = shared
        return patch.tag(
            params, pixels, texts, config, num_foreground=foreground, mask=mask, numerics=clip.Numerics(jnp.bfloat16)
        )

    shared = on_all(mesh, (abstract_params(config, jnp.bfloat16), texts))
    arguments = (shared, _divided(mesh, pixels, jnp.float32), _divided(mesh, (batch, *grid), jnp.bool_))
    title = f"tags ViT-B/16, {names} names, {per_chip} images of {pixels[1]}x{pixels[2]} a chip"
    return Program(title, parallel.map_rows(run, mesh), arguments)


def segment(mesh: Mesh, per_chip: int = 4, grid: tuple[int, int] = (24, 32)) -> Program:
    """CLIP-ES up to its maps: 384x512 pixels, at most 4 tags an image, 25 background names."""
    config, classes, background, most = clip.ARCHITECTURES["ViT-B/16"], 20, 25, 4
    size, batch = config.vision.patch_size, per_chip * mesh.size
    pixels = (batch, grid[0] * size, grid[1] * size, 3)
    texts, others = (jax.ShapeDtypeStruct((n, config.projection_dim), jnp.float32) for n in (classes, background))

    def run(shared: Any, pixels: Any, tags: Any, mask: Any) -> Any:
        params, texts, others = shared
        return patch.segment(
            params, pixels, texts, others, tags, config, mask=mask, numerics=clip.Numerics(jnp.bfloat16)
        )

    shared = on_all(mesh, (abstract_params(config, jnp.bfloat16), texts, others))
    arguments = (
        shared,
        _divided(mesh, pixels, jnp.float32),
        _divided(mesh, (batch, most), jnp.int32),
        _divided(mesh, (batch, *grid), jnp.bool_),
    )
    title = f"masks ViT-B/16, {most} tags, {per_chip} images of {pixels[1]}x{pixels[2]} a chip"
    return Program(title, parallel.map_rows(run, mesh), arguments)


def dense_maps(mesh: Mesh, per_chip: int = 32, names: int = 150) -> Program:
    """Cosines of the patches of windows with names, NACLIP: what `patch.segment_dense` runs, ADE20K's 150 names."""
    config = clip.ARCHITECTURES["ViT-B/16"]
    size, batch = config.vision.image_size, per_chip * mesh.size
    last = patch.Dense(attention="naclip").last(config)
    task = DenseTask(config, last, clip.Numerics(jnp.bfloat16))
    shapes = jax.ShapeDtypeStruct((names, config.projection_dim), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)

    def run(shared: Any, pixels: Any) -> Any:
        return window_scores(shared, (pixels,), task)

    shared = on_all(mesh, (abstract_params(config, jnp.bfloat16), *shapes))
    title = f"dense maps ViT-B/16, {names} names, {per_chip} windows of {size}x{size} a chip"
    pixels = _divided(mesh, (batch, size, size, 3), jnp.float32)
    return Program(title, parallel.map_rows(run, mesh), (shared, pixels))


def dense_photos(mesh: Mesh, per_chip: int = 16, grid: tuple[int, int] = (21, 28)) -> Program:
    """Dense features of whole photos of 336x448 pixels, without windows."""
    config = clip.ARCHITECTURES["ViT-B/16"]
    size, batch = config.vision.patch_size, per_chip * mesh.size
    pixels = (batch, grid[0] * size, grid[1] * size, 3)

    def run(params: Any, pixels: Any) -> Any:
        return patch.dense_features(params, pixels, config, numerics=clip.Numerics(jnp.bfloat16))

    title = f"dense features ViT-B/16, {per_chip} photos of {pixels[1]}x{pixels[2]} a chip"
    arguments = on_all(mesh, abstract_params(config, jnp.bfloat16)), _divided(mesh, pixels, jnp.float32)
    return Program(title, parallel.map_rows(run, mesh), arguments)


def dense_crf(mesh: Mesh, size: tuple[int, int] = (375, 500), labels: int = 5) -> Program:
    """The exact dense CRF on a photo, one a chip."""
    scores = _divided(mesh, (mesh.size, labels, *size), jnp.float32)
    photos = _divided(mesh, (mesh.size, *size, 3), jnp.uint8)

    def run(_: Any, scores: Any, photos: Any) -> Any:
        return patch.dense_crf(scores[0], photos[0])[None]

    title = f"dense CRF, exact, a photo of {size[0]}x{size[1]} a chip, {labels} labels"
    return Program(title, parallel.map_rows(run, mesh), ((), scores, photos))


def _divided(mesh: Mesh, shape: Sequence[int], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, P(mesh.axis_names)))


def host_programs(mesh: Mesh) -> list[Program]:
    return [
        encode_images("ViT-B/16", 128, mesh),
        encode_images("ViT-L/14@336", 32, mesh),
        encode_images("ViT-L/14@336", 32, mesh, "fully_sharded"),
        encode_images("SigLIP-So400m/14@384", 32, mesh),
        encode_images("RN50", 128, mesh),
        text_proxies(1000, mesh),
        text_proxies(21_841, mesh),
        learn(IMAGENET_TRAIN, 1000, mesh),
        fit(IMAGENET_TRAIN, 1000, mesh, jnp.float32),
        fit(IMAGENET_TRAIN, 21_841, mesh, jnp.float32),
        *(prompt_step(name, kind, mesh) for name in ("ViT-B/32", "ViT-L/14") for kind in ("textual", "visual")),
        tag(mesh),
        segment(mesh),
        dense_maps(mesh),
        dense_photos(mesh),
        dense_crf(mesh),
    ]


def pod_programs(mesh: Mesh) -> list[Program]:
    return [
        *host_programs(mesh),
        fit(BILLION, 1000, mesh, jnp.bfloat16),
        fit(BILLION, 21_841, mesh, jnp.bfloat16),
        *(adapted(method, BILLION, 1000, mesh, jnp.bfloat16) for method in ("gda", "auto")),
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


def compiler() -> str:
    return f"jax {jax.__version__}, libtpu {version('libtpu')}"


def compile_program(program: Program, topology: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Compile, measure, and say what is wrong, if anything; `known` results of the same program are kept."""
    lowered = jax.jit(program.function).lower(*program.arguments)
    told = [compiler(), topology, lowered.as_text()]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    found = known.get(key) or _measure(lowered, topology)
    # Checked anew: what is allowed may have changed since.
    return {"topology": topology, "program": program.name, "key": key, **found, "wrong": _wrong(found, program)}


def _measure(lowered: Any, topology: str) -> dict[str, Any]:
    start_time = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start_time
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    # Arguments live through the call; temporaries are the peak of what the program allocates.
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    return {
        "gigabytes_per_chip": sum(parts.values()) / 1e9,
        "gigabytes_of": {name: size / 1e9 for name, size in parts.items()},
        "hbm_gigabytes": HBM[topology.split(":")[0]] / 1e9,
        "collectives": {
            kind: [[size, count] for size, count in sorted(_counts(found, kind), reverse=True)]
            for kind in sorted({kind for kind, _ in found})
        },
        "gigaflops_of_one_iteration": (compiled.cost_analysis() or {}).get("flops", 0.0) / 1e9,
        "compile_seconds": seconds,
        "compiler": compiler(),
    }


def _counts(found: Sequence[tuple[str, int]], kind: str) -> list[tuple[int, int]]:
    """Sizes in bytes of the collectives of one kind, and how many there are of each."""
    return list(collections.Counter(size for k, size in found if k == kind).items())


def _wrong(found: Mapping[str, Any], program: Program) -> list[str]:
    wrong = []
    if found["gigabytes_per_chip"] > found["hbm_gigabytes"]:
        wrong.append(f"needs {found['gigabytes_per_chip']:.1f} GB a chip")
    for kind, ((largest, _), *_) in found["collectives"].items():
        if kind not in program.allowed:
            wrong.append(f"unexpected {kind}, {largest:,} bytes")
        elif largest > program.allowed[kind]:
            wrong.append(f"{kind} of {largest:,} bytes, expected at most {program.allowed[kind]:,}")
    return wrong


def check(topology: str, known: Mapping[str, Any], only: str, on_result: Callable[[dict[str, Any]], None]) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), (parallel.DATA, parallel.MODEL))
    for program in pod_programs(mesh) if mesh.size > 8 else host_programs(mesh):
        if only not in program.name:
            continue
        try:
            on_result(compile_program(program, topology, known))
        except Exception as error:  # the compiler's own words, e.g. out of memory
            message = str(error).strip().splitlines()[0][:300]
            on_result({"topology": topology, "program": program.name, "wrong": [message]})


def table(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        listed = "; ".join(
            f"{sum(count for _, count in sizes)} {kind}, largest {sizes[0][0] / 1e6:.2f} MB"
            for kind, sizes in r.get("collectives", {}).items()
        )
        measured = "gigabytes_per_chip" in r
        rows.append(
            (
                r["topology"],
                r["program"],
                f"{r['gigabytes_per_chip']:.2f} of {r['hbm_gigabytes']:.0f}" if measured else "-",
                listed or "none",
                f"{r['gigaflops_of_one_iteration']:,.0f}" if measured else "-",
                f"{r['compile_seconds']:.0f}" if measured else "-",
                "; ".join(r["wrong"]) or "ok",
            )
        )
    header = ["topology", "program", "GB a chip", "collectives", "GFLOP", "compile s", "check"]
    return markdown_table(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=[*HOSTS, POD])
    parser.add_argument("--only", default="", help="compile programs whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON with results; what it holds is not compiled again")
    options = parser.parse_args()
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    known = {
        row["key"]: {name: row[name] for name in row if name not in ("topology", "program", "key", "wrong")}
        for row in before
        if "compile_seconds" in row
    }  # fmt: skip
    results: list[dict[str, Any]] = []

    def on_result(result: dict[str, Any]) -> None:
        print(json.dumps(result), flush=True)
        results.append(result)
        if options.out:
            write_json(options.out, _in_place(before, results))

    for topology in options.topologies:
        check(topology, known, options.only, on_result)
    print(table(_in_place(before, results)))
    return int(any(result["wrong"] for result in results))


def _in_place(before: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New results over those of the same topology and program; the rest as it was; in order of their names."""
    rows = {(row["topology"], row["program"]): row for row in (*before, *results)}
    return [rows[name] for name in sorted(rows)]


if __name__ == "__main__":
    sys.exit(main())
