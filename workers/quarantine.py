"""Keeps the quarantine within bounds: of each organisation so many held rows and for so long, of all others a while.

Of each tray of unassigned devices as well; and what came for one that has been claimed meanwhile is replayed.

What goes for that reason leaves its payload behind and counts as `expired` in the books of the hour it came in. Every
worker tries; whoever has the lock does it, step by step, and lets go in between. Left out: what comes in
(`workers.landing`).
"""

import logging
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from schemas.record import NONCE_SCOPE
from workers.metrics import QuarantineMetrics
from workers.settings import QuarantineSettings
from workers.upkeep import OthersTurn, alone, repeat

_log = logging.getLogger("sluice.quarantine")

ROLE: Final = "sluice_worker"
LOCK: Final = 0x736C_7569_6365_0003

_LOCK: Final = "SELECT pg_try_advisory_xact_lock($1)"
_STANDING: Final = """
SELECT organisation_id, count(*) AS rows, min(received_at) < now() - make_interval(days => $1) AS is_old
FROM quarantine WHERE state = 'held' GROUP BY organisation_id
"""
_EXPIRE: Final = """
SELECT leave_quarantine(ARRAY(
    SELECT quarantine_id FROM quarantine
    WHERE state = 'held' AND {whose} AND received_at < now() - make_interval(days => $2)
    ORDER BY received_at, quarantine_id LIMIT $3 FOR UPDATE SKIP LOCKED), 'expired', $4)
"""
_ITS: Final = _EXPIRE.format(whose="organisation_id = $1")
_NOBODY_S: Final = _EXPIRE.format(whose="$1::uuid IS NULL AND organisation_id IS NULL")
_TRAYS: Final = """
SELECT leave_quarantine(ARRAY(
    SELECT n.quarantine_id FROM (
        SELECT q.quarantine_id, q.received_at,
               row_number() OVER (PARTITION BY u.{whose} ORDER BY q.received_at DESC, q.quarantine_id DESC) AS nth
        FROM quarantine q JOIN unassigned_devices u ON u.unassigned_id = q.device_id
        WHERE q.state = 'held' AND q.code = 'unassigned_device' AND u.device_id IS NULL) n
    WHERE n.nth > $1 OR n.received_at < now() - make_interval(days => $2)
    ORDER BY n.received_at LIMIT $3), 'expired', $4)
"""
_TRAY_OF_DEVICE: Final = _TRAYS.format(whose="unassigned_id")
_TRAY_OF_SITE: Final = _TRAYS.format(whose="site_id")
_FOREVER_DAYS: Final = 365_000
_SETTLE_TRAYS: Final = "SELECT settle_unassigned()"
# Names that nobody has heard for so long, and what is remembered of those that were claimed.
_FORGET_NAMES: Final = """
DELETE FROM unassigned_devices u
WHERE CASE WHEN u.device_id IS NULL THEN u.last_seen_at < now() - make_interval(days => $1) AND NOT EXISTS (
               SELECT FROM quarantine q WHERE q.device_id = u.unassigned_id AND q.state = 'held')
           ELSE u.claimed_at < now() - make_interval(days => $2) END
"""
# What is remembered only for records that may still come, or be read again.
_FORGET: Final = (
    """
DELETE FROM quarantine WHERE quarantine_id IN (
    SELECT quarantine_id FROM quarantine
    WHERE state IN ('released', 'discarded', 'expired') AND changed_at < now() - make_interval(days => $1)
    ORDER BY changed_at LIMIT $2 FOR UPDATE SKIP LOCKED)""",
    """
DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM idempotency_keys WHERE received_at < now() - make_interval(days => $1)
    ORDER BY received_at LIMIT $2))""",
    """
DELETE FROM moved_readings WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM moved_readings WHERE landed_at < now() - make_interval(days => $1)
    ORDER BY landed_at LIMIT $2))""",
    """
DELETE FROM outcomes WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM outcomes WHERE landed_at < now() - make_interval(days => $1)
    ORDER BY landed_at LIMIT $2))""",
    """
DELETE FROM mqtt_deliveries WHERE ctid = ANY (ARRAY(
    SELECT d.ctid FROM mqtt_deliveries d WHERE d.landed_at < now() - make_interval(days => $1)
      AND NOT EXISTS (SELECT FROM mqtt_slots s WHERE s.session = d.session)
    ORDER BY d.landed_at LIMIT $2))""",
    # Of a spool that ended, and of which nothing landed since: without its row, a copy would land as if it were new.
    """
DELETE FROM spool_positions WHERE ctid = ANY (ARRAY(
    SELECT s.ctid FROM spool_ends e JOIN spool_positions s USING (spool)
    WHERE e.ended_at < now() - make_interval(days => $1) AND s.updated_at < now() - make_interval(days => $1)
    LIMIT $2))""",
    """
DELETE FROM spool_ends WHERE spool = ANY (ARRAY(
    SELECT spool FROM spool_ends e WHERE e.ended_at < now() - make_interval(days => $1)
    AND NOT EXISTS (SELECT FROM spool_positions s WHERE s.spool = e.spool) ORDER BY ended_at LIMIT $2))""",
)
# Once landing of their partition is past them by so much, in receive times: no copy from within that time can come.
# `scope` is spelt out, so that the index of nonces is taken.
_FORGET_NONCES: Final = f"""
DELETE FROM idempotency_keys WHERE ctid = ANY (ARRAY(
    SELECT i.ctid FROM idempotency_keys i
    JOIN log_positions p ON p.source = i.source AND p.partition = i.partition
    WHERE i.scope = '\\x{NONCE_SCOPE.hex()}' AND i.received_at < p.received_through - make_interval(secs => $1)
    ORDER BY i.received_at LIMIT $2))"""  # noqa: S608 - a constant


