"""A log that could not be reached when its process began: it takes nothing until it has been opened and checked.

Left out: opening it; its owner passes on how.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from runtime.errors import ConfigurationError, UnavailableError
from runtime.log.kafka_writer import BATCH_OVERHEAD
from runtime.log.port import Bounds, Expected, Log, Reader
from runtime.log.settings import LogSettings
from runtime.log.waiting import failed

RETRY_S: Final = 1.0

_log = logging.getLogger("sluice.log")


class LateLog:
    """Until it is open, every append is unavailable and `trouble` says why; from then on it is the log itself."""

    def __init__(self, settings: LogSettings, expected: Expected, reason: str) -> None:
        self.source = expected.source
        self.partitions = expected.partitions
        #: The least of all engines.
        self.body_bytes_max = settings.log_batch_bytes_max - BATCH_OVERHEAD
        self._reason = reason
        self._log: Log | None = None

    async def keep_opening(self, attempt: Callable[[], Awaitable[Log]]) -> None:
        """Open the log once it can be reached; never ends. Raises what `attempt` does but `UnavailableError`."""
        _log.warning("the log cannot be reached; it is opened when it can", extra={"reason": self._reason})
        while self._log is None:
            await asyncio.sleep(RETRY_S)
            try:
                log = await attempt()
            except UnavailableError as error:
                self._reason = str(error)
                continue
            if log.source != self.source:
                await log.close()
                raise ConfigurationError(f"generation {self.source} of the log was closed: start again")
            self._log = log
            _log.info("the log is open", extra={"source": str(self.source)})
        await asyncio.Event().wait()

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        if self._log is None:
            return failed(asyncio.get_running_loop(), self._reason)
        return self._log.append(partition, body)

    def append_all(self, partition: int, bodies: Sequence[bytes]) -> "asyncio.Future[int]":
        if self._log is None:
            return failed(asyncio.get_running_loop(), self._reason)
        return self._log.append_all(partition, bodies)

    @property
    def queued_bytes(self) -> int:
        return 0 if self._log is None else self._log.queued_bytes

    @property
    def trouble(self) -> str | None:
        return self._reason if self._log is None else self._log.trouble

    async def bounds(self) -> dict[int, Bounds]:
        return await self._opened().bounds()

    async def expiring(self, share: float) -> dict[int, int]:
        return await self._opened().expiring(share)

    def reader(self) -> Reader:
        return self._opened().reader()

    async def landed(self, positions: Mapping[int, int]) -> None:
        if self._log is not None:
            await self._log.landed(positions)

    async def close(self) -> None:
        if self._log is not None:
            await self._log.close()

    def _opened(self) -> Log:
        if self._log is None:
            raise UnavailableError(self._reason)
        return self._log
