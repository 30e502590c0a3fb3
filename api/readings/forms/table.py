"""What every form is written from: columns with kinds, and rows in blocks of one series, column by column."""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple

from api.readings.series import Series
from schemas.record import Quality

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_FLAGS: Final = list(Quality)


class Kind(Enum):
    """What the cells of a column are; None is a cell without anything."""

    TEXT = "text"
    TIME = "time"
    """Microseconds since 1970, an `int`: exact, and cheap to make. Or a `datetime`, where there is one anyway."""
    NUMBER = "number"
    INTEGER = "integer"
    FLAGS = "flags"
    """A `Quality`, as the `int` that it is."""
    VALUE = "value"
    """As a reading has it: a number, a bool, a text, or an integer of any length (`Digits`)."""


class Digits(str):
    """An integer of any length, as text: no number type holds all of its digits everywhere."""

    __slots__ = ()


class Column(NamedTuple):
    """Has cells of one kind."""

    name: str
    kind: Kind


class Block(NamedTuple):
    """Rows of one series: a sequence of cells for each column. Consecutive blocks of a series belong together."""

    series: Series
    columns: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Table:
    """Rows of series, and what is said beside them: members in JSON, headers `Sluice-…` elsewhere."""

    columns: Sequence[Column]
    blocks: AsyncIterator[Block]
    head: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] = Series._fields
    """What the face calls that which names a series."""
    objects: Callable[[Sequence[str]], list[dict[str, Any]]] | None = None
    """All rows as objects that call their series so, of a page: in turns, a block would hold a single one."""


def micros(ts: datetime | int) -> int:
    """The cell of a time as microseconds since 1970."""
    return ts if isinstance(ts, int) else (ts - EPOCH) // _MICROSECOND


def moment(ts: datetime | int) -> datetime:
    """The same as a time."""
    return EPOCH + timedelta(microseconds=ts) if isinstance(ts, int) else ts


@lru_cache(maxsize=1_024)
def flag_names(flags: int) -> tuple[str, ...]:
    """What is said of a reading that has them."""
    return tuple(flag.name.lower() for flag in _FLAGS if flags & flag and flag.name)


async def each(blocks: Iterable[Block]) -> AsyncIterator[Block]:
    """Blocks that are there already."""
    for block in blocks:
        yield block


async def gathered(chunks: AsyncIterable[bytes], least: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of `least` or more: a piece costs a write, and a packet."""
    held: list[bytes] = []
    size = 0
    async for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= least:
            yield b"".join(held)
            held.clear()
            size = 0
    if held:
        yield b"".join(held)
