"""Making records durable: in the log, or in the spool while that cannot be reached or has older ones waiting.

Nothing is taken while the log is about to delete what has not landed. Left out: what is answered, and the spool.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Final

import msgspec

from ingest.admit import Admitted
from ingest.formats.shape import Submission
from ingest.limits import Cost, Sender
from ingest.metrics import IngestMetrics
from ingest.paced.lane import Item, PacedLane
from ingest.receipts import Place
from ingest.retention import RetentionGuard
from ingest.spool.spool import Kept, Spool
from runtime.errors import OutcomeUnknownError, OverloadedError, SluiceError, UnavailableError
from runtime.log.port import Log
from schemas import record as records
from schemas.topics import partition_of

FAILURES: Final = (OverloadedError, UnavailableError, OutcomeUnknownError)

_DURABLE: Final = ("durable",)
_NOT_WRITTEN: Final = ("not_written",)
_UNKNOWN: Final = ("unknown",)


class RecordTooLargeError(SluiceError):
    """One device's readings of a request fill more than a record may."""


class Part(msgspec.Struct):
    """One device's part of a request: as it came, with the indexes of first measurements, and judged."""

    device: bytes
    submissions: list[tuple[int, Submission]]
    admitted: Admitted


class Durable(msgspec.Struct):
    """What became of a request's records."""

    places: list[Place] = []
    accepted: int = 0
    spooled: bool = False
    failed: list[tuple[Part, Exception]] = []
    paced_until_us: int | None = None
    """When records of the paced lane should be in the log, µs since 1970; None for others."""

    def add(self, place: Place) -> None:
        if place.spool:
            self.spooled = True
        self.places.append(place)
        self.accepted += place.accepted


