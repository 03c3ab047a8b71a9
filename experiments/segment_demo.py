"""Segmenting rendered scenes with the demo checkpoint: mIoU of patch argmax, CAM, + affinity, + CRF, patch scores.

    python experiments/segment_demo.py [--images 100]

The scenes come with true masks. Tags are those that TagCLIP finds, and, to tell its mistakes apart from those of the
masks, the true ones.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # the generator of the scenes lies beside this file

import jaxzs
from experiments.demo_world import Scenes, scenes
from experiments.demo_world.captions import BACKGROUND_NAMES, SHAPES
from experiments.patch_demo import RESULTS, WORLDS, tag_all
from jaxzs import report
from jaxzs.patch import Batching
from jaxzs.patch.masks import pixel_labels, score_maps, segment_images
from jaxzs.patch.metrics import segmentation_report
from jaxzs.patch.overlay import write_mask_overlay
from jaxzs.patch.segmentation import enlarge
from jaxzs.patch.texts import tag_texts

NAMES = ["background", *SHAPES]
STEPS = ("CAM", "CAM + affinity", "CAM + affinity + CRF", "scores", "scores + CRF")


def patch_argmax(found: list, size: int) -> np.ndarray:
    """The best name of every pixel by coarse scores alone; every background name is background."""
    labels = []
    for tagged in found:
        best = enlarge(np.moveaxis(tagged.coarse, -1, 0), size, size).argmax(0)
        labels.append(np.where(best < len(SHAPES), best + 1, 0))
    return np.stack(labels)


def by_steps(
    model: jaxzs.Model,
    world: Scenes,
    found: list,
    tags: list[list[int]],
    texts: Any,
    crf: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Label maps [N,H,W] after each step: CLIP-ES, then the refined patch scores of the tags in its place."""
    F = len(SHAPES)
    masks = segment_images(
        model, world.images, tags, texts[:F], texts[F:], batching=Batching(batch_size=16)
    )
    masks = sorted(masks, key=lambda mask: mask.number)
    steps: dict[str, list[np.ndarray]] = {name: [] for name in STEPS}
    for mask, tagged, image in zip(masks, found, world.images, strict=True):
        scores = score_maps(tagged, mask.tags)
        steps["CAM"].append(pixel_labels(image, mask.activation, mask.tags))
        steps["CAM + affinity"].append(mask.labels)
        steps["CAM + affinity + CRF"].append(pixel_labels(image, mask.maps, mask.tags, crf=crf))
        steps["scores"].append(pixel_labels(image, scores, mask.tags))
        steps["scores + CRF"].append(pixel_labels(image, scores, mask.tags, crf=crf))
    return {name: np.stack(labels) for name, labels in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--images", type=int, default=100, help="scenes")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--crf-stride", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    model = jaxzs.load(arguments.model)
    world = scenes(arguments.images, seed=arguments.seed, **WORLDS["96 px, 3 to 5 objects"])
    texts = tag_texts(model, SHAPES, BACKGROUND_NAMES)
    found = tag_all(model, world, texts)
    tags = {
        "found": [np.flatnonzero(tagged.tags).tolist() for tagged in found],
        "true": [np.flatnonzero(row).tolist() for row in world.tags],
    }
    figures = {
        ("none", "patch argmax"): segmentation_report(patch_argmax(found, 96), world.masks, NAMES)
    }
    crf = {"stride": arguments.crf_stride}
    for kind, of_images in tags.items():
        for step, labels in by_steps(model, world, found, of_images, texts, crf).items():
            figures[kind, step] = segmentation_report(labels, world.masks, NAMES)
            if step != "scores + CRF":
                continue
            for number in range(arguments.pictures):
                write_mask_overlay(
                    arguments.out / "segment_demo" / f"scene_{number}_{kind}_tags.png",
                    Image.fromarray(world.images[number]),
                    labels[number],
                    NAMES,
                )
    table = report.markdown_table(
        ["tags", "labels", "mIoU", "pixel accuracy"],
        [
            [kind, step, 100 * row["mIoU"], 100 * row["pixel_accuracy"]]
            for (kind, step), row in figures.items()
        ],
        digits=1,
    )
    title = f"Segmenting {arguments.images} rendered scenes, 96 px, 3 to 5 objects, %"
    print(f"{title}\n\n{table}")
    command = shlex.join(["python", "experiments/segment_demo.py", *sys.argv[1:]])
    text = f"`{command}`\n\n{title}\n\n{table}\n"
    (arguments.out / "segment_demo.md").write_text(text, encoding="utf-8")
    report.write_record(
        arguments.out / "segment_demo.json",
        command=command,
        settings={"images": arguments.images, "crf": crf, "model": model.fingerprint},
        metrics={f"{kind} tags, {step}": row for (kind, step), row in figures.items()},
        seconds={"all": time.perf_counter() - start},
    )


if __name__ == "__main__":
    main()
