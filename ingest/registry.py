"""Questions to the registry's database that end on time, whatever the connection does. Left out: what is asked."""

import asyncio
from typing import Any, Protocol

from runtime.errors import UnavailableError
from runtime.postgres import UNAVAILABLE


class Connections(Protocol):
    """What is asked of a pool of database sessions."""

    async def fetch(self, query: str, *arguments: Any) -> list[Any]: ...


async def ask(pool: Connections, query: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """The rows. Raises `UnavailableError` when the database is away or does not answer in time."""
    asking = asyncio.ensure_future(pool.fetch(query, *arguments))
    try:
        # Not `asyncio.timeout`: a pool that is told to give up first waits for the database to agree.
        await asyncio.wait({asking}, timeout=timeout_s)
    finally:
        if not asking.done():
            asking.cancel()
            asking.add_done_callback(_forget)
    if not asking.done():
        raise UnavailableError(f"the database did not answer within {timeout_s:g} s")
    try:
        return asking.result()
    except UNAVAILABLE as error:
        raise UnavailableError("the database cannot be asked right now") from error


def _forget(asked: "asyncio.Future[list[Any]]") -> None:
    """Nobody waits for it any more, so nobody else takes its error."""
    if not asked.cancelled():
        asked.exception()