class Keeper:
    """What one process keeps records with; `start` begins, `stop` ends it."""

    def __init__(
        self,
        log: Log,
        spool: Spool | None,
        guard: RetentionGuard | None,
        metrics: IngestMetrics,
        lane: PacedLane | None = None,
    ) -> None:
        self._log = log
        self._spool = spool
        self.lane = lane
        self._paced = 0
        self._guard = guard
        self._metrics = metrics
        self._guarding: asyncio.Task[None] | None = None
        self.source = log.source.bytes
        # A record that goes through the spool is told its place there before it goes to the log.
        self._record_bytes_max = log.body_bytes_max - records.ORIGIN_BYTES_MAX

    async def start(self) -> None:
        if self._spool is not None:
            await self._spool.start()
        if self.lane is not None:
            await self.lane.start()
        if self._guard is not None:
            self._guarding = asyncio.create_task(self._guard.run(), name="log retention")

    async def stop(self) -> None:
        if self._guarding is not None:
            self._guarding.cancel()
            await asyncio.gather(self._guarding, return_exceptions=True)
        if self.lane is not None:
            await self.lane.close()
        if self._spool is not None:
            await self._spool.close()

    @property
    def queued_bytes(self) -> int:
        return self._log.queued_bytes

    @property
    def trouble(self) -> str | None:
        """Why nothing can be made durable right now; None when it can."""
        if self._guard is not None and self._guard.trouble is not None:
            return self._guard.trouble
        trouble = self._log.trouble
        if trouble is None or self._spool is None:
            return trouble
        refusal = self._spool.refusal
        return None if refusal is None else f"{trouble}; {refusal}"

    def keep(self, parts: Sequence[Part]) -> Awaitable[Durable]:
        """Where each record stands, or why it may not. Raises `RecordTooLargeError` before any is kept."""
        # Nearly all requests are one record, which needs none of what several do.
        if len(parts) == 1:
            return self._keep_one(parts[0], self._encode(parts[0]))
        return self._keep_several([(part, self._encode(part)) for part in parts])

    def _encode(self, part: Part) -> bytes:
        body = records.encode(part.admitted.record)
        if len(body) > self._record_bytes_max:
            message = f"the readings of one device fill {len(body)} bytes, up to {self._record_bytes_max} fit"
            raise RecordTooLargeError(message)
        return body

    async def _keep_one(self, part: Part, body: bytes) -> Durable:
        partition, future, direct = self._append(part, body, self._log.trouble is not None)
        try:
            place = _place(partition, await future, part)
            durable = Durable([place], place.accepted, bool(place.spool))
        except FAILURES as error:
            durable = Durable()
            again = self._rescue(partition, part, body, error) if direct else None
            if again is None:
                durable.failed.append((part, error))
            else:
                await _add_rescued(durable, part, partition, error, again)
        self._count(durable)
        return durable

    async def _keep_several(self, encoded: list[tuple[Part, bytes]]) -> Durable:
        spooling = self._log.trouble is not None
        appended = [self._append(part, body, spooling) for part, body in encoded]
        durable = Durable()
        rescued: list[tuple[Part, int, Exception, asyncio.Future[Kept]]] = []
        for (part, body), (partition, future, direct) in zip(encoded, appended, strict=True):
            try:
                durable.add(_place(partition, await future, part))
            except FAILURES as error:
                again = self._rescue(partition, part, body, error) if direct else None
                if again is None:
                    durable.failed.append((part, error))
                else:
                    rescued.append((part, partition, error, again))
        for part, partition, failure, again in rescued:
            await _add_rescued(durable, part, partition, failure, again)
        self._count(durable)
        return durable

    async def pace(self, lane: PacedLane, sender: Sender, parts: Sequence[Part], cost: Cost) -> Durable:
        """Where each record stands in the paced lane, or why it may not.

        Raises `RecordTooLargeError` and `LaneFullError`.
        """
        durable = Durable()
        # A gateway's devices wait apart from each other: were it always the same one that waits for the request to be
        # permitted, the others would not be paced at all.
        self._paced += 1
        shares = _shares(cost, parts, self._paced)
        items = [
            Item(partition_of(part.device, self._log.partitions), share, self._encode(part))
            for part, share in zip(parts, shares, strict=True)
        ]
        try:
            taken = await lane.take(sender, items)
        except UnavailableError as error:
            durable.failed = [(part, error) for part in parts]
        else:
            for part, (slot, future) in zip(parts, taken, strict=True):
                try:
                    durable.add(_place(slot, await future, part))
                except FAILURES as error:
                    durable.failed.append((part, error))
        durable.paced_until_us = lane.until_us(sender)
        self._count(durable)
        return durable

    def _append(
        self, part: Part, body: bytes, spooling: bool
    ) -> "tuple[int, asyncio.Future[int] | asyncio.Future[Kept], bool]":
        """The record's partition, the future of its position, and whether that is one in the log itself.

        The future is a failed one where the record was not even queued.
        """
        partition = partition_of(part.device, self._log.partitions)
        if self._spool is not None and (spooling or self._spool.holds(partition)):
            return partition, self._spool.append(partition, body), False
        try:
            return partition, self._log.append(partition, body), True
        except (OverloadedError, UnavailableError) as error:
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return partition, future, True

    def _rescue(self, partition: int, part: Part, body: bytes, error: Exception) -> "asyncio.Future[Kept] | None":
        """What the log failed to take goes to the spool, if there is one that does."""
        if self._spool is None:
            return None
        return self._spool.rescue(partition, part.admitted.record, body, error)

    def _count(self, durable: Durable) -> None:
        for _, error in durable.failed:
            self._metrics.records.add(_UNKNOWN if isinstance(error, OutcomeUnknownError) else _NOT_WRITTEN)
        if durable.places:
            self._metrics.records.add(_DURABLE, len(durable.places))


def _shares(cost: Cost, parts: Sequence[Part], turn: int) -> list[Cost]:
    """Of each part by its readings; what belongs to none, as the request itself, is one part's, each in its turn."""
    counts = [sum(len(submission.measurements) for _, submission in part.submissions) for part in parts]
    shares = [Cost(0, count, cost.bytes * count // cost.readings) for count in counts]
    rest = (total - sum(amounts) for total, amounts in zip(cost, zip(*shares, strict=True), strict=True))
    turn %= len(parts)
    shares[turn] = Cost(*(amount + more for amount, more in zip(shares[turn], rest, strict=True)))
    return shares


async def _add_rescued(
    durable: Durable, part: Part, partition: int, failure: Exception, again: "asyncio.Future[Kept]"
) -> None:
    try:
        durable.add(_place(partition, await again, part))
    except FAILURES:
        durable.failed.append((part, failure))


def _place(partition: int, kept: int | Kept, part: Part) -> Place:
    if isinstance(kept, int):
        return Place(partition, kept, part.admitted.accepted)
    return Place(partition, kept.position, part.admitted.accepted, kept.spool)
