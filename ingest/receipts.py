"""Receipts: what a client is given for an acknowledged request, and what became of its readings since.

A receipt names log positions and is sealed, so that it can neither be read nor made up. Left out: HTTP.
"""

import asyncio
import struct
from collections import defaultdict
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from ingest.registry import Connections, ask
from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.secrets import BadSealError, Seal

_HEAD: Final = struct.Struct(">B16s16sI")
_PLACE: Final = struct.Struct(">HQI")
_FORMAT: Final = 1
_POLL_S: Final = 0.02
_QUERY_TIMEOUT_S: Final = 3.0
_WAITERS_MAX: Final = 10_000


class Place(NamedTuple):
    """Where a record stands in the log, and how many accepted readings it has."""

    partition: int
    position: int
    accepted: int


class Receipt(NamedTuple):
    """The records of one request."""

    source: bytes
    organisation: bytes
    places: list[Place]

    @property
    def accepted(self) -> int:
        return sum([place.accepted for place in self.places])


class ReceiptError(Exception):
    """It is none of ours, of another organisation, damaged, or too old."""


class State(StrEnum):
    """Whether a receipt's records have landed."""

    PENDING = "pending"
    LANDED = "landed"


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a receipt's readings; counts only once all of them have landed."""

    state: State
    accepted: int
    stored: int | None = None
    duplicates: int | None = None
    conflicts: int | None = None
    quarantined: int | None = None
    lost: int | None = None
    """In records the log deleted before they had landed, or an operator abandoned; only where there are any."""


class Receipts:
    """Makes receipts and answers for them."""

    def __init__(self, seal: Seal, pool: Connections, clock: Clock, ttl_s: float) -> None:
        self._seal = seal
        self._pool = pool
        self._clock = clock
        self._ttl_s = ttl_s
        self._watch = _Watch(pool)

    def make(self, receipt: Receipt) -> str:
        expires = int(self._clock.now_us() / 1e6 + self._ttl_s)
        head = _HEAD.pack(_FORMAT, receipt.source, receipt.organisation, expires)
        return self._seal.seal(head + b"".join([_PLACE.pack(*place) for place in receipt.places]))

    def read(self, text: str, organisation: bytes) -> Receipt:
        """Raises `ReceiptError`."""
        try:
            plain = self._seal.open(text)
        except BadSealError as error:
            raise ReceiptError from error
        form, source, owner, expires = _HEAD.unpack_from(plain)
        if form != _FORMAT or owner != organisation or expires * 1e6 < self._clock.now_us():
            raise ReceiptError
        places = [Place(*place) for place in _PLACE.iter_unpack(plain[_HEAD.size :])]
        return Receipt(source, owner, places)

    async def status(self, receipt: Receipt) -> Status:
        """Raises `UnavailableError`."""
        partitions = [place.partition for place in receipt.places]
        positions = [place.position for place in receipt.places]
        landed = await _fetch(self._pool, _LANDED, UUID(bytes=receipt.source), partitions, positions)
        if landed[0]["waiting"]:
            return Status(State.PENDING, receipt.accepted)
        counts = [place.accepted for place in receipt.places]
        rows = await _fetch(self._pool, _OUTCOMES, UUID(bytes=receipt.source), partitions, positions, counts)
        row = rows[0]
        exceptions = row["duplicates"] + row["conflicts"] + row["quarantined"] + row["lost"]
        return Status(
            State.LANDED,
            receipt.accepted,
            receipt.accepted - exceptions,
            row["duplicates"],
            row["conflicts"],
            row["quarantined"],
            row["lost"] or None,
        )

    async def wait(self, receipt: Receipt, timeout_s: float) -> Status:
        """The status once landed, or whatever it is after `timeout_s`. Raises `UnavailableError`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._watch.landed(receipt)
        return await self.status(receipt)


# Every position of a receipt has landed when the next one to land, of its partition, lies beyond it.
_LANDED: Final = """
    SELECT count(*) FILTER (WHERE l.position IS NULL OR l.position <= r.position) AS waiting
    FROM unnest($2::int[], $3::bigint[]) AS r (partition, position)
    LEFT JOIN log_positions l ON l.source = $1 AND l.partition = r.partition
"""

_OUTCOMES: Final = """
    SELECT coalesce(sum(o.duplicates), 0)::int AS duplicates, coalesce(sum(o.conflicts), 0)::int AS conflicts,
           coalesce(sum(CASE WHEN o.unreadable THEN r.accepted ELSE o.quarantined END), 0)::int AS quarantined,
           coalesce(sum(r.accepted) FILTER (WHERE EXISTS (
               SELECT FROM log_losses l WHERE l.source = $1 AND l.partition = r.partition
               AND r.position >= l.first_position AND r.position < l.end_position)), 0)::int AS lost
    FROM unnest($2::int[], $3::bigint[], $4::int[]) AS r (partition, position, accepted)
    LEFT JOIN outcomes o ON o.source = $1 AND o.partition = r.partition AND o.position = r.position
"""


class _Watch:
    """Follows the landed positions while somebody waits for them: one query for all waiters of a process."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._waiting: dict[Place, list[asyncio.Future[None]]] = defaultdict(list)
        self._task: asyncio.Task[None] | None = None

    async def landed(self, receipt: Receipt) -> None:
        """Returns when all of it has landed. Raises `UnavailableError` when too many wait already."""
        if len(self._waiting) >= _WAITERS_MAX:
            raise UnavailableError("too many requests wait for their readings to be stored")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in receipt.places]
        for place, future in zip(receipt.places, futures, strict=True):
            self._waiting[place].append(future)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow(UUID(bytes=receipt.source)), name="receipts watch")
        try:
            await asyncio.gather(*futures)
        finally:
            for place, future in zip(receipt.places, futures, strict=True):
                self._drop(place, future)

    def _drop(self, place: Place, future: "asyncio.Future[None]") -> None:
        futures = self._waiting.get(place, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            self._waiting.pop(place, None)

    async def _follow(self, source: UUID) -> None:
        while self._waiting:
            with suppress(UnavailableError):
                rows = await _fetch(self._pool, _POSITIONS, source)
                landed = {row["partition"]: row["position"] for row in rows}
                for place, futures in list(self._waiting.items()):
                    if landed.get(place.partition, 0) > place.position:
                        for future in futures:
                            if not future.done():
                                future.set_result(None)
            await asyncio.sleep(_POLL_S)


_POSITIONS: Final = "SELECT partition, position FROM log_positions WHERE source = $1"


async def _fetch(pool: Connections, query: str, *arguments: Any) -> list[Any]:
    return await ask(pool, query, *arguments, timeout_s=_QUERY_TIMEOUT_S)
