"""Reading back, as operations. Left out: what is asked of the database (`api.readings`)."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec

from api.access.scopes import READINGS_READ
from api.faces import PLATFORM
from api.http.lists import Cursors, CursorText
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.parameters import Count, Name, Spanned, limit_within
from api.http.problems import invalid_parameter
from api.http.spelt import Moment
from api.metrics import ApiMetrics
from api.problems import (
    DEVICE_NOT_FOUND,
    GROUP_NOT_FOUND,
    METRIC_NOT_FOUND,
    QUERY_TOO_LARGE,
    SERIES_NOT_FOUND,
    SITE_NOT_FOUND,
)
from api.readings.cells import page_table
from api.readings.forms.answers import Form, FormName, form_of, other_types, streamed, whole
from api.readings.raw import Kept, Newest, Place, SpanRead, kept_of, read_latest, read_page
from api.readings.series import Selection, find
from api.readings.streams import Streams
from api.readings.versions import known, version_of, versioned
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal
from schemas.catalogue import metric_name

_READS: Final = needs(Role.VIEWER, READINGS_READ)
#: Of whose series one may ask, and what of them.
MISSING: Final = (DEVICE_NOT_FOUND, SITE_NOT_FOUND, GROUP_NOT_FOUND, SERIES_NOT_FOUND)
UNKNOWN: Final = (*MISSING, METRIC_NOT_FOUND)

SeriesId = Annotated[
    int, msgspec.Meta(ge=1, le=2**31 - 1, description="A series, by its id in `/api/v1/readings/series`.")
]


class Selected(msgspec.Struct, kw_only=True):
    """Which series: of a device, of what stood at a site, of a group of devices, or one; those with any metric and
    label unless they are named."""

    device_id: UUID | None = None
    site_id: UUID | None = None
    group_id: UUID | None = None
    series_id: SeriesId | None = None
    metric: Name | None = None
    label: Name | None = None

    @property
    def series(self) -> Selection:
        metric = None if self.metric is None else metric_name(self.metric)
        return Selection(self.device_id, self.site_id, self.group_id, self.series_id, metric, self.label)


class Whose(Selected, Spanned, kw_only=True):
    """Which series, and which span `[from, to)` of time."""

    from_: Moment | None = msgspec.field(default=None, name="from")
    to: Moment | None = None
    format: FormName | None = None


class Page(Whose, kw_only=True):
    """Which readings, and in which order."""

    order: Literal["asc", "desc"] = "asc"
    limit: Count | None = None
    cursor: CursorText | None = None


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
    kept_from: datetime | msgspec.UnsetType = msgspec.UNSET
    """If that is later than `from`: readings before are no longer kept."""
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET
    """When their device was deleted, if it was."""


class SeriesColumns(msgspec.Struct):
    """Readings of a series. A long one comes in several of these, one after another."""

    device_id: str
    metric: str
    label: str
    unit: str
    ts: list[int]
    """Microseconds since 1970."""
    value: list[float | int | bool | str]
    flags: list[list[str]] | None
    """Of each reading; null if none has any."""


class ReadingColumns(msgspec.Struct):
    """Readings, column by column."""

    series: list[SeriesColumns]
    next_cursor: str | None
    kept_from: datetime | msgspec.UnsetType = msgspec.UNSET
    """If that is later than `from`: readings before are no longer kept."""
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET
    """When their device was deleted, if it was."""


class SeriesFound(msgspec.Struct):
    """A series: what a device sends of one metric under one label."""

    series_id: int
    device_id: str
    metric: str
    label: str
    unit: str


class SeriesList(msgspec.Struct):
    """Series, by device, metric and label."""

    data: list[SeriesFound]
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET
    """When their device was deleted, if it was."""


_OTHERS: Final = other_types(ReadingColumns)


class _Asked(NamedTuple):
    """What a request means, and the version of its answer."""

    kept: Kept
    version: str


class ReadingOperations:
    """`/api/v1/readings`, `/api/v1/readings/latest` and `/api/v1/readings/series`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics, streams: Streams) -> None:
        self._cursors: Cursors[Place] = Cursors(Seal(ring, "cursor"), Place)
        self._settings = settings
        self._metrics = metrics
        self._streams = streams
        self._newest = Newest()

    @operation(
        PLATFORM, "GET", "/api/v1/readings", _READS, problems=(*UNKNOWN, QUERY_TOO_LARGE), other_types=_OTHERS,
        versioned=True,
    )  # fmt: skip
    async def readings(self, call: Call[Nothing, Page, Nothing]) -> Reply[Readings]:
        """Readings of a device or a site, page after page

        Raw readings in `[from, to)`, by time, oldest first unless `order` says otherwise. A site's are those of the
        devices that stood there, from when and until they did. JSON by rows comes in pages; the other forms have the
        whole span, series by series, or `limit` readings and the cursor as `Sluice-Next-Cursor`.
        """
        query, limits = call.query, self._settings
        form = form_of(call.accept, query.format)
        if form is not Form.ROWS and query.limit is None:
            return await self._all(call, form)
        limit = limit_within(query.limit, limits.api_page_readings_default, limits.api_page_readings_max)
        wanted = query.series
        mark = (call.organisation, wanted, query.start, query.end, query.order)
        after = self._cursors.take(mark, query.cursor)
        asked = await self._ask(call, ("page", form.value, query.order, limit, after))
        if call.known(asked.version):
            return known(asked.version)
        read = SpanRead(asked.kept.start, query.end, query.order == "desc", limit)
        page = await read_page(call.connection, asked.kept.found, read, after)
        return await self._reply(form, page.rows, asked, self._cursors.give(mark, page.end) if page.end else None)

    async def _all(self, call: Call[Nothing, Page, Nothing], form: Form) -> Reply[Readings]:
        query = call.query
        if query.cursor is not None:
            raise invalid_parameter("cursor", "goes with a limit: without one, this form has no pages")
        asked = await self._ask(call, ("all", form.value, query.order))
        if call.known(asked.version):
            return known(asked.version)
        span = SpanRead(asked.kept.start, query.end, query.order == "desc", 0)
        found, head = asked.kept.found, _head(asked, None)
        table = await self._streams.table(call.connection, call.organisation, found, span, head)
        return versioned(streamed(form, table), asked.version)

    @operation(
        PLATFORM, "GET", "/api/v1/readings/latest", _READS, problems=UNKNOWN, other_types=_OTHERS, versioned=True
    )
    async def latest_readings(self, call: Call[Nothing, Whose, Nothing]) -> Reply[Readings]:
        """The newest reading of each series

        In `[from, to)`, if given. Of a site, without `to`: of the devices that stand there now and are not deleted.
        """
        query = call.query
        form = form_of(call.accept, query.format)
        asked = await self._ask(call, ("latest", form.value), is_now=query.end is None)
        if call.known(asked.version):
            return known(asked.version)
        rows = await read_latest(call.connection, asked.kept.found, asked.kept.start, query.end, self._newest)
        return await self._reply(form, rows, asked, None)

    @operation(PLATFORM, "GET", "/api/v1/readings/series", _READS, problems=UNKNOWN)
    async def list_series(self, call: Call[Nothing, Selected, Nothing]) -> SeriesList:
        """Which series there are, with their ids

        All that a selection names; of a site those of every device that ever stood there.
        """
        found = await find(call.connection, call.query.series, None, None, self._settings.api_page_series_max)
        data = [SeriesFound(series_id, *series) for series_id, series in found.series.items()]
        return SeriesList(data, msgspec.UNSET if found.removed_at is None else found.removed_at)

    async def _ask(self, call: Call[Nothing, Any, Nothing], how: tuple[Any, ...], *, is_now: bool = False) -> _Asked:
        query, most = call.query, self._settings.api_page_series_max
        found = await find(call.connection, query.series, query.start, query.end, most, is_now=is_now)
        version = await version_of(call.connection, found, (how, query.start, query.end), query.end)
        return _Asked(await kept_of(call.connection, found, query.start), version)

    async def _reply(self, form: Form, rows: Any, asked: _Asked, next_cursor: str | None) -> Reply[Readings]:
        self._metrics.readings.inc(len(rows))
        table = page_table(rows, asked.kept.found, _head(asked, next_cursor), by_series=form is not Form.ROWS)
        return versioned(await whole(form, table), asked.version)


def _head(asked: _Asked, next_cursor: str | None) -> dict[str, Any]:
    return {"next_cursor": next_cursor, **asked.kept.head}
