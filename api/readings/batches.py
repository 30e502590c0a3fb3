"""Many questions at once: looked up together, and those with the same buckets asked together. One that cannot be
answered does not stop the others.
"""

import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from api.http.failures import failure_of
from api.http.problems import DATABASE_UNAVAILABLE, INTERNAL, QUERY_TIMEOUT, Problem, unavailable
from api.problems import QUERY_TOO_LARGE
from api.readings.aggregation import Aggregated, Question
from api.readings.questions import Asked, answer_of, needs_readings, zone_named
from api.readings.series import Found, Selection, find, find_devices, find_each, narrowed
from api.settings import ApiSettings

_log = logging.getLogger("sluice.api")

#: Two questions may be given up and the others still be answered.
_STATEMENTS_LONG: Final = 3
_TAKE_BACK: Final = "ROLLBACK TO SAVEPOINT questions"


class Item(NamedTuple):
    """One question."""

    wanted: Selection
    asked: Asked


class Answered(NamedTuple):
    """The answer to one."""

    found: Found
    question: Question
    answer: Aggregated


async def answer_all(connection: Any, items: Sequence[Item], settings: ApiSettings) -> list[Answered | Problem]:
    """In the order of the items. Raises what the database raises where it is away: then it is for all of them."""
    known = await _looked_up(connection, items)
    budget, trials = _Budget(settings), _Trials(connection, settings)
    await trials.begin()
    results: dict[int, Answered | Problem] = {}
    together: defaultdict[tuple[Any, ...], list[tuple[int, Found, Question]]] = defaultdict(list)
    for index, item in enumerate(items):
        try:
            async with trials.one():
                found = await _found(connection, item, known, settings)
                question = await _question(connection, item, found, budget)
        except Problem as problem:
            results[index] = _alone(problem)
            continue
        # Spans of stays are a question's own; so are readings that have to be gone through, which may be too many.
        own = index if found.spans is not None or needs_readings(question) else None
        together[question.start, question.end, tuple(question.edges), own].append((index, found, question))
    for group in together.values():
        await _answer_group(connection, group, results, settings, trials)
    return [results[index] for index in range(len(items))]


async def _answer_group(
    connection: Any,
    group: Sequence[tuple[int, Found, Question]],
    results: dict[int, Answered | Problem],
    settings: ApiSettings,
    trials: "_Trials",
) -> None:
    """All of the series and functions of questions with the same buckets, in one."""
    series = {series_id: one for _, found, _ in group for series_id, one in found.series.items()}
    functions = tuple(dict.fromkeys(name for _, _, question in group for name in question.functions))
    everything = Found(series, group[0][1].spans)
    try:
        async with trials.one():
            answer = await answer_of(connection, everything, replace(group[0][2], functions=functions), settings)
    except Problem as problem:
        for index, _, _ in group:
            results[index] = _alone(problem)
        return
    for index, found, question in group:
        results[index] = Answered(found, question, answer.of(found))


def _alone(problem: Problem) -> Problem:
    """Without where it was raised: that has the results, which would hold it and themselves."""
    return problem.with_traceback(None)


class _Trials:
    """Questions of one transaction, which outlives those that the database gives up."""

    def __init__(self, connection: Any, settings: ApiSettings) -> None:
        self._connection = connection
        self._until = monotonic() + _STATEMENTS_LONG * settings.api_statement_timeout_ms / 1000

    async def begin(self) -> None:
        """Nothing is written here: one point to come back to is enough for all."""
        await self._connection.execute("SAVEPOINT questions")

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Raises its problem in place of what the database says of this question alone.

        Once they have taken three times as long as one may, no further one is begun: so long a batch is waited for.
        """
        if monotonic() >= self._until:
            raise unavailable(QUERY_TIMEOUT, "the questions of the batch before it took too long: ask again")
        try:
            yield
        except asyncpg.PostgresError as error:
            failure = failure_of(error)
            if failure is not None and failure.kind is DATABASE_UNAVAILABLE:
                raise
            await self._connection.execute(_TAKE_BACK)
            if failure is None:
                _log.error("a question of a batch failed", exc_info=error)
            raise failure or Problem(INTERNAL) from None


class _Budget:
    """What one batch may come to."""

    def __init__(self, settings: ApiSettings) -> None:
        self._series = settings.api_page_series_max
        self._cells = settings.api_aggregate_cells_max

    def question(self, asked: Asked, series: int) -> Question:
        """Raises the problem of what is too large for what is left."""
        question = asked.question(series, self._cells)
        if series > self._series:
            raise Problem(QUERY_TOO_LARGE, "the questions of the batch before it have used up its series: ask again")
        self._series -= series
        self._cells -= series * (len(question.edges) - 1)
        return question


async def _question(connection: Any, item: Item, found: Found, budget: _Budget) -> Question:
    zone = await zone_named(connection, item.asked.zone, found, item.wanted.site_id)
    return budget.question(item.asked._replace(zone=zone), len(found.series))


class _Known(NamedTuple):
    """Series and devices that questions name by themselves."""

    series: Mapping[int, Found]
    devices: Mapping[UUID, Found]


async def _looked_up(connection: Any, items: Sequence[Item]) -> _Known:
    series = {item.wanted.series_id for item in items if _names_only(item.wanted, "series_id")}
    devices = {item.wanted.device_id for item in items if _names_only(item.wanted, "device_id")}
    return _Known(
        await find_each(connection, [one for one in series if one is not None]),
        await find_devices(connection, [one for one in devices if one is not None]),
    )


def _names_only(wanted: Selection, thing: str) -> bool:
    given = {name for name, value in wanted._asdict().items() if value is not None}
    return given - {"metric", "label"} == {thing}


async def _found(connection: Any, item: Item, known: _Known, settings: ApiSettings) -> Found:
    wanted = item.wanted
    found = None
    if wanted.series_id is not None and _names_only(wanted, "series_id"):
        found = known.series.get(wanted.series_id)
    elif wanted.device_id is not None and _names_only(wanted, "device_id"):
        found = known.devices.get(wanted.device_id)
    if found is not None:
        return await narrowed(connection, found, wanted)
    return await find(connection, wanted, item.asked.start, item.asked.end, settings.api_page_series_max)
