"""Landing when something breaks at the worst moment: every reading stands once, and the books add up.

Left out: a broken log (`tests/contract`).
"""

import asyncio
import dataclasses
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest

from bench.proxy import Mode, Proxy
from bench.usage import free_port
from runtime.clock import SystemClock
from runtime.postgres import PostgresSettings
from tests.databases import Database
from tests.landing_rig import DEADLINE_S, NOW, Device, Rig, channel, count, open_rig, record, sqlite_url, until
from tests.support import run
from workers.landing.worker import LandingWorker


async def append(rig: Rig, devices: list[Device], *, first: int, number: int = 10) -> None:
    """Some readings of every device, each with its own time and value."""
    for at in range(first, first + number):
        await rig.append(*(record(device, channel("power", [(NOW + at, float(at))])) for device in devices))


async def assert_landed_once(rig: Rig, devices: int, number: int) -> None:
    """Readings 0 to `number` of every device, each once, and nothing else in the books."""
    rows = await rig.fetch("SELECT count(*)::int, sum(value)::int FROM readings GROUP BY series_id")
    assert rows == [(number, number * (number - 1) // 2)] * devices
    assert await rig.ledger() == (devices * number, devices * number, 0, 0, 0)


class Holder:
    """A session of the test's that keeps landing from writing its ledger, in the middle of its transaction."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    async def __aenter__(self) -> Self:
        self._superuser = self._rig.superuser()
        self._connection = await self._superuser.__aenter__()
        await self._connection.execute("BEGIN; LOCK TABLE ledger IN ACCESS EXCLUSIVE MODE")
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._superuser.__aexit__(None, None, None)

    async def caught(self) -> None:
        """A landing session waits for the lock: it has written readings and not committed them."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sluice landing'"
            " AND wait_event_type = 'Lock' AND datname = current_database()"
        )

        async def look() -> bool:
            return bool(await self._rig.value(waiting))

        await until(look)


# ---------------------------------------------------------------- the database and the way to it


class CommitCutter:
    """A proxy before the database that cuts the connection at one COMMIT: before it arrives, or after its answer."""

    def __init__(self, target_port: int, *, arrives: bool) -> None:
        self._target_port = target_port
        self._arrives = arrives
        self.armed = False
        self.cuts = 0
        self.port = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        answers = asyncio.create_task(self._pass_on(from_server, writer))
        try:
            while data := await reader.read(65536):
                if self.armed and data.endswith(b"COMMIT\0"):
                    self.armed = False
                    self.cuts += 1
                    answers.cancel()
                    await asyncio.gather(answers, return_exceptions=True)
                    if self._arrives:
                        to_server.write(data)
                        await from_server.read(65536)
                    return
                to_server.write(data)
        except ConnectionError:
            pass
        finally:
            answers.cancel()
            writer.transport.abort()
            to_server.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()


def through(rig: Rig, port: int) -> PostgresSettings:
    """The way to the database by way of a proxy."""
    url = urlsplit(rig.database.url)
    return PostgresSettings(database_url=rig.database.url.replace(f":{url.port}/", f":{port}/"))


@pytest.mark.parametrize("arrives", [True, False], ids=["answer lost", "never arrived"])
def test_a_commit_of_unknown_outcome(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, arrives: bool
) -> None:
    async def test() -> None:
        cutter = CommitCutter(urlsplit(database.url).port or 0, arrives=arrives)
        async with open_rig(database, sqlite_url(tmp_path)) as rig, cutter.listening():
            rig.postgres = through(rig, cutter.port)
            devices = await rig.register(4)
            async with rig.worker():
                await append(rig, devices, first=0)
                await rig.landed()
                cutter.armed = True
                await append(rig, devices, first=10)
                await rig.landed()
                await append(rig, devices, first=20)
                await rig.landed()
            assert cutter.cuts == 1
            told = "had gone through" if arrives else "had not gone through"
            assert f"a COMMIT whose answer was lost {told}" in caplog.text
            await assert_landed_once(rig, len(devices), 30)
            assert _stored(rig) == 120

    run(test())


def test_a_database_that_goes_away_and_comes_back(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()
        proxy = Proxy(port, urlsplit(database.url).port or 0)
        async with open_rig(database, sqlite_url(tmp_path)) as rig, proxy:
            rig.postgres = through(rig, port)
            devices = await rig.register(4)
            async with rig.worker() as worker:
                await append(rig, devices, first=0)
                await rig.landed()
                proxy.refuse = True
                proxy.cut()
                await append(rig, devices, first=10)
                await until(lambda: _is_troubled(worker))
                proxy.refuse = False
                await append(rig, devices, first=20)
                await rig.landed()
                await until(lambda: _is_well(worker))
            await assert_landed_once(rig, len(devices), 30)

    run(test())


def test_a_connection_that_goes_silent_in_its_transaction(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        port = free_port()
        proxy = Proxy(port, urlsplit(database.url).port or 0)
        async with open_rig(database, sqlite_url(tmp_path)) as rig, proxy:
            rig.postgres = through(rig, port)
            devices = await rig.register(4)
            async with rig.worker(landing_transaction_timeout_s=1.0):
                async with Holder(rig) as holder:
                    await append(rig, devices, first=0)
                    await holder.caught()
                    proxy.set_mode(Mode.BLACKHOLE)
                    proxy.mode = Mode.PASS  # of the connections that come
                await append(rig, devices, first=10)
                await rig.landed()
            await assert_landed_once(rig, len(devices), 20)

    run(test())


def test_a_session_that_is_ended_in_its_transaction(database: Database, tmp_path: Path) -> None:
    """The worker goes on with another, and the lease names that one."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            devices = await rig.register(4)
            async with rig.worker():
                async with Holder(rig) as holder:
                    await append(rig, devices, first=0)
                    await holder.caught()
                    ended = await rig.value(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                        " WHERE application_name = 'sluice landing' AND datname = current_database()"
                    )
                    assert ended == 1
                await rig.landed()
                named = await rig.fetch(
                    "SELECT DISTINCT application_name FROM partition_leases l"
                    " LEFT JOIN pg_stat_activity a ON a.pid = l.backend_pid AND a.backend_start = l.backend_start"
                )
                assert named == [("sluice landing",)]
            await assert_landed_once(rig, len(devices), 10)

    run(test())


def test_new_series_of_a_batch_that_is_rolled_back(database: Database, tmp_path: Path) -> None:
    """The series stand already when the batch is refused; its readings land once the database takes them."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            devices = await rig.register(4)
            async with rig.superuser() as connection:
                await connection.execute("REVOKE INSERT ON ledger FROM sluice_worker")
                async with rig.worker():
                    await append(rig, devices, first=0)
                    await until(lambda: _has_retried(rig, "database"))
                    assert await rig.value("SELECT count(*) FROM series") > 0
                    assert await rig.value("SELECT count(*) FROM readings") == 0
                    await connection.execute("GRANT INSERT ON ledger TO sluice_worker")
                    await rig.landed()
            await assert_landed_once(rig, len(devices), 10)

    run(test())


# ---------------------------------------------------------------- other workers


def test_a_position_that_another_has_moved(database: Database, tmp_path: Path) -> None:
    """The other lands the record while this worker's transaction waits for its position."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1) as rig:
            (device,) = await rig.register()
            async with rig.worker(), rig.superuser() as other:
                await append(rig, [device], first=0)
                await rig.landed()
                transaction = other.transaction()
                await transaction.start()
                await other.execute("UPDATE log_positions SET position = 11")
                await append(rig, [device], first=10)
                waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                await until(lambda: rig.value(waiting))
                await other.execute(
                    "INSERT INTO readings SELECT series_id, 0, ts + interval '1 us', 10 FROM readings WHERE value = 9"
                )
                await other.execute("UPDATE ledger SET received = received + 1, stored = stored + 1")
                await transaction.commit()
                await rig.landed()
            assert count(rig.metrics.position_conflicts) == 1
            await assert_landed_once(rig, 1, 20)

    run(test())


def test_a_partition_that_goes_away_and_comes_back(database: Database, tmp_path: Path) -> None:
    """What is remembered of it is not believed again: each holder sends what the one before it landed once more."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            devices = [*await rig.register(2, partition=0), *await rig.register(2, partition=1)]
            async with rig.worker():
                await append(rig, devices, first=0)
                await rig.landed()
                async with rig.worker():
                    await until(lambda: _shares(rig, [1, 1]))
                    await append(rig, devices, first=5)
                    await rig.landed()
                await until(lambda: _shares(rig, [2]))
                await append(rig, devices, first=10)
                await rig.landed()
            rows = await rig.fetch("SELECT count(*)::int, sum(value)::int FROM readings GROUP BY series_id")
            assert rows == [(20, 190)] * 4
            assert await rig.ledger() == (120, 80, 40, 0, 0)
            assert count(rig.metrics.retries.labels("contention")) == 0

    run(test())


def test_workers_share_partitions_and_take_over_from_a_dead_one(
    database: Database, services: dict[str, str], tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(database, services["SLUICE_LOG_URL"], partitions=8) as rig:
            devices = await rig.register(24)
            async with process(rig, tmp_path / "first") as first:
                await append(rig, devices, first=0)
                await until(lambda: _shares(rig, [8]))
                async with process(rig, tmp_path / "second"):
                    appending = asyncio.create_task(append(rig, devices, first=10, number=60))
                    await until(lambda: _shares(rig, [4, 4]))
                    first.kill()
                    await until(lambda: _shares(rig, [8]))
                    await appending
                    await rig.landed()
            await assert_landed_once(rig, len(devices), 70)

    run(test())


def test_a_worker_that_is_stopped_inside_its_transaction(
    database: Database, services: dict[str, str], tmp_path: Path
) -> None:
    """Its session, which holds the positions, is ended by who takes over; when it wakes up it does no harm."""

    async def test() -> None:
        async with open_rig(database, services["SLUICE_LOG_URL"], partitions=2) as rig:
            devices = await rig.register(6)
            async with process(rig, tmp_path / "first") as first:
                await append(rig, devices, first=0)
                await rig.landed()
                async with Holder(rig) as holder:
                    await append(rig, devices, first=10)
                    await holder.caught()
                    first.send_signal(signal.SIGSTOP)
                async with process(rig, tmp_path / "second"):
                    await append(rig, devices, first=20)
                    await rig.landed()
                    await assert_landed_once(rig, len(devices), 30)
                    first.send_signal(signal.SIGCONT)
                    await until(lambda: _shares(rig, [1, 1]))
                    await append(rig, devices, first=30)
                    await rig.landed()
            assert "session of a partition's previous holder was ended" in (tmp_path / "second").read_text()
            await assert_landed_once(rig, len(devices), 40)

    run(test())


def test_a_worker_that_was_stopped_for_longer_than_its_lease(
    database: Database, services: dict[str, str], tmp_path: Path
) -> None:
    """Nobody took over: it leases again and goes on."""

    async def test() -> None:
        async with open_rig(database, services["SLUICE_LOG_URL"], partitions=2) as rig:
            devices = await rig.register(6)
            async with process(rig, tmp_path / "only") as only:
                await append(rig, devices, first=0)
                await rig.landed()
                only.send_signal(signal.SIGSTOP)
                await append(rig, devices, first=10)
                expired = "SELECT bool_and(lease_until < clock_timestamp()) FROM partition_leases"
                await until(lambda: rig.value(expired))
                only.send_signal(signal.SIGCONT)
                await rig.landed()
            await assert_landed_once(rig, len(devices), 20)

    run(test())


def test_a_worker_that_was_stopped_while_another_came_and_went(
    database: Database, services: dict[str, str], tmp_path: Path
) -> None:
    """Its leases are its own again when it wakes up, but what it remembers is from before."""

    async def test() -> None:
        async with open_rig(database, services["SLUICE_LOG_URL"], partitions=2) as rig:
            devices = await rig.register(6)
            async with process(rig, tmp_path / "first") as first:
                await append(rig, devices, first=0)
                await rig.landed()
                first.send_signal(signal.SIGSTOP)
                async with process(rig, tmp_path / "second"):
                    await append(rig, devices, first=10)
                    await rig.landed()
                first.send_signal(signal.SIGCONT)
                await append(rig, devices, first=20)
                await rig.landed()
            assert "positions stand where" not in (tmp_path / "first").read_text()
            await assert_landed_once(rig, len(devices), 30)

    run(test())


def test_nothing_is_written_once_the_lease_may_have_ended(database: Database, tmp_path: Path) -> None:
    """Leases cannot be renewed while everything else works."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1) as rig:
            devices = await rig.register(4)
            async with rig.worker(landing_lease_ttl_s=0.5):
                await append(rig, devices, first=0)
                await rig.landed()
                async with rig.superuser() as connection:
                    await connection.execute("BEGIN; LOCK TABLE landing_workers IN ACCESS EXCLUSIVE MODE")
                    expired = "SELECT bool_and(lease_until < clock_timestamp()) FROM partition_leases"
                    await until(lambda: rig.value(expired))
                    await append(rig, devices, first=10)
                    await until(lambda: _has_retried(rig, "position"))
                    assert await rig.value("SELECT position FROM log_positions") == 40
                await rig.landed()
            assert count(rig.metrics.position_conflicts) == 0
            await assert_landed_once(rig, len(devices), 20)

    run(test())


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
def test_a_stop_inside_a_transaction(database: Database, tmp_path: Path, in_time: bool) -> None:
    """It is finished if that is soon enough, and rolled back if not; everything is given back either way."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=1) as rig:
            devices = await rig.register(4)
            settings = dataclasses.replace(rig.settings, landing_stop_timeout_s=DEADLINE_S if in_time else 0.05)
            worker = LandingWorker(rig.postgres, settings, rig.log, clock=SystemClock(), metrics=rig.metrics)
            stop = asyncio.Event()
            async with Holder(rig) as holder:
                running = asyncio.create_task(worker.run(stop))
                await append(rig, devices, first=0)
                await holder.caught()
                stop.set()
                if not in_time:
                    await running
            await running
            standing = await rig.value("SELECT position FROM log_positions")
            assert await rig.value("SELECT count(*) FROM readings") == standing
            assert (standing > 0) is in_time
            held = "SELECT count(*) FROM partition_leases WHERE worker IS NOT NULL OR backend_pid IS NOT NULL"
            assert await rig.value(held) == await rig.value("SELECT count(*) FROM landing_workers") == 0

    run(test())


@asynccontextmanager
async def process(rig: Rig, output: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker in a process of its own, stopped at the end of the block if it still runs."""
    given = {
        "postgres": {"database_url": rig.database.url},
        "log": dataclasses.asdict(rig.log_settings),
        "landing": dataclasses.asdict(rig.settings),
    }
    command = [sys.executable, "-m", "tests.landing_process", json.dumps(given)]
    with output.open("wb") as file:
        child = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file, env=_environment())
    try:
        yield child
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGCONT)
            child.terminate()
        async with asyncio.timeout(120):
            await child.wait()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}


def _stored(rig: Rig) -> float:
    paths = "fresh", "suspect"
    return sum(count(rig.metrics.rows.labels(path, "stored")) for path in paths)


async def _has_retried(rig: Rig, cause: str) -> bool:
    return count(rig.metrics.retries.labels(cause)) > 0


async def _is_troubled(worker: Any) -> bool:
    return worker.trouble is not None


async def _is_well(worker: Any) -> bool:
    return worker.trouble is None


async def _shares(rig: Rig, expected: list[int]) -> bool:
    """How many partitions each worker holds, of those that are held."""
    rows = await rig.fetch(
        "SELECT count(*)::int FROM partition_leases WHERE lease_until >= clock_timestamp() GROUP BY worker"
    )
    return sorted(held for (held,) in rows) == sorted(expected)
