"""Series, organisations and partitions of the tables: what must stand committed before a batch can land.

On a connection of its own, so that the next batch is prepared while one is being written. Left out: what a refusal
means for readings (`plan`).
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from runtime.clock import Clock
from runtime.postgres import PostgresSettings, connect, transaction
from workers.landing.late import Answers, Named, Question
from workers.landing.plan import Limits, Plan
from workers.landing.series import Found, Refusal, SeriesName
from workers.metrics import LandingMetrics
from workers.settings import LandingSettings

_DAY_US: Final = 86_400_000_000
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

_WEEKS_MAX: Final = 52 * 300

# The index of names holds rows of up to 2,704 bytes.
_NAME_BYTES_MAX: Final = 2_000

_UNKNOWN_DEVICE: Final = Refusal("unknown_device", "the device is not, or no longer, one of the organisation's")

_FIND: Final = """
SELECT k.number - 1 AS number, s.series_id, s.unit
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[]) WITH ORDINALITY
    AS k (organisation_id, device_id, metric, label, number)
JOIN series s ON s.device_id = k.device_id AND s.metric = k.metric AND s.label = k.label
    AND (s.organisation_id = k.organisation_id OR EXISTS (
        SELECT FROM former_owners f WHERE f.device_id = k.device_id AND f.organisation_id = k.organisation_id))"""

# The first unit that is reported is the series' unit, also where readings without any came before it.
_ADOPT: Final = """
UPDATE series s SET unit = k.unit
FROM unnest($1::int[], $2::text[]) AS k (series_id, unit)
WHERE s.series_id = k.series_id AND s.unit = ''"""

# Held until their series are made: nobody erases them meanwhile.
_DEVICES: Final = """
SELECT d.device_id, d.organisation_id, (SELECT count(*) FROM series s WHERE s.device_id = d.device_id) AS series,
       ARRAY(SELECT f.organisation_id FROM former_owners f WHERE f.device_id = d.device_id) AS former
FROM devices d WHERE d.device_id = ANY ($1::uuid[]) ORDER BY d.device_id FOR KEY SHARE"""

# In a fixed order, so that two workers that make the same series wait for each other and nothing worse.
_MAKE: Final = """
INSERT INTO series (organisation_id, device_id, metric, label, unit)
SELECT organisation_id, device_id, metric, label, unit
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[])
    AS k (organisation_id, device_id, metric, label, unit)
