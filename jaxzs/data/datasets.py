"""Class names and prompt templates of public data sets, as JSON in the package, each from a named public file.

A list is attached to data by the data's own label names (folder names, `ClassLabel` names, synsets) and never by
index: two sources of one data set often number its classes differently, and a shifted list costs
accuracy without any error.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxzs.data.names import name_key
from jaxzs.data.tables import read_json_text
from jaxzs.errors import DataError, LabelError
from jaxzs.files import from_json

_PLACEHOLDER = "{}"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set beside its images.

    name: as `dataset_info` takes it. title: as people write it.
    class_names: C names as they go into templates (ImageNet's contain "missile" and "sunglasses" twice, as published).
    labels: C label names as the data has them: synsets, folder names; equal to class_names where those are the same.
    templates: M texts with one "{}" each.
    multi_label: whether an image has several classes.
    background_names: names that compete with the classes in patch classification (TagCLIP).
    more_names: class name -> further names of the same class, for masks without tags (SCLIP).
    label_ids: the numbers that official label files use for the C classes, where they are not 0 to C-1.
    groups: fine label numbers of each class, where classes are groups (COCO-Stuff 27).
    aliases: other spellings of labels -> label.
    variants: other published names of some classes: {"clip_es": {"bird": "bird avian", ...}}.
    source: for each list the repository (or package), path and commit (or version) it was taken from.

    >>> info = data.dataset_info("voc2012")
    >>> info.title, info.num_classes, info.multi_label, info.class_names[:3]
    ('PASCAL VOC 2012', 20, True, ('aeroplane', 'bicycle', 'bird'))
    >>> info.renamed("clip_es").class_names[2]
    'bird avian'
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    multi_label: bool = False
    background_names: tuple[str, ...] = ()
    more_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    label_ids: tuple[int, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    source: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def distinct_names(self) -> tuple[str, ...]:
        """Class names for rows and keys of a report: one that occurs twice is followed by its label.

        >>> info = data.dataset_info("imagenet")
        >>> [name for name in info.distinct_names if name.startswith("missile")]
        ['missile (n03773504)', 'missile (n04008634)']
        """
        times = collections.Counter(self.class_names)
        pairs = zip(self.class_names, self.labels, strict=True)
        return tuple(f"{name} ({label})" if times[name] > 1 else name for name, label in pairs)

    @property
    def digest(self) -> str:
        """SHA-256 of class names, labels, templates, background and further names: what a result depends on."""
        lists: list[Any] = [self.class_names, self.labels, self.templates, self.background_names]
        lists += [self.more_names] if self.more_names else []
        return hashlib.sha256(json.dumps(lists, ensure_ascii=False).encode()).hexdigest()

    @property
    def dense_names(self) -> tuple[tuple[str, int], ...]:
        """Every name and the place of its class, -1 for the background, which comes first: for `patch.segment_dense`.

        >>> data.dataset_info("voc21").dense_names[24:30]
        (('rail', -1), ('fence', -1), ('aeroplane', 0), ('bicycle', 1), ('bird', 2), ('ship', 3))
        """
        background = ((name, -1) for name in self.background_names)
        names = ((c, (own, *self.more_names.get(own, ()))) for c, own in enumerate(self.class_names))
        return (*background, *((name, c) for c, own in names for name in own))

    def names_for(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Class names in the order of a data source's labels, matched by label name, whatever that order is.

        labels: the source's class labels, all or some of this data set's. Capitals, blanks, "_" and "-" do not count.
        Returns one class name for each label. Raises `LabelError` naming the labels that are not of this data set,
        and those given twice.

        >>> data.dataset_info("cifar10").names_for(["ship", "cat"])
        ('ship', 'cat')
        """
        places = [self.place(label) for label in labels]
        unknown = [label for label, place in zip(labels, places, strict=True) if place is None]
        # Strangers first: as None they would seem to be one class that is named several times.
        if unknown:
            raise LabelError(
                f"{len(unknown)} of {len(labels)} labels are not of the data set {self.name!r}: "
                f"{', '.join(map(repr, unknown[:5]))}. Its labels look like "
                f"{', '.join(map(repr, self.labels[:3]))}; `jaxzs datasets {self.name}` lists all"
            )
        times = collections.Counter(places)
        repeated = sorted({label for label, place in zip(labels, places, strict=True) if times[place] > 1})
        if repeated:
            raise LabelError(f"labels name a class of {self.name!r} a second time: {', '.join(repeated[:5])}")
        return tuple(self.class_names[place] for place in places if place is not None)

    def place(self, label: str) -> int | None:
        """Place of a label, class name or alias among the classes; None for a stranger or an ambiguous name."""
        return self._places.get(_plain(label))

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """Place of every accepted spelling; labels win over class names, and an ambiguous name is none."""
        places: dict[str, int] = {}
        # Class names first, so that labels may overwrite them.
        names = [_plain(name) for name in self.class_names]
        times = collections.Counter(names)
        for place, name in enumerate(names):
            if times[name] == 1:  # "missile" is two classes of ImageNet and names neither
                places[name] = place
        labels = {_plain(label): place for place, label in enumerate(self.labels)}
        places.update(labels)
        places.update({_plain(alias): labels[_plain(to)] for alias, to in self.aliases.items()})
        return places

    def renamed(self, variant: str) -> DatasetInfo:
        """The same data set under another published list of names, e.g. "clip_es". Raises `LabelError`."""
        if variant not in self.variants:
            raise LabelError(f"{self.name!r} has no names {variant!r}; it has: {', '.join(self.variants) or 'none'}")
        other = self.variants[variant]
        names = tuple(other.get(name, name) for name in self.class_names)  # a variant lists what it calls otherwise
        return dataclasses.replace(self, class_names=names)


