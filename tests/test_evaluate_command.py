"""`jaxzs evaluate`, and the regimes that it measures in."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from jaxzs import cli
from jaxzs.errors import ConfigError, DataError
from jaxzs.evaluation import drawn, read_features, table

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
    for regime in ("some", "balanced", "balanced:0", "present:x", "imbalanced:-1", "present:2y"):
        with pytest.raises(ConfigError, match="none of full"):
            drawn(regime, LABELS, 5, 0)


def test_the_table_tells_mean_and_worst():
    rows = [
        {
            "data": "d",
            "regime": r,
            "seed": 0,
            "method": m,
            "accuracy": a,
            "mean per-class recall": a,
            "acc@5": a,
            "ECE": 1.0,
        }
        for r, m, a in [
            ("full", "zero-shot", 90.0),
            ("few", "zero-shot", 80.0),
            ("full", "auto", 96.0),
            ("few", "auto", 78.0),
        ]
    ]
    text = table(rows, ("zero-shot", "auto"))
    lines = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()}
    assert lines["**mean**"] == ["85.0", "87.0"]
    assert lines["**worst run against text**"] == ["0.0", "-2.0"]


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
    assert "full, 1 shot" in first.out
    assert "1 shots" not in first.out
    record = json.loads((out / "demo-digits.json").read_text())
    assert set(record["cells"]) == {f"{m} full 0 {s}" for m in ("zero-shot", "gda") for s in (0, 1)}
    assert cli.main([*command, "--skip-existing"]) == 0
    assert capsys.readouterr().err.count("kept from") == 8
    page = tmp_path / "page.html"
    assert cli.main([*command, "--skip-existing", "--html", str(page), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]  # one document, nothing else
    assert len(cells) == 8
    shown = page.read_text()
    assert shown.count("<td>accuracy</td>") == 8
    assert all(f"{cell['accuracy']:.2f}" in shown for cell in cells)


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


@pytest.mark.slow
def test_classify_chooses_a_method_and_takes_shots(tmp_path, digit_photos, capsys):
    kept = tmp_path / "head.safetensors"
    assert cli.main(["classify", str(digit_photos), "--save", str(kept)]) == 0
    told = capsys.readouterr()
    assert "chosen without labels: " in told.err
    assert "method auto" in told.out
    assert cli.main(["classify", str(digit_photos), "--proxies", str(kept), "--labels", "a,b"]) == 2
    assert cli.main(["classify", str(digit_photos / "one" / "1.png"), "--proxies", str(kept)]) == 0
    assert cli.main(["classify", str(digit_photos), "--shots", str(digit_photos), "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out.split("\n", 2)[-1].partition("{")[2].join(("{", "")))
    assert record["settings"]["method"] == "auto"
    assert record["figures"][-1]["value"] > 90
    for arguments, message in [
        (["--shots", str(digit_photos), "--method", "stata"], "--shots is used by"),
        (["--shots", str(digit_photos / "one")], "expected one subfolder a class"),
    ]:
        assert cli.main(["classify", str(digit_photos), *arguments]) == 2
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
