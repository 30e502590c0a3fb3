"""The paced lane: takes what is over a limit, durably, and lets it into the log at the rate that the limit permits.

Whoever has a backlog owns a slot of each partition that it concerns, until that is drained: a slow device holds
nobody up. What is let in is counted as a live request is, but only up to a share of what the minute has come to, so
that live requests come first. Left out: files (`files`), whom an answer tells what (`ingest.http`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from ingest.limits import Cost, Limits, Sender
from ingest.metrics import IngestMetrics
from ingest.paced import entries
from ingest.paced.entries import Ahead, Entry
from ingest.paced.files import Backlog, File, Files
from ingest.paced.owners import Owner, refresh, subject_of
from ingest.registry import Connections, ask
from ingest.settings import PacedSettings
from ingest.spool.ends import ends_in
from ingest.spool.spool import Kept, Spool
from ingest.spool.windows import WINDOW_BYTES, Window, Windows
from runtime.clock import Clock
from runtime.errors import OutcomeUnknownError, OverloadedError, SluiceError, UnavailableError
from runtime.log import LogSettings
from runtime.log.port import Log
from runtime.log.sqlite_store import Store
from schemas.record import PG_EPOCH_US, UnknownVersionError

_log = logging.getLogger("sluice.paced")

TICK_S: Final = 1.0
TIDY_EVERY_S: Final = 5.0
#: How soon it is felt that something is permitted, or that the log can be used.
POLL_S: Final = 0.25
RETRY_S: Final = 0.1
RETRY_S_MAX: Final = 2.0
#: Looked ahead first, and doubled while the limit permits everything that was found.
REACH_BYTES: Final = 4_096

NOTHING: Final = Cost(0, 0, 0)


class LaneFullError(SluiceError):
    """A bound of the lane is reached and nothing was done; says which, for the client."""


class Item(NamedTuple):
    """A record on its way into the lane."""

    partition: int
    """Of the log: its device's."""
    cost: Cost
    body: bytes


