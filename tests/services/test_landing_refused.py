"""What the database refuses for its content stands alone in quarantine, and holds nobody else up.

The refusals are real ones: constraints and triggers that are put on the tables beside landing's own.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest
from msgspec.structs import replace

from runtime.clock import SystemClock
from runtime.ids import uuid7
from schemas.record import VERSION, Channel, Idempotency, Origin, Quality, Record
from tests.databases import Database
from tests.landing_rig import DAY, NOW, Device, Rig, channel, count, open_rig, record, sqlite_url, until
from tests.support import run
from workers.landing.failures import PoisonFloodError
from workers.settings import LandingSettings
from workers.verify.reading import Span
from workers.verify.run import Verification
from workers.verify.settings import VerifySettings
from workers.verify.store import ALWAYS, NEVER

BAD = -666.5


async def refuse(rig: Rig, condition: str = f"value <> {BAD}") -> None:
    await execute(rig, f"ALTER TABLE readings ADD CONSTRAINT fault CHECK ({condition})")


async def execute(rig: Rig, statement: str) -> None:
    async with rig.superuser() as connection:
        await connection.execute(statement)


async def differences(rig: Rig) -> list[object]:
    """What `sluice verify` finds."""
    found: list[object] = []
    await Verification(
        rig.postgres,
        VerifySettings(verify_rate=0),
        LandingSettings(),
        rig.log,
        Span(NEVER, ALWAYS, None),
        clock=SystemClock(),
        emit=found.append,
        say=lambda text: None,
    ).run()
    return found


def power(*readings: tuple[int, float], unit: str = "W", quality: int = 0) -> Channel:
    return channel("power", readings, unit=unit, quality=quality)


def each(device: Device, values: Sequence[float], first: int = 0) -> list[Record]:
    """A record a value, each with its own time."""
    return [record(device, power((NOW + at, value))) for at, value in enumerate(values, first)]


async def position(rig: Rig, partition: int) -> int:
    query = "SELECT position FROM log_positions WHERE partition = $1 AND source = $2"
    return int(await rig.value(query, partition, rig.log.source))


async def rejected(rig: Rig) -> list[int]:
    """The positions of the culprits, in order."""
    rows = await rig.fetch("SELECT position FROM quarantine WHERE code = 'rejected_by_store' ORDER BY 1")
    return [at for (at,) in rows]


@pytest.mark.parametrize("pattern", ["none first", "every second", "all", "one in many", "the last"])
def test_every_culprit_stands_alone(any_database: Database, tmp_path: Path, pattern: str) -> None:
    """With new series, duplicates, conflicts and readings that move on around it, in a store that verifies."""
    bad = {
        "none first": [3, 4, 5, 11],
        "every second": [*range(0, 40, 2)],
        "all": [*range(40)],
        "one in many": [29],
        "the last": [39],
    }[pattern]

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            devices = await rig.register(3, partition=0)
            await refuse(rig)
            records = [
                record(
                    devices[at % 3],
                    power((NOW + at, BAD if at in bad else float(at))),
                    channel("load", [(NOW + at // 6, 1.0)]),  # met again by the second after it, of this device
                    channel("mode", [(NOW, "eco")], unit="", quality=Quality.TIME_STAMPED),
                )
                for at in range(40)
            ]
            await rig.land(*records)
            assert await rejected(rig) == sorted(bad * 3)
            good = 40 - len(bad)
            received, _, _, _, quarantined = await rig.ledger()
            assert (received, quarantined) == (120, 3 * len(bad))
            values = [value for metric, _, _, value, _ in await rig.readings() if metric == "power"]
            assert sorted(values) == [float(at) for at in range(40) if at not in bad]
            assert await rig.value("SELECT count(*) FROM text_readings") == good
            assert await differences(rig) == []

    run(test())


def test_a_flood_of_refused_records_lets_others_land_in_between(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=3) as rig:
            (bad,) = await rig.register(partition=0)
            others = [(await rig.register(partition=partition))[0] for partition in (1, 2)]
            await refuse(rig)
            flood = each(bad, [BAD if at % 2 else float(at) for at in range(2_000)])
            await rig.append(*flood)
            seen = []
            async with rig.worker():
                for at in range(5):
                    await rig.append(*(record(other, power((NOW + at, 1.0))) for other in others))
                    await until(partial(landed_beside, rig, at + 1))
                    seen.append(await position(rig, 0))
                await rig.landed()
            assert seen[0] < 2_000  # they did not wait for all of it
            assert await rejected(rig) == [*range(1, 2_000, 2)]
            assert await rig.ledger() == (2_010, 1_010, 0, 0, 1_000)
            assert count(rig.metrics.rejected) == 1_000
            told = [one for one in caplog.records if "the database refuses records" in one.getMessage()]
            assert sum(vars(one)["records"] for one in told) == 1_000
            assert len(told) < 100
            assert vars(told[0])["position"] == 1

    run(test())


async def landed_beside(rig: Rig, at: int) -> bool:
    return await position(rig, 1) >= at and await position(rig, 2) >= at


def test_what_is_read_before_and_behind_culprits_stays_in_order(database: Database, tmp_path: Path) -> None:
    """The partition goes back to the others, and later records meet those that landed by themselves."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1, keep_landed_h=1) as rig:
            (device,) = await rig.register()
            await refuse(rig)
            async with rig.worker():
                for turn in range(6):
                    values = [float(at) for at in range(10)]
                    if turn == 1:
                        values[4] = BAD
                    await rig.append(*each(device, values, first=10 * turn), *each(device, values, first=10 * turn))
                    await rig.landed()
            received, stored, duplicates, conflicts, quarantined = await rig.ledger()
            assert (received, stored, duplicates, conflicts, quarantined) == (120, 59, 59, 0, 2)
            assert count(rig.metrics.retries.labels("contention")) == 0
            assert await differences(rig) == []

    run(test())


