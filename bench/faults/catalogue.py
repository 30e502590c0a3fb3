"""Every fault: how it comes, how it goes, and what an operator must be told of it.

A fault is an async generator over the stage: up to its `yield` it happens, after it is over. What says that it has
happened, with its remedy, is a regular expression over the roles' log lines. Left out: load, waiting, judging.
"""

import asyncio
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import asyncpg
import orjson

from bench.books import Books
from bench.errors import BenchError
from bench.faults.sender import Fate, Link, Sender
from bench.faults.stage import (
    BROKER,
    DATABASE,
    INGEST_PROCESSES,
    KAFKA,
    LOOK_EVERY_S,
    Stage,
    is_told,
    registered_in,
    signal_process,
)
from bench.faults.traffic import CHANNELS, TIMES_A_BATCH, VALUES_A_DEVICE, Device, Kind, Reading
from bench.parts import Role
from bench.proxy import Mode, Proxy
from bench.workload import json_post
from ingest.spool.files import SPOOL
from runtime.ids import uuid7
from runtime.log import Log
from schemas import record as records
from schemas.topics import partition_of

SLOW_KAFKA_S: Final = 0.3
SLOW_DATABASE_S: Final = 0.1
KILL_EVERY_S: Final = (0.5, 2.0)
COME_AND_GO_S: Final = 1.5
SPOOLING_S: Final = 1.0
UNSAVED_S: Final = 1.0
UNDECODABLE: Final = 25
UNDECODABLE_MAX: Final = "SLUICE_LANDING_UNDECODABLE_MAX"
FLOOD_PAUSE_S: Final = 0.02
FLOOD_READINGS: Final = 100
UPGRADE: Final = "import schemas.record as r; r.VERSION += 1; r._VERSIONS = frozenset(range(1, r.VERSION + 1))"
STARTED_TIMEOUT_S: Final = 60.0

_SET_ASIDE: Final = "the database refuses records for their content, they are quarantined whole"
_AWAY_LOG: Final = "spooling: records are acknowledged from the local disk.*see to the log"
_AWAY_DATABASE: Final = "landing was interrupted and is tried again.*the database is away or full"


@dataclass(frozen=True)
class Fault:
    """A fault that can be run; `happen` is entered and left."""

    name: str
    happen: Callable[[Stage, Any], AbstractAsyncContextManager[None]]
    says: str
    """A regular expression; empty for what nobody needs to know of."""
    says_after: bool = False
    """Only once it is over; all else is held until it was said."""
    workers: int = 1
    """Processes of the worker role."""
    at_start: bool = False
    """It is there before any role is."""
    small_disk: bool = False
    fails_nothing: bool = False
    """No request of a client that honours `Connection: close` fails."""
    refuses: tuple[str, ...] = ()
    """Codes under which it puts accepted readings into the quarantine."""
    stops_workers: bool = False
    """A worker ends because of it."""
    by_mqtt: bool = False
    """The load comes through a broker and two bridges."""
    breaks_broker: bool = False
    """What the broker loses, or sends once more, nobody behind it can mend: that is counted, and no harm of ours."""

    def told(self, said: str) -> bool:
        """Whether the logs tell of it."""
        return is_told(self.says, said)


FAULTS: Final[dict[str, Fault]] = {}

_Happening = Callable[[Stage, Any], AsyncIterator[None]]


def _fault(name: str, says: str = "", **traits: object) -> Callable[[_Happening], _Happening]:
    def declare(happening: _Happening) -> _Happening:
        FAULTS[name] = Fault(name, asynccontextmanager(happening), says, **traits)  # type: ignore[arg-type]
        return happening

    return declare


# ---------------------------------------------------------------- Kafka


@_fault("kafka-stop", _AWAY_LOG)
async def _kafka_stop(stage: Stage, _: Sender) -> AsyncIterator[None]:
    await stage.instance.services("stop", KAFKA)
    yield
    await stage.instance.start(KAFKA)


@_fault("kafka-kill", _AWAY_LOG)
async def _kafka_kill(stage: Stage, _: Sender) -> AsyncIterator[None]:
    await stage.instance.services("kill", KAFKA)
    yield
    await stage.instance.start(KAFKA)


