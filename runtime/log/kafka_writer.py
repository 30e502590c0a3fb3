"""Appends on Kafka: records gather in one batch a partition, and the batches of a broker travel in one request.

Idempotent, acks=all, one batch of a partition in flight at a time. A batch that was sent and not answered is sent
again under the same sequence number until its time is over, then reported as not known; the partition goes on under
the next producer epoch, and from the first batch of that epoch on the broker refuses the old one. So a batch whose
outcome is not known stands before all later ones of its partition, or nowhere. Left out: reading.
"""

import asyncio
import logging
import random
import struct
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from runtime.errors import OutcomeUnknownError, OverloadedError, UnavailableError
from runtime.log.kafka_cluster import LINK_ERRORS, NO_ERROR, NO_LEADER, Cluster, describe, explain
from runtime.log.kafka_wire import ProduceRequest
from runtime.log.port import LogMisfitError, check_together
from runtime.log.settings import LogSettings
from runtime.log.waiting import Trouble, fail, failed, settle

BATCH_OVERHEAD: Final = 128  # header of a batch and of its only record
RECORD_OVERHEAD: Final = 32  # what a queued record takes beside its body, roughly
REQUEST_BYTES_MAX: Final = 32_000_000  # brokers close a connection that sends more than 100 MB
BACKOFF_S: Final = 0.05
BACKOFF_S_MAX: Final = 0.5
RENEWALS_MAX: Final = 5
STALE_AFTER: Final = 3  # attempts, then another broker is asked who leads
EPOCH_MAX: Final = 32_767
SEQUENCES: Final = 2**31
NO_PRODUCER: Final = -1
SWEEPS: Final = 20  # how often within the time-out queued batches are looked through

MAGIC: Final = 2
UNCOMPRESSED: Final = 0
CRC_AT: Final = 17
CRC_FROM: Final = 21
PRODUCER_AT: Final = 43
NO_HEADERS: Final[list[tuple[str, bytes | None]]] = []

UNKNOWN: Final = -1
DUPLICATE: Final = 46
# Answers given before a record is looked at or written.
NOT_WRITTEN_RETRY: Final = frozenset({2, 19, 72, 89, 100})
# Answers that also come after the leader has written a batch, while it waited for the others.
PERHAPS_WRITTEN_RETRY: Final = frozenset({-1, 3, 5, 6, 7, 8, 9, 13, 20, 56, 74, 75})
OUT_OF_SEQUENCE: Final = 45
PRODUCER_LOST: Final = frozenset({47, 49, 59, 90})

_log = logging.getLogger("sluice.log")


class _Batch:
    """Records of one partition that travel together."""

    __slots__ = (
        "attempts",
        "born",
        "buffer",
        "builder",
        "count",
        "futures",
        "problem",
        "renewals",
        "sent",
        "size",
        "stamp",
        "uncertain",
    )

    def __init__(self, born: float, bytes_max: int) -> None:
        self.born = born
        self.builder = DefaultRecordBatchBuilder(MAGIC, UNCOMPRESSED, 0, NO_PRODUCER, -1, -1, bytes_max)
        self.futures: list[asyncio.Future[int]] = []
        self.buffer: bytearray | None = None
        self.stamp: tuple[int, int, int] | None = None
        self.count = 0
        self.size = 0
        self.attempts = 0
        self.renewals = 0
        self.sent = False  # by the attempt that is in flight
        self.uncertain = False  # an earlier attempt may have written it
        self.problem = "it waited for the batches before it"

    def stamped(self, stamp: tuple[int, int, int]) -> bytearray:
        """The batch as it goes over the wire, with this producer id, epoch and sequence number."""
        if self.buffer is None:
            self.builder.set_producer_state(*stamp)
            self.buffer = self.builder.build()
        elif self.stamp != stamp:
            struct.pack_into(">qhi", self.buffer, PRODUCER_AT, *stamp)
            struct.pack_into(">I", self.buffer, CRC_AT, calc_crc32c(self.buffer[CRC_FROM:]))
        self.stamp = stamp
        return self.buffer


