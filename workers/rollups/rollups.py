"""Roll-ups beside landing: one worker closes and computes buckets, one repairs marked ones, the others stand by."""

import asyncio
import logging

from runtime.clock import Clock
from runtime.log.port import Log
from runtime.postgres import PostgresSettings
from workers.rollups.closing import Closer
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.repairing import Repairer
from workers.rollups.settings import RollupsSettings
from workers.upkeep import repeat

_log = logging.getLogger("sluice.rollups")


class Rollups:
    """One worker's part. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self, postgres: PostgresSettings, settings: RollupsSettings, log: Log, clock: Clock, metrics: RollupsMetrics
    ) -> None:
        self._settings = settings
        self._closer = Closer(postgres, settings, log, clock, metrics)
        self._repairer = Repairer(postgres, settings, metrics)

    @property
    def doing(self) -> str | None:
        """What an operator should know."""
        return self._closer.trouble

    async def run(self) -> None:
        """Look every now and then, for ever. A long way to catch up does not keep marks waiting."""
        settings = self._settings
        async with asyncio.TaskGroup() as group:
            closing = repeat(self._closer.keep, settings.rollups_close_s, _log, "roll-ups could not be computed")
            repairing = repeat(self._repairer.keep, settings.rollups_repair_s, _log, "roll-ups could not be repaired")
            group.create_task(closing, name="rollups closing")
            group.create_task(repairing, name="rollups repair")