class Bounds:
    """One worker's part. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: QuarantineSettings,
        metrics: QuarantineMetrics,
        *,
        nonce_memory_s: float,
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._nonce_memory_s = nonce_memory_s
        self._metrics = metrics

    async def run(self) -> None:
        """Look every now and then, for ever."""
        await repeat(self.keep, self._settings.quarantine_check_s, _log, "the quarantine's bounds could not be kept")

    async def keep(self) -> None:
        """Once through everything, unless another worker is at it. Raises what the database raises."""
        connection = await connect(self._postgres, role=ROLE, application="sluice quarantine")
        try:
            async with alone(connection, _LOCK, LOCK):
                standing = await connection.fetch(_STANDING, self._settings.quarantine_held_days_max)
            self._metrics.held.set(sum(row["rows"] for row in standing))
            await self._expire_old(connection, [row["organisation_id"] for row in standing if row["is_old"]])
            await self._expire_excess(connection, {row["organisation_id"]: row["rows"] for row in standing})
            await self._keep_trays(connection)
            await self._forget(connection)
        except OthersTurn:
            pass
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()

    async def _expire_old(self, connection: Any, organisations: list[UUID | None]) -> None:
        settings = self._settings
        days, step = settings.quarantine_held_days_max, settings.quarantine_step_rows
        note = f"held for {days} days: SLUICE_QUARANTINE_HELD_DAYS_MAX"
        while organisations:
            gone = [await self._expire(connection, one, days, step, note) for one in organisations]
            organisations = [one for one, count in zip(organisations, gone, strict=True) if count == step]

    async def _expire_excess(self, connection: Any, held: dict[UUID | None, int]) -> None:
        """The oldest of each organisation that has too many, a step of each in turn."""
        settings = self._settings
        most, step = settings.quarantine_held_rows_max, settings.quarantine_step_rows
        note = f"{most} newer ones are held: SLUICE_QUARANTINE_HELD_ROWS_MAX"
        excess = {one: rows - most for one, rows in held.items() if rows > most}
        while excess:
            for organisation, rows in list(excess.items()):
                asked = min(step, rows)
                gone = await self._expire(connection, organisation, 0, asked, note)
                excess[organisation] -= gone
                if gone < asked or not excess[organisation]:
                    del excess[organisation]

    async def _expire(self, connection: Any, organisation: UUID | None, days: int, rows: int, note: str) -> int:
        statement = _NOBODY_S if organisation is None else _ITS
        async with alone(connection, _LOCK, LOCK):
            gone: int = await connection.fetchval(statement, organisation, days, rows, note)
        self._metrics.expired.inc(gone)
        return gone

    async def _keep_trays(self, connection: Any) -> None:
        settings = self._settings
        rows, site_rows, days = settings.tray_held_rows_max, settings.tray_site_rows_max, settings.tray_held_days_max
        for statement, most, kept_days, note in (
            (_TRAY_OF_DEVICE, rows, _FOREVER_DAYS, f"{rows} newer ones are held: SLUICE_TRAY_HELD_ROWS_MAX"),
            (_TRAY_OF_SITE, site_rows, _FOREVER_DAYS, f"its site holds {site_rows}: SLUICE_TRAY_SITE_ROWS_MAX"),
            (_TRAY_OF_SITE, 2**62, days, f"nobody claimed it for {days} days: SLUICE_TRAY_HELD_DAYS_MAX"),
        ):
            gone = settings.quarantine_step_rows
            while gone == settings.quarantine_step_rows:
                async with alone(connection, _LOCK, LOCK):
                    gone = await connection.fetchval(statement, most, kept_days, settings.quarantine_step_rows, note)
                self._metrics.expired.inc(gone)
        async with alone(connection, _LOCK, LOCK):
            await connection.execute(_SETTLE_TRAYS)
            await connection.execute(_FORGET_NAMES, days, settings.books_memory_days)

    async def _forget(self, connection: Any) -> None:
        """Rows that say what became of a reading whose record the log does not hold any more."""
        days, step = self._settings.books_memory_days, self._settings.quarantine_step_rows
        for statement, age in ((_FORGET_NONCES, self._nonce_memory_s), *((one, days) for one in _FORGET)):
            deleted = step
            while deleted == step:
                async with alone(connection, _LOCK, LOCK):
                    status = await connection.execute(statement, age, step)
                deleted = int(status.rpartition(" ")[2])
