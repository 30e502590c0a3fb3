"""What a spool's file has of each partition, and what is said of such files.

Left out: opening, mending and deleting them (`used`), draining them (`spool`).
"""

import contextlib
import logging
from typing import Final

from ingest.spool.files import Claim, Content
from ingest.spool.used import UsedFile, Words
from runtime.log.sqlite_store import Store
from schemas.record import UndecodableError, UnknownVersionError, decode

WORDS: Final = Words(
    log=logging.getLogger("sluice.spool"),
    thread="spool",
    none_made="no spool can be made in",
    complaint="a spool cannot be drained now; it is kept and tried again",
    adopted="a spool that another process left is drained",
    deleted="a spool is drained and deleted",
)


class Stretch:
    """What is not drained yet of one partition of one spool file: from `next` up to `end`."""

    __slots__ = ("end", "next", "oldest_us", "partition")

    def __init__(self, partition: int, start: int, end: int, oldest_us: int) -> None:
        self.partition = partition
        self.next = start
        self.end = end
        self.oldest_us = oldest_us
        """Not above the receive time of its oldest record, µs since 2000-01-01."""


class SpoolFile(UsedFile[Stretch]):
    """A spool file in use."""

    def __init__(self, claim: Claim, store: Store, content: Content) -> None:
        """Raises `DamagedError` and `UnavailableError`."""
        oldest = _oldest(store, content)
        stretches = {
            partition: Stretch(partition, start, end, oldest.get(partition, 0))
            for partition, (start, end) in content.bounds.items()
            if start < end
        }
        super().__init__(claim, store, content, stretches)
        self.size = content.size


def _oldest(store: Store, content: Content) -> dict[int, int]:
    """When the oldest record of each partition was received, as far as that can be read."""
    found = {}
    for partition, (start, end) in content.bounds.items():
        part = store.read_on(partition, start, 1) if start < end else None
        if part is not None and part.bodies:
            with contextlib.suppress(UndecodableError, UnknownVersionError):
                found[partition] = decode(part.bodies[0]).received_at
    return found
