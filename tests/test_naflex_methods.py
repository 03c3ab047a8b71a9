"""Methods and commands on a NaFlex checkpoint: on files of any aspect, what `clip.encode_image` says of each alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_classify_layouts import of_gemma
from test_families import GOLDEN
from tiny_model import noise

import jaxzs
from jaxzs import clip, data, features, patch, prompt, zeroshot
from jaxzs.classification import Encoding, encode_source
from jaxzs.cli import main
from jaxzs.clip.model import _encode_image
from jaxzs.commands import app
from jaxzs.errors import ConfigError, DataError

NAMES = "cat,dog"
# Height, width and Pillow's mode: a point, lines, more patches than there are, everything that is no RGB.
SHAPES = [
    (1, 1, "RGB"), (10, 1000, "RGB"), (1000, 10, "L"), (60, 60, "RGBA"), (90, 40, "P"), (33, 57, "LA"),
    (300, 200, "I;16"), (8, 8, "RGB"), (7, 300, "CMYK"), (64, 16, "1"), (50, 41, "F"),
]  # fmt: skip


def picture(number: int) -> Image.Image:
    height, width, mode = SHAPES[number]
    random = np.random.default_rng(number)
    if mode in ("I;16", "F"):
        return Image.fromarray(
            (random.random((height, width)) * 255).astype(np.uint16 if mode == "I;16" else np.float32)
        )
    image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(random.integers(0, 256, (height, width), np.uint8)))
    return image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naflex") / "model"
    shutil.copytree(GOLDEN / "hf_siglip2_naflex", folder)
    of_gemma(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> clip.Model:
    return jaxzs.load(checkpoint)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes; the second image cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (_, _, mode) in enumerate(SHAPES):
        file = folder / ("cat", "dog")[number % 2] / f"{number:02}.{'tiff' if mode in ('CMYK', 'F') else 'png'}"
        file.parent.mkdir(exist_ok=True)
        picture(number).save(file)
    return folder


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The same, and files that are no images, as many as a batch."""
    shutil.copytree(photos, tmp_path / "photos")
    for number in range(4):
        (tmp_path / "photos" / "cat" / f"00-{number}.png").write_bytes(b"damaged")
    return tmp_path / "photos"


def one_by_one(model: clip.Model, folder: Path) -> np.ndarray:
    """Features [N,E] of the files that can be read, each encoded alone, in the order of a source."""
    source, rows = data.open_source(folder), []
    for number in range(len(source)):
        try:
            image = source[number].image
        except jaxzs.errors.ImageError:
            continue
        rows.append(clip.encode_image(model.params, model.preprocess(image), model.config))
    return np.concatenate(rows)


def close(found, expected, features: int = len(SHAPES)) -> None:
    """Other sizes of batches sum in another order: float32 rounding of features of order 1."""
    assert found.shape[0] == features
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


# --- functions --------------------------------------------------------------------------------------------------


def test_patches_are_cut_as_arrays_are(model):
    images = model.preprocess([picture(number) for number in range(5)])
    assert len(images) == 5
    alone = [model.preprocess(picture(number)) for number in range(5)]
    for found, expected in [(images[1:3], [1, 2]), (images[np.array([4, 0])], [4, 0]), (images[-1:], [4])]:
        for number, own in zip(expected, found, strict=True):
            jax.tree.map(np.testing.assert_array_equal, own, alone[number][0])
    assert images[0].values.shape == (16, 192)
    assert jax.tree.map(lambda leaf: leaf[:2], images).mask.shape == (2, 16)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_images_in_memory(model, photos, batch_size):
    source = data.open_source(photos)
    images = model.preprocess([source[number].image for number in range(len(source))])
    found = zeroshot.image_features(model, images, batch_size=batch_size)
    close(found, clip.normalize(jnp.asarray(one_by_one(model, photos))))
    with pytest.raises(DataError, match="no images to encode"):
        zeroshot.image_features(model, images[:0])


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_files_and_what_cannot_be_read(model, damaged, batch_size):
    """Of a batch of nothing but damaged files, too: rows without an image give no NaN."""
    found, numbers, unreadable = encode_source(model, data.open_source(damaged), Encoding(batch_size))
    close(found, clip.normalize(jnp.asarray(one_by_one(model, damaged))))
    assert numbers == list(range(4, 4 + len(SHAPES)))
    assert len(unreadable) == 4


