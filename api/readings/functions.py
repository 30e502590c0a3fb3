"""What may be asked of the readings in a bucket, and how each is told from what the engine gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Final, NamedTuple

from api.http.problems import invalid_parameter

Number = float | int | None


@dataclass
class Parts:
    """What the readings of one series come to, an element for each bucket that holds any, in order of time.

    Columns that were not asked for are empty. Sums are None where a number is beyond all of them. In `schemas/sql`,
    `readings_aggregated` says what each is.
    """

    buckets: list[int] = field(default_factory=list)
    """Counted from 0."""
    counts: list[int] = field(default_factory=list)
    sums: list[float | None] = field(default_factory=list)
    mins: list[float] = field(default_factory=list)
    maxs: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    firsts_ts: list[datetime] = field(default_factory=list)
    lasts: list[float] = field(default_factory=list)
    lasts_ts: list[datetime] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    deltas_seconds: list[float] = field(default_factory=list)
    areas: list[float | None] = field(default_factory=list)
    areas_seconds: list[float] = field(default_factory=list)
    seconds_true: list[float] = field(default_factory=list)
    percentiles: Mapping[str, list[float | None]] = field(default_factory=dict)
    """By the function's name."""
    from_readings: int = 0
    """Of how many readings was told by themselves, and of how many by roll-ups."""
    from_rollups: int = 0
    dirty: bool = False
    """Whether some of it waits to be rolled up again, and was told from readings meanwhile."""

    def follow(self, later: "Parts") -> None:
        """Go on with what the same series came to in a later span: a bucket that both reach into is put together."""
        self.from_readings += later.from_readings
        self.from_rollups += later.from_rollups
        self.dirty = self.dirty or later.dirty
        joined = bool(self.buckets and later.buckets and self.buckets[-1] == later.buckets[0])
        if joined:
            for name in ("counts", "sums", "deltas", "deltas_seconds", "areas", "areas_seconds", "seconds_true"):
                _added(getattr(self, name), getattr(later, name))
            self.mins[-1:] = map(min, self.mins[-1:], later.mins[:1])
            self.maxs[-1:] = map(max, self.maxs[-1:], later.maxs[:1])
            self.lasts[-1:], self.lasts_ts[-1:] = later.lasts[:1], later.lasts_ts[:1]
        for name in ("buckets", *COLUMNS):
            getattr(self, name).extend(getattr(later, name)[joined:])


#: Beside the buckets, as the engine calls them too.
COLUMNS: Final = (
    "counts", "sums", "mins", "maxs", "firsts", "firsts_ts", "lasts", "lasts_ts", "deltas", "deltas_seconds", "areas",
    "areas_seconds", "seconds_true",
)  # fmt: skip


def _added(before: list[float | None], later: list[float | None]) -> None:
    if before and later:
        one, other = before[-1], later[0]
        before[-1] = None if one is None or other is None else one + other


#: How much of them the engine works out: each level has the columns of those before it too.
LEVELS: Final = (("short", COLUMNS[:4]), ("stepped", COLUMNS[:10]), ("whole", COLUMNS))


class Function(NamedTuple):
    """Its value in each bucket, and the columns that it takes; a percentile takes the readings themselves."""

    of: "Callable[[Parts], Sequence[Number]]"
    columns: tuple[str, ...] = ()
    fraction: float | None = None
    """Of a percentile."""


def _ratios(above: Sequence[float | None], below: Sequence[float]) -> list[float | None]:
    return [None if one is None or other <= 0 else one / other for one, other in zip(above, below, strict=True)]


def _percentile(name: str, fraction: float) -> Function:
    return Function(lambda parts: parts.percentiles[name], fraction=fraction)


FUNCTIONS: Final[Mapping[str, Function]] = {
    "count": Function(lambda parts: parts.counts, ("counts",)),
    "sum": Function(lambda parts: parts.sums, ("sums",)),
    "mean": Function(lambda parts: _ratios(parts.sums, parts.counts), ("sums", "counts")),
    "min": Function(lambda parts: parts.mins, ("mins",)),
    "max": Function(lambda parts: parts.maxs, ("maxs",)),
    "first": Function(lambda parts: parts.firsts, ("firsts",)),
    "last": Function(lambda parts: parts.lasts, ("lasts",)),
    "delta": Function(lambda parts: parts.deltas, ("deltas",)),
    "rate": Function(lambda parts: _ratios(parts.deltas, parts.deltas_seconds), ("deltas", "deltas_seconds")),
    "time_weighted_mean": Function(
        lambda parts: _ratios(parts.areas, parts.areas_seconds), ("areas", "areas_seconds")
    ),
    "time_in_state": Function(lambda parts: parts.seconds_true, ("seconds_true",)),
    "p50": _percentile("p50", 0.5),
    "p95": _percentile("p95", 0.95),
    "p99": _percentile("p99", 0.99),
}


def functions_of(text: str) -> tuple[str, ...]:
    """Names out of a list with commas, each once. Raises the problem of one that is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FUNCTIONS:
            raise invalid_parameter("fn", f"must be a list of {', '.join(FUNCTIONS)}")
    return names


# ---------------------------------------------------------------- empty buckets


def filled(how: str, name: str, buckets: Sequence[int], values: Sequence[Number], of: range) -> list[Number]:
    """A value for each bucket of `of`, where `values` are those of `buckets`.

    `null` leaves empty ones without a value, `previous` repeats the value before, `linear` lies on the line between
    the two around it; nothing stands before the first value, and no line goes beyond the last. Nothing has no count.
    """
    known = dict(zip(buckets, values, strict=True))
    if name == "count":
        return [known.get(bucket, 0) for bucket in of]
    if how == "null":
        return [known.get(bucket) for bucket in of]
    if how == "previous":
        return _previous(known, of)
    return _linear(known, of)


def _previous(known: Mapping[int, Number], of: range) -> list[Number]:
    found, before = [], None
    for bucket in of:
        before = known.get(bucket, before)
        found.append(before)
    return found


def _linear(known: Mapping[int, Number], of: range) -> list[Number]:
    found = [known.get(bucket) for bucket in of]
    held = [index for index, value in enumerate(found) if value is not None]
    for first, last in pairwise(held):
        low, high = found[first], found[last]
        if low is None or high is None:
            continue
        for index in range(first + 1, last):
            found[index] = low + (high - low) * (index - first) / (last - first)
    return found
