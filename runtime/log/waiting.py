"""What both engines share: settling appends, telling of trouble, and passing on what has landed.

Left out: queues; each engine has the one that suits it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from runtime.errors import SluiceError, UnavailableError

_log = logging.getLogger("sluice.log")


def settle(futures: Iterable["asyncio.Future[int]"], first: int) -> None:
    """Give each its position, `first` and on. A caller that stopped waiting has cancelled its future."""
    for position, future in enumerate(futures, first):
        if not future.done():
            future.set_result(position)


def fail(futures: Iterable["asyncio.Future[int]"], error: type[SluiceError], text: str) -> None:
    """Fail each with an error of its own: one shared between tasks would gather all their tracebacks."""
    for future in futures:
        if not future.done():
            future.set_exception(error(text))


def failed(loop: asyncio.AbstractEventLoop, text: str) -> "asyncio.Future[int]":
    """A future that is unavailable from the start."""
    future: asyncio.Future[int] = loop.create_future()
    future.set_exception(UnavailableError(text))
    return future


class Trouble:
    """Why a log cannot be used right now. Logs one line when trouble begins and one when it is over."""

    def __init__(self, name: str) -> None:
        self.reason: str | None = None
        self._name = name
        self._since = 0.0

    def begin(self, reason: str) -> None:
        if self.reason is None:
            self._since = time.monotonic()
            _log.warning("the log cannot be used", extra={"log": self._name, "reason": reason})
        self.reason = reason

    def over(self) -> None:
        if self.reason is not None:
            after_s = round(time.monotonic() - self._since, 1)
            _log.info("the log can be used again", extra={"log": self._name, "after_s": after_s})
            self.reason = None


class Landed:
    """Passes landed positions on in the background, the newest of each partition and not too often."""

    def __init__(self, pass_on: Callable[[dict[int, int]], Awaitable[None]], every_s: float) -> None:
        self._pass_on = pass_on
        self._every_s = every_s
        self._positions: dict[int, int] = {}
        self._task: asyncio.Task[None] | None = None

    def tell(self, positions: Mapping[int, int]) -> None:
        for partition, position in positions.items():
            self._positions[partition] = max(position, self._positions.get(partition, 0))
        if self._task is None and self._positions:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="log-landed")

    async def _run(self) -> None:
        while self._positions:
            positions, self._positions = self._positions, {}
            try:
                await self._pass_on(positions)
            except SluiceError:  # nothing depends on it: later will do
                self.tell(positions)
            await asyncio.sleep(self._every_s)
        self._task = None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
