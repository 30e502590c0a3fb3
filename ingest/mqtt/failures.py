"""Messages that a plant may not have made, counted with the plant: many at a time, and never what they held.

Left out: what becomes of the messages (`intake`).
"""

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from ingest.registry import Connections, ask
from runtime.errors import UnavailableError

_log = logging.getLogger("sluice.bridge")

_PERIOD_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
#: Of those that wait to be told to the database; further ones are counted in the metrics alone.
_PLANTS_MAX: Final = 10_000
_ROWS: Final = 1_000
_COUNT_MAX: Final = 2**31 - 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# In the order of plants, so that no two bridges wait for each other.
_TELL: Final = """
WITH told AS (SELECT * FROM unnest($1::uuid[], $2::int[], $3::timestamptz[]) AS t (device_id, failures, at)),
held AS (SELECT p.device_id FROM plants p JOIN told USING (device_id) ORDER BY p.device_id FOR NO KEY UPDATE OF p)
UPDATE plants p SET auth_failures = least(p.auth_failures::bigint + t.failures, 2147483647)::int,
    last_auth_failure_at = greatest(p.last_auth_failure_at, t.at)
FROM told t JOIN held USING (device_id) WHERE p.device_id = t.device_id
"""


class Failures:
    """Of one process. `run` never ends by itself; what is still noted then, `tell` tells."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._noted: dict[bytes, tuple[int, int]] = {}

    def note(self, plant: bytes, at_us: int) -> None:
        """`plant`: 16 bytes; `at_us`: microseconds since 1970."""
        known = self._noted.get(plant)
        if known is not None:
            self._noted[plant] = min(known[0] + 1, _COUNT_MAX), max(known[1], at_us)
        elif len(self._noted) < _PLANTS_MAX:
            self._noted[plant] = 1, at_us

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            with suppress(UnavailableError):  # they are told with the next ones
                await self.tell()

    async def tell(self) -> None:
        """Raises `UnavailableError` with nothing forgotten."""
        while self._noted:
            rows = [(plant, *self._noted.pop(plant)) for plant in [*self._noted][:_ROWS]]
            columns = (
                [UUID(bytes=plant) for plant, _, _ in rows],
                [count for _, count, _ in rows],
                [_EPOCH + timedelta(microseconds=at) for _, _, at in rows],
            )
            try:
                await ask(self._pool, _TELL, *columns, timeout_s=_TIMEOUT_S)
            except BaseException as error:
                for plant, count, at in rows:
                    known = self._noted.get(plant, (0, 0))
                    self._noted[plant] = min(known[0] + count, _COUNT_MAX), max(known[1], at)
                if isinstance(error, UnavailableError) or not isinstance(error, Exception):
                    raise
                _log.exception("failures cannot be counted with their plants: the database refuses it")
                return
