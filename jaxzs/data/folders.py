"""Folders of images: one subfolder per class, or a table of labels; and image files from anywhere."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxzs.data.finding import LABEL_TABLES, PassedOver, layout_of, search_images, subfolders
from jaxzs.data.images import open_image, shown_name
from jaxzs.data.names import common_spellings, order_names
from jaxzs.data.sources import WHOLE, Item, Labels, digest
from jaxzs.data.tables import Reading, Row, Table, read_table
from jaxzs.errors import DataError

_SHOWN = 3  # names in an error
_NOTHING = PassedOver()


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files with their labels. Made by `open_folder`, `open_images` and `open_files`."""

    root: Path
    files: tuple[str, ...]  # below root
    labels: tuple[Labels, ...]
    label_names: tuple[str, ...]
    multi_label: bool
    identity: str
    splits: Mapping[str, tuple[int, ...]]
    passed_over: PassedOver = _NOTHING

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        name = self.files[index]
        return Item(open_image(self.root / name), self.labels[index], name)


def open_folder(
    root: str | Path,
    *,
    labels: str | Path | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
) -> FolderSource:
    """A folder of images: one subfolder per class, or flat with a table of labels.

    root: class/image files (also split/class/image, as `train/cat/1.jpg`), or images anywhere below it.
    labels: a table in CSV (comma, semicolon or tab, with a header) or JSON; by default the first of `labels.csv`,
        `labels.tsv`, `labels.json`, `metadata.csv` and `metadata.jsonl` in the folder, whose images may then lie in
        `images/`. CSV: a column of file names, paths (relative to the table first) or stems (`file`, `path`, `image`,
        `id`), one of labels (`label`, `class`: one per image; `labels`, `class_names`, `tags`: several; or one of 0 and
        1 for each class), optionally `split`. JSON: {"file": "cat"}, {"file": ["cat", "dog"]}, a list of objects with
        those columns, or COCO annotations. Empty cells and NaN are no label. Only listed files are taken.
    label_column: the column to take instead.
    label_separator: between several labels of a cell. By default the first of ";", "|" and "," that the column has; a
        blank only when it is given here. A list in a cell, ["cat", "dog"], needs none.

    Files are in the order of their names, so that the order does not depend on the file system; labels in that of
    `order_names`. What was passed over is in `passed_over`. Raises `DataError` (nothing there, a file that is not found
    or not unique, a table without the columns, or one that cannot be read for certain).

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
    rows = read_table(table, Reading(label_column, label_separator))
    # A table found beside `images/` is of what is in there; one named by the caller may be from anywhere.
    if labels is None and (root / "images").is_dir():
        root = root / "images"
    return _by_table(root, table, rows)


def open_files(paths: Sequence[Path]) -> FolderSource:
    """Image files without labels, in the order given, e.g. of `find_images`.

    Its identity is of names, sizes and times of writing. Without splits, labels and label names. A file that is not
    there is an image that cannot be read.

    >>> source = data.open_files(data.find_images("photos/two"))
    >>> len(source), source.label_names
    (10, ())
    """
    return _source(Path("/"), [str(path.absolute()) for path in paths], [()] * len(paths), False)


def open_images(sources: str | Path | Iterable[str | Path]) -> FolderSource:
    """The images in folders, files and globs (`search_images`), labelled where it is one folder laid out class/image.

    Their names are the paths as they were found, sorted. A few images at another depth have no label. Raises
    `DataError` where there is no image.

    >>> source = data.open_images("photos")
    >>> len(source), source.label_names, source.files[0], source.labels[0]
    (30, ('one', 'two', 'zero'), 'photos/one/0.png', (0,))
    >>> data.open_images(["photos/one", "photos/two/*.png"]).label_names
    ()
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found = search_images(listed)
    # Of several folders each may mean something else by its subfolders.
    folders = subfolders(found.paths, Path(listed[0]).expanduser()) if len(listed) == 1 else None
    labels: list[tuple[str, ...]] = [()] * len(found.paths)
    passed = found.passed_over
    if folders is not None:
        labels = [() if name is None else (shown_name(name),) for name in folders]
        strays = tuple(str(path) for path, name in zip(found.paths, folders, strict=True) if name is None)
        passed = dataclasses.replace(passed, strays=strays)
    return _source(Path(), list(map(str, found.paths)), labels, False, passed=passed)


def _table_in(root: Path) -> Path | None:
    return next((root / name for name in LABEL_TABLES if (root / name).is_file()), None)


# --- one subfolder per class --------------------------------------------------------------------------------------


def _by_subfolder(root: Path) -> FolderSource:
    found = search_images(root)
    below = [path.relative_to(root) for path in found.paths]
    layout = layout_of(below)
    if layout is None or layout.depth > 3:
        raise _at_different_depths(root, below)
    files = [path for path in below if len(path.parts) == layout.depth]
    # class/image, or split/class/image.
    names = [(shown_name(path.parts[-2]),) if layout.depth > 1 else () for path in files]
    splits = [shown_name(path.parts[0]) if layout.depth == 3 else WHOLE for path in files]
    passed = dataclasses.replace(found.passed_over, strays=tuple(path.as_posix() for path in layout.strays))
    return _source(root, [path.as_posix() for path in files], names, False, splits, passed)


