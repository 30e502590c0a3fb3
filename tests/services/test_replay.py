"""Replays, up to the log: what is put there and what is not, by several processes at once, and after one that died.

Left out: the release by landing (`test_landing_late`), and the whole way (`tests/system/test_quarantine`).
"""

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from api import quarantine as requests
from api.quarantine import Filter
from ingest import replay
from ingest.http.compose import make_replayer
from ingest.metrics import IngestMetrics
from ingest.replay import Replayer
from ingest.settings import IngestSettings, ReplaySettings
from runtime.clock import SystemClock
from runtime.errors import OutcomeUnknownError, UnavailableError
from runtime.log import Log
from runtime.notifications import Notifications
from runtime.postgres import open_pool
from schemas.record import LATE_VERSION, PG_EPOCH_US, Quality, Record
from schemas.topics import partition_of
from tests.databases import Server
from tests.ingest_rig import ROLE, Installation, Tenant, install, rows
from tests.landing_rig import until
from tests.quarantine_rig import RECEIVED, Quarantine
from tests.support import run

GOOD = {"type": "temperature", "value": 21.5, "unit": "°C", "label": "front", "ts": "2026-11-02T00:00:00Z"}
GOOD_US = round(datetime(2026, 11, 2, tzinfo=UTC).timestamp() * 1e6)
RECEIVED_US = round(RECEIVED.timestamp() * 1e6)
SETTINGS: dict[str, Any] = {"replay_poll_s": 0.1, "replay_rows_per_s": 100_000.0}


