"""`jaxzs bench`: rates of every part, as a table and as a record."""

from __future__ import annotations

import json

import pytest

from jaxzs import clip
from jaxzs.cli import main
from jaxzs.commands.bench import PARTS


@pytest.mark.slow
def test_every_part_gives_a_rate_and_the_record_is_written(tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["bench", "--batch-size", "2", "--images", "64", "--classes", "4", "--rounds", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())
    assert set(record["metrics"]) == set(PARTS)
    for measured in record["metrics"].values():
        assert measured["per_second"] > 0
        assert measured["run"] > 0
        assert measured["compile"] >= 0
    assert record["model"]["fingerprint"] == clip.load("demo").fingerprint
    assert "encode images, 2 at once" in printed.out
    assert "images/s" in printed.out
    assert record["processor"] in printed.out
    assert record["bfloat16_gain"] > 0
    assert f"--bfloat16 {'pays' if record['bfloat16_gain'] > 1.1 else 'does not pay'}" in printed.out


@pytest.mark.slow
def test_a_siglip_and_a_resnet(tmp_path, capsys):
    """Of random shapes, the texts of one at their full length, the other without tags."""
    arguments = [
        "--batch-size",
        "1",
        "--rounds",
        "1",
        "--images",
        "16",
        "--classes",
        "4",
        "--out",
        str(tmp_path / "r.json"),
    ]
    assert main(["bench", "text", "image", "--shape", "SigLIP-B/16", *arguments]) == 0
    assert set(json.loads((tmp_path / "r.json").read_text())["metrics"]) == {"text", "image"}
    assert main(["bench", "image", "tag", "--shape", "RN50", *arguments]) == 0
    assert set(json.loads((tmp_path / "r.json").read_text())["metrics"]) == {"image"}
    assert "tag is left out: the image tower is a ResNet" in capsys.readouterr().err


def test_json_alone_goes_to_standard_output(capsys):
    assert main(["bench", "text", "--json", "--rounds", "1", "--batch-size", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["metrics"]) == ["text"]
    assert record["settings"]["rounds"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["proxy", "--classes", "1"], "--classes is 1, expected at least 2"),
        (["--model", "folder", "--shape", "ViT-B/32"], "only one of --model and --shape"),
        (["--out", "rates.csv"], "must end in .json"),
    ],
)
def test_wrong_settings_are_named(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_published_shapes_are_those_of_the_checkpoints():
    # Parameters of the checkpoints in millions, as their model cards give them; of RN50 without its BatchNorms' own.
    millions = {
        "ViT-B/32": 151.3, "ViT-B/16": 149.6, "ViT-L/14": 427.6, "ViT-L/14@336": 427.9,
        "RN50": 102.0, "SigLIP-B/16": 203.2, "SigLIP-So400m/14@384": 878.0,
    }  # fmt: skip
    for name, config in clip.ARCHITECTURES.items():
        count = sum(leaf.size for _, leaf in clip.params.flatten(clip.abstract_params(config)))
        assert count / 1e6 == pytest.approx(millions[name], abs=0.05), name
