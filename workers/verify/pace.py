"""How fast the verification goes, and what it says meanwhile. Left out: what it does."""

import asyncio
from collections.abc import Callable
from typing import Final

from runtime.clock import Clock

_SAY_EVERY_S: Final = 2.0


class Pace:
    """Spends readings at a rate; what was saved while something else took long is not made up for."""

    def __init__(self, rate: int, clock: Clock, say: Callable[[str], None]) -> None:
        self._rate = rate
        self._clock = clock
        self._say = say
        self._due = self._said = clock.monotonic()
        self._doing = ""
        self._readings = 0

    async def spend(self, readings: int, doing: str) -> None:
        """Wait until `readings` more are due."""
        self._readings = readings + (self._readings if doing == self._doing else 0)
        self._doing = doing
        now = self._clock.monotonic()
        if now - self._said >= _SAY_EVERY_S:
            self._said = now
            self._say(f"{doing}: {self._readings} readings")
        if self._rate:
            self._due = max(self._due, now) + readings / self._rate
        await asyncio.sleep(max(0.0, self._due - now) if self._rate else 0)