def _plain(label: str) -> str:
    """A label without what spellings differ in. Signs are kept where nothing else is left ("/" and "+")."""
    return re.sub(r"[\W_]+", "", name_key(label)) or label


def dataset_names() -> list[str]:
    """Names of all data sets in the package, sorted.

    >>> data.dataset_names()[:4]
    ['ade20k', 'caltech101', 'cifar10', 'cifar100']
    """
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir())


def dataset_info(name_or_path: str | Path) -> DatasetInfo:
    """Class names, labels and templates of a data set of the package, or of a JSON file of the user's.

    A user's file: {"class_names": [...], "templates": [...] or the name of a set of templates}, and optionally the
    other fields of `DatasetInfo`. Raises `LabelError` for an unknown name, `DataError` for an unfit file.

    >>> data.dataset_info("oxford_pets").num_classes
    37
    >>> from pathlib import Path
    >>> _ = Path("pets.json").write_text('{"class_names": ["cat", "dog"], "templates": ["a {} at home."]}')
    >>> data.dataset_info("pets.json").templates
    ('a {} at home.',)
    """
    text = str(name_or_path)
    # A text without ".json" is a name of the package, whatever lies in the working directory.
    if text.endswith(".json") or isinstance(name_or_path, Path):
        path = Path(name_or_path)
        try:
            return _parse(path.read_text(encoding="utf-8-sig"), str(path), path.stem)  # some editors begin with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the data set description {path}: {error}") from error
    if text not in dataset_names():
        raise LabelError(
            f"no data set {text!r} in the package, only: {', '.join(dataset_names())}. "
            "For your own, write a JSON file with class_names and templates and give its path"
        )
    return _parse((_folder() / f"{text}.json").read_text(encoding="utf-8"), text, text)


def template_set(name: str) -> tuple[str, ...]:
    """Templates by the name of their set: "simple", "imagenet7" (InMaP), "imagenet80" (CLIP), "tagclip85".

    Raises `LabelError` for another name.

    >>> data.template_set("imagenet7")[:2]
    ('itap of a {}.', 'a origami {}.')
    """
    sets = _template_sets()
    if name not in sets:
        raise LabelError(f"no set of templates {name!r}, only: {', '.join(sets)}")
    return tuple(sets[name]["templates"])


def template_set_names() -> list[str]:
    """Names that `template_set` takes.

    >>> data.template_set_names()
    ['simple', 'imagenet7', 'imagenet80', 'tagclip85']
    """
    return list(_template_sets())


