"""Which devices are there, as they and their broker say by MQTT; what they measure says so too (`workers.presence`).

Only the newest counts of each, so it is written every second or so and acknowledged to the broker at once: what a
crash loses of it is set right by whatever the device says next, or by its silence. What a broker tells again, because
somebody subscribed or was cut off, is no news of the device, and is not passed on to here. Left out: when silence is
one (the schema's `silent_after`).
"""

import asyncio
import logging
from itertools import islice
from typing import Final
from uuid import UUID

import asyncpg

from ingest.mqtt.settings import BridgeSettings
from ingest.registry import Connections, ask
from runtime.errors import UnavailableError
from schemas.record import PG_EPOCH_US

_log = logging.getLogger("sluice.bridge.presence")

_HEARD: Final = "SELECT devices_heard($1::uuid[], $2::bigint[])"
_GONE: Final = "SELECT devices_gone($1::uuid[], $2::bigint[])"
_TIMEOUT_S: Final = 10.0
_ROWS_AT_ONCE: Final = 2_000


class Presence:
    """Of one process. `run` ends by being cancelled and never fails."""

    def __init__(self, pool: Connections, settings: BridgeSettings) -> None:
        self._pool = pool
        self._settings = settings
        self._heard: dict[bytes, int] = {}
        self._gone: dict[bytes, int] = {}
        self._is_away = False

    def hear(self, device: bytes, at_us: int) -> None:
        """It said something. `at_us`: microseconds since 1970."""
        if at_us >= self._gone.get(device, at_us):
            self._gone.pop(device, None)  # what comes together has one time, and its order counts
        self._keep(self._heard, device, at_us)

    def lose(self, device: bytes, at_us: int) -> None:
        """It is gone, says its broker, or it said so itself."""
        self._keep(self._gone, device, at_us)

    def _keep(self, kept: dict[bytes, int], device: bytes, at_us: int) -> None:
        if at_us >= kept.get(device, 0):
            kept[device] = at_us
        while len(kept) > self._settings.mqtt_presence_devices_max:
            del kept[next(iter(kept))]

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.mqtt_presence_flush_s)
            try:
                await self._flush(self._heard, _HEARD)
                await self._flush(self._gone, _GONE)
                self._is_away = False
            except (UnavailableError, asyncpg.PostgresError) as error:
                if not self._is_away:
                    _log.warning("it cannot be written which devices are there", extra={"reason": str(error)})
                self._is_away = True

    async def _flush(self, kept: dict[bytes, int], statement: str) -> None:
        """What is not written stays, unless there is newer."""
        while kept:
            batch = sorted(islice(kept.items(), _ROWS_AT_ONCE))
            for device, _ in batch:
                del kept[device]
            try:
                devices, times = [device for device, _ in batch], [at_us - PG_EPOCH_US for _, at_us in batch]
                await ask(self._pool, statement, _uuids(devices), times, timeout_s=_TIMEOUT_S)
            except BaseException:
                for device, at_us in batch:
                    kept.setdefault(device, at_us)
                raise


def _uuids(devices: list[bytes]) -> list[UUID]:
    return [UUID(bytes=device) for device in devices]
