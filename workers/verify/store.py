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

from runtime.errors import UnavailableError
from runtime.postgres import UNAVAILABLE, PostgresSettings, check_role, connect
from schemas.record import Idempotency
from workers.landing.quarantine import Place
from workers.verify.tally import HOUR_US, Booked, Group

ROLE: Final = "sluice_worker"
ROWS_AT_ONCE: Final = 20_000
SERIES_AT_ONCE: Final = 500

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

_SOURCE: Final = """
SELECT created_at, NOT EXISTS (SELECT FROM log_generations o WHERE o.source <> g.source) AS is_first,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS transactions, now() AS now
FROM log_generations g WHERE source = $1"""
_POSITIONS: Final = """
SELECT partition, greatest(position, landed_until) AS position FROM log_positions WHERE source = $1"""
_LOSSES: Final = """
SELECT source, partition, first_position, end_position, noticed_at FROM log_losses
WHERE noticed_at >= $1 AND noticed_at < $2 ORDER BY noticed_at LIMIT 10000"""
_LEDGER: Final = """
SELECT organisation_id, hour, source, partition, received, stored, duplicates, conflicts, quarantined FROM ledger
WHERE hour >= $1 AND hour < $2 AND ($3::uuid IS NULL OR organisation_id = $3)"""

_OUTCOMES: Final = """
SELECT source, partition, position, unreadable, duplicates, conflicts + quarantined AS set_aside, refused
FROM outcomes WHERE source = $1 AND partition = $2 AND position >= $3 AND position < $4"""
_SPOOLED_OUTCOMES: Final = """
SELECT source, partition, position, unreadable, duplicates, conflicts + quarantined AS set_aside, refused
FROM outcomes JOIN unnest($1::uuid[], $2::int[], $3::bigint[]) AS n (source, partition, position)
    USING (source, partition, position)"""
_QUARANTINE: Final = """
SELECT source, partition, position, item, code, state
FROM quarantine WHERE source = $1 AND partition = $2 AND position >= $3 AND position < $4"""
_SPOOLED_QUARANTINE: Final = """
SELECT source, partition, position, item, code, state
FROM quarantine JOIN unnest($1::uuid[], $2::int[], $3::bigint[]) AS n (source, partition, position)
    USING (source, partition, position)"""
_MOVED: Final = "SELECT record_id, item, ts FROM moved_readings WHERE record_id = ANY ($1::uuid[])"
_REPLAYS: Final = "SELECT quarantine_id, state, replay_id FROM quarantine WHERE quarantine_id = ANY ($1::uuid[])"

_NAMED: Final = """
SELECT n.source, n.partition, n.position
FROM unnest($1::uuid[], $2::bytea[], $3::bytea[], $4::timestamptz[]) AS k (device_id, key, scope, received_at)
JOIN idempotency_keys n USING (device_id, key, scope, received_at)"""

_FIND: Final = """
SELECT k.number - 1 AS number, s.series_id
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[]) WITH ORDINALITY
    AS k (organisation_id, device_id, metric, label, number)
JOIN series s ON s.device_id = k.device_id AND s.metric = k.metric AND s.label = k.label
    AND s.organisation_id = k.organisation_id"""
_SERIES: Final = """
SELECT s.series_id, s.organisation_id, s.device_id, s.metric, s.label, o.raw_retention_days
FROM series s JOIN organisations o USING (organisation_id)
WHERE s.series_id > $1 AND ($2::uuid IS NULL OR s.organisation_id = $2) ORDER BY s.series_id LIMIT $3"""

# In the byte order of claims: times with their sign bit turned round.
_KEY: Final = (
    """set_byte(int4send(r.series_id) || timestamptz_send(r.ts), 4, get_byte(timestamptz_send(r.ts), 0) # 128)"""
)
_VALUES: Final = {"readings": "float8send(r.value)", "text_readings": "convert_to(r.value, 'UTF8')"}
# xmin has 32 bits: how far a row's transaction lies before those of the first snapshot, on the circle of them.
_SEEN: Final = "(($6::bigint - r.xmin::text::bigint) & 4294967295) BETWEEN 1 AND 2147483647"
# Series by series, each in the order of its index: nothing is sorted, and LIMIT ends it where it stands.
_ROWS: Final = """
SELECT r.key, r.value, r.seen
FROM unnest($1::int[]) WITH ORDINALITY AS s (series_id, nth) CROSS JOIN LATERAL (
    SELECT {key} AS key, {value} AS value, {seen} AS seen FROM {table} r
    WHERE r.series_id = s.series_id AND r.ts >= $3 AND r.ts < $4 AND (s.nth > 1 OR r.ts > $2)
    ORDER BY r.ts LIMIT $5) r
LIMIT $5"""
_LOOK_UP: Final = """
SELECT {key} AS key, {value} AS value
FROM unnest($1::int[], $2::timestamptz[]) AS k (series_id, ts)
JOIN {table} r ON r.series_id = k.series_id AND r.ts = k.ts
WHERE r.ts >= $3 AND r.ts < $4"""

