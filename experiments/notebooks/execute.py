"""Run the notebooks from their text sources in fresh kernels, and write them with their outputs.

    python experiments/notebooks/execute.py                        # all, NAME.py -> NAME.ipynb
    python experiments/notebooks/execute.py patches                # one
    python experiments/notebooks/execute.py --check                # run, write nothing
    python experiments/notebooks/execute.py --check --set MODEL=openai/clip-vit-base-patch32   # with that line changed

Needs the extra `notebooks`. Prints the seconds of each; the first error stops it.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("quickstart", "prompt_tuning", "patches", "compose")
SECONDS = 600  # for one cell, on the slowest machine


def read(name: str, settings: Mapping[str, str] | None = None) -> Any:
    """The text source as a notebook without outputs; `settings` go into its lines `NAME = "..."`."""
    import jupytext

    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    for key, value in (settings or {}).items():
        line = re.compile(rf'^{key} = "[^"]*"', flags=re.MULTILINE)
        if len(line.findall(text)) != 1:
            raise SystemExit(f"{name}.py has no line {key} = ... to be changed")
        text = line.sub(lambda _, new=f"{key} = {value!r}": new, text)
    notebook = jupytext.reads(text, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext draws new ones each time
    return notebook


def execute(notebook: Any) -> float:
    """Run all cells in a fresh kernel in this folder, outputs in place; returns the seconds."""
    from nbclient import NotebookClient

    start = time.perf_counter()
    resources = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, timeout=SECONDS, resources=resources, record_timing=False)
    client.execute(env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return time.perf_counter() - start


def write(notebook: Any, name: str) -> None:
    """NAME.ipynb, without what differs between machines."""
    import nbformat

    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", []):
            if "image/png" in (pictures := output.get("data", {})):
                pictures["image/png"] = small(pictures["image/png"])
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "colab": {"provenance": []},
    }
    nbformat.write(notebook, HERE / f"{name}.ipynb")


def joined(outputs: list[Any]) -> list[Any]:
    """Printed text of one cell in one piece, however the kernel happened to cut it."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def small(picture: str) -> str:
    """A PNG in base64, in 256 colours: a third of the bytes."""
    from PIL import Image

    file = io.BytesIO()
    opened = Image.open(io.BytesIO(base64.b64decode(picture)))
    opened.convert("RGB").quantize(256).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--check", action="store_true", help="run without writing NAME.ipynb")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    if arguments.set and not arguments.check:
        parser.error("--set goes with --check: the notebooks are kept as the demo runs them")
    settings = dict(setting.split("=", 1) for setting in arguments.set)
    for name in arguments.names:
        notebook = read(name, settings)
        seconds = execute(notebook)
        if not arguments.check:
            write(notebook, name)
        print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
