"""Classify-then-segment on VOC2012, COCO 2017 and COCO-Stuff 27, with the published figures beside.

    python experiments/segmentation.py --dataset voc2012 --images JPEGImages --masks SegmentationClass \\
        --model openai/clip-vit-base-patch16

MASKS holds a label image for each image: VOC has 0 background, c + 1 class c, 255 void; the like for the 80 of COCO; or
COCO-Stuff's ids 0 to 181, which are grouped into 27. Tags are found by TagCLIP; --true-tags takes them from the masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import jaxzs
from jaxzs import report
from jaxzs.data import dataset_info, open_image
from jaxzs.errors import DataError
from jaxzs.patch import Batching, default_attention_layers, tag_images
from jaxzs.patch.masks import segment_images
from jaxzs.patch.metrics import segmentation_report
from jaxzs.patch.segmentation import default_affinity_layers
from jaxzs.patch.texts import default_cache, tag_texts

CLIP_ES_TEMPLATE = "a clean origami {}."


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the original does for one data set. published: mIoU without and with CRF, of the paper."""

    images: int
    box_threshold: float
    last_layer: bool
    published: tuple[float, float]
    stuff: bool = False


SETTINGS = {
    "voc2012": Setting(1449, 0.4, False, (64.8, 68.7)),
    "coco2017": Setting(4952, 0.7, True, (34.0, 35.3)),
    "coco_stuff": Setting(4172, 0.7, True, (30.1, 31.0), stuff=True),
}


def group_of_ids(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """COCO-Stuff's 182 ids -> 27 groups, 255 for everything else: [256]."""
    table = np.full(256, 255)
    for group, members in enumerate(groups):
        table[list(members)] = group
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dataset", choices=SETTINGS, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--model", default="openai/clip-vit-base-patch16")
    parser.add_argument("--true-tags", action="store_true")
    parser.add_argument("--crf", action="store_true")
    parser.add_argument("--crf-stride", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    setting, info = SETTINGS[options.dataset], dataset_info(options.dataset)
    pairs = sorted(
        (path, options.masks / f"{path.stem}.png")
        for path in options.images.iterdir()
        if (options.masks / f"{path.stem}.png").exists()
    )[: options.limit]
    if not pairs:
        raise DataError(f"no image of {options.images} has a mask of its name in {options.masks}")
    model, start = jaxzs.load(options.model), time.perf_counter()
    depth, F = model.config.vision.num_hidden_layers, info.num_classes
    truth = [np.asarray(Image.open(mask)) for _, mask in pairs]
    batching = Batching(options.batch)

    def photos() -> Any:
        return (open_image(path) for path, _ in pairs)

    if options.true_tags:
        ids = np.asarray(info.label_ids if setting.stuff else np.arange(1, F + 1))
        tags = {
            number: np.flatnonzero(np.isin(ids, np.unique(mask))).tolist()
            for number, mask in enumerate(truth)
        }
    else:
        texts = tag_texts(
            model, info.class_names, info.background_names, info.templates, cache=default_cache()
        )
        found = tag_images(
            model,
            photos(),
            texts,
            num_foreground=F,
            batching=batching,
            attention_layers=default_attention_layers(depth, "all" if setting.stuff else "last"),
            relative_threshold=0.1 if setting.stuff else 0.5,
            exact=True,
        )
        tags = {
            tagged.number: np.flatnonzero(tagged.tags).tolist()
            for tagged in tqdm(found, total=len(pairs), unit="image", desc="tags", disable=None)
        }
    renamed = info.renamed("clip_es")
    others = ("background",) if setting.stuff else info.background_names
    template = (CLIP_ES_TEMPLATE,)
    texts = tag_texts(model, renamed.class_names, others, template, cache=default_cache())
    masks = segment_images(
        model,
        photos(),
        tags,
        texts[:F],
        texts[F:],
        background=not setting.stuff,
        crf={"stride": options.crf_stride} if options.crf else None,
        batching=batching,
        box_threshold=setting.box_threshold,
        affinity_layers=default_affinity_layers(depth, last=setting.last_layer),
        exact=True,
    )
    predicted: list[Any] = [None] * len(pairs)
    for mask in tqdm(masks, total=len(pairs), unit="image", desc="masks", disable=None):
        predicted[mask.number] = mask.labels
    names: Sequence[str] = ["background", *info.class_names]
    if setting.stuff:
        coarse = dataset_info("coco_stuff27")
        assert coarse.groups is not None
        table = group_of_ids(coarse.groups)
        fine = table[np.asarray(info.label_ids)]
        names, predicted = coarse.class_names, [fine[labels] for labels in predicted]
        truth = [table[mask] for mask in truth]
    figures = segmentation_report(predicted, truth, names)
    seconds = time.perf_counter() - start
    tagging = "true tags" if options.true_tags else "TagCLIP's tags"
    print(f"{info.title}: {len(pairs)} of {setting.images} images, {tagging}, {seconds:.0f} s")
    published = "" if options.true_tags else setting.published[options.crf]
    rows = [["mIoU", 100 * figures["mIoU"], published]]
    rows.append(["pixel accuracy", 100 * figures["pixel_accuracy"], ""])
    print(report.markdown_table(["figure, %", "measured", "published"], rows))
    if options.out is not None:
        report.write_record(
            options.out,
            command=shlex.join(["python", "experiments/segmentation.py", *sys.argv[1:]]),
            settings={"dataset": options.dataset, "model": model.fingerprint, "crf": options.crf},
            metrics={**figures, "published": setting.published},
            seconds={"all": seconds},
        )


if __name__ == "__main__":
    main()
