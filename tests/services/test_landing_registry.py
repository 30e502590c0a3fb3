"""Which series there are, and what a unit left out means, on a real database."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runtime.clock import SystemClock
from tests.databases import Database
from tests.landing_rig import NOW, Device, Rig, channel, open_rig, record, sqlite_url
from tests.support import run
from workers.landing.registry import Registry
from workers.landing.series import Found, Refusal, SeriesName

PLACES = 40


@asynccontextmanager
async def registry(rig: Rig) -> AsyncIterator[Registry]:
    """As a worker of its own has it."""
    opened = Registry(rig.postgres, rig.settings, SystemClock(), rig.metrics)
    try:
        yield opened
    finally:
        await opened.close()


def name(device: Device, metric: str, unit: str = "") -> SeriesName:
    return SeriesName(device.organisation.bytes, device.device.bytes, metric, "", unit)


def test_workers_together_do_not_pass_an_organisations_limit(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            devices = await rig.register(3, series_max=PLACES)
            async with registry(rig) as first, registry(rig) as second, registry(rig) as third:

                async def make(worker: Registry, device: Device) -> list[Found | Refusal]:
                    names = [name(device, f"m{number}") for number in range(PLACES)]
                    found = []
                    for start in range(0, PLACES, 4):
                        found += await worker.resolve(names[start : start + 4])
                    return found

                told = await asyncio.gather(*map(make, (first, second, third), devices))
            codes = Counter(getattr(one, "code", "made") for some in told for one in some)
            assert codes == {"made": PLACES, "series_limit": 2 * PLACES}
            assert await rig.value("SELECT count(*) FROM series") == PLACES

    run(test())


def test_two_organisations_at_once_hold_nobody_up(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            devices = [(await rig.register(series_max=5))[0] for _ in range(2)]
            async with registry(rig) as first, registry(rig) as second:
                forth = [name(device, f"m{number}") for device in devices for number in range(4)]
                back = [name(device, f"n{number}") for device in reversed(devices) for number in range(4)]
                told = await asyncio.gather(first.resolve(forth), second.resolve(back))
            assert Counter(type(one) for some in told for one in some) == {Found: 10, Refusal: 6}
            counts = await rig.fetch("SELECT count(*)::int FROM series GROUP BY organisation_id")
            assert counts == [(5,), (5,)]

    run(test())


def test_a_worker_that_stopped_while_it_made_series_holds_others_up_for_a_bounded_time(
    database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            async with registry(rig) as stopped, registry(rig) as other:
                connection = await stopped._connected()
                bound = await connection.fetchval("SHOW idle_in_transaction_session_timeout")
                assert bound == f"{rig.settings.landing_idle_timeout_s:.0f}s"
                await connection.execute("SET idle_in_transaction_session_timeout = '200ms'")
                transaction = connection.transaction()
                await transaction.start()
                await connection.execute(
                    "SELECT pg_advisory_xact_lock(hashtextextended('sluice series ' || $1::uuid, 0))",
                    device.organisation,
                )
                assert isinstance((await other.resolve([name(device, "power")]))[0], Found)

    run(test())


@pytest.mark.parametrize("apart", [False, True], ids=["one batch", "apart"])
@pytest.mark.parametrize("units", [["W", ""], ["", "W"]], ids=["unit first", "unit later"])
def test_a_reading_without_a_unit_is_in_the_series_own(
    any_database: Database, tmp_path: Path, units: list[str], apart: bool
) -> None:
    """The first unit that is reported is the series', also where readings without any came before."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            records = [
                record(device, channel("draught", [(NOW + at, 1.0)], unit=unit))
                for at, unit in enumerate([*units, "", "kW", "W"])
            ]
            if apart:
                for one in records:
                    await rig.land(one)
            else:
                await rig.land(*records)
            assert await rig.fetch("SELECT unit FROM series") == [("W",)]
            assert [time - NOW for _, _, time, _, _ in await rig.readings()] == [0, 1, 2, 4]
            assert await rig.fetch("SELECT code, position FROM quarantine") == [("unit_mismatch", 3)]

    run(test())


def test_channels_of_one_record_with_and_without_a_unit_are_one_series(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            for start in (0, 2):
                bare = channel("draught", [(NOW + start, 1.0)], unit="")
                await rig.append(record(device, bare, channel("draught", [(NOW + start + 1, 2.0)], unit="Pa")))
            equal = channel("draught", [(NOW + 4, 1.0)], unit="Pa"), channel("draught", [(NOW + 4, 1.0)], unit="")
            await rig.land(record(device, *equal))
            assert await rig.fetch("SELECT metric, unit FROM series") == [("draught", "Pa")]
            assert await rig.ledger() == (6, 5, 1, 0, 0)

    run(test())
