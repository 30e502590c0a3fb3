"""The way to a device, as far as this face needs one. Left out: what carries it."""

from typing import Protocol
from uuid import UUID


class Downlink(Protocol):
    """Commands to devices; best effort: nobody promises that one arrives."""

    async def identify(self, organisation: UUID, device: UUID, model: str | None) -> bool:
        """Have the device make itself seen for 30 s. Whether there is a way to tell it; may be repeated."""
        ...


class NoDownlink:
    """There is no way to any device."""

    async def identify(self, organisation: UUID, device: UUID, model: str | None) -> bool:
        return False
