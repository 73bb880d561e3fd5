"""Texts for messages: near misses, and aligned tables."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from jaxscape.runtime.errors import unknown_name
from jaxscape.runtime.texts import aligned, did_you_mean, printable

NAMES = ("harmful", "harmless", "advbench", "jailbreakbench", "random", "gaussian")


@given(st.sampled_from(NAMES), st.integers(0, 100), st.sampled_from(string.ascii_letters), st.booleans())
def test_one_wrong_letter_is_a_near_miss(name: str, place: int, letter: str, adds: bool) -> None:
    place %= len(name)
    misspelled = name[:place] + letter + name[place if adds else place + 1 :]
    assert name in did_you_mean(misspelled, NAMES)
    assert name in did_you_mean(misspelled.upper(), NAMES)


def test_near_misses_are_written_as_a_list_in_their_forms() -> None:
    forms = {"random": "random:SEED", "rando": "rando", "randon": "randon"}
    assert did_you_mean("Randm", ["random"], forms) == " (did you mean random:SEED?)"
    assert did_you_mean("random", ["random", "rando"], forms) == " (did you mean random:SEED or rando?)"
    three = did_you_mean("random", forms, forms)
    assert three.count(", ") == three.count(" or ") == 1
    assert did_you_mean("something else", NAMES) == did_you_mean("", NAMES) == did_you_mean("x", []) == ""


def test_the_error_for_an_unknown_name_lists_the_choices() -> None:
    message = str(unknown_name("figure", "landscpe", ["landscape", "other"]))
    assert message == "Unknown figure 'landscpe' (did you mean landscape?): choose landscape, other."
    assert str(unknown_name("figure", None, ["a"])) == "Unknown figure None: choose a."


CELL = st.text(min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(st.tuples(CELL, CELL), min_size=1))
def test_the_second_column_begins_at_the_same_place_whatever_stands_in_the_first(rows: list[tuple[str, str]]) -> None:
    lines = aligned(rows).split("\n")
    assert len(lines) == len(rows)
    assert all(line.isprintable() for line in lines)
    starts = {cell_len(line.removesuffix(printable(second))) for line, (_, second) in zip(lines, rows, strict=True)}
    assert len(starts) == 1
    assert starts.pop() == 2 + max(cell_len(printable(first)) for first, _ in rows)


def test_a_table_without_text_is_empty_lines() -> None:
    assert aligned([("", ""), ("", "")]) == "\n"


@pytest.mark.parametrize("row", [("日本", "b"), ("é", "b"), ("\x1b[31m", "b"), ("a\nb", "b")])
def test_wide_and_control_characters_take_the_room_that_they_have(row: tuple[str, str]) -> None:
    first, second = aligned([row, ("a", "b")]).split("\n")
    assert cell_len(first) == cell_len(second)
