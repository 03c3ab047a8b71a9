"""Tagging rendered scenes with the demo checkpoint: what each step of TagCLIP adds, and what the options do.

    python experiments/patch_demo.py [--images 300] [--skip-existing]

Scenes hold several coloured shapes on one of six backgrounds; the twelve shapes are the classes, backgrounds compete.
Scores, in the paper's order: the class token of the whole image ("global"), the best patch ("coarse"), after
dual-masking refinement ("+ DMAR"), after class-wise re-identification ("+ CWR"). The image sizes beyond the
checkpoint's 48 pixels are not resized to it. Then why CWR helps or hurts here: `second_looks.py`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the generator of the scenes lies beside this file

import jaxzs
from experiments import second_looks
from experiments.demo_world import Scenes, scenes
from experiments.demo_world.captions import BACKGROUND_NAMES, SHAPES
from jaxzs import report
from jaxzs.commands.demo import whole_image_scores
from jaxzs.patch import Batching, Tagging, encoded_patches, learn_patch_classifier, tag_images, tag_images_with
from jaxzs.patch.metrics import calibrate_thresholds, tag_report
from jaxzs.patch.overlay import write_overlay
from jaxzs.patch.texts import tag_texts

RESULTS = Path(__file__).parent / "results"
WORLDS = {  # image size -> objects in a scene
    "48 px, 1 to 3 objects": {"size": 48, "min_objects": 1, "max_objects": 3},
    "96 px, 3 to 5 objects": {"size": 96, "min_objects": 3, "max_objects": 5},
    "128 px, 3 to 5 objects": {"size": 128, "min_objects": 3, "max_objects": 5},
}
FOUR_ORIGINS = Batching(batch_size=16, offsets=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "the paper": {},
    "boxes reach the border": {"settings": Tagging(keep_border=True)},
    "attention renormalised": {"settings": Tagging(renormalize=True)},
    "both": {"settings": Tagging(keep_border=True, renormalize=True)},
    "two scales (1, 1.5)": {"batching": Batching(batch_size=16, scales=(1.0, 1.5))},
    "2 x 2 origins": {"batching": FOUR_ORIGINS},
}


LOOKS = """looks: how many second looks; enlarged: median of what crops are enlarged by; objects: shapes with a tenth of
their pixels in the crop; p: probability of the class in its crop, where it is truly there and where it is not; true
above false: how often the former is the higher of a pair."""


def relative_tags(scores: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Tags by the rule of the paper, for scores [N,F] that do not come from `tag`."""
    lowest, highest = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
    return scores > lowest + threshold * (highest - lowest)


def global_scores(model: jaxzs.Model, world: Scenes, texts: jnp.ndarray) -> np.ndarray:
    """Probability of each name from the class token of the whole image, at its own size like everything else."""
    blocks = [world.images[start : start + 50] for start in range(0, len(world.images), 50)]
    return np.concatenate([whole_image_scores(model, block, texts) for block in blocks])[:, : len(world.names)]


def tag_all(model: jaxzs.Model, world: Scenes, texts: jnp.ndarray, **options) -> list:
    """`ImageTags` of every scene, in order."""
    options = {"batching": Batching(batch_size=16), **options}
    found = tag_images(model, world.images, texts, num_foreground=len(world.names), **options)
    return sorted(found, key=lambda tagged: tagged.number)


def figures(scores: np.ndarray, tags: np.ndarray, world: Scenes) -> dict[str, Any]:
    return tag_report(scores, tags, world.tags, world.names)


def ablation(
    model: jaxzs.Model, world: Scenes, texts: jnp.ndarray, settings: Tagging | None = None
) -> dict[str, dict[str, Any]]:
    """The paper's ablation: figures of each kind of score."""
    found = tag_all(model, world, texts, settings=settings or Tagging())
    F = len(world.names)
    steps = {
        "global": global_scores(model, world, texts),
        "coarse": np.stack([tagged.coarse[..., :F].max((0, 1)) for tagged in found]),
        "+ DMAR": np.stack([tagged.refined[..., :F].max((0, 1)) for tagged in found]),
        "+ CWR": np.stack([tagged.scores for tagged in found]),
    }
    return {name: figures(scores, relative_tags(scores), world) for name, scores in steps.items()}


def options_table(model: jaxzs.Model, world: Scenes, held_out: Scenes, texts: jnp.ndarray) -> dict[str, dict[str, Any]]:
    """What the options beyond the paper do; thresholds are calibrated on other scenes, which are labelled."""
    rows = {}
    for name, options in OPTIONS.items():
        found = tag_all(model, world, texts, **options)
        scores, tags = (np.stack([getattr(t, key) for t in found]) for key in ("scores", "tags"))
        rows[name] = figures(scores, tags, world)
    calibrating = np.stack([tagged.scores for tagged in tag_all(model, held_out, texts)])
    thresholds = calibrate_thresholds(calibrating, held_out.tags)
    found = tag_all(model, world, texts, settings=Tagging(tag_threshold=thresholds))
    scores, tags = (np.stack([getattr(t, key) for t in found]) for key in ("scores", "tags"))
    rows["calibrated thresholds"] = figures(scores, tags, world)
    return rows


def learned(model: jaxzs.Model, world: Scenes, others: Scenes, texts: jnp.ndarray) -> dict[str, dict[str, Any]]:
    """A patch classifier (PIAA) from other scenes without labels, or from the same, made 48 px or at their own size."""
    rows = {}
    for size, side in (("48 px", model.config.vision.image_size), ("own size", world.images.shape[1])):
        grid = side // model.config.vision.patch_size, side // model.config.vision.patch_size
        encoded = {"the same scenes": world, "other scenes": others}
        batches = {name: list(encoded_patches(model, some.images, side=side)) for name, some in encoded.items()}
        for name, own in batches.items():
            classifier = learn_patch_classifier((batch.patches[: len(batch.numbers)] for batch in own), texts)
            found = list(tag_images_with(classifier, batches["the same scenes"], grid, num_foreground=len(SHAPES)))
            scores, tags = (np.stack([getattr(t, key) for t in found]) for key in ("scores", "tags"))
            rows[f"{size}, learned from {name}"] = figures(scores, tags, world)
    return rows


