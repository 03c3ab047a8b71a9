"""TagCLIP's settings on VOC2007, VOC2012, COCO 2014 and 2017, COCO-Stuff, with the published figures beside.

    python experiments/patch_classification.py --dataset voc2007 --images JPEGImages --labels labels.txt \\
        --model openai/clip-vit-base-patch16

LABELS names the images and what is on them: a text file with "id class class ..." a line (class numbers as the data
set's label files have them, COCO-Stuff 0 to 181), or a CSV file with the columns id and class_ids. Published figures
are for CLIP ViT-B/16 and the full lists of images; with other weights or fewer images they are not comparable.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxzs
from jaxzs import report
from jaxzs.clip import Numerics
from jaxzs.data import DatasetInfo, dataset_info, open_image
from jaxzs.errors import DataError, LabelError
from jaxzs.files import cache_folder
from jaxzs.patch import Batching, Tagging, default_attention_layers, tag_images
from jaxzs.patch.metrics import tag_report
from jaxzs.patch.texts import tag_texts
from jaxzs.report.published import published_values


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the original does for one data set, and how many images it has."""

    images: int
    attention: str = "last"
    relative_threshold: float = 0.5


SETTINGS = {
    "voc2007": Setting(4952),
    "voc2012": Setting(1449),
    "coco2014": Setting(40137),
    "coco2017": Setting(4952),
    "coco_stuff": Setting(4172, "all", 0.1),
}
SUFFIXES = (".jpg", ".jpeg", ".png")


def read_labels(path: Path, label_ids: Sequence[int] | None, num_classes: int) -> dict[str, list[int]]:
    """Image id -> class indices. label_ids: numbers of the classes in the file, where they are not 0 to C-1."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            lines = [[row["id"], *row["class_ids"].split()] for row in csv.DictReader(file)]
    else:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    index = {number: place for place, number in enumerate(label_ids or range(num_classes))}
    labels = {}
    for name, *numbers in lines:
        unknown = [number for number in numbers if int(number) not in index]
        if unknown:
            raise LabelError(f"{path}: image {name} has class number {unknown[0]}, which is not known")
        labels[Path(name).stem] = [index[int(number)] for number in numbers]
    if not labels:
        raise DataError(f"{path} names no images")
    return labels


def find_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The image file of each id. Raises `DataError` naming the first that is missing."""
    files = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    missing = [name for name in names if name not in files]
    if missing:
        raise DataError(f"{len(missing)} of {len(names)} images are not in {folder}, e.g. {missing[0]}")
    return [files[name] for name in names]


def images_entry(name: str, paths: Sequence[Path], labels: object) -> dict[str, Any]:
    """What a record says of image files: their names and sizes, and the labels, make the fingerprint."""
    listed = [[path.name, path.stat().st_size] for path in paths]
    digest = hashlib.sha256(json.dumps([listed, labels]).encode()).hexdigest()
    return report.data_entry(name, digest, len(paths))


def tag_all(
    model: jaxzs.Model,
    info: DatasetInfo,
    setting: Setting,
    paths: Sequence[Path],
    truth: np.ndarray,
    options: argparse.Namespace,
) -> report.Results:
    """Tags of all images, and how they compare with the truth [N,F]."""
    texts = tag_texts(model, info.class_names, info.background_names, info.templates, cache=cache_folder())
    scores = np.zeros(truth.shape, np.float32)
    tags = np.zeros(truth.shape, bool)
    found = tag_images(
        model,
        map(open_image, paths),
        texts,
        Tagging(
            attention_layers=default_attention_layers(model.config.vision.num_hidden_layers, setting.attention),
            relative_threshold=setting.relative_threshold,
            exact=not options.padded,
        ),
        num_foreground=info.num_classes,
        batching=Batching(options.batch),
        numerics=Numerics(jnp.bfloat16 if options.bfloat16 else None),
    )
    for tagged in tqdm(found, total=len(paths), unit="image", disable=None):
        scores[tagged.number], tags[tagged.number] = tagged.scores, tagged.tags
    figures = tag_report(scores, tags, truth, info.class_names)
    overall = figures["f1_overall"]
    measured = {"mAP": figures["mAP"], "mAP of classes present": figures["mAP_sklearn"]}
    measured |= {"F1": overall["f1"], "precision": overall["precision"], "recall": overall["recall"]}
    return report.Results(
        figures, tuple(report.Figure(options.dataset, "TagCLIP", name, 100 * value) for name, value in measured.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", choices=SETTINGS, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of image files")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--model", default="openai/clip-vit-base-patch16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="take only so many images")
    parser.add_argument("--padded", action="store_true", help="pad to few shapes; default: exact")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--out", type=Path, help="file of the record, .json")
    parser.add_argument("--skip-existing", action="store_true", help="keep the record in --out")
    options = parser.parse_args()

    setting, info = SETTINGS[options.dataset], dataset_info(options.dataset)
    labels = read_labels(options.labels, info.label_ids, info.num_classes)
    names = list(labels)[: options.limit]
    paths = find_files(options.images, names)
    truth = np.zeros((len(names), info.num_classes), int)
    for row, name in enumerate(names):
        truth[row, labels[name]] = 1
    model = jaxzs.load(options.model)
    sweep = report.Sweep(
        options.out,
        command=shlex.join(["python", "experiments/patch_classification.py", *sys.argv[1:]]),
        settings={
            "dataset": options.dataset,
            "names": info.digest,
            "padded": options.padded,
            "bfloat16": options.bfloat16,
        },
        model=model,
        data=images_entry(options.dataset, paths, [labels[name] for name in names]),
        skip_existing=options.skip_existing,
    )
    found = sweep.cell("tags", lambda: tag_all(model, info, setting, paths, truth, options))
    record = sweep.finish()
    published = published_values(options.dataset)
    rows = [[one.figure, one.value, published.get((one.method, one.figure, one.protocol), "")] for one in found.figures]
    seconds = sum(record["seconds"].values())
    print(f"{info.title}: {len(paths)} of {setting.images} images, {options.model}, {seconds:.0f} s")
    print(report.markdown_table(["figure, %", "measured", "published"], rows))
    if len(paths) != setting.images:
        print("note: not the full list of images; the published figures are for all of them")


if __name__ == "__main__":
    main()
