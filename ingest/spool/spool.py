"""The spool of one process: takes records while the log cannot be reached, and drains them in order when it can.

A partition is *held* from the first record it spools until everything spooled of it is acknowledged by the log; until
then all its new records go through the spool, so that none overtakes another. What dead processes left is adopted and
drained first. Left out: files (`files`), what is sent at once (`windows`), who is told what (`ingest.http`).
"""

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from ingest.metrics import IngestMetrics
from ingest.settings import SpoolSettings
from ingest.spool.ends import End, unsaid
from ingest.spool.stretches import WORDS, SpoolFile, Stretch
from ingest.spool.used import LINGER_MS_MAX, UsedFiles
from ingest.spool.windows import Window, Windows
from runtime.clock import Clock
from runtime.errors import OutcomeUnknownError, OverloadedError, SluiceError, UnavailableError
from runtime.log import LogSettings
from runtime.log.port import Log
from runtime.log.sqlite_store import Store
from schemas.record import LATE_VERSION, PG_EPOCH_US, Record, decode, encode

_log = logging.getLogger("sluice.spool")

TICK_S: Final = 1.0
ADOPT_EVERY_S: Final = 5.0
#: With no more than this many records left, new ones wait until those are in the log, and then go there themselves:
#: under a steady load the spool would never be empty.
CUT_OVER_RECORDS: Final = 2_000
USABLE_POLL_S: Final = 0.1
RETRY_S: Final = 0.1
RETRY_S_MAX: Final = 2.0


class Kept(NamedTuple):
    """Where a record that went through the spool stands."""

    spool: bytes
    """The spool's id; empty for one that went to the log after all."""
    position: int


class _Waiting(NamedTuple):
    """A record and who waits for it."""

    body: bytes
    future: "asyncio.Future[Kept]"


class _Lane:
    """One partition of the log, and what is to be drained into it."""

    __slots__ = ("cut_over", "partition", "settled", "stretches", "task", "under_way")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.stretches: list[tuple[SpoolFile, Stretch]] = []
        self.under_way = 0
        """Appends to the spool that are not decided yet."""
        self.settled = asyncio.Event()
        self.cut_over: list[_Waiting] | None = None
        """What waits for the last of the spool to be in the log, while that is near."""
        self.task: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        return sum(stretch.end - stretch.next for _, stretch in self.stretches)


