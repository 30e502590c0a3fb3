"""What a plant measured, put together by the bucket, and the newest of it. Left out: how (`api.readings`)."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec

from api.access.scopes import READINGS_READ
from api.faces import PLANTS
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.parameters import Name, Spanned
from api.http.spelt import Moment
from api.metrics import ApiMetrics
from api.problems import METRIC_NOT_FOUND, PLANT_NOT_FOUND, QUERY_TOO_LARGE
from api.readings.cells import page_table
from api.readings.forms.answers import Form, whole
from api.readings.forms.table import Table
from api.readings.questions import Asked, answer_of, span_of, table_of, version_of_question
from api.readings.raw import kept_of, read_latest
from api.readings.series import Found, Selection, find
from api.readings.versions import known, version_of, versioned
from api.registry.plants import require_one
from api.settings import ApiSettings
from schemas.catalogue import metric_name

PATH: Final = "/api/v1/telemetry"
_READS: Final = needs(Role.VIEWER, READINGS_READ)
_PROBLEMS: Final = (PLANT_NOT_FOUND, METRIC_NOT_FOUND)
_FUNCTIONS: Final = "count,mean,min,max,last"
_NAMES: Final = ("plantId", "metric", "label", "unit")

BucketName = Literal["1m", "5m", "15m", "1h", "1d"]
PlantId = Annotated[UUID, msgspec.Meta(description="Whose.")]


class OfPlant(msgspec.Struct, kw_only=True, rename="camel"):
    """Whose telemetry: all of a plant's, or that of one metric."""

    plant_id: PlantId
    metric: Name | None = None


class OfSpan(Spanned, msgspec.Struct, kw_only=True):
    """Which telemetry of a plant, in `[from, to)`, and how long buckets are."""

    plant_id: PlantId = msgspec.field(name="plantId")
    from_: Moment = msgspec.field(name="from")
    to: Moment
    metric: Name | None = None
    bucket: Annotated[
        BucketName | None,
        msgspec.Meta(description="Without one 1m up to 2 hours, 5m up to a day, 1h up to a week, else 1d."),
    ] = None


class TelemetryRow(msgspec.Struct, rename="camel"):
    """A bucket of a channel, which begins at `bucket` and holds readings."""

    plant_id: str
    metric: str
    label: str
    unit: str
    bucket: datetime
    count: int
    mean: float | None
    min: float
    max: float
    last: float


class Telemetry(msgspec.Struct, kw_only=True, rename="camel"):
    """Buckets by channel and time, where they come from and how fresh they are."""

    data: list[TelemetryRow]
    source: str
    """Where it comes from: rollups, readings, both, or none where there is nothing."""
    tier: str | None
    complete_through: datetime | None
    """What was received until then is in it."""
    dirty: bool
    """Whether some of it waits to be rolled up again; readings themselves have told of it meanwhile."""
    kept_from: datetime | msgspec.UnsetType = msgspec.UNSET
    told_from: datetime | msgspec.UnsetType = msgspec.UNSET
    told_to: datetime | msgspec.UnsetType = msgspec.UNSET
    coarser: str | msgspec.UnsetType = msgspec.UNSET


class NewestRow(msgspec.Struct, rename="camel"):
    """The newest reading of a channel."""

    plant_id: str
    metric: str
    label: str
    unit: str
    ts: datetime
    value: float | int | bool | str
    flags: list[str]


class Newest(msgspec.Struct):
    """The newest reading of each channel."""

    data: list[NewestRow]


class TelemetryOperations:
    """`/api/v1/telemetry`."""

    def __init__(self, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._settings = settings
        self._metrics = metrics

    @operation(PLANTS, "GET", PATH, _READS, problems=(*_PROBLEMS, QUERY_TOO_LARGE), versioned=True)
    async def plant_telemetry(self, call: Call[Nothing, OfSpan, Nothing]) -> Reply[Telemetry]:
        """Telemetry of a plant, by the bucket

        Numbers of `[from, to)`, wherever the plant stood; buckets are cut by the clock of UTC. It is exact at every
        moment, late telemetry included.
        """
        query, most = call.query, self._settings.api_aggregate_cells_max
        start, end = span_of(query.start, query.end)
        found = await self._find(call.connection, query.plant_id, query.metric)
        asked = Asked(start, end, query.bucket, _FUNCTIONS, "none", "UTC")
        question = asked.question(len(found.series), most)
        version = await version_of_question(call.connection, found, (PATH, *asked), question)
        if call.known(version):
            return known(version)
        answer = await answer_of(call.connection, found, question, self._settings)
        return versioned(await _told(table_of(answer, found, question, "none", datetime.now(UTC))), version)

    @operation(PLANTS, "GET", f"{PATH}/latest", _READS, problems=_PROBLEMS, versioned=True)
    async def latest_telemetry(self, call: Call[Nothing, OfPlant, Nothing]) -> Reply[Newest]:
        """The newest telemetry of a plant, of each channel

        Numbers, booleans and texts.
        """
        query = call.query
        found = await self._find(call.connection, query.plant_id, query.metric)
        version = await version_of(call.connection, found, (PATH, "latest"), None)
        if call.known(version):
            return known(version)
        kept = await kept_of(call.connection, found, None)
        rows = await read_latest(call.connection, found, kept.start, None)
        self._metrics.readings.inc(len(rows))
        return versioned(await _told(page_table(rows, found, {}, by_series=False)), version)

    async def _find(self, connection: Any, plant: UUID, metric: str | None) -> Found:
        await require_one(connection, plant)
        wanted = Selection(plant, metric=None if metric is None else metric_name(metric))
        return await find(connection, wanted, None, None, self._settings.api_page_series_max)


async def _told(table: Table) -> Reply[Any]:
    """As this face spells names."""
    head = {_camel(name): value for name, value in table.head.items()}
    return await whole(Form.ROWS, replace(table, names=_NAMES, head=head))


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)
