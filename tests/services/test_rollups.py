"""Roll-ups on both databases: whatever comes late, goes, stops or runs twice, answers are those of the readings."""

import json
import os
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from deploy.cli import main
from runtime.clock import SystemClock
from runtime.errors import UnavailableError
from runtime.ids import uuid7
from schemas.record import TIME_MADE_UP, Record
from tests.databases import Database
from tests.landing_rig import NOW, SECOND, Rig, channel, count, microseconds, open_rig, record, sqlite_url, until
from tests.rollups_rig import (
    SETTINGS,
    WIDTHS,
    Actor,
    Answer,
    GatedCloser,
    GatedRepairer,
    Lander,
    Reader,
    edges_between,
    erase,
    given,
    moment,
    open_reader,
)
from tests.support import run
from workers.rollups.closing import Closer
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.rebuild import Wanted, rebuild
from workers.rollups.repairing import Repairer
from workers.rollups.session import DAY, HOUR, MINUTES_5, floored, open_session
from workers.rollups.sql import MARK

#: Of one walk; each is one call to the database of one of six sessions, or more.
STEPS = int(os.environ.get("WALK_STEPS", "10000"))
SEED = int(os.environ.get("WALK_SEED", "0")) or random.randrange(10**6)
#: Of 20 ms each, in which a transaction of another test ends.
PASSES_MAX = 500
START = floored(NOW, DAY) - 6 * DAY
METRICS = ("power", "energy", "state")
METRICS_OF_NONE = RollupsMetrics(CollectorRegistry())
#: In three slices.
SERIES = ((5, 1_500, 2_999), (6, 1_501, 2_998))


class World:
    """Two partitions that land, passes and repairs under way, and a time that only the test moves."""

    def __init__(self, rig: Rig, landers: list[Lander], reader: Reader) -> None:
        self.rig = rig
        self.landers = landers
        self.reader = reader
        self.now = START

    def closer(self, actor: Actor) -> GatedCloser:
        return GatedCloser(self.rig, actor, lambda: self.now)

    async def close(self, *, once: bool = False) -> None:
        """A whole pass; another one where transactions of other tests held it up, unless one of ours does."""
        for _ in range(PASSES_MAX):
            actor = Actor()
            closer = self.closer(actor)
            await actor.start(closer.keep())
            await actor.finish()
            if once or closer.trouble is None:
                return

    async def repair(self) -> None:
        actor = Actor()
        await actor.start(GatedRepairer(self.rig, actor).keep())
        await actor.finish()

    async def land(self, at: int, *readings: tuple[int, float], metric: str = "energy") -> None:
        lander, actor = self.landers[at], self.landers[at].actor
        await actor.start(lander.land_one(record(lander.device, channel(metric, readings))))
        await actor.finish()

    async def state(self) -> tuple[int, int]:
        """What is closed and computed through, in microseconds since `START`."""
        query = "SELECT greatest(closing_through, $1), greatest(computed_through, $1) FROM rollup_state"
        ((closing, computed),) = await self.rig.fetch(query, moment(START - 30 * DAY))
        return microseconds(closing) - START, microseconds(computed) - START

    async def marks(self) -> int:
        found: int = await self.rig.value("SELECT count(*) FROM rollup_marks")
        return found

    async def answers(self, width: int) -> list[Answer]:
        answer = await self.reader.ask(START, START + DAY, width)
        self.reader.from_rollups += answer.from_rollups
        return given(answer, edges_between(START, START + DAY, width))

    async def check(self, first: int = START - 2 * DAY, stop: int = START + 8 * DAY) -> None:
        await self.reader.check((first, stop, width) for width in WIDTHS)


@asynccontextmanager
async def world(database: Database, directory: Path) -> AsyncIterator[World]:
    async with open_rig(database, sqlite_url(directory)) as rig:
        devices = await rig.register(2)
        landers = [
            Lander(rig, at, device, dict(zip(METRICS, SERIES[at], strict=True)), Actor())
            for at, device in enumerate(devices)
        ]
        async with rig.superuser() as connection:
            for lander in landers:
                owner = lander.device
                await connection.executemany(
                    "INSERT INTO series (series_id, organisation_id, device_id, metric, unit)"
                    " OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, 'W')",
                    [(key, owner.organisation, owner.device, name) for name, key in lander.series.items()],
                )
            for day in range(-14, 21, 7):
                await connection.execute("SELECT ensure_week($1)", moment(START + day * DAY))
        series = [key for keys in SERIES for key in keys]
        async with open_reader(rig.postgres, devices[0].organisation, series) as reader:
            try:
                yield World(rig, landers, reader)
            finally:
                for lander in landers:
                    lander.close()


