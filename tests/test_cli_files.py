"""What folders of strangers hold: no work is lost by it, and nothing is passed over without a word."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from test_cli import pictures, run  # noqa: F401

NAMES = "--labels", "dark,bright"


@pytest.fixture
def folder(pictures, tmp_path):  # noqa: F811
    return shutil.copytree(pictures, tmp_path / "folder")


def classify(capsys, folder, checkpoint, *more):
    out = folder.parent / "out.json"
    code, _, err = run(capsys, "classify", folder, "--model", checkpoint, *NAMES, "--out", out, *more)
    return code, err, json.loads(out.read_text()) if out.exists() else None


@pytest.mark.slow
@pytest.mark.parametrize("store", [False, True])
def test_what_cannot_be_read_is_listed_and_all_else_is_written(folder, tiny_checkpoint, capsys, store):
    os.symlink(folder / "nothing", folder / "dark" / "dangling.png")
    os.symlink(folder / "dark" / "loop.png", folder / "dark" / "loop.png")
    broken = os.fsencode(folder / "dark") + b"/caf\xe9.png"
    shutil.copy(folder / "dark" / "00.png", broken)
    more = ["--store", folder.parent / "store"] if store else []
    code, err, record = classify(capsys, folder, tiny_checkpoint, *more)
    assert code == 1
    assert "2 of 27 images could not be used" in err
    assert len(record["results"]) == 25
    assert os.fsdecode(broken) in [row["path"] for row in record["results"]]  # can be opened again
    assert record["metrics"]["known"] == 25


@pytest.mark.slow
def test_an_image_that_goes_away_is_one_less(folder, tiny_checkpoint, capsys, monkeypatch):
    from jaxzs import zeroshot

    text_proxies = zeroshot.text_proxies

    def remove(*arguments, **more):
        (folder / "dark" / "03.png").unlink(missing_ok=True)
        return text_proxies(*arguments, **more)

    monkeypatch.setattr(zeroshot, "text_proxies", remove)
    code, err, record = classify(capsys, folder, tiny_checkpoint)
    assert (code, len(record["results"])) == (1, 23)
    assert "03.png: No such file" in err


@pytest.mark.slow
def test_what_is_passed_over_is_told_and_recorded(folder, tiny_checkpoint, capsys):
    (folder / "notes.txt").write_text("")
    (folder / "dark" / "film.xyz").write_text("")
    (folder / "empty").mkdir()
    (folder / "@eaDir").mkdir()
    shutil.copy(folder / "dark" / "00.png", folder / "cover.jpe")
    code, err, record = classify(capsys, folder, tiny_checkpoint)
    assert code == 0
    for told in ("passed over 2 files", "system folders", "folders without images", "1 image not in a class folder"):
        assert told in err
    passed = record["passed_over"]
    assert passed["suffixes"] == {".txt": 1, ".xyz": 1}
    assert passed["strays"] == [str(folder / "cover.jpe")]
    assert (len(record["results"]), record["metrics"]["known"]) == (25, 24)


@pytest.mark.slow
def test_a_folder_that_may_not_be_read_ends_with_1(folder, tiny_checkpoint, capsys, monkeypatch):
    scan = os.scandir

    def refuse(path):  # a test may run as root, who may read everything
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    (folder / "closed").mkdir()
    code, err, record = classify(capsys, folder, tiny_checkpoint)
    assert code == 1
    assert "closed (Permission denied)" in err
    assert len(record["passed_over"]["unreadable_folders"]) == 1


def test_extract_tells_it_too(folder, tiny_checkpoint, tmp_path, capsys):
    (folder / "film.xyz").write_text("")
    code, _, err = run(capsys, "extract", folder, "--model", tiny_checkpoint, "--out", tmp_path / "store")
    assert code == 0
    assert "passed over 1 file" in err
    [record] = (tmp_path / "store").glob("*/extract.json")
    assert json.loads(record.read_text())["passed_over"] == {"suffixes": {".xyz": 1}}
