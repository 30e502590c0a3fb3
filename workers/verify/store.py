"""What `sluice verify` asks of the database: read only, each answer from one snapshot, on one session.

It takes the worker's role, the only one that sees the books of every organisation, in a session that cannot write.
Times go in and out as microseconds since 2000. Left out: what the answers mean (`reading`, `matching`, `ledger`).
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from runtime.errors import ConfigurationError, UnavailableError
from runtime.postgres import UNAVAILABLE, PostgresSettings, check_role, connect, transaction
from schemas.record import Idempotency
from workers.landing import tombstones
from workers.landing.quarantine import Place, time_told
from workers.landing.tombstones import Span, Tombstones
from workers.verify import sql
from workers.verify.tally import HOUR_US, Booked, Group, SetAside

ROLE: Final = "sluice_worker"
ROWS_AT_ONCE: Final = 20_000
SERIES_AT_ONCE: Final = 500
SERIES_IDS_AT_ONCE: Final = 10_000

_LEDGER_AT_ONCE: Final = 5_000
_WEEK_US: Final = 7 * 86_400_000_000
# An index look-up a row is right for every statement here; each is planned for the times it is asked about.
_SESSION: Final = {
    "default_transaction_read_only": "on",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_custom_plan",
    "max_parallel_workers_per_gather": "0",
}

NEVER: Final = -(2**63)
ALWAYS: Final = 2**63 - 1


@dataclass
class Start:
    """Where everything stood when the verification began."""

    is_first: bool
    """No other generation of the log may have brought readings."""
    created_at: int
    now: int
    positions: dict[int, int] = field(default_factory=dict)


class Loss(NamedTuple):
    """Records that the log no longer had when they should have landed."""

    source: UUID
    partition: int
    first: int
    end: int
    noticed_at: int


class StoredOutcome(NamedTuple):
    """What landing told of a record."""

    unreadable: bool
    duplicates: int
    conflicts: int
    set_aside: int
    """Conflicts among them."""
    refused: int
    erased: int


class Held(NamedTuple):
    """An item in quarantine, or that was there."""

    code: str
    state: str


class Replay(NamedTuple):
    """The quarantine row that a record releases, and the record that does or did."""

    state: str
    record_id: bytes


class Exceptions:
    """What the books tell of some records beside that all of their readings were stored."""

    def __init__(self) -> None:
        self.outcomes: dict[Place, StoredOutcome] = {}
        self.quarantine: dict[Place, dict[int, Held]] = {}
        """By item."""
        self.moved: dict[bytes, dict[int, int]] = {}
        """Readings that stand at another time than their own, by record id."""
        self.replays: dict[bytes, Replay] = {}
        self.named: set[Place] = set()
        """Where the records stand that were the first to use an idempotency key."""


class Asked(NamedTuple):
    """What some records have that the books must be asked about."""

    spooled: list[Place]
    """Places of those that came out of a spool."""
    made_up: list[bytes]
    """Record ids of those with times of our making."""
    replays: list[bytes]
    """Quarantine rows that they release."""
    named: list[tuple[bytes, Idempotency, int]]
    """Their devices, names and receive times."""


class Gap(NamedTuple):
    """Ids that no series has: both ends are among them."""

    first: int
    last: int


class SeriesRow(NamedTuple):
    series_id: int
    organisation: UUID
    device: UUID
    metric: str
    label: str
    retention_days: int


class Row(NamedTuple):
    """A stored reading: its key and content as claims have them; `seen`: the first snapshot saw it."""

    key: bytes
    content: bytes
    seen: bool


class Tombstone(NamedTuple):
    """A time of a device of which nothing may be left."""

    device: UUID
    organisation: UUID
    span: Span


class LeftRow(NamedTuple):
    """A row of a series where none may be: under which of those that were asked about, and its content as claims'."""

    number: int
    ts: int
    content: bytes