def test_one_program_serves_all_aspects(model, photos):
    jax.clear_caches()
    encode_source(model, data.open_source(photos), Encoding(4))
    assert _encode_image._cache_size() == 1
    count = chex.assert_max_traces(lambda images: clip.encode_image(model.params, images, model.config), n=1)
    encode = jax.jit(count)
    for number in range(len(SHAPES)):
        encode(model.preprocess(picture(number)))


def test_stores_of_features(model, damaged, tmp_path):
    """On eight devices, in batches of eight: eleven images and four that cannot be read."""
    store = features.extract(model, data.open_source(damaged), tmp_path / "stores", batch_size=8, chunk_size=8)
    kept = store.arrays()
    close(kept.features, one_by_one(model, damaged))
    assert kept.indices.tolist() == list(range(4, 4 + len(SHAPES)))
    assert len(kept.skipped) == 4
    before = features.extraction.encode_batch._cache_size()
    features.extract(model, data.from_arrays(noise(11)), tmp_path / "stores", batch_size=8)
    assert features.extraction.encode_batch._cache_size() == before
    with pytest.raises(ConfigError, match="stores of tokens need one grid"):
        features.extract(model, data.open_source(damaged), tmp_path / "tokens", tokens=True)
    assert not (tmp_path / "tokens").exists()


def test_images_over_devices(model, data_mesh):
    images = model.preprocess([picture(number) for number in range(8)])
    rows = jax.sharding.NamedSharding(data_mesh, jax.P("data"))
    params = clip.place_parameters(model.params, model.config, data_mesh)
    found = clip.encode_image(params, jax.device_put(images, rows), model.config)
    assert found.sharding.spec[0] == "data"
    close(found, clip.encode_image(model.params, images, model.config), 8)


def test_a_saved_model_is_the_same_model(model, tmp_path):
    again = jaxzs.load(clip.save(model, tmp_path))
    assert (again.fingerprint, again.preprocessor) == (model.fingerprint, model.preprocessor)


def test_files_give_the_features_of_transformers(shared):
    """Real photos, from the file to the feature, against transformers' own processor and model in float64."""
    golden = shared / "golden" / "families" / "siglip" / "hf_siglip2_naflex"
    names = json.loads((golden / "case.json").read_text())["photos"]
    model = jaxzs.load(golden, towers=("vision",))
    found, _, unreadable = encode_source(
        model, data.open_images([shared / "data" / name for name in names]), Encoding(3)
    )
    assert not unreadable
    with np.load(golden / "ref.npz") as stored:
        expected = stored["image_features"] / np.linalg.norm(stored["image_features"], axis=1, keepdims=True)
    order = np.argsort([str(shared / "data" / name) for name in names])
    close(found, expected[order], len(names))


def test_squares_have_the_same_features_by_the_tower_of_one_size(model):
    """Its grid is the one that the positions were learned on: all else is the same SigLIP."""
    square = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    fixed = clip.fixed_size(model)
    pixels = fixed.preprocess(list(square))
    assert pixels.shape == (2, 32, 32, 3)
    assert fixed.preprocess(picture(1)).shape == (1, 32, 32, 3)
    found = clip.encode_image(fixed.params, pixels, fixed.config)
    close(found, clip.encode_image(model.params, model.preprocess(list(square)), model.config), 2)
    assert fixed.fingerprint != model.fingerprint
    assert clip.fixed_size(fixed) is fixed
    assert clip.fixed_size(dataclasses.replace(model, preprocessor=None)).preprocessor is None
    # Patches and the last block's tokens of a tower that has a grid.
    assert patch.dense_features(fixed.params, pixels, fixed.config).shape == (2, 16, 32)
    prefix = jnp.ones((1, fixed.config.vit.hidden_size))
    assert prompt.image_features(fixed.params, prefix, pixels, fixed.config).shape == (2, 32)


