"""Sources: what is read, in which order, with which labels, and what is said of what cannot be read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import noise, tiny_model

from jaxzs import data
from jaxzs.errors import ConfigError, DataError, ImageError, LabelError

MODEL = tiny_model()
BLACK = MODEL.preprocess(Image.new("RGB", (3, 3)))  # [1,S,S,3], where there is no image


def paint(folder: Path, *names: str, colour: int = 0) -> None:
    for place, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (colour + place, 0, 0)).save(path)


def read(source, batch_size=4, **more):
    return list(data.batches(source, MODEL.preprocess, batch_size, **more))


# --- folders --------------------------------------------------------------------------------------------------


def test_class_per_subfolder(tmp_path):
    paint(tmp_path, "dog/b.png", "cat/2.png", "cat/1.png")
    source = data.open_source(tmp_path)
    assert source.label_names == ("cat", "dog")
    assert [source[i].id for i in range(3)] == ["cat/1.png", "cat/2.png", "dog/b.png"]
    assert [source[i].labels for i in range(3)] == [(0,), (0,), (1,)]
    assert not source.multi_label


def test_split_per_subfolder(tmp_path):
    paint(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png")
    test = data.open_source(tmp_path, split="test")
    assert [test[i].id for i in range(len(test))] == ["test/cat/3.png"]
    assert test.label_names == ("cat", "dog")


def test_flat_folder_has_no_labels(tmp_path):
    paint(tmp_path, "b.png", "a.png")
    source = data.open_source(tmp_path)
    assert (source.label_names, source[0].labels, source[0].id) == ((), (), "a.png")


def test_mixed_depths_are_refused(tmp_path):
    paint(tmp_path, "a.png", "cat/b.png")
    with pytest.raises(DataError, match="different depths"):
        data.open_source(tmp_path)


def test_csv_of_single_labels(tmp_path):
    paint(tmp_path, "x/1.png", "x/2.png", "x/3.png")
    (tmp_path / "labels.csv").write_text("file,label,split\nx/2.png,dog,test\n1,fire hydrant,train\n")
    source = data.open_source(tmp_path)
    assert source.label_names == ("dog", "fire hydrant")
    assert [(source[i].id, source[i].labels) for i in range(2)] == [("x/1.png", (1,)), ("x/2.png", (0,))]
    assert data.open_source(tmp_path, split="test")[0].id == "x/2.png"


@pytest.mark.parametrize(
    "cell", ["dog;cat", "dog|cat", "dog; cat", '"dog,cat"', '"[""dog"", ""cat""]"', "\"['dog', 'cat']\""]
)
def test_csv_of_several_labels(tmp_path, cell):
    paint(tmp_path / "images", "1.png", "2.png", "3.png")
    (tmp_path / "labels.csv").write_text(f"id,tags\n1,{cell}\n2,cat\n3,\n")
    source = data.open_source(tmp_path)
    assert source.multi_label
    assert source.label_names == ("cat", "dog")
    assert [source[i].labels for i in range(3)] == [(0, 1), (0,), ()]
    assert source.passed_over.unlabelled == 1


def test_blanks_separate_labels_only_when_asked(tmp_path):
    paint(tmp_path, "1.png", "2.png")
    (tmp_path / "labels.csv").write_text("id,labels\n1,potted plant\n2,plant\n")
    assert data.open_source(tmp_path).label_names == ("plant", "potted plant")
    assert data.open_source(tmp_path, label_separator=" ").label_names == ("plant", "potted")


ROWS = [(f"{name}_{number}", name) for name in ("zero", "one") for number in range(2)]


def table_of(header, separator=",", *, suffix=".png", end="\n", before=""):
    lines = [header, *(f"{before}{file}{suffix}{separator}{label}" for file, label in ROWS)]
    return end.join(lines) + end


TABLES = {
    "plain": table_of("file,label"),
    "windows": "\ufeff" + table_of("file,label", end="\r\n"),
    "semicolon": table_of("file;label", ";"),
    "tab": table_of("file\tlabel", "\t"),
    "capitals": table_of("Filename,Label"),
    "blanks": table_of("file, label", ", "),
    "image_id": table_of("image_id,label", suffix=""),
    "Image Name": table_of("Image Name,Class Name"),
    "id of a class": table_of("Image,Id"),
    "two columns": table_of("id,breed", suffix=""),
    "relative to the table": table_of("file,label", before="images/"),
    "dot": table_of("file,label", before="./images/"),
    "backslash": table_of("file,label", before="images\\"),
    "capital suffix": table_of("file,label", suffix=".PNG"),
    "comma at the end": table_of("file,label,").replace("zero\n", "zero,\n"),
    "blank lines": table_of("file,label").replace("\n", "\n\n"),
    "one hot": "file,zero,one\n"
    + "".join(f"{file}.png,{label == 'zero':d},{label == 'one':d}\n" for file, label in ROWS),
}


@pytest.mark.parametrize("name", TABLES)
def test_dialects(tmp_path, name):
    paint(tmp_path / "images", *(f"{file}.png" for file, _ in ROWS))
    (tmp_path / "labels.csv").write_text(TABLES[name], newline="")
    source = data.open_folder(tmp_path)
    assert source.label_names == ("one", "zero")
    assert source.files == ("one_0.png", "one_1.png", "zero_0.png", "zero_1.png")
    assert source.labels == ((0,), (0,), (1,), (1,))
    assert not source.multi_label
    assert source.passed_over.record() == {}


JSON_TABLES = {
    "objects": ("labels.json", json.dumps([{"file": f"{file}.png", "label": label} for file, label in ROWS])),
    "lines": (
        "metadata.jsonl",
        "".join(json.dumps({"file_name": f"{file}.png", "label": label}) + "\n" for file, label in ROWS),
    ),
    "metadata": ("metadata.csv", table_of("file_name,label")),
    "utf-16": ("labels.csv", table_of("file,label").encode("utf-16")),
}


@pytest.mark.parametrize("name", JSON_TABLES)
def test_other_tables(tmp_path, name):
    paint(tmp_path, *(f"{file}.png" for file, _ in ROWS))
    file, content = JSON_TABLES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = data.open_folder(tmp_path)
    assert source.label_names == ("one", "zero")
    assert source.labels == ((0,), (0,), (1,), (1,))


def test_coco_annotations(tmp_path):
    paint(tmp_path, "1.png", "2.png", "3.png")
    coco = {
        "images": [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}],
        "annotations": [{"image_id": 7, "category_id": c} for c in (1, 3, 1)],
        "categories": [{"id": 1, "name": "potted plant"}, {"id": 3, "name": "cat"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    source = data.open_folder(tmp_path)
    assert source.multi_label
    assert source.label_names == ("cat", "potted plant")
    assert source.labels == ((0, 1), ())
    assert source.passed_over.record() == {"unlisted": 1, "unlabelled": 1}
    coco["annotations"].append({"image_id": 9, "category_id": 1})
    (tmp_path / "labels.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match="not there: 9"):
        data.open_folder(tmp_path)


@pytest.mark.parametrize("missing", ["", "NaN", "nan", "NA", "null"])
def test_no_label_is_none(tmp_path, missing):
    paint(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "labels.csv").write_text(f"file,label\n1,{missing}\n2,1.0\n3,10.0\n")
    source = data.open_folder(tmp_path)
    assert source.label_names == ("1", "10")  # numbers become floats where a data frame has empty cells
    assert source.labels == ((), (0,), (1,))


def test_numbers_are_ordered_as_numbers(tmp_path):
    paint(tmp_path, *(f"{place}.png" for place in range(12)))
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{place},{place}\n" for place in range(12)))
    source = data.open_folder(tmp_path)
    assert source.label_names == tuple(map(str, range(12)))
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.json").write_text(json.dumps({f"{place}.png": place for place in range(12)}))
    assert data.open_folder(tmp_path).label_names == tuple(map(str, range(12)))


def test_spellings_of_one_label_are_one_class(tmp_path):
    paint(tmp_path, "1.png", "2.png", "3.png", "4.png")
    (tmp_path / "labels.csv").write_text("file,label\n1,zero\n2,Zero\n3,zero\n4,one \n")
    source = data.open_folder(tmp_path)
    assert source.label_names == ("one", "zero")
    assert source.passed_over.notices() == ["labels read as one: Zero -> zero"]


def test_json_labels_elsewhere(tmp_path):
    paint(tmp_path / "pictures", "1.png", "2.png")
    table = tmp_path / "mine.json"
    table.write_text(json.dumps({"2.png": ["sky", "sea"], "1.png": "sea"}))
    source = data.open_source(tmp_path / "pictures", labels=table)
    assert source.label_names == ("sea", "sky")
    assert [source[i].labels for i in range(2)] == [(0,), (0, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,label\n9.png,cat\n", "'9.png' is not there"),
        ("file,label\n1.png,cat\n1,dog\n", "listed twice"),
        ("file,label\nsame,cat\n", "names 2 files"),
        ("name,kind\n1.png,cat\n", "found the columns name, kind"),
        ("", "found the columns"),
        ("1.png,zero\n2.png,one\n", "expected a header"),
        ("file,label\n1.png,cat,dog\n", "line 2 has 3 cells for 2 columns"),
        ("a,b\n1.png,x,zzz\n", "line 2 has 3 cells"),
        ('file,label\n1.png,"cat\n2.png,dog\n', "unexpected end of data"),
        ('file,label\n1.png,"cat\n2.png,dog"\n', "is a quote not closed"),
        ("file,label,Label\n1.png,cat,dog\n", "columns occur twice: Label, label"),
        ("file,label\n1.png," + "x" * 200_000, "field larger than field limit"),
        ("file,width,height\n1.png,3,4\n", "found the columns file, width, height"),
        ("file,label\n7.png,a\n8.png,b\n9.png,c\n", "'7.png' is not there below .*, nor are 2 others of 3"),
        (b"file,label\n1.png,caf\xe9\n", "not UTF-8"),
    ],
)
def test_unfit_tables(tmp_path, content, message):
    paint(tmp_path, "1.png", "a/same.png", "b/same.png")
    (tmp_path / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        data.open_source(tmp_path)
    assert "labels.csv" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1.png": "a", "1.png": "b"}', "'1.png' is there twice"),
        ('{"1.png": "\\ud800"}', "not valid text"),
        ('{"1.png": 0.5}', "not texts"),
        ('{"1.png": [["a"]]}', "not a label"),
        ('{"1.png": true}', "not a label"),
        ("[1, 2]", "expected"),
        ("[" * 100_000, "cannot read"),
        ('[{"file": "1.png", "label": {"a": 1}}]', "not a label"),
        ('{"images": [1], "annotations": [], "categories": []}', "COCO annotations"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": 5}]}', "not all texts"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "one id"),
    ],
)
def test_unfit_json(tmp_path, content, message):
    paint(tmp_path, "1.png")
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DataError, match=message) as error:
        data.open_source(tmp_path)
    assert "labels.json" in str(error.value)


def test_advice_is_for_the_reader(tmp_path):
    paint(tmp_path, "1.png")
    (tmp_path / "labels.csv").write_text("file,width,height\n1.png,3,4\n")
    with pytest.raises(DataError, match="label_column") as error:
        data.open_source(tmp_path)
    assert "--label-column" in error.value.shown(on_command_line=True)
    assert "label_column" not in error.value.shown(on_command_line=True)
    (tmp_path / "labels.csv").write_text("file,width,height\n1.png,3,4\n")
    assert data.open_source(tmp_path, label_column="Width").label_names == ("3",)


def test_a_long_table_takes_no_long_time(tmp_path):
    paint(tmp_path, "1.png")
    rows = "".join(f"{number}.png,class {number}\n" for number in range(100_000))
    (tmp_path / "labels.csv").write_text("file,label\n" + rows)
    started = time.perf_counter()
    with pytest.raises(DataError, match=r"'0\.png' is not there"):
        data.open_source(tmp_path)
    assert time.perf_counter() - started < 60  # 0.6 s on a quiet machine; quadratic work was minutes


@pytest.mark.parametrize("place", ["nowhere", "file.txt"])
def test_no_source(tmp_path, place):
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(DataError, match="expected a folder"):
        data.open_source(tmp_path / place)


def test_identity_is_that_of_the_content(tmp_path):
    paint(tmp_path, "cat/1.png", "dog/2.png")
    before = data.open_source(tmp_path).identity
    assert data.open_source(tmp_path).identity == before
    paint(tmp_path, "cat/1.png", colour=90)
    changed = data.open_source(tmp_path).identity
    paint(tmp_path, "dog/3.png")
    assert len({before, changed, data.open_source(tmp_path).identity}) == 3


# --- arrays and objects ---------------------------------------------------------------------------------------


def test_arrays(tmp_path):
    images = noise(5)
    path = tmp_path / "five.npz"
    np.savez(path, images=images, labels=np.array([0, 1, -1, 1, 0]), label_names=["no", "yes"])
    source = data.open_source(path)
    assert source.label_names == ("no", "yes")
    assert [source[i].labels for i in range(5)] == [(0,), (1,), (), (1,), (0,)]
    np.testing.assert_array_equal(source[3].image, images[3])
    several = data.from_arrays(images, np.eye(5, 3, dtype=bool))
    assert several.multi_label
    assert several.label_names == ("0", "1", "2")
    assert [several[i].labels for i in (0, 4)] == [(0,), ()]
    assert several.identity != source.identity


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((np.zeros((2, 8, 8, 3), np.float32),), DataError),
        ((np.zeros((0, 8, 8, 3), np.uint8),), DataError),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3, np.int64)), DataError),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.float64)), DataError),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 2), np.int64)), DataError),
        ((np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 5]), ["a", "b"]), LabelError),
    ],
)
def test_unfit_arrays(arguments, error):
    with pytest.raises(error):
        data.from_arrays(*arguments)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.array([0, 10**9])}, "label 1000000000 is too large"),
        ({"labels": np.array([0, 2**64 - 1], np.uint64)}, "too large"),
        ({"labels": np.int64(3)}, r"labels have shape \(\)"),
        ({"labels": np.zeros((2, 2, 2), bool)}, "labels have shape"),
        ({"labels": np.array([0.5, 1.0])}, "expected integers"),
        ({"labels": np.array([0, 1]), "label_names": np.array("cat")}, "expected a list of texts"),
        ({"labels": np.array([0, 1]), "label_names": np.array([["a"], ["b"]])}, "expected a list of texts"),
        ({"labels": np.array([0, 1]), "label_names": np.array(["cat", "cat"])}, "'cat' occurs more than once"),
        ({"labels": np.array([0, 1]), "label_names": np.array([0.5, 1.5])}, "is not a text"),
        ({"labels": np.array([0, 1]), "label_names": np.array(["cat", " "])}, "is not a text"),
        ({"images": np.zeros((2, 0, 4, 3), np.uint8)}, "none empty"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "expected uint8"),
        ({"images": np.uint8(4)}, "expected uint8"),
    ],
)
def test_odd_npz(tmp_path, arrays, message):
    path = tmp_path / "odd.npz"
    np.savez_compressed(path, **({"images": noise(2)} | arrays))
    with pytest.raises((DataError, LabelError), match=message) as error:
        data.open_source(path)
    assert "odd.npz" in str(error.value)


def test_npz_of_other_integers_and_bytes(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=noise(2), labels=np.array([0, 1], ">u8"), class_names=np.array([b"caf\xc3\xa9", b"dog"]))
    source = data.open_source(path)
    assert source.label_names == ("café", "dog")
    assert source.labels == ((0,), (1,))


def test_npz_that_would_fill_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((40, 1000, 1000), np.uint8))
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**12}
    monkeypatch.setattr("os.sysconf", memory.__getitem__)
    with pytest.raises(DataError, match="more than half of the memory"):
        data.open_source(path)


def test_unfit_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pictures=noise(1))
    with pytest.raises(DataError, match="'images'"):
        data.open_source(path)
    np.savez(path, images=np.array([object()], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x\.npz"):
        data.open_source(path)
    path.write_bytes(b"PK\x03\x04 not a zip file")
    with pytest.raises(DataError, match=r"x\.npz"):
        data.open_source(path)


def test_any_object():
    images = noise(4)
    items = [images[0], (images[1], 1), {"image": images[2], "label": [0, 1], "id": b"third"}, {}]
    source = data.from_object(items, identity="four", label_names=["a", "b"])
    assert [source[i].labels for i in range(3)] == [(), (1,), (0, 1)]
    assert source[2].id == "third"
    with pytest.raises(ImageError, match="item 3 has no 'image'"):
        source[3]
    assert source.identity != data.from_object(items, identity="five").identity
    with pytest.raises(DataError, match="__len__"):
        data.from_object(iter(items), identity="four")
    odd = data.from_object(
        [(images[0], 9), (images[0], "cat"), (images[0], [[1], [2, 3]])], identity="odd", label_names=["a", "b"]
    )
    with pytest.raises(LabelError, match="the label 9, but there are 2"):
        odd[0]
    for place in (1, 2):
        with pytest.raises(DataError, match="is not a number"):
            odd[place]


# --- splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("all", list(range(7))),
        ("all[:50%]", [0, 1, 2, 3]),
        ("all[50%:]", [4, 5, 6]),
        ("all[2:4]", [2, 3]),
        ("all[-2:]", [5, 6]),
        ("all[:1]+all[5:6]", [0, 5]),
        ("all[3:3]", []),
    ],
)
def test_split_syntax(split, expected):
    source = data.from_arrays(noise(7))
    part = data.take_split(source, split)
    assert [int(part[i].id) for i in range(len(part))] == expected


@pytest.mark.parametrize(
    ("split", "message"),
    [("train", "only: all"), ("all[", "cannot read"), ("all[a:b]", "cannot read"), ("all[:200%]", "cannot read")],
)
def test_unfit_splits(split, message):
    with pytest.raises(DataError, match=message):
        data.take_split(data.from_arrays(noise(3)), split)


def test_parts_have_their_own_identity():
    source = data.from_arrays(noise(4))
    parts = [data.select(source, numbers) for numbers in ([0, 1], [1, 0], [0, 2])]
    assert len({part.identity for part in [source, *parts]}) == 4
    with pytest.raises(DataError, match="4 items"):
        data.select(source, [4])
    for unfit in ([True, False, True, False], [0.5], [[0]]):
        with pytest.raises(DataError, match="expected integers"):
            data.select(source, unfit)


# --- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_batches_are_in_order_and_padded(threads, number):
    images = noise(number)
    source = data.from_arrays(images, np.arange(number))
    got = read(source, threads=threads)
    assert all(batch.pixels.shape == (4, 16, 16, 3) for batch in got)
    mask = np.concatenate([batch.mask for batch in got])
    assert mask.tolist() == [True] * number + [False] * (len(mask) - number)
    indices = np.concatenate([batch.indices for batch in got])
    assert indices[mask].tolist() == list(range(number))
    pixels = np.concatenate([batch.pixels for batch in got])
    np.testing.assert_array_equal(pixels[mask], MODEL.preprocess(images))
    np.testing.assert_array_equal(pixels[~mask], np.repeat(BLACK, len(mask) - number, axis=0))


def test_unreadable_items_are_told_by_name(tmp_path):
    paint(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "d.png").write_bytes((tmp_path / "c.png").read_bytes()[:40])
    got = read(data.open_source(tmp_path))
    assert got[0].mask.tolist() == [True, False, True, False]
    assert len(got[0].errors) == 2
    assert "b.png" in got[0].errors[0]
    assert "d.png" in got[0].errors[1]
    assert got[1].errors == []
    np.testing.assert_array_equal(got[0].pixels[[1, 3]], np.repeat(BLACK, 2, axis=0))


def test_batches_of_some_items():
    got = read(data.from_arrays(noise(9)), indices=[7, -1, 2])
    assert got[0].indices.tolist() == [7, -1, 2, -1]
    assert got[0].mask.tolist() == [True, False, True, False]
    assert read(data.from_arrays(noise(9)), indices=[]) == []
    with pytest.raises(ConfigError):
        read(data.from_arrays(noise(9)), batch_size=0)


@pytest.mark.parametrize("number", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shards_cover_everything_once(number, parts):
    listed = [index for part in range(parts) for index in data.shard(number, part, parts)]
    assert listed == list(range(number))


# --- tensorflow-datasets ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set built here from real JPEG files as ArrayRecord, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("jpegs")
    for place in range(6):
        Image.fromarray(noise(1, place)[0]).save(folder / f"{place}.jpg", quality=90)

    class Twelve(tfds.core.GeneratorBasedBuilder):
        """Two splits of JPEGs."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["odd", "even"])}
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(range(4)), "test": self._generate_examples(range(4, 6))}

        def _generate_examples(self, numbers):
            for number in numbers:
                yield number, {"image": str(folder / f"{number}.jpg"), "label": (number + 1) % 2}

    builder = Twelve(data_dir=str(tmp_path_factory.mktemp("tfds")), file_format="array_record")
    builder.download_and_prepare()
    return folder, Path(builder.data_dir)


