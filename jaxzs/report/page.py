"""The results page: one HTML file that shows what a run said of every image, to be opened anywhere, without a network.

It is made of the record of the run, and of the images that the record names. Names of files and classes come from
strangers: Jinja escapes them in the page, JSON in the script, and the script writes them as text only. The page's own
content policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import collections
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxzs.errors import JaxzsError, RecordError
from jaxzs.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES = 48 * 2**20  # of all pictures; then the page says how many images have none
_FEW = 12  # images that are looked at one by one: they come first, and larger
# For at most so many images: longer side of a thumbnail in pixels.
_SIDES = ((_FEW, 448), (1_500, 192), (5_000, 128), (10**9, 96))
_PIXELATED = 64  # images up to this side are kept as they are
_MOST_CLASSES = 40  # of a confusion matrix; of more the pairs that are confused most are listed
_MOST_PAIRS = 30  # of classes, those that are confused most
_MOST_MAPS = 4  # heat maps of one image
_THREADS = 4  # that decode pictures
_FIGURE = ("data", "method", "figure", "value", "passes", "protocol")  # of `report.Figure`
# Controls, line separators, marks of writing direction, and bytes that are no text.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Of a heat map: yellow to red, as opaque as the score is high.
_COLD, _HOT = np.array([255, 214, 70], np.float32), np.array([214, 40, 40], np.float32)

Maps = Mapping[str, Sequence[tuple[str, np.ndarray]]]  # path -> (label, [rows,columns] from 0 to 1)


class Written(NamedTuple):
    """What a page holds. pictures: images with a thumbnail, of all images."""

    path: Path
    bytes: int
    images: int
    pictures: int


class _Item(NamedTuple):
    """One image of a record. labels: (number of the class, score or None), best first; truth: -1 where not known.

    answers: how many of the labels are the answer: one of a classification, all tags.
    """

    path: str
    labels: list[tuple[int, float | None]]
    answers: int
    truth: int
    mask: str


def write_page(
    path: str | Path, record: Mapping[str, Any], *, maps: Maps | None = None, plots: Sequence[tuple[str, Path]] = ()
) -> Written:
    """One self-contained HTML file of a run: counts, right and wrong, confusions, all images, settings.

    Args:
      path: of the page, written atomically.
      record: what a command writes (`jaxzs classify --out run.json`), with the `results` of its images; an image that
        is no longer where it was has no thumbnail. A record without images shows its figures and settings.
      maps: heat maps of tags for each path, shown when an image is pointed at.
      plots: titles and PNG files of plots, which are put into the page.

    Returns:
      `Written`. Pictures take at most 48 MiB: smaller ones for more images, and none for the last where that is not
      enough, which the page says.

    Raises:
      RecordError: results of another form.
      DataError: the file cannot be written.

    >>> record = {"command": "jaxzs classify photos", "class_names": ["one", "two"], "results": [
    ...     {"path": "photos/one/0.png", "label": "one", "top": [{"label": "one", "score": 0.9}], "truth": "one"}]}
    >>> page = report.write_page("page.html", record)
    >>> page.images, page.pictures, "Content-Security-Policy" in page.path.read_text()
    (1, 1, True)
    """
    classes, items = _items(record)
    pictures = _pictures(items, maps or {})
    figures = [
        {key: _clean("" if figure.get(key) is None else figure[key]) for key in _FIGURE}
        for figure in record.get("figures") or ()
    ]
    text = _template().render(
        title=_clean(f"{_command_of(record)} · {(record.get('data') or {}).get('name') or 'results'}"),
        facts=_facts(record, classes, items),
        table=_class_table(classes, items),
        confusion=_confusion(classes, items),
        figures=figures,
        counted=any(figure["passes"] != "" for figure in figures),
        plots=[(_clean(title), _of_file(file)) for title, file in plots],
        sections=_sections(record),
        missing=sum(not one["i"] for one in pictures),  # gone since the run, or beyond the room
        measure=_measure(items),
        payload={"classes": list(map(_clean, classes)), "colours": _colours(items), "items": pictures},
        known=any(item.truth >= 0 for item in items),
        few=len(items) <= _FEW,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Written(Path(path), len(text.encode()), len(items), sum(bool(one["i"]) for one in pictures))


def _template() -> Any:
    """The page, with its style and script put in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxzs.report", "page_files"),
        autoescape=True,  # names come from strangers
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, not an empty place
    )
    return environment.get_template("page.html")


