"""Sweeps that can be stopped and go on: one record whose cells are written as they are finished."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxzs.errors import RecordError
from jaxzs.report import results as shapes
from jaxzs.report.records import Record, git_revision, json_values, model_entry, read_record, write_record
from jaxzs.report.results import Results
from jaxzs.report.timing import measured

if TYPE_CHECKING:
    from jaxzs.clip import Model


def identity(settings: Mapping[str, Any], model: Mapping[str, Any] | None, data: Mapping[str, Any] | None) -> str:
    """Hash of settings and of the fingerprints of model and data: equal ones need not be computed twice.

    Their names do not count, nor do versions, device and time.
    """
    parts = [settings, *((entry or {}).get("fingerprint") for entry in (model, data))]
    text = json.dumps(json_values(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Sweep:
    """A record that grows cell by cell.

    path: of the record; None keeps it in memory. command, settings, model, data: of the whole record, as in
    `write_record`. skip_existing: cells that the file holds already, made with the same settings and fingerprints, are
    taken from it; any difference computes them again, and a file that cannot be read is said and begun anew.

    >>> sweep = report.Sweep("sweep.json", command="example", settings={"seed": 0})
    >>> dict(sweep.cell("sum", lambda: report.Results({"sum": 3})).metrics)
    {'sum': 3}
    >>> again = report.Sweep("sweep.json", command="example", settings={"seed": 0}, skip_existing=True)
    >>> dict(again.cell("sum", lambda: report.Results({"sum": 4})).metrics)  # from the file
    {'sum': 3}
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        command: str,
        settings: Mapping[str, Any],
        model: Model | None = None,
        data: Mapping[str, Any] | None = None,
        skip_existing: bool = False,
        notify: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> None:
        self.path = None if path is None else Path(path)
        self.command, self.settings, self.model, self.data = command, settings, model, data
        self.notify = notify
        self._model = None if model is None else model_entry(model)
        self._before = self._existing() if skip_existing else None  # read before the first cell is written over it
        self.cells: dict[str, Any] = {}
        # Of an equal record also the cells stay that this run does not ask for.
        whole = {"settings": json_values(settings), "model": self._model, "data": data}
        if self._before and all(self._before.raw.get(name) == own for name, own in whole.items()):
            self.cells = dict(self._before.cells)

    def cell(
        self,
        key: str,
        compute: Callable[[], Results],
        *,
        settings: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Results:
        """What a cell has measured: from the file, or computed now, measured in seconds, and written at once.

        settings: those of this cell beyond the sweep's. data: of this cell, where cells have their own.
        """
        return self.batch({key: settings}, lambda _: [compute()], data=data)[key]

    def batch(
        self,
        cells: Mapping[str, Mapping[str, Any] | None],
        compute: Callable[[list[str]], Sequence[Results]],
        *,
        size: int = 1,
        data: Mapping[str, Any] | None = None,
        needs: Sequence[str] = (),
    ) -> dict[str, Results]:
        """Cells that are computed together, their settings by key; `compute` is called with at most `size` keys.

        Each has an equal part of the seconds. needs: metrics that are numbers; a cell of the file without is damaged.
        """
        found = {key: self._kept(key, self._identity(own, data), needs) for key, own in cells.items()}
        missing = [key for key, kept in found.items() if kept is None]
        for start in range(0, len(missing), size):
            keys = missing[start : start + size]
            with measured() as seconds:
                computed = compute(keys)
            share = {name: round(value / len(keys), 3) for name, value in seconds.items()}
            for key, results in zip(keys, computed, strict=True):
                self.cells[key] = self._cell(cells[key], data, share, results)
                found[key] = shapes.parse(self.cells[key], key)  # the same whether it was computed or kept
            self._write(Results())  # who stops the sweep loses no finished cell
        return {key: results for key, results in found.items() if results is not None}

    def _identity(self, settings: Mapping[str, Any] | None, data: Mapping[str, Any] | None) -> str:
        return identity({**self.settings, **(settings or {})}, self._model, data or self.data)

    def _kept(self, key: str, own: str, needs: Sequence[str]) -> Results | None:
        """What the file holds of a cell, if it was made with the same."""
        kept = self._before.cells.get(key) if self._before else None
        if kept is None:
            return None
        # A cell is known by what it was made with, not by its name.
        if kept["identity"] != own:
            self.notify(f"{key}: {self.path} has it with other settings or data; computed anew")
            return None
        found = shapes.parse(kept, f"{self.path}: cells[{key!r}]")
        if lacking := [name for name in needs if not isinstance(found.metrics.get(name), int | float)]:
            self.notify(f"{key}: {self.path} has it without {', '.join(lacking)}; computed anew")
            return None
        self.notify(f"{key}: kept from {self.path}")
        self.cells[key] = kept
        return found

    def _cell(
        self,
        settings: Mapping[str, Any] | None,
        data: Mapping[str, Any] | None,
        seconds: Mapping[str, float],
        found: Results,
    ) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        cell: dict[str, Any] = {"identity": self._identity(settings, data), "seconds": dict(seconds)}
        cell |= {"git_revision": git_revision(), "date": now}
        if settings:
            cell["settings"] = dict(settings)
        if data is not None:
            cell["data"] = dict(data)
        return json_values({**cell, **found.as_json()})

    def finish(self, results: Results | None = None, **more: Any) -> dict[str, Any]:
        """Write the record with what belongs to no cell; returns it. `more` as in `write_record`."""
        return self._write(results or Results(), **more)

    def _write(self, results: Results, **more: Any) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        for cell in self.cells.values():
            for name, value in cell["seconds"].items():
                seconds[name] = round(seconds.get(name, 0.0) + value, 3)
        return write_record(
            self.path,
            command=self.command,
            settings=self.settings,
            results=results,
            model=self.model,
            data=self.data,
            seconds=seconds,
            cells=self.cells,
            **more,
        )

    def _existing(self) -> Record | None:
        """The record at `path`; None without one that can be read."""
        if self.path is None or not self.path.exists():
            return None
        try:
            record = read_record(self.path)
        except RecordError as error:
            self.notify(f"{error}; nothing of it is kept")
            return None
        if not record.cells:
            self.notify(f"{self.path} has no cells that could be kept")
        return record
