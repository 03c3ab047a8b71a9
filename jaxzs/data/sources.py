"""Where images come from: the items of a source, arrays in memory, any object with `__len__` and `__getitem__`, parts.

Every source gives items by number, always in the same order, and says who it is: `identity` is a hash of all that
determines its items and their order, by which features are keyed. Folders are in `folders.py`, tensorflow-datasets
in `prepared.py`; `open_source` in `opening.py` takes any of them.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
import types
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxzs.errors import DataError, ImageError, JaxzsError, LabelError

if TYPE_CHECKING:
    from jaxzs.data.finding import PassedOver

Labels = tuple[int, ...]  # places in label_names: none (unlabelled), one, or several
WHOLE = "all"  # the split of a source that has no splits of its own
MAX_CLASSES = 2**20
_CHANNELS = ((), (1,), (3,), (4,))  # what may follow [N,H,W]: grey, grey, RGB, RGBA


class Item(NamedTuple):
    """One image: anything `model.preprocess` takes, the places of its labels, and its name.

    >>> item = data.open_source("photos")[0]
    >>> item.image.size, item.labels, item.id
    ((8, 8), (0,), 'one/0.png')
    """

    image: Any
    labels: Labels
    id: str


@runtime_checkable
class Source(Protocol):
    """Images by number. `label_names` are the data's own, to be attached with `DatasetInfo.names_for`.

    >>> isinstance(data.open_source("photos"), data.Source)
    True
    """

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def multi_label(self) -> bool: ...

    @property
    def identity(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Raises `ImageError`, naming the item, when it cannot be read."""
        ...


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values: how identities are made. Names of files may be bytes that are no text (surrogates)."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


# --- arrays and user objects ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Images that are in memory (or memory-mapped): [N,H,W], [N,H,W,1] or [N,H,W,3] uint8."""

    images: np.ndarray
    labels: tuple[Labels, ...]
    label_names: tuple[str, ...]
    multi_label: bool
    identity: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return Item(self.images[index], self.labels[index], str(index))


def from_arrays(images: np.ndarray, labels: np.ndarray | None = None, label_names: Sequence[str] = ()) -> ArraySource:
    """A source of images in memory.

    images: [N,H,W], [N,H,W,1], [N,H,W,3] or [N,H,W,4] uint8. labels: [N] integers below 2^20, negative for none, or
    [N,C] bool, several per image. label_names: C names; by default the numbers. Raises `DataError` (shapes, types),
    `LabelError` (range, names that are no texts or occur twice).

    >>> source = data.from_arrays(np.zeros((3, 8, 8), np.uint8), np.array([1, 0, -1]), ["cat", "dog"])
    >>> [source[number].labels for number in range(3)]
    [(1,), (0,), ()]
    """
    images = np.asarray(images)
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or images.size == 0 or images.shape[3:] not in _CHANNELS:
        scaled = "; np.uint8(np.round(255 * images)) of values from 0 to 1" if images.dtype.kind == "f" else ""
        raise DataError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 [N,H,W] or [N,H,W,3], none empty"
            + scaled
        )
    if images.ndim == 3 and images.shape[2] in (3, 4):  # one photo, whose rows would become grey images
        raise DataError(
            f"images have shape {images.shape}: one image of colours is [1,H,W,3], grey ones so narrow are [N,H,W,1]"
        )
    names = _names(label_names)
    of_image, several = _places(labels, len(images))
    if labels is not None:
        classes = (
            np.shape(labels)[1] if several else max((place for places in of_image for place in places), default=-1) + 1
        )
        names = names or tuple(map(str, range(classes)))
        if classes > len(names) or (several and classes != len(names)):
            raise LabelError(f"{len(names)} label names for {classes} classes")
    # All pixels: an array has no name and no time of writing that could stand for them.
    content = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    identity = digest("arrays", list(images.shape), content, [list(row) for row in of_image])
    return ArraySource(images, tuple(of_image), names, several, identity)


