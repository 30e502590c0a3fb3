"""The way to a device, as far as this face needs one. Left out: what carries it (`workers.commands`)."""

from datetime import timedelta
from typing import Any, Final, Protocol
from uuid import UUID

from api.http.problems import Problem
from api.problems import DEVICE_INACTIVE
from api.registry import commands
from api.registry.commands import NewCommand
from schemas.commands import Way
from schemas.models import MODELS

#: Whoever looks which device it is has gone by then.
_TIMEOUT: Final = timedelta(minutes=1)


class Downlink(Protocol):
    """Commands to devices; best effort: nobody promises that one arrives."""

    async def identify(self, connection: Any, organisation: UUID, device: UUID, model: str | None) -> bool:
        """Have the device make itself seen for 30 s. Whether there is a way to tell it; may be repeated."""
        ...


class NoDownlink:
    """There is no way to any device."""

    async def identify(self, connection: Any, organisation: UUID, device: UUID, model: str | None) -> bool:
        return False


class CommandDownlink:
    """By MQTT, in the transaction of the request, to models that listen where we publish."""

    def __init__(self, open_max: int) -> None:
        """`open_max` commands wait for a device at most."""
        self._open_max = open_max

    async def identify(self, connection: Any, organisation: UUID, device: UUID, model: str | None) -> bool:
        known = MODELS.get(model or "")
        if known is None or not (known.identifies and known.listens):
            return False
        new = NewCommand("identify", {"seconds": 30}, way=Way.OPENSENSE)
        try:
            await commands.ask_device(
                connection, organisation, device, new, timeout=_TIMEOUT, open_max=self._open_max
            )
        except Problem as problem:
            if problem.kind is DEVICE_INACTIVE:
                return False
            raise
        return True
