"""From a model and images to a saved prompt and back: preparation, files, inference, evaluation, command line."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompt_golden import load
from safetensors.numpy import save_file

import jaxzs
from jaxzs import clip, data, prompt
from jaxzs.commands import tune
from jaxzs.errors import DataError, JaxzsError, LabelError, TextError
from jaxzs.files import read_arrays, write_arrays
from jaxzs.prompt import files, inference

NAMES = ("circle", "square", "star")


@pytest.fixture(scope="module")
def model():
    return jaxzs.load("demo")


@pytest.fixture(scope="module")
def images():
    """24 images in three colours, a class each: what is learned does not matter here."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    pixels = rng.integers(0, 90, (24, 48, 48, 3), np.uint8)
    pixels[np.arange(24), :, :, labels] += 150
    return pixels, labels


def tuned_of(model, modality, seed=0) -> prompt.TunedPrompt:
    prompts = modality.init(jax.random.key(seed), model.config)
    return prompt.TunedPrompt(modality, prompts, NAMES, "a photo of a {}", model.fingerprint, {"k": 3})


MODALITIES = [prompt.TextPrompt(4), prompt.VisualPrompt(4), prompt.JointPrompt(2, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES, ids=lambda m: m.name)
def test_prompts_come_back_as_they_were_saved(model, modality, tmp_path):
    tuned = tuned_of(model, modality)
    path = tmp_path / "deep" / "prompt.safetensors"
    prompt.save_prompt(path, tuned)
    read = prompt.load_prompt(path, model)
    jax.tree.map(np.testing.assert_array_equal, read.prompts, tuned.prompts)
    assert dataclasses.replace(read, prompts=None) == dataclasses.replace(tuned, prompts=None)


def test_prompts_of_other_checkpoints(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    prompt.save_prompt(path, tuned_of(model, MODALITIES[0]))
    wider = dataclasses.replace(model.config.text, hidden_size=128)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, text=wider))
    width = model.config.text.hidden_size
    with pytest.raises(DataError, match=rf"text width 128.*prefix is \(4, {width}\), expected \(4, 128\)"):
        prompt.load_prompt(path, other)
    prompt.save_prompt(path, dataclasses.replace(tuned_of(model, MODALITIES[0]), fingerprint="f" * 64))
    with pytest.warns(UserWarning, match="another checkpoint"):
        prompt.load_prompt(path, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.write_bytes(b"not at all"), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "damaged"),
        (lambda path: write_arrays(path, {"prefix": np.zeros(3)}, {}), "holds no prompt"),
        (
            lambda path: write_arrays(path, {}, {"format": files.FORMAT, "modality": {"name": "audio"}}),
            "description of the prompt is damaged",
        ),
    ],
)
def test_damaged_files_are_refused(model, tmp_path, change, message):
    path = tmp_path / "prompt.safetensors"
    prompt.save_prompt(path, tuned_of(model, MODALITIES[0]))
    change(path)
    with pytest.raises(DataError, match=message):
        prompt.load_prompt(path, model)


def test_prompts_that_are_not_finite_are_refused(model, tmp_path):
    tuned = tuned_of(model, MODALITIES[0])
    spoiled = {"prefix": tuned.prompts["prefix"].at[0, 0].set(jnp.nan)}
    prompt.save_prompt(tmp_path / "p.safetensors", dataclasses.replace(tuned, prompts=spoiled))
    with pytest.raises(DataError, match="not finite"):
        prompt.load_prompt(tmp_path / "p.safetensors", model)


