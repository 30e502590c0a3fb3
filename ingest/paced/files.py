"""The files of the paced lane: one that this process writes, and those that dead processes left.

They are spool files with more partitions, *slots*: what stands in slot s goes to partition s modulo the log's, as
landing has it of every spool. Left out: whose a slot is, and when it is let into the log (`lane`).
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

from ingest.limits import Cost
from ingest.paced.entries import ENTRY_BYTES_MAX
from ingest.paced.owners import Owner
from ingest.spool.ends import End, unsaid
from ingest.spool.files import Claim, Content, abandoned
from runtime.errors import OutcomeUnknownError, SluiceError, UnavailableError
from runtime.log import LogMisfitError, LogSettings
from runtime.log.sqlite_log import SqliteLog
from runtime.log.sqlite_store import DamagedError, Store

_log = logging.getLogger("sluice.paced")

#: Of other processes' files at once; the rest waits its turn.
ADOPTED_MAX: Final = 16
PRUNE_WAIT_S: Final = 1.0
#: Requests are waited for one by one here: company comes from other devices.
_LINGER_MS: Final = 2.0

T = TypeVar("T")


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


class File:
    """A file in use; `log` only for the one that this process writes."""

    def __init__(self, claim: Claim, store: Store, content: Content) -> None:
        self.claim = claim
        self.store = store
        self.spool = content.spool
        self.slots = len(content.bounds)
        self.backlogs = {
            slot: Backlog(self, slot, start, end) for slot, (start, end) in content.bounds.items() if start < end
        }
        self.log: SqliteLog | None = None
        self.mending = asyncio.Lock()
        self.uncertain = False
        """Whether it may hold entries behind the ends that are known."""
        depth, left = self.depth, content.size
        for backlog in self.backlogs.values():  # nobody has counted them apart
            backlog.size = left * backlog.depth // depth

    @property
    def depth(self) -> int:
        return sum(backlog.depth for backlog in self.backlogs.values())

    @property
    def is_idle(self) -> bool:
        return not self.uncertain and not any(one.depth or one.under_way for one in self.backlogs.values())

    def ends(self) -> dict[int, int]:
        """How far each slot has come that may hold something drained."""
        return {backlog.slot: backlog.next for backlog in self.backlogs.values() if backlog.next}


class Files:
    """Opens, adopts, mends and deletes them. Belongs to one event loop."""

    def __init__(
        self,
        directories: Sequence[Path],
        slots: int,
        log_settings: LogSettings,
        damaged: Callable[[], None],
        end: End = unsaid,
    ) -> None:
        """Files are made in the last of the directories, and adopted in all of them.

        `damaged` is told of every file that was found damaged and set aside, `end` of every one before it is deleted.
        """
        self._end = end
        self._directories = directories
        self._directory = directories[-1]
        self._slots = slots
        self._log_settings = dataclasses.replace(
            log_settings,
            log_linger_ms=min(log_settings.log_linger_ms, _LINGER_MS),
            log_batch_bytes_max=log_settings.log_batch_bytes_max + ENTRY_BYTES_MAX,
        )
        self._damaged = damaged
        self._complaints: dict[UUID | None, str] = {}
        self._opening = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="paced")
        self.own: File | None = None
        self.others: list[File] = []

    def __iter__(self) -> Iterator[File]:
        yield from self.others
        if self.own is not None:
            yield self.own

    async def open_own(self) -> File:
        """The file that this process writes, made when it is first needed. Raises `UnavailableError`."""
        async with self._opening:
            if self.own is None:
                try:
                    file = await self.in_thread(self._make)
                except (OSError, SluiceError) as error:
                    text = f"no file can be made in {self._directory}: {error}; make room, or set SLUICE_SPOOL_DIR"
                    self.complain(None, text)
                    raise UnavailableError(text) from error
                file.log = SqliteLog(self._log_settings, file.store, file.spool, file.slots)
                # The log's thread has that store; whoever reads needs one of its own.
                file.store = Store(file.claim.path, file.store.identity)
                self.own = file
            return self.own

    def _make(self) -> File:
        claim = Claim.make(self._directory)
        try:
            store = claim.create(self._slots)
            file = File(claim, store, claim.look(store))
            store.close()
        except BaseException:
            claim.delete()
            raise
        return file

    # ------------------------------------------------------------ what others left

    async def adopt(self) -> list[File]:
        """Take over what dead processes left, as far as it can be read now, and tell what that is."""
        ours = {file.claim.spool for file in self}
        claims: list[Claim] = []
        for directory in self._directories:
            count_max = ADOPTED_MAX - sum(file.depth > 0 for file in self.others) - len(claims)
            try:
                claims += await self.in_thread(abandoned, directory, ours, count_max)
            except OSError as error:
                self.complain(None, f"{directory} cannot be read: {error}")
        known = len(self.others)
        for claim in claims:
            try:
                self.others.append(await self._adopt_one(claim))
            except UnavailableError as error:
                self.complain(claim.spool, str(error))
                claim.release()
        return self.others[known:]

    async def _adopt_one(self, claim: Claim) -> File:
        """Raises `UnavailableError`."""
        store = Store(claim.path)
        try:
            content = await self.in_thread(claim.look, store)
        except DamagedError as error:
            await self.in_thread(store.close)
            self.complain(claim.spool, str(error))
            await self.in_thread(claim.set_aside, self._slots)
            self._damaged()
            store = Store(claim.path)
            content = await self.in_thread(claim.look, store)
        except UnavailableError:
            await self.in_thread(store.close)
            raise
        file = File(claim, store, content)
        _log.warning(
            "paced records that another process left are drained",
            extra={"file": str(store.path), "records": file.depth},
        )
        return file

    # ------------------------------------------------------------ mending and tidying

    async def read(self, file: File, ask: Callable[[Store], T]) -> T:
        """What `ask` finds in the file. Raises `UnavailableError`, also when it was damaged: then ask again."""
        if file.mending.locked():
            async with file.mending:
                pass
        store = file.store
        try:
            return await self.in_thread(ask, store)
        except DamagedError as error:
            async with file.mending:
                if file.store is store:
                    await self._set_aside(file, error)
            raise
        except LogMisfitError as error:
            text = f"{store.path} is gone, and {file.depth} records with it: bring it back or restart without it"
            self.complain(file.claim.spool, text)
            raise UnavailableError(text) from error

    async def _set_aside(self, file: File, error: DamagedError) -> None:
        """Go on with what can be read of a damaged file. Raises `UnavailableError` when that cannot be written."""
        self.complain(file.claim.spool, str(error))
        if file.log is not None:
            log, file.log = file.log, None
            if file is self.own:
                self.own = None
                self.others.append(file)
            await log.close()
            file.uncertain = False  # what the file holds is about to be seen
        await self.in_thread(file.store.close)
        await self.in_thread(file.claim.set_aside, file.slots)
        store = Store(file.claim.path)
        content = await self.in_thread(file.claim.look, store)
        for slot, backlog in file.backlogs.items():
            backlog.end = max(backlog.end, content.bounds[slot].end)
        file.store = store
        self._damaged()

    async def look_behind(self) -> list[Backlog]:
        """The slots of the own file that hold more than it said it had kept."""
        file = self.own
        if file is None or not file.uncertain or file.log is None or file.log.trouble is not None:
            return []
        try:
            bounds = await file.log.bounds()
        except UnavailableError:
            return []
        file.uncertain = False
        found = [backlog for slot, backlog in file.backlogs.items() if bounds[slot].end > backlog.end]
        for backlog in found:
            backlog.end = bounds[backlog.slot].end
        return found

    async def tidy(self) -> None:
        """Delete what is drained: other processes' files whole."""
        for file in [file for file in self.others if file.is_idle and not file.mending.locked()]:
            if not await self._end(file.spool):
                break  # whoever did not answer will not answer for the others either
            self.others.remove(file)
            await self.in_thread(file.store.close)
            await self.in_thread(file.claim.delete)
            _log.info("a file of the paced lane is drained and deleted", extra={"spool": str(file.spool)})
        for file in list(self):
            ends = file.ends()
            if file.log is not None:
                await file.log.landed(ends)
            elif ends and not file.mending.locked():
                await self._prune(file, ends)

    async def _prune(self, file: File, ends: dict[int, int]) -> None:
        with contextlib.suppress(UnavailableError, OutcomeUnknownError, LogMisfitError):
            while await self.in_thread(file.store.prune, ends, PRUNE_WAIT_S):
                pass

    async def close(self) -> None:
        """Make durable what was taken; what is not drained stays for the next process."""
        async with self._opening:
            for file in list(self):
                if file.log is not None:
                    await file.log.close()
                await self._prune(file, file.ends())
                await self._let_go(file)
        self._thread.shutdown(wait=False)

    async def _let_go(self, file: File) -> None:
        empty = False
        with contextlib.suppress(SluiceError):
            bounds = await self.in_thread(file.store.bounds)
            ends = file.ends()
            empty = all(start == end or end <= ends.get(slot, 0) for slot, (start, end) in bounds.items())
        await self.in_thread(file.store.close)
        gone = empty and await self._end(file.spool)
        await self.in_thread(file.claim.delete if gone else file.claim.release)

    def complain(self, file: UUID | None, text: str) -> None:
        """Once for each cause."""
        if self._complaints.get(file) != text:
            self._complaints[file] = text
            _log.error("a paced backlog cannot be drained now; it is kept and tried again", extra={"reason": text})

    async def in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(call, *arguments))
