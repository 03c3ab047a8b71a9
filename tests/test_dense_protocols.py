"""The published protocols of masks without tags: lists of names, layouts on disk, numbers of labels, refinement."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments import dense_protocols, segmentation
from experiments.dense_protocols import PROTOCOLS, VOID, pamr, read_truth
from jaxzs.clip import normalize
from jaxzs.data import dataset_info
from jaxzs.errors import DataError, LabelError
from jaxzs.report.published import published_values

WINDOW = 48  # of the demo checkpoint
VOC_LISTS = "ImageSets/Segmentation/val.txt", "JPEGImages/{}.jpg", "SegmentationClass/{}.png"
CONTEXT_LISTS = ("ImageSets/SegmentationContext/val.txt", "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png")
COCO = "images/val2017/{}.jpg"
# COCO-Stuff's ids on disk: official ids minus 1, without those that were never used.
STUFF = [n for n in range(182) if n + 1 not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
CITY = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
LAYOUTS = {  # list of names, photo, label image, the number of each label there
    "voc21": (*VOC_LISTS, range(21)),
    "voc20": (*VOC_LISTS, range(1, 21)),
    "context60": (*CONTEXT_LISTS, range(60)),
    "context59": (*CONTEXT_LISTS, range(1, 60)),
    "coco_object": (None, COCO, "annotations/val2017/{}_instanceTrainIds.png", range(81)),
    "coco_object, from COCO-Stuff": (None, COCO, "annotations/val2017/{}.png", [100, *STUFF[:80]]),
    "coco_stuff171": (None, COCO, "annotations/val2017/{}_labelTrainIds.png", range(171)),
    "coco_stuff171, original": (None, COCO, "annotations/val2017/{}.png", STUFF),
    "ade20k": (None, "images/validation/{}.jpg", "annotations/validation/{}.png", range(1, 151)),
    "cityscapes": (
        None,
        "leftImg8bit/val/ulm/{}_leftImg8bit.png",
        "gtFine/val/ulm/{}_gtFine_labelTrainIds.png",
        range(19),
    ),
    "cityscapes, original": (
        None,
        "leftImg8bit/val/ulm/{}_leftImg8bit.png",
        "gtFine/val/ulm/{}_gtFine_labelIds.png",
        CITY,
    ),
}


@pytest.mark.parametrize(
    ("name", "variant", "of", "last"),
    [
        ("voc21", None, "class_names", ""),
        ("coco_object", None, "class_names", ""),
        ("pascal_context", None, "class_names", " "),  # the file ends with a blank
        ("ade20k", None, "class_names", ""),
        ("cityscapes", None, "class_names", ""),
        ("coco_stuff", "sclip", "variants_sclip", ""),
    ],
)
def test_lists_are_those_of_the_public_files(name, variant, of, last):
    """Put together again, the names are the file whose SHA-256 was taken when it was read."""
    info = dataset_info(name)
    named = info.renamed(variant) if variant else info
    lines: dict[int, list[str]] = {}
    for text, c in named.dense_names:
        lines.setdefault(c, []).append(text)
    text = "\n".join(", ".join(names) for names in lines.values()) + last
    assert hashlib.sha256(text.encode()).hexdigest() == info.source[of]["sha256"]


@pytest.fixture
def small(monkeypatch):
    """Photos a window high, and a text of its own for every name, whatever the checkpoint knows."""
    for name, protocol in PROTOCOLS.items():
        monkeypatch.setitem(PROTOCOLS, name, replace(protocol, short_side=WINDOW, threshold=0.0))

    def texts(model, names, **more):
        rows = np.random.default_rng(0).normal(size=(len(names), model.config.projection_dim))
        return normalize(rows.astype(np.float32))

    monkeypatch.setattr(dense_protocols, "tag_texts", texts)


def photos() -> dict[str, Image.Image]:
    blocks = np.random.default_rng(1).integers(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    return {f"photo{n}": Image.fromarray(np.kron(one, np.ones((8, 8, 1), np.uint8))) for n, one in enumerate(blocks)}


def write(root, name: str, labels: list[np.ndarray]) -> None:
    """The fake data set: photos, and label images with the numbers that its files have."""
    listed, photo, mask, numbers = LAYOUTS[name]
    if listed:
        (root / listed).parent.mkdir(parents=True, exist_ok=True)
        (root / listed).write_text("".join(f"{stem}\n" for stem in photos()))
    for (stem, image), own in zip(photos().items(), labels, strict=True):
        for file in (root / photo.format(stem), root / mask.format(stem)):
            file.parent.mkdir(parents=True, exist_ok=True)
        image.save(root / photo.format(stem), quality=100, subsampling=0)
        table = np.full(256, VOID, np.uint8)
        table[: len(numbers)] = numbers
        Image.fromarray(table[own]).save(root / mask.format(stem))


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_layout_is_read(name, small, tmp_path, capsys):
    """True masks that are what the model finds give 100 %; a tenth of one photo mistaken, less; void does not count."""
    dataset, root = name.split(",")[0], tmp_path / "data"
    protocol, shapes = PROTOCOLS[dataset], [(48, 64), (48, 64)]
    write(root, name, [np.zeros(shape, int) for shape in shapes])
    model = segmentation.jaxzs.load("demo")
    pairs = protocol.pairs(root)
    found = list(
        dense_protocols.dense_masks(
            model, protocol, "NACLIP", [photo for photo, _ in pairs], batch=8, pamr=0, bfloat16=False
        )
    )
    assert [mask.shape for mask in found] == shapes
    assert len(np.unique(found)) > 2
    void = [mask.copy() for mask in found]
    if name != "coco_object, from COCO-Stuff":  # where what is unlabelled is background
        void[0][:5] = VOID
    write(root, name, void)
    command = ["--dataset", dataset, "--root", str(root), "--model", "demo"]
    segmentation.main([*command, "--out", str(tmp_path / "right.json")])
    said = capsys.readouterr().out
    assert "| mIoU           |   100.00 |" in said
    assert f"NACLIP mIoU PAMR 10 {published_values(dataset)['NACLIP', 'mIoU', 'PAMR 10']}" in said
    wrong = [mask.copy() for mask in found]
    highest = max(mask.max() for mask in found)
    wrong[1][:, :16] = np.where(wrong[1][:, :16] == highest, 0, highest)
    write(root, name, wrong)
    segmentation.main(command)
    line = next(line for line in capsys.readouterr().out.splitlines() if "pixel accuracy" in line)
    assert float(line.split("|")[2]) == pytest.approx(100 * (1 - 16 / 64 / 2), abs=0.01)


def test_what_is_wrong_on_disk_is_told(small, tmp_path):
    with pytest.raises(DataError, match=r"list of images .*val\.txt"):
        PROTOCOLS["voc21"].pairs(tmp_path)
    with pytest.raises(DataError, match=r"no \.jpg below"):
        PROTOCOLS["ade20k"].pairs(tmp_path)
    write(tmp_path, "ade20k", [np.zeros((48, 64), int)] * 2)
    [(_, mask), (_, other)] = PROTOCOLS["ade20k"].pairs(tmp_path)
    with pytest.raises(DataError, match="expected one byte a pixel"):
        read_truth(PROTOCOLS["ade20k"], mask, (40, 64))
    Image.fromarray(np.full((48, 64), 200, np.uint8)).save(mask)
    with pytest.raises(LabelError, match="the number 200"):
        read_truth(PROTOCOLS["ade20k"], mask, (48, 64))
    other.unlink()
    with pytest.raises(DataError, match="1 of 4 files are missing"):
        segmentation.main(["--dataset", "ade20k", "--root", str(tmp_path), "--model", "demo"])
    with pytest.raises(SystemExit):
        segmentation.main(["--dataset", "ade20k"])


def test_pamr_is_the_mean_of_neighbours_that_look_alike():
    """Pixel by pixel in NumPy, after the original: 8 neighbours at 8 and 16 pixels, deviations over them and itself."""
    rng = np.random.default_rng(0)
    photo, maps = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8), rng.random((3, 20, 24)).astype(np.float32)
    x = (photo - [122.771, 116.746, 104.094]) / [68.501, 66.632, 70.323]
    places = [(d * y, d * x) for d in (8, 16) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    expected = maps.astype(float)
    for _ in range(2):
        before = expected.copy()
        for row in range(20):
            for column in range(24):
                at = [(min(max(row + y, 0), 19), min(max(column + x_, 0), 23)) for y, x_ in places]
                looks = np.array([x[place] for place in at])  # [18,3]
                alike = -np.abs(looks - x[row, column]) / (1e-8 + 0.1 * looks.std(0, ddof=1))
                away = [n for n, place in enumerate(places) if place != (0, 0)]
                weight = np.exp(alike[away].mean(1))
                values = np.array([before[:, at[n][0], at[n][1]] for n in away])  # [16,N]
                expected[:, row, column] = weight @ values / weight.sum()
    np.testing.assert_allclose(pamr(photo, maps, steps=2), expected, rtol=0, atol=2e-5)  # float32 exponents to 20
    np.testing.assert_allclose(pamr(np.zeros_like(photo), maps[:1] * 0 + 1, steps=3), 1.0, rtol=1e-5)


@pytest.mark.parametrize("dataset", ["voc21", "coco_stuff171"])
def test_refined_labels_keep_the_rules(dataset, small, tmp_path, capsys):
    name = {"voc21": "voc21", "coco_stuff171": "coco_stuff171, original"}[dataset]
    write(tmp_path, name, [np.zeros((48, 64), int)] * 2)
    segmentation.main(["--dataset", dataset, "--root", str(tmp_path), "--model", "demo", "--pamr", "2", "--limit", "1"])
    said = capsys.readouterr().out
    assert "1 of" in said
    assert "not the full list" in said
