"""Work that is done every now and then, for ever: what fails is said once and done the next time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable


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
