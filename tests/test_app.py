"""`jaxzs app`: what its buttons run, without a browser and without Gradio; tests/test_browser.py opens the page."""

from __future__ import annotations

import html
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxzs import cli
from jaxzs.commands import app
from jaxzs.commands.terminal import explained
from jaxzs.errors import CheckpointError, DataError, ImageError, JaxzsError, LabelError, TextError

NAMES = "dark, bright"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    """Twelve photos of two kinds, two of them of one name, as a server would keep what was dropped."""
    folder = tmp_path_factory.mktemp("uploads")
    random = np.random.default_rng(0)
    files = []
    for number in range(12):
        file = folder / str(number) / ("same.png" if number < 2 else f"{number}.png")
        file.parent.mkdir()
        low = 190 * (number % 2)
        Image.fromarray(random.integers(low, low + 60, (40, 48, 3)).astype(np.uint8)).save(file)
        files.append(str(file))
    return files


@pytest.fixture
def desk(tiny_checkpoint, tmp_path) -> app.Desk:
    return app.Desk(app.AppOptions(model=str(tiny_checkpoint), no_cache=True), tmp_path / "desk")


@pytest.fixture(autouse=True)
def folder(tmp_path) -> None:
    (tmp_path / "desk").mkdir()


def asked(desk: app.Desk, files, labels: str = NAMES, templates: str = "a {}\n") -> app.Asked:
    return app.Asked(desk.options.model, files, labels, templates)


def names_of(shown: app.Shown) -> list[str]:
    return [Path(file).name for file in shown.files]


def test_labels(desk, photos, capsys):
    shown = desk.classify(asked(desk, photos), "zero-shot")
    assert names_of(shown) == ["results.csv", "results.html", "results.json"]
    table = Path(shown.files[0]).read_text().splitlines()
    assert len(table) == 13
    assert {"same.png", "same-2.png"} <= {Path(line.split(",")[0]).name for line in table}
    assert shown.page.startswith('<iframe title="Results" sandbox="allow-scripts" srcdoc="&lt;!doctype html')
    assert Path(shown.files[1]).read_text() in html.unescape(shown.page)
    assert "12 images" in shown.told
    # What can be typed, without the folders of the server.
    command = html.unescape(shown.told)
    for part in ("jaxzs classify images --labels 'dark, bright'", "--templates 'a {}'", "--out results.csv"):
        assert part in command
    assert str(desk.folder) not in command
    assert capsys.readouterr().out == "", "the page shows the answer, not the terminal of the server"


@pytest.mark.slow
def test_what_was_learned_labels_other_images(desk, photos):
    shown, head = desk.learn(asked(desk, photos))
    assert head is not None
    assert "head.safetensors" in names_of(shown)
    one = desk.classify(asked(desk, photos[:1], labels=""), "auto", head)
    assert "1 image<" in one.told
    assert "--proxies head.safetensors" in one.told
    # Of one image nothing is learned, which is said.
    shown, head = desk.learn(asked(desk, photos[:1]))
    assert head is None
    assert "one image only" in shown.told


@pytest.mark.slow
def test_tags_and_masks(desk, photos):
    shown = desk.tag(asked(desk, photos[:2]), "sky", 0.5)
    assert [caption for _, caption in shown.pictures] == ["same", "same-2"]
    assert all(Path(file).is_file() for file, _ in shown.pictures)
    assert names_of(shown) == ["results.csv", "results.html", "results.json"]
    shown = desk.segment(asked(desk, photos[:2]), "", "scores", False)
    assert len(shown.pictures) == 2
    assert names_of(shown) == ["masks.zip", "results.html"]
    kept = {Path(name).name for name in zipfile.ZipFile(shown.files[0]).namelist()}
    assert {"same.png", "same-2.png", "masks.json"} <= kept


