"""What `jaxzs classify` is given: a pipe of paths, few labels, options that do not go together."""

from __future__ import annotations

import io
import json
import os
import shutil
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxzs
from jaxzs import adapt, classification, cli, data, zeroshot
from jaxzs.errors import CheckpointError, ConfigError, DataError, LabelError


def _labelled(lines, monkeypatch, capsys, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = cli.main(["classify", "-", "--labels", "zero,one,two", "--stream", *options])
    told = capsys.readouterr()
    return code, dict(line.split("\t")[:2] for line in told.out.splitlines()), told.err


def test_a_line_of_a_pipe_may_name_several_images(digit_photos, monkeypatch, capsys):
    """A glob gave its first image's label to the pattern and shifted all behind it; then came a traceback."""
    monkeypatch.chdir(digit_photos)
    code, found, told = _labelled(["one", "zero/0.png", "two/*.png", "nowhere.png"], monkeypatch, capsys)
    assert code == 1
    assert "no such file or folder: nowhere.png" in told
    one, two = ([f"{name}/{n}.png" for n in range(10)] for name in ("one", "two"))
    assert (0, found) == _labelled([*one, "zero/0.png", *two], monkeypatch, capsys)[:2]  # one batch, as before


def test_a_stream_ends_where_nothing_more_can_come(digit_photos, monkeypatch, capsys):
    """The thread that reads ended with a traceback, and the command waited for it for ever."""
    command = ["classify", "-", "--labels", "zero,one,two", "--stream"]
    monkeypatch.chdir(digit_photos)
    monkeypatch.setattr("sys.stdin", None)  # `<&-` in a shell
    assert cli.main(command) == 2
    assert "standard input is closed" in capsys.readouterr().err
    # A name of bytes that are no UTF-8, and lines as Windows ends them.
    piped = io.TextIOWrapper(io.BytesIO(b"one/0.png\r\n\xff.png\none/1.png"), encoding="utf-8", newline="\n")
    monkeypatch.setattr("sys.stdin", piped)
    assert cli.main(command) == 1
    told = capsys.readouterr()
    assert [line.split("\t")[0] for line in told.out.splitlines()] == ["one/0.png", "one/1.png"]
    assert "no such file or folder: \\xff.png" in told.err


def test_an_interrupted_stream_tells_what_it_has_done(digit_photos, monkeypatch, capsys):
    def lines():
        yield "one/0.png\n"
        yield "nowhere.png\n"
        raise KeyboardInterrupt

    monkeypatch.chdir(digit_photos)
    monkeypatch.setattr("sys.stdin", lines())
    assert cli.main(["classify", "-", "--labels", "zero,one,two", "--stream"]) == 130
    assert "interrupted; 1 image labelled, 1 file not usable" in capsys.readouterr().err


def test_a_folder_that_cannot_be_watched_any_more_ends_the_stream(tmp_path, monkeypatch, capsys):
    def look(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(data, "find_images", look)
    assert cli.main(["classify", str(tmp_path), "--labels", "zero,one,two", "--stream"]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--json"], ["--html", "page.html"], ["--top", "3"], ["--gamma", "0.5"]])
def test_a_stream_refuses_what_it_would_not_do(option, monkeypatch, capsys):
    code, found, told = _labelled([], monkeypatch, capsys, *option)
    assert (code, found) == (2, {})
    assert f"takes no {option[0]}" in told


@pytest.mark.slow
def test_shots_label_one_image_and_may_be_of_one_class(digit_photos, tmp_path, capsys):
    image = digit_photos / "two" / "3.png"
    assert cli.main(["classify", str(image), "--labels", "zero,one,two", "--shots", str(digit_photos), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in record["results"]] == ["two"]
    assert record["settings"]["method"] == "auto"  # it was zero-shot, which refused the shots
    shutil.copytree(digit_photos / "one", tmp_path / "shots" / "one")
    assert cli.main(["classify", str(digit_photos), "--shots", str(tmp_path / "shots"), "--quiet"]) == 0
    capsys.readouterr()
    (tmp_path / "shots" / "one").rename(tmp_path / "shots" / "nine")
    assert cli.main(["classify", str(digit_photos), "--shots", str(tmp_path / "shots")]) == 2
    assert "Labels of the data: 'nine'" in capsys.readouterr().err


def test_paths_of_a_table_of_shots_may_be_spelled_otherwise(digit_photos, tmp_path, monkeypatch, capsys):
    """Paths as commands write them were taken in other capitals or composed otherwise only without their folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digit_photos, "photos")
    name = unicodedata.normalize("NFD", "é")
    os.rename("photos/one/0.png", f"photos/one/{name}.png")
    composed = unicodedata.normalize("NFC", name)
    with open("shots.csv", "w", encoding="utf-8") as table:
        table.write(f"path,label\nphotos/one/{composed}.png,one\nPhotos\\Two\\0.PNG,two\n")
    command = ["classify", "photos", "--shots", "shots.csv", "--quiet", "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["known"] == 28
    os.mkdir("elsewhere")
    shutil.copy("shots.csv", "elsewhere")
    assert cli.main(["classify", "photos/*/*.png", "--labels", "one,two", "--shots", "elsewhere/shots.csv"]) == 2
    assert "--shots: no images in elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 0.5])
def test_seeds_that_no_generator_takes_are_refused(seed):
    with pytest.raises(ConfigError, match="expected a whole number from 0 to 4294967295"):
        classification.Labelling(seed=seed)


def test_shots_are_never_ignored():
    model = jaxzs.load("demo")
    text = zeroshot.text_proxies(model, ["zero", "one", "two"], ["the digit {}"])
    shots = adapt.Shots(text, np.arange(3))
    for method in ("proxy", "zero-shot", "stata", "closed_form"):
        with pytest.raises(ConfigError, match=f"'{method}' takes no shots"):
            classification.classify_features(model, text, text, classification.Labelling(method), shots)
    one = classification.classify_features(model, text[2:], text, classification.Labelling("gda"), shots)
    assert (one.method, one.classes[0, 0]) == ("gda", 2)


def test_rows_that_do_not_count_teach_proxies_nothing():
    model = jaxzs.load("demo")
    text = zeroshot.text_proxies(model, ["zero", "one", "two"], ["the digit {}"])
    rng = np.random.default_rng(0)
    x = jnp.repeat(text, 8, axis=0) + 0.1 * rng.normal(size=(24, text.shape[1])).astype(np.float32)
    here = np.arange(24) % 8 < 5
    labelling = classification.Labelling("proxy", gamma=0.5)
    masked = classification.classify_features(model, x, text, labelling, fitted=here)
    alone = classification.classify_features(model, x[here], text, labelling)
    # The same sums in other blocks: float32 rounds in another order.
    np.testing.assert_allclose(masked.head.weights, alone.head.weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("row", "reason"), [(np.nan, "not finite, first in row 1"), (0.0, "zeros, first in row 1")])
def test_rows_that_say_nothing_are_refused_or_padding(row, reason):
    """argmax of NaN is class 0."""
    x = np.eye(3, 4, dtype=np.float32)
    x[1] = row
    mask, head = np.array([True, False, True]), adapt.text_head(np.eye(3, 4))
    if np.isnan(row):
        with pytest.raises(DataError, match=reason):
            adapt.scores(head, x)
    else:  # what `parallel.shard_rows` fills up with
        assert adapt.scores(head, x)[1].tolist() == head.bias.tolist()
    assert adapt.scores(head, x, mask=mask)[mask].argmax(-1).tolist() == [0, 2]
    with pytest.raises(DataError, match=reason):
        adapt.fit(x, np.eye(3, 4, dtype=np.float32), method="zero-shot")
    fitted = adapt.fit(x, np.eye(3, 4, dtype=np.float32), method="zero-shot", mask=mask)
    assert adapt.probabilities(fitted, x)[mask].argmax(-1).tolist() == [0, 2]


def test_images_in_memory_and_files_in_one_list(digit_photos):
    """The files were told to be unreadable, and left out."""
    files = sorted(digit_photos.glob("*/*.png"))[::6]
    with Image.open(files[0]) as first:
        mixed = iter([first, np.asarray(first), *files[2:4], str(files[4])])
        rows = jaxzs.classify(mixed, np.array(["zero", "one", "two"]), labelling=classification.Labelling("zero-shot"))
    assert [row["path"] for row in rows] == ["0", "1", "2", "3", "4"]
    alone = jaxzs.classify(files[2:], ["zero", "one", "two"], labelling=classification.Labelling("zero-shot"))
    for row, expected in zip(rows[2:], alone, strict=True):
        assert row["label"] == expected["label"]
        # Other images in the batch: float32 sums in another order.
        assert row["score"] == pytest.approx(expected["score"], abs=1e-5)
        assert type(row["label"]) is str, "not NumPy's, which prints as np.str_"


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"images": ""}, DataError, "an empty text names no images"),
        ({"images": {"a": np.zeros((8, 8), np.uint8)}}, DataError, "of type dict, expected paths"),
        ({"images": b"PNG"}, DataError, "of type bytes, expected paths"),
        ({"images": io.BytesIO()}, DataError, "of type BytesIO, expected paths"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, DataError, "np.round"),
        ({"labels": "zero,one"}, LabelError, "not the text 'zero,one'"),
        ({"labels": {0: "zero", 1: "one"}}, LabelError, "class name number 0 is no text, but 0"),
        (
            {"labelling": "zero-shot"},
            ConfigError,
            r"labelling is 'zero-shot', expected a jaxzs.classification.Labelling",
        ),
        ({"encoding": 32}, ConfigError, r"encoding is 32, expected a jaxzs.classification.Encoding"),
        ({"model": None}, CheckpointError, "not by None"),
        ({"model": ""}, CheckpointError, "'': no such file"),
    ],
)
def test_what_is_no_input_is_named(given, error, told):
    with pytest.raises(error, match=told):
        jaxzs.classify(**{"images": np.zeros((2, 8, 8), np.uint8), "labels": ["zero", "one"]} | given)


@pytest.mark.parametrize("command", ["classify", "extract", "tune", "report"])
def test_a_variable_that_is_not_set_is_not_the_current_folder(command, digit_photos, monkeypatch, capsys):
    monkeypatch.chdir(digit_photos)
    assert cli.main([command, ""]) == 2
    told = capsys.readouterr().err
    assert "an empty text names no" in told or "no images at ''" in told


def test_one_image_is_one_image_in_any_form(digit_photos):
    """Of an array [H,W,3] every row became a grey image of its own."""
    model = jaxzs.load("demo")
    image = np.asarray(data.open_image(digit_photos / "two" / "1.png").convert("RGB"))
    opaque = np.dstack([image, np.full_like(image[..., 0], 255)])
    for form in (image, image[None], [image], jnp.asarray(image), opaque, image[..., 0]):
        with pytest.warns(UserWarning, match="one image only"):
            rows = jaxzs.classify(form, ["zero", "one", "two"], model, templates=["the digit {}"])
        assert [row["path"] for row in rows] == ["0"]
        own = jaxzs.clip.encode_image(model.params, model.preprocess(form), model.config)
        text = zeroshot.text_proxies(model, ["zero", "one", "two"], ["the digit {}"])
        assert rows[0]["label"] == ["zero", "one", "two"][int(zeroshot.predict(own, text)[0])]
    with pytest.raises(DataError, match=r"one image of colours is \[1,H,W,3\]"):
        data.from_arrays(image)
    assert len(data.from_arrays(image[..., :1].repeat(3, 2)[:, :3, :, None])) == len(image)
    with pytest.raises(DataError, match="item 0 has no 'image'; it is None"):
        jaxzs.classify(None, ["zero", "one"], model)


def test_names_may_be_any_iterable(digit_photos):
    model, names = jaxzs.load("demo"), ["zero", "one", "two"]
    expected = jaxzs.classify(digit_photos, names, model)
    for form in (tuple(names), np.array(names), iter(names), dict.fromkeys(names)):
        assert jaxzs.classify(digit_photos, form, model) == expected


@pytest.mark.parametrize(
    ("changed", "error"), [({"top": 1.5}, LabelError), ({"top": 0}, LabelError), ({"seed": "a"}, ConfigError)]
)
def test_numbers_that_are_none_are_named(changed, error):
    with pytest.raises(error, match=f"{next(iter(changed))} is "):
        classification.Labelling(**changed)


def test_images_by_split_are_answered_with_one_split(digit_photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(digit_photos, tmp_path / "data" / "train")
    shutil.copytree(digit_photos, tmp_path / "data" / "test")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["classify", "data"]) == 2
    assert "images lie as split/class/image: name one split, such as data/test" in capsys.readouterr().err
    with pytest.raises(LabelError, match="name one split, such as data/test"):
        jaxzs.classify("data")
    for given in ("data/test/one", ["data/test/one", str(tmp_path / "data" / "test" / "two")]):
        with pytest.raises(LabelError, match=r"one subfolder a class$"):
            jaxzs.classify(given)
