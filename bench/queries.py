"""`sluice bench queries`: what answers for dashboards take, beside the same from raw readings.

Over a history that is filled first (`bench.history`). Each kind of question goes to the API's process as clients ask
it, over loopback and by columns, and to the database in one session, where the same is computed from raw readings
alone: the CPU of that session's process, and the rows that it fetched. Left out: what runs beside ingest
(`bench.beside`).
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

import asyncpg
import uvloop

from api.readings.aggregation import aggregate
from api.readings.raw import Newest, read_latest
from api.readings.series import Selection, find
from bench import streams
from bench.api import add_key
from bench.asking import Api, Asked
from bench.beside import (
    Dashboards,
    LandingBeside,
    Late,
    dashboards,
    find_series,
    landing_beside,
    late_data,
    question_of,
)
from bench.history import Filled, History, Scale, acting, fill
from bench.parts import Parts, Workshop, progress, real_parts, workshop
from bench.registry import Registered, register
from bench.usage import free_port, own_cpu_s
from runtime.ids import uuid7
from runtime.postgres import PostgresSettings, connect

DAY: Final = timedelta(days=1)
SERIES_MAX: Final = 5_000
WIDE: Final = 32
#: Of different series and times, so that no answer is another's.
KINDS: Final = 40
UNMEASURED: Final = 4
#: That a run may be narrowed to.
PARTS: Final = ("month", "week", "latest", "stream", "landing", "late", "dashboards")

_GROUP: Final = "INSERT INTO device_groups (group_id, organisation_id, name) VALUES ($1, $2, $3)"
_MEMBERS: Final = """
INSERT INTO device_group_members (group_id, device_id, organisation_id) SELECT $1, unnest($2::uuid[]), $3"""
# Of this transaction alone: rows that index and table scans gave, and how often a table was read from its beginning.
_TOUCHED: Final = """
SELECT coalesce(sum(seq_tup_read + coalesce(idx_tup_fetch, 0)), 0)::bigint AS rows,
       coalesce(sum(seq_scan) FILTER (WHERE relname LIKE '\\_hyper%'), 0)::bigint AS scans
