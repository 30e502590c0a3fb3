"""Whole spans of stored readings, block by block, for answers that stream: series by series, each in order of time.

A block is read in a transaction of its own that acts for the organisation; nothing of the database is held while
the client reads. So a stream is no snapshot: what comes or goes ahead of its place shows, what does behind it not.
Left out: pages, and the newest (`api.readings.raw`); how a block is written down (`api.readings.forms`).
"""

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import UUID
from weakref import WeakSet

from api.http.problems import RATE_LIMITED, RETRY_AFTER_S, Problem
from api.metrics import ApiMetrics
from api.problems import QUERY_TOO_LARGE
from api.readings.cells import COLUMNS, read_packed
from api.readings.forms.table import Block, Table, moment
from api.readings.raw import SpanRead
from api.readings.series import STAYS, Found
from api.settings import ApiSettings

_BLOCKS: Final = """
SELECT item, ts, quality, value, text_ts, text_quality, texts
FROM readings_blocks($1::int[], $2::timestamptz[], $3::timestamptz[], $4, $5)
"""
_ESTIMATED: Final = """
SELECT readings, fits_until FROM readings_estimated($1::int[], $2::timestamptz[], $3::timestamptz[], $4)
"""
_ALWAYS: Final = datetime.min.replace(tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
#: How many series are read at once while they turn out to be short.
_SERIES_AT_ONCE_MAX: Final = 64
_WINDOW_GROWTH: Final = 4

#: Opens a short transaction that reads for an organisation.
Opens = Callable[[UUID], AbstractAsyncContextManager[Any]]


class _Part(NamedTuple):
    """A span `[start, stop)` of one series."""

    series_id: int
    start: datetime
    stop: datetime


class Streams:
    """The streams of a process, bounded by organisation."""

    def __init__(self, opens: Opens, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._opens = opens
        self._settings = settings
        self._metrics = metrics
        # One that is dropped before it began has no end to tell of: it is gone from here all the same.
        self._open: defaultdict[UUID, WeakSet[_Stream]] = defaultdict(WeakSet)

    async def table(
        self, connection: Any, organisation: UUID, found: Found, span: SpanRead, head: dict[str, Any]
    ) -> Table:
        """All readings of the span. Raises the problems of too many of them, and of too many streams."""
        parts = list(_parts(found, span))
        stream = _Stream(self._blocks(organisation, found, parts, descending=span.descending))
        self._enter(organisation, stream)
        if parts:
            await self._check_size(connection, parts, span.start)
        return Table(COLUMNS, stream, head)

    def _enter(self, organisation: UUID, stream: "_Stream") -> None:
        for other in [one for one, streams in self._open.items() if not streams]:
            del self._open[other]
        most = self._settings.api_streams_per_organisation_max
        if len(self._open[organisation]) >= most:
            message = f"{most} streams of readings are being read: wait until one has ended"
            raise Problem(RATE_LIMITED, message, headers={"Retry-After": str(RETRY_AFTER_S[1])})
        self._open[organisation].add(stream)

    async def _check_size(self, connection: Any, parts: Sequence[_Part], start: datetime | None) -> None:
        most = self._settings.api_stream_readings_max
        row = await connection.fetchrow(_ESTIMATED, *_columns(parts), most)
        if row["readings"] > most:
            raise _too_large(row["readings"], most, start, row["fits_until"])

    async def _blocks(
        self, organisation: UUID, found: Found, parts: Sequence[_Part], *, descending: bool
    ) -> AsyncGenerator[Block]:
        waiting, window = deque(parts), 1
        while waiting:
            batch = [waiting.popleft() for _ in range(min(window, len(waiting)))]
            most = max(1, self._settings.api_stream_block_readings // len(batch))
            async with self._opens(organisation) as connection:
                rows = await connection.fetch(_BLOCKS, *_columns(batch), descending, most)
            given = {row["item"]: row for row in rows}
            window = min(window * _WINDOW_GROWTH, _SERIES_AT_ONCE_MAX)
            for item, part in enumerate(batch, 1):
                if item not in given:
                    continue
                times, values, flags, last = read_packed(given[item], most, descending=descending)
                if times:
                    self._metrics.readings.inc(len(times))
                    yield Block(found.series[part.series_id], (times, values, flags))
                if last is not None:
                    # A long series goes on alone; what was read of those behind it is read again.
                    waiting.extendleft(reversed([_behind(part, moment(last), descending=descending), *batch[item:]]))
                    window = 1
                    break


class _Stream:
    """Blocks that somebody is being given."""

    def __init__(self, blocks: AsyncGenerator[Block]) -> None:
        self._blocks = blocks

    def __aiter__(self) -> AsyncIterator[Block]:
        return self

    async def __anext__(self) -> Block:
        return await anext(self._blocks)


def _parts(found: Found, span: SpanRead) -> Iterator[_Part]:
    """In the order of the series, and of each in the order that its readings are wanted in."""
    if found.spans is None:
        for series_id in found.series:
            yield _Part(series_id, span.start or _ALWAYS, span.end or STAYS)
        return
    for _, stays in groupby(found.spans, lambda one: one[0]):
        yield from (_Part(*stay) for stay in sorted(stays, key=lambda one: one[1], reverse=span.descending))


def _behind(part: _Part, last: datetime, *, descending: bool) -> _Part:
    return part._replace(stop=last) if descending else part._replace(start=last + _MICROSECOND)


def _columns(parts: Sequence[_Part]) -> list[list[Any]]:
    return [list(column) for column in zip(*parts, strict=True)]


def _too_large(readings: int, most: int, start: datetime | None, fits_until: datetime) -> Problem:
    fits = ({} if start is None else {"from": _text(start)}) | {"to": _text(fits_until)}
    words = "&".join(f"{name}={text}" for name, text in fits.items())
    message = (
        f"these are {readings} readings or more, and an answer has up to {most}: ask for {words} first, or a limit"
    )
    return Problem(QUERY_TOO_LARGE, message, members={"estimate": readings, "readings_max": most, "fits": fits})


def _text(ts: datetime) -> str:
    return ts.isoformat().replace("+00:00", "Z")
