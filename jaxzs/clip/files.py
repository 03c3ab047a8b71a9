"""Small files from outside (JSON, merges, pictures): what they really are, read with a size limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxzs.errors import JaxzsError

# The largest published CLIP tokenizer.json is 4 MB; nothing read as text here is near the limit.
MAX_TEXT_BYTES = 64 * 2**20


def known_stranger(head: bytes) -> str | None:
    """What a file is that stands where another was expected, from its first bytes; None if unknown.

    >>> known_stranger(b"version https://git-lfs.github.com/spec/v1")
    'a git-lfs pointer, not the file itself: run `git lfs pull` in its repository'
    """
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # behind a byte order mark and blanks
    if not start.strip(b"\0"):
        return "empty or all zeros: an interrupted download?"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page: a failed download, or a page saved instead of the file"
    return None


def read_bytes(path: Path, error: type[JaxzsError]) -> bytes:
    """The content of a small file; raises `error`, naming the file, when it cannot be had or is of another kind."""
    try:
        # Asked first: weights under the name of a small file would fill the memory.
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise error(f"{path} has {size:,} bytes; at most {MAX_TEXT_BYTES:,} are expected")
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from cause
    if (stranger := known_stranger(content)) is not None:
        raise error(f"{path} is {stranger}")
    return content


def read_text(path: Path, error: type[JaxzsError]) -> str:
    """The UTF-8 text of a small file; raises `error`, naming the file, when it cannot be had."""
    try:
        return read_bytes(path, error).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text: {cause}") from cause


def read_json(path: Path, error: type[JaxzsError]) -> dict[str, Any]:
    """The JSON object in a small file; raises `error`, naming the file, when there is none."""
    text = read_text(path, error)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as cause:  # ValueError: also whole numbers of 4300 digits
        raise error(f"{path} is not valid JSON: {cause}") from cause
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
