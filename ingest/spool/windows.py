"""What is sent of a spool at once: its next records, each told where it stood, or the declaration that some are lost.

Every call blocks. Left out: when a window is sent, and what happens if that fails (`spool`).
"""

import logging
from collections.abc import Callable
from hashlib import sha256
from typing import Final, NamedTuple
from uuid import UUID

import msgspec

from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.log.port import RECORD_ROOM
from runtime.log.sqlite_store import Store
from schemas.record import (
    LATE_VERSION,
    NOBODY,
    PG_EPOCH_US,
    Origin,
    Record,
    UndecodableError,
    UnknownVersionError,
    decode,
    encode,
)

_log = logging.getLogger("sluice.spool")

#: Of a window, so that preparing one holds nobody up; at most what one batch of the log takes.
WINDOW_BYTES: Final = 256_000


class Window(NamedTuple):
    """Records of one partition of a spool from `first` up to `through`, which is not among them."""

    first: int
    through: int
    bodies: list[bytes]
    size: int
    """Bytes they take in the spool."""
    lost: int
    """How many of them are only declared lost."""
    received_us: int
    """When the last of them was received, µs since 2000-01-01; 0 for lost ones."""


class Windows:
    """Makes the windows of one spool."""

    def __init__(
        self,
        store: Store,
        spool: UUID,
        body_bytes_max: int,
        clock: Clock,
        decode: Callable[[bytes], Record] = decode,
    ) -> None:
        """`decode` makes a record of what the store holds; raises as `schemas.record.decode`."""
        self._store = store
        self._decode = decode
        self._spool = spool.bytes
        self._bytes_max = min(WINDOW_BYTES, body_bytes_max)
        self._clock = clock

    def read(self, partition: int, position: int, end: int) -> Window:
        """What stands next from `position` on, before `end`.

        Raises `DamagedError`, and `UnavailableError` for a file that cannot be read now.
        """
        part = self._store.read_on(partition, position, self._bytes_max)
        if not part.bodies or part.first > position:
            return self._gap(partition, position, min(part.first, end) if part.bodies else end)
        window = Window(position, position, [], 0, 0, 0)
        bodies, room, size, received_us = window.bodies, self._bytes_max, 0, 0
        for sequence, body in enumerate(part.bodies[: end - position], position):
            try:
                record = self._decode(body)
            except UnknownVersionError as error:
                raise UnavailableError(f"{self._store.path}: {error}; start the Sluice that made it") from error
            except UndecodableError:
                if bodies:
                    break
                _log.exception("a spooled record cannot be decoded", extra={"file": str(self._store.path)})
                return self._gap(partition, sequence, sequence + 1)
            drained = self._drained(record, partition, sequence)
            room -= len(drained) + RECORD_ROOM
            if bodies and room < 0:
                break
            bodies.append(drained)
            size += len(body)
            received_us = record.received_at
        return window._replace(through=position + len(bodies), size=size, received_us=received_us)

    def _drained(self, record: Record, partition: int, sequence: int) -> bytes:
        origin = Origin(self._spool, partition, sequence, sequence + 1)
        return encode(msgspec.structs.replace(record, version=LATE_VERSION, origin=origin))

    def _gap(self, partition: int, first: int, through: int) -> Window:
        origin = Origin(self._spool, partition, first, through)
        # The same on every attempt, though made anew for each.
        record_id = sha256(encode(origin)).digest()[:16]
        now_us = self._clock.now_us() - PG_EPOCH_US
        record = Record(LATE_VERSION, record_id, NOBODY, NOBODY, now_us, "spool", "", [], origin=origin)
        return Window(first, through, [encode(record)], 0, through - first, 0)
