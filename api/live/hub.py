"""Follows the log for all who listen: one pass that is where the log has landed, and at most one that catches up.

Both take turns in one task, so that a record is decoded once a pass, and whoever has caught up goes over from one to
the other without a record in between. What was taken from the log is held until it was told: neither the database nor
the log loses any of it by being away. Left out: who may listen at all (`api.platform.live`).
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import asyncpg
import orjson

from api.access.authority import Waits, act_for, open_transaction
from api.access.standing import still_let_in
from api.http.operations import Caller, Needs
from api.http.problems import OVERLOADED, RATE_LIMITED, RETRY_AFTER_S, Kind, Problem, unavailable
from api.live.events import EventIds, Mark, event, heartbeat, retry
from api.live.listener import Listener, Queues
from api.live.settings import LiveSettings
from api.live.stored import KnownSeries, Matched, Reading, stored
from api.live.tail import Entry, Tail
from api.live.watches import Members, Watch, Watches, organisations_of, resolve
from api.metrics import ApiMetrics
from api.readings.cells import reading_of
from api.readings.series import Selection
from runtime.errors import SluiceError
from runtime.log.port import BehindRetentionError, Log
from runtime.postgres import UNAVAILABLE, cut_after, transaction
from runtime.secrets import KeyRing
from schemas.record import Record, UndecodableError, UnknownVersionError, decode_sound, device_in

_log = logging.getLogger("sluice.live")

LIVE_UNAVAILABLE: Final = Kind(
    "live_unavailable", 503, "The log cannot be read here, so that nothing can be streamed."
)

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_RETRY_S: Final = 1.0
_BEAT_S: Final = 1.0
_TURN_BYTES: Final = 200_000
"""Of records that a pass takes at once: what comes of them is one event, and the other pass waits meanwhile."""
_STALL_S: Final = 10.0
"""How long one that catches up may keep the others from it by not reading."""
_FORGET_EVERY: Final = 20

_LANDED: Final = """
SELECT g.source, array_agg(p.partition) AS partitions, array_agg(p.position) AS positions,
       max(p.received_through) AS received_through
