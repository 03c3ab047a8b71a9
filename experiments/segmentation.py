"""Masks of photographs on the published benchmarks, with the published figures beside.

Masks without tags, by another attention in the last layer (NACLIP, SCLIP, ClearCLIP, MaskCLIP), on VOC21 and VOC20,
PASCAL Context 60 and 59, COCO-Object, COCO-Stuff 171, ADE20K and Cityscapes as they lie on disk (`dense_protocols.py`):

    python experiments/segmentation.py --dataset voc21 --root VOCdevkit/VOC2012 --method NACLIP \\
        --model openai/clip-vit-base-patch16

Classify-then-segment on VOC2012, COCO 2017 and COCO-Stuff 27:

    python experiments/segmentation.py --dataset voc2012 --images JPEGImages --masks SegmentationClass \\
        --model openai/clip-vit-base-patch16

MASKS holds a label image for each image: VOC has 0 background, c + 1 class c, 255 void; the like for the 80 of COCO; or
COCO-Stuff's ids 0 to 181, which are grouped into 27. Tags are found by TagCLIP; --true-tags takes them from the masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import jaxzs
from jaxzs import report
from jaxzs.data import DatasetInfo, dataset_info, open_image
from jaxzs.errors import DataError
from jaxzs.files import cache_folder
from jaxzs.patch import CRF, Batching, Segmenting, Tagging, default_affinity_layers, default_attention_layers
from jaxzs.patch.images import tag_images
from jaxzs.patch.masks import segment_images
from jaxzs.patch.metrics import segmentation_report
from jaxzs.patch.texts import tag_texts
from jaxzs.report.published import published_values

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file
from experiments.dense_protocols import METHODS, PROTOCOLS, Pair, Protocol, dense_masks, read_truth
from experiments.patch_classification import images_entry

CLIP_ES_TEMPLATE = "a clean origami {}."


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the original does for one data set, how many images it has, and its name in published tables."""

    images: int
    box_threshold: float
    last_layer: bool
    name: str
    stuff: bool = False


SETTINGS = {
    "voc2012": Setting(1449, 0.4, False, "voc2012"),
    "coco2017": Setting(4952, 0.7, True, "coco2017"),
    "coco_stuff": Setting(4172, 0.7, True, "coco_stuff27", stuff=True),
}


