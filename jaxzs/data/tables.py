"""Tables of labels: CSV of any usual dialect, JSON in four forms. What cannot be read for certain is an error."""

from __future__ import annotations

import ast
import collections
import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxzs.clip.files import known_stranger
from jaxzs.data.names import name_key
from jaxzs.data.sources import WHOLE
from jaxzs.errors import DataError, JaxzsError

# Columns as `name_key` writes them: without capitals, blanks and "_".
_FILE_COLUMNS = ("file", "filename", "filepath", "path", "image", "imagename", "imagepath", "imageid", "img", "id")
_SINGLE_COLUMNS = ("label", "class", "classname", "labelname", "category", "target")
_SEVERAL_COLUMNS = ("labels", "classes", "classnames", "labelnames", "tags", "categories")
_NO_LABEL = ("", "nan", "n/a", "null", "<na>")  # how spreadsheets and data frames write it
_MAX_BYTES = 2**30  # COCO's annotations have 450 MB
_EXAMPLE = (
    'expected {"file": "label"}, {"file": ["label", ...]}, [{"file": ..., "label": ...}, ...] or COCO annotations'
)


class Row(NamedTuple):
    """One image of a table. file: as written there."""

    file: str
    labels: tuple[str, ...]
    split: str


class Table(NamedTuple):
    """Rows of a table of labels, and whether an image may have several."""

    rows: list[Row]
    several: bool


class Reading(NamedTuple):
    """How a table is to be read. label_column: its header; separator: of labels in a cell; None to see for itself."""

    label_column: str | None = None
    separator: str | None = None


def read_table(path: Path, reading: Reading) -> Table:
    """A CSV file with a header (comma, semicolon, tab), or JSON. Raises `DataError` naming the file and the place."""
    text = _text_of(path)
    readers: dict[str, Callable[[str, Reading], Table]] = {".json": _read_json, ".jsonl": _read_json_lines}
    try:
        table = readers.get(path.suffix.lower(), _read_csv)(text, reading)  # .tsv, .txt, or no suffix: as CSV
        for row in table.rows:
            _check_texts(row)
    except JaxzsError as error:
        raise error.within(f"cannot read the table of labels {path}") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"cannot read the table of labels {path}: {error}") from error
    return table


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"the table of labels {path} has {path.stat().st_size:,} bytes, at most {_MAX_BYTES:,} are read"
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the table of labels {path}: {error.strerror or error}") from error
    if content and (stranger := known_stranger(content)) is not None:
        raise DataError(f"the table of labels {path} is {stranger}")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # Excel's "Unicode text"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read the table of labels {path}: it is not UTF-8 text ({error}); save it as such"
        ) from error


def _check_texts(row: Row) -> None:
    """A line break in a name is a quote that was not closed; half a character cannot be written to any file."""
    for text in (row.file, *row.labels):
        if any(sign in text for sign in "\n\r\0"):
            raise DataError(f"{text!r:.100} has a line break in it: is a quote not closed?")
    for label in row.labels:
        if re.search("[\ud800-\udfff]", label):
            raise DataError(f"the label {label!r} of {row.file!r} is not valid text")


# --- CSV ----------------------------------------------------------------------------------------------------------


def _read_csv(text: str, reading: Reading) -> Table:
    """A header, and a line for each image. Records are dicts of cells."""
    dialect: Any = csv.excel
    with contextlib.suppress(csv.Error):  # of one column only
        # Of the header alone: commas in the texts below would mislead it.
        dialect = csv.Sniffer().sniff(text.lstrip().split("\n", 1)[0], ",;\t|")
    # strict: text behind a closing quote, and a quote that is never closed, are errors and not guessed at.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=dialect.delimiter, skipinitialspace=True, strict=True)
    header = [cell.strip() for cell in next(filter(any, lines), [])]
    while header and not header[-1]:  # a separator at the end of the line
        header.pop()
    records = []
    for cells in filter(any, lines):
        if any(cell.strip() for cell in cells[len(header) :]):
            raise DataError(
                f"line {lines.line_num} has {len(cells)} cells for {len(header)} columns; write a cell that holds "
                f"{dialect.delimiter!r} in quotes"
            )
        # A shorter line lacks its last cells, as spreadsheets write empty ones.
        records.append(dict(zip(header, cells, strict=False)))
    return _of_records(header, records, reading)


