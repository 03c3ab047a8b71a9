"""`jaxzs classify --shots`: images whose labels are known, from a folder or from a table of labels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxzs.commands.terminal import counted
from jaxzs.errors import DataError, LabelError

if TYPE_CHECKING:
    import jax
    import numpy as np

    from jaxzs.adapt import Shots
    from jaxzs.clip import Model
    from jaxzs.commands.run import Run
    from jaxzs.data import FolderSource


class Told(NamedTuple):
    """Images whose labels are told: M of them, and their classes [M] int32."""

    source: FolderSource
    classes: np.ndarray


def told_labels(run: Run, names: Sequence[str]) -> Told | None:
    """What --shots tells of the classes `names`; None without it.

    Raises `DataError` (no labels there, several an image), `LabelError` with both lists for labels that are no class.
    """
    import numpy as np

    place = run.options.shots
    if place is None:
        return None
    source = _opened(place, run.options.images)
    told = [number for number, own in enumerate(source.labels) if own]  # a row without a label tells nothing
    if not told:
        raise DataError(f"--shots {place}: no image has a label there")
    if any(len(source.labels[number]) > 1 for number in told):
        raise DataError(f"--shots {place}: several labels of one image; expected one")
    place_of = _places(run, names, source.label_names)
    kept = _part(source, told)
    classes = np.array([place_of[labels[0]] for labels in kept.labels], np.int32)  # [M]
    of = counted(len(set(classes.tolist())), "class", "classes")
    run.notice(f"{counted(len(classes), 'label')} of {of} told by {place}")
    return Told(kept, classes)


def rows_of(told: Told, source: FolderSource, read: Sequence[int]) -> np.ndarray:
    """Of each told image its row among those to classify, the images `read` of `source`: [M], -1 for none."""
    import numpy as np

    row_of = {_path(source, number): row for row, number in enumerate(read)}
    return np.array([row_of.get(_path(told.source, number), -1) for number in range(len(told.source))])


def shots_of(run: Run, model: Model, told: Told, rows: np.ndarray, features: jax.Array, encode: Any) -> Shots:
    """Features and labels; features of `rows` [M] of the images to classify [N,E] are there already."""
    import jax.numpy as jnp
    import numpy as np

    from jaxzs.adapt import Shots
    from jaxzs.classification import Encoding, encode_source

    options = run.options
    known, others = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    encoding = Encoding(options.batch_size, options.numerics, not options.quiet, encode)
    encoded, read, unreadable = encode_source(model, _part(told.source, others), encoding)
    for reason in unreadable:
        run.notice(f"note: {reason}")
    # What could not be read has no features, and its label goes with it.
    classes = np.concatenate([told.classes[known], told.classes[others[read]]])
    if not len(classes):
        raise DataError(f"--shots {options.shots}: none of its images could be read")
    return Shots(jnp.concatenate([features[rows[known]], encoded]), classes)


def _part(source: FolderSource, numbers: Sequence[int] | np.ndarray) -> FolderSource:
    files = tuple(source.files[number] for number in numbers)
    return dataclasses.replace(source, files=files, labels=tuple(source.labels[number] for number in numbers))


def _opened(place: Path, images: Sequence[str]) -> FolderSource:
    """A folder with subfolders, or a table of images in the folder that is classified, or beside the table."""
    from jaxzs.data import open_folder, open_images

    place = place.expanduser()
    if place.is_dir():
        source = open_images(place)
        # Of one class alone subfolders say nothing of images to classify; of shots they do.
        source = source if source.label_names else open_folder(place)
        if not source.label_names:
            raise DataError(f"--shots {place}: expected one subfolder a class, or a table of labels such as shots.csv")
        return source
    if not place.is_file():
        raise DataError(f"--shots {place}: there is no such folder or table")
    folder = (
        Path(images[0]).expanduser() if len(images) == 1 and Path(images[0]).expanduser().is_dir() else place.parent
    )
    try:
        return open_folder(folder, labels=place)
    except DataError as error:
        raise error.within("--shots") from error


def _places(run: Run, names: Sequence[str], found: Sequence[str]) -> list[int]:
    """The class of each label found, told where the lists differ."""
    from jaxzs.data import match_names

    info = run.options.dataset_info()
    if info is not None:
        info.names_for(found)  # says which of them are strangers
        places = [info.place(label) for label in found]
        return [place for place in places if place is not None]
    try:
        pairing = match_names(names, found, by_position=run.options.by_position)
    except LabelError as error:
        raise error.within(f"--shots {run.options.shots}") from error
    run.tell_pairing(pairing)
    return list(pairing.places)


def _path(source: FolderSource, number: int) -> str:
    return os.path.abspath(source.root / source.files[number])
