"""Retention on both databases: what nobody keeps goes, with its chunk where it can, and nothing else does."""

import asyncio
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from deploy import columnstore
from deploy.cli import main
from runtime.postgres import connect
from runtime.supervisor import EXIT_REFUSED
from tests import rollups_rig
from tests.databases import Database
from tests.erasure_rig import Estate
from tests.landing_rig import DAY, NOW, SECOND, Rig, channel, microseconds, open_rig, record, sqlite_url, until
from tests.retention_rig import (
    HOUR,
    ROLLUPS,
    SETTINGS,
    TABLES,
    compute,
    fill,
    horizon,
    keeper,
    look,
    one_pass,
    repair,
    rolled_up,
    session,
    spans,
)
from tests.rollups_rig import Actor, Lander, moment
from tests.services.test_verify import verify
from tests.support import run
from workers.landing.failures import TombstonesMovedError
from workers.retention.planning import Chunk, Horizon, Standing, effective, retired, shares
from workers.retention.sql import LEAD
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.rebuild import Wanted, rebuild
from workers.rollups.repairing import Repairer
from workers.rollups.session import NEVER, Session


def test_chunks_go_whole_and_rows_of_those_who_keep_less_go_before(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=24) as rig:
            (short,), (long,) = [await rig.register(raw_retention_days=days) for days in (30, 60)]
            await fill(rig, [short, long], 100)
            await compute(rig)
            before, rolled = await look(rig), await rolled_up(rig)
            announced, partial = retired(before), shares(before)
            assert {one.relation for one in announced} == {"readings", "text_readings"}
            assert {one.organisation for one in partial} == {short.organisation}

            went = await one_pass(rig)
            assert went == announced
            after = await look(rig)
            assert {*before.chunks} - {*after.chunks} >= {*announced}
            for device, days in ((short, 30), (long, 60)):
                dropped, deleted = await horizon(rig, device)
                assert dropped == deleted
                assert dropped.hour == dropped.minute == 0
                assert NOW - (days + 8) * DAY < microseconds(dropped) <= NOW - days * DAY
                for table in TABLES[:3]:
                    count, first = await spans(rig, table, device)
                    assert count > 0
                    assert dropped <= first
            assert (await spans(rig, "readings", long))[0] > (await spans(rig, "readings", short))[0]
            assert await rolled_up(rig) == rolled
            report, found = await verify(rig)
            assert found == []
            assert all(totals.by_rule > 0 for totals in report.organisations.values())
            assert await one_pass(rig) == []

    run(test())


