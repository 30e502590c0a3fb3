"""What readings come to, as operations. Left out: how it is computed (`api.readings`)."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
import orjson

from api.access.scopes import READINGS_READ
from api.faces import PLATFORM
from api.http.faults import in_words
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.problems import Problem, invalid
from api.http.spelt import Moment
from api.metrics import ApiMetrics
from api.platform.readings import UNKNOWN, Selected, Whose
from api.problems import QUERY_TOO_LARGE
from api.readings.batches import Answered, Item, answer_all
from api.readings.buckets import PATTERN, WORDS
from api.readings.forms.answers import form_of, other_types, whole
from api.readings.forms.texts import write_columns
from api.readings.functions import FUNCTIONS
from api.readings.questions import (
    Asked,
    Fill,
    answer_of,
    span_of,
    statistics_question,
    statistics_table,
    table_of,
    version_of_question,
    zone_named,
)
from api.readings.series import find
from api.readings.versions import known, versioned
from api.settings import ApiSettings

_READS: Final = needs(Role.VIEWER, READINGS_READ)
_PROBLEMS: Final = (*UNKNOWN, QUERY_TOO_LARGE)

_BUCKET: Final = (
    "How long buckets are: a number and m, h, d, w or mo. Without one, what suits the span: 1m up to 2 hours, "
    "5m up to a day, 1h up to a week, else 1d."
)
_FUNCTIONS: Final = f"A list with commas of {', '.join(FUNCTIONS)}."
_ZONE: Final = "By whose clock hours and days are cut: an IANA name, or `site` for that of the site."
_TEXT_CHARACTERS_MAX: Final = 200

BucketText = Annotated[str, msgspec.Meta(max_length=8, pattern=PATTERN, description=_BUCKET, extra=in_words(WORDS))]
FunctionsText = Annotated[
    str,
    msgspec.Meta(
        max_length=_TEXT_CHARACTERS_MAX,
        pattern="^[a-z0-9_]+( *, *[a-z0-9_]+)*$",
        description=_FUNCTIONS,
        extra=in_words(f"must be a list with commas of {', '.join(FUNCTIONS)}"),
    ),
]
ZoneText = Annotated[
    str,
    msgspec.Meta(
        max_length=64,
        pattern="^[A-Za-z0-9_+/-]+$",
        description=_ZONE,
        extra=in_words("must be a time zone of the IANA database, such as Europe/Prague, or `site`"),
    ),
]


class Aggregates(Whose, kw_only=True):
    """Which readings, and how they are put together."""

    bucket: BucketText | None = None
    fn: FunctionsText = "mean"
    fill: Fill = "none"
    tz: ZoneText = "UTC"


class Told(msgspec.Struct, kw_only=True):
    """Where an answer comes from, and how fresh it is."""

    source: str
    """Where it comes from: rollups, readings, both, or none where there is nothing."""
    tier: str | None
    """Of the roll-ups that were asked: 5m, 1h, 1d."""
    complete_through: datetime | None
    """What was received until then is in it."""
    dirty: bool
    """Whether some of it waits to be rolled up again; readings themselves have told of it meanwhile."""
    kept_from: datetime | msgspec.UnsetType = msgspec.UNSET
    """If that is later than `from`: readings before are no longer kept, so roll-ups alone tell of them."""
    told_from: datetime | msgspec.UnsetType = msgspec.UNSET
    """If that is later than `from`: before, nothing is kept any more that would tell of such buckets."""
    told_to: datetime | msgspec.UnsetType = msgspec.UNSET
    """If that is earlier than `to`: of the piece behind it nothing is kept any more."""
    coarser: str | msgspec.UnsetType = msgspec.UNSET
    """Which buckets of UTC still tell of the time before `told_from`: 5m, 1h or 1d."""
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET
    """When the device was deleted, if it was."""


class AggregatedRow(msgspec.Struct):
    """A bucket of a series, and a field for each function that was asked for."""

    device_id: str
    metric: str
    label: str
    unit: str
    bucket: datetime


class Aggregated(Told):
    """Buckets by series and time."""

    data: list[AggregatedRow]


class SeriesBuckets(msgspec.Struct):
    """Buckets of a series, column by column: `bucket`, and a list for each function."""

    device_id: str
    metric: str
    label: str
    unit: str
    bucket: list[int]
    """Microseconds since 1970."""


class AggregatedColumns(Told):
    """Buckets by series, column by column."""

    series: list[SeriesBuckets]


class StatisticsRow(msgspec.Struct):
    """A series over the whole span."""

    device_id: str
    metric: str
    label: str
    unit: str
    count: int
    sum: float | None
    mean: float | None
    min: float
    max: float
    first: float
    first_ts: datetime
    last: float
    last_ts: datetime
    delta: float
    """What a counter rose, from the reading before the span on; a drop means that it began again at 0."""
    rate: float | None
    """That a second."""
    time_weighted_mean: float | None
    """Each value for as long as it stood: until the next reading."""
    time_in_state: float
    """The seconds during which the value was not 0."""


class Statistics(Told):
    """Each series over the whole span."""

    data: list[StatisticsRow]


class SeriesStatistics(msgspec.Struct):
    """A series over the whole span, in lists of one; `first_ts` and `last_ts` in microseconds since 1970."""

    device_id: str
    metric: str
    label: str
    unit: str
    count: list[int]
    first_ts: list[int]
    last_ts: list[int]


class StatisticsColumns(Told):
    """Each series over the whole span, column by column."""

    series: list[SeriesStatistics]


class BatchQuestion(Selected, forbid_unknown_fields=True, kw_only=True):
    """One question of a batch."""

    from_: Moment = msgspec.field(name="from")
    to: Moment
    ref: Annotated[str, msgspec.Meta(max_length=100)] | None = None
    """Given back with the answer."""
    # Judged with the question: one that is none of these is no reason to leave the others without an answer.
    bucket: Annotated[str, msgspec.Meta(max_length=_TEXT_CHARACTERS_MAX, description=_BUCKET)] | None = None
    fn: Annotated[str, msgspec.Meta(max_length=_TEXT_CHARACTERS_MAX, description=_FUNCTIONS)] = "mean"
    fill: Fill = "none"
    tz: Annotated[str, msgspec.Meta(max_length=_TEXT_CHARACTERS_MAX, description=_ZONE)] = "UTC"


class Batch(msgspec.Struct, forbid_unknown_fields=True):
    """Questions that are answered together."""

    queries: list[BatchQuestion]


class BatchProblem(msgspec.Struct):
    """Why a question has no answer."""

    code: str
    message: str
    estimate: int | msgspec.UnsetType = msgspec.UNSET
    """Of `query_too_large`: how many buckets or readings these are."""
    most: int | msgspec.UnsetType = msgspec.UNSET
    fits: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """The part of the span, `from` and `to`, that would do."""


class BatchAnswer(msgspec.Struct):
    """The answer to one question, in the order in which they were asked."""

    ref: str | None
    status: int
    series: list[SeriesBuckets] | msgspec.UnsetType = msgspec.UNSET
    error: BatchProblem | msgspec.UnsetType = msgspec.UNSET
    source: str | msgspec.UnsetType = msgspec.UNSET
    tier: str | msgspec.UnsetType | None = msgspec.UNSET
    complete_through: datetime | msgspec.UnsetType | None = msgspec.UNSET
    dirty: bool | msgspec.UnsetType = msgspec.UNSET
    kept_from: datetime | msgspec.UnsetType = msgspec.UNSET
    told_from: datetime | msgspec.UnsetType = msgspec.UNSET
    told_to: datetime | msgspec.UnsetType = msgspec.UNSET
    coarser: str | msgspec.UnsetType = msgspec.UNSET
    removed_at: datetime | msgspec.UnsetType = msgspec.UNSET


class BatchAnswers(msgspec.Struct):
    """Answers to all questions, with a status each."""

    results: list[BatchAnswer]


class AggregateOperations:
    """`/api/v1/readings/aggregated`, `/stats` and `/batch`."""

    def __init__(self, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._settings = settings
        self._metrics = metrics

    @operation(
        PLATFORM, "GET", "/api/v1/readings/aggregated", _READS, problems=_PROBLEMS,
        other_types=other_types(AggregatedColumns), versioned=True,
    )  # fmt: skip
    async def aggregated_readings(self, call: Call[Nothing, Aggregates, Nothing]) -> Reply[Aggregated]:
        """What readings come to, bucket by bucket

        `[from, to)` cut into buckets by the clock of `tz`, and a value of each function for each bucket that holds
        readings; the first and the last bucket are cut at the span. It is exact at every moment, late readings
        included: from roll-ups where nothing has changed since, from readings elsewhere.
        """
        query = call.query
        form = form_of(call.accept, query.format)
        start, end = span_of(query.start, query.end)
        found = await find(call.connection, query.series, start, end, self._settings.api_page_series_max)
        zone = await zone_named(call.connection, query.tz, found, query.site_id)
        asked = Asked(start, end, query.bucket, query.fn, query.fill, zone)
        question = asked.question(len(found.series), self._settings.api_aggregate_cells_max)
        version = await version_of_question(call.connection, found, (form.value, *asked), question, query.fill)
        if call.known(version):
            return known(version)
        answer = await answer_of(call.connection, found, question, self._settings)
        reply = await whole(form, table_of(answer, found, question, query.fill, datetime.now(UTC)))
        return versioned(reply, version)

    @operation(
        PLATFORM, "GET", "/api/v1/readings/stats", _READS, problems=_PROBLEMS,
        other_types=other_types(StatisticsColumns),
        versioned=True,
    )  # fmt: skip
    async def reading_statistics(self, call: Call[Nothing, Whose, Nothing]) -> Reply[Statistics]:
        """What the readings of each series come to over a whole span"""
        query = call.query
        form = form_of(call.accept, query.format)
        start, end = span_of(query.start, query.end)
        found = await find(call.connection, query.series, start, end, self._settings.api_page_series_max)
        question = statistics_question(start, end)
        version = await version_of_question(call.connection, found, (form.value, start, end), question)
        if call.known(version):
            return known(version)
        answer = await answer_of(call.connection, found, question, self._settings)
        return versioned(await whole(form, statistics_table(answer, found, question)), version)

    @operation(
        PLATFORM, "POST", "/api/v1/readings/batch", _READS, problems=[QUERY_TOO_LARGE], writes=False,
    )  # fmt: skip
    async def batch_of_readings(self, call: Call[Nothing, Nothing, Batch]) -> Reply[BatchAnswers]:
        """Many questions in one call

        Each as `/aggregated` has it. Each answer has a status of its own, so that one that cannot be answered does
        not stop the others; values come column by column.
        """
        questions = call.body.queries
        most = self._settings.api_batch_questions_max
        if not 0 < len(questions) <= most:
            raise invalid("queries", f"must be 1 to {most} questions")
        items: list[Item | Problem] = [_item(question) for question in questions]
        asked = [item for item in items if isinstance(item, Item)]
        answers = iter(await answer_all(call.connection, asked, self._settings))
        results = [item if isinstance(item, Problem) else next(answers) for item in items]
        now = datetime.now(UTC)
        bodies = [await _result(question, result, now) for question, result in zip(questions, results, strict=True)]
        return Reply(b'{"results":[' + b",".join(bodies) + b"]}")


def _item(question: BatchQuestion) -> Item | Problem:
    try:
        start, end = span_of(question.from_.value, question.to.value)
    except Problem as problem:
        return problem
    return Item(question.series, Asked(start, end, question.bucket, question.fn, question.fill, question.tz))


async def _result(question: BatchQuestion, result: Answered | Problem, now: datetime) -> bytes:
    """One answer as JSON, as `BatchAnswer` has it."""
    if isinstance(result, Problem):
        kind = result.kind
        error = {"code": kind.code, "message": result.message} | result.members
        return orjson.dumps({"ref": question.ref, "status": kind.status, "error": error})
    table = table_of(result.answer, result.found, result.question, question.fill, now)
    table = replace(table, head={"ref": question.ref, "status": 200} | dict(table.head))
    return b"".join([chunk async for chunk in write_columns(table)])