FROM pg_stat_xact_user_tables WHERE relname ~ '^(_hyper|readings|text_readings|rollups_[15])'"""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    scale: Scale
    requests: int
    clients: tuple[int, ...]
    only: tuple[str, ...]
    seconds: int
    """Of load, for what runs beside ingest."""
    readings: int
    """Landed in each turn, with and without roll-ups beside."""


@dataclass(frozen=True)
class Cost:
    """A question in one session: seconds and CPU seconds of each time, and rows fetched; and the same from raw."""

    name: str
    seconds: Sequence[float]
    cpu_s: float
    rows: int
    scans: int
    """Of chunks from their beginning."""
    raw_seconds: Sequence[float] = ()
    raw_cpu_s: float = 0.0
    raw_rows: int = 0

    @property
    def ratio(self) -> float:
        """How many times the CPU it takes from raw."""
        return self.raw_cpu_s / self.cpu_s


@dataclass
class QueryFigures:
    """What a run has measured: of what it was narrowed to."""

    options: Options
    filled: Filled
    asked: list[Asked] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    stream: streams.StreamFigure | None = None
    landing: LandingBeside | None = None
    late: Late | None = None
    dashboards: Dashboards | None = None


@dataclass(frozen=True)
class _Kind:
    """A question: how the API is asked the n-th of its kind, and what that is within a session."""

    name: str
    request: Callable[[int], bytes]
    session: Callable[[Any, int, bool], Any]
    has_raw: bool = True


def measure(options: Options, services: Path, kept: Path | None) -> QueryFigures:
    """Raises `BenchError` when a run cannot be made, or an answer is wrong."""
    options.scale.check()
    landing = _landing(options, services) if "landing" in options.only else None
    if set(options.only) == {"landing"}:
        return QueryFigures(options, Filled(0, 0.0, 0.0), landing=landing)
    with real_parts(services, kept) as parts, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(options, parts, landing))


def _landing(options: Options, services: Path) -> LandingBeside:
    """Before anything is filled, on parts of its own if a history is kept: nothing is closed there yet."""
    with real_parts(services) as parts, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(landing_beside(parts, options.readings))


async def _measure(options: Options, parts: Parts, landing: LandingBeside | None) -> QueryFigures:
    history, filled = await fill(parts, options.scale)
    figures = QueryFigures(options, filled, landing=landing)
    connection = await asyncpg.connect(parts.database_url)
    try:
        async with workshop(parts) as shop:
            run = await _Run.begun(options, parts, shop, connection, history)
            await run.all(figures)
    finally:
        await connection.close()
    return figures


class _Run:
    """One run over a history."""

    def __init__(self, options: Options, parts: Parts, shop: Workshop, connection: Any, history: History) -> None:
        self._options = options
        self._parts = parts
        self._shop = shop
        self._connection = connection
        self._history = history
        self._random = random.Random(6)
        self._groups: list[UUID] = []
        self._wide: list[list[int]] = []

    @classmethod
    async def begun(cls, options: Options, parts: Parts, shop: Workshop, connection: Any, history: History) -> "_Run":
        run = cls(options, parts, shop, connection, history)
        await run._make_groups()
        return run

    async def all(self, figures: QueryFigures) -> None:
        only = self._options.only
        api = await self._api()
        for part, kinds in self._kinds(api).items():
            if part in only:
                for kind in kinds:
                    figures.costs.append(await self._cost(kind))
                    for clients in self._options.clients:
                        progress(f"{kind.name}, {clients} client(s)")
                        figures.asked.append(
                            await api.asked(kind.name, kind.request, self._options.requests, clients)
                        )
        if "stream" in only:
            figures.stream = await self._stream()
        if "dashboards" in only:
            figures.dashboards = await dashboards(self._parts, self._shop, api, self._history, self._options.seconds)
        if "late" in only:
            figures.late = await late_data(self._parts, self._shop, self._history, self._options.seconds)

    async def _api(self) -> Api:
        registered = Registered(self._history.organisation, self._history.devices, ())
        async with acting(self._connection, registered.organisation, "sluice_app"):
            key = await add_key(self._connection, registered, self._parts)
        port = free_port()
        role = await self._shop.role("api", SLUICE_API_LISTEN=f"127.0.0.1:{port}")
        return Api(self._parts, role, port, key)

    async def _make_groups(self) -> None:
        """Of `WIDE` devices each, all of the history's if there are fewer."""
        places = range(len(self._history.series))
        async with acting(self._connection, self._history.organisation, "sluice_app"):
            for _ in range(KINDS // 4):
                chosen = self._random.sample(places, min(WIDE, len(places)))
                group = uuid7()
                await self._connection.execute(_GROUP, group, self._history.organisation, f"bench {group}")
                devices = [self._history.devices[place] for place in chosen]
                await self._connection.execute(_MEMBERS, group, devices, self._history.organisation)
                self._groups.append(group)
                self._wide.append([self._history.series[place] for place in chosen])

    # ------------------------------------------------------------ kinds of questions

    def _kinds(self, api: Api) -> Mapping[str, Sequence[_Kind]]:
        month, week = (min(days, self._options.scale.days) for days in (30, 7))
        return {
            "month": [
                self._aggregated(api, f"one series, {month} days by the hour, {name}", functions, month, wide=False)
                for name, functions in (("mean", ("mean",)), ("mean, last, delta", ("mean", "last", "delta")))
            ],
            "week": [
                self._aggregated(
                    api, f"{len(self._wide[0])} series, {week} days by the hour, {name}", functions, week, wide=True
                )
                for name, functions in (("mean", ("mean",)), ("mean, last, delta", ("mean", "last", "delta")))
            ],
            "latest": [self._latest(api)],
        }

    def _aggregated(self, api: Api, name: str, functions: tuple[str, ...], days: int, *, wide: bool) -> _Kind:
        """The span ends within the last day, wherever in an hour: its first and last bucket are cut."""
        history = self._history
        shift = timedelta(minutes=37)
        free = max(timedelta(0), history.end - history.start - days * DAY - shift)
        spans = []
        for number in range(KINDS):
            end = history.end - min(free, shift * (number % 20))
            spans.append((end - days * DAY, end))
        one = [self._random.choice(history.series) for _ in range(KINDS)]

        def request(number: int) -> bytes:
            start, end = spans[number % KINDS]
            query: dict[str, Any] = {"from": start.isoformat(), "to": end.isoformat()}
            query |= {"bucket": "1h", "fn": ",".join(functions), "format": "columns"}
            if wide:
                query["group_id"] = self._groups[number % len(self._groups)]
            else:
                query["series_id"] = one[number % KINDS]
            return api.get(f"/api/v1/readings/aggregated?{urlencode(query)}")

        async def session(connection: Any, number: int, raw: bool) -> None:
            start, end = spans[number % KINDS]
            series = self._wide[number % len(self._wide)] if wide else [one[number % KINDS]]
            found = await find_series(connection, series)
            question = question_of(start, end, "1h", functions)
            await aggregate(connection, found, question, raw=raw)

        return _Kind(name, request, session)

    def _latest(self, api: Api) -> _Kind:
        site = self._history.site
        wanted = Selection(site_id=site)

        newest = Newest()

        async def session(connection: Any, number: int, raw: bool) -> None:
            found = await find(connection, wanted, None, None, SERIES_MAX)
            await read_latest(connection, found, None, None, newest)

        name = f"latest values of {len(self._history.devices):,} devices"
        return _Kind(name, lambda _: api.get(f"/api/v1/readings/latest?site_id={site}"), session, has_raw=False)

    async def _cost(self, kind: _Kind) -> Cost:
        """Each way in a session of its own, warm."""
        progress(f"{kind.name}, in one session")
        seconds, cpu_s, rows, scans = await self._session(kind, raw=False)
        if not kind.has_raw:
            return Cost(kind.name, seconds, cpu_s, rows, scans)
        progress(f"{kind.name}, from raw")
        raw_seconds, raw_cpu_s, raw_rows, _ = await self._session(kind, raw=True)
        return Cost(kind.name, seconds, cpu_s, rows, scans, raw_seconds, raw_cpu_s, raw_rows)

    async def _session(self, kind: _Kind, *, raw: bool) -> tuple[list[float], float, int, int]:
        """Seconds, CPU seconds, rows and scans of chunks, of one."""
        settings = PostgresSettings(database_url=self._parts.database_url)
        connection: Any = await connect(settings, role="sluice_app", application="sluice bench")
        pid = connection.get_server_pid()
        seconds, cpu_s = list[float](), 0.0
        try:
            for number in range(UNMEASURED + KINDS):
                if number == UNMEASURED:
                    cpu_s, seconds = own_cpu_s(pid), []
                async with acting(connection, self._history.organisation, "sluice_app"):
                    began = time.perf_counter()
                    await kind.session(connection, number % KINDS, raw)
                    seconds.append(time.perf_counter() - began)
            cpu_s = (own_cpu_s(pid) - cpu_s) / KINDS
            async with acting(connection, self._history.organisation, "sluice_app"):
                before = await connection.fetchrow(_TOUCHED)
                await kind.session(connection, 0, raw)
                after = await connection.fetchrow(_TOUCHED)
        finally:
            await connection.close()
        return seconds, cpu_s, after["rows"] - before["rows"], after["scans"] - before["scans"]

    async def _stream(self) -> streams.StreamFigure:
        registered = await register(
            self._connection, self._parts.environment["SLUICE_SECRET_KEYS"], 1, overrides=False
        )
        found = await streams.figures(self._parts, self._shop, self._connection, registered)
        return next(one for one in found if one.form == "columns")
