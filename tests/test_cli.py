"""The command line: what it prints, writes and answers, and how it refuses."""

from __future__ import annotations

import csv
import io
import json
import re
import time

import jax
import numpy as np
import pytest
from PIL import Image

import jaxzs
from jaxzs import prompt
from jaxzs.classification import Labelling, check_number_of_classes, classify_features
from jaxzs.cli import COMMANDS, main
from jaxzs.errors import DataError, LabelError, TextError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes in subfolders: 12 dark and 12 bright images, all different."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 180)):
        (folder / name).mkdir()
        for number in range(12):
            pixels = rng.integers(low, low + 70, (40, 36, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run(capsys)[0] == 0
    assert run(capsys, "--version")[1].strip() == f"jaxzs {jaxzs.__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"jaxzs {name}" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    code, _, err = run(capsys, "clasify")
    assert code == 2
    assert "'clasify'" in err
    assert "classify" in err


def test_classify_folder_writes_csv(pictures, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "results.csv"
    options = ["--model", tiny_checkpoint, "--labels", "dark, bright", "--top", 2, "--out", out]
    code, printed, _ = run(capsys, "classify", pictures, *options)
    assert code == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 24
    for row in rows:
        assert {row["label"], row["label_2"]} == {"dark", "bright"}
        assert float(row["score"]) >= float(row["score_2"])
        assert float(row["score"]) + float(row["score_2"]) == pytest.approx(1, abs=1e-5)
    right = np.mean([row["label"] in row["path"] for row in rows])
    assert f"accuracy {100 * right:.2f} % on 24 images (transductive)" in printed


def test_classify_equals_the_library_call(pictures, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "results.json"
    options = ["--model", tiny_checkpoint, "--labels", "dark,bright", "--out", out]
    assert run(capsys, "classify", pictures, *options, "--method", "zero-shot")[0] == 0
    record = json.loads(out.read_text())
    model = jaxzs.load(tiny_checkpoint)
    assert record["model"]["fingerprint"] == model.fingerprint
    images = [np.asarray(Image.open(row["path"])) for row in record["results"]]
    features = jaxzs.zeroshot.image_features(model, model.preprocess(images))
    text = jaxzs.zeroshot.text_proxies(model, ["dark", "bright"])
    result = classify_features(model, features, text, Labelling("zero-shot"))
    for row, label, score in zip(record["results"], result.classes[:, 0], result.scores[:, 0], strict=True):
        assert row["label"] == ("dark", "bright")[label]
        assert row["score"] == pytest.approx(float(score), abs=2e-6)  # written with six digits


def test_subfolders_name_the_classes(pictures, tiny_checkpoint, capsys):
    code, _, err = run(capsys, "classify", pictures, "--model", tiny_checkpoint)
    assert code == 0
    assert "taken from the subfolders: bright, dark" in err


def test_unreadable_images_are_listed_and_show_in_the_exit_code(pictures, tiny_checkpoint, tmp_path, capsys):
    good = pictures / "dark" / "00.png"
    (tmp_path / "good.png").write_bytes(good.read_bytes())
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "worse.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    options = ["--model", tiny_checkpoint, "--labels", "dark,bright", "--method", "zero-shot"]
    code, out, err = run(capsys, "classify", tmp_path, *options)
    assert code == 1
    assert "good.png" in out
    assert "2 of 3 images could not be used" in err
    assert "bad.png" in err
    assert "git-lfs pointer" in err


def test_stored_features_give_equal_results_and_are_not_computed_again(
    pictures, tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    (tmp_path / "images").mkdir()
    for image in sorted((pictures / "dark").iterdir())[:5]:
        (tmp_path / "images" / image.name).write_bytes(image.read_bytes())
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    options = ["--model", tiny_checkpoint, "--labels", "dark,bright", "--method", "zero-shot"]
    plain = run(capsys, "classify", tmp_path / "images", *options)
    options += ["--store", tmp_path / "store"]
    stored = run(capsys, "classify", tmp_path / "images", *options)
    assert plain == stored
    assert plain[0] == 1
    monkeypatch.setattr("jaxzs.clip.model._encode_image", None)  # whoever calls it now fails
    assert run(capsys, "classify", tmp_path / "images", *options) == stored


@pytest.mark.slow
@pytest.mark.parametrize("modality", [prompt.TextPrompt(4), prompt.VisualPrompt(4)])
def test_classify_with_a_tuned_prompt(modality, pictures, tiny_checkpoint, tmp_path, capsys):
    model = jaxzs.load(tiny_checkpoint)
    names = ("dark", "bright")
    prompts = modality.init(jax.random.key(0), model.config)
    tuned = prompt.TunedPrompt(modality, prompts, names, "a {}", model.fingerprint)
    prompt.save_prompt(tmp_path / "prompt.safetensors", tuned)
    options = ["--model", tiny_checkpoint, "--prompt", tmp_path / "prompt.safetensors"]
    options += ["--out", tmp_path / "results.json"]
    code, printed, _ = run(capsys, "classify", pictures, *options)
    assert code == 0
    assert "method zero-shot" in printed
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    pixels = model.preprocess([np.asarray(Image.open(row["path"])) for row in results])
    expected = jax.nn.softmax(prompt.image_logits(model, tuned, pixels), axis=-1).max(axis=1)
    scores = [row["score"] for row in results]
    # Cosines of float32 features agree to 1e-6; the logit scale of 14 and the large test weights amplify that.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=3e-5)


def test_one_image_is_classified_zero_shot_and_says_so(pictures, tiny_checkpoint, capsys):
    image = pictures / "dark" / "00.png"
    code, out, err = run(capsys, "classify", image, "--model", tiny_checkpoint, "--labels", "dark,bright")
    assert code == 0
    assert "method zero-shot" in out
    assert "one image only" in err


@pytest.mark.slow
def test_few_images_are_warned_about(pictures, tiny_checkpoint, capsys):
    images = sorted((pictures / "dark").iterdir())[:3]
    options = ["--model", tiny_checkpoint, "--method", "proxy", "--labels"]
    assert "fewer than about 10 images" in run(capsys, "classify", *images, *options, "a,b")[2]
    assert "fewer images than classes" in run(capsys, "classify", *images, *options, "a,b,c,d")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "a,b"], "no images given"),
        (["no/such/folder", "--labels", "a,b"], "no such file or folder: no/such/folder"),
        (["{dark}"], "what are the classes"),
        (["{dark}", "--labels", "a"], "one class only"),
        (["{dark}", "--labels", "a,,b"], "number 1 is empty"),
        (["{dark}", "--labels", "a,b,a"], "more than once: a"),
        (["{dark}", "--labels", "a,b", "--dataset", "x"], "only one of"),
        (["{dark}", "--labels", "a,b", "--gamma", "2"], "--gamma is '2'"),
        (["{dark}", "--labels", "a,b", "--gamma", "x"], "--gamma is 'x'"),
        (["{dark}", "--labels", "a,b", "--out", "x.txt"], r"must end in .csv or .json"),
        (["{dark}", "--labels", "a,b", "--templates", "no hole"], "exactly once"),
        (["{dark}", "--labels", "a,b", "--batch-size", "0"], "at least 1"),
        (["{dark}", "--labels-file", "no/file"], "cannot read class names from no/file"),
        (["{dark}", "--labels", "a,b", "--model", "./no/model"], "no/model"),
    ],
)
def test_wrong_input_is_named_without_traceback(arguments, message, pictures, tiny_checkpoint, capsys):
    arguments = [argument.format(dark=pictures / "dark") for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", str(tiny_checkpoint)]
    code, _, err = run(capsys, "classify", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_labels_from_a_file(pictures, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("dark\n\nbright\n")
    (tmp_path / "labels.json").write_text('["dark", "bright"]')
    (tmp_path / "wrong.json").write_text('{"dark": 1}')
    options = ["--model", tiny_checkpoint, "--method", "zero-shot", "--labels-file"]
    lines = run(capsys, "classify", pictures, *options, tmp_path / "labels.txt")[1]
    assert lines == run(capsys, "classify", pictures, *options, tmp_path / "labels.json")[1]
    code, _, err = run(capsys, "classify", pictures, *options, tmp_path / "wrong.json")
    assert code == 2
    assert "expected a JSON list" in err


def test_more_classes_than_memory_allows(tiny_checkpoint):
    with pytest.raises(LabelError, match=r"at most [\d,]+ classes"):
        check_number_of_classes(10**12, 16)
    model = jaxzs.load(tiny_checkpoint)
    with pytest.raises(DataError, match="no images"):
        classify_features(model, np.zeros((0, 16), np.float32), np.eye(3, 16, dtype=np.float32))


@pytest.mark.slow
def test_proxies_of_one_folder_classify_another(pictures, tmp_path, capsys):
    kept = tmp_path / "proxies.safetensors"
    names = ["--labels", "red circle,blue square"]
    code, out, _ = run(capsys, "classify", pictures, *names, "--save", kept)
    assert code == 0
    assert f"head kept in {kept}" in out
    # Learned on all images, the kept proxies say of each what they said then, also of one alone.
    learned = {line.split()[0]: line.split()[1:3] for line in out.splitlines() if ".png" in line}
    image = pictures / "dark" / "03.png"
    code, out, _ = run(capsys, "classify", image, "--proxies", kept, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["settings"]["method"] == "learned"
    assert record["class_names"] == ["red circle", "blue square"]
    (found,) = record["results"]
    assert learned[str(image)] == found["label"].split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "p.safetensors", "--method", "zero-shot"], "none are learned here"),
        (["--save", "p.npz"], "--save p.npz: the name must end in .safetensors"),
        (["--proxies", "p.safetensors", "--labels", "a,b"], "replaces --labels; leave these out"),
        (["--proxies", "p.safetensors"], "cannot read p.safetensors"),
    ],
)
def test_proxies_that_cannot_be_kept_or_used(pictures, arguments, message, capsys):
    code, _, err = run(capsys, "classify", pictures, *arguments)
    assert code == 2
    assert message in err


# --- jaxzs.classify, which the command is --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero-shot", "proxy"])
def test_the_function_returns_what_the_command_writes(pictures, tiny_checkpoint, tmp_path, capsys, method):
    out = tmp_path / "results.json"
    options = ["--model", tiny_checkpoint, "--labels", "dark,bright", "--method", method, "--top", 2, "--out", out]
    assert run(capsys, "classify", pictures, *options)[0] == 0
    written = json.loads(out.read_text())["results"]
    rows = jaxzs.classify(pictures, ["dark", "bright"], tiny_checkpoint, labelling=Labelling(method, top=2))
    assert rows == [{name: row[name] for name in ("path", "label", "score", "top")} for row in written]


def test_images_may_be_in_memory(pictures, tiny_checkpoint):
    model, names = jaxzs.load(tiny_checkpoint), ("dark", "bright")
    paths = sorted((pictures / "dark").iterdir())[:4]
    from_files = jaxzs.classify(paths, names, model, labelling=Labelling("zero-shot"))
    images = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(image) for image in images])
    for given in (images, arrays, list(arrays)):
        rows = jaxzs.classify(given, names, model, labelling=Labelling("zero-shot"))
        assert [row["path"] for row in rows] == ["0", "1", "2", "3"]
        assert [row["top"] for row in rows] == [row["top"] for row in from_files]