class PacedLane:
    """One process's lane. Belongs to one event loop; `start` begins, `close` leaves the rest to the next process."""

    def __init__(
        self,
        *,
        log: Log,
        spool: Spool | None,
        limits: Limits,
        pool: Connections,
        directory: Path,
        settings: PacedSettings,
        log_settings: LogSettings,
        clock: Clock,
        metrics: IngestMetrics,
        elders: Sequence[Path] = (),
    ) -> None:
        """`spool` is the one whose records go before the lane's. `elders`: as of the spool."""
        self._log = log
        self._spool = spool
        self._limits = limits
        self._pool = pool
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        slots = max(1, settings.paced_slots_max // log.partitions) * log.partitions
        self._files = Files([*elders, directory], slots, log_settings, metrics.spool_damaged_files.inc, ends_in(pool))
        self.owners: dict[bytes, Owner] = {}
        """Who has a backlog here, by `subject_of`."""
        self._slots: dict[tuple[bytes, int], Backlog] = {}
        """The own file's backlogs, by owner and partition of the log."""
        self._adopted: list[File] = []
        """Files whose backlogs are not drained yet."""
        self._cannot_write = False
        self._closed = False
        self._keeping: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ what the ingest face asks

    def has(self, sender: Sender) -> bool:
        """Whether it has a backlog here, which what it wants paced is to follow."""
        return subject_of(sender) in self.owners

    def refusal(self, sender: Sender, size: int = 0, cost: Cost = NOTHING) -> str | None:
        """Why it does not take so many bytes more that cost so much; None when it does."""
        if self._closed or self._cannot_write:
            return "the paced lane cannot be used right now"
        settings, owner = self._settings, self.owners.get(subject_of(sender))
        if (owner.size if owner else 0) + size > settings.paced_sender_bytes_max:
            return f"the paced lane is full for this {sender.kind} (SLUICE_PACED_SENDER_BYTES_MAX)"
        if self._size_of(sender.organisation) + size > settings.paced_bytes_max * settings.paced_organisation_share:
            return "the paced lane is full for this organisation (SLUICE_PACED_ORGANISATION_SHARE)"
        if self._size() + size > settings.paced_bytes_max:
            return "the paced lane is full (SLUICE_PACED_BYTES_MAX)"
        return self._too_slow(sender, owner, cost)

    def _size(self) -> int:
        return sum(backlog.size for file in self._files for backlog in file.backlogs.values())

    def _size_of(self, organisation: bytes) -> int:
        return sum(owner.size for owner in self.owners.values() if owner.organisation == organisation)

    def _too_slow(self, sender: Sender, owner: Owner | None, cost: Cost) -> str | None:
        age_max_s = self._settings.paced_age_max_s
        if owner is not None and owner.oldest_us and self._now_us() - owner.oldest_us > age_max_s * 1e6:
            return (
                f"the paced lane is full for this {sender.kind}: what it has there is late (SLUICE_PACED_AGE_MAX_S)"
            )
        due_s = self._limits.seconds_for(sender, _sum([cost, _due(owner)]), self._settings.paced_share)
        if due_s > age_max_s:
            return (
                f"the paced lane is full for this {sender.kind}: at the permitted rate its backlog would take "
                f"{due_s / 3600:.1f} h (SLUICE_PACED_AGE_MAX_S)"
            )
        return None

    def until_us(self, sender: Sender) -> int:
        """When its backlog should be in the log, if the rate is all that it waits for: µs since 1970."""
        due = _due(self.owners.get(subject_of(sender)))
        return self._clock.now_us() + round(
            self._limits.seconds_for(sender, due, self._settings.paced_share) * 1_000_000
        )

    async def take(self, sender: Sender, items: Sequence[Item]) -> list[tuple[int, "asyncio.Future[Kept]"]]:
        """Keep a request's records: of each the slot, and a future that tells where it stands there once durable.

        Raises `LaneFullError`, and `UnavailableError` when nothing can be written; then nothing was done. A future
        raises `UnavailableError` where its record was certainly not kept, `OutcomeUnknownError` where that is open,
        and `OverloadedError`.
        """
        if self._closed:
            raise UnavailableError("the paced lane is closed")
        try:
            file = await self._files.open_own()
        except UnavailableError:
            self._cannot_write = True
            raise
        size, cost = sum(len(item.body) for item in items), _sum(item.cost for item in items)
        if (reason := self.refusal(sender, size, cost)) is not None:
            raise LaneFullError(reason)
        owner = self._owner(sender.kind, sender.organisation, subject_of(sender))
        owner.learn(sender.limits)
        try:
            backlogs = [self._backlog(file, owner, item.partition) for item in items]
        except LaneFullError:
            for backlog in list(owner.backlogs):  # some were given a slot for nothing
                self._go_on(backlog)
            self._forget_idle(owner)
            raise
        return [
            (backlog.slot, self._append(owner, backlog, item)) for backlog, item in zip(backlogs, items, strict=True)
        ]

    # ------------------------------------------------------------ life

    @property
    def note(self) -> str | None:
        """What an operator should know of it; None when nothing waits."""
        depth, senders = sum(file.depth for file in self._files), len(self.owners)
        if not depth:
            return None
        return f"{depth} records of {senders} senders wait for their limits, the oldest for {self._age_s():.0f} s"

    async def start(self) -> None:
        """Begin with what dead processes left."""
        self._keeping = asyncio.create_task(self._keep(), name="paced lane")

    async def close(self) -> None:
        """Make durable what was taken; what is not drained stays for the next process."""
        self._closed = True
        draining = [backlog.task for file in self._files for backlog in file.backlogs.values()]
        tasks = [task for task in (self._keeping, *draining) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._publish()
        await self._files.close()

    async def _keep(self) -> None:
        """Tell of what waits, follow its limits, forget what is drained, adopt what others left."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            try:
                self._publish()
                self._cannot_write = False  # a disk that refused is asked once a tick, not once a request
                for backlog in await self._files.backlogs_behind():
                    self._go_on(backlog)
                if loop.time() >= due:
                    await self._files.tidy()
                    self._adopted += await self._files.adopt()
                    due = loop.time() + TIDY_EVERY_S
                with suppress(UnavailableError):  # what was adopted, and whose limits were never read, waits
                    while self._adopted:
                        await self._take_over(self._adopted[0])
                        del self._adopted[0]
                    if self.owners:
                        await refresh(self._pool, list(self.owners.values()))
            except Exception:
                _log.exception("the paced lane's housekeeping failed")
            await asyncio.sleep(TICK_S)

    async def _take_over(self, file: File) -> None:
        """Drain what another process left, one task a slot. Raises `UnavailableError` while the database is away.

        What has landed is not paid for again.
        """
        rows = await ask(self._pool, _LANDED, file.spool, timeout_s=_LANDED_TIMEOUT_S)
        landed = {row["partition"]: row["next"] for row in rows}
        for backlog in list(file.backlogs.values()):
            backlog.next = backlog.paid = min(max(backlog.next, landed.get(backlog.slot, 0)), backlog.end)
            with suppress(SluiceError, UnknownVersionError):  # told when it is drained
                self._estimate(backlog, await self._ahead(backlog, 1))
            self._go_on(backlog)

    def _estimate(self, backlog: Backlog, ahead: Ahead) -> None:
        """Whose it is and what it costs, as its first entry tells: nobody has kept count."""
        first = next(filter(None, ahead.entries), None)
        if first is not None:
            self._give(backlog, self._owner(first.kind, first.organisation, first.subject))
            backlog.due = Cost(*(amount * backlog.depth for amount in first.cost))
            backlog.oldest_us = entries.received_us(first)

    # ------------------------------------------------------------ owners and slots

    def _owner(self, kind: str, organisation: bytes, subject: bytes) -> Owner:
        owner = self.owners.get(subject)
        if owner is None:
            owner = self.owners[subject] = Owner(kind, organisation, subject)
        return owner

    def _backlog(self, file: File, owner: Owner, partition: int) -> Backlog:
        """The owner's slot of the own file for a partition of the log. Raises `LaneFullError` when none is free."""
        backlog = self._slots.get((owner.subject, partition))
        if backlog is not None and backlog.file is file:
            return backlog
        slots = range(partition, file.slots, self._log.partitions)
        taken = [
            one.owner for slot in slots if (one := file.backlogs.get(slot)) is not None and one.owner is not None
        ]
        shared = sum(other.organisation == owner.organisation for other in taken)
        if len(taken) == len(slots) or shared >= max(1, len(slots) * self._settings.paced_organisation_share):
            raise LaneFullError("the paced lane is full: too many others have a backlog (SLUICE_PACED_SLOTS_MAX)")
        backlog = next(one for slot in slots if (one := self._slot(file, slot)).owner is None)
        self._slots[owner.subject, partition] = backlog
        self._give(backlog, owner)
        return backlog

    @staticmethod
    def _slot(file: File, slot: int) -> Backlog:
        backlog = file.backlogs.get(slot)
        if backlog is None:
            backlog = file.backlogs[slot] = Backlog(file, slot, 0, 0)
        return backlog

    def _give(self, backlog: Backlog, owner: Owner) -> None:
        self._take_away(backlog)
        backlog.owner = owner
        owner.backlogs.add(backlog)

    def _free(self, backlog: Backlog) -> None:
        """Nothing is left of it: the slot is anybody's, and goes on where it stands."""
        backlog.size, backlog.due, backlog.oldest_us = 0, NOTHING, 0
        self._take_away(backlog)

    def _take_away(self, backlog: Backlog) -> None:
        owner, backlog.owner = backlog.owner, None
        if owner is None:
            return
        owner.backlogs.discard(backlog)
        key = owner.subject, backlog.slot % self._log.partitions
        if self._slots.get(key) is backlog:
            del self._slots[key]
        self._forget_idle(owner)

    def _forget_idle(self, owner: Owner) -> None:
        if not owner.backlogs:
            self.owners.pop(owner.subject, None)

    # ------------------------------------------------------------ taking records

    def _append(self, owner: Owner, backlog: Backlog, item: Item) -> "asyncio.Future[Kept]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Kept] = loop.create_future()
        entry = Entry(entries.VERSION, owner.kind, owner.organisation, owner.subject, *item.cost, item.body)
        body = entries.encode(entry)
        backlog.under_way += 1
        backlog.size += len(body)
        backlog.due = _sum([backlog.due, item.cost])
        try:
            if backlog.file.log is None:
                raise UnavailableError("the file of the paced lane was set aside")
            inner = backlog.file.log.append(backlog.slot, body)
        except SluiceError as error:
            loop.call_soon(self._not_written, backlog, item, len(body), error, future)
        else:
            inner.add_done_callback(partial(self._decided, backlog, item, len(body), future))
        return future

    def _decided(
        self,
        backlog: Backlog,
        item: Item,
        size: int,
        future: "asyncio.Future[Kept]",
        inner: "asyncio.Future[int]",
    ) -> None:
        error = inner.exception()
        if error is not None:
            self._not_written(backlog, item, size, error, future)
            return
        backlog.under_way -= 1
        backlog.end = max(backlog.end, inner.result() + 1)
        backlog.oldest_us = backlog.oldest_us or self._now_us()
        self._metrics.paced.add(_ACCEPTED)
        if not future.done():  # its client may have gone
            future.set_result(Kept(backlog.file.spool.bytes, inner.result()))
        self._go_on(backlog)

    def _not_written(
        self, backlog: Backlog, item: Item, size: int, error: BaseException, future: "asyncio.Future[Kept]"
    ) -> None:
        if isinstance(error, OutcomeUnknownError):
            backlog.file.uncertain = True
        backlog.under_way -= 1
        backlog.size -= size
        backlog.due = _less(backlog.due, item.cost)
        if not future.done():
            future.set_exception(error)
        self._go_on(backlog)

    # ------------------------------------------------------------ draining

    def _go_on(self, backlog: Backlog) -> None:
        """Drain it if something waits, else let its owner go."""
        if backlog.task is not None or self._closed:
            return
        if backlog.depth:
            backlog.task = asyncio.get_running_loop().create_task(self._drain(backlog), name="paced drain")
        elif not backlog.under_way:
            self._free(backlog)

    async def _drain(self, backlog: Backlog) -> None:
        """What is permitted, each window in the log before the next is sent, until nothing waits."""
        retry_s, into = RETRY_S, backlog.slot % self._log.partitions
        while backlog.depth:
            try:
                window = await self._permitted(backlog) if self._may_append(into) else None
                if window is None:
                    await asyncio.sleep(POLL_S)
                    continue
                await self._log.append_all(into, window.bodies)
            except UnknownVersionError as error:
                self._files.complain(backlog.file.claim.spool, f"{error}; start the Sluice that made it")
                await asyncio.sleep(RETRY_S_MAX)
            except (UnavailableError, OutcomeUnknownError, OverloadedError) as error:
                _log.debug("a paced window was not drained", extra={"slot": backlog.slot, "reason": str(error)})
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_S_MAX)
            except Exception as error:
                if not isinstance(error, ValueError):
                    _log.exception("unexpected", extra={"slot": backlog.slot})
                self._files.complain(backlog.file.claim.spool, f"{error}: raise SLUICE_LOG_BATCH_BYTES_MAX")
                await asyncio.sleep(RETRY_S_MAX)
            else:
                self._acknowledged(backlog, window)
                retry_s = RETRY_S
        backlog.task = None
        self._go_on(backlog)

    def _may_append(self, partition: int) -> bool:
        """What is spooled goes first."""
        return self._log.trouble is None and (self._spool is None or not self._spool.holds(partition))

    async def _permitted(self, backlog: Backlog) -> Window | None:
        """What may be let in now, up to one window; None while nothing may. Raises `UnavailableError`."""
        if backlog.paid <= backlog.next and not await self._pay(backlog):
            return None
        first, end = backlog.next, backlog.paid
        bytes_max = min(self._log.body_bytes_max, WINDOW_BYTES if end - first > 1 else REACH_BYTES)

        def read(store: Store) -> Window:
            windows = Windows(store, backlog.file.spool, bytes_max, self._clock, entries.record_of)
            return windows.read(backlog.slot, first, end)

        return await self._files.read(backlog.file, read)

    async def _pay(self, backlog: Backlog) -> bool:
        """Charge limits for what stands next, as far as they permit; whether something may be let in now."""
        if backlog.head is None:
            await self._look(backlog)
        elif self._charge(backlog, *backlog.head):
            backlog.paid += 1
            backlog.head = None
        return backlog.paid > backlog.next

    async def _look(self, backlog: Backlog) -> None:
        """Look ahead and pay, up to the first entry whose limit does not permit all of it."""
        backlog.reach = min(max(backlog.reach * 2, REACH_BYTES), WINDOW_BYTES)
        ahead = await self._ahead(backlog, backlog.reach)
        backlog.paid = ahead.next  # what is lost costs nothing
        if ahead.next > backlog.next:
            return
        for entry in ahead.entries:
            if entry is not None:
                owner = self._owner(entry.kind, entry.organisation, entry.subject)
                if backlog.owner is not owner:
                    self._give(backlog, owner)
                if not self._charge(backlog, owner, entry.cost):
                    return
            backlog.paid += 1

    def _ahead(self, backlog: Backlog, bytes_max: int) -> Awaitable[Ahead]:
        slot, position, end = backlog.slot, backlog.next, backlog.end
        return self._files.read(backlog.file, lambda store: entries.look_ahead(store, slot, position, end, bytes_max))

    def _charge(self, backlog: Backlog, owner: Owner, owed: Cost) -> bool:
        """Whether all of it is paid; what is still owed is kept for later."""
        left = self._limits.pay(owner, owed, self._settings.paced_share) if owner.is_known else owed
        backlog.due = _less(backlog.due, _less(owed, left))
        if any(left):
            backlog.head = owner, left
            backlog.reach = 0
            return False
        return True

    def _acknowledged(self, backlog: Backlog, window: Window) -> None:
        count = window.through - window.first
        backlog.next = window.through
        backlog.paid = max(backlog.paid, backlog.next)
        backlog.oldest_us = max(backlog.oldest_us, window.received_us)
        backlog.size = max(0, backlog.size - window.size)
        self._metrics.paced.add(_DRAINED, count - window.lost)
        if window.lost:
            self._metrics.paced.add(_LOST, window.lost)
            _log.error(
                "paced records are lost: their file was damaged, and receipts and books say so",
                extra={
                    "spool": str(backlog.file.spool),
                    "slot": backlog.slot,
                    "records": f"{window.first} to {window.through - 1}",
                },
            )

    # ------------------------------------------------------------ the rest

    def _age_s(self) -> float:
        oldest = [owner.oldest_us for owner in self.owners.values() if owner.oldest_us]
        return max(0.0, (self._now_us() - min(oldest)) / 1e6) if oldest else 0.0

    def _now_us(self) -> int:
        return self._clock.now_us() - PG_EPOCH_US

    def _publish(self) -> None:
        metrics = self._metrics
        metrics.paced_depth_records.set(sum(file.depth for file in self._files))
        metrics.paced_depth_bytes.set(self._size())
        metrics.paced_age_seconds.set(self._age_s())
        metrics.paced_senders.set(len(self.owners))


_LANDED: Final = "SELECT partition, next FROM spool_positions WHERE spool = $1"
_LANDED_TIMEOUT_S: Final = 3.0
_ACCEPTED: Final = ("accepted",)
_DRAINED: Final = ("drained",)
_LOST: Final = ("lost",)


def _due(owner: Owner | None) -> Cost:
    return NOTHING if owner is None else _sum(backlog.due for backlog in owner.backlogs)


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(NOTHING, *costs, strict=True)))


def _less(cost: Cost, by: Cost) -> Cost:
    return Cost(*(max(0, amount - less) for amount, less in zip(cost, by, strict=True)))
