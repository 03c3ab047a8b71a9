"""What is said to people: nothing that stands in a name can steer their terminal, and a terminal shows what it can."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from jaxzs.errors import JaxzsError

# Control characters but the line end, separators of lines, controls of writing direction, and bytes that are no text.
_UNSHOWN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def say(text: str) -> None:
    """On standard output: part of the answer."""
    _write(text, sys.stdout)


def warn(text: str) -> None:
    """On standard error: progress, notices and errors."""
    _write(text, sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # What a terminal of another encoding lacks is shown as an escape, instead of ending the command.
    with _beside_bars(stream):
        print(escaped(text).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _beside_bars(stream: TextIO) -> contextlib.AbstractContextManager[None]:
    """Bars step aside for a line and come again below it."""
    tqdm = sys.modules.get("tqdm")
    return contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=stream)


@contextlib.contextmanager
def clock(doing: str, *, disable: bool | None = None) -> Iterator[None]:
    """On a terminal, what is done inside of the block, and for how long it has been."""
    from tqdm import tqdm

    # One step: of what has no end `jaxzs app` would show no name.
    with tqdm(desc=doing, total=1, unit="step", bar_format="{desc} {elapsed}", leave=False, disable=disable):
        yield


@contextlib.contextmanager
def ticking() -> Iterator[None]:
    """Inside, the clocks of bars on a terminal go on while nothing else does, as when a program is compiled."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(1):
            if (tqdm := sys.modules.get("tqdm")) is not None:
                for bar in list(tqdm.tqdm._instances):
                    bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def explained(error: BaseException) -> str | None:
    """What a person is told of an error; None for a fault of ours, whose traceback is wanted."""
    if isinstance(error, JaxzsError):
        return error.shown(on_command_line=True)
    if isinstance(error, OSError):  # a disk that is full, a folder that may not be read
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    # What jax raises without memory is a RuntimeError with this word in it.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return "out of memory; take a smaller --batch-size, or --bfloat16"
    return None


def escaped(text: str) -> str:
    r"""Text that cannot clear a screen, change its colours or its title; line ends stay.

    >>> from jaxzs.commands.terminal import escaped
    >>> print(escaped("\x1b[2J.png"), escaped("caf\udce9.png"))
    \x1b[2J.png caf\xe9.png
    """
    return _UNSHOWN.sub(_escape, text)


def one_line(text: str) -> str:
    """A name, which must not begin a line of its own."""
    return escaped(text).replace("\n", "\\n")


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    # A byte of a file name that is no UTF-8 stands as a lone surrogate from U+DC80.
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else match[0].encode("unicode_escape").decode()


def counted(number: int, one: str, several: str = "") -> str:
    """A number with its noun: "1 image", "1,200 images".

    >>> from jaxzs.commands.terminal import counted
    >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"
