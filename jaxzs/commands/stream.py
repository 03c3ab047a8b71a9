"""`jaxzs classify --stream`: images are labelled as they arrive, in a folder that grows or by a pipe of paths."""

from __future__ import annotations

import io
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxzs.commands import FINISHED, INCOMPLETE
from jaxzs.commands.run import Run
from jaxzs.commands.terminal import counted
from jaxzs.errors import DataError, JaxzsError, LabelError

if TYPE_CHECKING:
    from jaxzs.clip import Model

_TOGETHER = 0.3  # seconds in which images are labelled together, as StatA likes it
_LOOK_AGAIN = 1.0  # seconds between looks at a folder


def label_as_they_come(options: Any) -> int:
    """A line an image until the pipe ends, or the watcher of folders stops; nothing is kept between batches."""
    from jaxzs import zeroshot
    from jaxzs.adapt import online

    names = options.class_names()
    if names is None:
        raise LabelError("what are the classes? A stream needs --labels, --labels-file or --dataset")
    run = Run(options)
    model = run.load_model(names)
    text = zeroshot.text_proxies(model, names, numerics=options.numerics)  # [C,E]
    settings = online.StatA(temperature=1 / model.logit_scale, batch=options.batch_size)
    labelled = 0
    try:
        for paths in _batches(_arriving(options.images), options.batch_size):
            features, read = _encoded(run, model, paths)
            if not len(read):
                continue
            # A stream of this batch alone: the statistics of StatA are those of one batch.
            (answer,) = online.stream([features], text, settings)
            for path, p in zip(read, answer.probabilities, strict=True):
                # Flushed, because somebody at the other end of a pipe waits for the line.
                print(f"{path}\t{names[int(p.argmax())]}\t{float(p.max()):.3f}", flush=True)
            labelled += len(read)
    except KeyboardInterrupt as stop:  # the usual end of a watch
        raise KeyboardInterrupt(_told(run, labelled)) from stop
    options.notice(_told(run, labelled))
    return INCOMPLETE if run.unusable else FINISHED


def _told(run: Run, labelled: int) -> str:
    return f"{counted(labelled, 'image')} labelled, {counted(len(run.unusable), 'file')} not usable"


def _encoded(run: Run, model: Model, paths: Sequence[str]) -> tuple[Any, list[str]]:
    """Features of the images that can be read, and their paths; of the others is told.

    A line of a pipe may name several: a folder or a glob.
    """
    import numpy as np

    from jaxzs.classification import Encoding, encode_source, paths_of
    from jaxzs.data import open_images

    found, read = [], []
    for path in paths:  # one that is no image must not take the others with it
        try:
            source = open_images(path)
            features, numbers, unreadable = encode_source(model, source, Encoding(1, run.options.numerics))
            found.append(np.asarray(features))
            read += paths_of(source, numbers)
        except JaxzsError as error:
            unreadable = [error.shown(on_command_line=True)]
        for reason in unreadable:
            run.skip([reason])
            run.notice(reason)
    return (np.concatenate(found) if found else np.zeros((0, 1), np.float32)), read  # [n,E]


Arriving = queue.Queue[str | BaseException | None]  # a path, or why there are no more; None at the end


def _arriving(places: Sequence[str]) -> Arriving:
    """Paths as they come, None at the end: of standard input for "-", else of files new in the folders."""
    if not places:
        raise DataError("no images given: name a folder, or - for paths on standard input")
    if places != ("-",):
        for place in places:
            if not Path(place).is_dir():
                raise DataError(f"{place} is no folder: a stream takes folders, or - for paths on standard input")
    arriving: Arriving = queue.Queue(maxsize=10_000)  # a pipe that is faster waits
    found = _listen() if places == ("-",) else _watch(places)
    threading.Thread(target=_put, args=(found, arriving), daemon=True).start()  # it ends with the process
    return arriving


def _put(found: Iterator[str], arriving: Arriving) -> None:
    """All that is found into the queue. Whatever ends that is told there: who waits would wait for ever."""
    try:
        for path in found:
            arriving.put(path)
        arriving.put(None)
    except BaseException as error:
        arriving.put(error)


def _listen() -> Iterator[str]:
    """The lines of standard input."""
    if sys.stdin is None:  # closed by who has started the command
        raise DataError("standard input is closed; expected a path a line")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files are bytes, not all of them UTF-8
    for line in sys.stdin:
        if line.strip():
            yield line.removesuffix("\n").removesuffix("\r")  # lists of Windows; names may end in blanks


def _watch(places: Sequence[str]) -> Iterator[str]:
    """Images once their size stands still: a file that is being copied is left for the next look."""
    from jaxzs.data import find_images

    told: set[str] = set()
    sizes: dict[str, int] = {}
    while True:
        for place in places:
            try:
                present = [str(path) for path in find_images(place)]
            except JaxzsError:
                present = []  # none yet
            for path in present:
                try:
                    size = os.path.getsize(path)
                except OSError:  # removed between two looks
                    continue
                if path not in told and sizes.get(path) == size:
                    told.add(path)
                    yield path
                sizes[path] = size
        time.sleep(_LOOK_AGAIN)


def _batches(arriving: Arriving, size: int) -> Iterator[list[str]]:
    """What comes within a short time, at most `size`: nobody waits for a full batch."""
    ended: BaseException | bool = False
    while not ended:
        batch: list[str] = []
        until = None
        while len(batch) < size:
            try:
                # The first one is waited for without end, those behind it for a moment.
                path = arriving.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if not isinstance(path, str):
                ended = path or True
                break
            batch.append(path)
            until = until or time.monotonic() + _TOGETHER  # counted from the first one
        if batch:
            yield batch
    if isinstance(ended, BaseException):
        raise ended
