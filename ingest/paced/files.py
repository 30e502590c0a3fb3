"""The files of the paced lane: one that this process writes, and those that dead processes left.

They are spool files with more partitions, *slots*: what stands in slot s goes to partition s modulo the log's, as
landing has it of every spool. Left out: whose a slot is, and when it is let into the log (`lane`).
"""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ingest.limits import Cost
from ingest.paced.entries import ENTRY_BYTES_MAX
from ingest.paced.owners import Owner
from ingest.spool.ends import End, unsaid
from ingest.spool.files import Claim, Content
from ingest.spool.used import LINGER_MS_MAX, UsedFile, UsedFiles, Words
from runtime.log import LogSettings
from runtime.log.sqlite_store import Store

_WORDS: Final = Words(
    log=logging.getLogger("sluice.paced"),
    thread="paced",
    none_made="no file can be made in",
    complaint="a paced backlog cannot be drained now; it is kept and tried again",
    adopted="paced records that another process left are drained",
    deleted="a file of the paced lane is drained and deleted",
)


class Backlog:
    """What waits in one slot of one file: from `next` up to `end`."""

    __slots__ = ("due", "end", "file", "head", "next", "oldest_us", "owner", "paid", "reach", "size", "slot", "task",
                 "under_way")  # fmt: skip

    def __init__(self, file: "File", slot: int, start: int, end: int) -> None:
        self.file = file
        self.slot = slot
        self.next = start
        self.end = end
        self.owner: Owner | None = None
        self.size = 0
        """Bytes in the file, of which some may not be durable yet."""
        self.due = Cost(0, 0, 0)
        """What is not paid yet; of a file that another process left as its first entry tells."""
        self.oldest_us = 0
        """Not above the receive time of its oldest record, µs since 2000-01-01; 0: not known."""
        self.paid = start
        """Up to where it may be let into the log."""
        self.head: tuple[Owner, Cost] | None = None
        """Who owes how much for the entry at `paid`, once that is known."""
        self.reach = 0
        """How many bytes to look ahead."""
        self.under_way = 0
        """Appends to it that are not decided yet."""
        self.task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        return self.end - self.next


class File(UsedFile[Backlog]):
    """A file in use; its partitions are slots."""

    def __init__(self, claim: Claim, store: Store, content: Content) -> None:
        self.backlogs: dict[int, Backlog] = {}
        super().__init__(claim, store, content, self.backlogs)
        for slot, (start, end) in content.bounds.items():
            if start < end:
                self.backlogs[slot] = Backlog(self, slot, start, end)
        depth, left = self.depth, content.size
        for backlog in self.backlogs.values():  # nobody has counted them apart
            backlog.size = left * backlog.depth // depth

    @property
    def slots(self) -> int:
        return self.partitions

    @property
    def is_idle(self) -> bool:
        return super().is_idle and not any(backlog.under_way for backlog in self.backlogs.values())


class Files(UsedFiles[File]):
    """The lane's files."""

    def __init__(
        self,
        directories: Sequence[Path],
        slots: int,
        log_settings: LogSettings,
        damaged: Callable[[], None],
        end: End = unsaid,
    ) -> None:
        """As of `UsedFiles`."""
        own = dataclasses.replace(
            log_settings,
            log_linger_ms=min(log_settings.log_linger_ms, LINGER_MS_MAX),
            log_batch_bytes_max=log_settings.log_batch_bytes_max + ENTRY_BYTES_MAX,
        )
        super().__init__(directories, slots, own, make=File, damaged=damaged, end=end, words=_WORDS)

    async def backlogs_behind(self) -> list[Backlog]:
        """What of the own file holds more than it said it had kept."""
        found = await self.look_behind()
        return [] if self.own is None else [self.own.backlogs[slot] for slot in found]