def _clean(value: Any) -> str:
    """Text whose controls, bytes that are no text, and marks of writing direction are shown, not obeyed."""

    def shown(match: re.Match[str]) -> str:
        number = ord(match[0])
        # A byte of a file name that is no UTF-8 stands as a lone surrogate from U+DC80.
        return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"

    return _UNSHOWN.sub(shown, str(value))


# --- what the record says -----------------------------------------------------------------------------------------


def _items(record: Mapping[str, Any]) -> tuple[list[str], list[_Item]]:
    """Class names, and the images: those that are wrong, then those that are least certain, first."""
    numbers: dict[str, int] = {}

    def number(name: Any) -> int:
        return numbers.setdefault(str(name), len(numbers))

    # The record's classes keep their numbers; labels that it does not list get the next ones.
    for name in record.get("class_names") or ():
        number(name)
    try:
        items = [_item(row, number) for row in record.get("results") or ()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"the results of this record are not those of a command of jaxzs: {error!r}") from error
    items.sort(key=lambda item: (not _wrong(item), _score(item), item.path))
    return list(numbers), items


def _item(row: Mapping[str, Any], number: Any) -> _Item:
    covered = row.get("covered") or {}
    found = row["top"] if "top" in row else row["tags"]  # a classification, or tags
    labels: list[tuple[int, float | None]] = [
        (number(one["label"]), float(one["score"])) if isinstance(one, Mapping) else (number(one), covered.get(one))
        for one in found
    ]
    if covered:  # of a mask: the largest part first
        labels.sort(key=lambda label: -(label[1] or 0))
    truth = row.get("truth")
    answers = 1 if "top" in row else len(labels)
    return _Item(str(row["path"]), labels, answers, -1 if truth is None else number(truth), str(row.get("mask") or ""))


def _wrong(item: _Item) -> bool:
    return item.truth >= 0 and (not item.labels or item.labels[0][0] != item.truth)


def _score(item: _Item) -> float:
    return float(item.labels[0][1] or 0) if item.labels else 0.0


def _command_of(record: Mapping[str, Any]) -> str:
    words = str(record.get("command", "")).split()
    return words[1] if len(words) > 1 and words[0] == "jaxzs" else "results"


def _facts(record: Mapping[str, Any], classes: Sequence[str], items: Sequence[_Item]) -> list[tuple[str, str]]:
    """Numbers at the top of the page, with their names."""
    facts = [("image" if len(items) == 1 else "images", f"{len(items):,}")] if items else []
    if classes:
        facts.append(("class" if len(classes) == 1 else "classes", f"{len(classes):,}"))
    known = [item for item in items if item.truth >= 0]
    if known:
        right = sum(not _wrong(item) for item in known)
        facts.append((f"right, of {len(known):,}", f"{100 * right / len(known):.2f} %"))
    if items and any(item.labels and item.labels[0][1] is not None for item in items):
        facts.append((f"mean {_measure(items)}", f"{sum(map(_score, items)) / len(items):.3f}"))
    if unreadable := record.get("unreadable"):
        facts.append(("could not be used", f"{len(unreadable):,}"))
    return facts


def _measure(items: Sequence[_Item]) -> str:
    """What the number beside a label is: with masks the part of the image."""
    return "part covered" if any(item.mask for item in items) else "score"


