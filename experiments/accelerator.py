"""First contact with an accelerator: is it right there, and how fast. One command, at most 8 minutes.

    python -m experiments.accelerator --out FOLDER

Needs jax for the device, numpy, pillow and safetensors, nothing else, and no files but those of the repository: weights
are random, whose throughput is that of real ones. Writes FOLDER/accelerator.json, a record, and FOLDER/accelerator.md.

    parity     outputs of the original implementations (tests/golden), with products in full float32 and as the device
               multiplies by default: largest difference over the largest value
    encoders   images a second, and the share of the card's peak (--peak TFLOP/s where the card is not in PEAK)
    texts      text proxies of 1,000 classes x 80 templates
    proxy      `proxy.fit` at ImageNet shape: 50,000 x 768 x 1,000, aim under 3 s on an H100 or H200
    prompt     a step of loss and gradient of each modality
    tags       16 photos of 224 x 320, 45 names
    crf        the exact mean field at 375 x 500

A stage that fails, for want of memory say, is told and the others go on. --smoke: tiny sizes on any device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzs import clip, patch, prompt, proxy, report

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
DEFAULT = clip.Numerics()
BFLOAT16 = clip.Numerics(jnp.bfloat16)
# Dense peaks in TFLOP/s by the beginning of the device's name: (float32 products as the device takes them, bfloat16).
PEAK = {
    "NVIDIA H100": (494.0, 989.0),
    "NVIDIA H200": (494.0, 989.0),
    "NVIDIA A100": (156.0, 312.0),
    "NVIDIA L4": (60.0, 121.0),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5": (459.0, 459.0),
    "TPU v6": (918.0, 918.0),
}
FULL_PRECISION = 2e-5  # largest difference over largest value: float32, sums in another order
HEADER = ["stage", "case", "value", "unit", "seconds", "compile s", "remark"]
FOREGROUND = 20


class Row(NamedTuple):
    """One line of the table. seconds: of a call that compiles nothing; compile: of the first call, beyond that."""

    stage: str
    case: str
    value: float
    unit: str
    seconds: float = 0.0
    compile: float = 0.0
    remark: str = ""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are those of the published models and data sets."""

    models: tuple[str, ...] = ("ViT-B/32", "ViT-B/16", "ViT-L/14@336")
    batch: int = 256
    rounds: int = 5
    classes: int = 1000
    templates: int = 80
    images: int = 50_000
    width: int = 768
    prompt_classes: int = 100
    prompt_batch: int = 16
    photo: tuple[int, int] = (224, 320)
    photos: int = 16
    names: int = 45
    crf: tuple[int, int] = (375, 500)


SMOKE = Sizes(("tiny",), 4, 1, 10, 2, 200, 16, 3, 2, (32, 48), 2, 22, (12, 16))


def architecture(name: str) -> clip.CLIPConfig:
    if name != "tiny":
        return clip.ARCHITECTURES[name]
    text = clip.TextConfig(32, 64, 1, 2, vocab_size=64, max_position_embeddings=16, bos_token_id=62, eos_token_id=63)
    return clip.CLIPConfig(text=text, vision=clip.VisionConfig(32, 64, 2, 2, 32, 16), projection_dim=16)


# --- timing -------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], rounds: int) -> tuple[Any, float, float]:
    """What the call gives, median seconds of `rounds` calls, and how much longer the first took."""

    def once() -> tuple[Any, float]:
        start = time.perf_counter()
        found = jax.block_until_ready(call())
        return found, time.perf_counter() - start

    found, first = once()
    median = statistics.median(once()[1] for _ in range(rounds))
    return found, median, max(0.0, first - median)


def peak_memory() -> str:
    """Gibibytes that the device has held at most so far, where it says so."""
    found = jax.local_devices()[0].memory_stats() or {}
    return f"peak memory so far {found['peak_bytes_in_use'] / 2**30:.2f} GiB" if "peak_bytes_in_use" in found else ""