def test_tensorflow_datasets(prepared):
    folder, place = prepared
    source = data.open_source(place, split="train[:50%]+test")
    assert len(source) == 4
    assert source.label_names == ("odd", "even")
    # tensorflow-datasets shuffles while it writes: compare as sets, decoded by the same library
    files = [np.asarray(Image.open(folder / f"{number}.jpg")) for number in range(6)]
    for place_, item in ((i, source[i]) for i in range(4)):
        matches = [number for number, pixels in enumerate(files) if np.array_equal(pixels, item.image)]
        assert len(matches) == 1, place_
        assert item.labels == ((matches[0] + 1) % 2,)
    assert source.identity != data.open_source(place, split="test").identity
    batch = read(source)[0]
    assert batch.mask.all()


def test_unprepared_tensorflow_datasets(prepared, tmp_path):
    with pytest.raises(DataError, match="which split"):
        data.open_source(prepared[1])
    with pytest.raises(DataError, match="train5"):
        data.open_source(prepared[1], split="train5")
    with pytest.raises(DataError, match="ArrayRecord"):
        data.open_tfds("mnist", "test", data_dir=tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        data.open_tfds("no_such_data_set", "test", data_dir=tmp_path)


# --- real images ------------------------------------------------------------------------------------------------


def test_real_folders(shared):
    pets = data.open_source(shared / "data" / "oxford_pets" / "images")
    assert len(pets) == 74
    names = data.dataset_info("oxford_pets").names_for(pets.label_names)
    assert names[pets[2].labels[0]] == "Bengal"
    voc = data.open_source(shared / "data" / "voc2012", split="val", label_separator=" ")
    assert len(voc) == 103
    assert voc.multi_label
    assert set(data.dataset_info("voc2012").names_for(voc.label_names)) == set(voc.label_names)