def test_a_constraint_that_is_checked_at_commit(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            await execute(
                rig,
                "CREATE FUNCTION refuse_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " RAISE check_violation USING MESSAGE = 'refused at last'; END $$;"
                "CREATE CONSTRAINT TRIGGER fault AFTER INSERT ON outcomes DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW WHEN (NEW.conflicts > 0) EXECUTE FUNCTION refuse_late()",
            )
            values = [float(at) for at in range(20)]
            await rig.land(*each(device, values), *each(device, [7.5], first=7), *each(device, [1.0], first=30))
            assert await rejected(rig) == [20]
            assert await rig.ledger() == (22, 21, 0, 0, 1)

    run(test())


def test_records_that_are_refused_together_only(database: Database, tmp_path: Path) -> None:
    """Nobody is at fault: they land in smaller batches."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1) as rig:
            (device,) = await rig.register()
            await execute(
                rig,
                "CREATE FUNCTION few() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " IF NEW.stored - OLD.stored > 5 THEN"
                " RAISE check_violation USING MESSAGE = 'too many at once'; END IF; RETURN NEW; END $$;"
                "CREATE TRIGGER few BEFORE UPDATE ON ledger FOR EACH ROW EXECUTE FUNCTION few()",
            )
            await rig.land(*each(device, [1.0]))
            await rig.land(*each(device, [float(at) for at in range(40)], first=1))
            assert await rejected(rig) == []
            assert await rig.ledger() == (41, 41, 0, 0, 0)

    run(test())


def test_a_record_that_even_the_quarantine_refuses_keeps_its_partition_alone_waiting(
    database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            (other,) = await rig.register(partition=1)
            await refuse(rig)
            await execute(rig, "ALTER TABLE quarantine ADD CONSTRAINT none CHECK (code <> 'rejected_by_store')")
            async with rig.worker() as worker:
                await rig.append(*each(device, [1.0, BAD, 2.0]), *each(other, [1.0, 2.0]))
                await until(lambda: says(worker, "refuses a record even for the quarantine"))
                await rig.append(*each(other, [3.0], first=2))
                await until(lambda: stands(rig, {0: 1, 1: 3}))
                await execute(rig, "ALTER TABLE quarantine DROP CONSTRAINT none")
                await rig.landed()
                await until(lambda: says(worker, None))
            assert await rejected(rig) == [1]
            assert await rig.ledger() == (6, 5, 0, 0, 1)

    run(test())


async def says(worker: object, words: str | None) -> bool:
    trouble = getattr(worker, "trouble", None)
    return trouble is None if words is None else words in (trouble or "")


async def stands(rig: Rig, positions: dict[int, int]) -> bool:
    return dict(await rig.fetch("SELECT partition, position FROM log_positions")) == positions


def test_spooled_and_named_records_in_a_refused_batch(any_database: Database, tmp_path: Path) -> None:
    """Trials look at records of a spool without those before them, and leave no trace of it."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            (device,) = await rig.register(partition=0)
            await refuse(rig)
            spool = uuid7().bytes
            records = []
            for at in range(24):
                one = record(device, power((NOW + at, BAD if at % 5 == 2 else float(at))))
                origin = Origin(spool, 0, at // 2, at // 2 + 1) if at % 2 else None
                name = Idempotency(bytes(16), at.to_bytes(16, "big"), bytes(16)) if at % 3 == 0 else None
                records.append(replace(one, version=VERSION, origin=origin, idempotency=name))
            await rig.land(*records, *records)
            bad = len(range(2, 24, 5))
            assert await rig.value("SELECT next FROM spool_positions") == 12
            assert await rig.value("SELECT count(*) FROM spool_losses") == 0
            assert await rig.value("SELECT count(*) FROM idempotency_keys") == 8
            assert sorted(value for *_, value, _ in await rig.readings()) == [
                float(at) for at in range(24) if at % 5 != 2
            ]
            _, stored, _, _, quarantined = await rig.ledger()
            assert stored == 24 - bad
            assert quarantined >= bad
            assert await differences(rig) == []

    run(test())


def test_a_newer_record_behind_a_culprit_makes_its_partition_wait(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            (other,) = await rig.register(partition=1)
            await refuse(rig)
            await rig.append(*each(device, [1.0, BAD]))
            await rig.append_raw(0, bytes((0x9A, VERSION + 1)) + b"whatever comes")
            await rig.append(*each(device, [3.0], first=3), *each(other, [1.0]))
            async with rig.worker():
                await until(lambda: stands(rig, {0: 2, 1: 1}))
                await until(lambda: waits(rig))
                await rig.append(*each(other, [2.0], first=1))
                await until(lambda: stands(rig, {0: 2, 1: 2}))
            assert await rejected(rig) == [1]
            assert await rig.ledger() == (4, 3, 0, 0, 1)

    run(test())


async def waits(rig: Rig) -> bool:
    return count(rig.metrics.waiting_for_upgrade) == 1.0


def test_another_worker_takes_over_in_the_middle(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=2, keep_landed_h=1) as rig:
            devices = [(await rig.register(partition=partition))[0] for partition in (0, 1)]
            await refuse(rig)
            values = [BAD if at % 3 else float(at) for at in range(600)]
            await rig.append(*each(devices[0], values), *each(devices[1], values))
            for turn in range(3):
                async with rig.worker():
                    await until(partial(has_rejected, rig, 100 * turn + 1))
                    async with rig.superuser() as connection:
                        await connection.execute(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                            " WHERE application_name = 'sluice landing' AND datname = current_database()"
                        )
                    async with rig.worker():
                        await until(partial(has_rejected, rig, 100 * turn + 50))
            await rig.land()
            assert await rig.ledger() == (1_200, 400, 0, 0, 800)
            assert await differences(rig) == []

    run(test())


async def has_rejected(rig: Rig, least: int) -> bool:
    return len(await rejected(rig)) >= least


def test_refused_records_of_many_organisations_stop_the_worker(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1) as rig:
            devices = [(await rig.register())[0] for _ in range(3)]
            await refuse(rig)
            await rig.append(*(one for device in devices for one in each(device, [1.0, BAD, 2.0])))
            with pytest.RaisesGroup(pytest.RaisesExc(PoisonFloodError, match="REJECTED_ORGANISATIONS_MAX")):
                async with rig.worker(landing_rejected_organisations_max=2):
                    await asyncio.sleep(30)
            assert len(await rejected(rig)) <= 2
            await rig.land(landing_rejected_organisations_max=3)
            assert await rejected(rig) == [1, 4, 7]
            assert await rig.ledger() == (9, 6, 0, 0, 3)

    run(test())


# ---------------------------------------------------------------- replays


REPLAYED = {
    "unit_mismatch": power((NOW + 5, 1.0), unit="kW"),
    "too_old": power((NOW - 31 * DAY, 1.0)),
    "rejected_by_store": power((NOW + 5, BAD)),
    "rejected_by_store, a text": channel("mode", [(NOW + 5, "eco\0")], unit=""),
}


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "among others"])
@pytest.mark.parametrize("reason", REPLAYED)
def test_a_replay_that_is_refused_again(any_database: Database, tmp_path: Path, reason: str, is_alone: bool) -> None:
    """By what its worker knows already, or by the database: its row is held again, and the worker goes on."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            (device,) = await rig.register(partition=0, raw_retention_days=30)
            await refuse(rig)
            async with rig.worker():
                mode = channel("mode", [(NOW, "eco")], unit="")
                await rig.append(record(device, power((NOW, 1.0)), power((NOW + 1, 1.0), unit="kW"), mode))
                await rig.landed()
                row, replay = await asked(rig)
                again = replaying(device, row, replay, REPLAYED[reason])
                if is_alone:
                    await rig.append(again)
                    await rig.landed()
                await rig.append(*each(device, [2.0, BAD, 3.0], first=10), again, *each(device, [4.0], first=20))
                await rig.landed()
            code = reason.partition(",")[0]
            query = "SELECT state, code, attempts, replay_id FROM quarantine WHERE quarantine_id = $1"
            assert await rig.fetch(query, row) == [("held", code, 2, None)]
            assert await rig.ledger() == (7, 5, 0, 0, 2)
            assert await rig.value("SELECT sum(replayed)::int FROM ledger") == 0
            assert await differences(rig) == []

    run(test())


def test_a_replay_among_culprits_releases_its_row(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=1) as rig:
            (device,) = await rig.register(partition=0)
            await refuse(rig)
            await rig.land(record(device, power((NOW, 1.0)), power((NOW + 1, 1.0), unit="kW")))
            row, replay = await asked(rig)
            again = replaying(device, row, replay, power((NOW + 1, 1_000.0)))
            await rig.land(*each(device, [BAD, 2.0], first=10), again, again, *each(device, [BAD], first=20))
            states = dict(await rig.fetch("SELECT state, count(*)::int FROM quarantine GROUP BY 1"))
            assert states == {"released": 1, "held": 2}
            sums = "sum(received)::int, sum(stored)::int, sum(quarantined)::int, sum(replayed)::int"
            assert await rig.fetch(f"SELECT {sums} FROM ledger") == [(6, 3, 3, 1)]
            assert await differences(rig) == []

    run(test())


async def asked(rig: Rig) -> tuple[UUID, UUID]:
    """The row that is held, about to be replayed; and the id that the replaying record must have."""
    replay = uuid7()
    query = "UPDATE quarantine SET state = 'replaying', replay_id = $1 WHERE state = 'held' RETURNING quarantine_id"
    ((row,),) = await rig.fetch(query, replay)
    return row, replay


def replaying(device: Device, row: UUID, replay: UUID, *channels: Channel) -> Record:
    one = record(device, *channels)
    return replace(one, version=VERSION, record_id=replay.bytes, replays=row.bytes, way="replay")
