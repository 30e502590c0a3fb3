"""What the quarantine holds is bounded by number and age, of each organisation, and what goes is in the books."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from deploy.roles.worker import check_memory, check_nonces, check_receipts
from ingest.mqtt.settings import BridgeSettings
from ingest.settings import IngestSettings, PacedSettings, SpoolSettings
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.log import LogSettings
from schemas.record import NONCE_SCOPE
from tests.databases import Database
from tests.landing_rig import count, until
from tests.quarantine_rig import RECEIVED, Quarantine
from tests.support import run
from workers.metrics import QuarantineMetrics
from workers.quarantine import LOCK, Bounds
from workers.settings import QuarantineSettings

DAY = timedelta(days=1)


@dataclass
class Keeper:
    """The bounds of a database, kept when asked."""

    database: Database
    metrics: QuarantineMetrics = field(default_factory=lambda: QuarantineMetrics(CollectorRegistry()))

    def bounds(self, **settings: Any) -> Bounds:
        return Bounds(self.database.settings, QuarantineSettings(**settings), self.metrics, nonce_memory_s=3_600.0)

    async def keep(self, **settings: Any) -> None:
        await self.bounds(**settings).keep()


async def held(quarantine: Quarantine, organisation: UUID | None, ages: list[timedelta]) -> list[UUID]:
    now = datetime.now(UTC)
    return [await quarantine.hold(organisation, uuid7(), received_at=now - age) for age in ages]


def test_the_oldest_beyond_a_number_go_and_stay_in_the_books(any_database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(any_database), Keeper(any_database)
        organisation = uuid7()
        rows = await held(quarantine, organisation, [timedelta(hours=hours) for hours in (1, 9, 2, 8, 3, 7)])
        await keeper.keep(quarantine_held_rows_max=3, quarantine_step_rows=2)
        assert await quarantine.states(*rows) == ["held", "expired"] * 3
        gone = await quarantine.row(rows[1])
        assert (gone["payload"], gone["code"]) == (b"", "unknown_unit")
        assert "SLUICE_QUARANTINE_HELD_ROWS_MAX" in gone["note"]
        assert await quarantine.books(organisation) == (6, 0, 3)
        hours = await quarantine.superuser("SELECT expired FROM ledger ORDER BY hour")
        assert [row["expired"] for row in hours] == [1, 1, 1, 0, 0, 0]
        assert (count(keeper.metrics.held), count(keeper.metrics.expired)) == (6, 3)
        await keeper.keep(quarantine_held_rows_max=3)
        assert (count(keeper.metrics.held), count(keeper.metrics.expired)) == (3, 3)

    run(test())


def test_one_organisation_s_flood_costs_no_other_its_place(any_database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(any_database), Keeper(any_database)
        quiet, flooding = uuid7(), uuid7()
        kept = await held(quarantine, quiet, [timedelta(days=80), timedelta(days=70)])
        flood = await held(quarantine, flooding, [timedelta(minutes=1)] * 25)
        nobody = await held(quarantine, None, [timedelta(hours=hours) for hours in (1, 2, 3)])
        await keeper.keep(quarantine_held_rows_max=2, quarantine_step_rows=4)
        assert await quarantine.states(*kept) == ["held", "held"]
        assert (await quarantine.states(*flood)).count("held") == 2
        assert await quarantine.states(*nobody) == ["held", "held", "expired"]
        assert await quarantine.books(quiet) == (2, 0, 0)
        assert await quarantine.books(flooding) == (25, 0, 23)

    run(test())


def test_what_is_too_old_goes_and_what_is_being_replayed_stays(any_database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(any_database), Keeper(any_database)
        organisation = uuid7()
        rows = await held(quarantine, organisation, [31 * DAY, 29 * DAY, 31 * DAY])
        (nobody,) = await held(quarantine, None, [31 * DAY])
        await quarantine.superuser("UPDATE quarantine SET state = 'replaying' WHERE quarantine_id = $1", rows[2])
        await keeper.keep(quarantine_held_days_max=30, quarantine_step_rows=1)
        assert await quarantine.states(*rows, nobody) == ["expired", "held", "replaying", "expired"]
        assert "SLUICE_QUARANTINE_HELD_DAYS_MAX" in (await quarantine.row(rows[0]))["note"]
        assert await quarantine.books(organisation) == (3, 0, 1)

    run(test())


def test_what_has_left_is_remembered_for_a_while(database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(database), Keeper(database)
        states = ("released", "discarded", "expired", "held", "replaying")
        for days in (29, 31):
            for state in states:
                row = await quarantine.hold(uuid7(), uuid7(), received_at=RECEIVED)
                await quarantine.superuser(
                    "UPDATE quarantine SET state = $2, changed_at = now() - make_interval(days => $3)"
                    " WHERE quarantine_id = $1",
                    row,
                    state,
                    days,
                )
        await keeper.keep(books_memory_days=30, quarantine_step_rows=2)
        left = await quarantine.superuser("SELECT state, count(*)::int FROM quarantine GROUP BY 1")
        assert {*map(tuple, left)} == {(state, 1) for state in states[:3]} | {(state, 2) for state in states[3:]}

    run(test())


def test_nonces_go_once_landing_is_past_them_and_named_requests_stay(any_database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(any_database), Keeper(any_database)
        source, idle = uuid7(), uuid7()
        now = datetime.now(UTC)
        for one, through in ((source, now), (idle, now - timedelta(hours=5))):
            await quarantine.superuser(
                "INSERT INTO log_generations (source, engine, identity, partitions, closed_at)"
                " VALUES ($1, 'sqlite', $2, 1, now())",
                one, one.hex,
            )  # fmt: skip
            await quarantine.superuser(
                "INSERT INTO log_positions (source, partition, position, received_through) VALUES ($1, 0, 9, $2)",
                one, through,
            )  # fmt: skip
        rows = [
            (source, NONCE_SCOPE, timedelta(minutes=61)), (source, NONCE_SCOPE, timedelta(hours=9)),
            (source, NONCE_SCOPE, timedelta(hours=2)), (source, NONCE_SCOPE, timedelta(minutes=59)),
            (source, bytes(16), timedelta(hours=9)), (idle, NONCE_SCOPE, timedelta(minutes=330)),
            (idle, NONCE_SCOPE, timedelta(hours=7)),
        ]  # fmt: skip
        for number, (one, scope, age) in enumerate(rows):
            await quarantine.superuser(
                "INSERT INTO idempotency_keys VALUES ($1, $2, $3, $4, $4, $5, $6, 0, $7)",
                uuid7(), scope, uuid7(), number.to_bytes(16, "big"), now - age, one, number,
            )  # fmt: skip
        await keeper.keep(quarantine_step_rows=2)
        left = await quarantine.superuser("SELECT position FROM idempotency_keys ORDER BY position")
        # Of an idle partition those are kept that its next record may repeat, however long ago they came.
        assert [row["position"] for row in left] == [3, 4, 5]

    run(test())


def test_outcomes_are_remembered_for_a_while(any_database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(any_database), Keeper(any_database)
        await quarantine.superuser(
            "INSERT INTO outcomes (source, partition, position, organisation_id, received_at, landed_at, duplicates)"
            " SELECT gen_random_uuid(), 0, days, gen_random_uuid(), now() - interval '90 days',"
            " now() - make_interval(days => days), 1 FROM generate_series(25, 35) AS days"
        )
        await keeper.keep(books_memory_days=30, quarantine_step_rows=2)
        left = await quarantine.superuser("SELECT position FROM outcomes ORDER BY 1")
        assert [row["position"] for row in left] == [25, 26, 27, 28, 29]

    run(test())


def test_how_far_a_spool_landed_is_forgotten_only_after_its_end(any_database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(any_database), Keeper(any_database)

        async def spool(ended_days: int | None, *landed_days: int) -> UUID:
            one = uuid7()
            await quarantine.superuser(
                "INSERT INTO spool_positions SELECT $1, partition, 7, now() - make_interval(days => days)"
                " FROM unnest($2::int[]) WITH ORDINALITY AS l (days, partition)",
                one,
                landed_days,
            )
            if ended_days is not None:
                await quarantine.superuser(
                    "INSERT INTO spool_ends VALUES ($1, now() - make_interval(days => $2))", one, ended_days
                )
            return one

        await spool(31, *[40] * 5)
        await spool(31)  # all that it had was lost
        in_use = await spool(None, 400)
        just_ended = await spool(29, 400)
        late = await spool(31, 40, 29)  # a copy landed since
        await keeper.keep(books_memory_days=30, quarantine_step_rows=2)
        positions = await quarantine.superuser("SELECT spool, partition FROM spool_positions")
        assert {*map(tuple, positions)} == {(in_use, 1), (just_ended, 1), (late, 2)}
        ends = await quarantine.superuser("SELECT spool FROM spool_ends")
        assert {row["spool"] for row in ends} == {just_ended, late}

    run(test())


def test_one_worker_at_a_time_does_it_and_another_goes_on_after_it(database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(database), Keeper(database)
        organisation = uuid7()
        rows = await held(quarantine, organisation, [timedelta(hours=1)] * 3)
        other = await asyncpg.connect(database.superuser_url)
        await other.execute("SELECT pg_advisory_lock($1)", LOCK)
        await keeper.keep(quarantine_held_rows_max=0)
        assert await quarantine.states(*rows) == ["held"] * 3
        await other.close()
        keepers = [Keeper(database).keep(quarantine_held_rows_max=0, quarantine_step_rows=1) for _ in range(3)]
        await asyncio.gather(*keepers)
        await keeper.keep(quarantine_held_rows_max=0)
        assert await quarantine.states(*rows) == ["expired"] * 3
        assert await quarantine.books(organisation) == (3, 0, 3)

    run(test())


def test_a_row_in_somebody_s_hand_is_left_for_the_next_time(database: Database) -> None:
    async def test() -> None:
        quarantine, keeper = Quarantine(database), Keeper(database)
        rows = await held(quarantine, uuid7(), [timedelta(hours=hours) for hours in (3, 2, 1)])
        other = await asyncpg.connect(database.superuser_url)
        async with other.transaction():
            await other.execute("SELECT FROM quarantine WHERE quarantine_id = $1 FOR UPDATE", rows[0])
            await keeper.keep(quarantine_held_rows_max=1)
        assert await quarantine.states(*rows) == ["held", "expired", "expired"]
        await other.close()

    run(test())


def test_it_goes_on_after_the_database_was_away(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    async def noticed() -> bool:
        return any("could not be kept" in one.getMessage() for one in caplog.records)

    async def test() -> None:
        quarantine, keeper = Quarantine(database), Keeper(database)
        (row,) = await held(quarantine, uuid7(), [100 * DAY])
        await quarantine.superuser("ALTER TABLE quarantine RENAME TO elsewhere")
        working = asyncio.create_task(keeper.bounds(quarantine_check_s=0.05).run())
        await until(noticed)
        await quarantine.superuser("ALTER TABLE elsewhere RENAME TO quarantine")

        async def gone() -> bool:
            return await quarantine.states(row) == ["expired"]

        await until(gone)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    run(test())


def test_it_is_refused_to_forget_what_the_log_still_has() -> None:
    log, quarantine = LogSettings(), QuarantineSettings(books_memory_days=7)
    with pytest.raises(ConfigurationError, match=r"SLUICE_BOOKS_MEMORY_DAYS=7 .*SLUICE_LOG_RETENTION_H"):
        check_memory(quarantine, log, SpoolSettings(), PacedSettings())
    check_memory(QuarantineSettings(books_memory_days=12), log, SpoolSettings(), PacedSettings())


def test_it_is_refused_to_forget_what_a_receipt_may_ask_for() -> None:
    with pytest.raises(ConfigurationError, match=r"SLUICE_RECEIPT_TTL_S=.*SLUICE_BOOKS_MEMORY_DAYS=30"):
        check_receipts(QuarantineSettings(), IngestSettings(receipt_ttl_s=31 * 86_400.0))
    check_receipts(QuarantineSettings(), IngestSettings())
    with pytest.raises(ConfigurationError, match="SLUICE_LANDING_NONCE_MEMORY_S=599 "):
        check_nonces(599.0, BridgeSettings())
    check_nonces(600.0, BridgeSettings())
