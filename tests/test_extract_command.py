"""`jaxzs extract` and `jaxzs datasets`."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

import jaxzs
from jaxzs import features
from jaxzs.cli import main
from jaxzs.clip.params import flatten


def paint(folder: Path) -> Path:
    for number in range(5):
        path = folder / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (50 * number, 0, 90)).save(path)
    return folder


def test_extract_and_continue(tmp_path, capsys):
    images, out = paint(tmp_path / "images"), tmp_path / "stores"
    assert main(["extract", str(images), "--out", str(out), "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    store = features.open_store(out)
    assert f"5 images x {store.settings['embedding']} features (float32)" in printed
    assert "2 classes: cat, dog" in printed
    assert str(store.path) in printed
    assert store.arrays().labels.tolist() == [0, 0, 1, 1, 1]
    assert np.isfinite(store.arrays().features).all()

    (images / "cat" / "9.png").write_bytes(b"no picture")
    assert main(["extract", str(images), "--out", str(out), "--batch-size", "8"]) == 1
    captured = capsys.readouterr()
    assert "5 images" in captured.out
    assert "9.png" in captured.err
    assert len(list(out.iterdir())) == 2  # other images, another store


def test_a_finished_store_in_a_place_that_is_only_read(tmp_path, capsys, monkeypatch):
    """As on a read-only file system; permissions alone do not stop every user."""
    images, out = paint(tmp_path / "images"), tmp_path / "stores"
    command = ["extract", str(images), "--out", str(out), "--batch-size", "8"]
    assert main(command) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    open_file = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT and str(path).startswith(str(out)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return open_file(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == first
    assert "cannot be written: no record of this run" in captured.err


def test_wrong_input_is_one_line(tmp_path, capsys):
    assert main(["extract", str(tmp_path / "nowhere")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("jaxzs extract: no images at")
    assert message.count("\n") == 1


def test_datasets_are_listed(capsys):
    assert main(["datasets"]) == 0
    assert "oxford_pets" in capsys.readouterr().out
    assert main(["datasets", "voc2012"]) == 0
    shown = capsys.readouterr().out
    assert "PASCAL VOC 2012: 20 classes, several per image" in shown
    assert "https://github.com/linyq2117/TagCLIP clip_text.py" in shown
    assert "background: ground, land" in shown
    assert main(["datasets", "voc2013"]) == 2
    assert "voc2012" in capsys.readouterr().err


def test_a_file_of_the_user_is_shown(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"class_names": ["a b", "c"]}))
    assert main(["datasets", str(path)]) == 0
    assert "mine: 2 classes" in capsys.readouterr().out


def test_a_vision_tower_alone_is_enough(tmp_path, capsys):
    """What `CLIPVisionModelWithProjection` saves: the whole model's features; other commands say what to do."""
    model = jaxzs.load("demo")
    alone, values = tmp_path / "vision", model.config.to_hf()
    alone.mkdir()
    config = values["vision_config"] | {"model_type": "clip_vision_model", "projection_dim": values["projection_dim"]}
    (alone / "config.json").write_text(json.dumps(config))
    (alone / "preprocessor_config.json").write_text(json.dumps(model.preprocessor.to_json()))
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(model.params) if path.startswith("vis")}
    save_file({path.replace("/", "."): leaf for path, leaf in leaves.items()}, alone / "model.safetensors")
    images = paint(tmp_path / "images")
    found = []
    for name, out in ((str(alone), "a"), ("demo", "b")):
        assert main(["extract", str(images), "--out", str(tmp_path / out), "--batch-size", "8", "--model", name]) == 0
        found.append(features.open_store(tmp_path / out).arrays().features)
    np.testing.assert_array_equal(*found)
    capsys.readouterr()
    assert main(["classify", str(images), "--labels", "cat,dog", "--model", str(alone)]) == 2
    said = capsys.readouterr().err
    assert "a checkpoint of the vision tower alone; `jaxzs extract` needs no more" in said
    assert "towers=" not in said
