"""Folders of images: one subfolder per class, or a table of labels in CSV or JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxzs.data.images import find_images, open_image
from jaxzs.data.names import order_names
from jaxzs.data.sources import WHOLE, Item, Labels, digest
from jaxzs.errors import DataError

_LABEL_FILES = ("labels.csv", "labels.json")
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "image", "id")
_SINGLE_COLUMNS = ("label", "class", "class_name", "label_name")
_SEVERAL_COLUMNS = ("labels", "classes", "class_names", "label_names", "tags")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files with their labels. Made by `open_folder`."""

    root: Path
    files: tuple[str, ...]  # relative to root
    labels: tuple[Labels, ...]
    label_names: tuple[str, ...]
    multi_label: bool
    identity: str
    splits: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        name = self.files[index]
        return Item(open_image(self.root / name), self.labels[index], name)


def open_folder(root: str | Path, *, labels: str | Path | None = None, label_column: str | None = None) -> FolderSource:
    """A folder of images: one subfolder per class, or flat with a table of labels.

    root: class/image files (also split/class/image, as `train/cat/1.jpg`), or images anywhere below it.
    labels: a CSV file with a header, or a JSON file; by default `labels.csv` or `labels.json` in the folder, whose
        images may then lie in `images/`. CSV: a column of file names, paths or stems (`file`, `path`, `image`, `id`),
        one of labels (`label`, `class`: one per image; `labels`, `class_names`, `tags`: several, separated by ";",
        "|" or blanks), optionally `split`. JSON: {"file": "cat"} or {"file": ["cat", "dog"]}.
        Only listed files are taken.
    label_column: the column to take instead.

    Files are in the order of their names, so that the order does not depend on the file system. Raises `DataError`
    (nothing there, a file that is not found or not unique, a table without the columns).

    >>> source = data.open_folder("photos")
    >>> len(source), source.label_names
    (30, ('one', 'two', 'zero'))
    >>> source[0].id, source[0].labels
    ('one/0.png', (0,))
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    table = Path(labels).expanduser() if labels is not None else _table_in(root)
    if table is None:
        return _by_subfolder(root)
    rows, several = _read_table(table, label_column)
    if labels is None and (root / "images").is_dir():
        root = root / "images"
    return _by_table(root, table, rows, several)


def open_files(paths: Sequence[Path]) -> FolderSource:
    """Image files without labels, in the order given, e.g. of `find_images`.

    Its identity is of names, sizes and times of writing. Without splits, labels and label names.

    >>> source = data.open_files(data.find_images("photos/two"))
    >>> len(source), source.label_names
    (10, ())
    """
    files = [str(path.absolute()) for path in paths]
    return _folder(Path("/"), files, [()] * len(files), (), False, {WHOLE: range(len(files))})


def _table_in(root: Path) -> Path | None:
    return next((root / name for name in _LABEL_FILES if (root / name).is_file()), None)


def _by_subfolder(root: Path) -> FolderSource:
    files = [path.relative_to(root) for path in find_images(root)]
    depths = {len(path.parts) for path in files}
    if depths == {1}:  # a flat folder without labels
        names: tuple[str, ...] = ()
        of_file: list[Labels] = [()] * len(files)
    elif depths <= {2, 3} and len(depths) == 1:
        names = order_names(path.parts[-2] for path in files)
        place_of = {name: place for place, name in enumerate(names)}
        of_file = [(place_of[path.parts[-2]],) for path in files]
    else:
        raise DataError(
            f"{root}: images lie at different depths ({', '.join(map(str, sorted(depths)))} levels); expected "
            "class/image, split/class/image, or all images in one folder. With a table of labels "
            "(labels.csv) any layout is fine"
        )
    splits: dict[str, list[int]] = {}
    for place, path in enumerate(files):
        splits.setdefault(path.parts[0] if depths == {3} else WHOLE, []).append(place)
    return _folder(root, [str(path.as_posix()) for path in files], of_file, names, False, splits)


class _Row(NamedTuple):
    file: str
    labels: tuple[str, ...]
    split: str


def _read_table(table: Path, label_column: str | None) -> tuple[list[_Row], bool]:
    """Rows of a table of labels, and whether images may have several."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix.lower() == ".json":
            return _read_json_rows(json.loads(text), table)
        lines = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"cannot read the table of labels {table}: {error}") from error
    columns = list(lines[0]) if lines else []
    file_column = next((c for c in _FILE_COLUMNS if c in columns), None)
    one = label_column or next((c for c in _SINGLE_COLUMNS if c in columns), None)
    column = one or next((c for c in _SEVERAL_COLUMNS if c in columns), None)
    if file_column is None or column is None or column not in columns:
        wanted = label_column or ", ".join((*_SINGLE_COLUMNS, *_SEVERAL_COLUMNS))
        raise DataError(
            f"{table}: found the columns {', '.join(columns) or '(none)'}; expected one of files "
            f"({', '.join(_FILE_COLUMNS)}) and one of labels ({wanted})"
        )
    several = column in _SEVERAL_COLUMNS
    cells = [line[column] or "" for line in lines]
    separator = next((s for s in ";|" if any(s in cell for cell in cells)), None)

    def parts(cell: str) -> list[str]:
        return [part.strip() for part in (cell.split(separator) if several else [cell])]

    rows = [
        _Row((line[file_column] or "").strip(), tuple(filter(None, parts(cell))), line.get("split") or WHOLE)
        for line, cell in zip(lines, cells, strict=True)
    ]
    return rows, several


