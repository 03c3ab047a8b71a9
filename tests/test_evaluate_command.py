"""`jaxzs evaluate`, and the regimes that it measures in."""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from jaxzs import cli, evaluation
from jaxzs.errors import ConfigError, DataError
from jaxzs.evaluation import Cell, Labelled, Run, at_once, drawn, measure, read_features, table
from jaxzs.report import Results, read_record

LABELS = np.repeat(np.arange(5), 40)


def test_regimes_draw_what_they_say():
    sizes = lambda regime, seed=0: np.bincount(LABELS[drawn(regime, LABELS, 5, seed)], minlength=5)  # noqa: E731
    assert sizes("full").tolist() == [40] * 5
    assert sizes("balanced:16").tolist() == [16] * 5
    assert sizes("balanced:90").tolist() == [40] * 5
    assert sorted(sizes("imbalanced:20")) == [2, 4, 9, 19, 40]
    assert sorted(sizes("present:2")) == [0, 0, 0, 40, 40]
    assert sorted(sizes("present:2x30")) == [0, 0, 0, 30, 30]
    assert any(np.any(sizes("present:2") != sizes("present:2", seed)) for seed in (1, 2, 3))
    with pytest.raises(DataError, match="no images are left in present:1, seed 0"):
        measure(dataclasses.replace(features_of(), labels=np.zeros(30, int)), "gda", [Run("present:1")])
    for regime in ("some", "balanced", "balanced:0", "present:x", "imbalanced:-1", "present:2y"):
        with pytest.raises(ConfigError, match="none of full"):
            drawn(regime, LABELS, 5, 0)


def test_the_table_tells_mean_and_worst():
    names = "accuracy", "mean per-class recall", "acc@5", "ECE"
    found = [
        Cell("d", method, Run(regime, 0, shots), Results(dict.fromkeys(names, accuracy) | passes), 0.02)
        for regime, shots, method, accuracy, passes in [
            ("full", 0, "zero-shot", 90.0, {"passes": 0.0}),
            ("few", 0, "zero-shot", 80.0, {"passes": 0.0}),
            ("full", 1, "zero-shot", 91.0, {}),  # kept from a record of before they were counted
            ("full", 0, "auto", 96.0, {"passes": 30.0}),
            ("few", 0, "auto", 78.0, {"passes": 35.0}),
        ]
    ]
    text = table(found, ("zero-shot", "auto"))
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()}
    assert lines["d full, 1 shot"] == ["91.0", ""]  # auto was not run there
    assert lines["**mean**"] == ["87.0", "87.0"]
    assert lines["**worst run against text**"] == ["0.0", "-2.0"]
    assert lines["milliseconds a run, compiled"] == ["20.0", "20.0"]
    assert lines["passes over the images"] == ["0.0", "32.5"]


def features_of(classes: int = 3, images: int = 30) -> Labelled:
    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(classes, 16)), np.arange(images) % classes
    x = (centres[y] + 0.6 * rng.normal(size=(images, 16))).astype(np.float32)
    return Labelled("made", x, y, (centres + rng.normal(size=centres.shape)).astype(np.float32), "identity")


@pytest.mark.slow
def test_runs_of_one_program_are_what_each_is_alone():
    """Seeds, regimes and numbers of shots together, vmapped, against one by one; figures name all three."""
    data = features_of()
    for runs in ([Run("full"), Run("present:2", 1), Run("balanced:4", 2)], [Run("full", 1, 1), Run("full", 0, 3)]):
        together = measure(data, "gda", runs)
        for run, own in zip(runs, together, strict=True):
            [alone] = measure(data, "gda", [run])
            assert own.figures == alone.figures
            assert own.confusion == alone.confusion
        assert {figure.protocol for own in together for figure in own.figures} == {run.protocol for run in runs}
    assert runs[0].protocol == "full, 1 shot, seed 1"
    assert runs[1].protocol == "full, 3 shots, seed 0"


def test_seed_0_has_what_plots_are_made_of():
    data = features_of()
    text, first, second = [
        *measure(data, "zero-shot", [Run("full")]),
        *measure(data, "gda", [Run("full"), Run("full", 1)]),
    ]
    assert not second.confusion
    assert not second.reliability
    assert sum(first.confusion[0].images) == 30
    found = first.confusion[0]
    right = sum(n for t, p, n in zip(found.truth, found.predicted, found.images, strict=True) if t == p)
    accuracy = {figure.figure: figure.value for figure in first.figures}
    assert 100 * right / 30 == pytest.approx(accuracy["accuracy"], abs=1e-3)  # rounded to three digits
    [curve] = first.reliability
    assert sum(curve.share) == pytest.approx(100, abs=0.05)  # of 15 bins, each rounded
    pairs = zip(curve.share, curve.confidence, curve.accuracy, strict=True)
    assert sum(s * abs(c - a) / 100 for s, c, a in pairs) == pytest.approx(accuracy["ECE"], abs=0.02)
    assert not text.per_class
    of_text = np.average(first.per_class[0].zero_shot)  # classes of equal size
    assert of_text == pytest.approx(text.figures[0].value, abs=1e-3)


