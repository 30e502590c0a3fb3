"""The share of the pool's sessions that requests of one organisation may hold at once, so that others find some too.

Who is over it waits without a session. Left out: how many sessions there are (`runtime.postgres`).
"""

import asyncio
from typing import Final
from uuid import UUID
from weakref import WeakValueDictionary

import asyncpg

from api.http.problems import OVERLOADED, unavailable

_NOBODY: Final = UUID(int=0)


class Shares:
    """Of one pool; three quarters of it are anybody's."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", wait_s: float) -> None:
        self._pool = pool
        self._wait_s = wait_s
        self._shares: WeakValueDictionary[UUID, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, organisation: UUID | None) -> asyncio.Semaphore:
        """That of an organisation; those who act for none share one."""
        organisation = organisation or _NOBODY
        share = self._shares.get(organisation)
        if share is None:
            share = self._shares[organisation] = asyncio.Semaphore(max(1, self._pool.get_max_size() * 3 // 4))
        return share

    async def wait(self, share: asyncio.Semaphore) -> None:
        """Until there is room. Raises the problem of an organisation whose requests take too long for that."""
        try:
            async with asyncio.timeout(self._wait_s):
                await share.acquire()
        except TimeoutError:
            raise unavailable(OVERLOADED, "too many requests of the organisation are being answered") from None