def template_source(name: str) -> Mapping[str, str]:
    """Repository or package, path and commit that a set of templates was taken from."""
    template_set(name)
    source: Mapping[str, str] = _template_sets()[name]["source"]
    return source


def seen_unseen_split(num_classes: int, seed: int, seen_fraction: float = 0.62) -> tuple[np.ndarray, np.ndarray]:
    """Class places (seen, unseen) of transductive zero-shot learning, as Menghini et al. 2023 split them.

    Seen classes are drawn without replacement, in the drawn order; the rest follow in ascending order.
    The paper's split seeds are 500, 0 and 200 (arXiv 2306.01669, section 4).

    >>> seen, unseen = data.seen_unseen_split(10, seed=500)
    >>> len(seen), len(unseen)
    (6, 4)
    """
    if num_classes < 2 or not 0 < seen_fraction < 1:
        raise LabelError(f"cannot split {num_classes} classes at {seen_fraction}: needs two classes and a fraction")
    # The legacy generator: its stream is frozen, and the published splits were drawn from it.
    generator = np.random.RandomState(seed)
    seen = generator.choice(num_classes, int(seen_fraction * num_classes), replace=False)
    return seen, np.setdiff1d(np.arange(num_classes), seen)


def _folder() -> Any:
    return importlib.resources.files("jaxzs.data") / "datasets"


@functools.cache
def _template_sets() -> Mapping[str, Any]:
    path = importlib.resources.files("jaxzs.data") / "templates.json"
    sets: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return sets


def _parse(text: str, where: str, default_name: str) -> DatasetInfo:
    try:
        values = read_json_text(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    templates = values.get("templates", "simple") if isinstance(values, dict) else None
    # A text is the name of a set.
    if isinstance(templates, str):
        values |= {"templates": template_set(templates)}
    if isinstance(values, dict):
        # What the file says comes last and wins; its class names are its labels unless it has others.
        values = {"name": default_name, "title": default_name, "labels": values.get("class_names"), **values}
    info = from_json(DatasetInfo, values, where, DataError)
    _check_lists(info, where)
    return info


def _check_lists(info: DatasetInfo, where: str) -> None:
    """Raises `DataError` for empty texts, lists that do not fit each other, labels that are not distinct."""
    further = tuple(name for own in info.more_names.values() for name in own)
    lists = {key: getattr(info, key) for key in ("class_names", "labels", "templates", "background_names")}
    for key, texts in (*lists.items(), ("more_names", further)):
        if not texts and key not in ("background_names", "more_names"):
            raise DataError(f"{where}: {key} must be a non-empty list of texts")
        # Half of a surrogate pair: JSON can spell it, no file and no tokenizer takes it.
        if bad := [text for text in texts if not text.strip() or re.search("[\ud800-\udfff]", text)]:
            raise DataError(f"{where}: {key} holds {bad[0]!r:.100}, which is empty or no valid text")
    if bad := [template for template in info.templates if template.count(_PLACEHOLDER) != 1]:
        raise DataError(f"{where}: templates need one {_PLACEHOLDER!r} each: {bad[0]!r:.100}")
    for key in ("labels", "label_ids", "groups"):
        if (listed := getattr(info, key)) is not None and len(listed) != info.num_classes:
            raise DataError(f"{where}: {len(listed)} {key} for {info.num_classes} class_names")
    if lost := sorted(set(info.more_names) - set(info.class_names)):
        raise DataError(f"{where}: more_names of classes that are not there: {', '.join(lost[:5])}")
    # Labels are compared as `place` compares them: two that differ in capitals only would be one.
    fine = [number for group in info.groups or () for number in group]
    for key, listed in (("labels", map(_plain, info.labels)), ("label_ids", info.label_ids or ()), ("groups", fine)):
        if twice := [entry for entry, times in collections.Counter(listed).items() if times > 1]:
            raise DataError(f"{where}: {key} occur more than once: {', '.join(map(str, twice[:5]))}")
    labels = set(map(_plain, info.labels))
    if lost := sorted(alias for alias, to in info.aliases.items() if _plain(to) not in labels):
        raise DataError(f"{where}: aliases of labels that are not there: {', '.join(lost[:5])}")
