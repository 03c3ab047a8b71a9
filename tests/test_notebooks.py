"""The notebooks: text source and notebook agree; all of them run, on the demo checkpoint and on a random one.

Running takes minutes and the extra `notebooks`; it is asked for with JAXZS_NOTEBOOKS=1, as the step `notebooks` of
.ci/run does.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.notebooks import execute
from jaxzs import cli, clip, load

pytest.importorskip("jupytext")
asked = pytest.mark.skipif(not os.environ.get("JAXZS_NOTEBOOKS"), reason="runs for minutes: JAXZS_NOTEBOOKS=1")
every = pytest.mark.parametrize("name", execute.NAMES)


def kept(name: str) -> dict[str, Any]:
    return json.loads((execute.HERE / f"{name}.ipynb").read_text(encoding="utf-8"))


def outputs(name: str) -> list[dict[str, Any]]:
    return [output for cell in kept(name)["cells"] for output in cell.get("outputs", [])]


@every
def test_notebook_is_the_text_source(name):
    source = [(cell.cell_type, cell.source) for cell in execute.read(name).cells]
    notebook = [(cell["cell_type"], "".join(cell["source"])) for cell in kept(name)["cells"]]
    assert notebook == source, f"run python experiments/notebooks/execute.py {name}"


@every
def test_notebook_is_kept_as_it_ran(name):
    code = [cell for cell in kept(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    found = outputs(name)
    assert not [o for o in found if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in found) >= 2
    assert (execute.HERE / f"{name}.ipynb").stat().st_size < 600_000


@every
def test_notebook_names_no_machine(name):
    """Neither paths nor the interpreter's version, in outputs (pictures aside) or metadata."""
    metadata = kept(name)["metadata"]
    assert metadata["language_info"] == {"name": "python"}
    text = re.sub(r'"image/png": "[^"]*"', "", json.dumps([outputs(name), metadata]))
    assert not re.findall(r"/(?:home|root|tmp|usr|var|opt|mnt|Users)/", text)


@every
def test_first_code_cell_is_the_same_question_everywhere(name):
    """The model is one line; Colab, and Colab alone, installs; the device is told."""
    first = next(cell for cell in execute.read(name).cells if cell.cell_type == "code").source
    assert first.startswith('MODEL = "demo"')
    assert first.count('if "google.colab" in sys.modules:') == 1
    assert "jax.devices()" in first
    assert "jaxzs.__version__" in first
    changed = execute.read(name, {"MODEL": "elsewhere"}).cells[1].source
    assert changed.startswith("MODEL = 'elsewhere'")


def test_commands_parse(monkeypatch, capsys):
    """Those that the notebooks name for the shell."""
    for command in cli.COMMANDS.values():
        monkeypatch.setattr(importlib.import_module(command.module), command.run, lambda options: 0)
    text = "\n".join(cell.source for name in execute.NAMES for cell in execute.read(name).cells)
    lines = re.findall(r"^jaxzs .*$", text, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr()}"


# --- running ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random CLIP of 77 tokens and no model card, as published ones are; the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("random-clip")
    demo = clip.find_checkpoint("demo")
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copy(demo / file, folder)
    small = load("demo").config
    config = dataclasses.replace(
        small,
        text=dataclasses.replace(small.text, hidden_size=32, num_hidden_layers=2, max_position_embeddings=77),
        vision=dataclasses.replace(small.vision, hidden_size=36, num_hidden_layers=3, image_size=32, patch_size=16),
        projection_dim=16,
    )
    params = clip.random_params(jax.random.key(0), config)
    # Large enough weights that features of different images and texts differ visibly.
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim == 2 else leaf, params)
    clip.write_checkpoint(folder, params, config)
    return folder


@pytest.fixture(scope="module")
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes with 40 photographs each, of different sizes."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for place, name in enumerate(("old_cat", "dog", "bird")):
        (folder / name).mkdir()
        for number in range(40):
            noise = rng.integers(0, 100, (20 + number, 30, 3), np.uint8)
            noise[..., place] += 120
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    return folder


def run(name: str, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute in a fresh kernel that has no hub to ask."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    execute.execute(execute.read(name, settings))


@asked
@pytest.mark.notebooks
@every
def test_notebook_runs_on_the_demo_checkpoint(name, monkeypatch):
    run(name, {}, monkeypatch)


# The others take the same images whatever the weights; `execute.py --check --set MODEL=FOLDER` runs them all.
@asked
@pytest.mark.notebooks
def test_patches_runs_on_other_weights_with_one_changed_line(random_clip, monkeypatch):
    run("patches", {"MODEL": str(random_clip)}, monkeypatch)


@asked
@pytest.mark.notebooks
def test_quickstart_runs_on_other_weights_and_own_images(random_clip, own_images, monkeypatch):
    run("quickstart", {"MODEL": str(random_clip), "FOLDER": str(own_images)}, monkeypatch)
