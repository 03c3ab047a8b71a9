"""Trains an embedded checkpoint, a small CLIP, from scratch on images that the project makes itself.

Run from the repository's root; a run that was stopped, by whatever, goes on where its last saved state is:

    python -m experiments.train_demo_clip --out jaxzs-out/demo_clip                # digits, letters, shapes: "demo"
    python -m experiments.train_demo_clip --world art --out jaxzs-out/art_clip     # things that artists drew: "art"

The objective is in `demo_clip_objective`. The images and captions grow harder over the first third; with hard images
from the start glyphs are not learned. The second part adds the patch-level term, without which patch scores stay near
random. There the position table is, for half the steps, a random window of an interpolated larger one, and some
batches have larger images, so that the model can be used at other sizes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.art_world import batches as art_batches
from experiments.art_world.card import write_card as write_art_card
from experiments.demo_clip_objective import LARGER, losses
from experiments.demo_world.batches import Batch, Plan, batch_at, is_local, rendered
from experiments.demo_world.captions import vocabulary
from experiments.demo_world.card import training_facts, write_card
from experiments.demo_world.tokenizer import write_tokenizer
from jaxzs.clip import CLIPConfig, TextConfig, VisionConfig, random_params, write_checkpoint
from jaxzs.clip.preprocess import ImagePreprocessor
from jaxzs.files import atomic_path
from jaxzs.report import write_record

LOG_EVERY = 50  # steps
# glibc gives large arrays back to the system after every use and faults them in again: a third of the CPU time.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(20 * 10**9),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Recipe(NamedTuple):
    """What the optimisation does; with the plan, all that a result depends on."""

    learning_rate: float = 1.3e-3
    warmup: int = 300
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    initial_scale: float = 14.0
    local_weight: float = 0.5
    window_share: float = 0.5


class World(NamedTuple):
    """What is learned and by how large a model; widths are in heads of 32.

    plan: what a run renders. vocabulary: every word. batch_at: (plan, vocabulary, step) -> Batch. write_card: (folder,
    facts of the training) -> None.
    """

    plan: Any
    vocabulary: Callable[[], list[str]]
    batch_at: Callable[..., Batch]
    write_card: Callable[..., None]
    vision_heads: int
    text_heads: int
    features: int


WORLDS = {
    "glyphs": World(Plan(), vocabulary, batch_at, write_card, 3, 2, 64),
    "art": World(art_batches.Plan(), art_batches.vocabulary, art_batches.batch_at, write_art_card, 5, 2, 96),
}


def demo_config(vocab: dict[str, int], plan: Any, world: World = WORLDS["glyphs"]) -> CLIPConfig:
    """The model of a world: 48 x 48 pixels, patches of 8; both towers small enough for two CPU cores."""
    end, wide, narrow = len(vocab) - 1, 32 * world.vision_heads, 32 * world.text_heads
    return CLIPConfig(
        text=TextConfig(
            hidden_size=narrow, intermediate_size=4 * narrow, num_hidden_layers=3, num_attention_heads=world.text_heads,
            vocab_size=len(vocab), max_position_embeddings=plan.long, bos_token_id=end - 1, eos_token_id=end,
            pad_token_id=end,
        ),
        vision=VisionConfig(
            hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=5, num_attention_heads=world.vision_heads,
            image_size=plan.size, patch_size=8,
        ),
        projection_dim=world.features,
    )  # fmt: skip


# --- the step -----------------------------------------------------------------------------------------


def optimizer(recipe: Recipe, steps: int):
    """AdamW with warm-up and cosine, gradients clipped by norm, no decay of vectors and embeddings."""
    import optax

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, min(recipe.warmup, steps // 10), steps, 0.01 * recipe.learning_rate
    )

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and "embedding" not in str(path[-1]), params
        )

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.adamw(schedule, *recipe.betas, weight_decay=recipe.weight_decay, mask=decayed),
    )


@functools.partial(jax.jit, static_argnames=("config", "recipe", "local", "steps"), donate_argnums=(0,))
def train_step(
    state: Any,
    batch: Batch,
    corner: jax.Array,
    mean: jax.Array,
    deviation: jax.Array,
    *,
    config: CLIPConfig,
    recipe: Recipe,
    local: bool,
    steps: int,
):
    """One update: state (params, optimiser state) and a batch with uint8 pixels -> (state, parts of the loss)."""
    import optax

    params, moments = state
    pixels = batch.pixels.astype(jnp.float32) / 255
    pixels = (pixels - mean[None, None, None]) / deviation[None, None, None]
    grads, parts = jax.grad(losses, has_aux=True)(
        params, batch._replace(pixels=pixels), corner, config, recipe.local_weight, local
    )
    parts["gradient"] = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    updates, moments = optimizer(recipe, steps).update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    params["logit_scale"] = jnp.minimum(params["logit_scale"], np.log(100).astype(np.float32))
    return (params, moments), parts


# --- the run ------------------------------------------------------------------------------------------


def place(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Images, and what belongs to them, spread over the devices; texts on every device."""
    from jax.sharding import NamedSharding, PartitionSpec

    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    return Batch(
        *(
            jax.device_put(x, whole if name == "input_ids" else split)
            for name, x in zip(Batch._fields, batch, strict=True)
        )
    )