class _Lane:
    """One partition: what waits, what is in flight, and who it is to the broker."""

    __slots__ = ("end", "epoch", "flying", "held", "partition", "producer", "sequence", "waiting")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.waiting: deque[_Batch] = deque()  # the last one may still be open
        self.flying: _Batch | None = None
        self.held = False  # until leaders, or a producer id, are known again
        self.end = 0  # behind everything that was acknowledged
        self.producer = NO_PRODUCER
        self.epoch = 0
        self.sequence = 0

    def stamp(self, batch: _Batch) -> tuple[int, int, int]:
        """What may have been written keeps its own, by which the broker knows it again."""
        if batch.uncertain and batch.stamp is not None:
            return batch.stamp
        return self.producer, self.epoch, self.sequence

    def renew(self, *, producer_lost: bool) -> None:
        """Go on as somebody newer, whom the broker prefers to what is still under way."""
        self.epoch += 1
        self.sequence = 0
        if producer_lost or self.epoch > EPOCH_MAX:
            self.producer, self.epoch = NO_PRODUCER, 0


class KafkaWriter:
    """The queue of one process in front of one topic."""

    def __init__(self, settings: LogSettings, cluster: Cluster, partitions: int, trouble: Trouble) -> None:
        self.queued_bytes = 0
        self.body_bytes_max = settings.log_batch_bytes_max - BATCH_OVERHEAD
        self._batch_bytes_max = settings.log_batch_bytes_max
        self._queue_bytes_max = settings.log_queue_bytes_max
        self._linger_s = settings.log_linger_ms / 1000
        self._timeout_s = settings.log_append_timeout_ms / 1000
        # The broker is to give up on its replicas before this side gives up on the connection.
        self._produce_timeout_ms = round(cluster.timeout_s * 800)
        self._cluster = cluster
        self._trouble = trouble
        self._loop = asyncio.get_running_loop()
        self._lanes = [_Lane(partition) for partition in range(partitions)]
        self._open: dict[int, _Batch] = {}
        self._millisecond = 0
        self._linger: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._recovery: asyncio.Task[None] | None = None
        self._refusal: str | None = None

    @property
    def refuses(self) -> bool:
        """Whether appends are refused for good."""
        return self._refusal is not None

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        size = len(body) + RECORD_OVERHEAD
        if self.queued_bytes + size > self._queue_bytes_max:
            raise OverloadedError(f"{self.queued_bytes} bytes wait for the log (SLUICE_LOG_QUEUE_BYTES_MAX)")
        batch = self._open.get(partition)
        if batch is None or batch.builder.append(batch.count, self._millisecond, None, body, NO_HEADERS) is None:
            if self._refusal is not None:
                return failed(self._loop, self._refusal)
            batch = self._begin_batch(partition, body)
        future = self._loop.create_future()
        batch.futures.append(future)
        batch.count += 1
        batch.size += size
        self.queued_bytes += size
        return future

    def append_all(self, partition: int, bodies: Sequence[bytes]) -> "asyncio.Future[int]":
        size = check_together(bodies, self.body_bytes_max) + RECORD_OVERHEAD * len(bodies)
        if self.queued_bytes + size > self._queue_bytes_max:
            raise OverloadedError(f"{self.queued_bytes} bytes wait for the log (SLUICE_LOG_QUEUE_BYTES_MAX)")
        if self._refusal is not None:
            return failed(self._loop, self._refusal)
        batch = self._begin_batch(partition, bodies[0])
        for number, body in enumerate(bodies[1:], 1):
            batch.builder.append(number, self._millisecond, None, body, NO_HEADERS)
        del self._open[partition]  # nobody joins: it is written whole, and what comes later stands behind it
        future = self._loop.create_future()
        batch.futures.append(future)
        batch.count = len(bodies)
        batch.size = size
        self.queued_bytes += size
        return future

    def _begin_batch(self, partition: int, body: bytes) -> _Batch:
        if not 0 <= partition < len(self._lanes):
            raise ValueError(f"partition {partition}: the log has {len(self._lanes)}")
        if len(body) > self.body_bytes_max:
            raise ValueError(
                f"a record of {len(body)} bytes: at most {self.body_bytes_max} (SLUICE_LOG_BATCH_BYTES_MAX)"
            )
        now = self._loop.time()
        self._millisecond = time.time_ns() // 1_000_000
        batch = self._open[partition] = _Batch(now, self._batch_bytes_max)
        batch.builder.append(0, self._millisecond, None, body, NO_HEADERS)
        self._lanes[partition].waiting.append(batch)
        if self._linger is None:
            self._linger = self._loop.call_at(now + self._linger_s, self._flush)
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._timeout_s / SWEEPS, self._expire)
        return batch

    def _flush(self) -> None:
        """Send the next batch of every partition that has none in flight, one request a broker."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        topic = self._cluster.topic
        ready: dict[int, list[_Lane]] = {}
        for lane in self._lanes:
            if not lane.waiting or lane.flying is not None or lane.held:
                continue
            leader = NO_LEADER if topic is None else topic.leaders[lane.partition]
            if leader == NO_LEADER or lane.producer == NO_PRODUCER:
                lane.held = True
                self._recover(0.0 if topic is None or leader != NO_LEADER else BACKOFF_S)
            else:
                ready.setdefault(leader, []).append(lane)
        for leader, lanes in ready.items():
            self._depart(leader, lanes)

    def _depart(self, leader: int, lanes: list[_Lane]) -> None:
        flights: list[tuple[_Lane, _Batch]] = []
        size = 0
        for lane in lanes:
            batch = lane.waiting.popleft()
            if self._open.get(lane.partition) is batch:
                del self._open[lane.partition]
            lane.flying = batch
            batch.attempts += 1
            if flights and size + batch.size > REQUEST_BYTES_MAX:
                self._start(self._deliver(leader, flights))
                flights, size = [], 0
            flights.append((lane, batch))
            size += batch.size
        self._start(self._deliver(leader, flights))

    def _start(self, delivery: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(delivery, name="log-produce")
        self._sending.add(task)
        task.add_done_callback(self._delivered)

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("unexpected", extra={"log": self._cluster.name}, exc_info=error)
        self._go_on()

    def _go_on(self) -> None:
        """Send what has lingered long enough, or come back when it has."""
        born = [
            lane.waiting[0].born for lane in self._lanes if lane.waiting and lane.flying is None and not lane.held
        ]
        if not born:
            return
        due = min(born) + self._linger_s
        if due <= self._loop.time():
            self._flush()
        elif self._linger is None:
            self._linger = self._loop.call_at(due, self._flush)

    async def _deliver(self, leader: int, flights: list[tuple[_Lane, _Batch]]) -> None:
        """One attempt. A batch that is given up meanwhile is no longer the one its lane has in flight."""
        try:
            connection = await self._cluster.connection(leader)
        except LINK_ERRORS as error:
            self._come_back(flights, explain(error))
            return
        flights = [(lane, batch) for lane, batch in flights if lane.flying is batch]
        topic = self._cluster.topic
        if not flights or topic is None:
            return
        batches = []
        for lane, batch in flights:
            batches.append((lane.partition, batch.stamped(lane.stamp(batch))))
            batch.sent = True
        request = ProduceRequest(self._cluster.name, topic.topic_id, self._produce_timeout_ms, batches)
        try:
            response = await connection.send(request)
        except LINK_ERRORS as error:
            self._cluster.drop(leader, connection)
            for _, batch in flights:
                batch.uncertain = True
            self._come_back(flights, explain(error))
        else:
            self._arrive(flights, response)

    def _arrive(self, flights: list[tuple[_Lane, _Batch]], response: Any) -> None:
        answers = {}
        for _, partitions, _ in response.topics:
            for partition, error, position, _, _, _, message, _ in partitions:
                answers[partition] = error, position, message
        returning = []
        for lane, batch in flights:
            if lane.flying is not batch:
                continue
            error, position, message = answers.get(lane.partition, (UNKNOWN, -1, None))
            batch.sent = False
            if error == NO_ERROR:
                self._written(lane, batch, position)
                continue
            batch.problem = message or describe(error)
            if self._may_go_again(lane, batch, error):
                returning.append((lane, batch))
            else:
                text = f"partition {lane.partition}: the broker refuses a batch: {batch.problem}"
                self._trouble.begin(text)
                self._give_up(lane, batch, text)
        if returning:
            self._come_back(returning, None)

    def _written(self, lane: _Lane, batch: _Batch, position: int) -> None:
        if position < lane.end:
            self._lost_ground(lane, batch, position)
            return
        lane.flying = None
        lane.end = position + batch.count
        lane.sequence = (lane.sequence + batch.count) % SEQUENCES
        self.queued_bytes -= batch.size
        settle(batch.futures, position)
        self._trouble.over()

    def _lost_ground(self, lane: _Lane, batch: _Batch, position: int) -> None:
        """Written where something else had been acknowledged: by a leader that had not all of it, or a new topic."""
        batch.uncertain = True
        text = f"partition {lane.partition} of the log lost what was acknowledged from {position} to {lane.end}"
        self._give_up(lane, batch, text)
        self._trouble.begin(text)
        self.refuse(text)

    def _may_go_again(self, lane: _Lane, batch: _Batch, error: int) -> bool:
        if error in NOT_WRITTEN_RETRY:
            return True
        if error in PERHAPS_WRITTEN_RETRY:
            batch.uncertain = True
            return True
        if error == DUPLICATE:
            batch.uncertain = True  # written, but nobody can say where
        elif (error == OUT_OF_SEQUENCE or error in PRODUCER_LOST) and not batch.uncertain:
            batch.renewals += 1
            self._trouble.begin(f"partition {lane.partition}: going on as a new producer after {batch.problem}")
            lane.renew(producer_lost=error != OUT_OF_SEQUENCE or batch.renewals > 1)
            return batch.renewals <= RENEWALS_MAX
        return False

    def _come_back(self, flights: list[tuple[_Lane, _Batch]], problem: str | None) -> None:
        """Back to the head of the lane, to be sent again once leaders are known anew."""
        attempts = 1
        for lane, batch in flights:
            if lane.flying is batch:
                lane.flying = None
                lane.held = True
                lane.waiting.appendleft(batch)
                batch.sent = False
                batch.problem = problem or batch.problem
                attempts = max(attempts, batch.attempts)
        if attempts > STALE_AFTER:
            self._cluster.ask_another()
        self._recover(min(BACKOFF_S * 2 ** (attempts - 1), BACKOFF_S_MAX))

    def _recover(self, delay_s: float) -> None:
        if self._recovery is None:
            self._recovery = self._loop.create_task(self._find_way(delay_s), name="log-recovery")

    async def _find_way(self, delay_s: float) -> None:
        """Learn who leads and who to be, however long it takes, then let the held partitions go on."""
        failures = 0
        while True:
            await asyncio.sleep(delay_s * random.uniform(1.0, 1.2))  # noqa: S311
            try:
                await self._cluster.refresh()
                await self._find_producer()
            except LogMisfitError as error:
                self._recovery = None
                self._trouble.begin(str(error))
                self.refuse(str(error))
                return
            except Exception as error:
                if not isinstance(error, UnavailableError):
                    _log.exception("unexpected", extra={"log": self._cluster.name})
                failures += 1
                if failures > 1:  # a coordinator that is still loading says so once
                    self._trouble.begin(str(error))
                delay_s = min(max(delay_s * 2, BACKOFF_S), BACKOFF_S_MAX)
            else:
                break
        for lane in self._lanes:
            lane.held = False
        self._recovery = None
        self._flush()

    async def _find_producer(self) -> None:
        nobody = [lane for lane in self._lanes if lane.producer == NO_PRODUCER]
        if nobody:
            producer = await self._cluster.producer_id()
            for lane in nobody:
                lane.producer, lane.epoch, lane.sequence = producer, 0, 0

    def _expire(self) -> None:
        """Give up what was queued longer ago than the time-out."""
        self._sweep = self._loop.call_later(self._timeout_s / SWEEPS, self._expire) if self.queued_bytes else None
        limit = self._loop.time() - self._timeout_s
        for lane in self._lanes:
            late = [lane.flying] if lane.flying is not None and lane.flying.born < limit else []
            while lane.waiting and lane.waiting[0].born < limit:
                late.append(lane.waiting.popleft())
            for batch in late:
                text = f"partition {lane.partition}: not acknowledged within {self._timeout_s} s: {batch.problem}"
                self._trouble.begin(text)
                self._give_up(lane, batch, text)
        self._go_on()

    def _give_up(self, lane: _Lane, batch: _Batch, text: str) -> None:
        unknown = batch.sent or batch.uncertain
        if unknown:
            lane.renew(producer_lost=False)
        if lane.flying is batch:
            lane.flying = None
        if self._open.get(lane.partition) is batch:
            del self._open[lane.partition]
        self.queued_bytes -= batch.size
        fail(batch.futures, OutcomeUnknownError if unknown else UnavailableError, text)

    def refuse(self, text: str) -> None:
        """From now on nothing is sent."""
        self._refusal = text
        for lane in self._lanes:
            if lane.flying is not None:
                self._give_up(lane, lane.flying, text)
            while lane.waiting:
                self._give_up(lane, lane.waiting.popleft(), text)

    async def close(self) -> None:
        """Send what is queued, for as long as an append may take, then give up the rest."""
        self._refusal = "the log is closed"
        self._flush()
        self._open.clear()
        batches = [batch for lane in self._lanes for batch in (lane.flying, *lane.waiting) if batch is not None]
        if undecided := [future for batch in batches for future in batch.futures if not future.done()]:
            await asyncio.wait(undecided, timeout=self._timeout_s)
        self.refuse("the log is closed")
        for timer in (self._linger, self._sweep):
            if timer is not None:
                timer.cancel()
        tasks = [*self._sending, *([self._recovery] if self._recovery is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