def looks_table(model: jaxzs.Model, world: Scenes, texts: jnp.ndarray) -> dict[str, dict[str, Any]]:
    """Re-identification through other crops than the paper's."""
    return second_looks.explained(model, world, texts, tag_all(model, world, texts))


def write_pictures(model: jaxzs.Model, texts: jnp.ndarray, folder: Path, num: int, seed: int) -> None:
    """Overlays of the first scenes of the 128 pixel world, whatever they show."""
    world = scenes(num, seed=seed, **WORLDS["128 px, 3 to 5 objects"])
    for tagged, pixels in zip(tag_all(model, world, texts), world.images, strict=True):
        write_overlay(folder / f"scene_{tagged.number}.png", Image.fromarray(pixels), tagged, SHAPES)
        truth = [name for name, there in zip(SHAPES, world.tags[tagged.number], strict=True) if there]
        named = [name for name, there in zip(SHAPES, tagged.tags, strict=True) if there]
        print(f"scene {tagged.number}: true {', '.join(truth)}; tagged {', '.join(named)}")


def scenes_entry(name: str, world: Scenes) -> dict[str, Any]:
    """What a record says of some scenes."""
    digest = hashlib.sha256(np.ascontiguousarray(world.images))
    digest.update(np.ascontiguousarray(world.tags))
    return report.data_entry(name, digest.hexdigest(), len(world.images))


def as_results(name: str, rows: dict[str, dict[str, Any]]) -> report.Results:
    """Metrics and figures of some methods on some scenes."""
    figures = [
        report.Figure(name, method, kind, 100 * value)
        for method, row in rows.items()
        for kind, value in (("mAP", row["mAP"]), ("F1", row.get("f1_overall", {}).get("f1")))
        if value is not None
    ]
    return report.Results(rows, tuple(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--images", type=int, default=300, help="scenes of each world")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of tables and pictures")
    parser.add_argument("--skip-existing", action="store_true", help="keep worlds of the record")
    arguments = parser.parse_args()
    model = jaxzs.load(arguments.model)
    texts = tag_texts(model, SHAPES, BACKGROUND_NAMES)
    worlds = {name: scenes(arguments.images, seed=arguments.seed, **options) for name, options in WORLDS.items()}
    command = shlex.join(["python", "experiments/patch_demo.py", *sys.argv[1:]])
    sweep = report.Sweep(
        arguments.out / "patch_demo.json",
        command=command,
        settings={"images": arguments.images, "seed": arguments.seed},
        model=model,
        skip_existing=arguments.skip_existing,
    )

    def run(key: str, name: str, compute: Any, *given: Any) -> dict[str, dict[str, Any]]:
        call = functools.partial(compute, model, *given, texts)
        entry = scenes_entry(name, worlds[name])
        return dict(sweep.cell(key, lambda: as_results(name, call()), data=entry).metrics)

    steps = {name: run(f"ablation, {name}", name, ablation, world) for name, world in worlds.items()}
    middle = "96 px, 3 to 5 objects"
    held_out = scenes(arguments.images, seed=arguments.seed + 1, **WORLDS[middle])
    options = run(f"options, {middle}", middle, options_table, worlds[middle], held_out)
    taught = {
        name: run(
            f"learned, {name}", name, learned, world, scenes(arguments.images, seed=arguments.seed + 1, **WORLDS[name])
        )
        for name, world in worlds.items()
    }
    looked = {name: run(f"second looks, {name}", name, looks_table, worlds[name]) for name in list(worlds)[:2]}
    sweep.finish(report.Results({"ablation": steps, "options": options, "learned": taught, "second looks": looked}))
    write_pictures(model, texts, arguments.out / "patch_demo", arguments.pictures, arguments.seed)

    header = ["scenes", *next(iter(steps.values()))]
    percent = lambda figure: 100 * figure  # noqa: E731
    text = "\n\n".join(
        [
            f"Tagging rendered scenes, {arguments.images} of each size: mAP, %",
            report.markdown_table(
                header, [[n, *(percent(r["mAP"]) for r in rows.values())] for n, rows in steps.items()], digits=1
            ),
            "F1 (overall) at the relative threshold 0.5, %",
            report.markdown_table(
                header,
                [[n, *(percent(r["f1_overall"]["f1"]) for r in rows.values())] for n, rows in steps.items()],
                digits=1,
            ),
            f"Options that are not in the paper, {middle}, %",
            report.markdown_table(
                ["option", "mAP", "F1", "precision", "recall", "tags an image"],
                [
                    [
                        name,
                        percent(row["mAP"]),
                        *(percent(row["f1_overall"][k]) for k in ("f1", "precision", "recall")),
                        row["tags_per_image"],
                    ]
                    for name, row in options.items()
                ],
                digits=1,
            ),
            "Tags by a classifier of patches that was learned without labels (PIAA): mAP, %",
            report.markdown_table(
                ["scenes", *next(iter(taught.values()))],
                [[n, *(percent(r["mAP"]) for r in rows.values())] for n, rows in taught.items()],
                digits=1,
            ),
            *(
                f"Second looks (CWR) through other crops, {n}\n\n{second_looks.table(rows)}"
                for n, rows in looked.items()
            ),
            LOOKS,
        ]
    )
    print(text)
    (arguments.out / "patch_demo.md").write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
