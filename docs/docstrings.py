"""How docstrings become pages: examples as code, "name: text" lines as lists, axes such as [N,C] as code.

A griffe extension, see mkdocs.yml. The docstrings themselves are written to be read in a terminal.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object

_AXES = re.compile(r"(?<![\w`\"'\[\]])\[[A-Z][\w+/,'. ()*-]*\](?![\w`(\[])|(?<![\w`])\[\](?= (?:float|int|bool))")
_CLOSING = ("Returns ", "Raises ", "Yields ")
_SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")


class ReadableDocstrings(Extension):
    """Rewrites every docstring in place before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        names: set[str] = set()
        if isinstance(obj, Function):
            names = {parameter.name for parameter in obj.parameters}
        elif isinstance(obj, Class):
            names = set(obj.members)
        obj.docstring.value = rewrite(obj.docstring.value, names)


def rewrite(text: str, names: set[str]) -> str:
    """Markdown of a docstring of an object with parameters or fields of these names.

    >>> print(rewrite("Sum.\\n\\nx [N]: a row, or\\n[C,N] rows. y: another.", {"x", "y"}))
    Sum.
    <BLANKLINE>
    - `x` `[N]`: a row, or
      `[C,N]` rows.
    - `y`: another.
    """
    lines, example = [], False
    in_section = in_list = False
    for line in (part for whole in text.split("\n") for part in _parts(whole, names)):
        if not example and line.lstrip().startswith(">>>"):
            lines += ["", "```pycon"] if lines and lines[-1] else ["```pycon"]
            example = True
        if example and not line.strip():
            lines.append("```")
            example = False
        if example:
            lines.append(line.replace("  # doctest: +SKIP", ""))
            continue
        in_section = bool(_SECTION.match(line)) or (in_section and (not line or line[0] == " "))
        if in_list and line.startswith(_CLOSING):
            lines.append("")
            in_list = False
        if not line:
            in_list = False
        item = None if in_section else _item(line, names)
        if item:
            if not in_list and lines and lines[-1]:
                lines.append("")
            in_list = True
            line = item
        elif in_list:
            line = f"  {_axes(line.strip())}"
        else:
            line = _axes(line)
        lines.append(line)
    return "\n".join([*lines, "```"] if example else lines)


def _parts(line: str, names: set[str]) -> list[str]:
    """A line, cut before sentences that start with a known name and a colon, or with what is returned or raised."""
    if line[:1] in (" ", ">"):
        return [line]
    parts = [""]
    for sentence in re.split(r"(?<=[.;]) ", line):
        if parts[-1] and (_item(sentence, names) or sentence.startswith(_CLOSING)):
            parts.append(sentence)
        else:
            parts[-1] += f" {sentence}" if parts[-1] else sentence
    return parts


def _item(line: str, names: set[str]) -> str | None:
    """A line that starts with known names and a colon, as an item of a list."""
    found = re.match(r"((?:\w+(?:, | and )?)+)((?: \[[^\]]*\])?(?: \w+)?): (.*)", line)
    if found is None:
        return None
    listed = re.split(r", | and ", found[1])
    if not set(listed) <= names:
        return None
    shown = ", ".join(f"`{name}`" for name in listed)
    return f"- {shown}{_axes(found[2])}: {_axes(found[3])}"


def _axes(text: str) -> str:
    """Shapes such as [N,C] as code, outside of code."""
    parts = text.split("`")
    return "`".join(_AXES.sub(r"`\g<0>`", part) if i % 2 == 0 else part for i, part in enumerate(parts))
