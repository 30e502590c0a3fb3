"""Reading back, as operations. Left out: what is asked of the database (`api.readings`)."""

from datetime import UTC, datetime
from typing import Any, Final, Literal
from uuid import UUID

import msgspec

from api.access.scopes import READINGS_READ
from api.faces import PLATFORM
from api.http.lists import Cursors, CursorText
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.parameters import Count, Name, Span, limit_within
from api.http.problems import invalid_parameter
from api.metrics import ApiMetrics
from api.problems import DEVICE_NOT_FOUND, SITE_NOT_FOUND
from api.readings import (
    Found,
    Place,
    SeriesFilter,
    SiteFilter,
    SpanRead,
    find_series,
    find_site_series,
    read_latest,
    read_page,
    render,
)
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal
from schemas.catalogue import metric_name

_READS: Final = needs(Role.VIEWER, READINGS_READ)


def _named(metric: str | None) -> str | None:
    return None if metric is None else metric_name(metric)


class Latest(msgspec.Struct, kw_only=True):
    """Which series of a device: without `metric` or `label` those with any."""

    device_id: UUID
    metric: Name | None = None
    label: Name | None = None

    @property
    def series(self) -> SeriesFilter:
        return SeriesFilter(self.device_id, _named(self.metric), self.label)


class Page(Span, kw_only=True):
    """Which readings, and in which order; of a device, of a site, or of a device while it stood at a site."""

    device_id: UUID | None = None
    site_id: UUID | None = None
    metric: Name | None = None
    label: Name | None = None
    order: Literal["asc", "desc"] = "asc"
    limit: Count | None = None
    cursor: CursorText | None = None

    @property
    def series(self) -> SeriesFilter | SiteFilter:
        if self.site_id is not None:
            return SiteFilter(self.site_id, self.device_id, _named(self.metric), self.label)
        if self.device_id is None:
            raise invalid_parameter("device_id", "is missing, unless site_id says whose readings")
        return SeriesFilter(self.device_id, _named(self.metric), self.label)


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
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET
    """When their device was deleted, if it was."""


class ReadingOperations:
    """`/api/v1/readings`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._cursors: Cursors[Place] = Cursors(Seal(ring, "cursor"), Place)
        self._settings = settings
        self._metrics = metrics

    @operation(PLATFORM, "GET", "/api/v1/readings", _READS, problems=[DEVICE_NOT_FOUND, SITE_NOT_FOUND])
    async def readings(self, call: Call[Nothing, Page, Nothing]) -> Reply[Readings]:
        """Readings of a device or a site, page after page

        Raw readings in `[from, to)`, by time, oldest first unless `order` says otherwise. A site's are those of the
        devices that stood there, from when and until they did.
        """
        query, limits = call.query, self._settings
        limit = limit_within(query.limit, limits.api_page_readings_default, limits.api_page_readings_max)
        read = SpanRead(query.start, query.end, query.order == "desc", limit)
        wanted = query.series
        mark = (call.organisation, wanted, query.start, query.end, query.order)
        after = self._cursors.take(mark, query.cursor)
        if isinstance(wanted, SiteFilter):
            found = await find_site_series(call.connection, wanted, read, limits.api_page_series_max)
        else:
            found = await find_series(call.connection, wanted)
        page = await read_page(call.connection, found, read, after)
        return self._reply(page.rows, found, None if page.end is None else self._cursors.give(mark, page.end))

    @operation(PLATFORM, "GET", "/api/v1/readings/latest", _READS, problems=[DEVICE_NOT_FOUND])
    async def latest_readings(self, call: Call[Nothing, Latest, Nothing]) -> Reply[Readings]:
        """The newest reading of each series of a device"""
        found = await find_series(call.connection, call.query.series)
        rows = await read_latest(call.connection, list(found.series), datetime.now(UTC))
        return self._reply(rows, found, None)

    def _reply(self, rows: Any, found: Found, next_cursor: str | None) -> Reply[Readings]:
        self._metrics.readings.inc(len(rows))
        return Reply(render(rows, found, next_cursor))