@pytest.mark.slow
def test_bars_that_are_not_drawn_count_right(desk, photos, monkeypatch):
    """The page shows the commands' bars by what `update` and the total say: Gradio listens there."""
    from tqdm import tqdm

    bars: dict[str, list[int]] = {}
    made, updated = tqdm.__init__, tqdm.update

    def heard(bar, iterable=None, desc=None, total=None, *others, **more):
        bars[desc] = [0, total]
        bar.named = desc
        made(bar, iterable, desc, total, *others, **more)

    def counted(bar, n=1):
        bars[bar.named][0] += n
        return updated(bar, n)

    monkeypatch.setattr(tqdm, "__init__", heard)
    monkeypatch.setattr(tqdm, "update", counted)
    desk.tag(asked(desk, photos[:9]), "", 0.5)  # more than a batch
    assert bars["tag images"] == [9, 9]
    desk.classify(asked(desk, photos), "auto")
    assert bars["encode images"] == [12, 12]
    assert bars["encode texts"] == [2, 2]
    assert all(total is not None for _, total in bars.values()), "else Gradio shows no name"


def test_names_are_escaped(desk, photos, tmp_path):
    evil = tmp_path / '<img src=x onerror="hacked=1">.png'
    evil.write_bytes(Path(photos[0]).read_bytes())
    broken = tmp_path / "<b>broken.png"
    broken.write_text("no image")
    files = [str(evil), str(broken), photos[1]]
    shown = desk.classify(asked(desk, files, labels="<script>hacked=1</script>, b"), "zero-shot")
    for text in (shown.told, shown.page):
        assert "<img" not in text
        assert "<script" not in text
        assert "<b>" not in text
    assert "&lt;b&gt;broken.png" in shown.told, "what could not be read is told"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"files": []}, DataError, "no images yet: drop some"),
        ({"labels": " "}, LabelError, "Type their names"),
        ({"labels": "one"}, LabelError, "one class only"),
        ({"labels": "a, a"}, LabelError, "more than once: a"),
        ({"templates": "no place"}, LabelError, "{}"),
        ({"model": "no/such/folder"}, CheckpointError, "no/such/folder"),
        ({"model": "demo", "labels": "giraffe, zebra"}, TextError, "never seen the words: giraffe, zebra"),
    ],
)
def test_errors_have_names(desk, photos, change, error, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error) as caught:
        desk.classify(asked(desk, photos[:2])._replace(**change), "zero-shot")
    told = desk.plain(explained(caught.value))
    assert message in told
    assert str(desk.folder) not in told


def test_files_that_are_no_images(desk, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "note.txt").write_text("text")
    for name, message in {"broken.png": "images/broken.png", "note.txt": "no images"}.items():
        with pytest.raises(JaxzsError) as caught:
            desk.tag(asked(desk, [str(tmp_path / name)]), "", 0.5)
        told = desk.plain(explained(caught.value))
        assert message in told
        assert str(desk.folder) not in told


def test_images_as_large_as_the_commands_take(desk, photos, monkeypatch):
    monkeypatch.setattr("jaxzs.data.images.MAX_FILE_BYTES", 10)
    with pytest.raises((DataError, ImageError), match="more than 10 are refused"):
        desk.classify(asked(desk, photos[:2]), "zero-shot")


def test_images_that_the_command_names_are_used_where_none_are_dropped(desk, photos):
    own = app.Desk(app.AppOptions(images=tuple(photos[:3]), model=desk.options.model), desk.folder)
    assert "3 images" in own.classify(asked(own, []), "zero-shot").told
    assert "2 images" in own.classify(asked(own, photos[:2]), "zero-shot").told


def test_a_shared_page_opens_no_other_folder(desk, photos):
    shared = app.Desk(app.AppOptions(model=desk.options.model, share=True), desk.folder)
    assert "2 images" in shared.classify(asked(shared, photos[:2]), "zero-shot").told
    with pytest.raises(CheckpointError, match="this page is shared"):
        shared.classify(asked(shared, photos[:2])._replace(model="demo"), "zero-shot")


def test_a_large_results_page_is_a_file(desk, photos, monkeypatch):
    monkeypatch.setattr(app, "_MOST_SHOWN", 1000)
    shown = desk.classify(asked(desk, photos[:2]), "zero-shot")
    assert "open the file results.html" in shown.page
    assert "results.html" in names_of(shown)


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 2
    assert "pip install 'jaxzs[app]'" in capsys.readouterr().err


def test_the_port_is_one(capsys):
    assert cli.main(["app", "--port", "70000"]) == 2
    assert "--port is 70000, expected 1 to 65535" in capsys.readouterr().err
