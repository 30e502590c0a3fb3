"""Reading back, as operations. Left out: what is asked of the database (`api.readings`)."""

from datetime import UTC, datetime
from typing import Any, Final, Literal
from uuid import UUID

import msgspec

from api.access.scopes import READINGS_READ
from api.faces import PLATFORM
from api.http.lists import Cursors
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.parameters import Count, Cursor, Name, Span, limit_within
from api.metrics import ApiMetrics
from api.problems import DEVICE_NOT_FOUND
from api.readings import Place, SeriesFilter, SpanRead, find_series, read_latest, read_page, render
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal

_READS: Final = needs(Role.VIEWER, READINGS_READ)


class Latest(msgspec.Struct, kw_only=True):
    """Which series of a device: without `metric` or `label` those with any."""

    device_id: UUID
    metric: Name | None = None
    label: Name | None = None

    @property
    def series(self) -> SeriesFilter:
        return SeriesFilter(self.device_id, self.metric, self.label)


class Page(Span, kw_only=True):
    """Which readings, and in which order."""

    device_id: UUID
    metric: Name | None = None
    label: Name | None = None
    order: Literal["asc", "desc"] = "asc"
    limit: Count | None = None
    cursor: Cursor | None = None

    @property
    def series(self) -> SeriesFilter:
        return SeriesFilter(self.device_id, self.metric, self.label)


class Reading(msgspec.Struct):
    """One reading."""

    device_id: str
    metric: str
    label: str
    unit: str
    ts: datetime
    value: float | int | bool | str
    flags: list[str]


class Readings(msgspec.Struct):
    """A page of readings."""

    data: list[Reading]
    next_cursor: str | None


class ReadingOperations:
    """`/api/v1/readings`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._cursors: Cursors[Place] = Cursors(Seal(ring, "cursor"), Place)
        self._settings = settings
        self._metrics = metrics

    @operation(PLATFORM, "GET", "/api/v1/readings", _READS, problems=[DEVICE_NOT_FOUND])
    async def readings(self, call: Call[Nothing, Page, Nothing]) -> Reply[Readings]:
        """Readings of a device, page after page

        Raw readings in `[from, to)`, by time, oldest first unless `order` says otherwise.
        """
        query, limits = call.query, self._settings
        limit = limit_within(query.limit, limits.api_page_readings_default, limits.api_page_readings_max)
        read = SpanRead(query.start, query.end, query.order == "desc", limit)
        mark = (call.organisation, query.series, query.start, query.end, query.order)
        after = self._cursors.take(mark, query.cursor)
        series = await find_series(call.connection, query.series)
        page = await read_page(call.connection, list(series), read, after)
        return self._reply(page.rows, series, None if page.end is None else self._cursors.give(mark, page.end))

    @operation(PLATFORM, "GET", "/api/v1/readings/latest", _READS, problems=[DEVICE_NOT_FOUND])
    async def latest_readings(self, call: Call[Nothing, Latest, Nothing]) -> Reply[Readings]:
        """The newest reading of each series of a device"""
        series = await find_series(call.connection, call.query.series)
        rows = await read_latest(call.connection, list(series), datetime.now(UTC))
        return self._reply(rows, series, None)

    def _reply(self, rows: Any, series: Any, next_cursor: str | None) -> Reply[Readings]:
        self._metrics.readings.inc(len(rows))
        return Reply(render(rows, series, next_cursor))
