"""`jaxzs convert`: any layout in, the one that is asked for out, the same features."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import jaxzs
from jaxzs import clip
from jaxzs.cli import main

GOLDEN = Path(__file__).parent / "golden" / "families"


@pytest.mark.parametrize(("name", "format"), [("openai_vit", "open_clip"), ("vit_gelu", "safetensors")])
def test_convert(name, format, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(GOLDEN / name), str(out), "--format", format, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    before, after = jaxzs.load(GOLDEN / name), jaxzs.load(out)
    assert record["files"] == sorted(path.name for path in out.iterdir())
    pixels = np.zeros((1, 32, 32, 3), np.float32)
    features = [clip.encode_image(model.params, pixels, model.config) for model in (before, after)]
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize(
    ("name", "format", "alone"),
    [
        ("openai_vit", "safetensors", False), ("openai_rn", "safetensors", True), ("openai_rn", "open_clip", False),
        ("hf_siglip", "safetensors", False), ("hf_siglip", "flax", True),
    ],
)  # fmt: skip
def test_what_only_jaxzs_can_read_is_said(name, format, alone, tmp_path, capsys):
    assert main(["convert", str(GOLDEN / name), str(tmp_path), "--format", format]) == 0
    said = capsys.readouterr().err
    assert ("for jaxzs alone" in said) == alone
    # Of a crop of open_clip's, read by transformers.
    assert ("one pixel beside" in said) == (name == "openai_vit")


def test_what_cannot_be_written_is_said(tmp_path, capsys):
    assert main(["convert", str(GOLDEN / "hf_siglip"), str(tmp_path / "out"), "--format", "open_clip"]) == 2
    assert "SigLIP is written for transformers" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