def share_of_peak(flops_a_second: float, kind: int, given: float | None) -> str:
    """The share of the card's peak. kind: 0 float32, 1 bfloat16."""
    name = jax.devices()[0].device_kind
    known = next((peaks[kind] for start, peaks in PEAK.items() if name.startswith(start)), None)
    peak = given if given is not None else known
    return f"{flops_a_second / 1e12:.1f} TFLOP/s" + (f", {flops_a_second / peak / 1e10:.0f} % of peak" if peak else "")


def image_flops(config: clip.CLIPConfig) -> float:
    """Multiplications and additions of the vision tower for one image, products of matrices only."""
    v = config.vision
    patches = (v.image_size // v.patch_size) ** 2
    tokens, width = patches + 1, v.hidden_size
    block = 2 * tokens * width * (4 * width + 2 * v.intermediate_size) + 4 * tokens**2 * width
    return v.num_hidden_layers * block + 2 * patches * 3 * v.patch_size**2 * width


# --- parity -------------------------------------------------------------------------------------------------------


def difference(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def golden_encoders() -> Iterator[tuple[str, float]]:
    """Features under prompts, and tags, of the original implementations."""
    folder = GOLDEN / "prompt_tuning"
    params, config = clip.read_checkpoint(folder / "model")
    with np.load(folder / "visual_prefix.npz") as stored:
        pixels, prefix = stored["images"].transpose(0, 2, 3, 1), stored["p16_prefix"]
        yield (
            "image features under a prompt",
            difference(prompt.image_features(params, prefix, pixels, config), stored["p16_features"]),
        )
    with np.load(folder / "text_prefix.npz") as stored:
        ids, prefix = stored["p16_token_ids"], stored["p16_prefix"][0]
        yield (
            "text features under a prompt",
            difference(prompt.text_features(params, prefix, ids, config), stored["p16_features"]),
        )
    yield "patch scores and tags", golden_tags()


def golden_tags() -> float:
    """Refined patch scores and final scores of TagCLIP's own code on a photo."""
    params, config = clip.read_checkpoint(GOLDEN / "tagclip" / "model_A")
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    with np.load(GOLDEN / "tagclip" / "case0.npz") as stored:
        pixels = ((stored["resized_u8"].astype(np.float32) / 255 - mean) / std)[None]
        settings = patch.Tagging(attention_layers=patch.default_attention_layers(12, "last"), exact=True, capacity=2)
        foreground = int(stored["num_classes"])
        found = patch.tag(params, pixels, stored["text_features"], config, settings, num_foreground=foreground)
        return max(
            difference(found.refined[0], stored["dmar_scores"]), difference(found.scores[0], stored["final_scores"])
        )


def golden_proxies() -> Iterator[tuple[str, float]]:
    """Pseudo labels and proxies of InMaP's own code; their products are in full float32 by themselves."""
    with np.load(GOLDEN / "inmap" / "case1.npz") as stored:
        labels = proxy.pseudo_labels(stored["logits"], temperature=float(stored["tau_t"]), gamma=0.5)
        yield "pseudo labels", difference(labels, stored["sinkhorn_labels_gamma0.5"])
        options = {"temperature": float(stored["tau_i"]), "confidence": float(stored["alpha"])}
        solved = proxy.learn_proxies(
            stored["image_features"], stored["text_features"], stored["sinkhorn_labels_gamma0.5"],
            solver="reference", iterations=50, **options,
        )  # fmt: skip
        yield "proxies, 50 steps", difference(solved.proxies, stored["proxy_sinkhorn_gamma0.5_it50"])


def parity() -> Iterator[Row]:
    """Full precision has to agree; how far the default is off is told."""
    with jax.default_matmul_precision("highest"):
        for name, found in (*golden_encoders(), *golden_proxies()):
            bound = 1e-3 if name.startswith("proxies") else FULL_PRECISION  # fifty steps grow the rounding
            remark = "agrees" if found <= bound else f"DIFFERS, at most {bound:g} expected"
            yield Row("parity", f"{name}, full precision", found, "relative difference", remark=remark)
    for name, found in golden_encoders():
        yield Row("parity", f"{name}, default precision", found, "relative difference")


# --- speed --------------------------------------------------------------------------------------------------------


def encoders(sizes: Sizes, peak: float | None) -> Iterator[Row]:
    for name in sizes.models:
        config = architecture(name)
        params = jax.jit(clip.random_params, static_argnums=1)(jax.random.key(0), config)
        size = config.vision.image_size
        pixels = jax.random.normal(jax.random.key(1), (sizes.batch, size, size, 3), jnp.float32)
        for kind, (type_name, numerics) in enumerate((("float32", DEFAULT), ("bfloat16", BFLOAT16))):
            encode = functools.partial(clip.encode_image, params, pixels, config, numerics=numerics)
            _, seconds, first = timed(encode, sizes.rounds)
            rate = sizes.batch / seconds
            remark = share_of_peak(rate * image_flops(config), kind, peak)
            yield Row("encoders", f"{name} {type_name}, batch {sizes.batch}", rate, "images/s", seconds, first, remark)
        if name == sizes.models[0]:
            yield from torch_encoder(config, params, np.asarray(pixels), sizes)


def torch_encoder(config: clip.CLIPConfig, params: Any, pixels: np.ndarray, sizes: Sizes) -> Iterator[Row]:
    """The same tower in transformers' CLIPModel on the same device, where both can be imported."""
    import tempfile

    try:
        import torch
        from transformers import CLIPModel
    except ImportError:
        return
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        clip.write_checkpoint(Path(folder), params, config, format="safetensors")
        for type_name in ("float32", "bfloat16"):
            kind = getattr(torch, type_name)
            model = CLIPModel.from_pretrained(folder).to(device=device, dtype=kind).eval()
            batch = torch.tensor(pixels.transpose(0, 3, 1, 2).copy()).to(device=device, dtype=kind)

            @torch.inference_mode()
            def encode(model: Any = model, batch: Any = batch) -> np.ndarray:
                features = model.get_image_features(pixel_values=batch)
                return getattr(features, "pooler_output", features).float().cpu().numpy()

            _, seconds, first = timed(encode, sizes.rounds)
            yield Row(
                "encoders", f"torch {type_name}, batch {sizes.batch}", sizes.batch / seconds, "images/s", seconds, first
            )


def random_ids(config: clip.CLIPConfig, number: int, length: int, seed: int = 0) -> np.ndarray:
    """[N,T] tokens between start and end, as a tokenizer gives them."""
    ids = np.random.default_rng(seed).integers(1, config.text.vocab_size - 2, (number, length), np.int32)
    ids[:, 0], ids[:, -1] = config.text.bos_token_id, config.text.eos_token_id
    return ids


def texts(sizes: Sizes, peak: float | None) -> Iterator[Row]:
    """Each class's templates encoded, normalised and averaged, a batch of classes at a time."""
    config = architecture(sizes.models[0])
    params = jax.jit(clip.random_params, static_argnums=1)(jax.random.key(0), config)
    ids = random_ids(config, sizes.classes * sizes.templates, min(16, config.text.max_position_embeddings))
    step = sizes.templates * min(25, sizes.classes)

    @jax.jit
    def proxies_of(params: Any, ids: jax.Array) -> jax.Array:
        features = clip.normalize(clip.encode_text(params, ids, config))
        return clip.normalize(features.reshape(-1, sizes.templates, features.shape[-1]).mean(axis=1))  # [C,E]

    def all_classes() -> jax.Array:
        return jnp.concatenate([proxies_of(params, ids[start : start + step]) for start in range(0, len(ids), step)])

    _, seconds, first = timed(all_classes, 1)
    case = f"{sizes.classes} classes x {sizes.templates} templates of {ids.shape[1]} tokens, {sizes.models[0]}"
    yield Row("texts", case, len(ids) / seconds, "texts/s", seconds, first)


def proxies(sizes: Sizes, peak: float | None) -> Iterator[Row]:
    """Unit rows around class directions, made on the device."""
    n, e, c = sizes.images, sizes.width, sizes.classes
    keys = jax.random.split(jax.random.key(0), 3)
    centres = jax.random.normal(keys[0], (c, e))
    images = clip.normalize(centres[jnp.arange(n) % c] + 1.2 * jax.random.normal(keys[1], (n, e)))
    text = clip.normalize(centres + 0.7 * jax.random.normal(keys[2], (c, e)))
    for solver in ("fast", "closed_form"):
        settings = proxy.Settings(gamma=0.0, solver=solver)
        fit = functools.partial(proxy.fit, images, text, settings)
        found, seconds, first = timed(lambda fit=fit: fit().proxies, min(3, sizes.rounds))
        right = float((jnp.argmax(images @ found.T, axis=1) == jnp.arange(n) % c).mean())
        remark = "; ".join(filter(None, [f"{100 * right:.1f} % right", peak_memory()]))
        yield Row("proxy", f"fit {n} x {e} x {c}, {solver}", seconds, "s", seconds, first, remark)


def prompts(sizes: Sizes, peak: float | None) -> Iterator[Row]:
    """Loss and gradient with respect to the prompt: text features of all classes, image features of a batch."""
    config = architecture(sizes.models[0])
    params = jax.jit(clip.random_params, static_argnums=1)(jax.random.key(0), config)
    B, C, size = sizes.prompt_batch, sizes.prompt_classes, config.vision.image_size
    pixels = jax.random.normal(jax.random.key(1), (B, size, size, 3), jnp.float32)
    labels = jnp.arange(B) % C
    for modality in (prompt.TextPrompt(4), prompt.VisualPrompt(4), prompt.JointPrompt(4)):
        ids = jnp.asarray(prompt.placeholder_ids(random_ids(config, C, 6), 4, config.text))
        template = clip.encode_text(params, jnp.asarray(random_ids(config, C, 6)), config)
        frozen = prompt.Frozen(params, ids, template, template)
        images = modality.constant_images(params, pixels, config)
        task = prompt.Task(modality, config)

        @jax.jit
        def step(prompts: Any, frozen: Any, images: Any, task: prompt.Task = task) -> Any:
            def objective(prompts: Any) -> jax.Array:
                logits = prompt.class_logits(task, prompts, frozen, images)  # [B,C]
                return prompt.loss(logits, labels, jnp.zeros(B, bool))

            return jax.value_and_grad(objective)(prompts)

        start = modality.init(jax.random.key(2), config)
        call = functools.partial(step, start, frozen, images)
        _, seconds, first = timed(call, sizes.rounds)
        yield Row("prompt", f"{modality.name}, {C} classes, batch {B}", 1000 * seconds, "ms a step", seconds, first)


def tags(sizes: Sizes, peak: float | None) -> Iterator[Row]:
    config = architecture("ViT-B/16" if "ViT-B/16" in sizes.models else sizes.models[0])
    params = jax.jit(clip.random_params, static_argnums=1)(jax.random.key(0), config)
    height, width = sizes.photo
    photos = np.random.default_rng(0).standard_normal((sizes.photos, height, width, 3)).astype(np.float32)
    names = np.random.default_rng(1).standard_normal((sizes.names, config.projection_dim)).astype(np.float32)
    for type_name, numerics in (("float32", DEFAULT), ("bfloat16", BFLOAT16)):
        tag = functools.partial(patch.tag, params, photos, names, config, num_foreground=FOREGROUND, numerics=numerics)
        _, seconds, first = timed(lambda tag=tag: tag().scores, sizes.rounds)
        case = f"{sizes.photos} photos of {height} x {width}, {sizes.names} names, {type_name}"
        yield Row("tags", case, sizes.photos / seconds, "photos/s", seconds, first)


def crf(sizes: Sizes, peak: float | None) -> Iterator[Row]:
    height, width = sizes.crf
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    probabilities = jax.nn.softmax(jnp.asarray(rng.standard_normal((4, height, width)), jnp.float32), axis=0)
    settings = patch.CRF(stride=1)
    _, seconds, first = timed(functools.partial(patch.dense_crf, probabilities, image, settings), 1)
    yield Row("crf", f"exact, {height} x {width}, 4 labels", seconds, "s", seconds, first, peak_memory())


STAGES: Mapping[str, Callable[[Sizes, float | None], Iterator[Row]]] = {
    "encoders": encoders,
    "texts": texts,
    "proxy": proxies,
    "prompt": prompts,
    "tags": tags,
    "crf": crf,
}


# --- one record and one table ---------------------------------------------------------------------------------------


def measure(
    sizes: Sizes, peak: float | None, minutes: float, chosen: tuple[str, ...] = ()
) -> tuple[list[Row], list[str]]:
    """Rows of the chosen stages, of all by default, and why some are missing. No stage begins after these minutes."""
    rows: list[Row] = []
    missing: list[str] = []
    start = time.monotonic()
    stages = {"parity": parity} | {name: functools.partial(stage, sizes, peak) for name, stage in STAGES.items()}
    for name, stage in stages.items():
        if chosen and name not in chosen:
            continue
        if time.monotonic() - start > 60 * minutes:
            missing.append(f"{name}: not begun after {minutes:g} minutes")
            continue
        try:
            for row in stage():
                rows.append(row)
                print(f"{row.stage:9} {row.case:60} {row.value:12.4g} {row.unit:20} {row.remark}", flush=True)
        except Exception as error:  # memory, an operation that this device lacks: the other stages are still wanted
            missing.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
            print(missing[-1], flush=True)
    return rows, missing


def page(rows: list[Row], missing: list[str], record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    cells = [
        [r.stage, r.case, f"{r.value:.4g}", r.unit, f"{r.seconds:.4g}", f"{r.compile:.1f}", r.remark] for r in rows
    ]
    lines = [
        f"# {record['device']}: first contact\n",
        f"`{record['command']}`, {record['date']}. {record['num_devices']} x {record['device']} ({record['backend']}); "
        f"{versions}; revision {record['git_revision']}. Seconds are of a call that compiles nothing.\n",
        report.markdown_table(HEADER, cells),
    ]
    return "\n".join([*lines, *(f"\nNot measured: {reason}" for reason in missing)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a stage is missing, or full precision does not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card, dense")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no further stage begins")
    parser.add_argument("--stages", nargs="+", choices=("parity", *STAGES), default=(), help="only these")
    options = parser.parse_args(arguments)

    sizes = SMOKE if options.smoke else Sizes()
    started = time.perf_counter()
    rows, missing = measure(sizes, options.peak, options.minutes, tuple(options.stages))
    typed = sys.argv[1:] if arguments is None else arguments
    record = report.write_record(
        options.out / "accelerator.json",
        command=shlex.join(["python", "-m", "experiments.accelerator", *typed]),
        settings={"smoke": options.smoke, "sizes": dataclasses.asdict(sizes), "peak": options.peak},
        metrics={"rows": [row._asdict() for row in rows], "missing": missing},
        seconds={"run": round(time.perf_counter() - started, 1), "compile": round(sum(row.compile for row in rows), 1)},
    )
    (options.out / "accelerator.md").write_text(page(rows, missing, record), encoding="utf-8")
    return int(bool(missing) or any("DIFFERS" in row.remark for row in rows))


if __name__ == "__main__":
    sys.exit(main())