NEVER: Final = -(2**63)
ALWAYS: Final = 2**63 - 1


@dataclass
class Start:
    """Where everything stood when the verification began."""

    is_first: bool
    """No other generation of the log may have brought readings."""
    created_at: int
    transactions: int
    """Every transaction whose rows the first snapshot sees has a smaller number."""
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
    set_aside: int
    refused: int


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


class SeriesRow(NamedTuple):
    series_id: int
    organisation: UUID
    device: UUID
    metric: str
    label: str
    retention_days: int


class Row(NamedTuple):
    """A stored reading: its key and value as claims have them; `seen`: the first snapshot saw it."""

    key: bytes
    value: bytes
    seen: bool


class Store:
    """One session. Every call raises `UnavailableError` when the database is away."""

    def __init__(self, connection: Any, source: UUID) -> None:
        self._connection = connection
        self._source = source
        self._transactions = 0

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Any]:
        try:
            async with self._connection.transaction(isolation="repeatable_read", readonly=True):
                yield self._connection
        except UNAVAILABLE as error:
            raise UnavailableError(f"the database is away: {error}") from error

    # ------------------------------------------------------------ the beginning

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Start]:
        """Positions, and as long as the block lasts, the ledger of the very same moment."""
        async with self._snapshot() as connection:
            row = await connection.fetchrow(_SOURCE, self._source)
            start = Start(row["is_first"], row["created_at"], row["transactions"], row["now"])
            rows = await connection.fetch(_POSITIONS, self._source)
            start.positions = {row["partition"]: row["position"] for row in rows}
            self._transactions = start.transactions
            yield start

    async def ledger(self, first: int, end: int, organisation: UUID | None) -> AsyncIterator[tuple[Group, Booked]]:
        """Within `begin`: its rows of the hours from `first` up to `end`."""
        cursor = await self._connection.cursor(_LEDGER, first, end, organisation)
        while rows := await cursor.fetch(_LEDGER_AT_ONCE):
            for owner, hour, source, partition, *counts in rows:
                yield Group(owner.bytes, hour // HOUR_US, source.bytes, partition), Booked(*counts)

    async def losses(self, first: int, end: int) -> list[Loss]:
        """Within `begin`: those noticed from `first` up to `end`."""
        return [Loss(*row) for row in await self._connection.fetch(_LOSSES, first, end)]

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
            outcomes = await connection.fetch(_OUTCOMES, *span)
            quarantine = await connection.fetch(_QUARANTINE, *span)
            if asked.spooled:
                columns = _place_columns(asked.spooled)
                outcomes += await connection.fetch(_SPOOLED_OUTCOMES, *columns)
                quarantine += await connection.fetch(_SPOOLED_QUARANTINE, *columns)
            moved = await connection.fetch(_MOVED, _uuids(asked.made_up)) if asked.made_up else []
            released = await connection.fetch(_REPLAYS, _uuids(asked.replays)) if asked.replays else []
            named = await connection.fetch(_NAMED, *_name_columns(asked.named)) if asked.named else []
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
            for number, series_id in await connection.fetch(_FIND, *columns):
                found[asked[number]] = series_id
        return found

    # ------------------------------------------------------------ of rows

    async def series(self, after: int, organisation: UUID | None) -> list[SeriesRow]:
        """The next series by id."""
        async with self._snapshot() as connection:
            return [SeriesRow(*row) for row in await connection.fetch(_SERIES, after, organisation, SERIES_AT_ONCE)]

    async def rows(self, table: str, series: Sequence[int], after: int, first: int, end: int) -> list[Row]:
        """Of these series, in this order, what stands from `first` up to `end`; of the first one, after `after`."""
        query = _ROWS.format(table=table, key=_KEY, value=_VALUES[table], seen=_SEEN)
        async with self._snapshot() as connection:
            rows = await connection.fetch(query, series, after, first, end, ROWS_AT_ONCE, self._transactions)
        return [Row(*row) for row in rows]

    async def look_up(self, table: str, keys: Iterable[tuple[int, int]]) -> dict[bytes, bytes]:
        """The values that stand at these series and times. By weeks, so that few chunks are looked into."""
        query = _LOOK_UP.format(table=table, key=_KEY, value=_VALUES[table])
        weeks: dict[int, list[tuple[int, int]]] = {}
        for series_id, ts in keys:
            weeks.setdefault(ts // _WEEK_US, []).append((series_id, ts))
        found: dict[bytes, bytes] = {}
        async with self._snapshot() as connection:
            for week, places in sorted(weeks.items()):
                span = max(NEVER, week * _WEEK_US), min(ALWAYS, (week + 1) * _WEEK_US)
                ids, times = ([*column] for column in zip(*places, strict=True))
                found.update(map(tuple, await connection.fetch(query, ids, times, *span)))
        return found


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
