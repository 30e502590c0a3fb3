"""The books of the last day as metrics, all organisations together: whether they add up, and what is known lost.

Every worker tells the same. Left out: whether the books tell the truth (`workers.verify`).
"""

import asyncio
import logging
from contextlib import suppress
from typing import Final

from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from workers.metrics import LedgerMetrics
from workers.settings import LedgerSettings

_log = logging.getLogger("sluice.ledger")

ROLE: Final = "sluice_worker"

COLUMNS: Final = (
    "received",
    "stored",
    "duplicates",
    "conflicts",
    "quarantined",
    "replayed",
    "discarded",
    "expired",
    "erased",
    "lost",
)
_SUMS: Final = ", ".join(f"coalesce(sum({column}), 0)::bigint AS {column}" for column in COLUMNS)
_LAST_DAY: Final = " ".join(("SELECT", _SUMS, "FROM ledger WHERE hour > now() - interval '25 hours'"))
_LOST: Final = """
SELECT (SELECT coalesce(sum(lost), 0) FROM log_positions)::bigint AS log,
       (SELECT coalesce(sum(end_sequence - first_sequence), 0) FROM spool_losses)::bigint AS spool
"""


class LedgerTotals:
    """One worker's telling. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(self, postgres: PostgresSettings, settings: LedgerSettings, metrics: LedgerMetrics) -> None:
        self._postgres = postgres
        self._settings = settings
        self._metrics = metrics

    async def run(self) -> None:
        """Look every now and then, for ever."""
        trouble = ""
        while True:
            try:
                await self.look()
                trouble = ""
            except Exception as error:
                # Nothing waits for it: the next look tells as much.
                if str(error) != trouble:
                    _log.warning("the ledger could not be summed up", exc_info=True)
                trouble = str(error)
            await asyncio.sleep(self._settings.ledger_check_s)

    async def look(self) -> None:
        """Once. Raises what the database raises."""
        connection = await connect(
            self._postgres, role=ROLE, application="sluice ledger", default_transaction_read_only="on"
        )
        try:
            sums = await connection.fetchrow(_LAST_DAY)
            lost = await connection.fetchrow(_LOST)
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()
        if sums is None or lost is None:
            return
        for column in COLUMNS:
            self._metrics.readings.labels(column).set(sums[column])
        fates = sums["stored"] + sums["duplicates"] + sums["conflicts"] + sums["quarantined"]
        self._metrics.unaccounted.set(sums["received"] - fates)
        for where in ("log", "spool"):
            self._metrics.lost_records.labels(where).set(lost[where])