class Spool:
    """One process's spool. Belongs to one event loop; `start` begins, `close` leaves the rest to the next process."""

    def __init__(
        self,
        *,
        log: Log,
        directory: Path,
        settings: SpoolSettings,
        log_settings: LogSettings,
        clock: Clock,
        metrics: IngestMetrics,
        elders: Sequence[Path] = (),
        end: End = unsaid,
    ) -> None:
        """`elders`: where spools of the log's earlier generations lie, to be drained into this one.

        `end` is told of every spool before its file is deleted.
        """
        self._log = log
        self._directory = directory
        self._settings = settings
        self._log_settings = log_settings
        self._clock = clock
        self._metrics = metrics
        self._lanes = [_Lane(partition) for partition in range(log.partitions)]
        self._held: set[int] = set()
        self._files = UsedFiles(
            [*elders, directory],
            log.partitions,
            dataclasses.replace(log_settings, log_linger_ms=min(log_settings.log_linger_ms, LINGER_MS_MAX)),
            make=SpoolFile,
            damaged=metrics.spool_damaged_files.inc,
            end=end,
            words=WORDS,
        )
        self._opening: asyncio.Task[None] | None = None
        self._unwritten: list[tuple[_Lane, _Waiting]] = []
        self._waiting_bytes = 0
        self._bytes = 0
        self._full: str | None = None
        self._no_file: str | None = None
        self._moved: list[SpoolFile] = []
        """Spools of another partition count: their devices have changed places."""
        self._since = 0.0
        self._drained = 0
        self._closed = False
        self._keeping: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what the ingest face asks

    def holds(self, partition: int) -> bool:
        """Whether new records of a partition of the log have to go through the spool."""
        return partition in self._held

    @property
    def refusal(self) -> str | None:
        """Why it takes no records right now; None when it does."""
        if self._full is not None or self._no_file is not None:
            return self._full or self._no_file
        own = None if self._files.own is None else self._files.own.log
        held = self._bytes + self._waiting_bytes + (0 if own is None else own.queued_bytes)
        if held >= self._settings.spool_bytes_max:
            return f"the spool holds {held} bytes (SLUICE_SPOOL_BYTES_MAX)"
        return None if own is None else own.trouble

    @property
    def note(self) -> str | None:
        """What an operator should know of it; None when nothing is spooled."""
        if not self._held:
            return None
        age_s, depth, refusal = self._age_s(), sum(lane.depth for lane in self._lanes), self.refusal
        full = "" if refusal is None else f"; none can be added: {refusal}"
        why = "" if self._log.trouble is None else f": {self._log.trouble}"
        waiting = f"{depth} records of {len(self._held)} partitions wait for the log, the oldest for {age_s:.0f} s"
        return f"{waiting}{why}{full}"

    def append(self, partition: int, body: bytes) -> "asyncio.Future[Kept]":
        """Keep a record; the future tells where once it is durable.

        It raises `UnavailableError` where the record was certainly not kept, `OutcomeUnknownError` where that is
        open, and `OverloadedError`.
        """
        if self._closed or self.refusal is not None:
            return _failed(UnavailableError(self.refusal or "the spool is closed"))
        if self._waiting_bytes + len(body) > self._log_settings.log_queue_bytes_max:
            text = f"{self._waiting_bytes} bytes wait for the spool (SLUICE_LOG_QUEUE_BYTES_MAX)"
            return _failed(OverloadedError(text))
        lane, waiting = self._lanes[partition], _Waiting(body, asyncio.get_running_loop().create_future())
        if lane.cut_over is not None:
            self._waiting_bytes += len(body)
            lane.cut_over.append(waiting)
        else:
            self._write(lane, waiting)
        return waiting.future

    def rescue(self, partition: int, record: Record, body: bytes, error: Exception) -> "asyncio.Future[Kept] | None":
        """Keep a record that the log failed to take, if it failed because it cannot be reached; else None.

        Where it may stand in the log none the less, the copy says so.
        """
        if isinstance(error, OutcomeUnknownError):
            body = encode(msgspec.structs.replace(record, version=LATE_VERSION, in_doubt=True))
        elif isinstance(error, OverloadedError) and self._log.trouble is None:
            return None
        return self.append(partition, body)

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Adopt what dead processes left: from then on `holds` tells the truth."""
        await self._adopt()
        self._keeping = asyncio.create_task(self._keep(), name="spool")

    async def close(self) -> None:
        """Make durable what was taken; what is not drained stays for the next process."""
        self._closed = True
        tasks = [task for task in (self._keeping, *(lane.task for lane in self._lanes)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes:
            self._give_up_cut_over(lane)
        if self._opening is not None:
            await asyncio.gather(self._opening, return_exceptions=True)
        await self._files.close()
        self._publish()

    async def _keep(self) -> None:
        """Tell of what is held, forget what is drained, adopt what others left."""
        loop = asyncio.get_running_loop()
        due = loop.time() + ADOPT_EVERY_S
        while True:
            await asyncio.sleep(TICK_S)
            try:
                age_s = self._age_s()
                over = age_s > self._settings.spool_age_max_s
                self._full = f"a spooled record has waited {age_s:.0f} s (SLUICE_SPOOL_AGE_MAX_S)" if over else None
                self._try_again()
                self._publish()
                for partition in await self._files.look_behind():
                    self._hold(self._lanes[partition])
                if loop.time() >= due:
                    await self._forget_drained()
                    await self._adopt()
                    due = loop.time() + ADOPT_EVERY_S
            except Exception:
                _log.exception("the spool's housekeeping failed")

    def _try_again(self) -> None:
        """A disk that refused a file is asked once a tick, and not by a request, which would be refused."""
        if self._no_file is None or self._opening is not None:
            return
        if self._log.trouble is None and not self._held:
            self._no_file = None  # none is needed
        else:
            self._opening = asyncio.get_running_loop().create_task(self._open_own(), name="spool-open")

    # ------------------------------------------------------------ taking records

    def _write(self, lane: _Lane, waiting: _Waiting) -> None:
        self._hold(lane)
        lane.under_way += 1
        if self._files.own is not None:
            self._write_to(self._files.own, lane, waiting)
            return
        self._waiting_bytes += len(waiting.body)
        self._unwritten.append((lane, waiting))
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open_own(), name="spool-open")

    async def _open_own(self) -> None:
        """Make the file that this process writes, and write what waits for it."""
        file: SpoolFile | None = None
        try:
            file = await self._files.open_own()
        except UnavailableError as error:
            self._no_file = str(error)
        else:
            for lane in self._lanes:
                stretch = file.parts[lane.partition] = Stretch(lane.partition, 0, 0, 0)
                lane.stretches.append((file, stretch))
            if self._no_file is not None:
                self._no_file = None
                _log.info("a spool can be made again", extra={"directory": str(self._directory)})
        self._opening = None
        unwritten, self._unwritten = self._unwritten, []
        for lane, waiting in unwritten:
            self._waiting_bytes -= len(waiting.body)
            if file is not None:
                self._write_to(file, lane, waiting)
            else:
                self._fail(lane, waiting, UnavailableError(self._no_file))

    def _write_to(self, file: SpoolFile, lane: _Lane, waiting: _Waiting) -> None:
        log = file.log
        try:
            if log is None:
                raise UnavailableError("the spool's file was set aside")
            inner = log.append(lane.partition, waiting.body)
        except SluiceError as error:
            self._fail(lane, waiting, error)
            return
        inner.add_done_callback(functools.partial(self._written, file, lane, waiting))

    def _written(self, file: SpoolFile, lane: _Lane, waiting: _Waiting, inner: "asyncio.Future[int]") -> None:
        error = inner.exception()
        if error is not None:
            file.uncertain = file.uncertain or isinstance(error, OutcomeUnknownError)
            self._fail(lane, waiting, error)
            return
        sequence = inner.result()
        stretch = file.parts[lane.partition]
        if stretch.next == stretch.end:
            stretch.oldest_us = self._now_us()
        stretch.end = max(stretch.end, sequence + 1)
        size = len(waiting.body)
        file.size += size
        self._bytes += size
        self._metrics.spooled.add(_APPENDED)
        if not waiting.future.done():  # its client may have gone
            waiting.future.set_result(Kept(file.spool.bytes, sequence))
        self._settle(lane)

    def _fail(self, lane: _Lane, waiting: _Waiting, error: BaseException) -> None:
        if not waiting.future.done():
            waiting.future.set_exception(error)
        self._settle(lane)

    def _settle(self, lane: _Lane) -> None:
        lane.under_way -= 1
        if not lane.under_way:
            lane.settled.set()

    def _hold(self, lane: _Lane) -> None:
        if not self._held:
            self._since, self._drained = self._clock.monotonic(), 0
            _log.warning(
                "spooling: records are acknowledged from the local disk until the log can be used again; see to the "
                "log, and keep the disk",
                extra={"directory": str(self._directory), "reason": self._log.trouble or "older ones are drained"},
            )
        self._held.add(lane.partition)
        lane.settled.clear()
        if lane.task is None and not self._closed:
            lane.task = asyncio.get_running_loop().create_task(self._drain(lane), name="spool-drain")

    # ------------------------------------------------------------ draining

    async def _drain(self, lane: _Lane) -> None:
        """One window after the other, each in the log before the next is sent, until nothing is held."""
        window: tuple[SpoolFile, Stretch, Window] | None = None
        retry_s = RETRY_S
        while True:
            try:
                await self._usable(lane)
                if lane.depth <= CUT_OVER_RECORDS and lane.cut_over is None and not self._moved:
                    lane.cut_over = []
                window = window or await self._next_window(lane)
                if window is None:
                    if lane.under_way:
                        await lane.settled.wait()
                        continue
                    if not any(file.depth for file in self._moved):
                        self._release(lane)
                        return
                    self._give_up_cut_over(lane)
                    await asyncio.sleep(USABLE_POLL_S)
                    continue
                await self._log.append_all(lane.partition, window[2].bodies)
            except SluiceError as error:
                if not isinstance(error, UnavailableError | OutcomeUnknownError | OverloadedError):
                    _log.exception("unexpected")
                _log.debug("a window was not drained", extra={"partition": lane.partition, "reason": str(error)})
                self._give_up_cut_over(lane)
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_S_MAX)
            except Exception as error:
                if not isinstance(error, ValueError):
                    _log.exception("unexpected", extra={"partition": lane.partition})
                self._files.complain(None, f"{error}: raise SLUICE_LOG_BATCH_BYTES_MAX to what it was")
                self._give_up_cut_over(lane)
                window = None
                await asyncio.sleep(RETRY_S_MAX)
            else:
                self._acknowledged(*window)
                window, retry_s = None, RETRY_S

    async def _usable(self, lane: _Lane) -> None:
        while self._log.trouble is not None:
            self._give_up_cut_over(lane)
            await asyncio.sleep(USABLE_POLL_S)

    async def _next_window(self, lane: _Lane) -> tuple[SpoolFile, Stretch, Window] | None:
        for file, stretch in lane.stretches:
            if stretch.next < stretch.end:
                return file, stretch, await self._read(file, stretch)
        return None

    async def _read(self, file: SpoolFile, stretch: Stretch) -> Window:
        """Raises `UnavailableError` for a file that cannot be read now."""

        def read(store: Store) -> Window:
            windows = Windows(store, file.spool, self._log.body_bytes_max, self._clock)
            return windows.read(stretch.partition, stretch.next, stretch.end)

        return await self._files.read(file, read)

    def _acknowledged(self, file: SpoolFile, stretch: Stretch, window: Window) -> None:
        count = window.through - window.first
        stretch.next = window.through
        stretch.oldest_us = max(stretch.oldest_us, window.received_us)
        file.size -= window.size
        self._bytes -= window.size
        self._drained += count - window.lost
        self._metrics.spooled.add(_DRAINED, count - window.lost)
        if window.lost:
            self._metrics.spooled.add(_LOST, window.lost)
            _log.error(
                "spooled records are lost: their file was damaged, and receipts and books say so",
                extra={
                    "spool": str(file.spool),
                    "partition": stretch.partition,
                    "records": f"{window.first} to {window.through - 1}",
                },
            )
        if not file.depth and file.size and file is not self._files.own:
            self._bytes -= file.size  # of what was lost
            file.size = 0

    def _release(self, lane: _Lane) -> None:
        """Everything spooled is in the log: what waited for that goes there itself, and so does all to come."""
        waiting, lane.cut_over = lane.cut_over or [], None
        lane.task = None
        self._held.discard(lane.partition)
        if not self._held:
            after_s = round(self._clock.monotonic() - self._since, 1)
            _log.info("the spool is drained", extra={"records": self._drained, "after_s": after_s})
        for one in waiting:
            self._waiting_bytes -= len(one.body)
            self._append_to_log(lane, one)

    def _append_to_log(self, lane: _Lane, waiting: _Waiting) -> None:
        if self.holds(lane.partition):  # one before it was refused, and spooled
            self._write(lane, waiting)
            return
        try:
            inner = self._log.append(lane.partition, waiting.body)
        except SluiceError as error:
            self._went(lane, waiting, error)
        else:
            inner.add_done_callback(lambda done: self._went(lane, waiting, done.exception() or done.result()))

    def _went(self, lane: _Lane, waiting: _Waiting, told: int | BaseException) -> None:
        """A record that waited for the cut-over went to the log, or could not."""
        if isinstance(told, int):
            if not waiting.future.done():
                waiting.future.set_result(Kept(b"", told))
        elif isinstance(told, OverloadedError) and self._log.trouble is None:
            if not waiting.future.done():
                waiting.future.set_exception(told)
        else:
            body = waiting.body
            if isinstance(told, OutcomeUnknownError):
                body = encode(msgspec.structs.replace(decode(body), version=LATE_VERSION, in_doubt=True))
            self._write(lane, waiting._replace(body=body))

    def _give_up_cut_over(self, lane: _Lane) -> None:
        """The log cannot be used after all: what waited is spooled."""
        waiting, lane.cut_over = lane.cut_over or [], None
        for one in waiting:
            self._waiting_bytes -= len(one.body)
            self._write(lane, one)

    # ------------------------------------------------------------ files

    async def _adopt(self) -> None:
        """Take over what dead processes left, as far as it can be read now."""
        for file in await self._files.adopt():
            self._bytes += file.size
            for stretch in file.parts.values():
                self._take_on(file, stretch)
            if file.depth and file.partitions != len(self._lanes):
                self._moved.append(file)
                for lane in self._lanes:
                    self._hold(lane)

    def _take_on(self, file: SpoolFile, stretch: Stretch) -> None:
        """Drain before what this process spools itself."""
        lane = self._lanes[stretch.partition % len(self._lanes)]
        own = lane.stretches[-1:] if lane.stretches and lane.stretches[-1][0] is self._files.own else []
        lane.stretches[len(lane.stretches) - len(own) :] = [(file, stretch), *own]
        self._hold(lane)

    async def _forget_drained(self) -> None:
        """Delete adopted files that are drained, and in others what is."""
        gone = await self._files.tidy()
        for lane in self._lanes:
            lane.stretches = [one for one in lane.stretches if one[0] not in gone]
        self._moved = [file for file in self._moved if file not in gone]

    # ------------------------------------------------------------ the rest

    def _age_s(self) -> float:
        oldest = [
            stretch.oldest_us
            for lane in self._lanes
            for _, stretch in lane.stretches
            if stretch.next < stretch.end and stretch.oldest_us
        ]
        return max(0.0, (self._now_us() - min(oldest)) / 1e6) if oldest else 0.0

    def _now_us(self) -> int:
        return self._clock.now_us() - PG_EPOCH_US

    def _publish(self) -> None:
        metrics = self._metrics
        metrics.spool_depth_records.set(sum(lane.depth for lane in self._lanes))
        metrics.spool_depth_bytes.set(self._bytes)
        metrics.spool_age_seconds.set(self._age_s())
        metrics.spool_partitions.set(len(self._held))


_APPENDED: Final = ("appended",)
_DRAINED: Final = ("drained",)
_LOST: Final = ("lost",)


def _failed(error: SluiceError) -> "asyncio.Future[Kept]":
    future: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