@dataclass
class Station:
    """A log, and what asks for replays onto it."""

    installation: Installation
    log: Log
    quarantine: Quarantine

    async def hold(self, tenant: Tenant, payload: Any = GOOD, **more: Any) -> UUID:
        return await self.quarantine.hold(tenant.organisation, tenant.device, payload, **more)

    async def ask(self, tenant: Tenant) -> int:
        """For the replay of everything that the tenant has there."""
        async with self.installation.acting_for(tenant.organisation) as connection:
            return await requests.replay_found(connection, Filter(), 100_000)

    @asynccontextmanager
    async def replayer(
        self, log: Log | None = None, trouble: Callable[[], str | None] = lambda: None, **settings: Any
    ) -> AsyncIterator[Replayer]:
        """One process's part, not running."""
        postgres = self.installation.database.settings
        pool = await open_pool(postgres, role=ROLE, application="test", size_max=2)
        try:
            yield make_replayer(
                log=log or self.log,
                pool=pool,
                listener=Notifications(postgres, role=ROLE, application="test"),
                ingest=IngestSettings(),
                settings=ReplaySettings(**SETTINGS | settings),
                clock=SystemClock(),
                metrics=IngestMetrics(CollectorRegistry()),
                trouble=trouble,
            )
        finally:
            pool.terminate()

    @asynccontextmanager
    async def running(self, log: Log | None = None, **settings: Any) -> AsyncIterator[None]:
        async with self.replayer(log, **settings) as replayer:
            task = asyncio.create_task(replayer.run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def replay(self, tenant: Tenant, **settings: Any) -> list[Record]:
        """Ask for the replay of everything, carry it out, and give what stands in the log of the device then."""
        await self.ask(tenant)
        async with self.replayer(**settings) as replayer:
            while await replayer.round():
                pass
        return await self.records(tenant)

    async def records(self, tenant: Tenant) -> list[Record]:
        async with self.installation.face(log=self.log) as face:
            return await face.records_of(tenant.device)


@pytest.fixture
def installation(timescaledb: Server, timescaledb_template: str, tmp_path: Path) -> Iterator[Installation]:
    """Of a test's own: a replayer takes whatever is due."""
    yield from install(timescaledb, timescaledb_template, tmp_path)


@asynccontextmanager
async def station(installation: Installation) -> AsyncIterator[Station]:
    async with installation.open_log() as log:
        yield Station(installation, log, Quarantine(installation.database))


def test_a_replayed_reading_is_a_record_of_its_device_with_its_first_receive_time(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            held = await here.hold(tenant, request_id="request-7")
            (record,) = await here.replay(tenant)
            assert rows(record) == [("temperature", "front", "°C", GOOD_US, 21.5, 0)]
            row = await here.quarantine.row(held)
            assert (record.version, record.way, record.request_id) == (LATE_VERSION, "replay", "request-7")
            assert (record.replays, record.record_id) == (held.bytes, row["replay_id"].bytes)
            assert record.received_at == RECEIVED_US - PG_EPOCH_US
            assert (record.organisation, record.device) == (tenant.organisation.bytes, tenant.device.bytes)
            # It stays as it is until landing has it, and is not put on the log again meanwhile.
            assert (row["state"], row["attempts"], json.loads(row["payload"])) == ("replaying", 1, GOOD)
            assert row["replay_due_at"] - row["replay_requested_at"] > timedelta(minutes=30)

    run(test())


def test_a_reading_without_a_time_gets_its_first_receive_time(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            await here.hold(tenant, {"type": "co2", "value": 400})
            await here.hold(tenant, {"type": "co2", "value": 401, "ts": 3.1})
            records = await here.replay(tenant)
            found = {(value, time, flags) for record in records for _, _, _, time, value, flags in rows(record)}
            assert found == {
                (400.0, RECEIVED_US, Quality.TIME_STAMPED.value),
                (401.0, RECEIVED_US, Quality.TIME_REPLACED.value),
            }

    run(test())


def test_what_landing_had_set_aside_keeps_its_flags_unless_it_was_edited(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            flags = Quality.TIME_STAMPED | Quality.UNIT_CONVERTED
            shown = GOOD | {"quality": (flags | Quality.BOOLEAN | 2**14).value}
            held = await here.hold(tenant, shown, code="conflict", item=-1)
            edited = await here.hold(tenant, shown, code="conflict", item=-1)
            theirs = await here.hold(tenant, shown)  # what a device says of its flags says nothing
            async with installation.acting_for(tenant.organisation) as connection:
                await requests.edit(connection, edited, json.dumps(shown).encode())
            found = {record.replays: rows(record)[0][5] for record in await here.replay(tenant)}
            assert found == {held.bytes: flags.value, edited.bytes: 0, theirs.bytes: 0}

    run(test())


REFUSED: list[tuple[Any, str]] = [
    ({"type": "temperature", "value": 1, "unit": "°R"}, "unknown_unit"),
    ({"type": "temperature", "value": "x"}, "invalid_value"),
    ({"type": "note", "value": {"not_finite": "NaN"}}, "invalid_value"),
    ({"type": "co2", "value": 1, "ts": "yesterday"}, "invalid_time"),
    (b'{"type":"co2","value":1,"value":2,"ts":null,"ts":5}', "invalid_measurement"),
    (b'{"type":"co2","value":1e400,"metadata":{"rssi":-60}}', "not_finite"),
    ({"type": "co2", "value": 1, "ts": "2024-01-01T00:00:00Z"}, "too_old"),
    ({"parameter": "warp"}, "invalid_metric"),
    ([], "invalid_measurement"),
    (7, "invalid_measurement"),
    (b'{"type": "co2", "val', "invalid_measurement"),
    (b"", "invalid_measurement"),
    (b'{"type":"co2","value":1},{"type":"co2","value":2}', "invalid_measurement"),
    (b'{"type":"co2","value":1}]},{"measurements":[{"type":"co2","value":2}', "invalid_measurement"),
    (b"\xff\xfe", "invalid_measurement"),
]


def test_what_is_refused_again_is_held_again_and_says_why(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            held = [await here.hold(tenant, payload, code="before") for payload, _ in REFUSED]
            assert await here.replay(tenant) == []
            for one, (payload, code) in zip(held, REFUSED, strict=True):
                row = await here.quarantine.row(one)
                assert (row["state"], row["code"], row["attempts"]) == ("held", code, 2), payload
                assert row["message"] != "temperature takes °C" or code == "unknown_unit"
                raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                assert row["payload"] == raw
            assert await here.ask(tenant) == len(REFUSED)

    run(test())


def test_what_was_no_reading_goes_on_telling_why_until_somebody_edits_it(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            forged = await here.hold(tenant, '{"ts":1,"sig":"…"}', code="bad_signature", message="not the plant's")
            garbage = await here.hold(tenant, {"base64": "/w=="}, code="undecodable", message="no UTF-8")
            for attempts in (2, 3):
                assert await here.replay(tenant) == []
                found = [await here.quarantine.row(one) for one in (forged, garbage)]
                assert [(row["state"], row["attempts"]) for row in found] == [("held", attempts)] * 2
                told = [(row["code"], row["message"]) for row in found]
                assert told == [("bad_signature", "not the plant's"), ("undecodable", "no UTF-8")]
            async with installation.acting_for(tenant.organisation) as connection:
                await requests.edit(connection, garbage, b'{"type":"temperature","value":"hot"}')
            assert await here.replay(tenant) == []
            assert (await here.quarantine.row(garbage))["code"] == "invalid_value"

    run(test())


def test_retention_and_registry_are_judged_as_of_now(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            await installation.execute(tenant, "UPDATE organisations SET raw_retention_days = 30")
            now = datetime.now(UTC)
            came = now - timedelta(days=20)
            payloads = {
                "kept": {"type": "co2", "value": 1, "ts": (now - timedelta(days=29)).isoformat()},
                "too_old": {"type": "co2", "value": 1, "ts": (now - timedelta(days=31)).isoformat()},
            }
            kept, gone = [await here.hold(tenant, one, received_at=came) for one in payloads.values()]
            long_ago = await here.hold(tenant, {"type": "co2", "value": 1}, received_at=now - timedelta(days=31))
            assert [UUID(bytes=record.replays) for record in await here.replay(tenant)] == [kept]
            assert [(await here.quarantine.row(one))["code"] for one in (gone, long_ago)] == ["too_old", "too_old"]
            for status, code in (("suspended", "device_suspended"), ("deleted", "unknown_device")):
                await installation.execute(tenant, "UPDATE devices SET status = $1", status)
                await here.replay(tenant)
                assert (await here.quarantine.row(gone))["code"] == code

    run(test())


def test_two_processes_put_each_row_on_the_log_once(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenants = [await installation.tenant() for _ in range(3)]
            held = {(await here.hold(tenant)).bytes for tenant in tenants for _ in range(60)}
            settings: dict[str, Any] = {"replay_rows_max": 7, "replay_turn_rows": 3}
            async with here.running(**settings), here.running(**settings):
                for tenant in tenants:
                    assert await here.ask(tenant) == 60

                async def done() -> bool:
                    return sum([len(await here.records(tenant)) for tenant in tenants]) >= len(held)

                await until(done)
                for _ in range(3):  # a round more, which takes whatever is due
                    held.add((await here.hold(tenants[0])).bytes)
                    await here.ask(tenants[0])
                    await until(done)
            found = [record for tenant in tenants for record in await here.records(tenant)]
            assert len(found) == len(held)
            assert {record.replays for record in found} == held

    run(test())


class DeadLog:
    """A log whose process dies in the middle: nothing is written, nothing comes back."""

    trouble = None

    def __init__(self, log: Log) -> None:
        self.partitions = log.partitions
        self.asked = asyncio.Event()

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        self.asked.set()
        return asyncio.get_running_loop().create_future()


class FailingLog(DeadLog):
    """A log that fails each append in turn, and then lets it through."""

    def __init__(self, log: Log, errors: list[Exception], *, after: bool) -> None:
        super().__init__(log)
        self._log = log
        self._errors = errors
        self._after = after

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        if not self._errors:
            return self._log.append(partition, body)
        if self._after:
            self._log.append(partition, body)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.set_exception(self._errors.pop())
        return future


class WaitingLog(DeadLog):
    """A log whose one append is durable once the test says so."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.appended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        self.asked.set()
        return self.appended


@asynccontextmanager
async def in_other_hands(here: Station, replayer: Replayer, row: UUID) -> AsyncIterator[Any]:
    """Another session that has the lock on `row`, and what tells that the replayer has tried to hand rows back.

    So has another process's claim that began before this one's was committed, until it ends: it locks the row, and
    only then sees that it is claimed.
    """
    tried, asks = asyncio.Event(), replayer._ask

    async def ask(query: str, *arguments: Any) -> list[Any]:
        found = await asks(query, *arguments)
        if query is replay._BACK:
            tried.set()
        return found

    replayer._ask = ask  # type: ignore[method-assign]
    other = await asyncpg.connect(here.installation.database.superuser_url)
    transaction = other.transaction()
    await transaction.start()
    await other.fetch("SELECT FROM quarantine WHERE quarantine_id = $1 FOR UPDATE", row)
    try:
        yield other, tried
        await transaction.commit()
    finally:
        await other.close()


@pytest.mark.parametrize("becomes", ["held", "released"])
def test_a_row_that_another_process_has_locked_is_handed_back_all_the_same(
    installation: Installation, becomes: str
) -> None:
    """Unless that was landing, which has released it."""

    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            good, bad = await here.hold(tenant), await here.hold(tenant, {"type": "temperature", "value": "x"})
            await here.ask(tenant)
            log: Any = WaitingLog(here.log)
            async with here.replayer(log) as replayer:
                round_ = asyncio.create_task(replayer.round())
                await log.asked.wait()  # both are claimed, and nothing is handed back yet
                async with in_other_hands(here, replayer, bad) as (other, tried):
                    log.appended.set_result(0)
                    await tried.wait()
                    assert not round_.done()
                    assert (await here.quarantine.row(bad))["state"] == "replaying"
                    if becomes == "released":
                        await other.execute("UPDATE quarantine SET state = 'released' WHERE quarantine_id = $1", bad)
                assert await round_ == 2
            row = await here.quarantine.row(bad)
            assert (row["state"], row["attempts"]) == (becomes, 2 if becomes == "held" else 1)
            assert (await here.quarantine.row(good))["replay_due_at"] - datetime.now(UTC) > timedelta(minutes=30)

    run(test())


def test_a_row_that_stays_locked_holds_no_round_up(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            await here.hold(tenant)
            bad = await here.hold(tenant, {"type": "temperature", "value": "x"})
            await here.ask(tenant)
            log: Any = WaitingLog(here.log)
            async with here.replayer(log, replay_lease_s=0.1) as replayer:
                round_ = asyncio.create_task(replayer.round())
                await log.asked.wait()
                async with in_other_hands(here, replayer, bad):
                    log.appended.set_result(0)
                    assert await round_ == 2
                    assert (await here.quarantine.row(bad))["state"] == "replaying"

                async def is_back() -> bool:  # as its lease is over
                    await replayer.round()
                    return bool((await here.quarantine.row(bad))["state"] == "held")

                await until(is_back)

    monkeypatch.setattr(replay, "_LOCKED_WAITS_S", (0.01, 0.01))
    run(test())


def test_what_a_dead_process_had_claimed_is_taken_over(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            held = {(await here.hold(tenant)).bytes for _ in range(5)}
            await here.ask(tenant)
            dead: Any = DeadLog(here.log)
            async with here.running(dead, replay_lease_s=1.0):
                await dead.asked.wait()
                async with here.replayer() as other:
                    assert await other.round() == 0  # they are claimed, and nobody is in a hurry
            async with here.running():

                async def done() -> bool:
                    return len(await here.records(tenant)) == len(held)

                await until(done)
            assert {record.replays for record in await here.records(tenant)} == held

    run(test())


def test_an_append_that_failed_or_is_open_is_made_again_under_the_same_record_id(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            for error, after, copies in (
                (UnavailableError("away"), False, 1),
                (OutcomeUnknownError("open"), True, 2),
            ):
                tenant = await installation.tenant()
                held = await here.hold(tenant)
                await here.ask(tenant)
                log: Any = FailingLog(here.log, [error], after=after)
                async with here.running(log, replay_lease_s=0.2):

                    async def done(tenant: Tenant = tenant, copies: int = copies) -> bool:
                        return len(await here.records(tenant)) == copies

                    await until(done)
                found = await here.records(tenant)
                assert {record.replays for record in found} == {held.bytes}
                assert len({record.record_id for record in found}) == 1
                assert len({*map(repr, found)}) == 1

    run(test())


def test_what_did_not_land_for_long_is_put_on_the_log_again(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            await here.hold(tenant)
            assert len(await here.replay(tenant)) == 1
            assert len(await here.replay(tenant)) == 1
            await here.quarantine.superuser("UPDATE quarantine SET replay_due_at = now() WHERE state = 'replaying'")
            first, second = await here.replay(tenant)
            assert first == second

    run(test())


def test_one_organisation_s_million_holds_nobody_up(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            many, one = await installation.tenant(), await installation.tenant()
            for _ in range(40):
                await here.hold(many)
            await here.ask(many)
            await here.hold(one)
            await here.ask(one)
            async with here.replayer(replay_rows_max=10, replay_turn_rows=5) as replayer:
                assert await replayer.round() == 6
            assert (len(await here.records(many)), len(await here.records(one))) == (5, 1)

    run(test())


def test_the_rate_is_bounded(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            for _ in range(12):
                await here.hold(tenant)
            await here.ask(tenant)
            began = time.monotonic()
            async with here.running(replay_rows_per_s=10.0, replay_rows_max=4):

                async def done() -> bool:
                    return len(await here.records(tenant)) == 12

                await until(done)
            # Of three rounds two have to be waited for; a slow machine only takes longer.
            assert time.monotonic() - began >= 0.8

    run(test())


def test_a_log_in_trouble_is_left_alone(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            held = await here.hold(tenant)
            await here.ask(tenant)
            log: Any = DeadLog(here.log)
            before = await here.quarantine.row(held)
            log.trouble = "the broker is away"
            async with here.replayer(log) as replayer:
                assert await replayer.round() == 0
            async with here.replayer(trouble=lambda: "a spool is drained") as replayer:
                assert await replayer.round() == 0
            assert await here.quarantine.row(held) == before
            assert len(await here.replay(tenant)) == 1

    run(test())


def test_a_database_that_is_away_or_refuses_ends_nothing(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    async def noticed() -> bool:
        return any("cannot be replayed" in one.getMessage() for one in caplog.records)

    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            async with here.running():
                await here.quarantine.superuser("ALTER TABLE quarantine RENAME TO elsewhere")
                await until(noticed)
                await here.quarantine.superuser("ALTER TABLE elsewhere RENAME TO quarantine")
                await here.quarantine.superuser(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name LIKE 'test%' AND datname = current_database()"
                )
                await here.hold(tenant)
                await here.ask(tenant)

                async def done() -> bool:
                    return bool(await here.records(tenant))

                await until(done)

    run(test())


def test_a_replay_goes_to_the_partition_of_its_device(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            await here.hold(tenant)
            before = await here.log.bounds()
            await here.replay(tenant)
            moved = [part for part, where in (await here.log.bounds()).items() if where.end > before[part].end]
            assert moved == [partition_of(tenant.device.bytes, here.log.partitions)]

    run(test())


def test_numbers_of_any_size_and_texts_come_through(installation: Installation) -> None:
    async def test() -> None:
        async with station(installation) as here:
            tenant = await installation.tenant()
            payloads = [("count", 10**30, str(10**30)), ("note", "ä" * 1_000, "ä" * 1_000), ("open", True, 1.0)]
            for metric, value, _ in payloads:
                await here.hold(tenant, {"type": metric, "value": value, "ts": RECEIVED_US})
            records = await here.replay(tenant)
            found = {metric: value for record in records for metric, _, _, _, value, _ in rows(record)}
            assert found == {metric: stored for metric, _, stored in payloads}
            assert all(len(record.channels[0].times) == struct.calcsize(">q") for record in records)

    run(test())