ORDER BY device_id, metric, label
ON CONFLICT (device_id, metric, label) DO NOTHING
RETURNING series_id, device_id, metric, label, unit"""

_LIMITS: Final = """
SELECT organisation_id, raw_retention_days, series_max
FROM organisations WHERE organisation_id = ANY ($1::uuid[])"""

# Until the end of the transaction, so that no two workers fill an organisation's last place. In a fixed order.
_LOCK: Final = """
SELECT pg_advisory_xact_lock(name)
FROM (SELECT DISTINCT hashtextextended('sluice series ' || o, 0) AS name FROM unnest($1::uuid[]) AS o ORDER BY 1) n"""

_COUNT: Final = """
SELECT count(*) AS series, coalesce(max(series_id), $2) AS through
FROM series WHERE organisation_id = $1 AND series_id > $2"""

# Each use of a name within the time that any copy can still arrive is a row.
_NAMED: Final = """
SELECT i.scope, i.device_id, i.key, i.fingerprint, i.received_at
FROM (SELECT DISTINCT * FROM unnest($1::uuid[], $2::bytea[], $3::bytea[])) AS k (device_id, key, scope)
JOIN idempotency_keys i ON i.device_id = k.device_id AND i.key = k.key AND i.scope = k.scope"""

_REPLAYING: Final = """
SELECT quarantine_id, replay_id FROM quarantine
WHERE quarantine_id = ANY ($1::uuid[]) AND state = 'replaying' AND replay_id IS NOT NULL"""

_HYPERTABLES: Final = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"

# Without this a join may read a whole chunk to find a few rows.
_PLANNER: Final = {"enable_hashjoin": "off", "enable_mergejoin": "off", "plan_cache_mode": "force_custom_plan"}

_Identity = tuple[UUID, str, str]


class Registry:
    """Looks up and makes what a plan needs. Every call may raise what the database raises; all may be repeated."""

    def __init__(
        self, postgres: PostgresSettings, settings: LandingSettings, clock: Clock, metrics: LandingMetrics
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._connection: Any = None
        self.limits: dict[bytes, Limits] = {}
        self._limits_until = 0.0
        self._series_counts: dict[bytes, _Count] = {}
        self._weeks: set[int] = set()
        self._hypertables: bool | None = None

    async def close(self) -> None:
        """Let go of the connection and of what was known of partitions; the next call finds out again."""
        self._weeks.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def interrupt(self) -> None:
        """Cut the connection under whoever waits for an answer on it."""
        if self._connection is not None:
            self._connection.terminate()

    async def refresh(self) -> None:
        """Read the limits of every organisation in use again, when their time has come."""
        if self._clock.monotonic() >= self._limits_until:
            self._series_counts.clear()
            self._weeks.clear()  # retention drops those that nobody keeps
            await self.learn(list(self.limits))
            self._limits_until = self._clock.monotonic() + self._settings.landing_registry_refresh_s

    async def learn(self, organisations: Iterable[bytes]) -> None:
        """Read the limits of these organisations; of one that does not exist nothing will land."""
        wanted = {UUID(bytes=organisation) for organisation in organisations}
        if not wanted:
            return
        connection = await self._connected()
        for row in await connection.fetch(_LIMITS, wanted):
            found = Limits(row["raw_retention_days"] * _DAY_US, row["series_max"])
            self.limits[row["organisation_id"].bytes] = found
            wanted.discard(row["organisation_id"])
        self.limits.update(dict.fromkeys((missing.bytes for missing in wanted), Limits(0, 0)))

    async def resolve(self, names: Sequence[SeriesName]) -> list[Found | Refusal]:
        """For each name its series, made and committed where it is missing, or why there will be none."""
        results: list[Found | Refusal | None] = [_unstorable(name) for name in names]
        await self._find(names, results)
        missing = [number for number, result in enumerate(results) if result is None]
        if missing:
            await self._make(names, missing, results)
            # What is missing still was made meanwhile, by another worker or under an earlier name of this call.
            await self._find(names, results)
        return [result if result is not None else _UNKNOWN_DEVICE for result in results]

    async def answer(self, questions: Sequence[Question]) -> Answers:
        """What has landed of the names and replays that these records come with."""
        connection = await self._connected()
        named: dict[bytes, list[Named]] = {}
        keys = [(q.record, q.record.idempotency) for q in questions if q.record.idempotency is not None]
        if keys:
            columns = zip(*((UUID(bytes=r.device), name.key, name.scope) for r, name in keys), strict=True)
            for row in await connection.fetch(_NAMED, *map(list, columns)):
                name = row["scope"] + row["device_id"].bytes + row["key"]
                received_at = round((row["received_at"] - _EPOCH) / _MICROSECOND)
                named.setdefault(name, []).append(Named(received_at, row["fingerprint"]))
        replays = [UUID(bytes=question.record.replays) for question in questions if question.record.replays]
        rows = await connection.fetch(_REPLAYING, replays) if replays else []
        return Answers(named, {row["quarantine_id"].bytes: row["replay_id"].bytes for row in rows})

    async def ensure_weeks(self, weeks: Iterable[int]) -> None:
        """Make the tables' partitions for these weeks since the epoch of record times, where they are missing.

        Of a time beyond all calendars none is made: the database will refuse its reading.
        """
        for week in sorted(set(weeks) - self._weeks):
            if abs(week) > _WEEKS_MAX:
                continue
            connection = await self._connected()
            await connection.execute("SELECT ensure_week($1)", _EPOCH + timedelta(weeks=week, days=2))
            self._weeks.add(week)

    async def has_hypertables(self) -> bool:
        """Whether the database makes partitions by itself."""
        if self._hypertables is None:
            connection = await self._connected()
            self._hypertables = bool(await connection.fetchval(_HYPERTABLES))
        return self._hypertables

    async def _connected(self) -> Any:
        if self._connection is None or self._connection.is_closed():
            settings = self._settings
            seconds = {
                "lock_timeout": settings.landing_lock_timeout_s,
                "idle_in_transaction_session_timeout": settings.landing_idle_timeout_s,
            }
            limits = {name: f"{round(value * 1000)}ms" for name, value in seconds.items()}
            self._connection = await connect(
                self._postgres, role="sluice_worker", application="sluice landing registry", **_PLANNER, **limits
            )
        return self._connection

    async def _find(self, names: Sequence[SeriesName], results: list[Found | Refusal | None]) -> None:
        """Fill in the series that stand in the database."""
        wanted = [number for number, result in enumerate(results) if result is None]
        if not wanted:
            return
        connection = await self._connected()
        columns = _columns([names[number] for number in wanted])
        rows = await connection.fetch(_FIND, *columns[:4])
        adopting: dict[int, str] = {}
        for row in rows:
            unit = names[wanted[row["number"]]].unit
            if unit and not row["unit"]:
                adopting.setdefault(row["series_id"], unit)
        if adopting:
            await connection.execute(_ADOPT, [*adopting], [*adopting.values()])
            rows = await connection.fetch(_FIND, *columns[:4])
        for row in rows:
            number = wanted[row["number"]]
            results[number] = _fitting(names[number], Found(row["series_id"], False, row["unit"]))

    async def _make(
        self, names: Sequence[SeriesName], missing: list[int], results: list[Found | Refusal | None]
    ) -> None:
        """Make what may be made, the first of each name; the others find it later."""
        organisations = {names[number].organisation for number in missing}
        await self.learn(organisations - self.limits.keys())
        connection = await self._connected()
        async with transaction(connection):
            await connection.execute(_LOCK, [UUID(bytes=organisation) for organisation in organisations])
            counts = await self._count(organisations)
            rooms = await self._rooms({names[number].device for number in missing})
            first_of: dict[_Identity, int] = {}
            for number in missing:
                name = names[number]
                if (identity := _identity(name)) not in first_of:
                    refusal = self._enter(rooms.get(name.device), counts, name)
                    if refusal is not None:
                        results[number] = refusal
                    else:
                        first_of[identity] = number
            # What a former owner sent for a device is the device's, whose-ever that is by now.
            making = [
                names[number]._replace(organisation=rooms[names[number].device].organisation)
                for number in first_of.values()
            ]
            made = await connection.fetch(_MAKE, *_columns(making)) if making else []
        for row in made:
            found = Found(row["series_id"], True, row["unit"])
            results[first_of[row["device_id"], row["metric"], row["label"]]] = found
        self._metrics.series_created.inc(len(made))

    async def _rooms(self, devices: set[bytes]) -> dict[bytes, "_Room"]:
        connection = await self._connected()
        rows = await connection.fetch(_DEVICES, [UUID(bytes=device) for device in devices])
        return {
            row["device_id"].bytes: _Room(
                row["organisation_id"].bytes, row["series"], {former.bytes for former in row["former"]}
            )
            for row in rows
        }

    def _enter(self, room: "_Room | None", counts: dict[bytes, int], name: SeriesName) -> Refusal | None:
        """Count one more series of a device and its organisation, or say why not."""
        if room is None or (room.organisation != name.organisation and name.organisation not in room.former):
            return _UNKNOWN_DEVICE
        device_max = self._settings.landing_series_per_device_max
        if room.series >= device_max:
            return Refusal("series_limit", f"the device has {room.series} series, of {device_max} at most")
        count, most = counts[name.organisation], self.limits[name.organisation].series_max
        if count >= most:
            return Refusal("series_limit", f"the organisation has {count} series, of {most} at most")
        room.series += 1
        counts[name.organisation] += 1
        return None

    async def _count(self, organisations: set[bytes]) -> dict[bytes, int]:
        """How many series organisations have, under their lock.

        Only those made since the last look are counted, for ids ascend in an organisation; all with each refresh.
        """
        connection = await self._connected()
        for organisation in organisations:
            known = self._series_counts.get(organisation, _Count(0, 0))
            row = await connection.fetchrow(_COUNT, UUID(bytes=organisation), known.through)
            self._series_counts[organisation] = _Count(known.series + row["series"], row["through"])
        return {organisation: self._series_counts[organisation].series for organisation in organisations}


class _Count(NamedTuple):
    """How many series with ids up to `through` an organisation has."""

    series: int
    through: int


class _Room:
    """A device as it stands, and how many series it has with those about to be made."""

    __slots__ = ("former", "organisation", "series")

    def __init__(self, organisation: bytes, series: int, former: Collection[bytes]) -> None:
        self.organisation = organisation
        self.series = series
        self.former = former
        """Whose it was before."""


async def settle(plan: Plan, registry: Registry, refusals_until: float) -> None:
    """Look up whatever `plan` waits for, and make the tables' partitions that it needs."""
    while not plan.is_settled:
        await registry.learn(plan.unknown_organisations)
        names: dict[bytes, SeriesName] = {}
        for part in plan.parts.values():
            names |= part.unknown
        found = await registry.resolve(list(names.values())) if names else []
        plan.settle(dict(zip(names, found, strict=True)), refusals_until)
        if plan.late.questions:
            plan.answer(await registry.answer(plan.late.questions))
    if not await registry.has_hypertables():
        await registry.ensure_weeks(plan.weeks())


def _identity(name: SeriesName) -> _Identity:
    return UUID(bytes=name.device), name.metric, name.label


def _columns(names: Sequence[SeriesName]) -> tuple[list[Any], ...]:
    """Organisations, devices, metrics, labels, units."""
    return (
        [UUID(bytes=name.organisation) for name in names],
        [UUID(bytes=name.device) for name in names],
        [name.metric for name in names],
        [name.label for name in names],
        [name.unit for name in names],
    )


def _fitting(name: SeriesName, found: Found) -> Found | Refusal:
    """A reading without a unit is in the series' own."""
    if name.unit in ("", found.unit):
        return found
    return Refusal("unit_mismatch", f"the series is kept in {found.unit!r}, the reading came in {name.unit!r}")


def _unstorable(name: SeriesName) -> Refusal | None:
    text = name.metric + name.label + name.unit
    if "\0" in text or len(text.encode()) > _NAME_BYTES_MAX:
        return Refusal("rejected_by_store", f"a name with a NUL character or of more than {_NAME_BYTES_MAX} bytes")
    return None