@_fault("kafka-cut", _AWAY_LOG)
async def _kafka_cut(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _cut(stage.instance.kafka_proxy):
        yield


@_fault("kafka-slow")
async def _kafka_slow(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _slow(stage.instance.kafka_proxy, SLOW_KAFKA_S):
        yield


@_fault("kafka-restart")
async def _kafka_restart(stage: Stage, _: Sender) -> AsyncIterator[None]:
    await stage.instance.restart(KAFKA)
    yield
    await stage.instance.restart(KAFKA)


@_fault("kafka-away-at-start", "the log cannot be reached; it is opened when it can", at_start=True)
async def _kafka_away_at_start(stage: Stage, _: Sender) -> AsyncIterator[None]:
    await stage.instance.services("kill", KAFKA)
    yield
    await stage.instance.start(KAFKA)


@asynccontextmanager
async def _cut(proxy: Proxy) -> AsyncIterator[None]:
    """Packets vanish, and connections that were there stay silent: who kept their state has forgotten them."""
    proxy.set_mode(Mode.BLACKHOLE)
    try:
        yield
    finally:
        proxy.mode = Mode.PASS


@asynccontextmanager
async def _slow(proxy: Proxy, seconds: float) -> AsyncIterator[None]:
    proxy.set_delay(seconds)
    try:
        yield
    finally:
        proxy.set_delay(0.0)


# ---------------------------------------------------------------- the database


@_fault("database-kill", _AWAY_DATABASE)
async def _database_kill(stage: Stage, _: Sender) -> AsyncIterator[None]:
    await stage.instance.services("kill", DATABASE)
    yield
    await stage.instance.start(DATABASE)


@_fault("database-restart", _AWAY_DATABASE)
async def _database_restart(stage: Stage, _: Sender) -> AsyncIterator[None]:
    await stage.instance.restart(DATABASE)
    yield
    await stage.instance.restart(DATABASE)


@_fault("database-cut", "the database is away or full|leases cannot be renewed, landing waits for the database")
async def _database_cut(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _cut(stage.instance.database_proxy):
        yield


@_fault("database-slow")
async def _database_slow(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _slow(stage.instance.database_proxy, SLOW_DATABASE_S):
        yield


@_fault("database-read-only", f"{_AWAY_DATABASE}.*read-only")
async def _database_read_only(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """As after a fail-over to a standby: sessions opened meanwhile stay read-only."""
    async with stage.instance.superuser("postgres") as connection:
        await connection.execute(f"ALTER DATABASE {stage.database} SET default_transaction_read_only = on")
        await connection.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{stage.database}'"
            " AND usename <> 'postgres'"
        )
        yield
        await connection.execute(f"ALTER DATABASE {stage.database} RESET default_transaction_read_only")


@_fault(
    "database-refuses-content",
    _SET_ASIDE,
    refuses=("rejected_by_store",),
)
async def _database_refuses_content(stage: Stage, sender: Sender) -> AsyncIterator[None]:
    """Nobody has sent the value yet; one device is about to."""
    device = stage.devices[0]
    sent = len(sender.journal.fates.get((device.number, Kind.BATCH), b""))
    soon = sent + 2 + sent // 4
    value = device.number * VALUES_A_DEVICE + soon * TIMES_A_BATCH * len(CHANNELS)
    async with stage.superuser() as connection:
        await connection.execute(f"ALTER TABLE readings ADD CONSTRAINT fault CHECK (value <> {value})")
        yield
        await connection.execute("ALTER TABLE readings DROP CONSTRAINT fault")


@_fault("database-deadlock", "rows met others, the batch is landed again with every reading checked.*deadlock")
async def _database_deadlock(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _beside(_lock_backwards(stage)):
        yield


async def _lock_backwards(stage: Stage) -> None:
    """Again and again, the rows that landing locks, in the opposite order, and patiently: landing is the victim."""
    async with stage.superuser() as connection:
        await connection.execute("SET deadlock_timeout = '1min'")
        partitions = await connection.fetch("SELECT DISTINCT partition FROM log_positions ORDER BY 1 DESC")
        while True:
            with suppress(asyncpg.DeadlockDetectedError):
                async with connection.transaction():
                    for (partition,) in partitions:
                        await connection.execute(
                            "SELECT FROM log_positions WHERE partition = $1 FOR UPDATE", partition
                        )
                        await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)


@_fault("database-disk-full", f"{_AWAY_DATABASE}.*No space left on device", small_disk=True)
async def _database_disk_full(stage: Stage, _: Sender) -> AsyncIterator[None]:
    filler = stage.instance.data / "filler"
    try:
        await asyncio.to_thread(_fill, filler)
        yield
    finally:
        filler.unlink(missing_ok=True)


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            # What others free meanwhile is taken as well, down to the last block.
            if file.write(bytes(1 << 20)) < 1 << 20:
                file.write(bytes(4096))


@_fault("old-backup-restored", _AWAY_DATABASE)
async def _old_backup_restored(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """A cold copy of the whole server, put back at the end: rows and positions go back together."""
    instance, backup = stage.instance, stage.instance.home / "backup"
    await instance.services("stop", DATABASE)
    await asyncio.to_thread(_copy, instance.data, backup)
    await instance.start(DATABASE)
    yield
    await instance.services("stop", DATABASE)
    await asyncio.to_thread(_copy, backup, instance.data)
    shutil.rmtree(backup)
    await instance.start(DATABASE)


def _copy(source: Path, target: Path) -> None:
    """With owners and times, which the server insists on."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", str(source), str(target)], check=True)


# ---------------------------------------------------------------- workers


@_fault("worker-kill", "a process ended.*status=-9", workers=2)
async def _worker_kill(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _beside(_kill_again_and_again(stage)):
        yield


async def _kill_again_and_again(stage: Stage) -> None:
    while True:
        children = stage.children(stage.worker)
        if children:
            signal_process(random.choice(children), signal.SIGKILL)
        await asyncio.sleep(random.uniform(*KILL_EVERY_S))


@_fault("worker-stopped", "session of a partition's previous holder was ended|a partition was lost", workers=2)
async def _worker_stopped(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """For longer than its leases last."""
    children = await stage.wait_children(stage.worker, 2)
    signal_process(children[0], signal.SIGSTOP)
    yield
    signal_process(children[0], signal.SIGCONT)


@_fault("workers-come-and-go", "a partition was given up")
async def _workers_come_and_go(stage: Stage, _: Sender) -> AsyncIterator[None]:
    over = asyncio.Event()
    coming = asyncio.create_task(_come_and_go(stage, over))
    yield
    over.set()
    await coming


async def _come_and_go(stage: Stage, over: asyncio.Event) -> None:
    permanent = stage.worker
    while not over.is_set():
        another = await stage.start_worker()
        await asyncio.sleep(COME_AND_GO_S)
        await another.stop()
    stage.worker = permanent


@_fault("rolling-restart-workers", workers=2)
async def _rolling_restart_workers(stage: Stage, _: Sender) -> AsyncIterator[None]:
    async with _replaced(stage, stage.worker, 2):
        yield


@_fault("newer-record-version", "a record is newer than this worker: its partition waits for `sluice` to be upgraded")
async def _newer_record_version(stage: Stage, sender: Sender) -> AsyncIterator[None]:
    """A newer ingest has begun to write; the worker is upgraded, and goes back to what it was."""
    device = stage.devices[0]
    number = sender.journal.begin(device, Kind.NAMED)
    readings = device.readings(Kind.NAMED, number)
    async with _log(stage) as log:
        await log.append(partition_of(device.device.bytes, log.partitions), _newer(stage, device, readings))
    sender.journal.end(device, Kind.NAMED, number, Fate.ACKNOWLEDGED)
    yield
    await stage.worker.stop()
    upgraded = await stage.start_patched_worker(UPGRADE)
    await stage.stored([(device, readings[0])], STARTED_TIMEOUT_S)
    await upgraded.stop()
    await stage.start_worker()


def _newer(stage: Stage, device: Device, readings: list[Reading]) -> bytes:
    """Untimed readings as a record of the next version, which may have any fields behind those of today."""
    now = time.time_ns() // 1_000 - records.PG_EPOCH_US
    times = struct.pack(f">{len(readings)}q", *(now + at for at in range(len(readings))))
    values = struct.pack(f">{len(readings)}d", *(reading.value for reading in readings))
    channel = records.Channel(readings[0].metric, "", "", times, values, records.Quality.TIME_STAMPED.value)
    ids = uuid7().bytes, stage.organisation.bytes, device.device.bytes
    return records.encode(records.Record(records.VERSION + 1, *ids, now, "http", "by-hand", [channel]))


@_fault("undecodable-flood", rf"Undo the last deploy, or raise {UNDECODABLE_MAX}", stops_workers=True)
async def _undecodable_flood(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """What a bad deploy would write: the worker stops, and an operator tells it to set all that aside."""
    async with _log(stage) as log:
        for at in range(UNDECODABLE):
            await log.append(at % log.partitions, b"nobody can read this")
    yield
    await stage.start_worker(settings={UNDECODABLE_MAX: str(10 * UNDECODABLE)})


@_fault("one-organisations-flood")
async def _one_organisations_flood(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """Readings that are refused at the door, and such that landing refuses: nobody else is to notice."""
    registered = await registered_in(stage.parts, 1)
    async with _beside(_flood(stage, registered.tokens[0])):
        yield


async def _flood(stage: Stage, token: str) -> None:
    link = Link(stage.port)
    try:
        for number in count():
            names = [f"invented_{number}_{at}" for at in range(FLOOD_READINGS)]
            invented: list[dict[str, object]] = [{"type": name, "value": 1.0} for name in names]
            refused: list[dict[str, object]] = [{"type": name, "value": "NaN", "ts": "never"} for name in names]
            await link.connect()
            await link.ask(json_post(token, orjson.dumps({"measurements": invented if number % 2 else refused})))
            await asyncio.sleep(FLOOD_PAUSE_S)
    finally:
        link.close()


# ---------------------------------------------------------------- ingest


@_fault("ingest-kill", "a spool that another process left is drained", says_after=True)
async def _ingest_kill(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """One of two, with records in its spool, while the log is away."""
    async with _cut(stage.instance.kafka_proxy):
        spooling = await _spooling(stage)
        await asyncio.sleep(SPOOLING_S)
        signal_process(spooling, signal.SIGKILL)
        yield


async def _spooling(stage: Stage) -> int:
    """The process that first has a spool of its own; others may still wait for the log."""
    deadline = time.monotonic() + STARTED_TIMEOUT_S
    assert stage.ingest is not None
    while time.monotonic() < deadline:
        for pid in stage.children(stage.ingest):
            if _has_spool(pid):
                return pid
        await asyncio.sleep(0.2)
    raise BenchError("ingest does not spool though the log is away")


def _has_spool(pid: int) -> bool:
    with suppress(FileNotFoundError):  # what it closes meanwhile
        return any(file.readlink().suffix == SPOOL for file in Path(f"/proc/{pid}/fd").iterdir())
    return False


@_fault("rolling-restart-ingest", fails_nothing=True)
async def _rolling_restart_ingest(stage: Stage, _: Sender) -> AsyncIterator[None]:
    assert stage.ingest is not None
    async with _replaced(stage, stage.ingest, INGEST_PROCESSES):
        yield


# ---------------------------------------------------------------- MQTT


@_fault("bridge-kill", "a session was taken.*fence=([2-9]|[1-9][0-9])", by_mqtt=True)
async def _bridge_kill(stage: Stage, _: object) -> AsyncIterator[None]:
    """One of two, again and again, with another in its place."""
    over = asyncio.Event()
    killing = asyncio.create_task(_kill_bridges(stage, over))
    yield
    over.set()
    await killing


async def _kill_bridges(stage: Stage, over: asyncio.Event) -> None:
    while not over.is_set():
        await stage.kill_bridge(random.choice(stage.bridges))
        await stage.start_bridge()
        await asyncio.sleep(random.uniform(*KILL_EVERY_S))


_BROKEN: Final = "the connection to the broker ended"


@_fault("broker-kill", _BROKEN, by_mqtt=True, breaks_broker=True)
async def _broker_kill(stage: Stage, _: object) -> AsyncIterator[None]:
    """One that was written down a moment ago, as it is every minute."""
    await stage.instance.save_broker()
    await asyncio.sleep(UNSAVED_S)
    await stage.instance.services("kill", BROKER)
    yield
    await stage.instance.start(BROKER)


@_fault("broker-restart", _BROKEN, by_mqtt=True)
async def _broker_restart(stage: Stage, _: object) -> AsyncIterator[None]:
    """In order: it writes down what it has."""
    await stage.instance.services("stop", BROKER)
    yield
    await stage.instance.start(BROKER)


@_fault("mqtt-kafka-kill", f"{_BROKEN}|the log is away", by_mqtt=True)
async def _mqtt_kafka_kill(stage: Stage, _: object) -> AsyncIterator[None]:
    await stage.instance.services("kill", KAFKA)
    yield
    await stage.instance.start(KAFKA)


@_fault("mqtt-worker-kill", "a process ended.*status=-9", workers=2, by_mqtt=True)
async def _mqtt_worker_kill(stage: Stage, _: object) -> AsyncIterator[None]:
    async with _beside(_kill_again_and_again(stage)):
        yield


@_fault("mqtt-database-kill", _AWAY_DATABASE, by_mqtt=True)
async def _mqtt_database_kill(stage: Stage, _: object) -> AsyncIterator[None]:
    await stage.instance.services("kill", DATABASE)
    yield
    await stage.instance.start(DATABASE)


# ---------------------------------------------------------------- helpers


@asynccontextmanager
async def _replaced(stage: Stage, role: Role, processes: int) -> AsyncIterator[None]:
    """All of a role's processes, one by one."""
    before = set(await stage.wait_children(role, processes))
    role.process.send_signal(signal.SIGHUP)
    yield
    deadline = time.monotonic() + STARTED_TIMEOUT_S
    while before & set(now := stage.children(role)) or len(now) != processes:
        if time.monotonic() > deadline:
            raise BenchError(f"{role.process.name} has not replaced its processes: {before}, now {now}")
        await asyncio.sleep(LOOK_EVERY_S)


@asynccontextmanager
async def _log(stage: Stage) -> AsyncIterator[Log]:
    books = Books(stage.parts, stage.organisation)
    await books.open()
    try:
        log = await books.open_log()
        try:
            yield log
        finally:
            await log.close()
    finally:
        await books.close()


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Something that goes on for as long as the fault is there. Raises what it raised."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        done = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if done:
            task.result()
