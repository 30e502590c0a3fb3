"""Reads a topic from positions its caller keeps: one fetch under way at each leader, a bounded store ahead.

Left out: consumer groups; who reads which partition is decided elsewhere.
"""

import asyncio
import contextlib
import logging
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from aiokafka.record.default_records import DefaultRecordBatch

from runtime.errors import SluiceError, UnavailableError
from runtime.log.kafka_cluster import LINK_ERRORS, NO_ERROR, NO_LEADER, Cluster, Topic, describe, explain
from runtime.log.kafka_wire import FetchRequest
from runtime.log.port import NEW_GENERATION, BehindRetentionError, LogMisfitError, Slice
from runtime.log.waiting import Trouble

FETCH_WAIT_MS: Final = 500  # how long a broker without news keeps a fetch; it answers at the first record
SMALL_BYTES: Final = 64_000
SMALL_EVERY_S: Final = 0.003  # a stream of small fetches costs both sides more than the records in it
BACKOFF_S: Final = 0.05
BACKOFF_S_MAX: Final = 0.5
OUT_OF_RANGE: Final = 1

BATCH_HEAD: Final = struct.Struct(">qi")  # position of the first record, bytes that follow
MAGIC_AT: Final = 16
HEAD_BYTES: Final = 61
MAGIC: Final = 2


_log = logging.getLogger("sluice.log")


class _Chunk(NamedTuple):
    """One batch as the broker keeps it."""

    first: int
    end: int
    size: int
    batch: DefaultRecordBatch


class _Track:
    """One partition that is read: where its caller and its fetches stand, and what lies between."""

    __slots__ = ("chunks", "failure", "fetched", "partition", "position")

    def __init__(self, partition: int, position: int) -> None:
        self.partition = partition
        self.position = position
        self.fetched = position
        self.chunks: deque[_Chunk] = deque()
        self.failure: Exception | None = None


