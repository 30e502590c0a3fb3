"""Work that no request waits for: a bounded number of tasks, which end with the application."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Final

_log = logging.getLogger("sluice.api")

_CANCEL_AGAIN_S: Final = 0.1


class Background:
    """Tasks that nobody awaits; what goes wrong in one is logged."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> bool:
        """False where there are too many already: the work is not done."""
        if len(self._tasks) >= self._most:
            work.close()
            return False
        task = asyncio.create_task(work, name="beside a request")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return True

    async def settle(self) -> None:
        """Wait for what was begun."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            # Again, if need be: a library may take being cancelled for a failure of what it waits for.
            await asyncio.wait(self._tasks, timeout=_CANCEL_AGAIN_S)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.warning("what a request left to be done failed", exc_info=error)