def test_memory_decides_how_many_runs_are_vmapped(monkeypatch):
    data = features_of()
    assert at_once(data, 7) == 7
    monkeypatch.setattr("jaxzs.evaluation.NUMBERS", 3 * 80 * 3 * 16)
    assert at_once(data, 7) == 3  # 3, 3 and 1
    assert at_once(data, 4) == 2  # evenly
    monkeypatch.setattr("jaxzs.evaluation.NUMBERS", 1)
    assert at_once(data, 7) == 1


@pytest.mark.slow
def test_folders_and_features_are_measured_and_kept(tmp_path, digit_photos, capsys):
    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(3, 16)), np.arange(30) % 3
    arrays = {"image_features": centres[y] + 0.3 * rng.normal(size=(30, 16)), "labels": y, "text_features": centres}
    np.savez(tmp_path / "f.npz", **{k: v.astype(np.float32) if k != "labels" else v for k, v in arrays.items()})
    out = tmp_path / "results"
    command = ["evaluate", "--data", f"digits={digit_photos}", f"made={tmp_path / 'f.npz'}", "--method", "gda"]
    command += ["--shots", "0", "1", "--regime", "full", "--out", str(out)]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    assert "worst run against text" in first.out
    assert "passes over the images" in first.out
    assert "full, 1 shot" in first.out
    assert "1 shots" not in first.out
    record = json.loads((out / "demo-digits.json").read_text())
    assert set(record["cells"]) == {f"{m} full 0 {s}" for m in ("zero-shot", "gda") for s in (0, 1)}
    assert cli.main([*command, "--skip-existing"]) == 0
    assert capsys.readouterr().err.count("kept from") == 8
    figures = read_record(out / "made.json").results.figures
    assert {figure.protocol for figure in figures} == {"full, seed 0", "full, 1 shot, seed 0"}
    passes = {method: {f.passes for f in figures if f.method == method} for method in ("zero-shot", "gda")}
    assert passes["zero-shot"] == {0.0}
    assert all(6 < n < 20 for n in passes["gda"])  # five rounds and calibration; how many exactly: test_passes.py
    page = tmp_path / "page.html"
    assert cli.main([*command, "--skip-existing", "--html", str(page), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]  # one document, nothing else
    assert len(cells) == 8
    shown = page.read_text()
    assert shown.count("<td>accuracy</td>") == 8
    assert all(f"{cell['accuracy']:.2f}" in shown for cell in cells)
    assert {cell["passes"] for cell in cells if cell["data"] == "made" and cell["method"] == "gda"} == passes["gda"]
    told_of = collections.Counter(f"{cell['passes']:g}" for cell in cells)
    shown_of = {n: shown.count(f'<td class="n">{n}</td>') for n in told_of}
    assert shown_of == {n: 4 * cells_of for n, cells_of in told_of.items()}  # measures of a cell
    # of both data sets: confusions of two methods, changes of one, reliability, with and without shots; accuracies
    assert shown.count('<img src="data:image/png;base64,') == 2 * (2 * (2 + 1 + 1) + 1)
    assert "made: confusion, gda, full, 1 shot, seed 0" in shown
    pictures = {path.name for path in (out / "plots").iterdir()}
    assert "demo-digits-reliability-full-seed-0.png" in pictures
    told = tmp_path / "report"
    assert cli.main(["report", str(out), "--out", str(told), "--html", str(tmp_path / "both.html")]) == 0
    assert {path.name for path in told.glob("*.png")} == {name.removeprefix("demo-") for name in pictures}
    assert (tmp_path / "both.html").read_text().count("<figure>") == len(pictures)
    rows = list(csv.DictReader((told / "figures.csv").read_text().splitlines()))
    assert {(row["method"], float(row["passes"])) for row in rows} == {(c["method"], c["passes"]) for c in cells}
    [line] = [line for line in (told / "report.md").read_text().splitlines() if line.startswith("| zero-shot")][:1]
    assert line.split("|")[-2].strip() == "0"


def test_what_cannot_be_measured_is_named(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    np.savez(tmp_path / "bad.npz", image_features=np.zeros((2, 3)))
    for arguments, message in [
        ([], "no data given"),
        (["--data", "pets"], "expected NAME=PLACE"),
        (["--data", "pets=nowhere"], "there is no nowhere"),
        (["--data", f"x={tmp_path}", "--method", "best"], "--method 'best'"),
        (["--data", f"x={tmp_path}", "--regime", "some"], "none of full"),
        (["--data", f"x={tmp_path}", "--shots", "-1"], "expected 0 or more"),
        (["--data", f"x={tmp_path / 'bad.npz'}"], "image_features, labels and text_features"),
    ]:
        assert cli.main(["evaluate", *arguments, *out]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(DataError, match="cannot read"):
        read_features(tmp_path / "nothing.npz")


def _features_file(path, **changed):
    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(3, 16)), np.arange(30) % 3
    x = (centres[y] + 0.3 * rng.normal(size=(30, 16))).astype(np.float32)
    np.savez(path, **{"image_features": x, "labels": y, "text_features": centres.astype(np.float32), **changed})
    return path


def test_features_that_cannot_be_used_are_named_with_their_file(tmp_path):
    whole = _features_file(tmp_path / "whole.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[400] ^= 255  # within the features
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "void.npz").write_bytes(b"")
    (tmp_path / "pickle.npz").write_bytes(b"hello" * 99)
    np.save(tmp_path / "array.npy", np.eye(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    x = np.load(tmp_path / "whole.npz")["image_features"]
    for name, values in {
        "nan": np.where(np.arange(30)[:, None] == 3, np.nan, x),
        "zero": np.where(np.arange(30)[:, None] == 3, 0, x),
        "complex": x.astype(complex),  # its real part was taken without a word
        "text": x.astype(str),
        "whole_numbers": (9 * x).astype(int),
        "object": x.astype(object),
    }.items():
        _features_file(tmp_path / f"{name}.npz", image_features=values)
    _features_file(tmp_path / "one.npz", labels=np.zeros(30, int), text_features=np.eye(1, 16))
    for path in sorted(set(tmp_path.iterdir()) - {tmp_path / "whole.npz"}):
        with pytest.raises(DataError, match=path.name):
            read_features(path)


def test_features_of_wide_types_and_names_as_bytes(tmp_path):
    """Only directions matter: 1e300 x is x, which float32 would not hold. Bytes are UTF-8, not their repr."""
    plain = read_features(_features_file(tmp_path / "plain.npz"))
    wide = {"image_features": 1e300 * plain.image_features.astype(np.float64), "labels": plain.labels.astype(">i2")}
    names = np.array(["caf\u00e9".encode(), b"b", b"c"])
    read = read_features(_features_file(tmp_path / "wide.npz", **wide, class_names=names))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(unit(read.image_features), unit(plain.image_features), rtol=1e-5, atol=1e-7)
    assert read.class_names == ("caf\u00e9", "b", "c")


def test_what_would_overwrite_or_measure_nothing_is_refused(tmp_path, capsys):
    """Two records of one name: the second took the place of the first, in the table too, without a word."""
    file, out = _features_file(tmp_path / "f.npz"), tmp_path / "out"
    for arguments, message in [
        (["--data", f"a={file}", f"a={file}"], "two records would be called a:"),
        (["--data", f"a/b={file}", f"a-b={file}"], "two records would be called a-b:"),
        (["--data", f"demo-a={file}", f"a={tmp_path}"], "two records would be called demo-a:"),
        (["--data", f"a={tmp_path}", "--model", "x/y", "x-y"], "two records would be called x-y-a:"),
        (["--data", f"a={file}", "--method", "stata", "--shots", "2"], "--method stata takes no shots; add 0"),
    ]:
        assert cli.main(["evaluate", *arguments, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def gda_raises(error, monkeypatch):
    measure = evaluation.measure

    def measured(data, method, runs):
        if method == "gda":
            raise error
        return measure(data, method, runs)

    monkeypatch.setattr(evaluation, "measure", measured)


def test_what_cannot_be_measured_does_not_take_the_rest_with_it(tmp_path, monkeypatch, capsys):
    """The table of what had been measured was not written, and cells behind were not measured."""
    good = _features_file(tmp_path / "good.npz")
    one_class = _features_file(tmp_path / "one.npz", labels=np.zeros(30, int), text_features=np.ones((1, 16), "f"))
    absent = _features_file(tmp_path / "absent.npz", labels=np.zeros(30, int))
    out = tmp_path / "out"
    command = ["evaluate", "--method", "gda", "--out", str(out)]
    assert cli.main([*command, "--data", f"one={one_class}", f"a={good}"]) == 1
    told = capsys.readouterr()
    assert "| a full " in told.out
    assert told.err.count("there is 1 class") == 2  # when it happens, and in the end
    assert "2 cells could not be measured, the first: " in told.err
    # Of the seeds only those that draw a class without images.
    asked = ["--regime", "full", "present:1", "full", "--seeds", "6", "--data", f"b={absent}"]
    assert cli.main([*command, *asked]) == 1
    left = sum(not drawn("present:1", np.zeros(30, int), 3, seed).any() for seed in range(6))
    assert 0 < left < 6
    told = capsys.readouterr()
    assert f"{2 * (12 - left)} cells, records" in told.out
    assert f"{2 * left} cells could not be measured" in told.err
    gda_raises(MemoryError, monkeypatch)
    assert cli.main([*command, "--data", f"c={good}", "--method", "gda", "closed_form"]) == 1
    told = capsys.readouterr()
    assert "1 cell could not be measured, the first: out of memory" in told.err
    assert set(json.loads((out / "c.json").read_text())["cells"]) == {"zero-shot full 0 0", "closed_form full 0 0"}


def test_an_interrupted_evaluation_says_what_it_keeps(tmp_path, monkeypatch, capsys):
    file, out = _features_file(tmp_path / "f.npz"), tmp_path / "out"
    gda_raises(KeyboardInterrupt, monkeypatch)
    command = ["evaluate", "--data", f"a={file}", "--method", "gda", "--out", str(out)]
    assert cli.main(command) == 130
    assert f"the records in {out} keep the finished cells, --skip-existing" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main([*command, "--skip-existing"]) == 0
    assert "zero-shot full 0 0: kept from" in capsys.readouterr().err


def test_damaged_cells_of_a_record_are_measured_anew(tmp_path, capsys):
    file, out = _features_file(tmp_path / "f.npz"), tmp_path / "out"
    command = ["evaluate", "--data", f"a={file}", "--method", "zero-shot", "--skip-existing", "--out", str(out)]
    assert cli.main(command) == 0
    [(key, cell)] = json.loads((out / "a.json").read_text())["cells"].items()
    capsys.readouterr()
    for changed, message in [
        ({"metrics": {}}, "without accuracy, mean per-class recall, acc@5, ECE; computed anew"),
        ({"metrics": cell["metrics"] | {"ECE": None}}, "without ECE; computed anew"),
        ({"seconds": {"run": "long"}}, "lacks its identity or its seconds"),
        ({"seconds": {}}, "kept from"),
    ]:
        record = json.loads((out / "a.json").read_text())
        record["cells"][key] = cell | changed
        (out / "a.json").write_text(json.dumps(record))
        assert cli.main(command) == 0
        assert message in capsys.readouterr().err


def test_records_stay_in_their_folder(tmp_path):
    file = _features_file(tmp_path / "f.npz")
    out = tmp_path / "out"
    assert cli.main(["evaluate", "--data", f"../up={file}", "--method", "zero-shot", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"..-up.json", "evaluate.md"}


def test_what_is_left_out_of_a_folder_is_told(tmp_path, digit_photos, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(digit_photos, folder)
    (folder / "one" / "broken.png").write_bytes(b"no image")
    (folder / "two").rename(folder / "deux")
    command = ["evaluate", "--method", "zero-shot", "--out", str(tmp_path / "out"), "--data"]
    assert cli.main([*command, f"digits={folder}"]) == 1
    told = capsys.readouterr().err
    assert f"1 image could not be read, the first: {folder}/one/broken.png" in told
    assert "never seen the words: deux" in told
    (folder / "labels.csv").write_text("path,label\none/0.png,zero\none/1.png,\nzero/0.png,one\n")
    assert cli.main([*command, f"digits={folder}"]) == 0
    assert "digits: 1 image without a label left out" in capsys.readouterr().err
    (folder / "labels.csv").unlink()
    (folder / "One").mkdir()
    (folder / "one" / "1.png").rename(folder / "One" / "1.png")
    assert cli.main([*command, f"digits={folder}"]) == 1
    assert "digits: labels read as one: One -> one" in capsys.readouterr().err


@pytest.mark.slow
def test_classify_chooses_a_method_and_takes_shots(tmp_path, digit_photos, capsys):
    kept = tmp_path / "head.safetensors"
    assert cli.main(["classify", str(digit_photos), "--save", str(kept)]) == 0
    told = capsys.readouterr()
    assert "chosen without labels: " in told.err
    assert "method auto" in told.out
    assert cli.main(["classify", str(digit_photos), "--proxies", str(kept), "--labels", "a,b"]) == 2
    assert cli.main(["classify", str(digit_photos / "one" / "1.png"), "--proxies", str(kept)]) == 0
    capsys.readouterr()
    assert cli.main(["classify", str(digit_photos), "--shots", str(digit_photos), "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["method"] == "auto"
    assert record["metrics"]["known"] == 0  # all labels were told
    assert cli.main(["classify", str(digit_photos), "--shots", str(digit_photos), "--method", "stata"]) == 2
    assert "--shots is used by" in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_with_some_labels_gives_shots(tmp_path, digit_photos, capsys, monkeypatch):
    """Written by classify, filled in by hand; told images are fitted once and not measured."""
    monkeypatch.chdir(digit_photos.parent)
    table = tmp_path / "mine.csv"
    folder = digit_photos.name
    listed = [(name, n) for name in ("one", "two", "zero") for n in range(4)]
    rows = [f"{folder}/{name}/{n}.png,{name.upper() if n < 2 else ''}" for name, n in listed]
    table.write_text("\n".join(["path,label,score", *(f"{row},0.5" for row in rows), ""]))
    command = ["classify", folder, "--shots", str(table)]
    assert cli.main([*command, "--json"]) == 0
    told = capsys.readouterr()
    assert "labels of the data, matched by label: ONE -> one, TWO -> two, ZERO -> zero" in told.err
    assert "6 labels of 3 classes told by" in told.err
    assert "6 images of --shots not counted in the accuracy" in told.err
    record = json.loads(told.out)
    assert record["metrics"]["known"] == 24
    assert record["metrics"]["images"] == 30
    same = tmp_path / "shots"  # the same images as a folder, and not among those to classify
    for name, n in listed:
        if n < 2:
            (same / name).mkdir(parents=True, exist_ok=True)
            (same / name / f"{n}.png").symlink_to(digit_photos / name / f"{n}.png")
    rest = [row["path"] for row in record["results"] if row["path"][-5] not in "01"]
    assert cli.main(["classify", *rest, "--labels", "one,two,zero", "--shots", str(same), "--json", "--quiet"]) == 0
    labels = {row["path"]: row["label"] for row in record["results"]}
    assert all(labels[row["path"]] == row["label"] for row in json.loads(capsys.readouterr().out)["results"])


def test_shots_that_do_not_fit_are_refused_with_both_lists(tmp_path, digit_photos, capsys):
    tables = {
        "stranger.csv": "path,label\none/1.png,one\ntwo/1.png,three\n",
        "empty.csv": "path,label\none/1.png,\n",
        "several.csv": "path,labels\none/1.png,one;two\n",
        "gone.csv": "path,label\none/99.png,one\n",
        "header.csv": "a,b\n1,2\n",
    }
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    for place, message in [
        (tmp_path / "stranger.csv", "Class names: 'one', 'two', 'zero'. Labels of the data: 'one', 'three'"),
        (tmp_path / "empty.csv", "no image has a label there"),
        (tmp_path / "several.csv", "several labels of one image"),
        (tmp_path / "gone.csv", "'one/99.png' is not there below"),
        (tmp_path / "header.csv", "expected a header with a column of files"),
        (tmp_path / "nothing.csv", "there is no such folder or table"),
        (digit_photos / "one", "expected one subfolder a class"),
    ]:
        assert cli.main(["classify", str(digit_photos), "--shots", str(place)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_pipe_of_paths_is_labelled_as_it_comes(digit_photos, capsys, monkeypatch):
    paths = [str(path) for path in sorted((digit_photos / "one").iterdir())[:3]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*paths, "no/such.png", ""])))
    command = ["classify", "-", "--stream", "--labels", "zero,one", "--batch-size", "2"]
    assert cli.main(command) == 1  # one path was no image
    told = capsys.readouterr()
    lines = [line.split("\t") for line in told.out.splitlines()]
    assert [line[0] for line in lines] == paths
    assert {line[1] for line in lines} <= {"zero", "one"}
    assert "no such file or folder: no/such.png" in told.err
    for arguments, message in [
        (["--labels", "a,b", "--save", "x.safetensors"], "takes no --save"),
        ([], "what are the classes"),
    ]:
        assert cli.main(["classify", "-", "--stream", *arguments]) == 2
        assert message in capsys.readouterr().err
