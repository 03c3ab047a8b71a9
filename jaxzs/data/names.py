"""One rule for which class a name means: names are matched by label, never by their place in a list unless asked.

Two lists of one data set often differ in order and spelling; a list that is attached by position then costs accuracy
without any error. Everything that attaches names to data (folders, tables, options) asks `match_names`.
"""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxzs.errors import LabelError

_LISTED = 20  # names of a list that an error shows


def name_key(name: str) -> str:
    """What is compared of a name: without capitals, blanks and "_", accents composed (NFC).

    >>> data.name_key("Potted_Plant") == data.name_key("potted plant") == data.name_key("pottedplant")
    True
    """
    # Decomposed before casefold, else a composed capital and its parts could fold differently.
    caseless = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    return re.sub(r"[\s_]+", "", caseless) or name


def order_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names, each once, in the order that their places follow: whole numbers as numbers, then texts by character.

    >>> data.order_names(["10", "9", "cat", "0", "9", "Dog"])
    ('0', '9', '10', 'Dog', 'cat')
    """
    return tuple(sorted(set(names), key=_order))


def _order(name: str) -> tuple[bool, int, str]:
    number = whole_number(name)
    return number is None, number or 0, name


def whole_number(name: str) -> int | None:
    """The whole number that a name is, if it is one (of at most 18 digits)."""
    return int(name) if re.fullmatch(r"[+-]?[0-9]{1,18}", name) else None  # below 2^63


def common_spellings(names: Iterable[str]) -> dict[str, str]:
    """The spelling under which each name goes: the most frequent of those with one key, of equals the first in order.

    names: with repetitions, which count. Single characters stay apart: "A" and "a" are classes of handwriting.

    >>> data.common_spellings(["zero", "Zero", "zero", "A", "a"])
    {'zero': 'zero', 'Zero': 'zero', 'A': 'A', 'a': 'a'}
    """
    counts = collections.Counter(names)
    common: dict[str, str] = {}
    # The most frequent spelling comes first and is the one that setdefault keeps.
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        common.setdefault(_spelled_alike(name), name)
    return {name: common[_spelled_alike(name)] for name in counts}


def _spelled_alike(name: str) -> str:
    return name_key(name) if len(name) > 1 else name


class Pairing(NamedTuple):
    """Which class each label of the data is, of `match_names`.

    given: C class names, in the order in which results count them. found: F labels of the data. places: F places in
    given. how: "label", "number" (labels that count the names) or "position".
    """

    given: tuple[str, ...]
    found: tuple[str, ...]
    places: tuple[int, ...]
    how: str

    @property
    def absent(self) -> tuple[str, ...]:
        """Class names that no label of the data is paired with."""
        return tuple(name for place, name in enumerate(self.given) if place not in set(self.places))

    def lines(self) -> list[str]:
        """One line for each label of the data, to be printed.

        >>> data.match_names(["zero", "one"], ["One", "zero"]).lines()
        ['One -> one', 'zero -> zero']
        """
        return [f"{label} -> {self.given[place]}" for label, place in zip(self.found, self.places, strict=True)]


def match_names(given: Sequence[str], found: Sequence[str], *, by_position: bool = False) -> Pairing:
    """Pairs class names with the labels of the data by what they say, or by position where that is asked for.

    Args:
      given: C class names, as the user lists them; some may have no images.
      found: F labels of the data, in any order. Labels that are exactly the numbers 0 to C-1, or 1 to C, are places in
        the list of names: the number is then all that a label says.
      by_position: the i-th of `order_names(found)` is the i-th of given; as many of both.

    Returns:
      `Pairing`; print its `lines()` where names and labels are not equal.

    Raises:
      LabelError: a label has no name, or could have several; two labels have one name; unequal numbers by position.
        It shows both lists.

    >>> data.match_names(["zero", "one", "two"], ["One", "TWO", "zero"]).places
    (1, 2, 0)
    >>> data.match_names(["cat", "dog"], ["1", "0"]).lines()
    ['1 -> dog', '0 -> cat']
    """
    if by_position:
        return _by_position(given, found)
    places = match_places(given, found)
    # Only where no label is a name: "0" to "9" may be the classes themselves, in another order.
    numbered = _counted_places(given, found) if set(places) == {None} else None
    if numbered is not None:
        return Pairing(tuple(given), tuple(found), numbered, "number")
    strangers = [label for label, place in zip(found, places, strict=True) if place is None]
    if strangers:
        raise _unmatched(f"{len(strangers)} of {len(found)} labels of the data have no class name", given, found)
    known = tuple(place for place in places if place is not None)
    if len(set(known)) < len(known):
        twice = next(place for place in known if known.count(place) > 1)
        raise _unmatched(f"two labels of the data are named {given[twice]!r}", given, found)
    return Pairing(tuple(given), tuple(found), known, "label")


def match_places(given: Sequence[str], found: Iterable[str]) -> list[int | None]:
    """The place in given of each name found: equal, else equal in `name_key`; None for a stranger or where two fit.

    >>> data.match_places(["cat", "Dog", "dog"], ["CAT", "dog", "DOG", "bird"])
    [0, 2, None, None]
    """
    # Equal spelling first: where "Dog" and "dog" are both given, "dog" is the second.
    exact, alike = _only_places(given), _only_places(map(name_key, given))
    return [exact[name] if name in exact else alike.get(name_key(name)) for name in found]


def _only_places(names: Iterable[str]) -> dict[str, int | None]:
    """Place of every name; None for a name that occurs twice."""
    places: dict[str, int | None] = {}
    for place, name in enumerate(names):
        places[name] = None if name in places else place
    return places


def _counted_places(given: Sequence[str], found: Sequence[str]) -> tuple[int, ...] | None:
    """Places, where the labels are whole numbers that count all the names from 0 or from 1."""
    numbers = [number for number in map(whole_number, found) if number is not None]
    if len(numbers) != len(found) or len(found) != len(given):
        return None
    first = min(numbers)
    # Numbers with gaps, or from another first one on, are of some other list than this one.
    if first not in (0, 1) or sorted(numbers) != list(range(first, first + len(given))):
        return None
    return tuple(number - first for number in numbers)


def _by_position(given: Sequence[str], found: Sequence[str]) -> Pairing:
    labels = order_names(found)
    if len(labels) != len(given):
        raise _unmatched(f"{len(given)} class names for {len(labels)} labels of the data, by position", given, found)
    place_of = {label: place for place, label in enumerate(labels)}
    return Pairing(tuple(given), tuple(found), tuple(place_of[label] for label in found), "position")


def _unmatched(problem: str, given: Sequence[str], found: Sequence[str]) -> LabelError:
    return LabelError(
        f"{problem}. Class names: {_listed(given)}. Labels of the data: {_listed(order_names(found))}. "
        "Capitals, blanks and _ do not count; name every label",
        python="by_position=True pairs the two lists in their order",
        command="--by-position pairs the two lists in their order",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_LISTED]))
    return f"{shown}, ... ({len(names)} in all)" if len(names) > _LISTED else shown
