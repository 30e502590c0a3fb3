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
_SPOOL_COUNT: Final = struct.Struct(">B")
_SPOOLED: Final = struct.Struct(">BHQI")
_SPOOL_BYTES: Final = 16
#: Every record in the log itself; or some of them in spools, whose ids stand before the places.
_FORMAT: Final = 1
_SPOOL_FORMAT: Final = 2
_POLL_S: Final = 0.02
_QUERY_TIMEOUT_S: Final = 3.0
_WAITERS_MAX: Final = 10_000


class Place(NamedTuple):
    """Where a record stands in the log or in a spool, and how many accepted readings it has."""

    partition: int
    position: int
    accepted: int
    spool: bytes = b""
    """The spool's id; empty for the log."""


class Receipt(NamedTuple):
    """The records of one request."""

    source: bytes
    """The log's generation."""
    organisation: bytes
    places: list[Place]

    @property
    def accepted(self) -> int:
        return sum([place.accepted for place in self.places])

    @property
    def sources(self) -> list[UUID]:
        """Of each place: the log's generation or the spool."""
        return [UUID(bytes=place.spool or self.source) for place in self.places]


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
    erased: int | None = None
    """Dropped in landing, or taken out of the quarantine, with the site they were of; only where there are any."""


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
        places = receipt.places
        packed = b"".join(
            [
                _PLACE.pack(partition, position, accepted)
                for partition, position, accepted, spool in places
                if not spool
            ]
        )
        form = _FORMAT
        if len(packed) != len(places) * _PLACE.size:
            form, packed = _SPOOL_FORMAT, _pack_spooled(places)
        return self._seal.seal(_HEAD.pack(form, receipt.source, receipt.organisation, expires) + packed)

    def read(self, text: str, organisation: bytes) -> Receipt:
        """Raises `ReceiptError`."""
        try:
            plain = self._seal.open(text)
        except BadSealError as error:
            raise ReceiptError from error
        form, source, owner, expires = _HEAD.unpack_from(plain)
        if owner != organisation or expires * 1e6 < self._clock.now_us():
            raise ReceiptError
        if form == _SPOOL_FORMAT:
            return Receipt(source, owner, _unpack_spooled(plain[_HEAD.size :]))
        if form != _FORMAT:
            raise ReceiptError
        places = [Place(*place) for place in _PLACE.iter_unpack(plain[_HEAD.size :])]
        return Receipt(source, owner, places)

    async def status(self, receipt: Receipt) -> Status:
        """Raises `UnavailableError`."""
        sources = receipt.sources
        partitions = [place.partition for place in receipt.places]
        positions = [place.position for place in receipt.places]
        landed = await _fetch(self._pool, _LANDED, sources, partitions, positions)
        if landed[0]["waiting"]:
            return Status(State.PENDING, receipt.accepted)
        counts = [place.accepted for place in receipt.places]
        rows = await _fetch(self._pool, _OUTCOMES, sources, partitions, positions, counts)
        row = rows[0]
        exceptions = row["duplicates"] + row["conflicts"] + row["quarantined"] + row["lost"] + row["erased"]
        return Status(
            State.LANDED,
            receipt.accepted,
            receipt.accepted - exceptions,
            row["duplicates"],
            row["conflicts"],
            row["quarantined"],
            row["lost"] or None,
            row["erased"] or None,
        )

    async def wait(self, receipt: Receipt, timeout_s: float) -> Status:
        """The status once landed, or whatever it is after `timeout_s`. Raises `UnavailableError`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._watch.landed(receipt)
        return await self.status(receipt)


def _pack_spooled(places: list[Place]) -> bytes:
    """The spools' ids, then each place with the number of its spool, from 1, or 0 for the log."""
    spools = sorted({place.spool for place in places} - {b""})
    numbers = {b"": 0} | {spool: number for number, spool in enumerate(spools, 1)}
    packed = [_SPOOLED.pack(numbers[place.spool], *place[:3]) for place in places]
    return _SPOOL_COUNT.pack(len(spools)) + b"".join(spools + packed)


def _unpack_spooled(packed: bytes) -> list[Place]:
    (count,) = _SPOOL_COUNT.unpack_from(packed)
    end = _SPOOL_COUNT.size + count * _SPOOL_BYTES
    spools = [b"", *(packed[at : at + _SPOOL_BYTES] for at in range(_SPOOL_COUNT.size, end, _SPOOL_BYTES))]
    return [
        Place(partition, position, accepted, spools[number])
        for number, partition, position, accepted in _SPOOLED.iter_unpack(packed[end:])
    ]


# Every position of a receipt has landed when the next one to land, of its partition, lies beyond it.
_LANDED: Final = """
    SELECT count(*) FILTER (WHERE coalesce(l.position, s.next, 0) <= r.position) AS waiting
    FROM unnest($1::uuid[], $2::int[], $3::bigint[]) AS r (source, partition, position)
    LEFT JOIN log_positions l ON l.source = r.source AND l.partition = r.partition
    LEFT JOIN spool_positions s ON s.spool = r.source AND s.partition = r.partition
"""

_OUTCOMES: Final = """
    SELECT coalesce(sum(o.duplicates), 0)::int AS duplicates, coalesce(sum(o.conflicts), 0)::int AS conflicts,
           coalesce(sum(o.erased), 0)::int AS erased,
           coalesce(sum(CASE WHEN o.unreadable THEN r.accepted ELSE o.quarantined END), 0)::int AS quarantined,
           coalesce(sum(r.accepted) FILTER (WHERE EXISTS (
               SELECT FROM log_losses l WHERE l.source = r.source AND l.partition = r.partition
               AND r.position >= l.first_position AND r.position < l.end_position)
           OR EXISTS (
               SELECT FROM spool_losses l WHERE l.spool = r.source AND l.partition = r.partition
               AND r.position >= l.first_sequence AND r.position < l.end_sequence)), 0)::int AS lost
    FROM unnest($1::uuid[], $2::int[], $3::bigint[], $4::int[]) AS r (source, partition, position, accepted)
    LEFT JOIN outcomes o ON o.source = r.source AND o.partition = r.partition AND o.position = r.position
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
            self._task = asyncio.create_task(self._follow(receipt.source), name="receipts watch")
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

    async def _follow(self, source: bytes) -> None:
        while self._waiting:
            with suppress(UnavailableError):
                sources = {UUID(bytes=place.spool or source) for place in self._waiting}
                rows = await _fetch(self._pool, _POSITIONS, sources)
                landed = {(row["source"].bytes, row["partition"]): row["position"] for row in rows}
                for place, futures in list(self._waiting.items()):
                    if landed.get((place.spool or source, place.partition), 0) > place.position:
                        for future in futures:
                            if not future.done():
                                future.set_result(None)
            await asyncio.sleep(_POLL_S)


_POSITIONS: Final = """
    SELECT source, partition, position FROM log_positions WHERE source = ANY ($1)
    UNION ALL SELECT spool, partition, next FROM spool_positions WHERE spool = ANY ($1)
"""


async def _fetch(pool: Connections, query: str, *arguments: Any) -> list[Any]:
    return await ask(pool, query, *arguments, timeout_s=_QUERY_TIMEOUT_S)
