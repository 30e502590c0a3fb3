"""From what a request asks to a question that may be put to the engine, and to a table of its answer.

What an answer would cost is known before it is asked for: how many buckets of how many series, and where readings
themselves have to be gone through, how many those are.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

from api.http.parameters import check_span
from api.http.problems import Problem, invalid_parameter
from api.problems import QUERY_TOO_LARGE
from api.readings.aggregation import Aggregated, Question, aggregate
from api.readings.buckets import Bucket, count_of, edges_of, zone_of
from api.readings.forms.table import Block, Column, Kind, Table, each, micros
from api.readings.functions import FUNCTIONS, Parts, filled, functions_of
from api.readings.series import Found, slots_of
from api.readings.versions import LATEST, version_of
from api.settings import ApiSettings

Fill = Literal["none", "null", "previous", "linear"]

_ESTIMATED: Final = "SELECT readings, fits_until FROM readings_estimated($1, $2, $3, $4)"
_LASTING: Final = {"time_weighted_mean", "time_in_state"}
#: The longest spans for which these are the buckets where none are asked for.
_BY_SPAN: Final = ((timedelta(hours=2), "1m"), (timedelta(days=1), "5m"), (timedelta(days=7), "1h"))
#: Buckets of 200 years reach no end of the calendar from here.
_EARLIEST: Final = datetime(1900, 1, 1, tzinfo=UTC)
_ZONE: Final = """
SELECT timezone FROM sites WHERE site_id = coalesce($1, (
    SELECT h.site_id FROM device_sites h WHERE h.device_id = $2::uuid AND h.valid_from <= now()
    ORDER BY h.valid_from DESC LIMIT 1))"""


class Asked(NamedTuple):
    """What a request says of how readings are to be put together."""

    start: datetime
    end: datetime
    bucket: str | None
    functions: str
    fill: Fill
    zone: str

    def question(self, series: int, cells_max: int) -> Question:
        """Raises the problems of a span, bucket, function or zone that is none, and of too many buckets."""
        functions = functions_of(self.functions)
        bucket = Bucket.parse(self.bucket or _by_span(self.end - self.start))
        zone = zone_of(self.zone)
        self._check_size(bucket, series, cells_max)
        return Question(self.start, self.end, edges_of(self.start, self.end, bucket, zone), functions)

    def _check_size(self, bucket: Bucket, series: int, most: int) -> None:
        buckets = count_of(self.start, self.end, bucket)
        if buckets * max(series, 1) <= most:
            return
        seconds = max(1, most // max(series, 1) - 2) * bucket.least_s
        fits = {"from": _text(self.start), "to": _text(self.start + timedelta(seconds=seconds))}
        message = (
            f"these are about {buckets} buckets of {series} series, and an answer has up to {most} in all: "
            f"ask for longer ones, or for from={fits['from']}&to={fits['to']} first"
        )
        raise Problem(QUERY_TOO_LARGE, message, members={"estimate": buckets * series, "most": most, "fits": fits})


def span_of(start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    """Raises the problem of a span that is open or empty."""
    span = _bounded("from", start), _bounded("to", end)
    check_span(*span)
    return span


def _bounded(name: str, value: datetime | None) -> datetime:
    if value is None:
        raise invalid_parameter(name, "is missing: a span has a beginning and an end")
    if not _EARLIEST <= value <= LATEST:
        raise invalid_parameter(name, "lies not between the years 1900 and 9000")
    return value


def _by_span(span: timedelta) -> str:
    return next((bucket for longest, bucket in _BY_SPAN if span <= longest), "1d")


def _text(ts: datetime) -> str:
    return ts.astimezone(UTC).isoformat().replace("+00:00", "Z")


# ---------------------------------------------------------------- asking


async def version_of_question(
    connection: Any, found: Found, asked: tuple[Any, ...], question: Question, fill: Fill = "none"
) -> str:
    """Another one whenever the values that answer `asked` may be: for `ETag`."""
    # How long a last value stood is known once the next one has come, wherever.
    end = LATEST if _LASTING & set(question.functions) else question.end
    begun = None if fill == "none" else _begun(question, datetime.now(UTC))
    return await version_of(connection, found, (*asked, begun), end)


def _begun(question: Question, now: datetime) -> int:
    return bisect_left(question.edges, now, hi=len(question.edges) - 1)


def needs_readings(question: Question) -> bool:
    """Whether no roll-up will do."""
    return question.tier is None or any(FUNCTIONS[name].fraction for name in question.functions)


async def answer_of(connection: Any, found: Found, question: Question, settings: ApiSettings) -> Aggregated:
    """Raises the problem of a question for which too many readings would have to be gone through."""
    if needs_readings(question):
        most = settings.api_aggregate_readings_max
        row = await connection.fetchrow(_ESTIMATED, *slots_of(found, question.start, question.end), most)
        if row["readings"] > most:
            fits = {"from": _text(question.start), "to": _text(row["fits_until"])}
            message = (
                f"this goes through {row['readings']} readings or more, and a question through up to {most}: ask for "
                f"buckets of 5 minutes or a multiple and no percentiles, or for from={fits['from']}&to={fits['to']}"
            )
            raise Problem(QUERY_TOO_LARGE, message, members={"estimate": row["readings"], "most": most, "fits": fits})
    return await aggregate(connection, found, question)


# ---------------------------------------------------------------- telling


def columns_of(functions: tuple[str, ...]) -> list[Column]:
    return [Column("bucket", Kind.TIME), *(Column(name, _kind(name)) for name in functions)]


def _kind(function: str) -> Kind:
    return Kind.INTEGER if function == "count" else Kind.NUMBER


def blocks_of(answer: Aggregated, found: Found, question: Question, fill: Fill, now: datetime) -> Iterator[Block]:
    """Of each series in the order of `found`: buckets that hold readings, or all that have begun if any is filled.

    Of those that nothing tells of any more, none is filled: whether they held readings is not known.
    """
    starts = question.starts
    told = _told(answer, question)
    begun = min(told.stop, _begun(question, now))
    for series_id, series in found.series.items():
        parts = answer.series.get(series_id)
        if parts is None:
            if fill == "none":
                continue
            parts = Parts(percentiles={name: [] for name in question.functions})
        columns = [FUNCTIONS[name].of(parts) for name in question.functions]
        buckets: list[int] | range = parts.buckets
        if fill != "none":
            buckets = range(told.start, max([begun, *(bucket + 1 for bucket in parts.buckets[-1:])]))
            columns = [
                filled(fill, name, parts.buckets, column, buckets)
                for name, column in zip(question.functions, columns, strict=True)
            ]
        yield Block(series, [[starts[bucket] for bucket in buckets], *columns])


def _told(answer: Aggregated, question: Question) -> range:
    """The buckets of which something is told."""
    edges, last = question.edges, len(question.edges) - 1
    first = 0 if answer.told_from is None else bisect_right(edges, answer.told_from) - 1
    return range(first, last if answer.told_to is None else bisect_left(edges, answer.told_to))


def table_of(answer: Aggregated, found: Found, question: Question, fill: Fill, now: datetime) -> Table:
    blocks = blocks_of(answer, found, question, fill, now)
    return Table(columns_of(question.functions), each(blocks), head_of(answer, found, question))


def head_of(answer: Aggregated, found: Found, question: Question) -> dict[str, Any]:
    """Where an answer comes from, and how fresh it is."""
    head: dict[str, Any] = {
        "source": answer.source,
        "tier": answer.tier,
        "complete_through": answer.complete_through,
        "dirty": answer.dirty,
    }
    if answer.kept_from is not None and answer.kept_from > question.start:
        head["kept_from"] = answer.kept_from
    for name in ("told_from", "told_to", "coarser"):
        if (value := getattr(answer, name)) is not None:
            head[name] = value
    return head | ({} if found.removed_at is None else {"removed_at": found.removed_at})


#: Of one series over a whole span.
STATISTICS: Final[Mapping[str, Kind]] = {
    "count": Kind.INTEGER, "sum": Kind.NUMBER, "mean": Kind.NUMBER, "min": Kind.NUMBER, "max": Kind.NUMBER,
    "first": Kind.NUMBER, "first_ts": Kind.TIME, "last": Kind.NUMBER, "last_ts": Kind.TIME, "delta": Kind.NUMBER,
    "rate": Kind.NUMBER, "time_weighted_mean": Kind.NUMBER, "time_in_state": Kind.NUMBER,
}  # fmt: skip


def statistics_question(start: datetime, end: datetime) -> Question:
    """The span as one bucket."""
    functions = tuple(name for name in STATISTICS if name in FUNCTIONS)
    return Question(start, end, [start, end], functions, ("firsts_ts", "lasts_ts"))


def statistics_table(answer: Aggregated, found: Found, question: Question) -> Table:
    blocks = [
        Block(series, [_statistic(name, answer.series[series_id]) for name in STATISTICS])
        for series_id, series in found.series.items()
        if series_id in answer.series
    ]
    columns = [Column(name, kind) for name, kind in STATISTICS.items()]
    return Table(columns, each(blocks), head_of(answer, found, question))


def _statistic(name: str, parts: Any) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name].of(parts)
    return [micros(ts) for ts in (parts.firsts_ts if name == "first_ts" else parts.lasts_ts)]


async def zone_named(connection: Any, name: str, found: Found, site: Any) -> str:
    """`site` stands for the zone of the site that is asked about, or where the one device stands now."""
    if name != "site":
        return name
    devices = {series.device_id for series in found.series.values()}
    zone = await connection.fetchval(_ZONE, site, devices.pop() if site is None and len(devices) == 1 else None)
    if zone is None:
        raise invalid_parameter("tz", "`site` is of a site, or of one device that stands at one: name a zone")
    return str(zone)