@pytest.mark.slow
def test_classify_is_the_features_of_both_towers(model, images):
    tuned = tuned_of(model, MODALITIES[2])
    pixels = model.preprocess(list(images[0][:5]))
    logits = prompt.image_logits(model, tuned, pixels, batch_size=2)
    text, visual = prompt.joint_prefixes(tuned.prompts)
    ids = prompt.placeholder_ids(model.tokenize(NAMES)[0], 2, model.config.text)
    expected = clip.logits_per_image(
        prompt.image_features(model.params, visual, pixels, model.config),
        prompt.text_features(model.params, text, ids, model.config),
        model.params["logit_scale"],
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    other = prompt.image_logits(model, tuned, pixels, class_names=["arrow", "circle"])
    np.testing.assert_allclose(other[:, 1], logits[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_read_out_of_vectors_that_are_words(model):
    ids = model.tokenize(["circle star"])[0][0]
    table = model.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    tuned = dataclasses.replace(tuned_of(model, MODALITIES[0]), prompts={"prefix": table[ids[1:3]]})
    near = prompt.nearest_tokens(model, tuned, 2)
    assert [one[0].text.removesuffix("</w>") for one in near] == ["circle", "star"]
    assert near[0][0].distance == 0
    assert near[0][1].distance > 0.01
    with pytest.raises(DataError, match="no context vectors"):
        prompt.nearest_tokens(model, tuned_of(model, MODALITIES[1]))
    assert inference.text_prefix(tuned_of(model, MODALITIES[2])).shape[0] == 2


@pytest.mark.slow
def test_freeze_templates(model):
    modality = prompt.TextPrompt(4)
    literal = prompt.freeze(model, modality, ["circle", "big_star"], template="a {}")
    filled = prompt.freeze(model, modality, ["circle", "big star"], template="a {}", literal_braces=False)
    np.testing.assert_array_equal(literal.input_ids, filled.input_ids)  # underscores are blanks
    np.testing.assert_array_equal(filled.text_features, filled.pseudolabel_features)
    texts = model.tokenize(["a {}circle", "a {}big star"])[0]
    expected = clip.encode_text(model.params, texts, model.config)
    np.testing.assert_allclose(literal.pseudolabel_features, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(LabelError, match="more than once"):
        prompt.freeze(model, modality, ["circle", "circle"])
    with pytest.raises(LabelError, match="exactly once"):
        prompt.freeze(model, modality, ["circle"], template="a photo")
    with pytest.raises(TextError, match="Shorten the name or the prompt"):
        prompt.freeze(model, prompt.TextPrompt(40), ["circle"])


def test_original_bpe_layout_of_real_class_names(shared):
    tokenizer = clip.Tokenizer.from_folder(shared / "golden" / "tokenizer")
    with np.load(shared / "golden" / "prompt_tuning" / "tokens.npz") as file:
        tokens = dict(file)
    text = clip.TextConfig()
    for name in ("eurosat", "dtd"):
        classes = [str(one) for one in tokens[f"{name}_classes"]]
        for length in (16, 4):
            original = tokens[f"{name}_prefix{length}"]
            ids = prompt.placeholder_ids(tokenizer(classes)[0], length, text)
            kept = np.delete(original[:, : ids.shape[1]], slice(1, 1 + length), axis=1)
            own = np.delete(ids, slice(1, 1 + length), axis=1)
            end = kept.argmax(1)[:, None]
            position = np.arange(kept.shape[1])[None]
            np.testing.assert_array_equal(np.where(position <= end, own, 0), np.where(position <= end, kept, 0))
        for template, text_of in (
            ("template", "a photo of a {}".replace("{}", "{name}")),
            ("pseudolabel_template", "a photo of a {{}}{name}"),
        ):
            ids, mask = tokenizer([text_of.format(name=c) for c in classes])
            original = tokens[f"{name}_{template}"][:, : ids.shape[1]]
            np.testing.assert_array_equal(np.where(mask, ids, 0), original)


def test_sources_are_read_in_order(model, images):
    pixels, labels = images
    source = data.from_arrays(pixels, labels, label_names=NAMES)
    found, found_labels = prompt.read_source(model, MODALITIES[1], source, batch_size=7)
    expected = prompt.constant_images(
        MODALITIES[1], model.params, model.preprocess(list(pixels)), model.config, batch_size=5
    )
    np.testing.assert_array_equal(found_labels, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="no images"):
        prompt.constant_images(MODALITIES[1], model.params, np.zeros((0, 48, 48, 3)), model.config)


def test_evaluation_as_in_the_original():
    golden = load("protocol")
    plain = prompt.evaluate(golden["eval_pred"], golden["eval_true"])
    assert plain.accuracy == pytest.approx(golden["eval_ssl"][0])
    trzsl = prompt.evaluate(golden["eval_pred"], golden["eval_true"], np.arange(4))
    assert [trzsl.unseen, trzsl.seen, trzsl.headline] == pytest.approx(golden["eval_trzsl"].tolist())
    assert plain.headline == plain.accuracy
    with pytest.raises(DataError, match="needs both"):
        prompt.evaluate(np.array([0]), np.array([0]), np.array([0]))
    with pytest.raises(DataError, match="must be"):
        prompt.evaluate(np.array([0]), np.array([0, 1]))


def options_for(tmp_path, pictures, /, **changes) -> tune.TuneOptions:
    file = tmp_path / "images.npz"
    np.savez(file, images=pictures[0], labels=pictures[1], label_names=np.array(NAMES))
    chosen = {"images": str(file), "epochs": 2, "iterations": 2, "prompt_length": 4, "out": tmp_path / "p.safetensors"}
    return tune.TuneOptions(**(chosen | changes))


@pytest.mark.slow
def test_command_tunes_saves_and_reports(tmp_path, images, model, capsys):
    options = options_for(tmp_path, images, test=str(tmp_path / "images.npz"), seeds=(1, 2))
    assert tune.run(options) == 0
    printed = capsys.readouterr().out
    assert "zero-shot: " in printed
    assert "iteration 2, K 8" in printed
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["metrics"]["iterations"][1]["k"] == [8, 8]
    last = report["metrics"]["iterations"][-1]["test"]
    for r, seed in enumerate((1, 2)):
        tuned = prompt.load_prompt(tmp_path / f"p-seed{seed}.safetensors", model)
        assert tuned.class_names == NAMES
        logits = prompt.image_logits(model, tuned, model.preprocess(list(images[0])))
        assert (logits.argmax(1) == images[1]).mean() == pytest.approx(last[r]["accuracy"])
    assert not list(tmp_path.glob("*.state.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paradigm": "ul", "strategy": "labelled"}, "no labels to train on"),
        ({"labels": "circle, square"}, "1 of 3 labels of the data have no class name"),
        ({"labels": "a,b,c", "dataset": "mnist"}, "only one of"),
        ({"labels": "circle,square,zebra"}, "1 of 3 labels of the data have no class name"),
        ({"iterations": 30}, "K = 0: 24 unlabelled images in 30 iterations"),
        ({"paradigm": "ssl", "labels_per_class": 9}, "class 0 has 8 images"),
        ({"out": "prompt.npz"}, "must end in .safetensors"),
        ({"seeds": (1, 1)}, "distinct"),
        ({"k": 0}, "--k is 0, expected at least 1"),
        ({"images": "nowhere"}, "nowhere"),
    ],
)
def test_command_refuses(tmp_path, images, changes, message):
    if "out" in changes:
        changes = {**changes, "out": tmp_path / changes["out"]}
    with pytest.raises(JaxzsError, match=message):
        tune.run(options_for(tmp_path, images, **changes))


@pytest.mark.parametrize(
    "edit",
    [
        {"length": "4"}, {"length": 4.0}, {"length": None}, {"length": [4]}, {"length": float("inf")}, {"length": 0},
        {"length": -1}, {"length": True}, {"length": 10**12}, {"name": "audio"}, {"name": ["text"]}, {"name": None},
        {"half": "yes"}, {"deviation": "0.02"}, {"deviation": float("nan")}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_odd_descriptions_are_refused(model, tmp_path, edit):
    """With a checksum that fits, as of a hostile file."""
    path = tmp_path / "p.safetensors"
    prompt.save_prompt(path, tuned_of(model, MODALITIES[0]))
    arrays, values = read_arrays(path, "")
    header = json.dumps({**{k: v for k, v in values.items() if k != "sha256"}, "modality": values["modality"] | edit})
    save_file(arrays, path, metadata={"jaxzs": header})
    with pytest.raises(DataError, match=r"description of the prompt is damaged|does not fit this checkpoint"):
        prompt.load_prompt(path, model)


@pytest.mark.parametrize(
    "edit", [{"class_names": 5}, {"class_names": [1]}, {"template": None}, {"settings": 3}], ids=str
)
def test_odd_values_are_refused(model, tmp_path, edit):
    path = tmp_path / "p.safetensors"
    prompt.save_prompt(path, tuned_of(model, MODALITIES[0]))
    arrays, values = read_arrays(path, "")
    values.pop("sha256")
    write_arrays(path, arrays, {**values, **edit})
    with pytest.raises(DataError, match="description of the prompt is damaged"):
        prompt.load_prompt(path, model)


def test_a_flipped_bit_of_a_prompt_is_named(model, tmp_path):
    path = tmp_path / "p.safetensors"
    prompt.save_prompt(path, tuned_of(model, MODALITIES[0]))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="does not match its checksum"):
        prompt.load_prompt(path, model)


@pytest.mark.parametrize("value", [3e38, 1e13, float("inf")])
def test_prompts_beyond_all_use_are_refused(model, tmp_path, value):
    """Whatever a tower makes of such numbers is NaN, or the same for every image."""
    tuned = tuned_of(model, MODALITIES[0])
    spoiled = {"prefix": tuned.prompts["prefix"].at[0, 0].set(value)}
    prompt.save_prompt(tmp_path / "p.safetensors", dataclasses.replace(tuned, prompts=spoiled))
    with pytest.raises(DataError, match=r"not finite|has diverged"):
        prompt.load_prompt(tmp_path / "p.safetensors", model)


def test_classes_that_a_prompt_makes_alike_are_named(model, images):
    tuned = tuned_of(model, MODALITIES[0])
    huge = dataclasses.replace(tuned, prompts={"prefix": tuned.prompts["prefix"] + jnp.float32(3e38)})
    with pytest.raises(DataError, match=r"not finite|same text features"):
        prompt.prompted_encoders(model, huge)


def test_a_second_use_compiles_nothing(model, images):
    """The weights are arguments of the program, and the program is the module's, not the call's."""
    pixels = model.preprocess(list(images[0][:4]))
    first = tuned_of(model, MODALITIES[1])
    prompt.image_logits(model, first, pixels)
    programs = inference._encode_image, inference._class_features
    before = [program._cache_size() for program in programs]
    prompt.image_logits(model, tuned_of(model, MODALITIES[1], seed=1), pixels)
    assert [program._cache_size() for program in programs] == before