FROM log_generations g JOIN log_positions p USING (source)
WHERE g.closed_at IS NULL GROUP BY g.source
"""


class Pass:
    """One way through the log. `mark` is up to where its listeners were told, `batch` what was taken beyond."""

    def __init__(self, log: Log, mark: Mark, *, careful: bool) -> None:
        self.tail = Tail(log, mark.positions)
        self.mark = mark
        self.careful = careful
        self.batch: list[Entry] = []
        self.spools: dict[tuple[bytes, int], int] = {}
        """The next record of each spool of which one was seen."""

    def jump(self, mark: Mark) -> None:
        """Nobody wants what lies before."""
        self.batch = []
        self.tail.skip(mark.positions)
        self.mark = mark


class Live:
    """Made without touching the loop. `open_log` opens the active log, and closes the one it opened before."""

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        ring: KeyRing,
        settings: LiveSettings,
        metrics: ApiMetrics,
        open_log: Callable[[], Awaitable[Log]],
        *,
        needs: Needs,
        waits: Waits,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics
        self._open_log = open_log
        self._needs = needs
        self._waits = waits
        self.ids = EventIds(ring)
        self._queues = Queues(settings.live_queue_bytes_max, settings.live_queues_bytes_max)
        self._watches = Watches()
        self._known = KnownSeries()
        self._listeners: set[Listener] = set()
        self._coming: list[Listener] = []
        """Not told by any pass yet, in the order they came."""
        self._log: Log | None = None
        self._live: Pass | None = None
        self._behind: Pass | None = None
        self._wanted = asyncio.Event()
        self._ending = False
        self._trouble: str | None = "the log is being opened"
        self._tried = asyncio.Event()

    async def first_try(self, wait_s: float) -> None:
        """Until the log has been opened or could not be, or for so long: streams may be asked for at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._tried.wait()

    @property
    def trouble(self) -> str | None:
        """Why nothing can be streamed right now, in words for an operator."""
        if self._trouble is None and self._log is not None:
            return self._log.trouble
        return self._trouble

    # ------------------------------------------------------------ who listens

    def check_room(self, organisation: UUID, members: Members) -> None:
        """Raises the problems of a log that cannot be read, of too many listeners, and of too many devices."""
        settings = self._settings
        if self._log is None or self._ending:
            self._metrics.live_refused.labels("unavailable").inc()
            raise unavailable(LIVE_UNAVAILABLE, "the log cannot be read here at the moment: query readings instead")
        full = len(self._listeners) >= settings.live_listeners_max
        if full or self._watches.watched + len(members.devices) > settings.live_watched_max:
            self._metrics.live_refused.labels("process").inc()
            raise unavailable(OVERLOADED, "too many are listening: try again")
        own = sum(listener.watch.organisation == organisation for listener in self._listeners)
        if own >= settings.live_listeners_per_organisation_max:
            most = settings.live_listeners_per_organisation_max
            self._metrics.live_refused.labels("organisation").inc()
            message = f"the organisation has {most} streams here, as many as it may: close one"
            raise Problem(RATE_LIMITED, message, headers={"Retry-After": str(RETRY_AFTER_S[1])})

    async def listen(
        self,
        caller: Caller,
        wanted: Selection,
        members: Members,
        mark: Mark | None,
        is_gone: Callable[[], bool],
    ) -> AsyncIterator[bytes]:
        """What a caller for an organisation is sent, from now on until it is let go or leaves."""
        organisation = caller.organisation
        if organisation is None:
            raise TypeError("nobody may listen for no organisation")
        yield retry()
        try:
            self.check_room(organisation, members)  # others may have come since it was let in
        except Problem as problem:
            yield event("end", {"reason": problem.kind.code})
            return
        listener = Listener(self._watches.enter(organisation, wanted, members), caller, mark, self._queues, is_gone)
        listener.watch.listeners.add(listener)
        listener.beat_at = time.monotonic() + self._settings.live_heartbeat_s
        self._listeners.add(listener)
        self._coming.append(listener)
        self._metrics.live_listeners.set(len(self._listeners))
        self._wanted.set()
        try:
            while chunk := await listener.take():
                yield chunk
        finally:
            self._leave(listener)

    def end(self) -> None:
        """Let everybody go, and nobody in: the process ends."""
        self._ending = True
        self._let_go(self._listeners, "shutdown")

    def _leave(self, listener: Listener) -> None:
        listener.close()
        self._listeners.discard(listener)
        self._watches.leave(listener)
        self._metrics.live_listeners.set(len(self._listeners))
        self._metrics.live_ended.labels(listener.ended).inc()

    def _let_go(self, listeners: Iterable[Listener], reason: str) -> None:
        for listener in listeners:
            listener.end(reason)

    def _put(self, listener: Listener, chunk: bytes) -> None:
        if not listener.ended and not listener.put(chunk):
            listener.end("slow")

    # ------------------------------------------------------------ what goes on

    async def run(self) -> None:
        """For ever; its owner cancels it."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_following(), name="live log")
            group.create_task(self._keep_beating(), name="live heartbeats")
            group.create_task(self._keep_checking(), name="live rights")

    async def _keep_following(self) -> None:
        while True:
            try:
                if self._log is None:
                    self._log = await self._open_log()
                    _log.info("the log is read for streams", extra={"source": str(self._log.source)})
                self._trouble = None
                self._tried.set()
                if not self._listeners:
                    self._wanted.clear()
                    await self._wanted.wait()
                async with self._pool.acquire(timeout=self._waits.session_s) as connection:
                    await self._follow(connection, self._log)
                continue
            except (*UNAVAILABLE, SluiceError) as error:
                self._failed(str(error) or type(error).__name__)
            except Exception as error:
                _log.exception("streams failed")
                self._failed(str(error))
                self._let_go(self._listeners, "failed")
                await self._rest()
            await asyncio.sleep(_RETRY_S)

    def _failed(self, reason: str) -> None:
        if reason != self._trouble:
            _log.warning("nothing can be streamed right now", extra={"reason": reason})
        self._trouble = reason
        self._tried.set()

    async def _follow(self, connection: Any, log: Log) -> None:
        """While somebody listens. What it raises loses nothing: it goes on where it was."""
        while self._listeners:
            self._wanted.clear()
            landed = await self._landed(connection)
            if landed is None or landed.source != log.source.bytes:
                await self._begin_anew(landed)
                return
            if self._live is None:
                self._live = Pass(log, landed, careful=False)
            live = self._live
            self._metrics.live_lag.set(_distance(live.mark.positions, landed.positions))
            self._welcome(log, live)
            if any(listener.reads is live for listener in self._listeners):
                busy = await self._advance(connection, live, landed)
            else:
                busy = False
                live.jump(landed)
            if self._behind is not None:
                busy |= await self._catch_up(connection, self._behind, live)
            if not busy:
                await self._pause()
        await self._rest()

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(self._settings.live_poll_ms / 1000):
                await self._wanted.wait()
        except TimeoutError:
            return

    async def _landed(self, connection: Any) -> Mark | None:
        with cut_after(connection, self._waits.transaction_s):
            row = await connection.fetchrow(_LANDED)
        if row is None:
            return None
        positions = dict(zip(row["partitions"], row["positions"], strict=True))
        return Mark(row["source"].bytes, positions, row["received_through"] or _EPOCH)

    async def _begin_anew(self, landed: Mark | None) -> None:
        """The generation was closed: what was in it has landed or is lost, and positions of the next tell nothing."""
        for listener in self._listeners:
            if listener.reads is not None:
                listener.mark = self._mark_of(listener, listener.reads)
                self._coming.append(listener)
        await self._rest()
        self._log = None

    async def _rest(self) -> None:
        """Nobody listens, or everybody begins anew."""
        passes, self._live, self._behind = (self._live, self._behind), None, None
        self._metrics.live_lag.set(0)
        for listener in self._listeners:
            listener.reads = None
        self._coming = [listener for listener in self._coming if listener in self._listeners]
        if self._listeners:
            self._wanted.set()
        for one in passes:
            if one is not None:
                await one.tail.close()

    # ------------------------------------------------------------ who comes

    def _welcome(self, log: Log, live: Pass) -> None:
        """Whoever begins, or has been told of everything, joins; others catch up together, and later ones next."""
        coming, self._coming = self._coming, []
        late: list[Listener] = []
        for listener in coming:
            if listener.ended:
                continue
            mark = listener.mark
            if mark is None or self._is_lost(mark, live):
                listener.mark = None
                self._join(listener, live)
                if mark is not None:
                    self._tell_gap(listener, mark, "expired")
            elif not _is_behind(mark.positions, live.mark.positions):
                self._join(listener, live)
            else:
                late.append(listener)
        if late and self._behind is None:
            self._behind = Pass(log, _least(late), careful=True)
            for listener in late:
                self._join(listener, self._behind)
            late = []
        self._coming += late

    def _is_lost(self, mark: Mark, live: Pass) -> bool:
        """Whether what came after cannot be read, or is more than may be."""
        positions = live.mark.positions
        if mark.source != live.mark.source or mark.positions.keys() != positions.keys():
            return True
        return _distance(mark.positions, positions) > self._settings.live_resume_records_max

    def _join(self, listener: Listener, one: Pass) -> None:
        listener.reads = one
        self._put(listener, event("position", {}, self._id_of(listener, one)))

    def _mark_of(self, listener: Listener, one: Pass) -> Mark:
        """Up to where it has been told: a pass may be where it was already."""
        if listener.mark is None:
            return one.mark
        told = listener.mark.positions
        positions = {partition: max(at, told[partition]) for partition, at in one.mark.positions.items()}
        return Mark(one.mark.source, positions, max(listener.mark.received_through, one.mark.received_through))

    def _id_of(self, listener: Listener, one: Pass) -> str:
        return self.ids.give(self._mark_of(listener, one))

    def _tell_gap(self, listener: Listener, since: Mark, reason: str) -> None:
        one = listener.reads
        data = {"from": since.received_through, "reason": reason}
        self._put(listener, event("gap", data, "" if one is None else self._id_of(listener, one)))

    # ------------------------------------------------------------ what is told

    async def _catch_up(self, connection: Any, behind: Pass, live: Pass) -> bool:
        """A turn of the pass that is behind, unless somebody in it does not read; whether there is more to do."""
        listeners = [one for one in self._listeners if one.reads is behind and not one.ended]
        if listeners and self._stalls(listeners):
            return False
        if listeners and behind.mark.positions != live.mark.positions:
            return await self._advance(connection, behind, live.mark)
        for listener in listeners:
            listener.reads = live
            if listener.mark is not None and not _is_behind(live.mark.positions, listener.mark.positions):
                listener.mark = None
        self._behind = None
        await behind.tail.close()
        return True

    def _stalls(self, listeners: Iterable[Listener]) -> bool:
        now, found = time.monotonic(), False
        for listener in listeners:
            if listener.waiting_bytes > self._queues.each_max // 2:
                listener.stalled_since = listener.stalled_since or now
                if now - listener.stalled_since > _STALL_S:
                    listener.end("slow")
                else:
                    found = True
        return found

    async def _advance(self, connection: Any, one: Pass, target: Mark) -> bool:
        """A turn towards the target; whether it got on. What is told of it is told at once."""
        if not one.batch:
            try:
                one.batch = await one.tail.take(target.positions, _TURN_BYTES)
            except BehindRetentionError as error:
                self._lose(one, error)
        if not one.batch:
            return False
        matched, newer = self._matched(one)
        readings = await self._stored(connection, matched, careful=one.careful)
        before, positions = one.mark, dict(one.tail.positions)
        received = target.received_through if positions == target.positions else before.received_through
        one.mark, one.batch = Mark(before.source, positions, received), []
        self._tell(one, readings)
        if newer:
            self._tell_gaps(one, before, "newer")
        self._observe(matched)
        return True

    def _lose(self, one: Pass, error: BehindRetentionError) -> None:
        """The log keeps no longer what stood there."""
        one.tail.skip({error.partition: error.start})
        before, one.mark = one.mark, Mark(one.mark.source, dict(one.tail.positions), one.mark.received_through)
        for listener in self._listeners:
            told = listener.mark
            if listener.reads is one and (told is None or told.positions[error.partition] < error.start):
                self._tell_gap(listener, told or before, "expired")

    def _tell_gaps(self, one: Pass, since: Mark, reason: str) -> None:
        for listener in self._listeners:
            if listener.reads is one:
                self._tell_gap(listener, since, reason)

    def _matched(self, one: Pass) -> tuple[list[Matched], bool]:
        """The records of its batch that somebody listens to; and whether there are any that only newer code reads."""
        found, newer = [], False
        by_device = self._watches.by_device
        for entry in one.batch:
            device = device_in(entry.body)
            if device is not None and device not in by_device:
                continue
            try:
                record = decode_sound(entry.body)
            except UnknownVersionError:
                newer = True
                continue
            except UndecodableError:
                continue
            watches = tuple(
                watch
                for watch in by_device.get(record.device, ())
                if watch.organisation.bytes == record.organisation
                and any(listener.reads is one for listener in watch.listeners)
            )
            if watches and not _is_repeat(one, record):
                found.append(Matched(entry, record, self._place(one, entry, record), watches))
        return found, newer

    def _place(self, one: Pass, entry: Entry, record: Record) -> tuple[UUID, int, int]:
        origin = record.origin
        if origin is not None:
            return UUID(bytes=origin.spool), origin.partition, origin.sequence
        return UUID(bytes=one.mark.source), entry.partition, entry.position

    async def _stored(self, connection: Any, matched: Sequence[Matched], *, careful: bool) -> list[Reading]:
        organisations: dict[bytes, list[Matched]] = {}
        for one in matched:
            organisations.setdefault(one.record.organisation, []).append(one)
        readings: list[Reading] = []
        for organisation, own in organisations.items():
            async with transaction(connection, readonly=True):
                await act_for(connection, organisation=UUID(bytes=organisation))
                readings += await stored(connection, own, self._known, careful=careful)
        return readings

    def _tell(self, one: Pass, readings: Iterable[Reading]) -> None:
        rows: dict[Watch, list[tuple[Entry, Any]]] = {}
        for reading in readings:
            row = reading_of(reading.row, reading.series)
            for watch in reading.matched.watches:
                if _is_meant(watch, reading):
                    rows.setdefault(watch, []).append((reading.matched.entry, row))
        event_id = self.ids.give(one.mark) if rows else ""
        for watch, own in rows.items():
            everything = b""
            for listener in watch.listeners:
                if listener.reads is not one:
                    continue
                if listener.mark is not None:
                    self._tell_rest(listener, one, listener.mark.positions, own)
                    continue
                everything = everything or _readings_event([row for _, row in own], event_id)
                self._put(listener, everything)
                self._count(own)
        self._settle(one)

    def _tell_rest(
        self, listener: Listener, one: Pass, told: Mapping[int, int], rows: Sequence[tuple[Entry, Any]]
    ) -> None:
        """To one who knows some of it."""
        new = [row for entry, row in rows if entry.position >= told[entry.partition]]
        if new:
            self._put(listener, _readings_event(new, self._id_of(listener, one)))
            self._count(new)

    def _count(self, rows: Sequence[Any]) -> None:
        self._metrics.live_events.inc()
        self._metrics.readings.inc(len(rows))

    def _settle(self, one: Pass) -> None:
        """Whoever knew more than the pass does so no longer."""
        for listener in self._listeners:
            known = listener.mark
            if listener.reads is one and known and not _is_behind(one.mark.positions, known.positions):
                listener.mark = None

    def _observe(self, matched: Sequence[Matched]) -> None:
        now = datetime.now(UTC)
        for one in matched[-1:]:
            received = _EPOCH + timedelta(microseconds=one.record.received_at)
            self._metrics.live_delay.observe(max(0.0, (now - received).total_seconds()))

    # ------------------------------------------------------------ beside

    async def _keep_beating(self) -> None:
        every_s = self._settings.live_heartbeat_s
        while True:
            await asyncio.sleep(min(_BEAT_S, every_s))
            now = time.monotonic()
            ids: dict[Pass, str] = {}
            for listener in list(self._listeners):
                if listener.is_gone():
                    listener.close()
                elif now >= listener.beat_at and not listener.ended:
                    listener.beat_at = now + every_s
                    listener.put(heartbeat(self._beat_id(listener, ids)))  # needs none while it has something to read
            self._metrics.live_queued_bytes.set(self._queues.bytes)

    def _beat_id(self, listener: Listener, ids: dict[Pass, str]) -> str:
        one = listener.reads
        if one is None:
            return ""
        if listener.mark is not None:
            return self._id_of(listener, one)
        if one not in ids:
            ids[one] = self.ids.give(one.mark)
        return ids[one]

    async def _keep_checking(self) -> None:
        rounds = 0
        while True:
            await asyncio.sleep(self._settings.live_check_s)
            rounds += 1
            if rounds % _FORGET_EVERY == 0:
                self._known.forget()
            for organisation, watches in organisations_of(list(self._watches)).items():
                try:
                    await self._check(organisation, watches)
                except (*UNAVAILABLE, Problem) as error:
                    _log.debug("rights could not be looked at", extra={"reason": str(error)})
                except Exception:
                    _log.exception("rights could not be looked at")

    async def _check(self, organisation: UUID, watches: Sequence[Watch]) -> None:
        """Who may listen no longer is let go; who may, is told of what the selection means now."""
        callers = {listener.caller for watch in watches for listener in watch.listeners}
        async with open_transaction(self._pool, self._waits, writes=False) as connection:
            await act_for(connection, organisation=organisation)
            wanted = [watch.wanted for watch in watches]
            members = await resolve(connection, wanted, self._settings.live_devices_max)
            shut_out = callers - await still_let_in(connection, callers, self._needs)
        for watch, now in zip(watches, members, strict=True):
            self._let_go([one for one in watch.listeners if one.caller in shut_out], "revoked")
            if now is None:
                self._let_go(watch.listeners, "deleted")
            elif len(now.devices) > self._settings.live_devices_max:
                self._let_go(watch.listeners, "too_many_devices")
            elif watch.listeners:
                self._watches.change(watch, now)


def _is_behind(positions: Mapping[int, int], others: Mapping[int, int]) -> bool:
    """Whether there is a partition in which the first stand before the others."""
    return any(at < others[partition] for partition, at in positions.items())


def _distance(positions: Mapping[int, int], others: Mapping[int, int]) -> int:
    """How many records the first stand before the others."""
    return sum(max(0, at - positions[partition]) for partition, at in others.items())


def _least(listeners: Iterable[Listener]) -> Mark:
    """A mark up to which all of them have been told."""
    marks = [listener.mark for listener in listeners if listener.mark is not None]
    first, *others = marks
    positions = {p: min([at, *(mark.positions[p] for mark in others)]) for p, at in first.positions.items()}
    return Mark(first.source, positions, min(mark.received_through for mark in marks))


def _is_repeat(one: Pass, record: Record) -> bool:
    """Whether the same record of a spool came before, or it stands for records that are lost."""
    origin = record.origin
    if origin is None:
        return False
    spool = origin.spool, origin.partition
    expected = one.spools.get(spool, 0)
    one.spools[spool] = max(expected, origin.through)
    return record.is_gap or origin.through <= expected


def _is_meant(watch: Watch, reading: Reading) -> bool:
    if not watch.takes(reading.series.metric, reading.series.label):
        return False
    stays = watch.stays(reading.matched.record.device)
    return any(start <= reading.ts < end for start, end in stays)


def _readings_event(rows: Sequence[Any], event_id: str) -> bytes:
    return event("readings", orjson.dumps(rows, option=orjson.OPT_UTC_Z), event_id)
