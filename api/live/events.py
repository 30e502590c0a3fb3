"""What is sent, in the words of Server-Sent Events (WHATWG HTML), and the ids that a client resumes by.

An id is the place in the log up to which a client has been told, sealed: what it says of the volume of all
organisations is nobody's business. It opens nothing; whoever brings one is let in by a credential as ever.
"""

import random
from datetime import datetime
from typing import Any, Final

import msgspec
import orjson

from api.http.problems import Problem, invalid_parameter
from runtime.secrets import BadSealError, KeyRing, Seal

RETRY_MS: Final = (1_000, 5_000)
PARAMETER: Final = "last_event_id"

Positions = dict[int, int]
"""By partition, the next record."""


class Mark(msgspec.Struct, array_like=True, frozen=True):
    """Up to where a listener has been told."""

    source: bytes
    """16 bytes: the generation of the log."""
    positions: Positions
    received_through: datetime
    """When the newest record up to there had come in."""


class EventIds:
    """Marks as texts, and back."""

    def __init__(self, ring: KeyRing) -> None:
        self._seal = Seal(ring, "live positions")
        self._decoder = msgspec.msgpack.Decoder(Mark)

    def give(self, mark: Mark) -> str:
        return self._seal.seal(msgspec.msgpack.encode(mark))

    def take(self, text: str) -> Mark:
        """Raises the problem of an id that this service did not give out."""
        try:
            return self._decoder.decode(self._seal.open(text))
        except (BadSealError, msgspec.DecodeError, UnicodeEncodeError):
            raise _not_given_out() from None


def _not_given_out() -> Problem:
    return invalid_parameter(PARAMETER, "is no id of an event of this stream")


def event(name: str, data: Any, event_id: str = "") -> bytes:
    """`data` as one line of JSON; without an id a client keeps the one it has."""
    content = data if isinstance(data, bytes) else orjson.dumps(data, option=orjson.OPT_UTC_Z)
    head = f"id: {event_id}\nevent: {name}\n" if event_id else f"event: {name}\n"
    return b"".join((head.encode(), b"data: ", content, b"\n\n"))


def heartbeat(event_id: str = "") -> bytes:
    """Tells nothing but an id: no event for whoever listens."""
    return f":\nid: {event_id}\n\n".encode() if event_id else b":\n\n"


def retry() -> bytes:
    """When to come back after the stream has ended: not everybody at once."""
    return f"retry: {random.randint(*RETRY_MS)}\n\n".encode()  # noqa: S311
