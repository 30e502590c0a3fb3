"""What runs beside ingest and landing: roll-ups, their repairs, and dashboards that ask.

Everything real, and everything on one machine, load and clients included. Left out: questions by themselves
(`bench.queries`).
"""

import asyncio
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
import orjson

from api.readings.aggregation import Aggregated, Question, aggregate
from api.readings.buckets import Bucket, edges_of, zone_of
from api.readings.functions import COLUMNS, FUNCTIONS
from api.readings.functions import Parts as Columns
from api.readings.series import Found, find_each
from bench.asking import Api, Client
from bench.books import Books
from bench.errors import BenchError
from bench.history import History, close_until, rollups_session
from bench.load import LOOPBACK, Clients, Load
from bench.parts import Parts, Role, Workshop, progress, workshop
from bench.registry import Registered, add_tokens, register
from bench.usage import Meter, free_port, own_cpu_s
from bench.workload import INTERVAL_S, METRICS, Fleet, Round, json_post
from runtime.postgres import PostgresSettings, connect
from workers.rollups.settings import RollupsSettings

TIMEOUT_S: Final = 600.0
CONNECTIONS: Final = 32
READINGS_A_REQUEST: Final = 100
DEVICES: Final = 1_250
#: Landing with and without roll-ups beside it, in turn, so many times each.
TURNS: Final = 3
#: The longest there may be: the worker keeps its partitions while it is held.
LEASE_TTL_S: Final = 300


# ---------------------------------------------------------------- landing


@dataclass(frozen=True)
class LandingBeside:
    """A full log landed with nothing else to do, and while as many readings landed before are rolled up."""

    readings: int
    """Landed in each turn, and rolled up in each that has roll-ups beside."""
    alone_per_s: Sequence[float]
    beside_per_s: Sequence[float]
    landing_us: float
    """CPU of worker and PostgreSQL, a reading; and what the session of the roll-ups took."""
    rollups_us: float
    rolled_up_s: Sequence[float]

    @property
    def ratio(self) -> float:
        return _median(self.beside_per_s) / _median(self.alone_per_s)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


