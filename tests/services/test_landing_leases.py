"""Leases of partitions: who holds what, from when, and whom a successor has to end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prometheus_client import CollectorRegistry

from runtime.clock import ManualClock, SystemClock
from tests.databases import Database
from tests.landing_rig import SETTINGS, Rig, open_rig, sqlite_url, until
from tests.support import run
from workers.landing.failures import LeaseLapsedError
from workers.landing.leases import Leases
from workers.landing.store import Session, Store
from workers.metrics import LandingMetrics

TTL = timedelta(seconds=1)


@asynccontextmanager
async def keeping(rig: Rig, **changes: Any) -> AsyncIterator[Leases]:
    """Leases that are renewed within the block, and simply end after it."""
    settings = replace(SETTINGS, **changes)
    metrics = LandingMetrics(CollectorRegistry())
    leases = Leases(rig.postgres, settings, rig.log.source, clock=SystemClock(), metrics=metrics)
    running = asyncio.create_task(leases.run())
    try:
        yield leases
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        leases.close()


async def ask(rig: Rig, worker: UUID, *releasing: int, ttl: timedelta = TTL) -> dict[int, bool]:
    """Partition to whether it was taken just now."""
    query = "SELECT held, taken FROM lease_partitions($1, $2, $3, $4)"
    rows = await rig.fetch(query, rig.log.source, worker, ttl, [*releasing])
    assert len({partition for partition, _ in rows}) == len(rows)
    return dict(rows)


def test_shares_are_fair_and_a_share_is_given_up_before_it_is_taken(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=8) as rig:
            first, second, third = uuid4(), uuid4(), uuid4()
            assert await ask(rig, first) == dict.fromkeys(range(8), True)
            assert await ask(rig, first) == dict.fromkeys(range(8), False)
            assert await ask(rig, second) == {}
            assert await ask(rig, first, 4, 5, 6, 7) == dict.fromkeys(range(4), False)
            assert await ask(rig, second) == dict.fromkeys(range(4, 8), True)
            assert await ask(rig, third) == {}
            assert await ask(rig, first, 3) == dict.fromkeys(range(3), False)
            assert await ask(rig, third) == {3: True}

    run(test())


def test_a_lease_that_ended_is_taken_by_whoever_comes_first(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=2) as rig:
            first, second = uuid4(), uuid4()
            moment = timedelta(milliseconds=1)
            assert await ask(rig, first, ttl=moment) == {0: True, 1: True}
            await until(lambda: _all_ended(rig))
            # Its own again, but not without a break: another may have held it in between.
            assert await ask(rig, first, ttl=moment) == {0: True, 1: True}
            await until(lambda: _all_ended(rig))
            assert await ask(rig, second) == {0: True, 1: True}
            assert await ask(rig, first) == {}

    run(test())


def test_many_at_once_never_hold_the_same(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=16) as rig:
            workers = [uuid4() for _ in range(6)]
            for _ in range(10):
                held = await asyncio.gather(*(ask(rig, worker) for worker in workers))
                partitions = [partition for one in held for partition in one]
                assert len(partitions) == len(set(partitions))
                surplus = [sorted(one)[3:] for one in held]
                given = await asyncio.gather(
                    *(ask(rig, worker, *extra) for worker, extra in zip(workers, surplus, strict=True))
                )
            assert sorted(map(len, given)) == [1, 3, 3, 3, 3, 3]

    run(test())


def test_a_session_is_named_once_the_one_before_it_has_ended(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            first = Store(rig.postgres, SETTINGS, rig.log.source)
            async with keeping(rig) as leases:
                session = await first.open()
                await until(lambda: _holds(leases, {0, 1}))
                await leases.name_session(session, leases.usable)
                assert await _named(rig) == {session}
            async with keeping(rig) as leases:
                await until(lambda: _holds(leases, {0, 1}))
                assert {lease.previous for lease in leases.held.values()} == {session}
                assert await _named(rig) == {session}
                second = Store(rig.postgres, SETTINGS, rig.log.source)
                successor = await second.open()
                await leases.name_session(successor, leases.usable)
                assert await _named(rig) == {successor}
                running = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"
                assert await rig.value(running, session.pid) == 0
                assert await rig.value(running, successor.pid) == 1
                second.close()
            first.close()

    run(test())


def test_a_session_is_not_named_by_who_has_lost_the_lease(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            store = Store(rig.postgres, SETTINGS, rig.log.source)
            session = await store.open()
            async with keeping(rig, landing_lease_renew_s=60.0) as leases:
                await until(lambda: _holds(leases, {0, 1}))
                async with rig.superuser() as connection:
                    await connection.execute("UPDATE partition_leases SET worker = $1 WHERE partition = 1", uuid4())
                with pytest.raises(LeaseLapsedError):
                    await leases.name_session(session, leases.usable)
            store.close()

    run(test())


def test_a_pid_that_came_back_is_not_ended(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            store, other = (Store(rig.postgres, SETTINGS, rig.log.source) for _ in range(2))
            session, bystander = await store.open(), await other.open()
            async with keeping(rig) as leases:
                await until(lambda: _holds(leases, {0, 1}))
                for lease in leases.held.values():
                    lease.previous = Session(bystander.pid, bystander.start - timedelta(seconds=1))
                await leases.name_session(session, leases.usable)
            running = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"
            assert await rig.value(running, bystander.pid) == 1
            store.close()
            other.close()

    run(test())


def test_the_local_clock_ends_a_lease_whatever_the_database_says(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            clock = ManualClock()
            metrics = LandingMetrics(CollectorRegistry())
            settings = replace(SETTINGS, landing_lease_renew_s=60)
            leases = Leases(rig.postgres, settings, rig.log.source, clock=clock, metrics=metrics)
            running = asyncio.create_task(leases.run())
            await until(lambda: _holds(leases, {0, 1}))
            before = leases.is_valid
            clock.advance(settings.landing_lease_ttl_s)
            assert (before, leases.is_valid) == (True, False)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await leases.leave()
            assert await rig.value("SELECT count(*) FROM partition_leases WHERE worker IS NOT NULL") == 0

    run(test())


async def _all_ended(rig: Rig) -> bool:
    query = "SELECT bool_and(lease_until < clock_timestamp()) FROM partition_leases"
    workers = "SELECT count(*) = 0 FROM landing_workers WHERE seen_until >= clock_timestamp()"
    return bool(await rig.value(query) and await rig.value(workers))


async def _holds(leases: Leases, partitions: set[int]) -> bool:
    return set(leases.held) == partitions


async def _named(rig: Rig) -> set[Session]:
    return {Session(*row) for row in await rig.fetch("SELECT backend_pid, backend_start FROM partition_leases")}
