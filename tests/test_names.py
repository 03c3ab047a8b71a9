"""Which class a name means: matched by label, whole numbers in their order, by position only when asked."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxzs import data
from jaxzs.errors import LabelError

NUMBERS = [str(number) for number in range(12)]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


@pytest.mark.parametrize(
    "spelling", ["Potted_Plant", "potted plant", " POTTED  PLANT ", "pottedplant", "potted\tplant"]
)
def test_capitals_blanks_and_underscores_do_not_count(spelling):
    assert data.name_key(spelling) == "pottedplant"


def test_accents_are_composed_and_other_signs_count():
    assert data.name_key(unicodedata.normalize("NFD", "Café")) == data.name_key("CAFÉ")
    assert data.name_key("STRASSE") == data.name_key("straße")
    assert len({data.name_key(name) for name in ("a-b", "a b", "a/b", "_", "__", " ")}) == 6


def test_names_that_are_bytes_of_a_file_system_have_a_key():
    assert data.name_key("caf\udce9") == "caf\udce9"


def test_whole_numbers_are_ordered_as_numbers():
    assert data.order_names(sorted(NUMBERS)) == tuple(NUMBERS)
    assert data.order_names(["10", "02", "1", "-3", "b10", "b2"]) == ("-3", "1", "02", "10", "b10", "b2")
    assert data.order_names(["9" * 5000, "1"]) == ("1", "9" * 5000)  # no number that Python refuses to read


@given(st.permutations(range(12)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_either_list_does_not_count(order):
    found = [WORDS[place].upper() for place in order]
    pairing = data.match_names(WORDS, found)
    assert pairing.places == tuple(order)
    assert pairing.how == "label"
    assert pairing.absent == ()


@pytest.mark.parametrize("first", [0, 1])
def test_labels_that_count_the_names_are_places(first):
    labels = sorted(str(number) for number in range(first, first + 12))  # as text: 0, 1, 10, 11, 2
    pairing = data.match_names(WORDS, labels)
    assert pairing.how == "number"
    assert pairing.places == tuple(int(label) - first for label in labels)
    assert f"{first + 10} -> ten" in pairing.lines()


def test_names_of_numbers_are_matched_as_names():
    assert data.match_names(["1", "0"], ["0", "1"]).places == (1, 0)


@pytest.mark.parametrize("labels", [["0", "2"], ["2", "3"], ["0", "1", "2"], ["0", "one"], ["1", "01"]])
def test_other_numbers_are_no_places(labels):
    with pytest.raises(LabelError, match="have no class name"):
        data.match_names(["zero", "one"], labels)


def test_position_counts_when_asked_for():
    pairing = data.match_names(["a", "b", "c"], ["10", "9", "8"], by_position=True)
    assert pairing.lines() == ["10 -> c", "9 -> b", "8 -> a"]
    with pytest.raises(LabelError, match="2 class names for 3 labels of the data, by position"):
        data.match_names(["a", "b"], ["x", "y", "z"], by_position=True)


def test_a_partial_match_is_refused_with_both_lists():
    with pytest.raises(LabelError) as refused:
        data.match_names(["zero", "one", "two"], ["zero", "ones", "two"])
    assert "1 of 3 labels" in str(refused.value)
    for name in ("'zero'", "'one'", "'two'", "'ones'", "by_position=True"):
        assert name in str(refused.value)
    assert "by_position" not in refused.value.shown(on_command_line=True)


def test_classes_without_images_are_told():
    assert data.match_names(["zero", "one", "two"], ["two"]).absent == ("zero", "one")


def test_two_that_fit_are_none():
    repeated = ["missile", "cat", "missile"]
    assert data.match_places(repeated, ["missile", "Missile", "cat"]) == [None, None, 1]
    with pytest.raises(LabelError, match="have no class name"):
        data.match_names(repeated, ["missile"])
    with pytest.raises(LabelError, match="two labels of the data are named 'cat'"):
        data.match_names(["cat", "dog"], ["cat", "Cat"])
    assert data.match_names(["A", "a"], ["a", "A"]).places == (1, 0)  # letters: equal before alike


def test_long_lists_are_cut():
    with pytest.raises(LabelError, match=r"\(1000 in all\)"):
        data.match_names([f"class {number}" for number in range(1000)], ["cat"])


def test_the_common_spelling_wins():
    assert data.common_spellings(["Zero", "zero", "zero"]) == {"Zero": "zero", "zero": "zero"}
    assert data.common_spellings(["b", "B", "potted_plant", "potted plant"])["potted_plant"] == "potted plant"
    assert data.common_spellings("bB") == {"b": "b", "B": "B"}


def test_folders_of_numbers_are_classes_in_the_order_of_numbers(tmp_path):
    from PIL import Image

    for name in NUMBERS:
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 4), int(name), np.uint8)).save(tmp_path / name / "0.png")
    source = data.open_folder(tmp_path)
    assert source.label_names == tuple(NUMBERS)
    assert {item.id: item.labels for item in source}["10/0.png"] == (10,)


def test_pairs_that_are_written_alike_are_counted(capsys):
    """A hundred lines of "cat -> cat" say nothing."""
    from jaxzs.commands.classify import ClassifyOptions
    from jaxzs.commands.run import Run

    told = Run(ClassifyOptions())
    told.tell_pairing(data.match_names(WORDS, WORDS[::-1]))
    assert told.notices == []
    told.tell_pairing(data.match_names(["zero", "one", "two"], ["Two", "one", "zero"]))
    told.tell_pairing(data.match_names(["b", "a"], ["a", "b"], by_position=True))
    assert told.notices == [
        "labels of the data, matched by label: Two -> two, 2 written alike",
        "labels of the data, matched by position: a -> b, b -> a",
    ]
