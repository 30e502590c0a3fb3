"""Whether the log is about to delete what has not landed: readings are refused in time, rather than lost.

Left out: what is answered then (`ingest.http.service`), and landing itself.
"""

import asyncio
import logging
from typing import Final

from ingest.metrics import IngestMetrics
from ingest.registry import Connections, ask
from runtime.errors import UnavailableError
from runtime.log.port import Log

_log = logging.getLogger("sluice.ingest")

_CHECK_EVERY_S: Final = 30.0
_QUERY_TIMEOUT_S: Final = 5.0
#: Of the share at which readings are refused, when operators are told.
_TOLD_AT: Final = 0.5
_POSITIONS: Final = "SELECT partition, position FROM log_positions WHERE source = $1"


class RetentionGuard:
    """Compares, twice a minute, what has landed with what the log will delete next. Its owner runs and cancels it."""

    def __init__(self, log: Log, pool: Connections, share: float, metrics: IngestMetrics) -> None:
        self._log = log
        self._pool = pool
        self._share = share
        self._metrics = metrics
        self.trouble: str | None = None
        """Why no reading may be taken, in words for an operator."""

    async def run(self) -> None:
        while True:
            try:
                await self.check()
            except UnavailableError as error:
                _log.warning("it cannot be told what the log will delete next", extra={"reason": str(error)})
            await asyncio.sleep(_CHECK_EVERY_S)

    async def check(self) -> None:
        """Find out once. Raises `UnavailableError`, with what was known before standing."""
        late = await self._late(self._share)
        self._metrics.expiring_records.set(sum((await self._late(self._share * _TOLD_AT)).values()))
        self._metrics.retention_refusing.set(bool(late))
        reason = None
        if late:
            reason = (
                f"{sum(late.values())} records have not landed and will soon be deleted by the log: start workers, "
                "or let the log keep them longer (SLUICE_LOG_RETENTION_H and the topic's retention.ms)"
            )
        if (reason is None) != (self.trouble is None):
            level = logging.INFO if reason is None else logging.CRITICAL
            _log.log(
                level, "readings are taken again" if reason is None else reason, extra={"partitions": sorted(late)}
            )
        self.trouble = reason

    async def _late(self, share: float) -> dict[int, int]:
        """By partition, how many records have not landed that have used up this share of their time."""
        expiring = await self._log.expiring(share)
        if not expiring:
            return {}
        rows = await ask(self._pool, _POSITIONS, self._log.source, timeout_s=_QUERY_TIMEOUT_S)
        return {
            row["partition"]: expiring[row["partition"]] - row["position"]
            for row in rows
            if row["position"] < expiring.get(row["partition"], 0)
        }
