"""The one error of a benchmark: it could not be run, or what it measured does not hold."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runtime.errors import SluiceError


class BenchError(SluiceError):
    """No figure is reported: the message says what went wrong."""


@asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raises `BenchError`, which says what was waited for, when that takes longer or a limit within is met."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise BenchError(f"waited in vain for {what}: {seconds:g} s at most") from None
