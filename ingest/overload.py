"""Whether this process is so far behind that a new request should wait elsewhere, told by its event loop's lag.

Left out: the bound on bytes (`ingest.http.bodies`), and what a refusal looks like.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

_EVERY_S: Final = 0.1
#: How many times in a row: one pause of the machine is no overload, and the end of one is not told by one moment.
_TIMES_UNTIL_ON: Final = 2
_TIMES_UNTIL_OFF: Final = 5
_OFF_SHARE: Final = 0.5


class Overload:
    """On when the loop was later than the threshold twice in a row, off after half a second below half of it."""

    def __init__(self, threshold_s: float, observe: Callable[[float], None]) -> None:
        """`observe` is told every lag, in seconds. A threshold of 0: never on."""
        self._threshold_s = threshold_s or float("inf")
        self._observe = observe
        self._times = 0
        self.is_on = False

    async def watch(self) -> None:
        """Measure for ever; its owner cancels it."""
        while True:
            due = time.monotonic() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            self.note(max(0.0, time.monotonic() - due))

    def note(self, lag_s: float) -> None:
        self._observe(lag_s)
        if self.is_on:
            self._times = self._times + 1 if lag_s < self._threshold_s * _OFF_SHARE else 0
            needed = _TIMES_UNTIL_OFF
        else:
            self._times = self._times + 1 if lag_s > self._threshold_s else 0
            needed = _TIMES_UNTIL_ON
        if self._times == needed:
            self.is_on = not self.is_on
            self._times = 0
