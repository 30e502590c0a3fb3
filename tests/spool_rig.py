"""What the tests of the spool share: a real log that can be taken away, records, and what landing would take of it.

Left out: what is expected of an outage.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prometheus_client import CollectorRegistry

from ingest.metrics import IngestMetrics
from ingest.settings import SpoolSettings
from ingest.spool.ends import End, unsaid
from ingest.spool.spool import Kept, Spool
from runtime.clock import Clock, SystemClock
from runtime.errors import OutcomeUnknownError, SluiceError, UnavailableError
from runtime.log import Expected, Log, LogSettings, create_log, open_log
from schemas.record import NOBODY, PG_EPOCH_US, PLAIN_VERSION, Channel, Record, decode, encode
from tests.landing_rig import until

PARTITIONS = 4


class Faulty:
    """A real log that can be taken away and brought back."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.partitions = log.partitions
        self.trouble: str | None = None
        self.failures: Iterator[type[SluiceError] | None] = iter(())
        """What becomes of each of the next calls of `append_all`; None for those that succeed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        if self.trouble is not None:
            return _failed(UnavailableError(self.trouble))
        return self._log.append(partition, body)

    def append_all(self, partition: int, bodies: list[bytes]) -> "asyncio.Future[int]":
        failure = UnavailableError if self.trouble is not None else next(self.failures, None)
        if failure is None:
            return self._log.append_all(partition, bodies)
        if failure is OutcomeUnknownError:  # written, and nobody knows
            self._log.append_all(partition, bodies)
        return _failed(failure("as the test has it"))


def _failed(error: Exception) -> "asyncio.Future[int]":
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


@dataclass
class SpoolRig:
    """A log in `directory`, and spools that use it."""

    directory: Path
    log_settings: LogSettings
    expected: Expected
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    @property
    def spool_directory(self) -> Path:
        return self.directory / "spool"

    @classmethod
    async def make(cls, directory: Path, **settings: Any) -> "SpoolRig":
        log_settings = LogSettings(log_url=f"sqlite:///{directory}/log", log_linger_ms=0, **settings)
        source = uuid4()
        identity = await create_log(log_settings, source=source, name="log", partitions=PARTITIONS)
        return cls(directory, log_settings, Expected(source, "log", identity, PARTITIONS))

    @asynccontextmanager
    async def log(self) -> AsyncIterator[Faulty]:
        log = await open_log(self.log_settings, self.expected, client_id="test")
        try:
            yield Faulty(log)
        finally:
            await log.close()

    @asynccontextmanager
    async def spool(
        self,
        log: Any,
        clock: Clock | None = None,
        directory: str = "spool",
        elders: Sequence[str] = (),
        end: End = unsaid,
        **settings: Any,
    ) -> AsyncIterator[Spool]:
        self.registry = CollectorRegistry()  # of the newest
        spool = Spool(
            log=log,
            directory=self.directory / directory,
            elders=[self.directory / elder for elder in elders],
            settings=SpoolSettings(**settings),
            log_settings=self.log_settings,
            clock=clock or SystemClock(),
            metrics=IngestMetrics(self.registry),
            end=end,
        )
        await spool.start()
        try:
            yield spool
        finally:
            await spool.close()

    def files(self, ending: str = "*") -> list[str]:
        if not self.spool_directory.exists():
            return []
        return sorted(path.name.partition(".")[2] for path in self.spool_directory.glob(f"*.{ending}"))


def record(number: int, *, received_us: int | None = None) -> Record:
    received = SystemClock().now_us() - PG_EPOCH_US if received_us is None else received_us
    channel = Channel("power", "", "W", received.to_bytes(8, "big", signed=True), bytes(8))
    ids = number.to_bytes(16, "big"), b"o" * 16, b"d" * 16
    return Record(PLAIN_VERSION, *ids, received, "http", f"request-{number}", [channel])


def number_of(found: Record) -> int:
    return int.from_bytes(found.record_id, "big")


async def drained(spool: Spool) -> None:
    async def empty() -> bool:
        return not any(spool.holds(partition) for partition in range(PARTITIONS))

    await until(empty)


async def spooled(spool: Spool, count: int, *, first: int = 0) -> list[Kept]:
    futures = [spool.append(number % PARTITIONS, encode(record(number))) for number in range(first, first + count)]
    return list(await asyncio.gather(*futures))


@dataclass
class Landed:
    """What landing would make of a log."""

    numbers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By partition of the log, the records that land there, in order."""
    records: list[Record] = field(default_factory=list)
    lost: int = 0
    repeats: int = 0
    next: dict[tuple[UUID, int], int] = field(default_factory=lambda: defaultdict(int))

    def take(self, partition: int, found: Record) -> None:
        origin = found.origin
        if origin is not None:
            key = UUID(bytes=origin.spool), origin.partition
            if origin.through <= self.next[key]:
                self.repeats += 1
                return
            assert origin.sequence <= self.next[key], f"a jump from {self.next[key]} to {origin.sequence}"
            before, self.next[key] = self.next[key], origin.through
            if found.is_gap:
                assert (found.organisation, found.channels) == (NOBODY, [])
                self.lost += origin.through - before
                return
        self.numbers[partition].append(number_of(found))
        self.records.append(found)

    @property
    def all(self) -> list[int]:
        return sorted(number for numbers in self.numbers.values() for number in numbers)


async def land(log: Any) -> Landed:
    """Everything that stands in the log, taken by landing's rules; fails at a jump."""
    landed = Landed()
    bounds: Mapping[int, Any] = await log.bounds()
    reader = log.reader()
    positions = {partition: where.start for partition, where in bounds.items()}
    await reader.assign(positions)
    while any(positions[partition] < bounds[partition].end for partition in bounds):
        for part in await reader.read(bytes_max=16_000_000, wait_s=1.0):
            positions[part.partition] = part.next_position
            for body in part.bodies:
                landed.take(part.partition, decode(body))
    await reader.close()
    return landed