def _of_records(header: Sequence[str], records: Sequence[Mapping[str, Any]], reading: Reading) -> Table:
    """Rows of records under a header: cells of a CSV file, or values of JSON objects."""
    columns = _columns(header, reading.label_column)
    if columns is None:
        return _one_hot(header, records)
    splits = [str(record.get(columns.split) or "").strip() or WHOLE for record in records]
    files = [str(record.get(columns.file) or "").strip() for record in records]
    cells = [record.get(columns.label) for record in records]
    several = columns.several or any(_as_list(cell) is not None for cell in cells)
    lists = _label_lists(cells, several, reading.separator)
    return Table([Row(*parts) for parts in zip(files, lists, splits, strict=True)], several)


class _Columns(NamedTuple):
    file: str
    label: str
    split: str
    several: bool


def _columns(header: Sequence[str], label_column: str | None) -> _Columns | None:
    """Which columns are which; None where every other column may be a class of its own (0 or 1)."""
    keys = [name_key(name) for name in header]
    # Before they become a dict, in which one would vanish.
    if twice := sorted({name for name, key in zip(header, keys, strict=True) if keys.count(key) > 1}):
        raise DataError(f"columns occur twice: {', '.join(twice)}")
    by_key = dict(zip(keys, header, strict=True))
    file = next((by_key[key] for key in _FILE_COLUMNS if key in by_key), None)
    split = by_key.get("split", "")
    others = [name for name in header if name not in (file, split)]
    wanted = (name_key(label_column),) if label_column is not None else (*_SINGLE_COLUMNS, *_SEVERAL_COLUMNS)
    label = next((by_key[key] for key in wanted if key in by_key and by_key[key] != file), None)
    if file is not None and label is None and label_column is None and len(others) == 1:
        label = others[0]  # of two columns the other one, whatever it is called
    if file is not None and label is None and label_column is None and len(others) > 1:
        return None
    if file is None or label is None:
        raise _no_columns(header, label_column)
    return _Columns(file, label, split, name_key(label) in _SEVERAL_COLUMNS)


def _no_columns(header: Sequence[str], label_column: str | None = None) -> DataError:
    return DataError(
        f"found the columns {', '.join(header) or '(none)'} in the first line; expected a header with a column of "
        f"files (such as file, path, image or id) and one of labels ({label_column or 'label, class, labels, tags'})",
        python="label_column names another",
        command="--label-column names another",
    )


def _one_hot(header: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Table:
    """A column of 0 and 1 for each class. Any other content is a table without a column of labels."""
    keys = {name_key(name): name for name in header}
    file = next(keys[key] for key in _FILE_COLUMNS if key in keys)
    classes = [name for name in header if name != file and name_key(name) != "split"]
    split = keys.get("split", "")
    values = {"0": False, "1": True, "0.0": False, "1.0": True, "": False}
    rows = []
    for record in records:
        cells = [str(record.get(name, "")).strip() for name in classes]
        if any(cell not in values for cell in cells):
            raise _no_columns(header)
        labels = tuple(name for name, cell in zip(classes, cells, strict=True) if values[cell])
        rows.append(Row(str(record.get(file, "")).strip(), labels, str(record.get(split) or "").strip() or WHOLE))
    return Table(rows, any(len(row.labels) != 1 for row in rows))


# --- cells ----------------------------------------------------------------------------------------------------------


def _label_lists(cells: Sequence[Any], several: bool, separator: str | None) -> list[tuple[str, ...]]:
    """Labels of each cell. Several are a list, or separated by the first of ; | , that the column has, never by blanks.

    separator: to split by instead.
    """
    listed = [_as_list(cell) for cell in cells]
    if separator is None and several:
        texts = [cell for cell, labels in zip(cells, listed, strict=True) if labels is None and isinstance(cell, str)]
        # One for the whole column: a cell with a single label shows none.
        separator = next((sign for sign in ";|," if any(sign in text for text in texts)), None)
    lists = []
    for cell, labels in zip(cells, listed, strict=True):
        if labels is None:
            labels = str(cell).split(separator) if separator is not None else [cell]
        lists.append(tuple(filter(None, map(_label, labels))))
    return _without_zeros(lists)


def _as_list(cell: Any) -> list[Any] | None:
    """A list, as JSON or as Python writes one; None for anything else."""
    if isinstance(cell, list):
        return cell
    if not isinstance(cell, str) or not (cell.strip()[:1] == "[" and cell.strip()[-1:] == "]"):
        return None
    # Python writes single quotes, which JSON refuses; literal_eval runs no code.
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = read(cell.strip())
            return value if isinstance(value, list) else None
    return None


def _label(value: Any) -> str:
    """A label as text, "" for none."""
    if value is None or (isinstance(value, float) and value != value):  # NaN
        return ""
    # True is an int of Python, and no label.
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"{value!r:.100} is not a label: a text or a whole number is")
    text = str(value).strip()
    # "NA" in capitals only: "na" could be a name.
    return "" if text == "NA" or text.casefold() in _NO_LABEL else text