def save_state(path: Path, state: Any, progress: dict[str, Any]) -> None:
    """Write a state so that a crash at any moment leaves either the old file or the new one."""
    from flax import serialization

    host = jax.tree.map(np.asarray, state)
    content = {"state": serialization.to_state_dict(host), "progress": json.dumps(progress)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialization.msgpack_serialize(content))


def load_state(path: Path, state: Any) -> tuple[Any, dict[str, Any]]:
    """Read a state of the same structure as `state`."""
    from flax import serialization

    content = serialization.msgpack_restore(path.read_bytes())
    return serialization.from_state_dict(state, content["state"]), json.loads(content["progress"])


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def train(
    out: Path, plan: Any, recipe: Recipe, world: World = WORLDS["glyphs"], *, workers: int = 1, save_every: float = 60.0
) -> tuple[Any, CLIPConfig, dict[str, Any]]:
    """Train, or go on training, in the folder `out`. Returns (params, config, progress with the whole log)."""
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(out / "checkpoint", world.vocabulary(), context=plan.long)
    config = demo_config(vocab, plan, world)
    params = random_params(jax.random.key(plan.seed), config)
    params["logit_scale"] = jnp.log(jnp.float32(recipe.initial_scale))
    state = params, optimizer(recipe, plan.steps).init(params)
    settings = {"plan": plan._asdict(), "recipe": recipe._asdict(), "config": config.to_hf()}
    settings = json.loads(json.dumps(settings))
    progress: dict[str, Any] = {
        "step": 0,
        "images": 0,
        "seconds": 0.0,
        "cpu": 0.0,
        "render": 0.0,
        "log": [],
        "settings": settings,
    }
    saved = out / "state.msgpack"
    if saved.is_file():
        state, progress = load_state(saved, state)
        if progress["settings"] != settings:
            raise SystemExit(f"{saved} belongs to a run with other settings; remove it or give another --out")
        print(f"going on from step {progress['step']}")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    normal = ImagePreprocessor(size=plan.size, crop_size=(plan.size, plan.size))
    mean, deviation = (jnp.asarray(x, jnp.float32) for x in (normal.image_mean, normal.image_std))
    first, clock, cpu, last_save = (progress["step"], time.monotonic(), _cpu_seconds(), time.monotonic())
    recent: list[dict[str, jax.Array]] = []
    bar = tqdm(
        rendered(plan, vocab, first, make=world.batch_at, workers=workers),
        total=plan.steps,
        initial=first,
        unit="step",
        mininterval=5,
    )
    for step, (batch, render) in enumerate(bar, first):
        local = is_local(plan, step)
        state, parts = train_step(
            state, place(batch, mesh), _corner(plan, recipe, config, step), mean, deviation,
            config=config, recipe=recipe, local=local, steps=plan.steps,
        )  # fmt: skip
        recent.append(parts)
        now, used = time.monotonic(), _cpu_seconds()
        progress["step"], progress["images"] = step + 1, progress["images"] + len(batch.pixels)
        progress["seconds"] += now - clock
        progress["cpu"] += used - cpu
        progress["render"] += render
        clock, cpu = now, used
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.steps:
            entry = _average(recent)
            recent = []
            bar.set_postfix({k: f"{v:.3g}" for k, v in entry.items()})
            progress["log"].append(
                {"step": step + 1, "images": progress["images"], "seconds": round(progress["seconds"], 1), **entry}
            )
            if now - last_save > save_every or step + 1 == plan.steps:
                save_state(saved, state, progress)
                (out / "progress.json").write_text(json.dumps(progress, indent=1))
                last_save = now
    return jax.tree.map(np.asarray, state[0]), config, progress


