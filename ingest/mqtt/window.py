"""Which deliveries of a session are open, and up to where none is sent again. Pure: no I/O.

Deliveries are numbered over all connections of whoever holds the session. One is done once its PUBACK was written,
and certain to stay done once the broker answered a PINGREQ that was written behind it. Left out: the session
(`session`).
"""

from typing import NamedTuple

from schemas.record import FENCE_SHIFT


class Mark(NamedTuple):
    """Where a window stood when a PINGREQ was written."""

    done: int
    """Every delivery of this connection with a lower number was done."""


class Window:
    """Of one lease of a session, over all of its connections."""

    def __init__(self, session: bytes, fence: int) -> None:
        """`session`: its id, 16 bytes; `fence`: how often it was taken by now, which no other lease of it has."""
        self.session = session
        self._next = fence << FENCE_SHIFT
        self._open: dict[int, tuple[int, int]] = {}
        self._began = self._next
        self._repeated: int | None = None
        self.floor = 0
        """No delivery with a lower number is sent again."""
        self.bytes = 0
        """Of open deliveries."""

    def connected(self, *, session_present: bool) -> None:
        """A connection begins: what was open is sent again under other numbers, or was lost with the session."""
        self._open.clear()
        self.bytes = 0
        self._began = self._next
        self._repeated = None
        if not session_present:
            self.floor = self._next

    def take(self, size: int, arrived_us: int) -> int:
        """The number of the next delivery, of so many bytes, which is open now."""
        sequence = self._next
        self._next = sequence + 1
        self._open[sequence] = size, arrived_us
        self.bytes += size
        return sequence

    def done(self, sequence: int) -> bool:
        """It was acknowledged. False for one of an earlier connection, which cannot be."""
        opened = self._open.pop(sequence, None)
        if opened is None:
            return False
        self.bytes -= opened[0]
        return True

    def __len__(self) -> int:
        return len(self._open)

    @property
    def oldest_us(self) -> int | None:
        """When the oldest open delivery came, microseconds since 1970."""
        return next(iter(self._open.values()))[1] if self._open else None

    @property
    def unconfirmed(self) -> int:
        """How many deliveries of this connection may be sent again, as far as is known."""
        return self._next - max(self.floor, self._began)

    def mark(self) -> Mark:
        return Mark(next(iter(self._open), self._next))

    def confirm(self, mark: Mark) -> None:
        """The broker has answered what was written at `mark`, after all that it had to repeat."""
        if self._repeated is None:
            self._repeated = self._next
        # What a former connection left open is certain once its repeats are done, too.
        if mark.done >= self._repeated:
            self.floor = max(self.floor, mark.done)
