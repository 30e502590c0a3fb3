"""Reading ahead and landing side by side: what waits for what, and what is never dropped.

The log, the registry and the database are stand-ins here; `tests/services` and `tests/faults` have the real ones.
"""

import asyncio
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pytest

from runtime.clock import ManualClock
from runtime.ids import uuid7
from runtime.log.port import BehindRetentionError, Slice
from schemas.record import PLAIN_VERSION, Channel, Record, encode
from tests.support import run
from workers.landing.apart import Apart
from workers.landing.holding import Holding
from workers.landing.leases import Lease
from workers.landing.pipeline import Pipeline
from workers.landing.plan import Limits, Plan
from workers.landing.registry import Registry
from workers.landing.series import Found, SeriesName
from workers.landing.tombstones import Tombstones
from workers.settings import LandingSettings

NOW = 800_000_000_000_000
ORGANISATION, DEVICE = uuid7().bytes, uuid7().bytes


def body(at: int) -> bytes:
    channel = Channel("power", "", "W", struct.pack(">q", NOW + at), struct.pack(">d", at))
    return encode(Record(PLAIN_VERSION, uuid7().bytes, ORGANISATION, DEVICE, NOW, "http", "request", [channel]))


Step = list[Slice] | Exception | asyncio.Event


class ScriptedReader:
    """Gives what the script has, in order; raises what is an error, waits for what is an event; then nothing."""

    def __init__(self, *script: Step) -> None:
        self._script = list(script)
        self.assigned: list[dict[int, int]] = []
        self.reads = 0

    async def assign(self, positions: Mapping[int, int]) -> None:
        self.assigned.append(dict(positions))

    async def read(self, *, bytes_max: int, wait_s: float) -> list[Slice]:
        self.reads += 1
        if not self._script:
            await asyncio.sleep(wait_s)
            return []
        found = self._script.pop(0)
        if isinstance(found, asyncio.Event):
            await found.wait()
            return []
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None: ...


class KnowsAll:
    """A registry that has every series and every organisation."""

    def __init__(self) -> None:
        self.limits = {ORGANISATION: Limits(400 * 86_400_000_000, 1_000)}

    async def refresh(self) -> None: ...

    async def learn(self, organisations: Any) -> None: ...

    async def has_hypertables(self) -> bool:
        return True

    async def resolve(self, names: Sequence[SeriesName]) -> list[Found]:
        return [Found(number, True) for number, _ in enumerate(names, 1)]


class Landing:
    """Takes plans; `gate` holds them up."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.plans: list[Plan] = []

    async def __call__(self, plan: Plan) -> None:
        self.begun.set()
        await self.gate.wait()
        self.plans.append(plan)

    @property
    def positions(self) -> list[tuple[int, int]]:
        return [(part.expected, part.position) for plan in self.plans for part in plan.parts.values()]


def pipeline(reader: ScriptedReader, landing: Landing, records_max: int = 100) -> Pipeline:
    holdings = {0: Holding(Lease(0, None), is_clean=True)}
    registry = cast("Registry", KnowsAll())
    settings = LandingSettings(landing_batch_wait_ms=0, landing_batch_records_max=records_max)
    unused = cast("Any", None)
    known: Any = {"clock": ManualClock(), "tombstones": Tombstones()}
    apart = Apart(holdings, registry, settings, land=unused, trial=unused, reject=unused, **known)
    return Pipeline(holdings, reader, registry, settings, land=landing, apart=apart, **known)


async def turn_until(condition: Callable[[], bool]) -> None:
    """Let the others run until it holds; `run` bounds how long."""
    while not condition():  # noqa: ASYNC110 - nothing tells of it but asking
        await asyncio.sleep(0)


def slices(first: int, count: int) -> list[Slice]:
    return [Slice(0, first, [body(at) for at in range(first, first + count)])]


def test_one_plan_grows_while_another_is_written() -> None:
    async def test() -> None:
        landing = Landing()
        running = pipeline(ScriptedReader(slices(0, 1), landing.begun, slices(1, 2), slices(3, 3)), landing)
        task = asyncio.create_task(running.run())
        await turn_until(lambda: running.growing is not None and running.growing.records == 5)
        landing.gate.set()
        await turn_until(lambda: len(landing.plans) == 2)
        running.end()
        await task
        assert landing.positions == [(0, 1), (1, 6)]
        assert not any(plan.suspects.times for plan in landing.plans)

    run(test())


def test_reading_stops_while_a_full_plan_waits() -> None:
    async def test() -> None:
        landing = Landing()
        reader = ScriptedReader(slices(0, 3), slices(3, 3), slices(6, 3))
        running = pipeline(reader, landing, records_max=2)
        task = asyncio.create_task(running.run())
        await landing.begun.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert reader.reads == 2
        assert running.growing is not None
        assert running.growing.records == 2
        landing.gate.set()
        await turn_until(lambda: sum(plan.records for plan in landing.plans) == 9)
        running.end()
        await task
        assert max(plan.records for plan in landing.plans) == 2

    run(test())


@pytest.mark.parametrize(
    "gap", [BehindRetentionError(0, 6, 9), slices(9, 1)], ids=["the log says so", "positions are missing"]
)
def test_what_was_read_before_a_gap_lands_before_it_is_told(gap: Any) -> None:
    async def test() -> None:
        landing = Landing()
        running = pipeline(ScriptedReader(slices(0, 1), landing.begun, slices(1, 5), gap), landing)
        task = asyncio.create_task(running.run())
        await landing.begun.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        landing.gate.set()
        with pytest.raises(BehindRetentionError) as told:
            await task
        assert (told.value.position, told.value.start) == (6, 9)
        assert landing.positions == [(0, 1), (1, 6)]

    run(test())


def test_a_failure_ends_it_with_what_it_met() -> None:
    async def test() -> None:
        async def fail(plan: Plan) -> None:
            raise ConnectionError("gone")

        landing = Landing()
        running = pipeline(ScriptedReader(slices(0, 1)), landing)
        running._land = fail
        with pytest.raises(ConnectionError):
            await running.run()
        assert running.failed is not None
        assert running.failed.records == 1

    run(test())