def _corner(plan: Any, recipe: Recipe, config: CLIPConfig, step: int) -> np.ndarray:
    """Where this step's window of the enlarged position table lies; (-1, -1) for the native table."""
    rng = np.random.default_rng([1, plan.seed, 8, step])
    if rng.random() >= recipe.window_share:
        return np.array([-1, -1], np.int32)
    return rng.integers(0, (LARGER - 1) * config.vision.grid[0] + 1, 2).astype(np.int32)


def _average(parts: list[dict[str, jax.Array]]) -> dict[str, float]:
    names = parts[-1]
    return {n: round(float(np.mean([float(p[n]) for p in parts if n in p])), 4) for n in names}


def write_demo(folder: Path, params: Any, config: CLIPConfig, size: int) -> None:
    """The checkpoint in HuggingFace's layout, weights in float16, for images of so many pixels; without a tokenizer."""
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), params)
    write_checkpoint(folder, half, config)
    normal = ImagePreprocessor(size=size, crop_size=(size, size))
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(x) for x in normal.image_mean],
        "image_std": [float(x) for x in normal.image_std],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))


def draw_curve(path: Path, log: list[dict[str, float]]) -> None:
    """Loss and accuracy over the images seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    seen = np.array([entry["images"] for entry in log]) / 1000
    left.plot(seen, [e["contrastive"] for e in log], label="contrastive")
    local = [(i, e["local"]) for i, e in zip(seen, log, strict=True) if "local" in e]
    if local:
        left.plot(*zip(*local, strict=True), label="patch level")
    left.set(xlabel="thousand images", ylabel="loss", yscale="log")
    left.legend()
    right.plot(seen, [100 * e["accuracy"] for e in log], label="own caption first")
    right.plot(seen, [100 * e["name"] for e in log], label="right name")
    right.set(xlabel="thousand images", ylabel="% of images")
    right.legend()
    figure.savefig(path, dpi=120)


def keep_memory() -> None:
    """On Linux, start this program again with settings that make malloc keep freed memory: 1.5 x faster on CPU."""
    if sys.platform == "linux" and not any(name in os.environ for name in KEEP_MEMORY):
        os.environ.update(KEEP_MEMORY)
        os.execv(sys.executable, [sys.executable, "-m", "experiments.train_demo_clip", *sys.argv[1:]])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=tuple(WORLDS), default="glyphs", help="what is learned")
    parser.add_argument("--sprites", type=Path, default=None, help="the drawings of the art world, if elsewhere")
    parser.add_argument(
        "--out", type=Path, default=Path("jaxzs-out/demo_clip"), help="folder for state, log and checkpoint"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        help="folder for the log and the curve, e.g. experiments/results/demo_clip",
    )
    parser.add_argument("--steps", type=int, default=None, help="the world's own number if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    options = parser.parse_args()
    keep_memory()
    world, recipe = WORLDS[options.world], Recipe()
    plan = world.plan._replace(seed=options.seed, steps=options.steps or world.plan.steps)
    if options.sprites is not None:
        plan = plan._replace(sprites=str(options.sprites))
    jax.config.update("jax_compilation_cache_dir", str((options.out / "compiled").absolute()))
    params, config, progress = train(options.out, plan, recipe, world, workers=options.workers)
    folder = options.out / "checkpoint"
    write_demo(folder, params, config, plan.size)
    command = "python -m experiments.train_demo_clip"
    run = training_facts(progress, params, command + (" --world art" if options.world == "art" else ""))
    world.write_card(folder, run)
    results = options.results or options.out
    results.mkdir(parents=True, exist_ok=True)
    write_record(
        results / "training.json",
        command=run["command"],
        settings={"plan": run["plan"], "recipe": run["recipe"]},
        metrics=run,
        seconds={"run": run["seconds"]},
    )
    (results / "log.json").write_text(json.dumps(progress["log"], indent=1))
    draw_curve(results / "loss.png", progress["log"])
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {run['images']:,} images in {run['seconds']:,} s")


if __name__ == "__main__":
    main()