async def landing_beside(parts: Parts, readings: int) -> LandingBeside:
    """Whoever rolls up is this process, with the workers' code: it says when, and which readings."""
    async with workshop(parts) as shop, rollups_session(parts) as session:
        registered = await _registered(parts, DEVICES)
        if not await session.leads("closing"):
            raise BenchError("a worker of somebody else's rolls up there")
        requests = max(DEVICES, readings // READINGS_A_REQUEST)
        rounds = _rounds(registered, requests, 1 + 2 * TURNS)
        port = free_port()
        await shop.role("ingest", SLUICE_HTTP_LISTEN=f"{LOOPBACK}:{port}")
        worker = await shop.role("worker", SLUICE_LANDING_LEASE_TTL_S=str(LEASE_TTL_S))
        async with _books(parts, registered.organisation) as books:
            run = _Landing(parts, books, worker, session, port)
            return await run.turns(rounds)


def _rounds(registered: Registered, requests: int, count: int) -> list[Round]:
    """One after another in time, the last of them ending now."""
    a_device = count * READINGS_A_REQUEST * -(-requests // DEVICES)
    begin_s = int(time.time()) - a_device // len(METRICS) * INTERVAL_S
    fleet = Fleet(registered.tokens, begin_s)
    rounds, first = list[Round](), 0
    for _ in range(count):
        rounds.append(Round(fleet, first, READINGS_A_REQUEST, requests))
        first = rounds[-1].next_first
    return rounds


class _Turn(NamedTuple):
    """One round landed."""

    readings_per_s: float
    us: float
    rollups_us: float
    rolled_up_s: float


class _Landing:
    """Lands one round after another."""

    def __init__(self, parts: Parts, books: Books, worker: Role, session: Any, port: int) -> None:
        self._parts = parts
        self._books = books
        self._worker = worker
        self._session = session
        self._port = port

    async def turns(self, rounds: Sequence[Round]) -> LandingBeside:
        await self._land(rounds[0], None)
        alone, beside = list[_Turn](), list[_Turn]()
        for number, one in enumerate(rounds[1:], 1):
            if number % 2:
                beside.append(await self._land(one, _end(rounds[number - 1])))
            else:
                # What the turn before landed is not to wait for the next one.
                alone.append(await self._land(one, None))
                await self._roll_up(_end(rounds[number - 1]))
        return LandingBeside(
            rounds[0].readings,
            [turn.readings_per_s for turn in alone],
            [turn.readings_per_s for turn in beside],
            _median([turn.us for turn in alone]),
            _median([turn.rollups_us for turn in beside]),
            [turn.rolled_up_s for turn in beside],
        )

    async def _land(self, landed: Round, until: datetime | None) -> _Turn:
        """From a full log; what ends before `until` is rolled up meanwhile."""
        progress(f"landing {landed.readings} readings, {'roll-ups beside' if until else 'alone'}")
        pid = self._session.connection.get_server_pid()
        rolling: asyncio.Task[float] | None = None
        with self._worker.held():
            lanes = landed.lanes(CONNECTIONS)
            async with Clients(self._port, len(lanes)) as clients:
                await clients.send(lanes, landed.each, TIMEOUT_S)
            meter = Meter(worker=self._worker.pid, postgresql=self._parts.postgresql)
            rolling_cpu_s, began = own_cpu_s(pid), time.perf_counter()
            if until is not None:
                rolling = asyncio.create_task(self._roll_up(until))
        await self._books.landed(TIMEOUT_S)
        seconds, taken = time.perf_counter() - began, meter.read()
        rolled_up_s = 0.0 if rolling is None else await rolling
        rollups_us = (own_cpu_s(pid) - rolling_cpu_s) * 1e6 / landed.readings
        us = (taken["worker"] + taken["postgresql"]) * 1e6 / landed.readings
        return _Turn(landed.readings / seconds, us, rollups_us, rolled_up_s)

    async def _roll_up(self, until: datetime) -> float:
        began = time.perf_counter()
        await close_until(self._session, self._parts, until, RollupsSettings.rollups_share)
        return time.perf_counter() - began


def _end(landed: Round) -> datetime:
    """Of the readings of a round, in time."""
    return datetime.fromtimestamp(landed.fleet.begin_s + landed.next_first // len(METRICS) * INTERVAL_S, UTC)


@asynccontextmanager
async def _books(parts: Parts, organisation: UUID) -> Any:
    books = Books(parts, organisation)
    await books.open()
    try:
        yield books
    finally:
        await books.close()


async def _registered(parts: Parts, devices: int) -> Registered:
    progress(f"registering {devices} devices")
    connection = await asyncpg.connect(parts.database_url)
    try:
        return await register(connection, parts.environment["SLUICE_SECRET_KEYS"], devices)
    finally:
        await connection.close()


# ---------------------------------------------------------------- late data

LATE: Final = timedelta(hours=6)
LATE_SHARE: Final = 0.01
SENDING: Final = 100
READINGS_EACH: Final = 10
CHECKED: Final = 20
CHECK_EVERY_S: Final = 0.5
LATE_CONNECTIONS: Final = 8
#: For the roll-ups to come to the present, and for the last repair.
PATIENCE_S: Final = 180.0
CLOSE_TO_NOW: Final = timedelta(minutes=10)

_STATE: Final = """
SELECT CASE WHEN isfinite(s.computed_through) THEN s.computed_through END AS computed,
       (SELECT count(*) FROM rollup_marks) AS marks,
       coalesce((SELECT extract(epoch FROM now() - min(marked_at)) FROM rollup_marks), 0)::float8 AS age
FROM rollup_state s"""


@dataclass
class Late:
    """Readings of which some come late, and answers about them."""

    seconds: float = 0.0
    readings: int = 0
    late: int = 0
    compared: int = 0
    """Series whose buckets were asked from roll-ups and from readings, in one snapshot."""
    dirty: int = 0
    """Of these, in how many moments something waited for a repair."""
    wrong: int = 0
    marks: int = 0
    """That waited at once, at most; and how old the oldest ever was."""
    repair_s: float = 0.0


async def late_data(parts: Parts, shop: Workshop, history: History, seconds: int) -> Late:
    """Raises `BenchError` when marks stay. Wrong answers are counted."""
    keys, late = parts.environment["SLUICE_SECRET_KEYS"], Late(seconds)
    places = (history.of("temperature") + history.of("energy"))[:SENDING]
    connection: Any = await asyncpg.connect(parts.database_url)
    try:
        tokens = await add_tokens(connection, keys, history.organisation, [history.devices[n] for n in places])
        port = free_port()
        ingest = await shop.role("ingest", SLUICE_HTTP_LISTEN=f"{LOOPBACK}:{port}")
        worker = await shop.role("worker")
        progress("waiting for roll-ups to come to the present")
        await _until(connection, lambda state: state["computed"] > datetime.now(UTC) - CLOSE_TO_NOW)
        progress(f"sending for {seconds} s, {LATE_SHARE:.0%} of it late")
        checking = asyncio.create_task(_check(parts, history, [history.series[n] for n in places], late))
        try:
            metrics = [history.metrics[n] for n in places]
            await _send_late(port, tokens, metrics, seconds, late)
            async with _books(parts, history.organisation) as books:
                await books.landed(TIMEOUT_S)
            await _until(connection, lambda state: state["marks"] == 0)
            await asyncio.sleep(2 * CHECK_EVERY_S)
        finally:
            checking.cancel()
            with suppress(asyncio.CancelledError):
                await checking
        await ingest.stop()
        await worker.stop()
    finally:
        await connection.close()
    return late


async def _until(connection: Any, reached: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        state = await _look(connection)
        if state["computed"] is not None and reached(state):
            return
        if time.monotonic() > deadline:
            raise BenchError(f"the roll-ups do not get on: {dict(state)}")
        await asyncio.sleep(CHECK_EVERY_S)


async def _look(connection: Any) -> Any:
    async with connection.transaction():
        await connection.execute("SET LOCAL ROLE sluice_worker")
        return await connection.fetchrow(_STATE)


async def _send_late(port: int, tokens: Sequence[str], metrics: Sequence[str], seconds: int, late: Late) -> None:
    """Each device sends some readings every second."""
    choose = random.Random(6)
    async with Clients(port, LATE_CONNECTIONS) as clients:
        began = time.monotonic()
        for second in range(seconds):
            lanes: list[list[bytes]] = [[] for _ in range(LATE_CONNECTIONS)]
            now = datetime.now(UTC)
            for number, (token, metric) in enumerate(zip(tokens, metrics, strict=True)):
                times = [now - timedelta(milliseconds=10 * n + 1) for n in range(READINGS_EACH)]
                delayed = [ts - LATE if choose.random() < LATE_SHARE else ts for ts in times]
                late.late += sum(one is not other for one, other in zip(times, delayed, strict=True))
                lanes[number % LATE_CONNECTIONS].append(json_post(token, _body((metric,), delayed, second)))
            load = await clients.send(lanes, READINGS_EACH, TIMEOUT_S)
            late.readings += load.readings
            await asyncio.sleep(max(0.0, began + second + 1 - time.monotonic()))


def _body(metrics: Sequence[str], times: Sequence[datetime], number: int) -> bytes:
    """Readings of each metric at each time."""
    measurements = [
        {"type": metric, "value": 20 + (number * 7 + n) % 100 / 10, "ts": ts.isoformat()}
        for metric in metrics
        for n, ts in enumerate(times)
    ]
    return orjson.dumps({"measurements": measurements})


async def _check(parts: Parts, history: History, series: Sequence[int], late: Late) -> None:
    """Every now and then the same from roll-ups and from readings, in one snapshot; and how old the marks are."""
    settings = PostgresSettings(database_url=parts.database_url)
    connection: Any = await connect(settings, role="sluice_app", application="sluice bench")
    watching: Any = await connect(settings, role="sluice_worker", application="sluice bench")
    choose = random.Random(7)
    try:
        while True:
            state = await watching.fetchrow(_STATE)
            late.marks, late.repair_s = max(late.marks, state["marks"]), max(late.repair_s, state["age"])
            chosen = choose.sample(list(series), min(CHECKED, len(series)))
            rolled, raw = await _both(connection, history, chosen, choose.choice(("5m", "15m", "1h")))
            late.compared += len(rolled.series)
            late.dirty += rolled.dirty
            late.wrong += sum(not _same(rolled.series.get(one), raw.series.get(one)) for one in chosen)
            await asyncio.sleep(CHECK_EVERY_S)
    finally:
        await connection.close()
        await watching.close()


async def _both(
    connection: Any, history: History, series: Sequence[int], bucket: str
) -> tuple[Aggregated, Aggregated]:
    now = datetime.now(UTC)
    question = question_of(now - LATE - timedelta(hours=2), now, bucket, _ALL)
    async with connection.transaction(isolation="repeatable_read"):
        await connection.execute("SELECT set_config('sluice.organisation', $1, true)", str(history.organisation))
        found = await find_series(connection, series)
        return await aggregate(connection, found, question), await aggregate(connection, found, question, raw=True)


_ALL: Final = tuple(name for name, function in FUNCTIONS.items() if function.fraction is None)


async def find_series(connection: Any, series: Sequence[int]) -> Found:
    found = await find_each(connection, series)
    return Found({series_id: one for each in found.values() for series_id, one in each.series.items()})


def question_of(start: datetime, end: datetime, bucket: str, functions: tuple[str, ...]) -> Question:
    return Question(start, end, edges_of(start, end, Bucket.parse(bucket), zone_of("UTC")), functions)


def _same(one: Columns | None, other: Columns | None) -> bool:
    if one is None or other is None:
        return one is other
    names = ("buckets", *COLUMNS)
    columns = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(len(first) == len(second) and all(map(_close, first, second)) for first, second in columns)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    return bool(one == other)


# ---------------------------------------------------------------- dashboards

DASHBOARDS: Final = 100
EVERY_S: Final = 10.0
WINDOWS: Final = 50
TICK_S: Final = 0.25
SHARE: Final = 4
FULL_S: Final = 4.0
#: How long panels look back, and by which buckets.
PANELS: Final = (
    (timedelta(hours=6), "5m"),
    (timedelta(days=1), "15m"),
    (timedelta(days=7), "1h"),
    (timedelta(days=30), "1d"),
)
PANEL_FUNCTIONS: Final[Mapping[str, str]] = {"temperature": "mean", "energy": "delta", "switch": "time_in_state"}


class Sent(NamedTuple):
    """What ingest took meanwhile: readings a second acknowledged, how long that takes, how far landing is behind."""

    readings_per_s: float
    latencies_s: Sequence[float]
    behind_s: float


@dataclass(frozen=True)
class Dashboards:
    """Batches of dashboards by themselves and beside ingest, and ingest by itself and beside them."""

    full_per_s: float
    """What ingest acknowledges when nothing else runs; the load is a quarter of it."""
    alone_s: Sequence[float]
    beside_s: Sequence[float]
    sent_alone: Sent
    sent_beside: Sent


async def dashboards(parts: Parts, shop: Workshop, api: Api, history: History, seconds: int) -> Dashboards:
    registered = await _registered(parts, DEVICES)
    port = free_port()
    ingest = await shop.role("ingest", SLUICE_HTTP_LISTEN=f"{LOOPBACK}:{port}")
    worker = await shop.role("worker")
    requests = [api.post("/api/v1/readings/batch", _batch(history, number)) for number in range(DASHBOARDS)]
    async with _books(parts, registered.organisation) as books:
        traffic = _Traffic(port, registered.tokens, books)
        progress(f"{DASHBOARDS} dashboards alone")
        await _ask_all(api, requests, EVERY_S)
        alone = await _ask_all(api, requests, seconds)
        progress("ingest at its full rate")
        full = await traffic.full()
        progress("ingest at a quarter of it")
        sent_alone = await traffic.send(full / SHARE, seconds)
        progress(f"{DASHBOARDS} dashboards beside ingest at a quarter of its rate")
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(_ask_all(api, requests, seconds))
            sending = group.create_task(traffic.send(full / SHARE, seconds))
    await ingest.stop()
    await worker.stop()
    return Dashboards(full, alone, asking.result(), sent_alone, sending.result())


def _batch(history: History, number: int) -> dict[str, Any]:
    """A dashboard of panels, each of some series and one window."""
    choose = random.Random(number)
    questions = []
    for place in range(WINDOWS):
        back, bucket = PANELS[place * len(PANELS) // WINDOWS]
        series = choose.randrange(len(history.series))
        questions.append({
            "series_id": history.series[series],
            "from": max(history.start, history.end - back).isoformat(),
            "to": history.end.isoformat(),
            "bucket": bucket,
            "fn": PANEL_FUNCTIONS[history.metrics[series]],
        })  # fmt: skip
    return {"queries": questions}


async def _ask_all(api: Api, requests: Sequence[bytes], seconds: float) -> list[float]:
    """Each dashboard in its turn of every ten seconds: how long each batch took."""
    taken: list[float] = []
    began = time.perf_counter()

    async def look(place: int, client: Client) -> None:
        at = began + place * EVERY_S / len(requests)
        while at < began + seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            asked = time.perf_counter()
            await client.ask(requests[place])
            taken.append(time.perf_counter() - asked)
            at += EVERY_S

    clients = [await api.client().opened() for _ in requests]
    try:
        async with asyncio.TaskGroup() as group:
            for place, client in enumerate(clients):
                group.create_task(look(place, client))
    finally:
        for client in clients:
            client.close()
    return taken


class _Traffic:
    """A fleet that sends readings of the very moment: all that is sent at once has the same times."""

    def __init__(self, port: int, tokens: Sequence[str], books: Books) -> None:
        self._port = port
        self._tokens = tokens
        self._books = books
        self._next = 0

    async def full(self) -> float:
        """Readings a second that are acknowledged when all connections send as fast as they can."""
        taken = list[Load]()
        async with Clients(self._port, CONNECTIONS) as clients:
            began = time.perf_counter()
            while time.perf_counter() < began + FULL_S:
                lanes = self._lanes(len(self._tokens))
                taken.append(await clients.send(lanes, READINGS_A_REQUEST, TIMEOUT_S))
        await self._books.landed(TIMEOUT_S)
        return sum(load.readings for load in taken) / sum(load.seconds for load in taken)

    async def send(self, rate: float, seconds: float) -> Sent:
        latencies, readings = list[float](), 0
        async with Clients(self._port, CONNECTIONS) as clients:
            began = time.perf_counter()
            for tick in range(round(seconds / TICK_S)):
                await asyncio.sleep(max(0.0, began + tick * TICK_S - time.perf_counter()))
                wanted = round(rate * (tick + 1) * TICK_S) - readings
                lanes = self._lanes(max(1, wanted // READINGS_A_REQUEST))
                load = await clients.send(lanes, READINGS_A_REQUEST, TIMEOUT_S)
                readings += load.readings
                latencies += load.latencies_s
            sent_s = time.perf_counter() - began
            await self._books.landed(TIMEOUT_S)
            behind_s = time.perf_counter() - began - sent_s
        return Sent(readings / max(sent_s, seconds), latencies, behind_s)

    def _lanes(self, count: int) -> list[list[bytes]]:
        """A request of each of the next devices, no device twice at the same moment."""
        now = datetime.now(UTC)
        each = READINGS_A_REQUEST // len(METRICS)
        times = [now - timedelta(milliseconds=each - n) for n in range(each)]
        body = _body([name for name, _ in METRICS], times, self._next)
        lanes: list[list[bytes]] = [[] for _ in range(CONNECTIONS)]
        for place in self._places(count):
            lanes[place % CONNECTIONS].append(json_post(self._tokens[place], body))
        return lanes

    def _places(self, count: int) -> Iterator[int]:
        for _ in range(min(count, len(self._tokens))):
            yield self._next
            self._next = (self._next + 1) % len(self._tokens)
