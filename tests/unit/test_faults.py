"""Everything that is wrong with a value is found, wherever it stands, and nothing with a right one."""

from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pytest

from api.http.faults import FAULTS_MAX, faults, in_words
from api.http.problems import invalid
from api.http.spelt import Moment
from api.http.wording import NO_VALUE


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
    word: Annotated[str, msgspec.Meta(pattern="^[a-z]+$", extra=in_words("must be one word"))] | None = None
    plain: Annotated[str, msgspec.Meta(pattern="^[a-z]+$")] = "a"


def test_what_a_text_has_to_be_is_said_in_words_where_there_are_some() -> None:
    assert [fault.message for fault in faults(Worded, {"word": "two words"})] == ["must be one word"]
    assert [fault.message for fault in faults(Worded, {"word": 5})] == ["must be a text or null"]
    assert [fault.message for fault in faults(Worded, {"plain": "two words"})] == [NO_VALUE]


class Together(msgspec.Struct, forbid_unknown_fields=True):
    low: int
    high: int = 10

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise invalid("low", "is above `high`")


@pytest.mark.parametrize(
    ("value", "fields"),
    [
        ({"low": 11}, ["low"]),
        ({"low": 11, "x": 1}, ["x", "low"]),
        ({"low": 1, "x": 1}, ["x"]),
        ({"low": 11, "high": "x"}, ["high"]),
        ({"high": 1, "x": 1}, ["low", "x"]),
        ({"low": "x", "y": 1}, ["low", "y"]),
    ],
)
def test_rules_across_fields_are_judged_by_what_is_right(value: Any, fields: list[str]) -> None:
    assert [fault.field for fault in faults(Together, value)] == fields


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


WORDS: list[tuple[Any, Any, str]] = [
    (str, 5, "must be a text"),
    (float | None, "x", "must be a number or null"),
    (bool, "x", "must be true or false"),
    (int, 1.5, "must be a whole number"),
    (Annotated[int, msgspec.Meta(ge=1, le=5)], 0, "must be a whole number, at least 1"),
    (Annotated[int, msgspec.Meta(ge=1, le=5)], 6, "must be a whole number, up to 5"),
    (Annotated[float, msgspec.Meta(gt=0)], 0.0, "must be a number, more than 0.0"),
    (Annotated[str, msgspec.Meta(max_length=3)], "long", "must be a text of up to 3 characters"),
    (Annotated[str, msgspec.Meta(min_length=3)], "", "must be a text of at least 3 characters"),
    (Annotated[list[int], msgspec.Meta(max_length=2)], [1, 2, 3], "must be an array of up to 2 items"),
    (Annotated[str, msgspec.Meta(pattern="^a$")], "b", NO_VALUE),
    (list[int], {}, "must be an array"),
    (Inner, 5, "must be an object"),
    (UUID, 5, "must be a UUID"),
    (UUID, "x", "is not a UUID"),
    (datetime, "x", "must be a time as RFC 3339 has it"),
    (Moment, 5, "must be a text: RFC 3339 with an offset, or seconds since 1970"),
    (Literal["a", "b"], "c", "must be one of a, b"),
    (Literal["a", "b"] | None, "c", "must be one of a, b"),
    (Colour, "green", "must be one of red, blue"),
]


@pytest.mark.parametrize(("kind", "value", "message"), WORDS)
def test_what_is_wrong_is_told_in_our_words(kind: Any, value: Any, message: str) -> None:
    assert [fault.message for fault in faults(kind, value)] == [message]


def test_their_number_and_length_are_bounded() -> None:
    found = faults(Outer, {"x" * 100_000 + str(number): 1 for number in range(100)})
    assert len(found) == FAULTS_MAX
    assert sum(len(one.field) + len(one.message) for one in found) < 10_000