def _places(labels: np.ndarray | None, number: int) -> tuple[list[Labels], bool]:
    """The places of each image's labels, and whether it may have several."""
    if labels is None:
        return [()] * number, False
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or len(labels) != number:
        raise DataError(f"labels have shape {labels.shape} for {number} images")
    if labels.ndim == 2:
        # Integers [N,C] could as well be counts, or numbers of classes padded to one length.
        if labels.dtype != np.bool_:
            raise DataError(f"labels [N,C] are {labels.dtype}, expected bool")
        return [tuple(int(c) for c in np.flatnonzero(row)) for row in labels], True
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels [N] are {labels.dtype}, expected integers")
    # A column of ids or times taken for labels: every number below the largest would become a class.
    if (largest := int(labels.max())) >= MAX_CLASSES:
        raise LabelError(f"label {largest} is too large: labels are places in a list of classes, below {MAX_CLASSES:,}")
    return [(int(label),) if label >= 0 else () for label in labels], False


def _names(label_names: Any) -> tuple[str, ...]:
    """Label names as texts, from a sequence or an array of one dimension. Raises `LabelError`."""
    if isinstance(label_names, str) or np.ndim(label_names) != 1:
        raise LabelError(f"label names are {label_names!r:.100}, expected a list of texts")
    names = []
    for name in label_names:
        name = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
        if not isinstance(name, (str, int, np.integer)) or not str(name).strip():
            raise LabelError(f"label name {name!r:.100} is not a text")
        names.append(str(name))
    if len(set(names)) < len(names):
        [(twice, _)] = collections.Counter(names).most_common(1)
        raise LabelError(f"the label name {twice!r} occurs more than once")
    return tuple(names)


def open_npz(path: str | Path) -> ArraySource:
    """`from_arrays` of a file with `images`, and optionally `labels` and `label_names` (or `class_names`).

    Raises `DataError` for a file that is damaged, holds objects, which are not read, or unpacks to more than half of
    the memory.

    >>> np.savez("digits.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 1]))
    >>> source = data.open_npz("digits.npz")
    >>> len(source), source.label_names
    (3, ('0', '1'))
    """
    path = Path(path).expanduser()
    try:
        with zipfile.ZipFile(path) as packed:
            _check_unpacked(packed)
        with np.load(path, allow_pickle=False) as file:  # a pickle runs code
            found = list(file.files)
            arrays = {key: file[key] for key in ("images", "labels", "label_names", "class_names") if key in found}
        if "images" not in arrays:
            raise DataError(f"it holds {', '.join(found) or 'nothing'}; expected an array 'images'")
        names = arrays.get("label_names", arrays.get("class_names", np.array([], str)))
        return from_arrays(arrays["images"], arrays.get("labels"), names)
    except JaxzsError as error:
        raise error.within(str(path)) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and NumPy have errors of their own
        raise DataError(f"{path} is damaged, or no .npz file: {error}") from error


def _check_unpacked(packed: zipfile.ZipFile) -> None:
    """Raise `DataError` before the memory is filled: zeros are compressed a thousandfold."""
    size = sum(entry.file_size for entry in packed.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory // 2:
        raise DataError(f"it unpacks to {size / 2**30:,.1f} GiB, more than half of the memory; split it into several")


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectSource:
    """Any object with `__len__` and `__getitem__` that gives images, (image, label) pairs, or dicts."""

    items: Any
    label_names: tuple[str, ...]
    multi_label: bool
    identity: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        try:
            item = self.items[index]
        except Exception as error:  # the object is the user's
            raise ImageError(f"item {index} cannot be read: {type(error).__name__}: {error}") from error
        if isinstance(item, Item):
            return item
        if isinstance(item, Mapping):
            image, label, name = item.get("image"), item.get("label"), item.get("id", index)
        elif isinstance(item, tuple) and len(item) == 2:
            image, label, name = *item, index
        else:
            image, label, name = item, None, index
        if image is None:
            keys = f"its keys are {', '.join(map(str, item))}" if isinstance(item, Mapping) else "it is None"
            raise ImageError(f"item {index} has no 'image'; {keys}")
        name = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name)
        labels = places_of(label)
        if self.label_names and max(labels, default=0) >= len(self.label_names):  # without names any number will do
            raise LabelError(
                f"item {index} has the label {max(labels)}, but there are {len(self.label_names)} label names"
            )
        return Item(image, labels, name)


