"""`python -m experiments.accelerator` starts on a bare machine, agrees with the originals, and writes its tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import accelerator

# What a machine with JAX does not have: an import of any of these is as it is there.
ABSENT = "flax optax chex grain tyro orbax transformers tokenizers tensorflow_datasets tqdm matplotlib torch sklearn"
BARE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT.split()}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from experiments import accelerator
"""


def test_nothing_but_jax_is_imported():
    top = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", BARE], cwd=top, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run(folder, *arguments):
    code = accelerator.main(["--out", str(folder), "--smoke", *arguments])
    return code, json.loads((folder / "accelerator.json").read_text()), (folder / "accelerator.md").read_text()


@pytest.mark.slow
def test_a_record_and_a_table(tmp_path):
    code, record, page = run(tmp_path, "--stages", "texts", "crf")
    assert code == 0
    rows = record["metrics"]["rows"]
    assert record["metrics"]["missing"] == []
    assert {row["stage"] for row in rows} == {"texts", "crf"}
    assert all(row["value"] > 0 for row in rows)
    assert page.startswith("# cpu: first contact")
    assert all(row["case"] in page for row in rows)


@pytest.mark.slow
def test_every_stage(tmp_path):
    code, record, _ = run(tmp_path)
    assert code == 0
    rows = record["metrics"]["rows"]
    assert {row["stage"] for row in rows} == {"parity", *accelerator.STAGES}
    assert len([row for row in rows if row["remark"] == "agrees"]) == 5


def test_a_stage_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(accelerator, "STAGES", {"texts": broken, "crf": accelerator.crf})
    code, record, page = run(tmp_path, "--stages", "texts", "crf")
    assert code == 1
    assert record["metrics"]["missing"] == ["texts: RuntimeError: RESOURCE_EXHAUSTED: out of memory"]
    assert [row["stage"] for row in record["metrics"]["rows"]] == ["crf"]
    assert "Not measured: texts" in page


def test_no_stage_begins_when_the_minutes_are_over(tmp_path):
    code, record, _ = run(tmp_path, "--minutes", "-1")
    assert code == 1
    assert len(record["metrics"]["missing"]) == 1 + len(accelerator.STAGES)
    assert "not begun" in record["metrics"]["missing"][0]
