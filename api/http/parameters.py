"""Query parameters that several operations take, and what is checked of them beside their types."""

from datetime import datetime
from typing import Annotated, Final

import msgspec

from api.http.problems import invalid_parameter
from api.http.spelt import STORABLE, Moment

NAME_CHARACTERS_MAX: Final = 256

Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARACTERS_MAX, extra_json_schema=STORABLE)]
Count = Annotated[
    int, msgspec.Meta(ge=1, le=1_000_000_000, description="How many at most, up to a bound that is a setting.")
]


def check_span(start: datetime, end: datetime) -> None:
    """Raises the problem of a span `[start, end)` that holds no time."""
    if start == end:
        raise invalid_parameter("from", "is the same as `to`: nothing lies between them")
    if start > end:
        raise invalid_parameter("from", "lies after `to`")


class Spanned:
    """What has `from_` and `to` among its fields."""

    from_: Moment | None
    to: Moment | None

    @property
    def start(self) -> datetime | None:
        return None if self.from_ is None else self.from_.value

    @property
    def end(self) -> datetime | None:
        return None if self.to is None else self.to.value

    def __post_init__(self) -> None:
        if self.from_ is not None and self.to is not None:
            check_span(self.from_.value, self.to.value)


class Span(Spanned, msgspec.Struct, kw_only=True):
    """A span `[from, to)` of time."""

    from_: Moment | None = msgspec.field(default=None, name="from")
    to: Moment | None = None


def limit_within(limit: int | None, default: int, most: int) -> int:
    """How many rows are given. Raises the problem of a limit that is too high."""
    if limit is None:
        return min(default, most)
    if limit > most:
        raise invalid_parameter("limit", f"must be a number from 1 to {most}")
    return limit
