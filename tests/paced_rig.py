"""What the tests of the paced lane share: a lane beside a real log, senders with limits, and a clock moved by hand.

Left out: the log and what landing makes of it (`spool_rig`), and HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prometheus_client import CollectorRegistry

from ingest.limits import Cost, Limits, LimitSettings
from ingest.metrics import IngestMetrics
from ingest.paced.lane import Item, PacedLane
from ingest.paced.owners import Owner
from ingest.settings import PacedSettings
from ingest.spool.spool import Kept, Spool
from runtime.clock import ManualClock
from schemas.record import PG_EPOCH_US, encode
from tests.landing_rig import until
from tests.spool_rig import SpoolRig, record

#: The start of a minute, and of a day, of whoever's window begins with the clock's.
MIDNIGHT_US = 1_700_006_400_000_000
NO_LIMITS = {
    f"limit_{scope}_{kind}": 0
    for scope in ("device", "gateway", "organisation")
    for kind in ("requests_per_minute", "readings_per_minute", "bytes_per_day")
}


@dataclass
class Registry:
    """Stands for the database."""

    overrides: dict[bytes, tuple[int | None, ...]] = field(default_factory=dict)
    landed: dict[tuple[UUID, int], int] = field(default_factory=dict)
    ended: set[UUID] = field(default_factory=set)
    is_away: bool = False

    async def fetch(self, query: str, ids: Any, *more: Any) -> list[Any]:
        if self.is_away:
            raise ConnectionRefusedError
        if "spool_ends" in query:
            self.ended.add(ids)
            return []
        if "spool_positions" in query:
            return [{"partition": slot, "next": end} for (spool, slot), end in self.landed.items() if spool == ids]
        return [{"subject": subject, "limits": self.overrides.get(subject.bytes)} for subject in ids]


def sender(number: int, *, organisation: bytes = b"o" * 16, kind: str = "device") -> Owner:
    """With its limits as the settings say."""
    return Owner(kind, organisation, number.to_bytes(16, "big"))


@dataclass
class LaneRig:
    """A log in a directory, and lanes that use it one after the other."""

    rig: SpoolRig
    clock: ManualClock = field(default_factory=lambda: ManualClock(MIDNIGHT_US))
    registry: Registry = field(default_factory=Registry)
    metrics: CollectorRegistry = field(default_factory=CollectorRegistry)
    limits: Limits | None = None

    @classmethod
    async def make(cls, directory: Path) -> "LaneRig":
        return cls(await SpoolRig.make(directory))

    @property
    def directory(self) -> Path:
        return self.rig.directory / "paced"

    def files(self, ending: str = "*") -> list[str]:
        return sorted(path.name.partition(".")[2] for path in self.directory.glob(f"*.{ending}"))

    @asynccontextmanager
    async def lane(self, log: Any, spool: Spool | None = None, **settings: Any) -> AsyncIterator[PacedLane]:
        """`settings` are those of limits and of the lane."""
        limited = NO_LIMITS | {name: settings.pop(name) for name in list(settings) if name.startswith("limit_")}
        self.limits = Limits(LimitSettings(**limited), self.clock, self.rig.directory / "limits")
        self.metrics = CollectorRegistry()
        lane = PacedLane(
            log=log,
            spool=spool,
            limits=self.limits,
            pool=self.registry,
            directory=self.directory,
            settings=PacedSettings(**settings),
            log_settings=self.rig.log_settings,
            clock=self.clock,
            metrics=IngestMetrics(self.metrics),
        )
        await lane.start()
        try:
            yield lane
        finally:
            await lane.close()
            self.limits.close()

    def item(self, number: int, partition: int = 0, *, readings: int = 1, size: int = 100) -> Item:
        body = encode(record(number, received_us=self.clock.now_us() - PG_EPOCH_US))
        return Item(partition, Cost(1, readings, size), body)

    async def paced(self, lane: PacedLane, whose: Owner, numbers: Sequence[int], **item: Any) -> list[Kept]:
        """A request each."""
        return [await one for one in [await self._take(lane, whose, number, item) for number in numbers]]

    async def _take(self, lane: PacedLane, whose: Owner, number: int, item: dict[str, Any]) -> "asyncio.Future[Kept]":
        ((_, future),) = await lane.take(whose, [self.item(number, **item)])
        return future


async def depth_of(lane: PacedLane) -> int:
    return sum(file.depth for file in lane._files)


async def left(lane: PacedLane, count: int) -> None:
    """Wait until so many records wait, and see that no more are let in than that."""

    async def reached() -> bool:
        return await depth_of(lane) <= count

    await until(reached)
    for _ in range(20):  # polls
        await asyncio.sleep(0.005)
    assert await depth_of(lane) == count
