"""docs/errors.md: the exit codes, and ten messages that the code really has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from jaxzs import commands

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def listed() -> list[str]:
    """The messages: first column of the table of two columns."""
    return re.findall(r"^\| `(.+?)` \| .+ \|$", PAGE, re.M)


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


def test_every_message_on_the_page_is_in_the_code():
    """In order, with anything for each …; so that a changed message is changed on the page as well."""
    found = messages_of_the_code()
    assert len(listed()) == 10
    for message in listed():
        parts = [part for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        assert any(pattern.search(text) for text in found), message


def test_every_exit_code_is_on_the_page():
    codes = {commands.FINISHED, commands.INCOMPLETE, commands.FAILED, commands.INTERRUPTED}
    assert {int(code) for code in re.findall(r"^\| (\d+) \| ", PAGE, re.M)} == codes