# ---------------------------------------------------------------- at random


class Walk:
    """Actors that go on in any order, one call at a time, and that may be killed at each."""

    def __init__(self, here: World, dice: random.Random) -> None:
        self.here = here
        self.dice = dice
        self.actors = {f"land {at}": lander.actor for at, lander in enumerate(here.landers)}
        self.actors |= {name: Actor() for name in ("close", "close too", "repair", "repair too", "erase")}
        self.kills = self.ends = self.at = 0
        self.frozen: dict[str, int] = {}
        """Until which step these stand still, whatever they have in hand."""

    async def step(self) -> None:
        self.at += 1
        roll = self.dice.random()
        if roll < 0.02:
            self.here.now = min(self.here.now + round(self.dice.expovariate(1 / (20 * 60))) * SECOND, START + 6 * DAY)
        elif roll < 0.03:
            name = self.dice.choice([*self.actors])
            await self.actors[name].kill()
            self.kills += 1
        elif roll < 0.045:
            await self.check()
        elif roll < 0.06:
            self.frozen[self.dice.choice([*self.actors])] = self.at + self.dice.choice((50, 300))
        else:
            name = self.dice.choices([*self.actors], (3, 3, 6, 3, 3, 2, 0.5))[0]
            if self.frozen.get(name, 0) < self.at:
                await self.go_on(name, self.actors[name])

    async def go_on(self, name: str, actor: Actor) -> None:
        if actor.is_running:
            for _ in range(self.dice.choice((1, 2, 20))):
                await actor.step()
                if not (actor.is_running and actor.waits):
                    break
            return
        if name.endswith("too") and self.dice.random() < 0.9:
            return
        if actor._task is not None:
            error = await actor.reap()
            self.ends += error is None
            if error is not None and not isinstance(error, (asyncpg.PostgresError, UnavailableError, OSError)):
                raise error
        await actor.start(self.work(name, actor))

    def work(self, name: str, actor: Actor) -> Coroutine[Any, Any, None]:
        if name.startswith("land"):
            lander = self.here.landers[int(name[-1])]
            return lander.land_one(self.record(lander))
        if name.startswith("close"):
            return self.here.closer(actor).keep()
        if name.startswith("repair"):
            return GatedRepairer(self.here.rig, actor).keep()
        first = self.here.now - self.dice.randrange(2 * DAY)
        series = self.dice.sample(self.here.reader.series, 2)
        return erase(self.here.rig, actor, series, first, first + self.dice.choice((MINUTES_5, HOUR, 6 * HOUR)))

    def record(self, lander: Lander) -> Record:
        channels = []
        for metric in self.dice.sample(METRICS, 2):
            late = self.dice.random() < 0.3
            at = self.here.now - (self.dice.randrange(3 * DAY) if late else self.dice.randrange(HOUR))
            pace = self.dice.choice((7, 60, 400, 5_000)) * SECOND
            readings = []
            for number in range(self.dice.choice((1, 2, 20))):
                value = {"state": float(self.dice.random() < 0.5)}.get(metric, round(self.dice.uniform(-5, 100), 3))
                readings.append((at + number * pace, value))
            channels.append(channel(metric, [one for one in readings if one[0] < NOW]))
        return record(lander.device, *channels)

    async def check(self) -> None:
        ends = sorted(START - DAY + self.dice.randrange(8 * DAY) for _ in range(2))
        spans = [(START - 3 * DAY, START + 8 * DAY, width) for width in self.dice.sample(WIDTHS, 2)]
        await self.here.reader.check([*spans, (ends[0], ends[1] + 1, self.dice.choice(WIDTHS))])

    async def end(self) -> None:
        for actor in self.actors.values():
            await actor.kill()