def test_textual_prompts(model, photos):
    source, modality = data.open_source(photos), prompt.TextPrompt(length=2)
    pool = prompt.read_source(model, modality, source, batch_size=4)
    close(pool.images, one_by_one(model, photos))
    images = model.preprocess([source[number].image for number in range(len(source))])
    again = prompt.constant_images(modality, model.params, images, model.config, batch_size=4)
    np.testing.assert_allclose(again, pool.images, atol=1e-5)
    prompts = modality.init(jax.random.key(0), model.config)
    tuned = prompt.TunedPrompt(modality, prompts, ("cat", "dog"), "{}", model.fingerprint)
    logits = prompt.image_logits(model, tuned, images, batch_size=4)
    frozen = prompt.freeze(model, modality, ["cat", "dog"], template="{}")
    task = prompt.Task(modality, model.config)
    # Cosines to 1e-6, at a scale of at most 100.
    np.testing.assert_allclose(logits, prompt.class_logits(task, prompts, frozen, pool.images), atol=1e-3)
    for other in (prompt.VisualPrompt(length=2), prompt.JointPrompt(length=2)):
        with pytest.raises(ConfigError, match=r"NaFlex.*visual prompts"):
            prompt.read_source(model, other, source)


# --- commands ---------------------------------------------------------------------------------------------------


def classify(checkpoint: Path, photos: Path, capsys, *more: str) -> list[dict]:
    words = ["--templates", "{}", "--labels", NAMES] if "--proxies" not in more and "--prompt" not in more else []
    arguments = ["classify", str(photos), *words, "--model", str(checkpoint), "--no-cache", "--json", *more]
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)["results"]


def test_labels_of_the_command_are_those_of_the_features(model, checkpoint, photos, capsys):
    rows = classify(checkpoint, photos, capsys, "--method", "zero-shot", "--batch-size", "4", "--top", "2")
    text = zeroshot.text_proxies(model, NAMES.split(","), ["{}"])
    logits = zeroshot.similarity(jnp.asarray(one_by_one(model, photos)), text) * model.logit_scale
    expected = np.asarray(jax.nn.softmax(logits, axis=1))
    for row, p in zip(rows, expected, strict=True):
        assert {best["label"]: best["score"] for best in row["top"]} == pytest.approx(
            dict(zip(NAMES.split(","), p, strict=True)), abs=1e-4
        )
    again = jaxzs.classify(
        photos, NAMES.split(","), model, templates=["{}"], labelling=jaxzs.classification.Labelling("zero-shot")
    )
    assert [row["label"] for row in again] == [row["label"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "proxy", "gda", "stata", "transclip"])
def test_every_method_labels_all_images(method, checkpoint, photos, capsys):
    rows = classify(checkpoint, photos, capsys, "--method", method)
    assert len(rows) == len(SHAPES)
    assert all(0.5 <= row["score"] <= 1 for row in rows)


@pytest.mark.slow
def test_heads_stores_and_shots(checkpoint, photos, tmp_path, capsys):
    head, store = tmp_path / "head.safetensors", str(tmp_path / "stores")
    learned = classify(checkpoint, photos, capsys, "--method", "proxy", "--save", str(head))
    kept = classify(checkpoint, photos, capsys, "--proxies", str(head))
    assert [(row["label"], row["score"]) for row in kept] == [(row["label"], row["score"]) for row in learned]
    through = classify(checkpoint, photos, capsys, "--method", "proxy", "--store", store)
    assert [row["score"] for row in through] == pytest.approx([row["score"] for row in learned], abs=1e-4)
    assert len(classify(checkpoint, photos, capsys, "--shots", str(photos))) == len(SHAPES)


