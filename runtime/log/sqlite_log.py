"""The log on one SQLite file: appends that share a commit, readers that wake on it.

A thread writes, each reader has its own, and several processes of one machine may use one file. Left out: the file
itself (`sqlite_store`).
"""

import asyncio
import contextlib
import functools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar
from uuid import UUID

from runtime.errors import OutcomeUnknownError, OverloadedError, SluiceError, UnavailableError
from runtime.log.keeping import Kept
from runtime.log.port import Bounds, LogMisfitError, Slice, check_together
from runtime.log.settings import LogSettings
from runtime.log.sqlite_store import Store
from runtime.log.waiting import Landed, Trouble, fail, failed, settle

COMMIT_BYTES_MAX: Final = 8_000_000  # bounds how long one commit holds other processes up
POLL_S: Final = 0.02  # how late a commit of another process is seen, at worst
WATCH_S: Final = 1.0
PRUNE_EVERY_S: Final = 1.0
HANDOVER_GRACE_S: Final = 0.5
#: Kept on trial before a file counts as usable again: on a full disk a page or two can often be written.
TRIAL_BYTES: Final = 256_000

T = TypeVar("T")

_log = logging.getLogger("sluice.log")


class _Group:
    """Records that are written in one transaction, by partition in the order of their appends."""

    __slots__ = ("bodies", "born", "futures", "size")

    def __init__(self, born: float) -> None:
        self.born = born
        self.size = 0
        self.bodies: dict[int, list[bytes]] = {}
        self.futures: dict[int, list[asyncio.Future[int]]] = {}

    def fail(self, error: type[SluiceError], text: str) -> None:
        for futures in self.futures.values():
            fail(futures, error, text)


