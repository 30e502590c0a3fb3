"""Work that is done every now and then, for ever, by one worker at a time; what fails is said once and done later."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from runtime.postgres import transaction


async def repeat(work: Callable[[], Awaitable[None]], every_s: float, log: logging.Logger, failure: str) -> None:
    """Ends by being cancelled and never fails; `failure` is what is logged, once for each cause."""
    trouble = ""
    while True:
        try:
            await work()
            trouble = ""
        except Exception as error:
            if str(error) != trouble:
                log.warning(failure, exc_info=True)
            trouble = str(error)
        await asyncio.sleep(every_s)


class OthersTurn(Exception):  # noqa: N818 - no error: it unwinds to the pass
    """Another worker has the lock."""


@asynccontextmanager
async def alone(connection: Any, lock: str, key: object) -> AsyncIterator[None]:
    """A transaction under the lock that `lock` tries to take for `key`; who stops in it does not keep it for long.

    Raises `OthersTurn`.
    """
    async with transaction(connection):
        if not await connection.fetchval(lock, key):
            raise OthersTurn
        yield
