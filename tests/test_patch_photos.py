"""Dense masks and learned tags on photographs, with a ViT-B/16 of random weights: behaviour, not accuracy."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxzs import clip
from jaxzs.cli import main
from jaxzs.clip.tokenizer_files import build, packaged_pipeline

LABELS = "dog,cat,person,sheep,horse"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """ViT-B/16 as published, with OpenAI's tokenizer and two of the twelve blocks of the text tower."""
    published = clip.ARCHITECTURES["ViT-B/16"]
    config = dataclasses.replace(published, text=dataclasses.replace(published.text, num_hidden_layers=2))
    folder = tmp_path_factory.mktemp("vit")
    clip.write_checkpoint(folder, clip.random_params(jax.random.key(0), config), config, "safetensors")
    build(*packaged_pipeline()).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Wide and high ones, one of 12 megapixels, and one without colours."""
    source = Path(__file__).parents[2] / "shared" / "data" / "voc2012" / "images"
    if not source.is_dir():
        pytest.skip("no photographs beside this checkout")
    folder = tmp_path_factory.mktemp("photos")
    by_size = {}
    for path in sorted(source.iterdir()):
        with Image.open(path) as image:
            by_size.setdefault(image.size, path)
    wide, high = by_size[500, 375], by_size[375, 500]
    for path in (wide, high, by_size[500, 332]):
        (folder / path.name).write_bytes(path.read_bytes())
    with Image.open(wide) as image:
        image.resize((4000, 3000)).save(folder / "large.jpg")
        image.convert("L").save(folder / "grey.png")
    return folder


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            found[path.stem] = image.size
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")  # a real width: without it minutes become a quarter of an hour
def test_dense_masks_of_photographs(photos, checkpoint, tmp_path, monkeypatch, capsys):
    """Masks in the photos' own pixels, of the classes that were named; pictures at print size; no warnings."""
    monkeypatch.setenv("JAXZS_CACHE", str(tmp_path / "cache"))
    out, start = tmp_path / "masks", time.perf_counter()
    command = ["segment", str(photos), "--labels", LABELS, "--background", "sky,grass,wall", "--templates", "simple"]
    assert main([*command, "--maps", "dense", "--model", str(checkpoint), "--out", str(out)]) == 0
    seconds = time.perf_counter() - start
    assert "5 masks and overlays" in capsys.readouterr().out
    assert sizes(out / "masks") == sizes(photos)
    record = json.loads((out / "masks.json").read_text())
    rows, names = record["results"], LABELS.split(",")
    assert [Path(row["path"]).stem for row in rows] == sorted(sizes(photos))
    for row in rows:
        with Image.open(row["mask"]) as image:
            assert image.mode == "P"
            labels = np.asarray(image)
        assert set(np.unique(labels)) <= set(range(len(names) + 1))
        shares = {name: float((labels == c).mean()) for c, name in enumerate(names, 1)}
        assert row["tags"] == list(row["covered"])
        assert {name for name, share in shares.items() if share} == set(row["tags"])
        assert all(abs(row["covered"][name] - shares[name]) < 1e-6 for name in row["tags"])
    for path in (out / "overlays").iterdir():
        with Image.open(path) as image:
            assert min(image.info["dpi"]) > 149
    assert 0 < sum(record["seconds"].values()) < seconds


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")  # a real width: without it minutes become a quarter of an hour
def test_learned_tags_of_photographs(photos, checkpoint, tmp_path, monkeypatch, capsys):
    """Tags, with boxes in the photos' own pixels; a photo enlarged to 12 megapixels has the tags that it had."""
    monkeypatch.setenv("JAXZS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "tags.json"
    command = ["tag", str(photos), "--labels", LABELS, "--background", "sky,grass", "--templates", "simple", "--learn"]
    assert main([*command, "--model", str(checkpoint), "--out", str(out), "--overlay", str(tmp_path / "seen")]) == 0
    assert "5 images, 5 classes" in capsys.readouterr().out
    rows = {Path(row["path"]).stem: row for row in json.loads(out.read_text())["results"]}
    assert {stem: tuple(row["size"]) for stem, row in rows.items()} == sizes(photos)
    assert len(list((tmp_path / "seen").iterdir())) == 5
    for row in rows.values():
        width, height = row["size"]
        assert row["tags"]
        assert sum(row["scores"].values()) <= 1 + 1e-5  # what is missing went to the background's names
        for tag in row["tags"]:
            left, top, right, bottom = tag["box"]
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
    [same] = [row for stem, row in rows.items() if row["size"] == [500, 375] and stem != "grey"]
    for name, score in same["scores"].items():
        assert rows["large"]["scores"][name] == pytest.approx(score, abs=0.02)  # resized twice, and JPEG in between
    for own, large in zip(same["tags"], rows["large"]["tags"], strict=False):
        if own["label"] == large["label"]:
            assert np.allclose(np.multiply(own["box"], 8), large["box"], atol=8 * 500 / 14 + 8)  # a patch apart at most
