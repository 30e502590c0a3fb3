"""What readings come to, bucket by bucket: from roll-ups where those may be believed, from readings elsewhere.

The work is the database's (`readings_aggregated`), in one snapshot; here it is asked, and what it gives is put
together by series. Everything runs in a transaction that acts for one organisation. Left out: which series
(`api.readings.series`), where buckets begin (`api.readings.buckets`), how answers are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Final, Literal

from api.readings.buckets import tier_of
from api.readings.forms.table import micros
from api.readings.functions import COLUMNS, FUNCTIONS, LEVELS, Parts
from api.readings.series import Found, slots_of

_STATE: Final = """
SELECT nullif(landed_through, '-infinity') AS landed_through,
       (SELECT nullif(dropped_through, '-infinity') FROM retention_horizons WHERE tier = 'raw') AS kept_from
FROM rollup_state"""
_TOLD: Final = "SELECT told_from, told_to, coarser FROM readings_told($1, $2, $3)"
_AGGREGATED: Final = """
SELECT {columns}, slot, from_raw, from_rollups, is_dirty FROM readings_aggregated($1, $2, $3, $4, $5, $6)"""
_PERCENTILES: Final = """
SELECT series_id, bucket, percentiles FROM readings_percentiles($1, $2, $3, $4, $5)"""
Source = Literal["rollups", "readings", "both", "none"]


@dataclass(frozen=True)
class Question:
    """Buckets between edges, of the readings in `[start, end)`, and the functions that are asked of each."""

    start: datetime
    end: datetime
    edges: Sequence[datetime]
    functions: tuple[str, ...]
    more: tuple[str, ...] = ()
    """Columns of `Parts` beside those that the functions take."""

    @cached_property
    def starts(self) -> list[int]:
        """When each bucket begins, in microseconds since 1970."""
        return [micros(edge) for edge in self.edges[:-1]]

    @cached_property
    def tier(self) -> str | None:
        """The roll-up that tells of it; None where only readings do."""
        return tier_of(self.starts[1:])

    @property
    def columns(self) -> tuple[str, ...]:
        """What is asked for. The rest would cost its way here, which takes as long as working it out."""
        taken = {*self.more, *(column for name in self.functions for column in FUNCTIONS[name].columns)}
        return tuple(column for column in COLUMNS if column in taken)

    @property
    def level(self) -> str:
        """How much of the readings it takes to tell them."""
        return next(name for name, columns in LEVELS if set(columns).issuperset(self.columns))


@dataclass
class Aggregated:
    """What was asked, by series that have anything, and where it comes from."""

    series: dict[int, Parts] = field(default_factory=dict)
    tier: str | None = None
    """The roll-up that was asked, if one was."""
    percentiles: bool = False
    """Whether there are such, which readings alone tell of."""
    complete_through: datetime | None = None
    """What was received until then is in it."""
    kept_from: datetime | None = None
    """Readings before are no longer kept: of those times roll-ups alone tell."""
    told_from: datetime | None = None
    """Of what lies before it, or behind `told_to`, nothing is kept that would do for these buckets; else None."""
    told_to: datetime | None = None
    coarser: str | None = None
    """The roll-up that still tells of what lies before `told_from`, if one does."""

    @property
    def from_readings(self) -> int:
        return sum(parts.from_readings for parts in self.series.values())

    @property
    def from_rollups(self) -> int:
        return sum(parts.from_rollups for parts in self.series.values())

    @property
    def dirty(self) -> bool:
        return any(parts.dirty for parts in self.series.values())

    def of(self, found: Found) -> "Aggregated":
        """What it tells of some of the series."""
        return replace(self, series={one: self.series[one] for one in found.series if one in self.series})

    @property
    def source(self) -> Source:
        if self.from_rollups:
            return "both" if self.from_readings or self.percentiles else "rollups"
        return "readings" if self.from_readings else "none"


async def aggregate(connection: Any, found: Found, question: Question, *, raw: bool = False) -> Aggregated:
    """All of the question; `raw` asks readings alone, which gives the same and takes longer."""
    tier = None if raw else question.tier
    state = await connection.fetchrow(_STATE)
    answer = Aggregated(tier=tier, complete_through=state["landed_through"], kept_from=state["kept_from"])
    if answer.kept_from is not None and answer.kept_from > question.start:
        await _limit(connection, answer, question)
    slots = slots_of(found, question.start, question.end)
    if not slots[0]:
        return answer
    columns = question.columns
    sql = _AGGREGATED.format(columns=", ".join(("buckets", *columns)))
    for row in await connection.fetch(sql, *slots, question.edges, tier, question.level):
        _take(answer, slots[0][row["slot"] - 1], row, columns)
    fractions = {name: fraction for name in question.functions if (fraction := FUNCTIONS[name].fraction) is not None}
    if fractions:
        await _percentiles(connection, answer, slots, question, fractions)
    return answer


async def _limit(connection: Any, answer: Aggregated, question: Question) -> None:
    """Say how far the answer reaches where some of what would tell is gone."""
    row = await connection.fetchrow(_TOLD, question.start, question.end, answer.tier)
    if row["told_from"] > question.start:
        answer.told_from, answer.coarser = row["told_from"], row["coarser"]
    if row["told_from"] < question.end and row["told_to"] < question.end:
        answer.told_to = row["told_to"]


def _take(answer: Aggregated, series_id: int, row: Any, columns: Sequence[str]) -> None:
    parts = Parts([bucket - 1 for bucket in row["buckets"]], **{name: row[name] for name in columns})
    parts.from_readings, parts.from_rollups = row["from_raw"], row["from_rollups"]
    parts.dirty = row["is_dirty"]
    before = answer.series.setdefault(series_id, parts)
    if before is not parts:
        before.follow(parts)


async def _percentiles(
    connection: Any, answer: Aggregated, slots: tuple[Any, ...], question: Question, fractions: Mapping[str, float]
) -> None:
    """Of the buckets that the answer has: readings may have come since it was made."""
    rows = await connection.fetch(_PERCENTILES, *slots, list(question.edges), list(fractions.values()))
    found = {(row["series_id"], row["bucket"] - 1): row["percentiles"] for row in rows}
    nothing = [None] * len(fractions)
    for series_id, parts in answer.series.items():
        values = [
            nothing if _is_cut(question.edges[bucket], answer.kept_from) else found.get((series_id, bucket), nothing)
            for bucket in parts.buckets
        ]
        columns = zip(*values, strict=True) if values else [[]] * len(fractions)
        parts.percentiles = {name: list(column) for name, column in zip(fractions, columns, strict=True)}
    answer.percentiles = True


def _is_cut(start: datetime, kept_from: datetime | None) -> bool:
    """Whether some readings of the bucket that begins there may be kept no longer."""
    return kept_from is not None and start < kept_from