def _class_table(classes: Sequence[str], items: Sequence[_Item]) -> dict[str, Any]:
    """A row for each class that occurs: images given to it, images of it, how many of either are right."""
    given = collections.Counter(c for item in items for c, _ in item.labels[: item.answers])
    true = collections.Counter(item.truth for item in items if item.truth >= 0)
    right = collections.Counter(item.truth for item in items if item.truth >= 0 and not _wrong(item))
    # Precision is of images whose true class is known; the others are neither right nor wrong.
    of_known = collections.Counter(item.labels[0][0] for item in items if item.truth >= 0 and item.labels)
    most = max(given.values(), default=1)
    rows = [
        {
            "number": c,
            "name": _clean(classes[c]),
            "given": given[c],
            "share": round(100 * given[c] / most, 1),  # of the longest bar
            "true": true[c],
            "recall": f"{100 * right[c] / true[c]:.1f}" if true[c] else "",
            "precision": f"{100 * right[c] / of_known[c]:.1f}" if of_known[c] else "",
        }
        for c in sorted(given.keys() | true.keys(), key=lambda c: (-given[c], c))
    ]
    known = true.total()
    return {"rows": rows, "absent": len(classes) - len(rows), "known": known, "unknown": len(items) - known}


def _confusion(classes: Sequence[str], items: Sequence[_Item]) -> dict[str, Any] | None:
    """Images of each class by the class they were given: a matrix, or the pairs that are confused most."""
    pairs = collections.Counter((item.truth, item.labels[0][0]) for item in items if item.truth >= 0 and item.labels)
    if not pairs:
        return None
    present = sorted({c for pair in pairs for c in pair})
    wrong = [(pair, n) for pair, n in pairs.most_common() if pair[0] != pair[1]]
    listed = [(_clean(classes[t]), _clean(classes[p]), n, t, p) for (t, p), n in wrong[:_MOST_PAIRS]]
    if len(present) > _MOST_CLASSES:  # a matrix that nobody could read
        return {"names": [], "rows": [], "pairs": listed}
    # A class that was only predicted has a row, too, of zeros.
    totals = {t: sum(pairs[t, p] for p in present) for t in present}
    rows = [
        (t, _clean(classes[t]), [(p, pairs[t, p], round(100 * pairs[t, p] / max(1, totals[t]))) for p in present])
        for t in present
    ]
    return {"names": [(p, _clean(classes[p])) for p in present], "rows": rows, "pairs": listed}