@pytest.mark.slow
def test_the_function_names_what_is_wrong(pictures, tiny_checkpoint, tmp_path):
    model = jaxzs.load(tiny_checkpoint)
    for labels, message in ((None, "what are the classes"), ([], "non-empty"), (["a"], "one class only")):
        with pytest.raises(LabelError, match=message):
            jaxzs.classify(pictures / "dark", labels, model)
    with pytest.raises(LabelError, match="non-empty list of texts"):
        jaxzs.classify(pictures, "dark,bright", model)
    with pytest.raises(DataError, match="no such file"):
        jaxzs.classify(tmp_path / "nowhere", ["a", "b"], model)
    with pytest.raises(TextError, match="never seen"):
        jaxzs.classify(pictures, ["zebra", "giraffe"])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the 1 images"):
        jaxzs.classify(tmp_path / "bad.png", ["a", "b"], model)
    with pytest.warns(UserWarning, match="1 of 2 images could not be read"):
        rows = jaxzs.classify(
            [tmp_path / "bad.png", pictures / "dark" / "00.png"], ["a", "b"], model, labelling=Labelling("zero-shot")
        )
    assert len(rows) == 1


def test_the_truth_is_written_beside_and_measured(pictures, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "results.csv"
    names = "dark,bright,a,b,c,d"
    options = ["--model", tiny_checkpoint, "--labels", names, "--method", "zero-shot", "--out", out]
    code, printed, _ = run(capsys, "classify", pictures, *options)
    assert code == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["path", "label", "score", "truth"]
    assert all(row["truth"] in row["path"] for row in rows)
    metrics = json.loads(out.with_suffix(".json").read_text())["metrics"]
    right = {name: [r["label"] == name for r in rows if r["truth"] == name] for name in ("dark", "bright")}
    assert metrics["recall"] == {name: pytest.approx(100 * np.mean(own)) for name, own in right.items()}
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean([*metrics["recall"].values()]))
    assert metrics["accuracy"] <= metrics["accuracy_at_5"] <= 100
    for name, counts in metrics["confusion"].items():
        assert sum(counts.values()) == 12
        assert counts == {x: sum(r["label"] == x and r["truth"] == name for r in rows) for x in counts}
    assert "mean per-class recall" in printed
    assert "truth, labelled as" in printed


