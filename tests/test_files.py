"""JSON as dataclasses: every annotation, every kind of misfit, and nothing but the named error for any JSON at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxzs.errors import ConfigError, DataError
from jaxzs.files import from_json


@dataclasses.dataclass(frozen=True)
class Inner:
    """One field of its own rule."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError("count is negative")


@dataclasses.dataclass(frozen=True)
class Outer:
    """A field of every annotation that is understood."""

    name: str
    ratio: float = 0.5
    on: bool = False
    size: int | tuple[int, int] = 1
    kind: Literal["a", "b"] = "a"
    maybe: float | None = None
    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None
    listed: list[float | None] = dataclasses.field(default_factory=list)
    parts: Sequence[Inner] = ()
    table: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()
    anything: Any = None


WHOLE = Outer(
    "x",
    2.0,
    True,
    (3, 4),
    "b",
    None,
    ("y",),
    ((1, 2), ()),
    [1.0, None],
    (Inner(2),),
    {"a": {"b": "c"}},
    Inner(3),
    [None],
)


def test_round_trip_through_json():
    again = from_json(Outer, json.loads(json.dumps(dataclasses.asdict(WHOLE))), "x", DataError)
    assert again == WHOLE
    assert type(from_json(Outer, {"name": "x", "ratio": 1}, "x", DataError).ratio) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, r"^f\.json\.name is 3, expected a text$"),
        ({"ratio": "1"}, r"ratio is '1', expected a finite number"),
        ({"ratio": float("nan")}, "ratio is nan, expected a finite number"),
        ({"ratio": 10**400}, "expected a finite number"),
        ({"ratio": True}, "ratio is True, expected a finite number"),
        ({"on": 1}, "on is 1, expected true or false"),
        ({"size": [1, 2, 3]}, "size has 3 entries, expected 2"),
        ({"size": 1.0}, "size is 1.0, expected a list"),
        ({"kind": "c"}, "kind is 'c', expected one of 'a', 'b'"),
        ({"maybe": "x"}, "maybe is 'x', expected a finite number"),
        ({"names": "xy"}, "names is 'xy', expected a list"),
        ({"names": ["a", None]}, r"names\[1\] is None, expected a text"),
        ({"groups": [[1], ["2"]]}, r"groups\[1\]\[0\] is '2', expected a whole number"),
        ({"parts": [{"count": 1}, {"count": -1}]}, r"parts\[1\]: count is negative"),
        ({"table": {"a": {"b": 1}}}, r"table\['a'\]\['b'\] is 1, expected a text"),
        ({"table": [1]}, "table is list, expected an object"),
        ({"inner": {"amount": 1}}, "inner has 'amount', expected only count"),
        ({"other": 1}, "f.json has 'other', expected only name, ratio"),
    ],
)
def test_every_misfit_is_named_with_its_place(change, message):
    with pytest.raises(DataError, match=message):
        from_json(Outer, {"name": "x", **change}, "f.json", DataError)
    if "other" in change:
        assert from_json(Outer, {"name": "x", **change}, "f.json", DataError, ignore_unknown=True) == Outer("x")


def test_a_missing_field_is_named():
    with pytest.raises(DataError, match=r"^f\.json lacks 'name'$"):
        from_json(Outer, {}, "f.json", DataError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([field.name for field in dataclasses.fields(Outer)])


@given(JSON | st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_json_gives_the_dataclass_or_the_named_error(values):
    with contextlib.suppress(DataError):
        assert isinstance(from_json(Outer, values, "f.json", DataError), Outer)