def test_a_stream(checkpoint, photos, monkeypatch, capsys):
    files = sorted(map(str, photos.rglob("*.*")))
    monkeypatch.setattr("sys.stdin", [f"{file}\n" for file in files])
    # The tiny context has no room for the sentence that streams take.
    bare = functools.partial(zeroshot.text_proxies, templates=["{}"])
    monkeypatch.setattr(zeroshot, "text_proxies", bare)
    words = ["--labels", NAMES, "--model", str(checkpoint), "--no-cache"]
    assert main(["classify", "-", "--stream", *words]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == files
    assert all(0.5 <= float(line[2]) <= 1 for line in lines)


@pytest.mark.slow
def test_extract_and_evaluate(model, checkpoint, photos, tmp_path, capsys):
    where = ["--model", str(checkpoint), "--no-cache", "--out"]
    assert main(["extract", str(photos), *where, str(tmp_path / "stores")]) == 0
    [path] = (tmp_path / "stores").glob("*/store.json")
    close(features.open_store(path.parent).arrays().features, one_by_one(model, photos))
    assert main(["extract", str(photos), *where, str(tmp_path / "stores"), "--tokens"]) == 2
    assert "stores of tokens need one grid" in capsys.readouterr().err
    out = tmp_path / "results"
    sources = ["--data", f"files={photos}", f"store={path.parent}", "--templates", "{}", "--method", "zero-shot", "gda"]
    assert main(["evaluate", *sources, *where, str(out), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 4
    assert cells[0]["accuracy"] == cells[2]["accuracy"]


@pytest.mark.slow
def test_tuning_a_text_and_labels_under_it(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "prompt.safetensors"
    rest = ["--model", str(checkpoint), "--no-cache", "--prompt-length", "2", "--template", "{}", "--epochs", "1"]
    arguments = ["tune", str(photos), *rest, "--labels-per-class", "1", "--strategy", "fpl", "--out", str(out)]
    assert main([*arguments, "--modality", "text"]) == 0
    capsys.readouterr()
    assert len(classify(checkpoint, photos, capsys, "--prompt", str(out))) == len(SHAPES)
    for modality in ("image", "joint"):
        assert main([*arguments, "--modality", modality]) == 2
        assert "NaFlex" in capsys.readouterr().err


@pytest.mark.slow
def test_tags_and_masks_by_the_tower_of_one_size(model, checkpoint, photos, tmp_path, monkeypatch, capsys):
    """Larger ones of the images, told by name, and as the functions give them."""
    monkeypatch.chdir(tmp_path)
    files = [photos / "cat" / "06.png", photos / "dog" / "05.png"]
    words = ["--labels", NAMES, "--background", "sky", "--templates", "{}", "--model", str(checkpoint), "--no-cache"]
    for command in (["tag"], ["tag", "--learn"], ["segment", "--maps", "dense"], ["segment", "--maps", "scores"]):
        assert main([command[0], *map(str, files), *command[1:], *words, "--json"]) == 0
        told = capsys.readouterr()
        rows = json.loads(told.out)["results"]
        assert [Path(row["path"]) for row in rows] == files
        assert "is used as SigLIP 2 of 32 x 32 pixels, not for any aspect (NaFlex)" in told.err
        if command == ["tag"]:
            first = rows
    texts = patch.tag_texts(model, NAMES.split(","), ["sky"], ["{}"])
    photo = data.open_image(files[0])
    [found] = patch.tag_images(clip.fixed_size(model), [photo], texts, num_foreground=2)
    assert {tag["label"] for tag in first[0]["tags"]} == {
        NAMES.split(",")[place] for place in np.flatnonzero(found.tags)
    }
    with pytest.raises(ConfigError, match=r"NaFlex.*clip\.fixed_size\(model\)"):
        list(patch.tag_images(model, [photo], texts, num_foreground=2))


@pytest.mark.slow
def test_the_bench_measures_squares(checkpoint, capsys):
    arguments = ["bench", "image", "tag", "--model", str(checkpoint), "--rounds", "1", "--batch-size", "2", "--json"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert list(json.loads(told.out)["metrics"]) == ["image"]
    assert "tag is left out: the image tower takes images of any aspect" in told.err


def test_the_page_labels_and_learns(checkpoint, photos, tmp_path):
    (tmp_path / "desk").mkdir()
    desk = app.Desk(app.AppOptions(model=str(checkpoint), no_cache=True), tmp_path / "desk")
    asked = app.Asked(str(checkpoint), sorted(map(str, photos.rglob("*.*"))), NAMES, "{}\n")
    shown, head = desk.learn(asked)
    assert len(Path(shown.files[1]).read_text().splitlines()) == 1 + len(SHAPES)
    assert head is not None
    desk.classify(asked, "zero-shot", head)
