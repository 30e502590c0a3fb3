"""What is to be done with a message that is no reading: pass over it, note it, or keep it before it is acknowledged.

Left out: what it says (`sayings`), and who writes it down (`events`, `presence`).
"""

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID, uuid5

import msgspec

from ingest.credentials import Grant
from ingest.limits import Limits
from ingest.mqtt.connection import Connection, Message
from ingest.mqtt.events import Event, Events
from ingest.mqtt.presence import Presence
from ingest.mqtt.sayings import MalformedError, is_there, read
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import RETAINED, Kind, Target
from ingest.registry import Connections
from runtime.clock import Clock
from runtime.ids import uuid7

_log = logging.getLogger("sluice.bridge")


class Hearing:
    """Of one process, for all of its sessions."""

    def __init__(
        self,
        pool: Connections,
        *,
        limits: Limits,
        settings: BridgeSettings,
        clock: Clock,
        done: Callable[[str, Connection, Message, str], None],
    ) -> None:
        """`done` is told of a family's message what became of it: it is acknowledged then."""
        self._limits = limits
        self._clock = clock
        self._done = done
        self._presence = Presence(pool, settings)
        self._events = Events(pool, settings, self._kept)

    @property
    def trouble(self) -> str | None:
        """Why what devices say beside readings cannot be kept right now."""
        return self._events.trouble

    def start(self) -> "list[asyncio.Task[None]]":
        """Its tasks, none of which ends by itself."""
        return [
            asyncio.create_task(self._events.run(), name="bridge events"),
            asyncio.create_task(self._presence.run(), name="bridge presence"),
        ]

    def hear(self, family: str, connection: Connection, message: Message, target: Target, grant: Grant) -> None:
        """What a device says of itself. Raises `LimitExceededError`."""
        if (known := _is_no_news(message, target, grant)) is not None:
            self._done(family, connection, message, known)
            return
        try:
            if target.kind is Kind.WILL:
                self._note_presence(target, message)
                self._done(family, connection, message, "announced")
                return
            if not message.is_counted and not message.again:
                self._limits.request(_sender(grant, target), self._clock.now_us())
                message.is_counted = True
            said = read(target.kind, message.payload, message.size)
        except MalformedError as error:
            _log.debug("what a device said is malformed", extra={"family": family, "reason": str(error)})
            self._done(family, connection, message, "malformed")
            return
        if not message.again and not message.retained:
            self._presence.hear(target.device, message.arrived_us)
        self._events.take(Event(uuid7(), target.device, target.kind, said, family, connection, message))

    def _note_presence(self, target: Target, message: Message) -> None:
        """Raises `MalformedError`."""
        if is_there(message.payload):
            self._presence.hear(target.device, message.arrived_us)
        else:
            self._presence.lose(target.device, message.arrived_us)

    def _kept(self, event: Event, result: str) -> None:
        self._done(event.family, event.connection, event.message, result)


def answers_of(device: bytes) -> bytes:
    """By which a device's answers to commands are told from all else that it sends."""
    return uuid5(UUID(bytes=device), "answers").bytes


def _sender(grant: Grant, target: Target) -> Grant:
    """Whose limits hold: answers may be as many as all else, beside it, so that no storm of alarms is before them."""
    if target.kind is not Kind.ANSWER:
        return grant
    return msgspec.structs.replace(grant, device=answers_of(target.device))


def _is_no_news(message: Message, target: Target, grant: Grant) -> str | None:
    """The result of a message that nothing follows from, whatever it says."""
    if grant.suspended:
        return "suspended"
    if not message.size:
        return "empty"  # so what was retained is forgotten
    if message.retained and target.kind not in RETAINED:
        return "retained"
    # Whether it was there then is overtaken by what was heard since.
    return "repeated" if message.again and target.kind is Kind.WILL else None
