"""The books of the last day as metrics, all organisations together: whether they add up, and what is known lost.

Every worker tells the same. Left out: whether the books tell the truth (`workers.verify`).
"""

import logging
from contextlib import suppress
from typing import Final

from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from schemas.ledger import COLUMNS, FATES, LOST_RECORDS, SUMS
from workers.metrics import LedgerMetrics
from workers.settings import LedgerSettings
from workers.upkeep import repeat

_log = logging.getLogger("sluice.ledger")

ROLE: Final = "sluice_worker"

_LAST_DAY: Final = " ".join(("SELECT", SUMS, "FROM ledger WHERE hour > now() - interval '25 hours'"))


class LedgerTotals:
    """One worker's telling. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(self, postgres: PostgresSettings, settings: LedgerSettings, metrics: LedgerMetrics) -> None:
        self._postgres = postgres
        self._settings = settings
        self._metrics = metrics

    async def run(self) -> None:
        """Look every now and then, for ever."""
        await repeat(self.look, self._settings.ledger_check_s, _log, "the ledger could not be summed up")

    async def look(self) -> None:
        """Once. Raises what the database raises."""
        connection = await connect(
            self._postgres, role=ROLE, application="sluice ledger", default_transaction_read_only="on"
        )
        try:
            sums = await connection.fetchrow(_LAST_DAY)
            lost = await connection.fetchrow(LOST_RECORDS)
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()
        if sums is None or lost is None:
            return
        for column in COLUMNS:
            self._metrics.readings.labels(column).set(sums[column])
        self._metrics.unaccounted.set(sums["received"] - sum(sums[fate] for fate in FATES))
        for where in ("log", "spool"):
            self._metrics.lost_records.labels(where).set(lost[where])
