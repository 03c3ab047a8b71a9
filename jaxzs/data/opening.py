"""One call for any kind of source."""

from __future__ import annotations

from pathlib import Path

from jaxzs.data.folders import open_folder
from jaxzs.data.prepared import open_tfds
from jaxzs.data.sources import Source, open_npz, take_split
from jaxzs.errors import DataError


def open_source(
    place: str | Path,
    *,
    split: str | None = None,
    labels: str | Path | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
) -> Source:
    """Whatever lies at a place: a folder of images, an .npz file, or a prepared tensorflow-datasets folder or name.

    place: a path, or "tfds:NAME". split: in the syntax of `take_split`; tensorflow-datasets need one.
    labels, label_column, label_separator: table of labels of a folder, as for `open_folder`. Raises `DataError`.

    >>> source = data.open_source("photos", split="all[:50%]")
    >>> len(source), source.label_names
    (15, ('one', 'two', 'zero'))
    """
    text = str(place) if place != "" else "''"
    path = Path(text).expanduser()  # of an empty text it would be the current folder
    # Before folders of images: what tensorflow-datasets prepares is a folder, too.
    if text.startswith("tfds:") or (path / "dataset_info.json").is_file():
        if split is None:
            raise DataError(f"{text}: say which split, e.g. test or train[:50%]")
        return open_tfds(text.removeprefix("tfds:"), split)
    if path.suffix.lower() == ".npz":
        source: Source = open_npz(path)
    elif path.is_dir():
        source = open_folder(path, labels=labels, label_column=label_column, label_separator=label_separator)
    else:
        raise DataError(
            f"no images at {text}: expected a folder, an .npz file with 'images', the folder of a prepared "
            "tensorflow-datasets data set, or tfds:NAME"
        )
    return source if split is None else take_split(source, split)
