"""Which devices say what they measure with its time: what they say once more without is no other reading.

A device may be set to send both. Of one process, and forgotten with it: the first status after a start may count, as
a reading of that moment. Left out: which topics those are (`topics`).
"""

from typing import Final

#: A device that says nothing for so long may have been set to say only the other.
_SPEAKS_US: Final = 3_600_000_000


class Voices:
    """By device; times in microseconds."""

    def __init__(self, devices_max: int) -> None:
        self._devices_max = devices_max
        self._heard: dict[bytes, int] = {}

    def heard(self, device: bytes, now_us: int) -> None:
        """It has said something with its time."""
        self._heard.pop(device, None)
        if len(self._heard) >= self._devices_max:
            del self._heard[next(iter(self._heard))]
        self._heard[device] = now_us

    def has_said(self, device: bytes, now_us: int) -> bool:
        """Whether what it says without a time is said already."""
        heard = self._heard.get(device)
        return heard is not None and now_us - heard < _SPEAKS_US
