"""Pages of a list: a bounded number of rows, and a cursor that leads on. Left out: what is in the list."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

from api.http.problems import Problem, invalid_parameter
from api.http.spelt import STORABLE
from runtime.secrets import BadSealError, Seal

T = TypeVar("T")
R = TypeVar("R")

LIMIT_DEFAULT: Final = 50
LIMIT_MAX: Final = 500

Limit = Annotated[int, msgspec.Meta(ge=1, le=LIMIT_MAX, description="How many to give at most.")]
CursorText = Annotated[
    str,
    msgspec.Meta(max_length=1_024, description="`next_cursor` of the page before.", extra_json_schema=STORABLE),
]


class Cursors(Generic[T]):
    """Places in lists between requests: opaque, and only for the list they were given out for.

    `kind` is a struct of what orders the rows: the place of a page's last one.
    """

    def __init__(self, seal: Seal, kind: type[T]) -> None:
        self._seal = seal
        self._decoder: msgspec.msgpack.Decoder[tuple[bytes, T]] = msgspec.msgpack.Decoder(tuple[bytes, kind])  # type: ignore[valid-type]

    def give(self, of: tuple[Any, ...], place: T) -> str:
        """`of` is everything that decides which rows follow which; the limit may change from page to page."""
        return self._seal.seal(msgspec.msgpack.encode((_mark(of), place)))

    def take(self, of: tuple[Any, ...], text: str | None) -> T | None:
        """Raises the problem of a cursor that this service did not give out for this list."""
        if text is None:
            return None
        try:
            mark, place = self._decoder.decode(self._seal.open(text))
        except (BadSealError, msgspec.DecodeError, OverflowError, ValueError):
            raise _not_given_out() from None
        if mark != _mark(of):
            raise _not_given_out()
        return place


def _not_given_out() -> Problem:
    """Of another list, of another organisation's, or made up: told apart by nobody."""
    return invalid_parameter("cursor", "was not given out for this list with these parameters")


def _mark(of: tuple[Any, ...]) -> bytes:
    return blake2b(repr(of).encode(), digest_size=12).digest()


def cut(rows: Sequence[R], limit: int) -> tuple[Sequence[R], bool]:
    """A page of what was asked for with one row more than wanted, and whether there are more."""
    return rows[:limit], len(rows) > limit