def from_object(
    items: Any, *, identity: str, label_names: Sequence[str] = (), multi_label: bool = False
) -> ObjectSource:
    """A source from anything with `__len__` and `__getitem__`, e.g. a torch Dataset or a list of PIL images.

    items[i]: an image (PIL or uint8 array), (image, label), or {"image": ..., "label": ..., "id": ...}; a label is a
    number, several numbers, or None. identity: a text that changes whenever the items or their order do; features
    are keyed by it. Raises `DataError` for an object without these methods.

    >>> pairs = [(np.zeros((8, 8, 3), np.uint8), 1), (np.ones((9, 9, 3), np.uint8), 0)]
    >>> source = data.from_object(pairs, identity="two squares", label_names=["white", "black"])
    >>> len(source), source[0].labels
    (2, (1,))
    """
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise DataError(f"a source needs __len__ and __getitem__; {type(items).__name__} lacks them")
    return ObjectSource(items, _names(label_names), multi_label, digest("object", identity))


def places_of(label: Any) -> Labels:
    if label is None:
        return ()
    try:
        places = np.atleast_1d(np.asarray(label))
    except ValueError as error:  # of lists in lists
        raise DataError(f"label {label!r:.100} is not a number, nor several") from error
    if places.size and (places.ndim != 1 or not np.issubdtype(places.dtype, np.integer)):
        raise DataError(f"label {label!r:.100} is not a number, nor several")
    return tuple(int(place) for place in places if place >= 0)  # -1: no label


# --- parts of a source ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some items of a source, in the order of `indices`."""

    source: Source
    indices: np.ndarray
    identity: str

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.source.label_names

    @property
    def multi_label(self) -> bool:
        return self.source.multi_label

    @property
    def passed_over(self) -> PassedOver | None:
        return getattr(self.source, "passed_over", None)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.indices[index])]


def select(source: Source, indices: Iterable[int]) -> Subset:
    """The items of these numbers. Raises `DataError` for numbers outside the source, and for a mask.

    >>> source = data.select(data.open_source("photos"), [29, 0])
    >>> len(source), source[0].id
    (2, 'zero/9.png')
    """
    places = np.asarray(list(indices))  # an empty list is float64
    if places.size and (places.ndim != 1 or not np.issubdtype(places.dtype, np.integer)):
        raise DataError(
            f"numbers of items are {places.dtype} of shape {places.shape}, expected integers "
            "(numpy.flatnonzero gives those of a mask)"
        )
    places = places.astype(np.int64)
    if places.size and not 0 <= places.min() <= places.max() < len(source):
        raise DataError(f"numbers {places.min()} to {places.max()} of a source of {len(source)} items")
    return Subset(source, places, digest("subset", source.identity, places.tolist()))


def take_split(source: Source, split: str) -> Subset:
    """A part of a source in the syntax of tensorflow-datasets: "train", "test[:50%]", "train[10:20]+test".

    Sources without splits of their own (class/image folders, arrays) have one, "all". Percentages are rounded to the
    closest item. Raises `DataError` for another split or a slice that cannot be read.

    >>> source = data.open_source("photos")
    >>> len(data.take_split(source, "all[:20%]")), len(data.take_split(source, "all[5:10]"))
    (6, 5)
    """
    import tensorflow_datasets as tfds

    splits = getattr(source, "splits", None) or {WHOLE: range(len(source))}
    names = set(re.findall(r"([^\[\]+]+)(?:\[[^\]]*\])?", split))
    if unknown := sorted({name.strip() for name in names} - set(splits)):
        raise DataError(f"no split {', '.join(unknown)} here, only: {', '.join(sorted(splits))}")
    # tensorflow-datasets reserves "all", and does not slice it.
    inner = {name: "whole" if name == WHOLE else name for name in splits}
    places = {inner[name]: of_split for name, of_split in splits.items()}
    sizes = {name: types.SimpleNamespace(num_examples=len(places[name])) for name in places}
    try:
        # Its parser and its rounding; of our splits it asks for nothing but their sizes.
        parts = tfds.core.ReadInstruction.from_spec(re.sub(rf"\b{WHOLE}\b", "whole", split)).to_absolute(sizes)
    except (ValueError, AssertionError, AttributeError, NotImplementedError) as error:
        raise DataError(
            f"cannot read the split {split!r}: {error}. Examples: all[:50%], train[100:200], train+test"
        ) from error
    return select(source, [i for p in parts for i in places[p.splitname][p.from_ : p.to]])
