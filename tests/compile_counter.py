"""How many programs are compiled, or taken from the cache on disk, while a block of a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_compiled = 0


def _count(event: str, duration: float, **_: object) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@contextmanager
def nothing_is_compiled(what: str) -> Iterator[None]:
    before = _compiled
    yield
    assert _compiled == before, f"{what}: {_compiled - before} programs were compiled"
