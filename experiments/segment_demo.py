"""Segmenting rendered scenes with the demo checkpoint: mIoU of patch argmax, CAM, + affinity, + CRF, patch scores.

    python experiments/segment_demo.py [--images 100] [--skip-existing]

The scenes come with true masks. Tags are those that TagCLIP finds, and, to tell its mistakes apart from those of the
masks, the true ones. Dense maps (SCLIP, NACLIP, MaskCLIP) need none.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the generator of the scenes lies beside this file

import jaxzs
from experiments.demo_world import Scenes, scenes
from experiments.demo_world.captions import BACKGROUND_NAMES, SHAPES
from experiments.patch_demo import FOUR_ORIGINS, RESULTS, WORLDS, scenes_entry, tag_all
from jaxzs import report
from jaxzs.patch import CRF, Batching, Dense, Segmenting, segment_dense
from jaxzs.patch.masks import pixel_labels, score_maps, segment_images
from jaxzs.patch.metrics import segmentation_report
from jaxzs.patch.overlay import write_mask_overlay
from jaxzs.patch.segmentation import enlarge
from jaxzs.patch.texts import tag_texts

NAMES = ["background", *SHAPES]
KEPT = {"reduced": False, "short_side": 144}  # the checkpoint's patches speak through residual and MLP
DENSE = {
    "dense, SCLIP": Dense(attention="csa", **KEPT),
    "dense, SCLIP + CRF": Dense(attention="csa", crf=CRF(), **KEPT),
    "dense, NACLIP with residual and MLP": Dense(attention="naclip", **KEPT),
    "dense, NACLIP": Dense(attention="naclip", short_side=144),
    "dense, MaskCLIP with residual and MLP": Dense(attention="v", **KEPT),
}
STEPS = (
    "CAM",
    "CAM + affinity",
    "CAM + affinity + CRF",
    "scores",
    "scores + CRF",
    "scores, 2 x 2 origins",
    "scores, 2 x 2 origins + CRF",
)


def patch_argmax(found: list, size: int) -> np.ndarray:
    """The best name of every pixel by coarse scores alone; every background name is background."""
    labels = []
    for tagged in found:
        best = enlarge(np.moveaxis(tagged.coarse, -1, 0), size, size).argmax(0)
        labels.append(np.where(best < len(SHAPES), best + 1, 0))
    return np.stack(labels)


def by_steps(
    model: jaxzs.Model, world: Scenes, found: list, tags: list[list[int]], texts: Any, sharpened: Segmenting
) -> dict[str, np.ndarray]:
    """Label maps [N,H,W] after each step: CLIP-ES, then the refined patch scores of the tags in its place."""
    F = len(SHAPES)
    masks = segment_images(model, world.images, tags, texts[:F], texts[F:], batching=Batching(batch_size=16))
    masks = sorted(masks, key=lambda mask: mask.number)
    steps: dict[str, list[np.ndarray]] = {name: [] for name in STEPS}
    of_origins = tag_all(model, world, texts, batching=FOUR_ORIGINS)
    for mask, tagged, finer, image in zip(masks, found, of_origins, world.images, strict=True):
        scores, fine = score_maps(tagged, mask.tags), score_maps(finer, mask.tags)
        steps["CAM"].append(pixel_labels(image, mask.activation, mask.tags))
        steps["CAM + affinity"].append(mask.labels)
        steps["CAM + affinity + CRF"].append(pixel_labels(image, mask.maps, mask.tags, sharpened))
        steps["scores"].append(pixel_labels(image, scores, mask.tags))
        steps["scores + CRF"].append(pixel_labels(image, scores, mask.tags, sharpened))
        steps["scores, 2 x 2 origins"].append(pixel_labels(image, fine, mask.tags))
        steps["scores, 2 x 2 origins + CRF"].append(pixel_labels(image, fine, mask.tags, sharpened))
    return {name: np.stack(labels) for name, labels in steps.items()}


def segmented(
    model: jaxzs.Model,
    world: Scenes,
    name: str,
    kind: str,
    texts: Any,
    sharpened: Segmenting,
    pictures: int,
    folder: Path,
) -> report.Results:
    """Figures of each step with tags of a kind, found or true; pictures of the last step."""
    found = tag_all(model, world, texts)
    tags = [np.flatnonzero(row).tolist() for row in world.tags]
    if kind == "found":
        tags = [np.flatnonzero(tagged.tags).tolist() for tagged in found]
    steps = by_steps(model, world, found, tags, texts, sharpened)
    if kind == "found":
        steps = {"patch argmax": patch_argmax(found, world.images.shape[1]), **steps}
    for number in range(pictures):
        write_mask_overlay(
            folder / f"scene_{number}_{kind}_tags.png",
            Image.fromarray(world.images[number]),
            steps["scores + CRF"][number],
            NAMES,
        )
    rows = {step: segmentation_report(labels, world.masks, NAMES) for step, labels in steps.items()}
    figures = [
        report.Figure(name, step, kind_of, 100 * row[key], f"{kind} tags")
        for step, row in rows.items()
        for kind_of, key in (("mIoU", "mIoU"), ("pixel accuracy", "pixel_accuracy"))
    ]
    return report.Results(rows, tuple(figures))


def without_tags(model: jaxzs.Model, world: Scenes, name: str, texts: Any) -> report.Results:
    """Figures of dense maps."""
    classes = [*range(len(SHAPES)), *[-1] * len(BACKGROUND_NAMES)]
    rows = {}
    for method, settings in DENSE.items():
        masks = segment_dense(model, world.images, texts, settings, classes=classes, batching=Batching(50))
        rows[method] = segmentation_report((mask.labels for mask in masks), world.masks, NAMES)
    return report.Results(rows, tuple(report.Figure(name, m, "mIoU", 100 * row["mIoU"]) for m, row in rows.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--images", type=int, default=100, help="scenes")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--crf-stride", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--skip-existing", action="store_true", help="keep cells of the record")
    arguments = parser.parse_args()
    model = jaxzs.load(arguments.model)
    name = "96 px, 3 to 5 objects"
    world = scenes(arguments.images, seed=arguments.seed, **WORLDS[name])
    texts = tag_texts(model, SHAPES, BACKGROUND_NAMES)
    sharpened = Segmenting(crf=CRF(stride=arguments.crf_stride))
    command = shlex.join(["python", "experiments/segment_demo.py", *sys.argv[1:]])
    sweep = report.Sweep(
        arguments.out / "segment_demo.json",
        command=command,
        settings={"images": arguments.images, "seed": arguments.seed, "crf": {"stride": arguments.crf_stride}},
        model=model,
        data=scenes_entry(name, world),
        skip_existing=arguments.skip_existing,
    )
    folder = arguments.out / "segment_demo"
    figures = {}
    for kind in ("found", "true"):
        compute = functools.partial(segmented, model, world, name, kind, texts, sharpened, arguments.pictures, folder)
        for step, row in sweep.cell(f"{kind} tags", compute).metrics.items():
            figures["none" if step == "patch argmax" else kind, step] = row
    for method, row in sweep.cell("no tags", lambda: without_tags(model, world, name, texts)).metrics.items():
        figures["none", method] = row
    sweep.finish()
    table = report.markdown_table(
        ["tags", "labels", "mIoU", "pixel accuracy"],
        [[kind, step, 100 * row["mIoU"], 100 * row["pixel_accuracy"]] for (kind, step), row in figures.items()],
        digits=1,
    )
    title = f"Segmenting {arguments.images} rendered scenes, {name}, %"
    print(f"{title}\n\n{table}")
    text = f"`{command}`\n\n{title}\n\n{table}\n"
    (arguments.out / "segment_demo.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