def _without_zeros(lists: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Where all labels are whole numbers with ".0" behind, which data frames write beside empty cells: without it."""
    if not any(lists) or not all(re.fullmatch(r"-?[0-9]+\.0", label) for labels in lists for label in labels):
        return lists
    return [tuple(label.removesuffix(".0") for label in labels) for labels in lists]


# --- JSON -----------------------------------------------------------------------------------------------------------


def read_json_text(text: str) -> Any:
    """What `json.loads` gives, but a key that is there twice is a `DataError`: the last one would win silently."""
    return json.loads(text, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise DataError(f"{twice!r} is there twice in one JSON object")
    return values


def _read_json(text: str, reading: Reading) -> Table:
    values = read_json_text(text)
    if isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
        return _of_objects(values, reading)
    if not isinstance(values, dict) or not values:
        raise DataError(_EXAMPLE)
    # Before "file: labels", for which COCO's three lists would pass.
    if all(isinstance(values.get(key), list) for key in ("images", "annotations", "categories")):
        return _of_coco(values)
    if not all(value is None or isinstance(value, (str, int, list)) for value in values.values()):
        file = next(file for file, value in values.items() if not isinstance(value, (str, int, list)))
        raise DataError(f"the labels of {file!r} are not texts: {values[file]!r:.100}; {_EXAMPLE}")
    lists = [value if isinstance(value, list) else [value] for value in values.values()]
    labels = [tuple(filter(None, map(_label, listed))) for listed in lists]
    rows = [Row(file, of_file, WHOLE) for file, of_file in zip(values, labels, strict=True)]
    return Table(rows, any(isinstance(value, list) for value in values.values()))


def _read_json_lines(text: str, reading: Reading) -> Table:
    values = [read_json_text(line) for line in text.splitlines() if line.strip()]
    if not values or not all(isinstance(value, dict) for value in values):
        raise DataError('expected one JSON object a line, {"file": ..., "label": ...}')
    return _of_objects(values, reading)


def _of_objects(objects: Sequence[Mapping[str, Any]], reading: Reading) -> Table:
    header = list(dict.fromkeys(key for one in objects for key in one))
    return _of_records(header, objects, reading)


def _of_coco(values: Mapping[str, Any]) -> Table:
    """Annotations as COCO keeps them: an image has the categories of the objects in it."""
    try:
        names = {category["id"]: category["name"] for category in values["categories"]}
        files = {image["id"]: image["file_name"] for image in values["images"]}
        # An ordered set of names: an image has a category once, however many objects of it.
        of_image: dict[Any, dict[str, None]] = {number: {} for number in files}
        for annotation in values["annotations"]:
            of_image[annotation["image_id"]][names[annotation["category_id"]]] = None
    except (KeyError, TypeError) as error:
        raise DataError(f"these COCO annotations name something that is not there: {error}") from error
    _check_coco(values, names, files)
    return Table(
        [Row(files[number], tuple(map(str.strip, labels)), WHOLE) for number, labels in of_image.items()], True
    )


def _check_coco(values: Mapping[str, Any], names: Mapping[Any, Any], files: Mapping[Any, Any]) -> None:
    for kind, listed, read in (("categories", values["categories"], names), ("images", values["images"], files)):
        # Of two equal ids a dict has kept one.
        if len(read) < len(listed) or len(set(read.values())) < len(read):
            raise DataError(f"two {kind} of these COCO annotations have one id or one name")
        if not all(isinstance(text, str) and text.strip() for text in read.values()):
            raise DataError(f"the names of {kind} in these COCO annotations are not all texts")
