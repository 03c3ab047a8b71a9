"""Where images come from: the items of a source, arrays in memory, any object with `__len__` and `__getitem__`, parts.

Every source gives items by number, always in the same order, and says who it is: `identity` is a hash of all that
determines its items and their order, by which features are keyed. Folders are in `folders.py`, tensorflow-datasets
in `prepared.py`; `open_source` in `opening.py` takes any of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxzs.errors import DataError, ImageError, LabelError

Labels = tuple[int, ...]  # places in label_names: none (unlabelled), one, or several
WHOLE = "all"  # the split of a source that has no splits of its own


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
    """SHA-256 of JSON values: how identities are made."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


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

    images: [N,H,W], [N,H,W,1], [N,H,W,3] or [N,H,W,4] uint8. labels: [N] integers, -1 for none, or [N,C] bool, several
    per image. label_names: C names; by default the numbers. Raises `DataError` (shapes, types), `LabelError` (range).

    >>> source = data.from_arrays(np.zeros((3, 8, 8), np.uint8), np.array([1, 0, -1]), ["cat", "dog"])
    >>> [source[number].labels for number in range(3)]
    [(1,), (0,), ()]
    """
    images = np.asarray(images)
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or len(images) == 0:
        raise DataError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 [N,H,W] or [N,H,W,3], N > 0"
        )
    number, several = len(images), False
    of_image: list[Labels] = [()] * number
    if labels is not None:
        labels = np.asarray(labels)
        if len(labels) != number or labels.ndim not in (1, 2):
            raise DataError(f"labels have shape {labels.shape} for {number} images")
        several = labels.ndim == 2
        if several and labels.dtype != np.bool_:
            raise DataError(f"labels [N,C] are {labels.dtype}, expected bool")
        if not several and not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"labels [N] are {labels.dtype}, expected integers")
        if several:
            of_image = [tuple(int(c) for c in np.flatnonzero(row)) for row in labels]
        else:
            of_image = [(int(label),) if label >= 0 else () for label in labels]
        classes = labels.shape[1] if several else int(labels.max(initial=-1)) + 1
        label_names = tuple(label_names) or tuple(map(str, range(classes)))
        if classes > len(label_names) or (several and classes != len(label_names)):
            raise LabelError(f"{len(label_names)} label names for {classes} classes")
    content = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    identity = digest("arrays", list(images.shape), content, [list(row) for row in of_image])
    return ArraySource(images, tuple(of_image), tuple(label_names), several, identity)


def open_npz(path: str | Path) -> ArraySource:
    """`from_arrays` of a file with `images`, and optionally `labels` and `label_names` (or `class_names`).

    Raises `DataError` for a file that is damaged, or holds objects, which are not read.

    >>> np.savez("digits.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 1, 1]))
    >>> source = data.open_npz("digits.npz")
    >>> len(source), source.label_names
    (3, ('0', '1'))
    """
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except Exception as error:  # zipfile and zlib have errors of their own
        raise DataError(f"{path} is damaged: {error}") from error
    if "images" not in arrays:
        raise DataError(f"{path} holds {', '.join(arrays) or 'nothing'}; expected an array 'images'")
    names = arrays.get("label_names", arrays.get("class_names", np.array([], str)))
    return from_arrays(arrays["images"], arrays.get("labels"), [str(name) for name in names])


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
            raise ImageError(f"item {index} has no 'image'; its keys are {', '.join(map(str, item))}")
        name = name.decode() if isinstance(name, bytes) else str(name)
        return Item(image, places_of(label), name)


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
    return ObjectSource(items, tuple(label_names), multi_label, digest("object", identity))


def places_of(label: Any) -> Labels:
    if label is None:
        return ()
    places = np.atleast_1d(np.asarray(label))
    if not np.issubdtype(places.dtype, np.integer):
        raise DataError(f"label {label!r} is not a number, nor several")
    return tuple(int(place) for place in places if place >= 0)


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

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.indices[index])]


def select(source: Source, indices: Iterable[int]) -> Subset:
    """The items of these numbers. Raises `DataError` for numbers outside the source.

    >>> source = data.select(data.open_source("photos"), [29, 0])
    >>> len(source), source[0].id
    (2, 'zero/9.png')
    """
    places = np.asarray(list(indices), np.int64)
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
        parts = tfds.core.ReadInstruction.from_spec(re.sub(rf"\b{WHOLE}\b", "whole", split)).to_absolute(sizes)
    except (ValueError, AssertionError, AttributeError, NotImplementedError) as error:
        raise DataError(
            f"cannot read the split {split!r}: {error}. Examples: all[:50%], train[100:200], train+test"
        ) from error
    return select(source, [i for p in parts for i in places[p.splitname][p.from_ : p.to]])
