"""Metrics that every role has: which of its health checks fail, what it notes, and how wide its log is.

Left out: the checks themselves, which their parts register, and what a role does, which it counts itself.
"""

import asyncio
from collections.abc import Iterable
from typing import Final

from prometheus_client import Gauge

from runtime.health import Health

_EVERY_S: Final = 1.0

NOT_READY: Final = Gauge(
    "sluice_not_ready",
    "Processes of this role that are not ready for this reason: a name of /health/ready (database, log, landing, …).",
    ["check"],
    multiprocess_mode="livesum",
)
NOTED: Final = Gauge(
    "sluice_noted",
    "Processes of this role that are ready and note something (credentials, spool, paced), as in /health/ready.",
    ["note"],
    multiprocess_mode="livesum",
)
LOG_PARTITIONS: Final = Gauge("sluice_log_partitions", "Partitions of the log in use.", multiprocess_mode="livemax")


class HealthMetrics:
    """One process's health, told once a second. Its owner runs `run` and cancels it."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._told: dict[Gauge, set[str]] = {NOT_READY: set(), NOTED: set()}

    async def run(self) -> None:
        while True:
            self.publish()
            await asyncio.sleep(_EVERY_S)

    def publish(self) -> None:
        self._tell(NOT_READY, self._health.not_ready())
        self._tell(NOTED, self._health.notes())

    def _tell(self, gauge: Gauge, names: Iterable[str]) -> None:
        standing = set(names)
        # One that stood once stays, as 0: a series that ends cannot be told from a process that is gone.
        self._told[gauge] |= standing
        for name in self._told[gauge]:
            gauge.labels(name).set(name in standing)