def _at_different_depths(root: Path, below: Sequence[Path]) -> DataError:
    by_depth = {len(path.parts): path.as_posix() for path in reversed(below)}  # reversed: the first of each depth stays
    examples = ", ".join(repr(by_depth[depth]) for depth in sorted(by_depth)[:_SHOWN])
    return DataError(
        f"{shown_name(root)}: images lie at different depths, or below more than two folders ({examples}); expected "
        "class/image, split/class/image, or all images in one folder. With a table of labels (labels.csv) any layout "
        "is fine"
    )


# --- a table of labels --------------------------------------------------------------------------------------------


def _by_table(root: Path, table: Path, read: Table) -> FolderSource:
    found = search_images(root)
    name_of = _resolver(root, table, [path.relative_to(root).as_posix() for path in found.paths])
    of_file: dict[str, Row] = {}
    absent = []
    for row in read.rows:
        names = name_of(row.file)
        # Told together at the end: "1 of 10,000" and "all of them" are different mistakes.
        if not names:
            absent.append(row.file)
            continue
        if len(names) > 1:
            raise DataError(
                f"{table}: {row.file!r} names {len(names)} files below {root} ({', '.join(sorted(names)[:_SHOWN])}); "
                "write its path"
            )
        [name] = names
        if name in of_file:
            raise DataError(f"{table}: {row.file!r} is listed twice")
        of_file[name] = row
    if absent:
        others = f", nor are {len(absent) - 1:,} others of {len(read.rows):,}" if len(absent) > 1 else ""
        raise DataError(f"{table}: {absent[0]!r} is not there below {root}{others}")
    files = sorted(of_file)  # not in the order of the table, by which features would be keyed
    labels = [of_file[file].labels for file in files]
    passed = dataclasses.replace(
        found.passed_over, unlisted=len(found.paths) - len(files), unlabelled=sum(not listed for listed in labels)
    )
    return _source(root, files, labels, read.several, [of_file[file].split for file in files], passed)


def _resolver(root: Path, table: Path, names: Sequence[str]) -> Callable[[str], set[str]]:
    """A function from what a table says of a file to the names below root that it may mean.

    As a path it is relative to the table, to root, or to where the command runs, as commands write paths; else it is a
    name without folders or suffix, and at last in other capitals or with accents that are not composed.
    """
    by_path = {_normal(root, name): name for name in names}
    by_name, by_loose_name, by_loose_path = (collections.defaultdict[str, set[str]](set) for _ in range(3))
    for name in names:
        path = Path(name)
        by_loose_path[_loose(_normal(root, name))].add(name)
        for spelling in {name, path.name, path.with_suffix("").as_posix(), path.stem}:  # an id is a stem
            by_name[spelling].add(name)
            by_loose_name[_loose(spelling)].add(name)

    def names_of(file: str) -> set[str]:
        file = file.replace("\\", "/")  # of a table written on Windows
        paths = [_normal(place, file) for place in (table.parent, root, Path()) if file]
        for path in paths:
            if (name := by_path.get(path)) is not None:
                return {name}
        # The stricter reading first: "A.png" and "a.png" may both be there. Of several the caller tells.
        loose = (by_loose_path.get(_loose(path)) for path in paths)
        return by_name.get(file) or by_loose_name.get(_loose(file)) or next(filter(None, loose), set())

    return names_of


def _normal(folder: Path, file: str) -> str:
    # Not resolved: ".." goes, links keep the names under which images were found.
    return os.path.abspath(os.path.join(folder, file))


def _loose(name: str) -> str:
    # A table and a file system may compose accents differently.
    return unicodedata.normalize("NFC", name).casefold()


# --- what all of them end in --------------------------------------------------------------------------------------


def _source(
    root: Path,
    files: Sequence[str],
    labels: Sequence[tuple[str, ...]],
    several: bool,
    splits: Sequence[str] | None = None,
    passed: PassedOver = _NOTHING,
) -> FolderSource:
    """The source of these files below root, with their labels as texts, the split of each, and what was passed over."""
    # "cat" of one table row and "Cat" of another are one class, and the notice says so.
    spelled = common_spellings(itertools.chain.from_iterable(labels))
    names = order_names(spelled.values())
    number = {name: place for place, name in enumerate(names)}
    place_of = {label: number[name] for label, name in spelled.items()}
    places = [tuple(sorted({place_of[label] for label in of_file})) for of_file in labels]
    of_split: dict[str, list[int]] = {}
    for place, split in enumerate(splits or [WHOLE] * len(files)):
        of_split.setdefault(split, []).append(place)
    respelled = {label: name for label, name in sorted(spelled.items()) if label != name}
    return FolderSource(
        root=root,
        files=tuple(files),
        labels=tuple(places),
        label_names=names,
        multi_label=several,
        identity=digest("folder", [_stamp(root, file) for file in files], [list(p) for p in places], list(names)),
        splits={name: tuple(listed) for name, listed in of_split.items()},
        passed_over=dataclasses.replace(passed, respelled=respelled),
    )


def _stamp(root: Path, file: str) -> list[Any]:
    """Name, size and time of writing stand for the contents, which would have to be read otherwise."""
    # Names of `open_images` are relative to the working directory, which is no part of an identity.
    name = file if root != Path() else os.path.abspath(file)
    try:
        status = (root / file).stat()
    except (OSError, ValueError):  # gone, or a link to nothing: told when it is read
        return [name, -1, -1]
    return [name, status.st_size, status.st_mtime_ns]
