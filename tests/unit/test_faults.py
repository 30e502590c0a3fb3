"""Everything that is wrong with a value is found, wherever it stands, and nothing with a right one."""

from typing import Annotated, Any

import msgspec
import pytest

from api.http.faults import FAULTS_MAX, faults, in_words
from api.http.spelt import Moment


class Inner(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    how_many: Annotated[int, msgspec.Meta(ge=1)]
    at: Moment | None = None


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(max_length=3)]
    inner: Inner | msgspec.UnsetType | None = msgspec.UNSET
    many: list[Inner] = []
    anything: Any = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("is bad as a whole")


RIGHT: list[dict[str, Any]] = [
    {"name": "a"},
    {"name": "a", "inner": None, "anything": {"x": [1]}},
    {"name": "a", "inner": {"howMany": 1, "at": "2026-01-01T00:00:00Z"}, "many": [{"howMany": 2}]},
]
WRONG: list[tuple[Any, list[str]]] = [
    ({}, ["name"]),
    ({"name": "long", "x": 1, "y": 2}, ["name", "x", "y"]),
    ({"name": 1, "inner": {"howMany": 0, "at": 5, "z": 1}}, ["name", "inner.howMany", "inner.at", "inner.z"]),
    ({"many": [{"howMany": 1}, {}, 5]}, ["name", "many[1].howMany", "many[2]"]),
    ({"name": "a", "inner": 5, "many": 5}, ["inner", "many"]),
    ({"name": "\0", "anything": {"x": ["a", "\0"], "b\0": 1}}, ["name", "anything.x[1]", "anything.b\0"]),
    ({"name": "bad"}, [""]),
    ([], [""]),
    (None, [""]),
]


@pytest.mark.parametrize("value", RIGHT)
def test_nothing_is_wrong_with_what_is_right(value: Any) -> None:
    assert faults(Outer, value) == []


@pytest.mark.parametrize(("value", "fields"), WRONG)
def test_each_fault_is_named_where_it_is(value: Any, fields: list[str]) -> None:
    assert [fault.field for fault in faults(Outer, value)] == fields


class Worded(msgspec.Struct):
    word: Annotated[str, msgspec.Meta(pattern="^[a-z]+$", extra=in_words("is one word"))] | None = None
    plain: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")] = "a"


def test_what_a_text_has_to_be_is_said_in_words_where_there_are_some() -> None:
    assert [fault.message for fault in faults(Worded, {"word": "two words"})] == ["is one word"]
    assert [fault.message for fault in faults(Worded, {"word": 5})] == ["expected `str | null`, got `int`"]
    assert "regex" in faults(Worded, {"plain": "two words"})[0].message


def test_their_number_and_length_are_bounded() -> None:
    found = faults(Outer, {"x" * 100_000 + str(number): 1 for number in range(100)})
    assert len(found) == FAULTS_MAX
    assert sum(len(one.field) + len(one.message) for one in found) < 10_000
