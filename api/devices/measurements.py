"""Measurements as the Devices face has them: of a device, or of up to 32 channels, raw or put together.

One engine with `/api/v1/readings`: here are the names that this face has for it, and its pages. Left out: what is
computed (`api.readings`).
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec

from api.access.scopes import READINGS_READ
from api.devices.shapes import DeviceId, OneDevice
from api.faces import DEVICES
from api.http.faults import in_words
from api.http.lists import Cursors, CursorText
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.parameters import Name, Span
from api.http.problems import Problem, invalid_parameter
from api.metrics import ApiMetrics
from api.problems import DEVICE_NOT_FOUND, METRIC_NOT_FOUND, QUERY_TOO_LARGE
from api.readings.aggregation import Aggregated, Question
from api.readings.cells import page_table
from api.readings.forms.answers import Form, form_of, whole
from api.readings.forms.table import Block, Column, Kind, Table, each, micros
from api.readings.questions import Asked, answer_of, blocks_of, columns_of, head_of, span_of
from api.readings.raw import Place, SpanRead, kept_of, read_page
from api.readings.series import Found, Selection, Series, find_devices, narrowed
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal
from schemas.catalogue import metric_name

_READS: Final = needs(Role.VIEWER, READINGS_READ)
LIMIT_MAX: Final = 5_000
CHANNELS_MAX: Final = 32
_CHANNELS_CHARACTERS_MAX: Final = 4_000
_NAMES: Final = ("device_id", "type", "label", "unit")
_NONE_REMOVED: Final[Mapping[str, datetime]] = MappingProxyType({})
_FORMS: Final = (Form.ROWS, Form.CSV)

Aggregation = Literal["raw", "5m", "1h", "1d"]


class Taken(Span, kw_only=True):
    """Which measurements, and how they are put together."""

    agg: Aggregation = "raw"
    fn: Annotated[
        str,
        msgspec.Meta(
            max_length=100,
            pattern="^(mean|min|max|count|last|p50|p95)(,(mean|min|max|count|last|p50|p95))*$",
            description="With `agg`: a list with commas of mean, min, max, count, last, p50, p95.",
            extra=in_words("must be a list with commas of mean, min, max, count, last, p50, p95"),
        ),
    ] = "mean"
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIMIT_MAX, description="How many to give at most.")] = 1_000
    cursor: CursorText | None = None
    format: Literal["json", "csv"] | None = None


class OfDevice(Taken, kw_only=True):
    """Those of one device."""

    type: Name | None = None
    label: Name | None = None


class OfChannels(Taken, kw_only=True):
    """Those of some channels."""

    channels: Annotated[
        str,
        msgspec.Meta(
            max_length=_CHANNELS_CHARACTERS_MAX,
            description="Up to 32, with commas: `device:type`, `device:type:label` (`device:type:` of an empty "
            "label), or `device` for all of its channels.",
        ),
    ]


class Measurement(msgspec.Struct):
    """A measurement; or with `agg` a bucket that begins at `ts`, and instead of `value` a field for each function."""

    device_id: str
    type: str
    label: str
    unit: str
    ts: datetime
    value: float | int | bool | str | msgspec.UnsetType = msgspec.UNSET
    flags: list[str] | msgspec.UnsetType = msgspec.UNSET


class Measurements(msgspec.Struct):
    """A page of measurements."""

    data: list[Measurement]
    next_cursor: str | None
    has_more: bool
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET
    """When their device was deleted, if it was; of several, the last one, once all of them were."""
    removed_devices: dict[str, datetime] | msgspec.UnsetType = msgspec.UNSET
    """Of channels: which of their devices were deleted, and when."""
    source: str | msgspec.UnsetType = msgspec.UNSET
    """With `agg`: whether roll-ups told of it, readings, both, or there is none."""
    tier: str | msgspec.UnsetType | None = msgspec.UNSET
    complete_through: datetime | msgspec.UnsetType | None = msgspec.UNSET
    """With `agg`: what was received until then is in it."""
    dirty: bool | msgspec.UnsetType = msgspec.UNSET
    kept_from: datetime | msgspec.UnsetType = msgspec.UNSET
    """If that is later than `from`: measurements before are no longer kept; their buckets may be."""
    told_from: datetime | msgspec.UnsetType = msgspec.UNSET
    """With `agg`, if that is later than `from`: before, nothing is kept any more that would tell of such buckets."""
    told_to: datetime | msgspec.UnsetType = msgspec.UNSET
    """With `agg`, if that is earlier than `to`: of the piece behind it nothing is kept any more."""
    coarser: str | msgspec.UnsetType = msgspec.UNSET
    """With `agg`: which buckets still tell of the time before `told_from`."""


class _Bucket(NamedTuple):
    """Where a page of buckets ended."""

    series_id: int
    start: int
    """Microseconds since 1970."""


class MeasurementOperations:
    """`/v1/devices/{id}/measurements` and `/v1/measurements`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._places: Cursors[Place] = Cursors(Seal(ring, "measurements cursor"), Place)
        self._buckets: Cursors[_Bucket] = Cursors(Seal(ring, "buckets cursor"), _Bucket)
        self._settings = settings
        self._metrics = metrics

    @operation(
        DEVICES, "GET", "/v1/devices/{id}/measurements", _READS, missing=DEVICE_NOT_FOUND,
        problems=[METRIC_NOT_FOUND, QUERY_TOO_LARGE],
        other_types={Form.CSV.media_type: None},
    )  # fmt: skip
    async def device_measurements(self, call: Call[OneDevice, OfDevice, Nothing]) -> Reply[Measurements]:
        """Measurements of a device

        Of `[from, to)`, by time; wherever it stood then, and also once it is removed. With `agg` by channel and
        bucket, of those buckets that hold any.
        """
        device, query = call.path.id.value, call.query
        found = (await find_devices(call.connection, [device])).get(device)
        if found is None:
            raise Problem(DEVICE_NOT_FOUND)
        metric = None if query.type is None else metric_name(query.type)
        some = await narrowed(call.connection, found, Selection(device, metric=metric, label=query.label))
        return await self._answer(call, some, (str(device), metric, query.label))

    @operation(
        DEVICES, "GET", "/v1/measurements", _READS, problems=[DEVICE_NOT_FOUND, METRIC_NOT_FOUND, QUERY_TOO_LARGE],
        other_types={Form.CSV.media_type: None},
    )  # fmt: skip
    async def channel_measurements(self, call: Call[Nothing, OfChannels, Nothing]) -> Reply[Measurements]:
        """Measurements of some channels

        Of up to 32 at once, as those of a device.
        """
        channels = _channels(call.query.channels)
        known = await find_devices(call.connection, [channel.device for channel in channels])
        series: dict[int, Series] = {}
        for channel in channels:
            if channel.device not in known:
                raise Problem(DEVICE_NOT_FOUND)
            wanted = Selection(channel.device, metric=channel.metric, label=channel.label)
            series |= (await narrowed(call.connection, known[channel.device], wanted)).series
        if len(series) > CHANNELS_MAX:
            raise _too_many()
        removed = {
            str(DeviceId(device)): one.removed_at for device, one in known.items() if one.removed_at is not None
        }
        of_all = max(removed.values()) if len(removed) == len(known) else None
        return await self._answer(call, Found(series, removed_at=of_all), tuple(map(str, channels)), removed)

    async def _answer(
        self,
        call: Call[Any, Any, Nothing],
        found: Found,
        of: tuple[Any, ...],
        removed: Mapping[str, datetime] = _NONE_REMOVED,
    ) -> Reply[Measurements]:
        query: Taken = call.query
        form = form_of(call.accept, query.format, _FORMS)
        mark = (call.organisation, of, query.start, query.end, query.agg, query.fn)
        answer = self._raw if query.agg == "raw" else self._put_together
        table = await answer(call, found, mark)
        beside = {"removed_devices": removed} if removed else {}
        return await whole(form, replace(table, names=_NAMES, head={**table.head, **beside}))

    async def _raw(self, call: Call[Any, Any, Nothing], found: Found, mark: tuple[Any, ...]) -> Table:
        query: Taken = call.query
        after = self._places.take(mark, query.cursor)
        kept = await kept_of(call.connection, found, query.start)
        read = SpanRead(kept.start, query.end, False, query.limit)
        page = await read_page(call.connection, kept.found, read, after)
        self._metrics.readings.inc(len(page.rows))
        end = None if page.end is None else self._places.give(mark, page.end)
        return page_table(page.rows, _spelt(found), _paged(end) | kept.head, by_series=False)

    async def _put_together(self, call: Call[Any, Any, Nothing], found: Found, mark: tuple[Any, ...]) -> Table:
        query: Taken = call.query
        start, end = span_of(query.start, query.end)
        after = self._buckets.take(mark, query.cursor)
        asked = Asked(start, end, query.agg, query.fn, "none", "UTC")
        question = asked.question(len(found.series), self._settings.api_aggregate_cells_max)
        # One more than may be full: that at which the page before ended may have nothing left.
        some = _from(found, after, 2 + query.limit // (len(question.edges) - 1))
        answer = await answer_of(call.connection, some, question, self._settings)
        blocks, last = _page(answer, some, question, after, query.limit)
        if last is None and list(some.series)[-1:] != list(found.series)[-1:]:
            last = _Bucket(list(some.series)[-1], micros(question.end))
        cursor = None if last is None else self._buckets.give(mark, last)
        columns = [Column("ts", Kind.TIME), *columns_of(question.functions)[1:]]
        return Table(columns, each(blocks), _paged(cursor) | head_of(answer, found, question))


class _Channel(NamedTuple):
    """Of a device: None stands for all."""

    device: UUID
    metric: str | None
    label: str | None


def _too_many() -> Problem:
    return invalid_parameter("channels", f"must be {CHANNELS_MAX} at most")


def _channels(text: str) -> list[_Channel]:
    """Raises the problem of what is none, and of too many."""
    parts = text.split(",")
    if len(parts) > CHANNELS_MAX:
        raise _too_many()
    channels = []
    for part in parts:
        device, _, rest = part.strip().partition(":")
        metric, has_label, label = rest.partition(":")
        try:
            identity = DeviceId.parse(device)
        except ValueError:
            raise Problem(DEVICE_NOT_FOUND) from None
        channels.append(
            _Channel(identity.value, metric_name(metric) if metric else None, label if has_label else None)
        )
    return channels


def _spelt(found: Found) -> Found:
    """With ids as this face spells them."""
    return replace(
        found,
        series={
            series_id: one._replace(device_id=str(DeviceId(UUID(one.device_id))))
            for series_id, one in found.series.items()
        },
    )


def _paged(cursor: str | None) -> dict[str, Any]:
    return {"next_cursor": cursor, "has_more": cursor is not None}


def _from(found: Found, after: _Bucket | None, most: int) -> Found:
    """Up to so many series, from that on at which the page before ended."""
    ids = list(found.series)
    first = ids.index(after.series_id) if after is not None and after.series_id in found.series else 0
    return replace(found, series={series_id: found.series[series_id] for series_id in ids[first : first + most]})


def _page(
    answer: Aggregated, found: Found, question: Question, after: _Bucket | None, limit: int
) -> tuple[list[Block], _Bucket | None]:
    """Up to `limit` buckets behind the place, and the place of the last one if there are more."""
    spelt = _spelt(found)
    page: list[Block] = []
    given = 0
    for series_id in (one for one in found.series if one in answer.series):
        of_one = replace(spelt, series={series_id: spelt.series[series_id]})
        (block,) = blocks_of(answer, of_one, question, "none", question.end)
        starts = block.columns[0]
        skipped = bisect_right(starts, after.start) if after is not None and after.series_id == series_id else 0
        taken = slice(skipped, skipped + limit - given)
        page.append(Block(block.series, [column[taken] for column in block.columns]))
        given += len(page[-1].columns[0])
        if given == limit:
            last = skipped + len(page[-1].columns[0])
            is_all = last == len(starts) and series_id == list(answer.series)[-1]
            return page, None if is_all else _Bucket(series_id, starts[last - 1])
    return page, None
