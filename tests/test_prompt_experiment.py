"""`experiments.prompt_tuning` from its command line to its tables, at the smallest size."""

from __future__ import annotations

import json
import sys

import pytest

from experiments import prompt_tuning


@pytest.mark.slow
def test_tables_and_record_of_a_small_run(tmp_path, monkeypatch):
    how = "--data digits --paradigms ul --strategies fpl --modalities text --seeds 1 2 --epochs 2"
    monkeypatch.setattr(sys, "argv", ["prompt_tuning", *how.split(), "--out", str(tmp_path)])
    prompt_tuning.main()
    table = (tmp_path / "digits.md").read_text()
    cells = json.loads((tmp_path / "digits.json").read_text())["cells"].values()
    figures = {figure["method"]: figure["value"] for cell in cells for figure in cell["figures"]}
    assert set(figures) == {"zero-shot", "text fpl"}
    assert figures["zero-shot"] == pytest.approx(81.0)  # as in the published table of this repository
    for value in figures.values():
        assert f"{value:.1f}" in table
