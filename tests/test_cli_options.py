"""The commands beside each other: options of one name mean one thing, and --json is all there is on standard output."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxzs.cli import COMMANDS, main
from jaxzs.commands.options import OutputOptions, option
from jaxzs.commands.run import command_line, settings_of
from jaxzs.report import read_record

# Options that differ on purpose, and why.
DIFFERENT = {
    "out": "files, folders, and names of them",
    "batch_size": "images tagged take more memory than images encoded; a step of tuning is a setting of the papers",
    "images": "some commands need labels",
    "templates": "TagCLIP has its own",
    "model": "evaluate compares several",
    "data": "evaluate compares several",
    "method": "evaluate compares several",
    "seeds": "numbers to draw by, and how many of them",
    "format": "of checkpoints, and of others",
    "shots": "numbers of labels, and places of labelled images",
}


def options_of(name: str) -> type:
    command = COMMANDS[name]
    return getattr(importlib.import_module(command.module), command.options)


def test_options_of_one_name_have_one_type_and_default():
    seen: dict[str, tuple] = {}
    for name in COMMANDS:
        for field in dataclasses.fields(options_of(name)):
            own = (str(field.type), field.default)
            if field.name not in DIFFERENT:
                assert seen.setdefault(field.name, own) == own, f"{name} {option(field.name)}"


def test_options_of_one_name_have_one_help(capsys):
    seen: dict[str, str] = {}
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for field in dataclasses.fields(OutputOptions):
            assert f"{option(field.name)} " in text
        for flag in ("--model", "--revision", "--bfloat16", "--dataset", "--split ", "--force"):
            if f" {flag}" in text and (name, flag) != ("evaluate", "--model"):
                help_text = text.split(f" {flag}", 1)[1][:30]
                assert seen.setdefault(flag, help_text) == help_text, f"{name} {flag}"


@pytest.mark.parametrize("name", COMMANDS)
def test_helps_are_written_for_people(name, capsys, monkeypatch):
    """No word of Python's for an option that is left out, and no line that ends where the source's does."""
    monkeypatch.setenv("COLUMNS", "400")
    assert main([name, "--help"]) == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert not [line for line in lines if "None" in line]
    headings = ("usage", "positional arguments", "options")
    texts = [line for line in lines if " " in line and not line.startswith(("-", "─", "╭", "╰", *headings))]
    assert not [line for line in texts if line[-1] not in ".)"]


def test_a_choice_that_may_be_left_out_is_a_word_of_the_list(capsys):
    for typed in ("foo", "None"):
        assert main(["classify", "photos", "--method", typed]) == 2
        told = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "Expected one of ('auto', 'proxy', 'gda', 'stata', 'transclip', 'zero-shot')" in told


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("classify photos --labels None", "no such file or folder: photos"),  # a name of a class, and not "no labels"
        ("classify photos --out None", "--out None: the name must end in .csv or .json"),  # and not "no file"
        ("app --port 80x", "--port: expected a number, not '80x'"),
        ("tune photos --learning-rate fast", "--learning-rate: expected a number, not 'fast'"),
        ("datasets None", "None"),
    ],
)
def test_the_word_none_is_a_word(typed, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(typed.split()) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in said
    assert "NoneType" not in said


def test_every_command_takes_json_and_quiet():
    for name in COMMANDS:
        assert issubclass(options_of(name), OutputOptions)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, low in (("circle", 0), ("square", 180)):
        (folder / name).mkdir()
        for number in range(4):
            pixels = rng.integers(low, low + 70, (48, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


RUNS = {
    "classify": ("{photos}", "c.json", ["--out", "{out}/c.json"]),
    "tag": ("{photos}", "t.json", ["--labels", "circle,square", "--out", "{out}/t.json"]),
    "segment": ("{photos}", "m/masks.json", ["--labels", "circle,square", "--out", "{out}/m"]),
    "extract": ("{photos}", "f/*/extract.json", ["--out", "{out}/f"]),
    "tune": (
        "{photos}",
        "p.json",
        ["--epochs", "1", "--iterations", "1", "--test", "{photos}", "--out", "{out}/p.safetensors"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_json_is_the_record_that_is_written(name, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAXZS_CACHE", str(tmp_path / "cache"))
    images, file, more = RUNS[name]
    arguments = [text.format(photos=photos, out=tmp_path) for text in [images, *more]]
    assert main([name, *arguments, "--json"]) == 0
    printed, err = capsys.readouterr()
    (path,) = tmp_path.glob(file)
    assert json.loads(printed) == json.loads(path.read_text())
    record = read_record(path)
    assert "Traceback" not in err
    assert record.schema == 1
    assert record.command.startswith(f"jaxzs {name} {photos}")
    assert record.model["name"] == "demo"
    assert record.data["images"] == 8
    assert {"compile", "run"} <= record.seconds.keys()
    assert not {"json", "quiet", "out"} & record.settings.keys()
    if name in ("classify", "tune"):
        assert record.results.figures
    if name == "tune":
        assert [one.method for one in record.results.figures] == ["zero-shot", "text grip"]
        assert record.results.per_class[0].classes == ("circle", "square")
        assert record.results.pseudolabels[0].k == (4.0,)


@pytest.mark.slow
def test_a_table_lies_beside_its_record(photos, tmp_path):
    arguments = [str(photos), "--labels", "circle,square", "--quiet"]
    for name in ("classify", "tag"):
        assert main([name, *arguments, "--out", str(tmp_path / f"{name}.csv")]) == 0
        results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
        assert len(results) == 8
        assert (tmp_path / f"{name}.csv").read_text().count("\n") >= 8


def test_quiet_says_nothing_beside_the_answer(photos, tmp_path, capsys):
    assert main(["classify", str(photos), "--quiet", "--method", "zero-shot"]) == 0
    out, err = capsys.readouterr()
    assert "accuracy" in out
    assert err == ""


def test_datasets_as_json(capsys):
    assert main(["datasets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["datasets"]
    assert {data["name"]: data["classes"] for data in listed}["mnist"] == 10
    assert main(["datasets", "voc2012", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["class_names"]) == 20


def test_the_command_of_a_record_can_be_typed_again():
    options = options_of("classify")(
        images=("a b", "c"), labels="x,y", top=2, bfloat16=True, json=True, templates=("a {}", "{}")
    )
    typed = command_line(options)
    assert typed.startswith("jaxzs classify 'a b' c ")
    for part in ("--labels x,y", "--top 2", "--bfloat16", "--templates 'a {}' '{}'"):
        assert part in typed
    assert "--json" not in typed
    assert settings_of(options)["templates"] == ["a {}", "{}"]


@pytest.mark.slow
def test_a_folder_with_classes_is_measured_before_and_after(photos, tmp_path, capsys):
    out = tmp_path / "c.json"
    assert main(["classify", str(photos), "--out", str(out)]) == 0
    record = read_record(out)
    before, after = record.results.figures
    assert (before.method, after.method) == ("zero-shot", "auto")
    printed = capsys.readouterr().out
    assert f"accuracy {after.value:.2f} % on 8 images (transductive)" in printed
    assert f"zero-shot {before.value:.2f} %" in printed
    (per_class,) = record.results.per_class
    assert np.mean(per_class.accuracy) == pytest.approx(after.value)  # as many images of each class
    assert np.mean(per_class.zero_shot) == pytest.approx(before.value)
    assert main(["classify", str(photos), "--method", "zero-shot", "--out", str(out)]) == 0
    assert [one.method for one in read_record(out).results.figures] == ["zero-shot"]