def _sections(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables at the end: how the run was made, and what was left out."""
    how = {key: record.get(key) for key in ("command", "date", "device", "backend", "num_devices", "git_revision")}
    how |= {f"model {key}": value for key, value in (record.get("model") or {}).items()}
    how |= {f"data {key}": value for key, value in (record.get("data") or {}).items()}
    left_out = {f"{n + 1}": reason for n, reason in enumerate(record.get("unreadable") or ())}
    left_out |= {f"passed over: {key}": value for key, value in (record.get("passed_over") or {}).items()}
    sections = {
        "Run": how,
        "Settings": record.get("settings") or {},
        "Versions and seconds": {**(record.get("versions") or {}), **(record.get("seconds") or {})},
        "Notices": {f"{n + 1}": text for n, text in enumerate(record.get("notices") or ())},
        "Left out": left_out,
    }
    rows = {
        title: [(_clean(key), _clean(_listed(value))) for key, value in values.items() if value not in (None, "", [])]
        for title, values in sections.items()
    }
    return [(title, listed) for title, listed in rows.items() if listed]


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(items: Sequence[_Item], maps: Maps) -> list[dict[str, Any]]:
    """What the script is given of each image, with pictures as long as there is room."""
    side = next(side for most, side in _SIDES if len(items) <= most)  # smaller pictures of more images
    found: list[dict[str, Any]] = []
    room = MOST_BYTES
    # Left as soon as the room is used up: only a block ahead has been decoded for nothing.
    for item, (picture, layers) in zip(items, _in_threads(items, maps, side), strict=False):
        size = len(picture) + sum(len(layer) for _, layer in layers)
        room -= size
        shown = room > 0
        found.append(_entry(item, picture if shown else "", layers if shown else []))
        if not shown:
            break
    return found + [_entry(item, "", []) for item in items[len(found) :]]


def _in_threads(items: Sequence[_Item], maps: Maps, side: int) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Thumbnails in order, a few read ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        # Block by block: `map` over everything would decode all images at once, whoever waits for them.
        for start in range(0, len(items), 8 * _THREADS):
            block = items[start : start + 8 * _THREADS]
            yield from pool.map(lambda item: _picture(item, maps.get(item.path, ()), side), block)


def _entry(item: _Item, picture: str, layers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Short keys: there is one of these for each of ten thousand images."""
    labels = [[c, None if score is None else round(score, 4)] for c, score in item.labels]
    return {"p": _clean(item.path), "l": labels, "a": item.answers, "t": item.truth, "i": picture, "o": list(layers)}


def _picture(item: _Item, maps: Sequence[tuple[str, np.ndarray]], side: int) -> tuple[str, list[tuple[str, str]]]:
    """Thumbnail and layers of an image, nothing where it cannot be read any more."""
    from PIL import Image

    from jaxzs.clip.preprocess import to_rgb
    from jaxzs.data import open_image

    try:
        image = to_rgb(open_image(item.path))
    except JaxzsError:
        return "", []
    small = max(image.size) <= _PIXELATED  # JPEG would blur digits and icons, and save nothing
    image.thumbnail((side, side))  # never enlarges
    picture = _encoded(image, "PNG") if small else _encoded(image, "JPEG", quality=75, optimize=True)
    layers = [(_clean(label), _encoded(_heat(scores), "PNG")) for label, scores in maps[:_MOST_MAPS]]
    if item.mask:
        try:
            # Labels are numbers of classes: nothing lies between two of them.
            mask = open_image(item.mask).resize(image.size, Image.Resampling.NEAREST)
        except JaxzsError:
            return picture, layers
        layers.append(("mask", _encoded(_coloured(mask), "PNG")))
    return picture, layers


def _of_file(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _heat(scores: np.ndarray) -> Image.Image:
    """A map [rows,columns] as a small transparent picture, which the browser enlarges smoothly."""
    from PIL import Image

    low, high = float(scores.min()), float(scores.max())
    # A flat map has no range to divide by, and stays transparent.
    level = ((scores - low) / (high - low) if high > low else np.zeros_like(scores)).astype(np.float32)[..., None]
    colours = _COLD + (_HOT - _COLD) * level  # [rows,columns,3]
    # [rows,columns,4]: the score is the opacity, too, so that a photo is seen where the tag is not.
    return Image.fromarray(np.concatenate([colours, 175 * level], axis=-1).astype(np.uint8), "RGBA")


def _coloured(mask: Image.Image) -> Image.Image:
    """A palette mask with a background (label 0) that can be seen through."""
    from PIL import Image

    labels = np.asarray(mask if mask.mode in ("P", "L") else mask.convert("L"))
    coloured = np.array(mask.convert("RGBA"))
    coloured[..., 3] = np.where(labels == 0, 0, 190)  # [rows,columns]
    return Image.fromarray(coloured, "RGBA")


def _colours(items: Sequence[_Item]) -> list[str]:
    """The colour of each class in the masks, by its number."""
    from jaxzs.data import open_image

    for item in items:
        try:
            palette = open_image(item.mask).getpalette() if item.mask else None
        except JaxzsError:
            continue
        if palette is not None:  # label 0 is the background
            return ["#{:02x}{:02x}{:02x}".format(*palette[i : i + 3]) for i in range(3, len(palette) - 2, 3)]
    return []


def _encoded(image: Image.Image, format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return f"data:image/{format.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
