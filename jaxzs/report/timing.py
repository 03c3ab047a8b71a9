"""Seconds of a run, those of compiling apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

_COMPILING = "/jax/core/compile/"  # tracing, lowering and compiling; a cached program costs its reading


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds of a block: after it, `compile` is what jax traced, lowered and compiled in, `run` the rest.

    Compiling in several threads, or inside of other tracing, counts once. In a block that raises, too.

    >>> with report.measured() as seconds:
    ...     total = sum(range(10))
    >>> sorted(seconds)
    ['compile', 'run']
    """
    from jax import monitoring

    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILING):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))  # told when it ends, with its length

    monitoring.register_event_duration_secs_listener(listen)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        end = time.perf_counter()
        # Before jax 0.8 a listener could not be taken back: it then listens on, for nothing.
        unregister = getattr(monitoring, "unregister_event_duration_listener", None)
        if unregister is not None:
            unregister(listen)
        # What began before the block does not count, and what overlaps counts once.
        compiling = _covered((max(first, start), min(last, end)) for first, last in spans)
        seconds["compile"] = round(compiling, 3)
        seconds["run"] = round(end - start - compiling, 3)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return total
