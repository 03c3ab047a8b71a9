"""When another process of a run dies: one line and exit code 2, where jax ends by SIGABRT and a stack of C++.

jax notices the death by itself (a closed connection to process 0, missed heartbeats of the others) and ends this
process from a thread of its own: a report on file descriptor 2, then `abort()`. Python cannot be called there. So

1. descriptor 2 becomes a pipe, whose reader passes everything on but that report (Python's own `sys.stderr` keeps the
   terminal);
2. `abort()` sleeps before it ends the process, which is the time that the reader needs to say the line and to exit.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn

import jax

from jaxzs.errors import PeerError

ENDED, INTERRUPTED = 2, 130  # exit codes: of a named error, after Ctrl-C
_QUIET = 0.3  # seconds without output after which a report is whole
_FATAL = b"JAX distributed service detected fatal errors"
# Numbers of processes in the report: a line each, alone (jax 0.10) or behind the name of the job (jax 0.7).
_SILENT = re.compile(rb"stopped sending heartbeats\):\s*((?:(?:/job:\S+/task:)?\d+\s*[,\n]\s*)+)")
_NUMBER = re.compile(rb"(\d+)\s*(?:[,\n]|$)")

# How a program over all processes fails that lost one: a `JaxRuntimeError`, or a `ValueError` where it ran at once.
_BROKEN = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")

_ending: list[int] = []  # the exit code of a process that ends by an error of its own
_heartbeats: list[float] = []  # seconds after which a silent process counts as dead; empty with a single one


def watch(heartbeat_timeout: float) -> None:
    """From here on the death of another process ends this one by a line; once jax knows all processes."""
    if os.name != "posix":  # elsewhere jax's own report stays
        return
    _heartbeats[:] = [heartbeat_timeout]
    terminal = os.dup(2)
    _keep_terminal(terminal)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    _delay_abort()
    reader = threading.Thread(target=_pass_on, args=(reading, terminal), daemon=True)
    reader.start()
    atexit.register(_leave, terminal, reader)
    sys.excepthook = _Hook(sys.excepthook)


def _keep_terminal(terminal: int) -> None:
    """What Python writes does not go through the pipe: its order, and that it is a terminal, stay."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a notebook's stream has no descriptor
        if sys.stderr.fileno() == 2:
            sys.stderr.flush()
            sys.stderr = os.fdopen(
                os.dup(terminal), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
            )


def _delay_abort() -> None:
    """`abort()` calls the C function `sleep` with the number of its signal, 6; then the process ends as ever."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _pass_on(reading: int, terminal: int) -> None:
    """Copies from the pipe to the terminal, until jax reports a death."""
    while text := _burst(reading):
        if _FATAL in text:
            _end(terminal, died(text, jax.process_index(), jax.process_count()))
        _write(terminal, text)


def _burst(reading: int) -> bytes:
    """What is written without a pause, since a report comes in several pieces; empty at the end."""
    text = os.read(reading, 65536)
    until = time.monotonic() + 10 * _QUIET
    while text and time.monotonic() < until and select.select([reading], [], [], _QUIET)[0]:
        more = os.read(reading, 65536)
        text += more
        if not more:
            break
    return text


def _write(terminal: int, text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        while text:
            text = text[os.write(terminal, text) :]


def _end(terminal: int, message: str) -> NoReturn:
    """Other threads may be anywhere, some in a wait that never ends: of Python's ordinary end only the flush is run."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(1)
    _write(terminal, f"jaxzs: {message}\n".encode())
    os._exit(ENDED)


def died(report: bytes, own: int, processes: int) -> str:
    """The line for a report of jax. Without numbers in it process 0 is gone, who tells the others of all deaths.

    >>> from jaxzs import peers
    >>> peers.died(b"(stopped sending heartbeats):\\n1\\n3\\nThe tasks", 0, 4).partition(";")[0]
    'processes 1 and 3 of 4 have died, or ended before the others'
    """
    silent = _SILENT.search(report)
    numbers = sorted({int(number) for number in _NUMBER.findall(silent[1])} - {own}) if silent else []
    if not numbers and own != 0:
        numbers = [0]
    return _lost(numbers, processes)


def _lost(numbers: list[int], processes: int) -> str:
    listed = " and ".join(filter(None, (", ".join(map(str, numbers[:-1])), *map(str, numbers[-1:]))))
    who = f"process{'es' * (len(numbers) > 1)} {listed} of {processes}" if numbers else "another process"
    return (
        f"{who} {'have' if len(numbers) > 1 else 'has'} died, or ended before the others; this one ends, too. "
        "Chunks that are finished are kept: run the same command again, in all processes, to go on"
    )


# --- errors of this process --------------------------------------------------------------------------------------


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """An exchange with other processes: where it fails because one of them is gone, that is a `PeerError`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not _BROKEN.match(str(error)):
            raise
        _await_report()
        raise PeerError(_lost([], jax.process_count())) from error


def _await_report() -> None:
    """An exchange fails at once, who is gone is known after the heartbeats; by then the reader ends this process."""
    if _heartbeats:
        time.sleep(2 * _heartbeats[0])


@contextlib.contextmanager
def ending_early() -> Iterator[None]:
    """An error in the block lets this process end without waiting for the others, who learn of it as of a death."""
    _ending.clear()
    try:
        yield
    except BaseException as error:
        _ending[:] = [INTERRUPTED if isinstance(error, KeyboardInterrupt) else ENDED]
        raise


class _Hook:
    """Python's hook for errors that nobody catches: they end this process alone, see `ending_early`."""

    def __init__(self, before: object) -> None:
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _BROKEN.match(str(error)):
            _await_report()
        self.before(kind, error, trace)  # type: ignore[operator]
        _ending[:] = [INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1]


def _leave(terminal: int, reader: threading.Thread) -> None:
    """At exit: wait for the others while the pipe is read; after an error of this process, do not wait at all."""
    if _ending:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_ending[0])  # jax would wait for the others for five minutes, and then abort
    jax.distributed.shutdown()
    os.dup2(terminal, 2)  # the pipe has no writer any more: its reader ends
    reader.join(1)
