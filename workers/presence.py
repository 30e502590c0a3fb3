"""Which devices are heard: when last, how far apart as a rule, and who has fallen silent.

A worker notes whom the batches it commits are from, in memory, and writes every few seconds what is new: who was
silent before at once, who goes on sending every quarter of a minute. How far apart a device is heard is estimated
from what is written: what comes together counts once, a long gap at once but never more than fourfold, a short one
slowly, so that a burst within a rare sender's hour and an outage of a frequent one both pass. Beside it, moves that
have come due are settled, and what is kept for a while is deleted: answers to repeated requests of the API, packages
of plants that were provisioned, secrets that were rotated, passwords that no broker was brought. Several workers may
do all of it at once.
Left out: what silence means to anybody.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from workers.settings import PresenceSettings
from workers.upkeep import repeat

_log = logging.getLogger("sluice.presence")

ROLE: Final = "sluice_worker"

_HEAR: Final = "SELECT devices_heard($1::uuid[], $2::bigint[])"
_FALL_SILENT: Final = """
UPDATE devices d SET online = silent_after(d.last_seen_at, d.cadence_s) > now(),
    online_until = silent_after(d.last_seen_at, d.cadence_s),
    online_changed_at = CASE WHEN silent_after(d.last_seen_at, d.cadence_s) > now() THEN d.online_changed_at
                             ELSE silent_after(d.last_seen_at, d.cadence_s) END
FROM (SELECT device_id FROM devices WHERE online AND online_until <= now() ORDER BY online_until LIMIT $1
      FOR NO KEY UPDATE SKIP LOCKED) due
WHERE d.device_id = due.device_id
"""
_SETTLE: Final = """
SELECT settle_device(device_id) FROM (
    SELECT device_id FROM devices WHERE site_until <= now() ORDER BY site_until LIMIT $1
    FOR NO KEY UPDATE SKIP LOCKED) due
"""
_FORGET: Final = """
DELETE FROM repeats WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM repeats WHERE made_at < now() - interval '24 hours' ORDER BY made_at LIMIT $1))
"""
_FORGET_PACKAGES: Final = """
DELETE FROM plant_packages WHERE device_id = ANY (ARRAY(
    SELECT device_id FROM plant_packages WHERE expires_at <= now() ORDER BY expires_at LIMIT $1))
"""
_FORGET_HANDOVERS: Final = """
DELETE FROM broker_handovers WHERE subject_id = ANY (ARRAY(
    SELECT subject_id FROM broker_handovers WHERE expires_at <= now() ORDER BY expires_at LIMIT $1))
"""
_FORGET_SECRETS: Final = """
UPDATE plants p SET former_secret = NULL, former_secret_until = NULL
FROM (SELECT device_id FROM plants WHERE former_secret IS NOT NULL AND former_secret_until <= now()
      ORDER BY former_secret_until LIMIT $1 FOR NO KEY UPDATE SKIP LOCKED) due
WHERE p.device_id = due.device_id
"""


class Presence:
    """One worker's part. `run` ends by being cancelled and never fails."""

    def __init__(self, postgres: PostgresSettings, settings: PresenceSettings) -> None:
        self._postgres = postgres
        self._settings = settings
        self._heard: dict[bytes, int] = {}
        self._written: set[bytes] = set()
        """Those that have had a row of late: what they say next can wait for the rest of `presence_steady_s`."""
        self._round = 0

    def hear(self, devices: Mapping[bytes, int]) -> None:
        """A batch is committed: its devices, with the receive time of the newest record of each, in µs since 2000."""
        if not self._heard:
            self._heard = dict(devices)
            return
        heard = self._heard
        for device, received_at in devices.items():
            if received_at > heard.get(device, -1):
                heard[device] = received_at
        while len(heard) > self._settings.presence_devices_max:
            del heard[next(iter(heard))]

    async def run(self) -> None:
        """Write and look every few seconds, for ever."""
        every_s = self._settings.presence_flush_s
        await repeat(self.keep, every_s, _log, "it could not be written which devices are heard")

    async def keep(self) -> None:
        """Once everything. Raises what the database raises; what was not written is written the next time."""
        connection = await connect(self._postgres, role=ROLE, application="sluice presence")
        try:
            await self._flush(connection)
            for statement in (
                _FALL_SILENT, _SETTLE, _FORGET, _FORGET_PACKAGES, _FORGET_HANDOVERS, _FORGET_SECRETS,
            ):  # fmt: skip
                await self._step_through(connection, statement)
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()

    async def _flush(self, connection: Any) -> None:
        heard = self._due()
        step, at = self._settings.presence_step_rows, 0
        try:
            while at < len(heard):
                batch = heard[at : at + step]
                devices, times = [UUID(bytes=device) for device, _ in batch], [time for _, time in batch]
                await connection.execute(_HEAR, devices, times)
                at += step
        except BaseException:
            self.hear(dict(heard[at:]))
            self._written.difference_update(device for device, _ in heard[at:])
            raise

    def _due(self) -> list[tuple[bytes, int]]:
        """Takes whoever is to be written now: everybody every few rounds, and in between who was silent before."""
        settings = self._settings
        if self._round % max(1, round(settings.presence_steady_s / settings.presence_flush_s)) == 0:
            self._written.clear()
        self._round += 1
        due = sorted((device, at) for device, at in self._heard.items() if device not in self._written)
        for device, _ in due:
            del self._heard[device]
            self._written.add(device)
        return due

    async def _step_through(self, connection: Any, statement: str) -> None:
        step = self._settings.presence_step_rows
        done = step
        while done == step:
            done = int((await connection.execute(statement, step)).rpartition(" ")[2])