class SqliteLog:
    """One process's hold on a log that SQLite keeps. Made by `engines.open_log`; belongs to one event loop."""

    def __init__(
        self, settings: LogSettings, store: Store, source: UUID, partitions: int, kept: Kept | None = None
    ) -> None:
        self.source = source
        self.partitions = partitions
        self.body_bytes_max = settings.log_batch_bytes_max
        self._settings = settings
        self._linger_s = settings.log_linger_ms / 1000
        self._timeout_s = settings.log_append_timeout_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-writer")
        self._open_group: _Group | None = None
        self._waiting: deque[_Group] = deque()
        self._writing: _Group | None = None
        self._queued_bytes = 0
        self._linger: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._readers: set[SqliteReader] = set()
        self._landed = Landed(self._prune, PRUNE_EVERY_S)
        self._kept = kept
        self._trouble = Trouble(str(store.path))
        self._closed = False
        self._checking = False
        self._failed_bytes = 0
        """Of the largest commit that failed in this trouble; a smaller one that succeeds does not end it."""
        self._watch = self._loop.create_task(self._keep_watch(), name="log-watch")

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    @property
    def trouble(self) -> str | None:
        return self._trouble.reason

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        if self._closed:
            return failed(self._loop, "the log is closed")
        size = len(body)
        if size > self.body_bytes_max:
            raise ValueError(f"a record of {size} bytes: at most {self.body_bytes_max} (SLUICE_LOG_BATCH_BYTES_MAX)")
        if self._queued_bytes + size > self._settings.log_queue_bytes_max:
            raise OverloadedError(f"{self._queued_bytes} bytes wait for the log (SLUICE_LOG_QUEUE_BYTES_MAX)")
        group = self._open_group
        if group is None:
            group = self._begin_group()
        bodies = group.bodies.get(partition)
        if bodies is None:
            bodies = self._begin_partition(group, partition)
        future = self._loop.create_future()
        bodies.append(body)
        group.futures[partition].append(future)
        group.size += size
        self._queued_bytes += size
        if group.size >= COMMIT_BYTES_MAX:
            self._end_group()
        return future

    def append_all(self, partition: int, bodies: Sequence[bytes]) -> "asyncio.Future[int]":
        if self._closed:
            return failed(self._loop, "the log is closed")
        size = check_together(bodies, self.body_bytes_max)
        if self._queued_bytes + size > self._settings.log_queue_bytes_max:
            raise OverloadedError(f"{self._queued_bytes} bytes wait for the log (SLUICE_LOG_QUEUE_BYTES_MAX)")
        # One group, and so one transaction.
        group = self._begin_group() if self._open_group is None else self._open_group
        if partition not in group.bodies:
            self._begin_partition(group, partition)
        future = self._loop.create_future()
        group.bodies[partition] += bodies
        group.futures[partition] += [future] * len(bodies)  # settled by the first, which the others leave alone
        group.size += size
        self._queued_bytes += size
        if group.size >= COMMIT_BYTES_MAX:
            self._end_group()
        return future

    def _begin_group(self) -> _Group:
        self._open_group = group = _Group(self._loop.time())
        self._idle.clear()
        if self._writing is None:
            self._linger = self._loop.call_later(self._linger_s, self._end_group)
        return group

    def _begin_partition(self, group: _Group, partition: int) -> list[bytes]:
        if not 0 <= partition < self.partitions:
            raise ValueError(f"partition {partition}: the log has {self.partitions}")
        group.futures[partition] = []
        return group.bodies.setdefault(partition, [])

    def _end_group(self) -> None:
        """The linger is over, or the group is large enough."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._open_group is not None:
            self._waiting.append(self._open_group)
            self._open_group = None
        if self._writing is None and self._waiting:
            self._write(self._waiting.popleft())

    def _write(self, group: _Group) -> None:
        self._writing = group
        wait_s = max(0.0, group.born + self._timeout_s - self._loop.time())
        job = self._loop.run_in_executor(self._thread, self._store.append, group.bodies, wait_s)
        job.add_done_callback(functools.partial(self._written, group))

    def _written(self, group: _Group, job: "asyncio.Future[dict[int, int]]") -> None:
        error = job.exception()
        if error is None:
            for partition, first in job.result().items():
                settle(group.futures[partition], first)
            if group.size >= self._failed_bytes:
                self._recovered()
        else:
            self._failed_bytes = max(self._failed_bytes, group.size)
            self._note(error)
            certain = isinstance(error, UnavailableError | LogMisfitError)
            group.fail(UnavailableError if certain else OutcomeUnknownError, str(error))
        self._queued_bytes -= group.size
        self._writing = None
        for reader in self._readers:
            reader.wake()
        self._go_on()

    def _go_on(self) -> None:
        if self._waiting:
            self._write(self._waiting.popleft())
        elif self._open_group is not None:
            due = self._open_group.born + self._linger_s
            self._linger = self._loop.call_at(due, self._end_group)
        else:
            self._idle.set()

    def _note(self, error: BaseException) -> None:
        if isinstance(error, SluiceError):
            self._trouble.begin(str(error))
        else:
            self._trouble.begin(f"unexpected: {error!r}")
            _log.error("unexpected", extra={"log": str(self._store.path)}, exc_info=error)

    async def _keep_watch(self) -> None:
        """Give up on appends past their time, and find out on its own when trouble begins or is over."""
        while True:
            await asyncio.sleep(min(WATCH_S, self._timeout_s / 4))
            self._expire(self._loop.time() - self._timeout_s)
            if self._writing is None and not self._checking:
                self._checking = True  # not awaited: the disk may hang, and appends have to expire none the less
                self._loop.run_in_executor(self._thread, self._check).add_done_callback(self._checked)

    def _checked(self, job: "asyncio.Future[None]") -> None:
        self._checking = False
        if not job.cancelled() and (error := job.exception()) is not None:
            self._note(error)

    def _check(self) -> None:
        """In the thread: the file is still there and, after trouble, can be written again."""
        if self._trouble.reason is None:
            self._store.bounds()
        else:
            self._store.probe(max(TRIAL_BYTES, self._failed_bytes), self._timeout_s)
            self._loop.call_soon_threadsafe(self._recovered)

    def _recovered(self) -> None:
        self._failed_bytes = 0
        self._trouble.over()

    def _expire(self, born_before: float) -> None:
        if self._writing is not None and self._open_group is not None and self._open_group.born < born_before:
            self._end_group()
        while self._waiting and self._waiting[0].born < born_before:
            group = self._waiting.popleft()
            self._queued_bytes -= group.size
            group.fail(UnavailableError, f"not written within {self._timeout_s} s (SLUICE_LOG_APPEND_TIMEOUT_MS)")
        if self._writing is not None and self._writing.born < born_before - HANDOVER_GRACE_S:
            text = f"the disk has not confirmed a commit within {self._timeout_s} s"
            self._trouble.begin(text)
            self._writing.fail(OutcomeUnknownError, text)

    async def bounds(self) -> dict[int, Bounds]:
        return await self._in_thread(self._store.bounds)

    async def expiring(self, share: float) -> dict[int, int]:
        return {}  # only what has landed is pruned

    def reader(self) -> "SqliteReader":
        store = Store(self._store.path, self._store.identity)
        reader = SqliteReader(store, self._trouble, self._readers.discard)
        self._readers.add(reader)
        return reader

    async def landed(self, positions: Mapping[int, int]) -> None:
        if not self._closed:
            self._landed.tell(positions)

    async def _prune(self, positions: dict[int, int]) -> None:
        if self._kept is not None:
            positions = self._kept.due(positions, await self._in_thread(self._store.used_bytes))
        while await self._in_thread(self._store.prune, positions, self._timeout_s):
            pass  # each round is a transaction of its own, and appends are written between them

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._end_group()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self._timeout_s + HANDOVER_GRACE_S)
        await self._landed.close()
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        self._expire(math.inf)
        for reader in list(self._readers):
            await reader.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._in_thread(self._store.close), self._timeout_s)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await self._loop.run_in_executor(self._thread, functools.partial(call, *arguments))


class SqliteReader:
    """Reads in a thread of its own, where it also waits for news."""

    def __init__(self, store: Store, trouble: Trouble, forget: "Callable[[SqliteReader], None]") -> None:
        self._store = store
        self._trouble = trouble
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-reader")
        self._positions: dict[int, int] = {}
        self._news = threading.Event()
        self._stop = threading.Event()

    def wake(self) -> None:
        """Something was committed in this process."""
        self._news.set()

    async def assign(self, positions: Mapping[int, int]) -> None:
        self._positions = dict(positions)

    async def read(self, *, bytes_max: int, wait_s: float) -> list[Slice]:
        positions = self._positions
        self._stop = stop = threading.Event()
        ask = functools.partial(self._wait_and_read, dict(positions), bytes_max, wait_s, stop)
        try:
            slices = await self._loop.run_in_executor(self._thread, ask)
        except asyncio.CancelledError:
            stop.set()
            self._news.set()
            raise
        if positions is not self._positions:  # assigned anew meanwhile
            return []
        for part in slices:
            # Taken out and put back at the end, so that a busy partition does not keep the others from their turn.
            del positions[part.partition]
            positions[part.partition] = part.next_position
        return slices

    def _wait_and_read(
        self, positions: Mapping[int, int], bytes_max: int, wait_s: float, stop: threading.Event
    ) -> list[Slice]:
        deadline = time.monotonic() + wait_s
        while True:
            self._news.clear()
            slices = self._try_read(positions, bytes_max)
            if slices or stop.is_set() or not self._wait_for_news(deadline):
                return slices

    def _try_read(self, positions: Mapping[int, int], bytes_max: int) -> list[Slice]:
        try:
            return self._store.read(positions, bytes_max)
        except UnavailableError as error:
            self._loop.call_soon_threadsafe(self._trouble.begin, str(error))
            return []

    def _wait_for_news(self, deadline: float) -> bool:
        """Whether there may be something new; False when the time is over."""
        while (left := deadline - time.monotonic()) > 0:
            if self._news.wait(min(POLL_S, left)):
                return True
            try:
                if self._store.changed():
                    return True
            except UnavailableError as error:
                self._loop.call_soon_threadsafe(self._trouble.begin, str(error))
        return False

    async def close(self) -> None:
        self._forget(self)
        self._stop.set()
        self._news.set()
        with contextlib.suppress(RuntimeError):  # shut down before
            await self._loop.run_in_executor(self._thread, self._store.close)
        self._thread.shutdown(wait=False)