def group_of_ids(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """COCO-Stuff's 182 ids -> 27 groups, 255 for everything else: [256]."""
    table = np.full(256, 255)
    for group, members in enumerate(groups):
        table[list(members)] = group
    return table


def tags_of(
    model: jaxzs.Model,
    info: DatasetInfo,
    setting: Setting,
    pairs: Sequence[Pair],
    truth: Sequence[np.ndarray],
    options: argparse.Namespace,
) -> dict[int, list[int]]:
    """Classes of each image: those of its mask, or those that TagCLIP finds."""
    F = info.num_classes
    if options.true_tags:
        ids = np.asarray(info.label_ids if setting.stuff else np.arange(1, F + 1))
        return {number: np.flatnonzero(np.isin(ids, np.unique(mask))).tolist() for number, mask in enumerate(truth)}
    texts = tag_texts(model, info.class_names, info.background_names, info.templates, cache=cache_folder())
    depth = model.config.vision.num_hidden_layers
    found = tag_images(
        model,
        (open_image(path) for path, _ in pairs),
        texts,
        Tagging(
            attention_layers=default_attention_layers(depth, "all" if setting.stuff else "last"),
            relative_threshold=0.1 if setting.stuff else 0.5,
            exact=True,
        ),
        num_foreground=F,
        batching=Batching(options.batch),
    )
    return {
        tagged.number: np.flatnonzero(tagged.tags).tolist()
        for tagged in tqdm(found, total=len(pairs), unit="image", desc="tags", disable=None)
    }


def segment_all(
    model: jaxzs.Model, info: DatasetInfo, setting: Setting, pairs: Sequence[Pair], options: argparse.Namespace
) -> report.Results:
    """Masks of all images, and how they compare with the true ones."""
    truth = [np.asarray(Image.open(mask)) for _, mask in pairs]
    tags = tags_of(model, info, setting, pairs, truth, options)
    depth, F = model.config.vision.num_hidden_layers, info.num_classes
    renamed = info.renamed("clip_es")
    others = ("background",) if setting.stuff else info.background_names
    template = (CLIP_ES_TEMPLATE,)
    texts = tag_texts(model, renamed.class_names, others, template, cache=cache_folder())
    masks = segment_images(
        model,
        (open_image(path) for path, _ in pairs),
        tags,
        texts[:F],
        texts[F:],
        Segmenting(
            background=not setting.stuff,
            crf=CRF(stride=options.crf_stride) if options.crf else None,
            box_threshold=setting.box_threshold,
            affinity_layers=default_affinity_layers(depth, last=setting.last_layer),
            exact=True,
        ),
        batching=Batching(options.batch),
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
    method, protocol = "CLS-SEG" + " + CRF" * options.crf, "found tags"
    if options.true_tags:
        protocol = "true tags"
    return report.Results(
        figures,
        (
            report.Figure(setting.name, method, "mIoU", 100 * figures["mIoU"], protocol),
            report.Figure(setting.name, method, "pixel accuracy", 100 * figures["pixel_accuracy"], protocol),
        ),
    )


def segment_densely(
    model: jaxzs.Model, protocol: Protocol, pairs: Sequence[Pair], options: argparse.Namespace
) -> report.Results:
    """Masks without tags of all photos, compared with the true ones as they come."""
    photos = [photo for photo, _ in pairs]
    predicted, compared = itertools.tee(
        dense_masks(
            model, protocol, options.method, photos, batch=options.batch, pamr=options.pamr, bfloat16=options.bfloat16
        )
    )
    truth = (read_truth(protocol, path, mask.shape) for (_, path), mask in zip(pairs, compared, strict=True))
    bar = tqdm(predicted, total=len(pairs), unit="image", desc="masks", disable=None)
    names = ["background"] * protocol.background + list(protocol.info().class_names)
    figures = segmentation_report(bar, truth, names)
    extra = f"PAMR {options.pamr}" if options.pamr else ""
    shown = (("mIoU", figures["mIoU"]), ("pixel accuracy", figures["pixel_accuracy"]))
    return report.Results(
        figures,
        tuple(report.Figure(options.dataset, options.method, name, 100 * value, extra) for name, value in shown),
    )


def find_pairs(options: argparse.Namespace) -> list[Pair]:
    """Photos and masks. Raises `DataError` naming the first that is missing."""
    if options.dataset in PROTOCOLS:
        pairs = PROTOCOLS[options.dataset].pairs(options.root)[: options.limit]
        if missing := [path for pair in pairs for path in pair if not path.exists()]:
            raise DataError(f"{len(missing)} of {2 * len(pairs)} files are missing, e.g. {missing[0]}")
        return pairs
    pairs = sorted(
        (path, options.masks / f"{path.stem}.png")
        for path in options.images.iterdir()
        if (options.masks / f"{path.stem}.png").exists()
    )[: options.limit]
    if not pairs:
        raise DataError(f"no image of {options.images} has a mask of its name in {options.masks}")
    return pairs


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with those that the data set needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", choices=[*PROTOCOLS, *SETTINGS], required=True)
    parser.add_argument("--model", default="openai/clip-vit-base-patch16")
    parser.add_argument("--batch", type=int, default=8, help="images at a time; without tags, windows")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, help="file of the record, .json")
    parser.add_argument("--skip-existing", action="store_true", help="keep the record in --out")
    dense = parser.add_argument_group(f"masks without tags: {', '.join(PROTOCOLS)}")
    dense.add_argument("--root", type=Path, help="folder of the data set, e.g. VOC2012, ADEChallengeData2016")
    dense.add_argument("--method", choices=METHODS, default="NACLIP")
    dense.add_argument("--pamr", type=int, default=0, help="steps of refinement; NACLIP's own figures have 10")
    dense.add_argument("--bfloat16", action="store_true")
    tagged = parser.add_argument_group(f"from tags: {', '.join(SETTINGS)}")
    tagged.add_argument("--images", type=Path)
    tagged.add_argument("--masks", type=Path)
    tagged.add_argument("--true-tags", action="store_true")
    tagged.add_argument("--crf", action="store_true")
    tagged.add_argument("--crf-stride", type=int, default=1)
    options = parser.parse_args(arguments)
    needed = ("root",) if options.dataset in PROTOCOLS else ("images", "masks")
    if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
        parser.error(f"--dataset {options.dataset} needs {' and '.join(missing)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    pairs = find_pairs(options)
    model = jaxzs.load(options.model)
    if options.dataset in PROTOCOLS:
        protocol = PROTOCOLS[options.dataset]
        name, title, images = options.dataset, f"{options.dataset}, {options.method}", protocol.images
        settings: dict[str, Any] = {"names": protocol.info().digest, "method": options.method, "pamr": options.pamr}
        measure = functools.partial(segment_densely, model, protocol, pairs, options)
    else:
        setting, info = SETTINGS[options.dataset], dataset_info(options.dataset)
        tagging = "true tags" if options.true_tags else "TagCLIP's tags"
        name, title, images = setting.name, f"{info.title}, {tagging}", setting.images
        settings = {"names": info.digest, "true_tags": options.true_tags}
        settings |= {"crf": options.crf and {"stride": options.crf_stride}}
        measure = functools.partial(segment_all, model, info, setting, pairs, options)
    sweep = report.Sweep(
        options.out,
        command=shlex.join(
            ["python", "experiments/segmentation.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        settings={"dataset": options.dataset, **settings},
        model=model,
        data=images_entry(name, [path for path, _ in pairs], [mask.stat().st_size for _, mask in pairs]),
        skip_existing=options.skip_existing,
    )
    found = sweep.cell("masks", measure)
    seconds = sum(sweep.finish()["seconds"].values())
    print(f"{title}: {len(pairs)} of {images or 'all'} images, {seconds:.0f} s")
    published = published_values(name)
    rows = [[one.figure, one.value, published.get((one.method, one.figure, one.protocol), "")] for one in found.figures]
    print(report.markdown_table(["figure, %", "measured", "published"], rows))
    if options.limit is not None or images not in (None, len(pairs)):
        print("note: not the full list of images; the published figures are for all of them")
    if options.dataset in PROTOCOLS:
        others = [" ".join([*filter(None, key), str(value)]) for key, value in published.items()]
        print(f"published: {', '.join(others)}")


if __name__ == "__main__":
    main()
