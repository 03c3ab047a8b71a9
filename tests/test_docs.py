"""README and documentation: Python blocks run, commands parse, every public name is on a page of the reference.

The Python blocks of a page run one after the other in one namespace, in a folder with `photos/`. A block with a title
("needs the hub") is only compiled.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_docstrings import PACKAGES, public_names

from jaxzs import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its title, its text."""

    language: str
    title: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    found = [Block(*match.groups("")) for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.language == language]


def pages(language: str) -> list[Any]:
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found if blocks(page, language)]


def shorten_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README trains with the default plan; here two iterations of two epochs."""
    from jaxzs import prompt

    plan = prompt.Plan
    few = prompt.Optimisation(epochs=2, warmup_epochs=1)
    monkeypatch.setattr(prompt, "Plan", lambda strategy: plan(strategy, iterations=2, optimisation=few))


@pytest.mark.slow
@pytest.mark.parametrize("page", pages("python"))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digit_photos: Path) -> None:
    shutil.copytree(digit_photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    if page == README:
        shorten_trainings(monkeypatch)
    for number, block in enumerate(blocks(page, "python")):
        code = compile(block.text, f"{page.name}, Python block {number}", "exec")
        if not block.title:
            exec(code, namespace)


@pytest.mark.parametrize("page", pages("sh"))
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        monkeypatch.setattr(importlib.import_module(f"jaxzs.commands.{name}"), "run", lambda options: 0)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").replace("&&", "\n").splitlines():
            check_command(shlex.split(line, comments=True), extras, capsys)


def check_command(words: list[str], extras: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = shlex.join(words)
    if words[:1] == ["jaxzs"]:
        assert cli.main(words[1:]) == 0, f"{line}\n{capsys.readouterr()}"
    elif words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\[([\w,-]+)\]", line):
            assert set(extra.split(",")) <= set(extras), line
    elif words[:1] == ["python"] and "experiments" in line:
        place = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        text = (ROOT / place).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in text, f"{line}: no option {option}"
    elif words and words[:3] != ["python", "-m", "pytest"]:
        assert words[0] in ("hf", "bash"), f"nothing checks the command {line!r}"


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    listed = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        listed |= set(re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    missing = [
        f"{package}.{name}"
        for package in PACKAGES
        for name, value in public_names(package).items()
        if callable(value) and f"{value.__module__}.{value.__qualname__}" not in listed
    ]
    assert not missing, f"not in docs/api: {', '.join(missing)}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation, page