def test_nothing_goes_before_it_is_computed_and_clean(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(raw_retention_days=30)
            await fill(rig, [device], 60)
            count, _ = await spans(rig, "readings", device)
            assert await one_pass(rig) == []
            assert (await spans(rig, "readings", device))[0] == count
            await compute(rig)
            # It was refused from the first pass on; a mark from before must be repaired first.
            async with rig.superuser() as connection:
                await connection.execute(
                    "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket)"
                    " SELECT series_id, $1, $1 FROM series",
                    moment(NOW - 55 * DAY - (NOW - 55 * DAY) % (300 * 10**6)),
                )
            assert await one_pass(rig) == []
            await repair(rig)
            rolled = await rolled_up(rig)
            assert len(await one_pass(rig)) > 0
            assert (await spans(rig, "readings", device))[0] < count
            assert await rolled_up(rig) == rolled

    run(test())


def test_nothing_behind_a_horizon_is_stored_or_computed_again(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=24) as rig:
            (device,) = await rig.register(raw_retention_days=30)
            await fill(rig, [device], 60)
            await compute(rig)
            await one_pass(rig)
            dropped = microseconds((await horizon(rig, device))[0])
            rolled = await rolled_up(rig)

            # Received when it was not too old, landed when it is.
            late = record(
                device, channel("power", [(dropped - HOUR, 1e6), (dropped, 5e6)]), received_at=dropped + 29 * DAY
            )
            await rig.land(late)
            assert await rig.fetch("SELECT code, item FROM quarantine") == [("too_old", -1)]
            assert await rig.value("SELECT count(*) FROM readings WHERE value = 5e6") == 1
            await repair(rig)
            buckets = "SELECT max(max), min(bucket) FROM rollups_5m WHERE max >= 1e6"
            assert await rig.fetch(buckets) == [(5e6, moment(dropped))]
            for before, after in zip(rolled, await rolled_up(rig), strict=True):
                assert [one for one in after if one[1] < moment(dropped)] == [
                    one for one in before if one[1] < moment(dropped)
                ]

            rolled = await rolled_up(rig)
            async with rig.superuser() as connection:
                await connection.execute(
                    "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket)"
                    " SELECT series_id, $1::timestamptz, $1::timestamptz + interval '23 hours' FROM series",
                    moment(dropped - 3 * DAY),
                )
            await repair(rig)
            async with session(rig) as opened:
                repairer = Repairer(rig.postgres, rollups_rig.SETTINGS, RollupsMetrics(CollectorRegistry()))
                wanted = Wanted(NOW - 100 * DAY, NOW - 2 * DAY, None, None, 0)
                assert [done async for done in rebuild(opened, repairer, wanted)]
            assert await rig.value("SELECT count(*) FROM rollup_marks") == 0
            assert await rolled_up(rig) == rolled
            report, found = await verify(rig)
            assert found == []
            # Whoever keeps more from now on gets nothing back, and nothing of it is called lost.
            async with rig.superuser() as connection:
                await connection.execute("UPDATE organisations SET raw_retention_days = 400")
            assert await one_pass(rig) == []
            report, found = await verify(rig)
            assert found == []
            assert report.organisations[device.organisation].by_rule > 0

    run(test())


def test_a_coarser_tier_outlives_what_it_was_computed_from(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            short, long = [(await rig.register(raw_retention_days=days))[0] for days in (20, 30)]
            await fill(rig, [short, long], 180, 12 * HOUR)
            await compute(rig)
            async with rig.superuser() as connection:
                await connection.execute(
                    "UPDATE organisations SET rollups_5m_days = 90 WHERE raw_retention_days = 30"
                )
            settings = replace(SETTINGS, retention_5m_days=40)
            went = await one_pass(rig, settings)
            assert {one.tier for one in went} == {"raw", "5m"}
            for device in (short, long):
                (dropped, deleted), (raw, _) = [await horizon(rig, device, tier) for tier in ("5m", "raw")]
                assert dropped == deleted < raw
                assert (await spans(rig, "rollups_5m", device))[1] >= dropped
            assert (await spans(rig, "rollups_5m", short))[0] < (await spans(rig, "rollups_5m", long))[0]
            coarse = (await rolled_up(rig))[1:]
            async with rig.superuser() as connection:
                await connection.execute(
                    "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket)"
                    " SELECT series_id, d, d FROM series,"
                    " generate_series($1::timestamptz, now() - interval '1 day', '1 day') AS d",
                    moment((NOW - 170 * DAY) // DAY * DAY),
                )
            await repair(rig)
            assert await rig.value("SELECT count(*) FROM rollup_marks") == 0
            assert (await rolled_up(rig))[1:] == coarse

    run(test())


def test_a_landing_that_does_not_know_a_horizon_is_waited_for(any_database: Database, tmp_path: Path) -> None:
    """What it stores behind it is repaired before its chunk goes; whoever asks later plans again."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0, raw_retention_days=30)
            await fill(rig, [device], 60)
            await compute(rig)
            key = await rig.value("SELECT series_id FROM series WHERE metric = 'power'")
            late = NOW - 50 * DAY + 1
            early, slow = [Lander(rig, 0, device, {"power": key}, Actor()) for _ in range(2)]
            try:
                await slow.actor.start(slow.land_one(record(device, channel("power", [(late + 1, 2e6)]))))
                while slow.actor.calls < 3:  # BEGIN; the positions
                    await slow.actor.step()
                await slow.actor.kill()

                await early.actor.start(early.land_one(record(device, channel("power", [(late, 1e6)]))))
                while not early.actor.is_running or early.actor.calls < 12:
                    await early.actor.step()
                    if await rig.value("SELECT count(*) FROM pg_locks WHERE relation = 'rollup_marks'::regclass"):
                        break
                keeping = keeper(rig, replace(SETTINGS, retention_settle_s=0.1))
                async with session(rig) as opened:
                    assert (await keeping.follow(opened)).chunks == []
                assert keeping.doing is not None
                assert "unsettled" in keeping.doing
                await early.actor.finish()
                keeping = keeper(rig)
                async with session(rig) as opened:
                    assert (await keeping.follow(opened)).chunks == []
                assert "marked" in str(keeping.doing)
                await repair(rig)
                assert await one_pass(rig) != []
                assert await rig.value("SELECT max(max) FROM rollups_1d") == 1e6
                again = Lander(rig, 0, device, {"power": key}, Actor())
                await again.actor.start(again.land_one(record(device, channel("power", [(late + 2, 3e6)]))))
                with pytest.raises(TombstonesMovedError):
                    await again.actor.finish()
                again.close()
            finally:
                early.close()
                slow.close()

    run(test())


def test_a_pass_that_is_killed_anywhere_costs_nothing(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), keep_landed_h=24) as rig:
            devices = [(await rig.register(raw_retention_days=days))[0] for days in (30, 45)]
            await fill(rig, devices, 70, 12 * HOUR)
            await compute(rig)
            rolled, foretold = await rolled_up(rig), retired(await look(rig))
            actor, steps, is_done = Actor(), 0, False
            while not is_done:
                steps += 1
                await actor.start(gated_pass(rig, actor))
                for _ in range(steps):
                    if actor.is_running:
                        await actor.step()
                is_done = not actor.is_running
                if is_done:
                    assert await actor.reap() is None
                else:
                    await actor.kill()
            assert steps > 20
            left = {one.name for one in (await look(rig)).chunks}
            assert not left & {one.name for one in foretold}
            for device in devices:
                dropped, deleted = await horizon(rig, device)
                assert dropped == deleted
                for table in TABLES[:3]:
                    assert (await spans(rig, table, device))[1] >= dropped
            assert await rolled_up(rig) == rolled
            _, found = await verify(rig)
            assert found == []

    async def gated_pass(rig: Rig, actor: Actor) -> None:
        async with session(rig) as opened:
            gated = Session(actor.gated(opened.connection), RollupsMetrics(CollectorRegistry()))
            await until(lambda: opened.connection.fetchval(LEAD))  # the last one's backend may not know yet
            await keeper(rig).follow(gated)

    run(test())


def test_a_chunk_that_is_being_read_is_let_go_and_landing_goes_on(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(raw_retention_days=30)
            await fill(rig, [device], 50)
            await compute(rig)
            foretold = retired(await look(rig))
            registry = CollectorRegistry()
            keeping = keeper(rig, registry=registry)
            async with rig.superuser() as reader, reader.transaction():
                await reader.fetch("SELECT count(*) FROM readings")
                async with asyncio.TaskGroup() as group, session(rig) as opened:
                    going = group.create_task(keeping.follow(opened))
                    await rig.land(record(device, channel("power", [(NOW + 1, 1.0)])))
                    went = (await going).chunks
                assert {one.relation for one in went} <= {"text_readings"}
                waiting = "sluice_retention_waiting_chunks"
                assert registry.get_sample_value(waiting, {"why": "locked"}) == len(foretold) - len(went)
            async with session(rig) as opened:
                assert len((await keeping.follow(opened)).chunks) == len(foretold) - len(went)
            assert registry.get_sample_value(waiting, {"why": "locked"}) == 0
            assert registry.get_sample_value("sluice_retention_chunks_total", {"tier": "raw"}) == len(foretold)
            assert await rig.value("SELECT count(*) FROM readings WHERE ts > now() - interval '1 day'") > 0

    run(test(), timeout_s=180)


def test_rows_that_stay_and_passes_that_end_are_counted(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            devices = [(await rig.register(raw_retention_days=days))[0] for days in (30, 60)]
            await fill(rig, devices, 50)
            await compute(rig)
            registry = CollectorRegistry()
            keeping = keeper(rig, registry=registry)

            def sample(name: str) -> float:
                return registry.get_sample_value(f"sluice_retention_{name}") or 0.0

            async def is_waiting() -> bool:
                return sample("waiting_shares") > 0

            async with asyncio.TaskGroup() as group, session(rig) as opened:
                async with rig.superuser() as other, other.transaction():
                    await other.execute("LOCK TABLE reading_notes IN SHARE MODE")
                    going = group.create_task(keeping.follow(opened))
                    await until(is_waiting)
                    assert sample("passed_timestamp_seconds") == 0
                await going
            assert sample("waiting_shares") == 0
            assert sample("passed_timestamp_seconds") > 0

    run(test())


def test_partitions_are_made_ahead(embedded_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(embedded_database, sqlite_url(tmp_path)) as rig:
            await one_pass(rig)
            standing = await look(rig)
            for table in (*TABLES[:2], *ROLLUPS):
                chunks = [one for one in standing.chunks if one.relation == table]
                assert min(one.first for one in chunks) <= NOW
                assert max(one.stop for one in chunks) > NOW + 28 * DAY

    run(test())


def test_the_command_says_what_would_go_and_lets_it_go(
    any_database: Database, tmp_path: Path, logging_as_it_was: None
) -> None:
    url = sqlite_url(tmp_path)

    async def prepare() -> None:
        async with open_rig(any_database, url) as rig:
            devices = [(await rig.register(raw_retention_days=days))[0] for days in (30, 60)]
            await fill(rig, devices, 80)
            await compute(rig)

    async def keep_less() -> None:
        async with open_rig(any_database, url) as rig, rig.superuser() as connection:
            await connection.execute("UPDATE organisations SET raw_retention_days = 20 WHERE raw_retention_days = 30")

    async def lead() -> None:
        async with open_rig(any_database, url) as rig, session(rig) as opened:
            assert await opened.connection.fetchval(LEAD)
            result = await asyncio.to_thread(sluice, "run")
            assert (result.exit_code, "a worker is at it" in result.output) == (1, True)

    def sluice(*arguments: str, **settings: str) -> Any:
        environment = {**any_database.environment, "SLUICE_LOG_URL": url, **settings}
        return CliRunner().invoke(main, ["retention", *arguments], env=environment)

    def told(*arguments: str) -> Any:
        result = sluice(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    run(prepare())
    before = told("show")
    assert [tier["tier"] for tier in before["tiers"]] == ["raw", "5m", "1h", "1d"]
    foretold = told("run", "--dry-run")
    assert foretold["chunks"]
    assert all(one["is_exact"] for one in foretold["rows"])
    assert before["tiers"][0]["retired"] == len(foretold["chunks"])
    assert "would go" in sluice("run", "--dry-run").output
    run(lead())
    assert told("show") == before
    went = told("run")
    assert went["chunks"] == foretold["chunks"]
    assert went["rows"] == foretold["rows"] != []
    assert went["waits"] is None
    assert told("run", "--dry-run") == {
        "dry_run": True, "chunks": [], "rows": [], "commands": {"rows": 0, "is_exact": True}, "waits": None,
    }  # fmt: skip
    after = told("show")
    assert after["tiers"][0]["retired"] == 0
    assert after["tiers"][0]["first"] == min(one["stop"] for one in went["chunks"][-2:])
    raw = [one["tiers"]["raw"] for one in after["organisations"]]
    assert [one["days"] for one in raw] == [30, 60]
    assert raw[0]["deleted_through"] == raw[0]["dropped_through"] > raw[1]["dropped_through"]
    assert "gone before" in sluice("show").output
    assert sluice("run").output == "nothing went\n"
    run(keep_less())
    foretold = sluice("run", "--dry-run").output
    assert foretold.count("would go") == len(foretold.splitlines()) > 0, "rows alone"
    assert sluice("run").output == foretold.replace("would go", "went")
    assert sluice("run").output == "nothing went\n"


COMMAND = """
INSERT INTO commands (command_id, organisation_id, device_id, command, state, created_at, expires_at, finished_at)
VALUES ($1, $2, $3, $4, $5, now() - $6::interval, now() - $6::interval,
        CASE WHEN $5 IN ('SUCCESS', 'FAILED', 'TIMEOUT') THEN now() - $6::interval END)
"""
STATES = ("PENDING", "SENT", "ACKNOWLEDGED", "SUCCESS", "FAILED", "TIMEOUT")


def test_commands_that_are_over_go_by_their_age_and_open_ones_never(
    any_database: Database, tmp_path: Path, logging_as_it_was: None
) -> None:
    url = sqlite_url(tmp_path)

    def sluice(*arguments: str, days: str = "395") -> Any:
        environment = {**any_database.environment, "SLUICE_LOG_URL": url, "SLUICE_RETENTION_COMMANDS_DAYS": days}
        result = CliRunner().invoke(main, ["retention", *arguments], env=environment)
        assert result.exit_code == 0, result.output
        return result.output

    async def left() -> list[str]:
        async with open_rig(any_database, url) as rig:
            return [row[0] for row in await rig.fetch("SELECT command FROM commands ORDER BY command")]

    async def prepare() -> None:
        async with open_rig(any_database, url) as rig, rig.superuser() as connection:
            for device in [(await rig.register())[0] for _ in range(2)]:
                for days in (394, 396, 4_000):
                    for state in STATES:
                        name, age = f"{state} {days}", timedelta(days=days)
                        await connection.execute(
                            COMMAND, uuid4(), device.organisation, device.device, name, state, age
                        )

    async def keep() -> int:
        async with open_rig(any_database, url) as rig, session(rig) as opened:
            return (await keeper(rig, replace(SETTINGS, retention_step_rows=5)).follow(opened)).commands

    run(prepare())
    everything = run(left())
    assert "commands that are over: 395 days" in sluice("show")
    assert sluice("run", "--dry-run") == "12 commands that are over would go\n"
    assert json.loads(sluice("run", "--dry-run", "--json"))["commands"] == {"rows": 12, "is_exact": True}
    assert sluice("run", days="0") == "nothing went\n"
    assert run(left()) == everything
    assert run(keep()) == 12  # in steps of five
    kept = [name for name in everything if name.split()[0] in STATES[:3] or name.endswith(" 394")]
    assert run(left()) == kept
    assert sluice("run", "--dry-run") == "nothing would go\n"
    assert sluice("run", days="100") == "6 commands that are over went\n"
    assert [name.split()[0] for name in run(left())] == sorted(6 * STATES[:3])


def test_a_columnstore_is_refused_where_the_licence_has_none(
    any_database: Database, tmp_path: Path, logging_as_it_was: None
) -> None:
    environment = {
        **any_database.environment,
        "SLUICE_LOG_URL": sqlite_url(tmp_path),
        "SLUICE_COLUMNSTORE_AFTER_DAYS": "30",
    }
    for arguments in (["migrate"], ["retention", "show"]):
        result = CliRunner().invoke(main, arguments, env=environment)
        assert result.exit_code == EXIT_REFUSED
        assert "SLUICE_COLUMNSTORE_AFTER_DAYS=30 needs TimescaleDB under its own licence" in result.output
        environment["SLUICE_COLUMNSTORE_AFTER_DAYS"] = "0"
        assert CliRunner().invoke(main, ["migrate"], env=environment).exit_code == 0
        environment["SLUICE_COLUMNSTORE_AFTER_DAYS"] = "30"


def test_what_makes_a_columnstore_is_refused_for_the_licence_alone(database: Database) -> None:
    """The server knows each name and argument, so that no more than the licence is in the way."""

    async def test() -> None:
        owner = await connect(database.settings, role=None, application="test", url=database.owner_url)
        try:
            found = await owner.fetch(columnstore.STANDING, 30)
            assert [tuple(row) for row in found] == [(False, False, False)]
            for statement, *arguments in ((columnstore.REMOVE,), (columnstore.ENABLE,), (columnstore.ADD, 30)):
                with pytest.raises(asyncpg.FeatureNotSupportedError, match="under the current"):
                    await owner.fetch(statement, *arguments)
        finally:
            await owner.close()

    run(test())


def test_what_is_left_of_an_erased_site_goes_behind_the_horizons_too(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            here = Estate(rig)
            async with rig.superuser() as connection:
                await connection.execute(
                    "INSERT INTO organisations (organisation_id, name, raw_retention_days, rollups_5m_days)"
                    " VALUES ($1, 'test', 30, 60)",
                    here.organisation,
                )
            first, site = [await here.site(name) for name in ("a", "s")]
            moved = [(NOW - days * DAY) // DAY * DAY + 9 * HOUR + 20 * 60 * SECOND for days in (150, 120, 70, 40)]
            # At the site before and after the horizon of 5 minutes.
            stays = [first, site, first, site, first]
            device = await here.device(*zip(stays, [NOW - 300 * DAY, *moved], strict=True))
            await fill(rig, [device], 170, 3 * HOUR)
            await compute(rig)
            await one_pass(rig)
            (fine, _), (raw, _) = [await horizon(rig, device, tier) for tier in ("5m", "raw")]
            assert moment(moved[1]) < fine < moment(moved[3]) < raw
            before = await rolled_up(rig)
            await here.delete(site)
            await here.erase(site)
            times = [(moment(moved[0]), moment(moved[1])), (moment(moved[2]), moment(moved[3]))]
            for tier, width in enumerate((timedelta(minutes=5), timedelta(hours=1), timedelta(days=1))):
                left = {(one[0], one[1]): one for one in (await rolled_up(rig))[tier]}
                for row in before[tier]:
                    touched = any(row[1] < end and row[1] + width > begin for begin, end in times)
                    whole = any(row[1] >= begin and row[1] + width <= end for begin, end in times)
                    if not touched:
                        assert left[row[0], row[1]] == row
                    if whole or (touched and tier == 1 and row[1] < fine):
                        assert (row[0], row[1]) not in left
                ends = [one for row in left.values() for one in (row[7], row[9])]
                assert not [one for one in ends if any(begin <= one < end for begin, end in times)]
                # Of a day that a move cuts, what is of the other site was computed anew.
                cut = [one for one in left.values() if any(one[1] < at < one[1] + width for at in sum(times, ()))]
                assert len(cut) == 4 or tier < 2

    run(test())


def test_how_long_is_kept_never_less_than_what_it_is_computed_from() -> None:
    assert effective((30, None, None, None), (0, 1826, 1826, 0)) == (30, 1826, 1826, 0)
    assert effective((400, 30, 20, 10), (0, 1826, 1826, 0)) == (400, 400, 400, 400)
    assert effective((400, 0, 20, None), (0, 1826, 1826, 900)) == (400, 0, 0, 0)
    assert effective((36_600, None, None, None), (0, 1826, 1826, 0)) == (36_600, 36_600, 36_600, 0)


def test_a_horizon_is_a_midnight_where_a_chunk_ends_and_never_goes_back() -> None:
    one = uuid4()
    chunks = [
        Chunk("raw", "readings", "a", 0, 7 * DAY, 1),
        Chunk("raw", "readings", "b", 7 * DAY, 14 * DAY + HOUR, 1),
        Chunk("5m", "rollups_5m", "c", 0, 12 * DAY, 1),
    ]
    standing = Standing(40 * DAY, {one: (20, 25, 0, 0)}, {}, chunks)
    assert standing.wanted(one) == {"raw": 14 * DAY, "5m": 12 * DAY, "1h": NEVER, "1d": NEVER}
    # One that does not end at midnight waits for the next.
    assert [chunk.name for chunk in retired(standing)] == ["a", "c"]
    refused = {(one, "raw"): Horizon(21 * DAY, NEVER, NEVER)}
    assert Standing(40 * DAY, {one: (0, 0, 0, 0)}, refused, chunks).wanted(one)["raw"] == 21 * DAY
    other = uuid4()
    both = Standing(40 * DAY, {one: (20, 0, 0, 0), other: (30, 0, 0, 0)}, {}, chunks)
    assert [chunk.name for chunk in retired(both)] == ["a"]
    assert shares(both) == []
    assert retired(Standing(40 * DAY, {}, {}, chunks)) == []