def test_on_a_terminal_many_images_are_counts_and_the_least_certain(pictures, tiny_checkpoint, capsys, monkeypatch):
    options = ["--model", tiny_checkpoint, "--labels", "dark,bright", "--method", "zero-shot"]
    everything = run(capsys, "classify", pictures, *options)[1]
    assert everything.count(".png ") == 24
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    printed = run(capsys, "classify", pictures, *options)[1]
    assert printed.count(".png ") == 20
    assert "the 20 least certain of 24 images" in printed
    assert "labels: " in printed


def test_names_that_occur_twice_are_told_apart_by_their_labels():
    from jaxzs.commands.options import told_apart
    from jaxzs.data import dataset_info

    names = told_apart(dataset_info("imagenet"))
    assert len(set(names)) == 1000
    assert {"sunglasses (n04355933)", "sunglasses (n04356056)"} <= set(names)
    assert names[0] == "tench"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command_and_option(shell, capsys):
    code, out, _ = run(capsys, "--tyro-print-completion", shell)
    assert code == 0
    for part in ("jaxzs", "--labels-file", "--no-cache", *COMMANDS):
        assert part in out


def test_completion_into_a_pipe_that_is_closed(monkeypatch):
    """As `| head` does."""

    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert main(["--tyro-print-completion", "bash"]) == 0


