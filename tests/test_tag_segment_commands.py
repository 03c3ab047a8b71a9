"""`jaxzs tag` and `jaxzs segment`: what they print, write and refuse."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

import jaxzs
from jaxzs.commands import segment, tag
from jaxzs.data import open_image
from jaxzs.errors import DataError, ImageError, LabelError
from jaxzs.patch import pixel_labels, score_maps, tag_images
from jaxzs.patch.overlay import voc_palette, write_palette_mask
from jaxzs.patch.texts import tag_texts


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXZS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of different sizes in two folders, two of one name, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, size in {"a/one.png": (64, 80), "b/one.png": (75, 64), "b/two.png": (70, 70)}.items():
        coarse = random.integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3))
        pixels = np.kron(coarse, np.ones((8, 8, 1)))[: size[0], : size[1]]
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


def options(kind, photos, tiny_checkpoint, **more):
    chosen = {"labels": "dark, bright,red", "background": "sky", "templates": ("a {}", "the {}.")}
    return kind(images=(str(photos),), model=str(tiny_checkpoint), **(chosen | more))


@pytest.mark.slow
def test_tag_writes_what_the_library_finds(photos, tiny_checkpoint, tmp_path, capsys):
    out, pictures = tmp_path / "tags.json", tmp_path / "pictures"
    chosen = options(tag.TagOptions, photos, tiny_checkpoint, out=out, overlay=pictures)
    assert tag.run(chosen) == 1, "one file is no image"
    captured = capsys.readouterr()
    assert "3 images, 3 classes" in captured.out
    assert "broken.png" in captured.err
    record = json.loads(out.read_text())
    assert [row["path"][-9:] for row in record["results"]] == ["a/one.png", "b/one.png", "b/two.png"]
    assert sorted(path.name for path in pictures.iterdir()) == ["one-2.png", "one.png", "two.png"]
    assert min(open_image(pictures / "one.png").size) > 200

    model = jaxzs.load(tiny_checkpoint)
    texts = tag_texts(model, ["dark", "bright", "red"], ["sky"], ["a {}", "the {}."])
    images = [open_image(row["path"]) for row in record["results"]]
    for tagged in tag_images(model, images, texts, num_foreground=3):
        row = record["results"][tagged.number]
        # Other batches, other padding: 2e-5; the file holds six digits.
        np.testing.assert_allclose(list(row["scores"].values()), tagged.scores, atol=3e-5)
        names = {found["label"] for found in row["tags"]}
        assert names == {n for n, t in zip(row["scores"], tagged.tags, strict=True) if t}
        for found in row["tags"]:
            left, top, right, bottom = found["box"]
            width, height = row["size"]
            assert 0 <= left <= right <= width
            assert 0 <= top <= bottom <= height


def test_tag_writes_csv(photos, tiny_checkpoint, tmp_path):
    out = tmp_path / "tags.csv"
    tag.run(options(tag.TagOptions, photos / "a", tiny_checkpoint, out=out))
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert list(rows[0]) == [
        "path", "label", "score", "reidentified", "left", "top", "right", "bottom",
    ]  # fmt: skip
    assert float(rows[0]["score"]) == max(float(row["score"]) for row in rows)


@pytest.mark.slow
def test_segment_writes_palette_masks(photos, tiny_checkpoint, tmp_path):
    tags, out = tmp_path / "tags.json", tmp_path / "masks"
    tag.run(options(tag.TagOptions, photos / "b", tiny_checkpoint, out=tags))
    chosen = {"tags": tags, "out": out, "crf": True, "crf_stride": 4}
    code = segment.run(options(segment.SegmentOptions, photos / "b", tiny_checkpoint, **chosen))
    assert code == 0
    record = json.loads((out / "masks.json").read_text())
    assert record["labels"] == {"0": "background", "1": "dark", "2": "bright", "3": "red"}
    for row, size in zip(record["results"], [(64, 75), (70, 70)], strict=True):
        with Image.open(row["mask"]) as mask:
            assert (mask.mode, mask.size) == ("P", size)
            labels, palette = np.asarray(mask), mask.getpalette()
        for label, name in enumerate(["dark", "bright", "red"], start=1):
            covered = row["covered"].get(name, 0.0)
            assert (labels == label).mean() == pytest.approx(covered, abs=1e-6)
        assert palette[:768] == voc_palette().ravel().tolist()
    assert len(list((out / "overlays").iterdir())) == 2


@pytest.mark.slow
def test_segment_by_patch_scores(photos, tiny_checkpoint, tmp_path):
    out = tmp_path / "masks"
    chosen = options(segment.SegmentOptions, photos, tiny_checkpoint, out=out, maps="scores", crf=True)
    assert segment.run(chosen) == 1, "one file is no image"
    record = json.loads((out / "masks.json").read_text())
    assert [row["path"][-9:] for row in record["results"]] == ["a/one.png", "b/one.png", "b/two.png"]
    for row in record["results"]:
        assert row["tags"]
        assert 0 < sum(row["covered"].values()) <= 1


@pytest.mark.slow
def test_score_maps_reach_from_0_to_1(tiny_checkpoint):
    model = jaxzs.load(tiny_checkpoint)
    image = np.random.default_rng(0).integers(0, 256, (64, 72, 3)).astype(np.uint8)
    texts = tag_texts(model, ["dark", "bright", "red"], [], ["a {}"])
    [tagged] = tag_images(model, [image], texts, num_foreground=3)
    maps = score_maps(tagged, [2, 0])
    rows, columns = tagged.refined.shape[:2]
    assert maps.shape == (2, rows, columns)
    np.testing.assert_allclose(maps.min((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(maps.max((1, 2)), 1, atol=1e-6)
    assert maps[0].argmax() == tagged.refined[..., 2].argmax()
    labels = pixel_labels(image, maps, [2, 0])
    assert labels.shape == (64, 72)
    assert set(np.unique(labels)) <= {0, 1, 3}
    assert not pixel_labels(image, maps[:0], []).any()


def test_palette_is_that_of_voc():
    # tvmonitor, the last of VOC's twenty classes; void
    assert voc_palette()[20].tolist() == [0, 64, 128]
    assert voc_palette()[255].tolist() == [224, 224, 192]


def test_palettes_hold_256_labels(photos, tiny_checkpoint, tmp_path):
    """As a byte, label 256 would be the background."""
    for labels in (np.array([[0, 256]]), np.array([[-1, 3]])):
        with pytest.raises(LabelError, match="a palette mask holds 0 to 255"):
            write_palette_mask(tmp_path / "mask.png", labels)
    assert not (tmp_path / "mask.png").exists()
    names = ",".join(f"c{number}" for number in range(256))
    with pytest.raises(LabelError, match="256 classes: a palette mask holds 255 and the background"):
        segment.run(options(segment.SegmentOptions, photos / "a", tiny_checkpoint, labels=names, out=tmp_path / "m"))


def test_a_class_called_background_is_told_before_the_work(photos, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "tagged_images", lambda *_, **__: pytest.fail("images were tagged"))
    given = {"background": None, "out": tmp_path / "m"}
    for names, match in (("dark,background", "a class is called 'background'"), ("dark,Background", "one text")):
        with pytest.raises(LabelError, match=match):
            segment.run(options(segment.SegmentOptions, photos / "a", tiny_checkpoint, labels=names, **given))


def test_texts_are_kept_by_content(tiny_checkpoint, tmp_path):
    model = jaxzs.load(tiny_checkpoint)
    arguments = (model, ["dark", "bright"], ["sky"], ["a {}"])
    first = tag_texts(*arguments, cache=tmp_path)
    [file] = tmp_path.iterdir()
    np.testing.assert_array_equal(tag_texts(*arguments, cache=tmp_path), first)
    np.save(file, np.zeros((3, model.config.projection_dim), np.float32))
    assert not tag_texts(*arguments, cache=tmp_path).any(), "the kept file is what is read"
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(tag_texts(*arguments, cache=tmp_path), first)
    tag_texts(model, ["bright", "dark"], ["sky"], ["a {}"], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": None}, LabelError, "what may be tagged"),
        ({"labels": ""}, LabelError, "empty"),
        ({"labels": "dark,dark"}, LabelError, "more than once"),
        ({"labels": "dark,sky"}, LabelError, "more than once among classes and background"),
        ({"dataset": "voc2012"}, LabelError, "give only one of"),
        ({"threshold": 50.0}, DataError, "expected 0 to 1"),
        ({"batch_size": 0}, DataError, "at least 1"),
        ({"max_patches": 3}, DataError, "--max-patches is 3, expected at least 4"),
        ({"out": "tags.txt"}, DataError, r"\.csv or \.json"),
    ],
)
def test_wrong_options_are_named(change, error, match, photos, tiny_checkpoint, tmp_path):
    if "out" in change:
        change = {"out": tmp_path / change["out"]}
    with pytest.raises(error, match=match):
        tag.run(options(tag.TagOptions, photos / "a", tiny_checkpoint, **change))


def test_tags_of_other_images_are_refused(photos, tiny_checkpoint, tmp_path):
    tags = tmp_path / "tags.json"
    tags.write_text(json.dumps({"results": [{"path": "x.png", "tags": []}]}))
    chosen = options(segment.SegmentOptions, photos / "a", tiny_checkpoint, tags=tags)
    with pytest.raises(DataError, match="no tags for"):
        segment.run(chosen)
    tags.write_text("[]")
    with pytest.raises(DataError, match="is not a file that"):
        segment.run(chosen)


def test_no_readable_image_is_an_error(photos, tiny_checkpoint):
    with pytest.raises((DataError, ImageError), match="none of the 1 images"):
        tag.run(options(tag.TagOptions, photos / "broken.png", tiny_checkpoint))


@pytest.mark.slow
def test_tags_by_a_learned_classifier(photos, tiny_checkpoint, tmp_path):
    """As the library finds them; an image that cannot be read is named once, though the images are read twice."""
    out = tmp_path / "tags.json"
    assert tag.run(options(tag.TagOptions, photos, tiny_checkpoint, out=out, learn=True)) == 1, "one file is no image"
    rows = json.loads(out.read_text())["results"]
    assert len(rows) == 3
    assert all(row["tags"] for row in rows)
    assert tag.run(options(tag.TagOptions, photos, tiny_checkpoint, out=out, learn=True, side=24)) == 1
    assert json.loads(out.read_text())["results"] != rows, "seen larger"
    with pytest.raises(DataError, match="--side is of --learn"):
        tag.run(options(tag.TagOptions, photos, tiny_checkpoint, out=out, side=24))
    with pytest.raises(DataError, match="--learn looks at each image once"):
        tag.run(options(tag.TagOptions, photos, tiny_checkpoint, out=out, learn=True, exact=True))


@pytest.mark.slow
@pytest.mark.parametrize("crf", [False, True])
def test_segment_without_tags(photos, tiny_checkpoint, tmp_path, crf):
    out = tmp_path / "masks"
    chosen = options(segment.SegmentOptions, photos, tiny_checkpoint, out=out, maps="dense", attention="csa", crf=crf)
    assert segment.run(chosen) == 1, "one file is no image"
    record = json.loads((out / "masks.json").read_text())
    assert len(record["results"]) == 3
    for row in record["results"]:
        assert set(row["tags"]) <= set(record["class_names"])
        open_image(row["mask"])
    with pytest.raises(DataError, match="leave --tags out"):
        segment.run(
            options(segment.SegmentOptions, photos, tiny_checkpoint, out=out, maps="dense", tags=out / "x.json")
        )


def test_classes_of_one_name_keep_a_score_each(photos, tiny_checkpoint, tmp_path):
    """As ImageNet's two "sunglasses": the labels of the data set tell them apart."""
    description = {"class_names": ["dark", "red", "red"], "labels": ["n1", "n2", "n3"], "templates": ["a {}"]}
    (tmp_path / "own.json").write_text(json.dumps(description))
    out = tmp_path / "tags.json"
    own = {"labels": None, "background": None, "templates": (), "dataset": str(tmp_path / "own.json"), "out": out}
    assert tag.run(options(tag.TagOptions, photos / "a", tiny_checkpoint, **own)) == 0
    [row] = json.loads(out.read_text())["results"]
    assert list(row["scores"]) == ["dark", "red (n2)", "red (n3)"]
    assert row["scores"]["red (n2)"] == row["scores"]["red (n3)"]