def _read_json_rows(values: Any, table: Path) -> tuple[list[_Row], bool]:
    if not isinstance(values, dict) or not values:
        raise DataError(f'{table}: expected a JSON object {{"file": "label"}} or {{"file": ["label", ...]}}')
    several = any(isinstance(value, list) for value in values.values())
    rows = []
    for file, value in values.items():
        listed = value if isinstance(value, list) else [value]
        if not all(isinstance(label, str) for label in listed):
            raise DataError(f"{table}: the labels of {file!r} are not texts: {value!r}")
        rows.append(_Row(file, tuple(listed), WHOLE))
    return rows, several


def _by_table(root: Path, table: Path, rows: Sequence[_Row], several: bool) -> FolderSource:
    known: dict[str, set[str]] = {}
    for path in find_images(root):
        name = path.relative_to(root).as_posix()
        for spelling in {name, path.name, str(Path(name).with_suffix("")), path.stem}:
            known.setdefault(spelling, set()).add(name)
    of_file: dict[str, _Row] = {}
    for row in rows:
        found = known.get(row.file.replace("\\", "/"), set())
        if len(found) != 1:
            problem = f"names {len(found)} files" if found else "is not there"
            raise DataError(
                f"{table}: {row.file!r} {problem} below {root}"
                + (f" ({', '.join(sorted(found)[:3])}); write its path" if found else "")
            )
        file = next(iter(found))
        if file in of_file:
            raise DataError(f"{table}: {row.file!r} is listed twice")
        of_file[file] = row
    files = sorted(of_file)
    names = order_names(label for row in of_file.values() for label in row.labels)
    places = {name: place for place, name in enumerate(names)}
    labels = [tuple(sorted({places[label] for label in of_file[file].labels})) for file in files]
    splits: dict[str, list[int]] = {}
    for place, file in enumerate(files):
        splits.setdefault(of_file[file].split, []).append(place)
    return _folder(root, files, labels, names, several, splits)


def _folder(
    root: Path,
    files: Sequence[str],
    labels: Sequence[Labels],
    names: Sequence[str],
    several: bool,
    splits: Mapping[str, Sequence[int]],
) -> FolderSource:
    stats = [(root / file).stat() for file in files]
    # Names, sizes and times of writing stand for the contents, which would have to be read otherwise.
    seen = [[file, s.st_size, s.st_mtime_ns] for file, s in zip(files, stats, strict=True)]
    return FolderSource(
        root=root,
        files=tuple(files),
        labels=tuple(labels),
        label_names=tuple(names),
        multi_label=several,
        identity=digest("folder", seen, [list(of_file) for of_file in labels], list(names)),
        splits={name: tuple(places) for name, places in splits.items()},
    )
