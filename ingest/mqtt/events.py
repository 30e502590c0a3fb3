"""Keeps what devices say beside readings in the database, and acknowledges it to the broker once it is there.

What waits is part of what its session has open, which is bounded: while the database is away that session reads no
more, and the broker keeps the rest. All of it may be done again: what the broker repeats changes nothing. Left out:
how it is read (`sayings`), and what follows from it (the schema's `device_said`).
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from ingest.mqtt.connection import Connection, Message
from ingest.mqtt.settings import BridgeSettings
from ingest.registry import Connections, ask
from runtime.errors import UnavailableError

_log = logging.getLogger("sluice.bridge.events")

_SAID: Final = """
SELECT u.number, device_said(u.id, u.device, u.kind, u.said::jsonb) AS result
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[]) WITH ORDINALITY u(id, device, kind, said, number)
"""
#: Nothing is wrong with what was said: others wrote the same rows.
_CONTENDED: Final = (asyncpg.TransactionRollbackError, asyncpg.LockNotAvailableError)
_TIMEOUT_S: Final = 10.0
_RETRY_S: Final = 1.0
FAILED: Final = "failed"


class Event(NamedTuple):
    """One message, as it was read."""

    id: UUID
    device: bytes
    kind: str
    said: str
    """JSON."""
    family: str
    connection: Connection
    message: Message


class Events:
    """Of one process. `run` ends by being cancelled and never fails."""

    def __init__(self, pool: Connections, settings: BridgeSettings, done: Callable[[Event, str], None]) -> None:
        """`done` is told what became of each: `noted`, `repeated`, `unknown_command`, `no_plant` or `failed`."""
        self._pool = pool
        self._rows_max = self._rows = settings.mqtt_events_batch_max
        self._done = done
        self._waiting: deque[Event] = deque()
        self._wanted = asyncio.Event()
        self.trouble: str | None = None
        """Why nothing can be kept right now."""

    def take(self, event: Event) -> None:
        self._waiting.append(event)
        self._wanted.set()

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._waiting:
                batch = self._next()
                try:
                    await self._write(batch)
                    self.trouble = None
                    self._rows = min(2 * self._rows, self._rows_max)
                except (UnavailableError, *_CONTENDED) as error:
                    self._waiting.extendleft(reversed(batch))
                    # As many may take longer than anybody waits: the same again would get nowhere, for ever.
                    self._rows = max(1, len(batch) // 2)
                    self._tell(error)
                    await asyncio.sleep(_RETRY_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads, hides nothing

    def _next(self) -> list[Event]:
        """Without those whose connection has ended: they come again."""
        batch: list[Event] = []
        while self._waiting and len(batch) < self._rows:
            event = self._waiting.popleft()
            if not event.connection.closed.done():
                batch.append(event)
        return batch

    async def _write(self, batch: Sequence[Event]) -> None:
        """Together, in one transaction; where the database refuses that, one by one.

        Raises `UnavailableError`, and what the database raises of contention.
        """
        if not batch:
            return
        try:
            rows = await self._ask(batch)
        except _CONTENDED:
            raise
        except asyncpg.PostgresError as error:
            if len(batch) > 1:
                for event in batch:
                    await self._write([event])
                return
            _log.error("what a device said cannot be kept", extra={"kind": batch[0].kind, "reason": str(error)})
            self._done(batch[0], FAILED)
            return
        for row in rows:
            self._done(batch[row["number"] - 1], row["result"])

    async def _ask(self, batch: Sequence[Event]) -> list[Any]:
        ids, devices = [event.id for event in batch], [UUID(bytes=event.device) for event in batch]
        kinds, said = [event.kind for event in batch], [event.said for event in batch]
        return await ask(self._pool, _SAID, ids, devices, kinds, said, timeout_s=_TIMEOUT_S)

    def _tell(self, error: Exception) -> None:
        if self.trouble is None:
            _log.warning("what devices say cannot be kept: the broker keeps it", extra={"reason": str(error)})
        self.trouble = f"what devices say cannot be kept: {error}"
