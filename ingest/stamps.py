"""When a process received what, and the ids of its records: neither is given twice by it. Left out: the clock."""

import os
from typing import Final

#: A reading takes a microsecond of a request's own, and nobody sends a million a second.
_LEAD_US_MAX: Final = 5_000_000


class Stamps:
    """Of one process."""

    def __init__(self) -> None:
        self._received_us = 0
        self._records = 0
        # Random per process and counted within it, so that an id costs no system call.
        self._record_prefix = os.urandom(8)

    def reserve(self, arrived_us: int, count: int) -> int:
        """The receive time of a request with so many readings, as they arrived or as soon as earlier ones leave room.

        Untimed readings of one series are stamped µs after µs from it on, and landing would have to move those of
        two requests apart where they meet.
        """
        received_us = max(arrived_us, self._received_us + 1)
        if received_us - arrived_us > _LEAD_US_MAX:
            received_us = arrived_us  # the clock was put back: what it said before is not believed for ever
        self._received_us = received_us + count
        return received_us

    def record_id(self) -> bytes:
        self._records += 1
        return self._record_prefix + self._records.to_bytes(8, "big")