def test_at_any_moment_of_a_random_walk_the_answers_are_the_readings(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        print(f"WALK_SEED={SEED}")
        async with world(any_database, tmp_path) as here:
            walk = Walk(here, random.Random(SEED))
            try:
                for _ in range(STEPS):
                    await walk.step()
            finally:
                await walk.end()
            here.now = START + 7 * DAY
            for _ in range(3):
                await here.close()
                await here.repair()
            assert await here.marks() == 0
            assert (await here.state())[1] == 7 * DAY
            told, here.reader.from_rollups = here.reader.from_rollups, 0
            await here.check()
            assert here.reader.from_rollups > 0 < told
            print(f"{walk.kills} kills, {walk.ends} ends, {here.reader.compared} buckets compared")

    run(test(), timeout_s=300)


# ---------------------------------------------------------------- each sentence of the design


def test_a_landing_that_is_open_across_the_closing_is_waited_for(any_database: Database, tmp_path: Path) -> None:
    """If it read the old end it leaves no mark: nothing is computed before it has ended."""

    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            here.now = START + HOUR
            lander = here.landers[0]
            for calls in range(3, 7):  # held before it reads the end, and before each call that follows
                await here.close()
                late = here.now + 100 * SECOND
                await lander.actor.start(lander.land_one(record(lander.device, channel("power", [(late, 1.0)]))))
                while lander.actor.calls < calls:
                    await lander.actor.step()
                before = here.now
                here.now += HOUR
                await here.close(once=True)
                assert await here.state() == (here.now - START, before - START)
                await lander.actor.finish()
                assert await here.marks() == (calls == 3)
                await here.close()
                assert await here.state() == (here.now - START, here.now - START)
                await here.check()
                await here.repair()

    run(test())


def test_a_landing_that_begins_after_the_closing_leaves_a_mark(any_database: Database, tmp_path: Path) -> None:
    """Also before anything is computed there, and whether its rows are fresh, staged or moved."""

    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            here.now = START + HOUR
            closer = Actor()
            await closer.start(here.closer(closer).keep())
            while (await here.state())[0] < HOUR:
                await closer.step()
            await here.land(0, (START + 60 * SECOND, 1.0), (START + HOUR - SECOND, 2.0), (START + HOUR, 3.0))
            assert await here.rig.fetch("SELECT series_id, last_bucket - first_bucket FROM rollup_marks") == [
                (1_500, timedelta(minutes=55))
            ]
            await here.land(0, (START + 30 * SECOND, 1.0), (START + 60 * SECOND, 5.0))
            assert await here.marks() == 2
            await closer.finish()
            await here.check()
            await here.close()
            await here.repair()
            assert await here.marks() == 0
            await here.check()
            made_up = channel("power", [(START + 60 * SECOND, 1.0)], quality=TIME_MADE_UP)
            for _ in range(2):
                lander = here.landers[0]
                await lander.actor.start(lander.land_one(record(lander.device, made_up)))
                await lander.actor.finish()
            assert await here.rig.value("SELECT count(*) FROM readings WHERE series_id = 5") == 2
            assert await here.marks() == 2
            await here.check()

    run(test())


def test_late_readings_are_marked_by_day_and_by_what_lies_together(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            here.now = START + 3 * DAY
            await here.close()
            times = [DAY - HOUR, DAY - 5 * SECOND, DAY + SECOND, DAY + 3 * HOUR, 3 * DAY - SECOND, 3 * DAY]
            await here.land(0, *((START + at, 1.0) for at in times))
            rows = await here.rig.fetch("SELECT first_bucket, last_bucket FROM rollup_marks ORDER BY 1")
            assert [tuple(microseconds(at) - START for at in row) for row in rows] == [
                (DAY - HOUR, DAY - MINUTES_5),
                (DAY, DAY),
                (DAY + 3 * HOUR, DAY + 3 * HOUR),
                (3 * DAY - MINUTES_5, 3 * DAY - MINUTES_5),
            ]
            await here.check()
            await here.repair()
            await here.check()

    run(test())


def test_a_repair_deletes_the_marks_it_saw_and_no_others(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            await here.land(0, *((START + at * 60 * SECOND, float(at)) for at in range(600)))
            here.now = START + DAY
            await here.close()
            late = SECOND
            for calls in range(2, 16):
                await here.land(0, (START + late, 5.0))
                repairer = Actor()
                await repairer.start(GatedRepairer(here.rig, repairer).keep())
                while repairer.is_running and repairer.calls < calls:
                    await repairer.step()
                await here.land(0, (START + late + SECOND, 7.0), (START + 2 * HOUR + late, 9.0))
                await here.check()
                await repairer.finish()
                await here.check()
                late += 2 * SECOND
            await here.repair()
            assert await here.marks() == 0
            await here.check()

    run(test())


def test_a_pass_or_repair_killed_at_any_call_is_gone_on_with(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            for metric in METRICS:
                await here.land(0, *((START + at * 600 * SECOND, float(at % 7)) for at in range(200)), metric=metric)
            calls, passes = 0, 0
            while passes < 2:
                calls += 1
                await here.land(1, (START + calls * SECOND, 1.0), (START + HOUR + calls * SECOND, 2.0))
                here.now += 10 * 60 * SECOND
                for name in ("close", "repair"):
                    actor = Actor()
                    keep = here.closer(actor).keep if name == "close" else GatedRepairer(here.rig, actor).keep
                    await actor.start(keep())
                    while actor.is_running and actor.calls < calls:
                        await actor.step()
                    passes += not actor.is_running
                    await actor.kill()
                    await here.check()
            for _ in range(3):
                await here.close()
                await here.repair()
            assert await here.marks() == 0
            assert len({*await here.state()}) == 1
            await here.check()

    run(test())


def test_of_two_workers_one_closes_and_the_other_takes_over(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            await here.land(0, (START, 1.0))
            here.now = START + DAY
            first = Actor()
            await first.start(here.closer(first).keep())
            for _ in range(4):
                await first.step()
            stood = await here.state()
            await here.close()
            assert await here.state() == stood
            await first.kill()
            await until(lambda: taken_over(here))
            await here.check()

    async def taken_over(here: World) -> bool:
        await here.close()
        return (await here.state())[1] == DAY

    run(test())


def test_erased_readings_leave_the_roll_ups_with_them(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            await here.land(0, *((START + at * 600 * SECOND, float(at)) for at in range(200)))
            here.now = START + 2 * DAY
            await here.close()
            eraser = Actor()
            await eraser.start(erase(here.rig, eraser, [1_500], START - DAY, START + 3 * DAY))
            await eraser.finish()
            await here.check()
            await here.repair()
            for tier in ("5m", "1h", "1d"):
                assert await here.rig.value(f"SELECT count(*) FROM rollups_{tier}") == 0
            await here.check()

    run(test())


def test_an_erasing_under_way_is_waited_for_or_leaves_marks(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            for calls in (2, 3):
                await here.close()
                await here.land(0, (here.now + SECOND, 1.0), (here.now + 2 * SECOND, 2.0))
                eraser = Actor()
                await eraser.start(erase(here.rig, eraser, [1_500], here.now, here.now + 2 * SECOND))
                while eraser.calls < calls:
                    await eraser.step()
                here.now += HOUR
                await here.close(once=True)
                await eraser.finish()
                await here.close()
                await here.check()
                assert await here.rig.value("SELECT count(*) FROM readings") == calls - 1

    run(test())


def test_numbers_beyond_all_sums_stop_nothing(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            values = [1.7e308, 1.7e308, -1.7e308, 5e-324, 0.0, 1.0, -5e-324]
            await here.land(0, *((START + at * SECOND, value) for at, value in enumerate(values)))
            await here.land(0, (START + HOUR, 3.0))
            raw = await here.answers(HOUR)
            here.now = START + DAY
            await here.close()
            assert await here.state() == (DAY, DAY)
            rolled = await here.answers(HOUR)
            assert rolled == raw
            assert [(row.readings, row.sum, row.max) for row in rolled] == [(7, None, 1.7e308), (1, 3.0, 3.0)]
            assert here.reader.from_rollups == 8

    run(test())


def test_how_far_readings_have_landed(any_database: Database, tmp_path: Path) -> None:
    """A partition with more to land has landed what was received before its newest; one at its end, everything."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(1, partition=0)
            metrics = RollupsMetrics(CollectorRegistry())
            closer = Closer(rig.postgres, replace(SETTINGS, rollups_delay_s=60), rig.log, SystemClock(), metrics)

            async def closed() -> int:
                for _ in range(PASSES_MAX):
                    await closer.keep()
                    if closer.trouble is None:
                        break
                return microseconds(await rig.value("SELECT closing_through FROM rollup_state"))

            await rig.append(record(device, channel("power", [(NOW, 1.0)]), received_at=NOW - 2 * HOUR))
            await closer.keep()
            assert await rig.value("SELECT NOT isfinite(closing_through) FROM rollup_state")
            async with rig.worker():
                await rig.landed()
            await rig.append(record(device, channel("power", [(NOW, 1.0)]), received_at=NOW - HOUR))
            assert await closed() == floored(NOW - 2 * HOUR - 60 * SECOND)
            async with rig.worker():
                await rig.landed()
            assert await closed() > NOW - 60 * SECOND - MINUTES_5
            assert count(metrics.lag) < 900

    run(test())


def test_a_range_is_rebuilt_on_demand(any_database: Database, tmp_path: Path) -> None:
    """Whatever stood there, of what was asked for and of nothing else; and the workers finish what was stopped."""

    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            for at in (0, 1):
                await here.land(at, *((START + hour * HOUR, float(hour)) for hour in range(72)))
            here.now = START + 3 * DAY
            await here.close()
            for tier in ("5m", "1h", "1d"):
                async with here.rig.superuser() as connection:
                    await connection.execute(f"UPDATE rollups_{tier} SET sum = sum + 1")
            await rebuilt(here, Wanted(START + HOUR, START + DAY, 1_500, None, 0))
            assert await damaged(here) == [(1_500, 49), (1_501, 72)]
            device = here.landers[0].device.device
            await rebuilt(here, Wanted(START, START + 9 * DAY, None, device, 0))
            assert await damaged(here) == [(1_501, 72)]
            await rebuilt(here, Wanted(START, START + 9 * DAY, None, None, 1_501))
            assert await damaged(here) == [(1_501, 72)]
            async with open_session(here.rig.postgres, METRICS_OF_NONE) as session:
                await session.connection.execute(MARK, [1_501], START, START + 3 * DAY)
            await here.check()
            await here.repair()
            assert await damaged(here) == []
            await here.check()

    async def rebuilt(here: World, wanted: Wanted) -> None:
        repairer = Repairer(here.rig.postgres, SETTINGS, METRICS_OF_NONE)
        async with open_session(here.rig.postgres, METRICS_OF_NONE) as session:
            assert [done async for done in rebuild(session, repairer, wanted)] or wanted.after
        assert await here.marks() == 0

    async def damaged(here: World) -> list[Any]:
        query = "SELECT series_id, count(*) FROM rollups_5m WHERE sum <> first GROUP BY 1 ORDER BY 1"
        return await here.rig.fetch(query)

    run(test())


def test_the_command_tells_how_far_roll_ups_go(database: Database, tmp_path: Path, logging_as_it_was: None) -> None:
    async def prepare() -> None:
        async with world(database, tmp_path) as here:
            await here.land(0, (START, 1.0))
            here.now = START + DAY
            await here.close()
            await here.land(0, (START + SECOND, 1.0))

    run(prepare())
    environment = {**database.environment, "SLUICE_JSON": "true"}
    status = CliRunner(env=environment).invoke(main, ["rollups", "status"])
    assert status.exit_code == 0, status.output
    told = json.loads(status.output.splitlines()[-1])
    assert told["computed_through"] == told["closing_through"] == moment(START + DAY).isoformat()
    assert told["marks"] == 1
    span = ["--from", moment(START).isoformat(), "--to", moment(START + DAY).isoformat()]
    done = CliRunner(env=environment).invoke(main, ["rollups", "rebuild", *span])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output.splitlines()[-1]) == {"through_series": 2_999}
    reversed_span = ["--from", span[3], "--to", span[1]]
    assert CliRunner(env=environment).invoke(main, ["rollups", "rebuild", *reversed_span]).exit_code != 0


def test_series_of_another_organisation_are_not_answered(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(any_database, tmp_path) as here:
            await here.land(0, (START, 1.0))
            here.now = START + DAY
            await here.close()
            assert len(await here.answers(DAY)) == 1
            async with open_reader(here.rig.postgres, uuid7(), here.reader.series) as stranger:
                assert (await stranger.ask(START, START + DAY, DAY)).series == {}

    run(test())
