"""docs/errors.md lists every error class, and only messages that the code really has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from jaxzs import errors, prompt

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
CLASSES = [name for name, value in vars(errors).items() if inspect.isclass(value) and value is not object]


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def listed(page: str) -> list[str]:
    """Messages in the first column of tables with three columns, below their class."""
    return [text for _, text in re.findall(r"^\| (`+)(.+?) ?\1 \| .+ \| .+ \|$", page, re.M)]


def template(node: ast.AST) -> str:
    """A text of the source with … for what is filled in; other nodes are all …"""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def messages_of_the_code() -> list[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "jaxzs").rglob("*.py")]
    kinds = ast.JoinedStr | ast.Constant | ast.BinOp
    return [template(n) for tree in trees for n in ast.walk(tree) if isinstance(n, kinds)]


def test_every_error_class_is_on_the_page(page):
    for name in [*CLASSES, prompt.DivergedError.__name__]:
        assert f"\n## {name}\n" in page
    headings = re.findall(r"^## (\w+Error)$", page, re.M)
    assert sorted(headings) == sorted([*CLASSES, "DivergedError"])


def test_every_message_on_the_page_is_in_the_code(page):
    """In order, with anything for each …; so that a changed message is changed on the page as well."""
    found = messages_of_the_code()
    messages = listed(page)
    assert len(messages) > 70
    for message in messages:
        parts = [part for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        assert any(pattern.search(text) for text in found), message


def test_every_exit_code_is_on_the_page(page):
    from jaxzs import commands

    for code in (commands.FINISHED, commands.INCOMPLETE, commands.FAILED, commands.INTERRUPTED):
        assert f"| {code} | " in page