class KafkaReader:
    """Belongs to one event loop, and has connections of its own: a fetch keeps a connection busy while it waits."""

    def __init__(
        self, cluster: Cluster, bytes_max: int, trouble: Trouble, forget: "Callable[[KafkaReader], None]"
    ) -> None:
        self._cluster = cluster
        self._fetch_bytes_max = bytes_max // 2
        self.trouble = trouble
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._tracks: dict[int, _Track] = {}
        self._stored_bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._fetching: asyncio.Task[None] | None = None
        self._backoff_s = BACKOFF_S

    async def assign(self, positions: Mapping[int, int]) -> None:
        await self._stop()
        self._tracks = {partition: _Track(partition, position) for partition, position in positions.items()}
        self._stored_bytes = 0
        self._room.set()
        if positions:
            self._fetching = self._loop.create_task(self._keep_fetching(), name="log-fetch")

    async def read(self, *, bytes_max: int, wait_s: float) -> list[Slice]:
        slices = self._take(bytes_max)
        if not slices and wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            slices = self._take(bytes_max)
        return slices

    async def close(self) -> None:
        await self._stop()
        self._forget(self)

    async def _stop(self) -> None:
        fetching, self._fetching = self._fetching, None
        try:
            if fetching is not None:
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)
        finally:  # whoever is cancelled here leaves no connection open
            await self._cluster.close()  # a fetch that still waits would hold up the next one on its connection

    def _take(self, bytes_max: int) -> list[Slice]:
        """From the store, partition after partition; one that was read goes to the end of the queue."""
        self._news.clear()
        for track in self._tracks.values():
            if track.failure is not None and not track.chunks:
                raise track.failure
        slices: list[Slice] = []
        for track in [track for track in self._tracks.values() if track.chunks]:
            self._tracks[track.partition] = self._tracks.pop(track.partition)
            bytes_max -= self._drain(track, bytes_max, slices)
            if bytes_max <= 0:
                break
        if self._stored_bytes < self._fetch_bytes_max:
            self._room.set()
        return slices

    def _drain(self, track: _Track, bytes_max: int, slices: list[Slice]) -> int:
        """Decode chunks of one partition, at least one of them; the bytes they took."""
        first, bodies, size = track.position, list[bytes](), 0
        while track.chunks and size < bytes_max:
            chunk = track.chunks.popleft()
            size += chunk.size
            if chunk.first > track.position:  # a marker that is no record: nobody here writes any
                slices.append(Slice(track.partition, first, bodies))
                first, bodies = chunk.first, []
            records = [record.value or b"" for record in chunk.batch]
            skipped = track.position - chunk.first
            bodies += records[skipped:] if skipped > 0 else records
            track.position = chunk.end
        self._stored_bytes -= size
        if bodies:
            slices.append(Slice(track.partition, first, bodies))
        return size

    async def _keep_fetching(self) -> None:
        """Fetch from whoever leads; after an error, look again who that is."""
        problem = ""
        while True:
            try:
                await self._fetch_until_error(await self._cluster.refresh())
            except LogMisfitError as error:
                self._fail(list(self._tracks.values()), error)
                return
            except SluiceError as error:
                problem = str(error)
            except LINK_ERRORS as error:
                problem = f"Kafka cannot be reached: {explain(error)}"
            except Exception as error:
                problem = f"unexpected: {error!r}"
                _log.exception("unexpected", extra={"log": self._cluster.name})
            if self._backoff_s > BACKOFF_S:  # not for the one error by which a new leader is found
                self.trouble.begin(problem)
            await asyncio.sleep(self._backoff_s)
            self._backoff_s = min(self._backoff_s * 2, BACKOFF_S_MAX)

    async def _fetch_until_error(self, topic: Topic) -> None:
        by_leader: dict[int, list[_Track]] = {}
        for track in self._tracks.values():
            by_leader.setdefault(topic.leaders[track.partition], []).append(track)
        leaderless = by_leader.pop(NO_LEADER, None)
        share = self._fetch_bytes_max // max(1, len(by_leader))
        tasks = [
            self._loop.create_task(self._fetch_from(leader, topic.topic_id, tracks, share), name="log-fetch")
            for leader, tracks in by_leader.items()
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=1.0 if leaderless else None)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        if leaderless:
            raise UnavailableError(f"no leader for partition {leaderless[0].partition} of {self._cluster.name}")

    async def _fetch_from(self, leader: int, topic_id: bytes, tracks: list[_Track], bytes_max: int) -> None:
        """Fetch until the leader says something that makes it worth looking who leads."""
        while True:
            await self._room.wait()
            wanted = [(track.partition, track.fetched) for track in tracks if track.failure is None]
            if not wanted:
                await self._loop.create_future()  # until somebody assigns anew
            begun = self._loop.time()
            request = FetchRequest(topic_id, wanted, wait_ms=FETCH_WAIT_MS, bytes_max=bytes_max)
            size = await self._accept(await self._cluster.send(leader, request), tracks)
            tracks.append(tracks.pop(0))  # the broker fills the answer in the order of the request
            if 0 < size < SMALL_BYTES:
                await asyncio.sleep(max(0.0, begun + SMALL_EVERY_S - self._loop.time()))

    async def _accept(self, response: Any, tracks: list[_Track]) -> int:
        """Store what came; how many bytes. Raises `UnavailableError` for an answer that tells of another leader."""
        if response.error_code != NO_ERROR:
            raise UnavailableError(f"a fetch from {self._cluster.name}: {describe(response.error_code)}")
        by_partition = {track.partition: track for track in tracks}
        stored, problem = 0, ""
        strays = []
        for _, partitions, _ in response.topics:
            for partition, error, _, _, _, _, _, records, _ in partitions:
                if error == OUT_OF_RANGE:
                    strays.append(by_partition[partition])
                elif error != NO_ERROR:
                    problem = f"a fetch of partition {partition} of {self._cluster.name}: {describe(error)}"
                elif records:
                    stored += self._store(by_partition[partition], records)
        if stored:
            self._news.set()
        if self._stored_bytes >= self._fetch_bytes_max:
            self._room.clear()
        for track in strays:
            await self._explain_range(track)
        if problem:
            raise UnavailableError(problem)
        self._backoff_s = BACKOFF_S
        self.trouble.over()
        return stored

    def _store(self, track: _Track, records: bytes) -> int:
        size = 0
        for chunk in _cut(records):
            if chunk.end > track.fetched:
                track.fetched = chunk.end
                if not chunk.batch.is_control_batch:
                    track.chunks.append(chunk)
                    size += chunk.size
        self._stored_bytes += size
        return size

    async def _explain_range(self, track: _Track) -> None:
        """The broker has no such position: find out on which side it lies."""
        partition, position = track.partition, track.fetched
        bounds = (await self._cluster.bounds([partition]))[partition]
        if position < bounds.start:
            self._fail([track], BehindRetentionError(partition, position, bounds.start))
        elif position > bounds.end:
            text = f"partition {partition} of the log ends at {bounds.end}, position {position} was asked for: "
            self._fail([track], LogMisfitError(f"{text}bring the right log back, or {NEW_GENERATION}"))

    def _fail(self, tracks: list[_Track], error: Exception) -> None:
        for track in tracks:
            track.failure = error
        self._news.set()


def _cut(records: bytes) -> Iterator[_Chunk]:
    """The whole batches in a fetch; the last one is often cut off."""
    begin = 0
    while begin + HEAD_BYTES <= len(records):
        first, rest = BATCH_HEAD.unpack_from(records, begin)
        end = begin + BATCH_HEAD.size + rest
        if end > len(records):
            return
        batch = DefaultRecordBatch(records[begin:end])
        if records[begin + MAGIC_AT] != MAGIC or not batch.validate_crc():
            raise UnavailableError(f"the batch at position {first} is damaged")
        yield _Chunk(first, batch.next_offset, end - begin, batch)
        begin = end
