"""The spool files that a process uses: the one it writes, and those that dead processes left.

The spool's and the paced lane's are alike in all but what their partitions are, which whoever uses this says. Left
out: whose the files are (`files`), and when something is drained (`spool`, `ingest.paced.lane`).
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

from ingest.spool.ends import End
from ingest.spool.files import Claim, Content, abandoned
from runtime.errors import OutcomeUnknownError, SluiceError, UnavailableError
from runtime.log import LogMisfitError, LogSettings
from runtime.log.sqlite_log import SqliteLog
from runtime.log.sqlite_store import DamagedError, Store

#: Of other processes' files at once; the rest waits its turn.
ADOPTED_MAX: Final = 16
PRUNE_WAIT_S: Final = 1.0
#: Those who wait for a commit do so one by one, and would not all come sooner if it waited for more of them.
LINGER_MS_MAX: Final = 2.0

T = TypeVar("T")


class Part(Protocol):
    """What is not drained yet of one partition of a file: from `next` up to `end`."""

    next: int
    end: int


P = TypeVar("P", bound=Part)


class UsedFile(Generic[P]):
    """A file in use; `log` only for the one that this process writes."""

    def __init__(self, claim: Claim, store: Store, content: Content, parts: dict[int, P]) -> None:
        self.claim = claim
        self.store = store
        self.spool = content.spool
        self.partitions = len(content.bounds)
        self.parts = parts
        self.log: SqliteLog | None = None
        self.mending = asyncio.Lock()
        self.uncertain = False
        """Whether it may hold records behind the ends that are known."""

    @property
    def depth(self) -> int:
        return sum(part.end - part.next for part in self.parts.values())

    @property
    def is_idle(self) -> bool:
        return not self.uncertain and not self.depth

    def drained(self) -> dict[int, int]:
        """How far each partition has come that may hold something drained."""
        return {number: part.next for number, part in self.parts.items() if part.next}


F = TypeVar("F", bound=UsedFile[Any])


class Words(NamedTuple):
    """What is said of these files."""

    log: logging.Logger
    thread: str
    none_made: str
    complaint: str
    adopted: str
    deleted: str


class UsedFiles(Generic[F]):
    """Opens, adopts, mends and deletes them. Belongs to one event loop."""

    def __init__(
        self,
        directories: Sequence[Path],
        partitions: int,
        log_settings: LogSettings,
        *,
        make: Callable[[Claim, Store, Content], F],
        damaged: Callable[[], None],
        end: End,
        words: Words,
    ) -> None:
        """Files are made in the last of the directories, and adopted in all of them.

        `make` says in a thread what a file is made of. `damaged` is told of every file that was found damaged and set
        aside, `end` of every one before it is deleted.
        """
        self.own: F | None = None
        self.others: list[F] = []
        self._directories = directories
        self._directory = directories[-1]
        self._partitions = partitions
        self._log_settings = log_settings
        self._file = make
        self._damaged = damaged
        self._end = end
        self._words = words
        self._complaints: dict[UUID | None, str] = {}
        self._opening = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=words.thread)

    def __iter__(self) -> Iterator[F]:
        yield from self.others
        if self.own is not None:
            yield self.own

    async def open_own(self) -> F:
        """The file that this process writes, made when it is first needed. Raises `UnavailableError`."""
        async with self._opening:
            if self.own is None:
                try:
                    file = await self.in_thread(self._make)
                except (OSError, SluiceError) as error:
                    reason = getattr(error, "strerror", None) or error  # without the name, another one each time
                    text = f"{self._words.none_made} {self._directory}: {reason}; make room, or set SLUICE_SPOOL_DIR"
                    self.complain(None, text)
                    raise UnavailableError(text) from error
                file.log = SqliteLog(self._log_settings, file.store, file.spool, file.partitions)
                # The log's thread has that store; whoever reads needs one of its own.
                file.store = Store(file.claim.path, file.store.identity)
                self._complaints.pop(None, None)
                self.own = file
            return self.own

    def _make(self) -> F:
        claim = Claim.make(self._directory)
        try:
            store = claim.create(self._partitions)
            file = self._file(claim, store, claim.look(store))
            store.close()
        except BaseException:
            claim.delete()
            raise
        return file

    # ------------------------------------------------------------ what others left

    async def adopt(self) -> list[F]:
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

    async def _adopt_one(self, claim: Claim) -> F:
        """Raises `UnavailableError`."""
        store = Store(claim.path)
        try:
            file = await self.in_thread(self._look, claim, store)
        except DamagedError as error:
            await self.in_thread(store.close)
            self.complain(claim.spool, str(error))
            await self.in_thread(claim.set_aside, self._partitions)
            self._damaged()
            store = Store(claim.path)
            file = await self.in_thread(self._look, claim, store)
        except UnavailableError:
            await self.in_thread(store.close)
            raise
        self._words.log.warning(self._words.adopted, extra={"file": str(store.path), "records": file.depth})
        return file

    def _look(self, claim: Claim, store: Store) -> F:
        return self._file(claim, store, claim.look(store))

    # ------------------------------------------------------------ reading and mending

    async def read(self, file: F, ask: Callable[[Store], T]) -> T:
        """What `ask` finds in the file. Raises `UnavailableError`, also when it was damaged: then ask again."""
        if file.mending.locked():  # another reader has found the damage
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

    async def _set_aside(self, file: F, error: DamagedError) -> None:
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
        await self.in_thread(file.claim.set_aside, file.partitions)
        store = Store(file.claim.path)
        content = await self.in_thread(file.claim.look, store)
        for number, part in file.parts.items():
            part.end = max(part.end, content.bounds[number].end)
        file.store = store
        self._damaged()

    async def look_behind(self) -> list[int]:
        """The partitions of the own file that hold more than it said it had kept."""
        file = self.own
        if file is None or not file.uncertain or file.log is None or file.log.trouble is not None:
            return []
        try:
            bounds = await file.log.bounds()
        except UnavailableError:
            return []
        file.uncertain = False
        found = [number for number, part in file.parts.items() if bounds[number].end > part.end]
        for number in found:
            file.parts[number].end = bounds[number].end
        return found

    # ------------------------------------------------------------ tidying

    async def tidy(self) -> list[F]:
        """Delete what is drained, other processes' files whole; tells which those were."""
        gone = []
        for file in [file for file in self.others if file.is_idle and not file.mending.locked()]:
            if not await self._end(file.spool):
                break  # whoever did not answer will not answer for the others either
            self.others.remove(file)
            gone.append(file)
            await self.in_thread(file.store.close)
            await self.in_thread(file.claim.delete)
            self._words.log.info(self._words.deleted, extra={"spool": str(file.spool)})
        for file in list(self):
            drained = file.drained()
            if file.log is not None:
                await file.log.landed(drained)
            elif drained and not file.mending.locked():
                await self._prune(file, drained)
        return gone

    async def _prune(self, file: F, drained: dict[int, int]) -> None:
        with contextlib.suppress(UnavailableError, OutcomeUnknownError, LogMisfitError):
            while await self.in_thread(file.store.prune, drained, PRUNE_WAIT_S):
                pass

    async def close(self) -> None:
        """Make durable what was taken; what is not drained stays for the next process."""
        async with self._opening:
            for file in list(self):
                if file.log is not None:
                    await file.log.close()
                await self._prune(file, file.drained())
                await self._let_go(file)
        self._thread.shutdown(wait=False)

    async def _let_go(self, file: F) -> None:
        empty = False
        with contextlib.suppress(SluiceError):
            bounds, drained = await self.in_thread(file.store.bounds), file.drained()
            empty = all(start == end or end <= drained.get(number, 0) for number, (start, end) in bounds.items())
        await self.in_thread(file.store.close)
        gone = empty and await self._end(file.spool)
        await self.in_thread(file.claim.delete if gone else file.claim.release)

    # ------------------------------------------------------------ the rest

    def complain(self, spool: UUID | None, text: str) -> None:
        """Once for each cause."""
        if self._complaints.get(spool) != text:
            self._complaints[spool] = text
            self._words.log.error(self._words.complaint, extra={"reason": text})

    async def in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """In the one thread that reads all these files."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(call, *arguments))
