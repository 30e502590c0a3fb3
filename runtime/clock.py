"""The clock, as a thing to pass in: tests move it by hand. Left out: parsing of times (`ingest.formats`)."""

import time
from typing import Protocol


class Clock(Protocol):
    """Wall time and elapsed time. Neither call blocks."""

    def now_us(self) -> int:
        """Microseconds since 1970-01-01 UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    monotonic = staticmethod(time.monotonic)


class ManualClock:
    """A clock that moves only when a test says so."""

    def __init__(self, now_us: int = 1_700_000_000_000_000) -> None:
        self._now_us = now_us
        self._elapsed_s = 0.0

    def now_us(self) -> int:
        return self._now_us

    def monotonic(self) -> float:
        return self._elapsed_s

    def advance(self, seconds: float) -> None:
        self._elapsed_s += seconds
        self._now_us += round(seconds * 1e6)