class LeftQuarantined(NamedTuple):
    """A row in quarantine of a device that has tombstones, and when its reading was measured."""

    quarantine_id: UUID
    device: UUID
    ts: int


class NoteRow(NamedTuple):
    """What must stand beside a flagged reading; `metadata` as JSON."""

    series_id: int
    ts: int
    organisation: UUID
    received_at: int
    original_time: str | None
    original_unit: str | None
    metadata: str | None


class Store:
    """One session. Every call raises `UnavailableError` when the database is away."""

    def __init__(self, connection: Any, source: UUID) -> None:
        self._connection = connection
        self._source = source
        self._seen_before: tuple[int, list[int]] = 0, []
        """The number that the first transaction after the first snapshot had at least, and those open in it."""
        self.tombstones = Tombstones()
        """As `learn` saw them last."""

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Any]:
        try:
            async with transaction(self._connection, isolation="repeatable_read", readonly=True):
                yield self._connection
        except UNAVAILABLE as error:
            raise UnavailableError(f"the database is away: {error}") from error

    # ------------------------------------------------------------ the beginning

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Start]:
        """Positions, and as long as the block lasts, the books and the quarantine of the very same moment."""
        async with self._snapshot() as connection:
            row = await connection.fetchrow(sql.SOURCE, self._source)
            start = Start(row["is_first"], row["created_at"], row["now"])
            rows = await connection.fetch(sql.POSITIONS, self._source)
            start.positions = {row["partition"]: row["position"] for row in rows}
            self._seen_before = row["transactions"], row["open"]
            yield start

    async def organisations(self, organisation: UUID | None) -> list[UUID]:
        """Within `begin`: all of them, or the one. Raises `ConfigurationError` when there is no such."""
        found = [row[0] for row in await self._connection.fetch(sql.ORGANISATIONS, organisation)]
        if organisation is not None and not found:
            raise ConfigurationError(f"--organisation: there is no organisation {organisation}")
        return found

    async def ledger(self, first: int, end: int, organisation: UUID | None) -> AsyncIterator[tuple[Group, Booked]]:
        """Within `begin`: its rows of the hours from `first` up to `end`."""
        cursor = await self._connection.cursor(sql.LEDGER, first, end, organisation)
        while rows := await cursor.fetch(_LEDGER_AT_ONCE):
            for owner, hour, source, partition, *counts in rows:
                yield Group(owner.bytes, hour // HOUR_US, source.bytes, partition), Booked(*counts)

    async def set_aside(self, organisation: UUID, first: int, end: int) -> AsyncIterator[tuple[Group, SetAside]]:
        """Within `begin`: of the hours from `first` up to `end`, both whole."""
        cursor = await self._connection.cursor(sql.SET_ASIDE, organisation, first, end)
        while rows := await cursor.fetch(_LEDGER_AT_ONCE):
            for hour, source, partition, *counts in rows:
                group = Group(organisation.bytes, hour // HOUR_US, source.bytes, partition)
                yield group, SetAside(*counts)

    async def losses(self, first: int, end: int) -> list[Loss]:
        """Within `begin`: those noticed from `first` up to `end`."""
        return [Loss(*row) for row in await self._connection.fetch(sql.LOSSES, first, end)]

    # ------------------------------------------------------------ what is erased

    async def learn(self) -> bool:
        """Bring the tombstones up to now: what is erased goes after them. Whether there are others."""
        async with self._snapshot() as connection:
            known, rows = self.tombstones.epoch, await connection.fetch(tombstones.READ, self.tombstones.epoch)
        self.tombstones.take(rows)
        return self.tombstones.epoch != known

    async def finished(self, organisation: UUID | None) -> list[Tombstone]:
        """Within `begin`: those whose erasure has ended, by device."""
        rows = await self._connection.fetch(sql.FINISHED, organisation)
        return [Tombstone(device, owner, Span(first, end)) for device, owner, first, end in rows]

    async def erased_series(self, series: Sequence[int]) -> dict[int, UUID]:
        """Whose these series were, of those that went with their device."""
        async with self._snapshot() as connection:
            return dict(await connection.fetch(sql.ERASED_SERIES, series))

    async def series_of(self, devices: Sequence[UUID]) -> list[tuple[UUID, int]]:
        """What these devices have and had."""
        async with self._snapshot() as connection:
            return [tuple(row) for row in await connection.fetch(sql.SERIES_OF, devices)]

    async def left(self, table: str, spans: Sequence[tuple[int, Span]]) -> list[LeftRow]:
        """What stands in these spans of series, up to `ROWS_AT_ONCE`."""
        columns = [one for one, _ in spans], [span.first for _, span in spans], [span.end for _, span in spans]
        async with self._snapshot() as connection:
            return [LeftRow(*row) for row in await connection.fetch(sql.LEFT[table], *columns, ROWS_AT_ONCE)]

    async def left_quarantined(self, organisations: Iterable[UUID], devices: Sequence[UUID]) -> list[LeftQuarantined]:
        """What stands in quarantine of these devices of these organisations."""
        async with self._snapshot() as connection:
            rows = await connection.fetch(sql.LEFT_QUARANTINED, [*organisations], devices)
        return [LeftQuarantined(row, device, time_told(*told)) for row, device, *told in rows]

    # ------------------------------------------------------------ of records

    async def exceptions(
        self,
        partition: int,
        first: int,
        end: int,
        asked: "Asked",
    ) -> Exceptions:
        """Of the records of a partition from position `first` up to `end`, in one snapshot."""
        found = Exceptions()
        async with self._snapshot() as connection:
            span = self._source, partition, first, end
            outcomes = await connection.fetch(sql.OUTCOMES, *span)
            quarantine = await connection.fetch(sql.QUARANTINE, *span)
            if asked.spooled:
                columns = _place_columns(asked.spooled)
                outcomes += await connection.fetch(sql.SPOOLED_OUTCOMES, *columns)
                quarantine += await connection.fetch(sql.SPOOLED_QUARANTINE, *columns)
            moved = await connection.fetch(sql.MOVED, _uuids(asked.made_up)) if asked.made_up else []
            released = await connection.fetch(sql.REPLAYS, _uuids(asked.replays)) if asked.replays else []
            named = await connection.fetch(sql.NAMED, *_name_columns(asked.named)) if asked.named else []
        for source, at, position, *told in outcomes:
            found.outcomes[self._place(source, at, position)] = StoredOutcome(*told)
        for source, at, position, item, *held in quarantine:
            found.quarantine.setdefault(self._place(source, at, position), {})[item] = Held(*held)
        for record_id, item, ts in moved:
            found.moved.setdefault(record_id.bytes, {})[item] = ts
        found.named = {self._place(*place) for place in named}
        for row, state, replay_id in released:
            found.replays[row.bytes] = Replay(state, replay_id.bytes if replay_id else b"")
        return found

    def _place(self, source: UUID, partition: int, position: int) -> Place:
        return Place(partition, position, b"" if source == self._source else source.bytes)

    async def find(self, names: Sequence[tuple[bytes, bytes, str, str]]) -> list[int | None]:
        """Series by organisation, device, metric and label."""
        found: list[int | None] = [None] * len(names)
        # PostgreSQL's text has no NUL: a name with one is that of no series.
        asked = [number for number, name in enumerate(names) if "\0" not in name[2] + name[3]]
        columns = (
            _uuids(names[number][0] for number in asked),
            _uuids(names[number][1] for number in asked),
            [names[number][2] for number in asked],
            [names[number][3] for number in asked],
        )
        async with self._snapshot() as connection:
            for number, series_id in await connection.fetch(sql.FIND, *columns):
                found[asked[number]] = series_id
        return found

    # ------------------------------------------------------------ of rows

    async def series(self, after: int, organisation: UUID | None) -> list[SeriesRow]:
        """The next series by id."""
        async with self._snapshot() as connection:
            return [
                SeriesRow(*row) for row in await connection.fetch(sql.SERIES, after, organisation, SERIES_AT_ONCE)
            ]

    async def series_ids(self, after: int) -> list[int]:
        """The next ones of all organisations."""
        async with self._snapshot() as connection:
            return [row[0] for row in await connection.fetch(sql.SERIES_IDS, after, SERIES_IDS_AT_ONCE)]

    async def rows(self, table: str, series: Sequence[int], after: int, first: int, end: int) -> list[Row]:
        """Of these series, in this order, what stands from `first` up to `end`; of the first one, after `after`."""
        return await self._rows(sql.ROWS[table], series, after, first, end)

    async def strays(self, table: str, gaps: Sequence[Gap], after: int, first: int, end: int) -> list[Row]:
        """The same of series ids between series; of the first of them, after `after`."""
        return await self._rows(sql.STRAYS[table], [gap.first for gap in gaps], after, first, end, gaps)

    async def _rows(
        self, query: str, series: Sequence[int], after: int, first: int, end: int, gaps: Sequence[Gap] = ()
    ) -> list[Row]:
        lasts = [[gap.last for gap in gaps]] if gaps else []
        async with self._snapshot() as connection:
            rows = await connection.fetch(query, series, after, first, end, ROWS_AT_ONCE, *self._seen_before, *lasts)
        return [Row(*row) for row in rows]

    async def look_up(self, table: str, keys: Iterable[tuple[int, int]]) -> dict[bytes, bytes]:
        """What stands at these series and times. By weeks, so that few chunks are looked into."""
        weeks: dict[int, list[tuple[int, int]]] = {}
        for series_id, ts in keys:
            weeks.setdefault(ts // _WEEK_US, []).append((series_id, ts))
        found: dict[bytes, bytes] = {}
        async with self._snapshot() as connection:
            for week, places in sorted(weeks.items()):
                span = max(NEVER, week * _WEEK_US), min(ALWAYS, (week + 1) * _WEEK_US)
                ids, times = ([*column] for column in zip(*places, strict=True))
                found.update(map(tuple, await connection.fetch(sql.LOOK_UP[table], ids, times, *span)))
        return found

    async def notes(self, table: str, notes: Sequence[NoteRow]) -> dict[int, bool]:
        """Which of these, by number, do not stand as they are told: whether another stands in their place."""
        async with self._snapshot() as connection:
            return dict(
                await connection.fetch(sql.NOTES[table], *(list(column) for column in zip(*notes, strict=True)))
            )


@asynccontextmanager
async def open_store(settings: PostgresSettings, source: UUID) -> AsyncIterator[Store]:
    """Raises `UnavailableError`, `ConfigurationError`."""
    connection: Any = await connect(settings, role=ROLE, application="sluice verify", **_SESSION)
    try:
        await check_role(connection)
        await connection.set_type_codec(
            "timestamptz", schema="pg_catalog", format="tuple", encoder=lambda us: (us,), decoder=lambda row: row[0]
        )
        yield Store(connection, source)
    finally:
        try:
            await connection.close(timeout=5)
        except (*UNAVAILABLE, asyncpg.PostgresError):
            connection.terminate()


def _uuids(raw: Iterable[bytes]) -> list[UUID]:
    return [UUID(bytes=one) for one in raw]


def _place_columns(places: Sequence[Place]) -> tuple[list[Any], ...]:
    return (
        _uuids(place.spool for place in places),
        [place.partition for place in places],
        [place.position for place in places],
    )


def _name_columns(named: Sequence[tuple[bytes, Idempotency, int]]) -> tuple[list[Any], ...]:
    return (
        _uuids(device for device, _, _ in named),
        [name.key for _, name, _ in named],
        [name.scope for _, name, _ in named],
        [received_at for _, _, received_at in named],
    )
