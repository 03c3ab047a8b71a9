"""`jaxzs demo`: the gains that the README promises, picture, page, record, and commands that work as they are told."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from jaxzs.cli import main
from jaxzs.commands import demo
from jaxzs.commands.demo import DIGITS, METHODS, THINGS
from jaxzs.data import samples


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a run of the demo leaves behind, and prints."""
    import contextlib
    import io

    out, printed = tmp_path_factory.mktemp("demo") / "a folder", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--out", str(out)]) == 0
    return out, json.loads((out / "demo.json").read_text()), printed.getvalue()


@pytest.mark.slow
def test_demo_shows_the_gains_of_all_three_families(shown):
    out, record, printed = shown
    accuracy = record["metrics"]["accuracy"]
    assert tuple(accuracy) == (THINGS, DIGITS)
    # Measured with the checkpoints in the package; rounding moves single images.
    digits, things = accuracy[DIGITS], accuracy[THINGS]
    assert digits["zero-shot"] > 80
    assert digits["proxies, balanced"] > digits["zero-shot"] + 8
    assert things["zero-shot"] > 52
    assert things["adapted"] > things["zero-shot"] + 10
    tags, masks = record["metrics"]["tags"], record["metrics"]["masks"]
    assert tags["TagCLIP"] > tags["whole image"]
    assert masks["true tags"] > masks["tags found"] > 10
    for value in (*things.values(), *digits.values(), *tags.values(), *masks.values()):
        assert f"{value:.1f}" in printed
    assert "transductive" in printed
    with Image.open(out / "demo.png") as picture:
        assert picture.size[0] > 800
        assert np.asarray(picture.convert("L")).std() > 20  # something is drawn


@pytest.mark.slow
def test_demo_writes_its_images_and_a_page_of_them(shown):
    out, record, _ = shown
    rows = record["results"]
    names = (out / "labels.txt").read_text().split("\n")[:-1]
    assert len(rows) == 648
    assert all("truth" in row for row in rows[:600])
    page = (out / "demo.html").read_text()
    assert page.count("data:image/") >= 648  # every picture, and heat maps
    images, labels, _ = samples.things()
    for number in (0, 599):
        with Image.open(rows[number]["path"]) as image:
            assert (np.asarray(image) == images[number]).all()
        assert rows[number]["truth"] == names[labels[number]]


@pytest.mark.slow
def test_commands_told_at_the_end_work(shown, tmp_path, capsys):
    out, _, _ = shown
    lines = [shlex.split(line) for line in demo.next_steps(out, 0.2).split("\n") if line.startswith("  jaxzs")]
    assert [line[1] for line in lines] == ["classify", "tag", "segment", "--help"]
    for line in lines[:2]:
        assert main(line[1:]) == 0
    assert (out / "classes.html").is_file()
    assert len(list((out / "tags").iterdir())) == 48
    assert "600 images" in capsys.readouterr().out


def test_classified_counts_are_those_of_the_predictions():
    images, labels, names = samples.things()
    few = labels < 4  # 24 images: too few to compare balances, which is fast
    from jaxzs.clip import load

    model = load("art")
    found = demo.classify(model, images[few], labels[few], names[:4], ["a {}"])
    assert tuple(found.accuracy) == METHODS
    for method, predicted in found.predicted.items():
        right = predicted == labels[few]
        assert found.accuracy[method] == pytest.approx(100 * right.mean())
        assert found.per_class[method][1] == pytest.approx(100 * right[labels[few] == 1].mean())
    assert (found.adapted.scores > 1 / 4).all()
