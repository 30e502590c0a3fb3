"""The log port: what ingest and the workers ask of a log, whichever engine keeps it.

A log has a generation (`source`), a fixed number of partitions, and in each a sequence of records at positions
0, 1, 2, …. One contract suite runs over every engine (`tests/contract/test_log.py`). Left out: what a record means.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol
from uuid import UUID

from runtime.errors import ConfigurationError, SluiceError

NEW_GENERATION: Final = (
    "run `sluice migrate --new-generation`, with `--abandon` where it is gone for good: that closes this generation "
    "and opens a new log"
)


RECORD_ROOM: Final = 32
"""What a record takes in a batch beside its body, at most, in bytes."""


class LogMisfitError(ConfigurationError):
    """The log found is not the one expected: another generation, identity, partition count or an end that lies
    before what has landed of it. Says what was found, what was expected and which command resolves it."""


class BehindRetentionError(SluiceError):
    """The position asked for lies below the oldest record the log still has: the records between are gone."""

    def __init__(self, partition: int, position: int, start: int) -> None:
        super().__init__(
            f"partition {partition}: position {position} was asked for, the log starts at {start}: "
            f"{start - position} records are lost"
        )
        self.partition = partition
        self.position = position
        self.start = start


class Bounds(NamedTuple):
    """The positions of a partition's oldest record and of the one that will be written next."""

    start: int
    end: int


class Slice(NamedTuple):
    """Consecutive records of one partition: `bodies[i]` stands at position `first + i`."""

    partition: int
    first: int
    bodies: list[bytes]

    @property
    def next_position(self) -> int:
        return self.first + len(self.bodies)


def check_positions(bounds: Mapping[int, Bounds], positions: Mapping[int, int]) -> None:
    """Refuse a log that ends before what the database has landed of it: a `LogMisfitError`.

    A position below the log's start is no misfit: the reader reports it as `BehindRetentionError`.
    """
    for partition, position in sorted(positions.items()):
        end = bounds[partition].end if partition in bounds else None
        if end is None or end < position:
            raise LogMisfitError(
                f"partition {partition} of the log ends at {end}, the database has landed it up to {position}: "
                "the log has lost records, was restored from a copy, or is another one. "
                f"Bring the right log back, or {NEW_GENERATION}"
            )


def check_together(bodies: Sequence[bytes], body_bytes_max: int) -> int:
    """The bytes of records that are to be written together. Raises `ValueError` for more than one batch takes."""
    size = sum(map(len, bodies))
    room = RECORD_ROOM * len(bodies) if len(bodies) > 1 else 0
    if not bodies or size + room > body_bytes_max:
        raise ValueError(f"{len(bodies)} records of {size} bytes do not fit into one batch of {body_bytes_max}")
    return size


class Expected(NamedTuple):
    """The log that the database knows: opening any other is refused."""

    source: UUID
    name: str
    identity: str
    partitions: int


class Reader(Protocol):
    """Reads from positions its caller keeps: a reader remembers nothing beyond its own life."""

    async def assign(self, positions: Mapping[int, int]) -> None:
        """Read these partitions from these positions from now on, and no others."""
        ...

    async def read(self, *, bytes_max: int, wait_s: float) -> list[Slice]:
        """What stands next in the assigned partitions, up to about `bytes_max`; waits up to `wait_s` for the first.

        An empty list after `wait_s` without a record. A log that cannot be reached looks like one without new
        records; `Log.trouble` tells. Raises `BehindRetentionError`, once the records it still had of that partition
        are handed over, and `LogMisfitError` for a position beyond the end or a log made anew; the other partitions
        go on after the caller has assigned anew.
        """
        ...

    async def close(self) -> None: ...


class Log(Protocol):
    """An open log. `append` never blocks; everything else may wait for the engine, bounded by its time-outs."""

    source: UUID
    partitions: int
    body_bytes_max: int

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        """Queue one record; the future gives its position once it is durable.

        Records queued for one partition are written in that order. Raises `OverloadedError` at once, with nothing
        queued, when the bounded queue is full, and `ValueError` for a body above `body_bytes_max`. The future raises
        `UnavailableError` when the record was certainly not written and `OutcomeUnknownError` when that is open: it
        then stands before every later record of its partition, or nowhere.
        """
        ...

    def append_all(self, partition: int, bodies: Sequence[bytes]) -> "asyncio.Future[int]":
        """Queue records that stand one after the other or nowhere; the future gives the position of the first.

        As `append` in all else. Raises `ValueError` for none, and for more than one batch takes: one record of up to
        `body_bytes_max`, or several that with `RECORD_ROOM` bytes each come to no more.
        """
        ...

    @property
    def queued_bytes(self) -> int:
        """Bytes of records whose fate is not known yet."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why the log cannot be used right now, in words for an operator; None when it can."""
        ...

    async def bounds(self) -> dict[int, Bounds]:
        """Of every partition. Raises `UnavailableError`."""
        ...

    async def expiring(self, share: float) -> dict[int, int]:
        """By partition, the position below which records have used up this share of the time that the log keeps them.

        Empty for a log that deletes nothing before it has landed. Raises `UnavailableError`.
        """
        ...

    def reader(self) -> Reader: ...

    async def landed(self, positions: Mapping[int, int]) -> None:
        """Tell the log that everything below these positions has landed.

        The SQLite engine deletes it in time; the Kafka engine publishes the offsets for lag monitors. Returns before
        that is done, does it at most once a second, and never raises: nothing depends on it.
        """
        ...

    async def close(self) -> None:
        """Write what is queued, within the engine's time-out, then let go."""
        ...