# --- names that are hostile, or cannot be shown ------------------------------------------------------------------


def test_names_cannot_steer_the_terminal(pictures, tiny_checkpoint, tmp_path, capsys):
    for name in ("\x1b[2J.png", "\x1b[31mred\x1b[0m.png", "\x1b]0;title\x07.png", "a\rb.png", "a\nb.png"):
        (tmp_path / name).write_bytes((pictures / "dark" / "00.png").read_bytes())
    (tmp_path / "\x1b[8m.png").write_bytes(b"damaged")
    options = ["--model", tiny_checkpoint, "--labels", "\x1b[5mdark,bright", "--method", "zero-shot"]
    code, out, err = run(capsys, "classify", tmp_path, *options)
    assert code == 1
    assert not {"\x1b", "\x07", "\r"} & {*out, *err}
    assert "\\x1b[2J.png" in out
    assert "a\\nb.png" in out, "one line an image"
    assert "\\x1b[8m.png" in err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_that_cannot_show_a_name_gets_the_rest(pictures, tiny_checkpoint, tmp_path, monkeypatch, encoding):
    out = tmp_path / "o.csv"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    options = ["--model", str(tiny_checkpoint), "--labels", "zéro,猫", "--method", "zero-shot", "--out", str(out)]
    assert main(["classify", str(pictures / "dark"), *options]) == 0
    stream.flush()
    assert "12 images, 2 classes" in stream.buffer.getvalue().decode(encoding)
    assert {row["label"] for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines())} <= {"zéro", "猫"}


def test_files_are_written_before_the_screen(pictures, tiny_checkpoint, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("jaxzs.commands.terminal.say", broken)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    out = tmp_path / "o.csv"
    options = ["--model", str(tiny_checkpoint), "--labels", "a,b", "--method", "zero-shot", "--out", str(out)]
    assert main(["classify", str(pictures / "dark"), *options]) == 0
    assert len(out.read_text().splitlines()) == 13
    assert len(json.loads(out.with_suffix(".json").read_text())["results"]) == 12


def test_the_clock_goes_on_while_nothing_is_said(monkeypatch, capsys):
    from tqdm import tqdm

    from jaxzs.commands import terminal

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown, end = "", time.monotonic() + 120
    with terminal.ticking(), terminal.clock("thinking"):
        while not re.search(r"thinking (?!00:00)\d\d:\d\d", shown):  # the first shown may be a later one
            assert time.monotonic() < end
            time.sleep(0.1)
            shown += capsys.readouterr().err
        terminal.say("a line between")
    assert capsys.readouterr().out == "a line between\n"
    assert not list(tqdm._instances)
    with terminal.clock("thinking", disable=True):  # --quiet
        pass
    assert capsys.readouterr().err == ""
