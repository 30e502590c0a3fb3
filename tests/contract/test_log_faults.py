"""What the port promises while the broker, the link to it, or the disk does not play along.

The rule behind all of it: what an append reported as written is in the log exactly once, where it said; what it
reported as not known is there at most once; what it reported as unavailable is not there.
"""

import asyncio
import collections
import contextlib
import signal
import sqlite3
import ssl
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bench.proxy import Mode, Proxy
from runtime.errors import OutcomeUnknownError, UnavailableError
from runtime.log import Expected, Log, LogMisfitError, open_log
from runtime.log.kafka_log import KafkaLog
from runtime.log.sqlite_log import SqliteLog
from runtime.log.sqlite_store import Store
from tests.contract.conftest import (
    PARTITIONS,
    Broker,
    KafkaPlace,
    SqlitePlace,
    eventually,
    make,
    opened,
    read_all,
    run,
    troubled,
)
from tests.support import file_size_limit

TIMEOUT_MS = 1_500


class Ledger:
    """What the appends of a test were told."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._made = 0
        self.written: dict[bytes, tuple[int, int]] = {}
        self.unknown: list[bytes] = []
        self.unavailable: list[bytes] = []

    async def append(self, partition: int | None = None) -> None:
        self._made += 1
        body = b"record %d" % self._made
        partition = self._made % PARTITIONS if partition is None else partition
        try:
            self.written[body] = partition, await self._log.append(partition, body)
        except OutcomeUnknownError:
            self.unknown.append(body)
        except UnavailableError:
            self.unavailable.append(body)

    async def keep_appending(self) -> None:
        """Ten at a time, until cancelled; those under way are seen to their end."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                tasks |= {asyncio.create_task(self.append()) for _ in range(10)}
                await asyncio.sleep(0.005)
                tasks = {task for task in tasks if not task.done()}
        finally:
            await asyncio.gather(*tasks)

    async def until_more(self) -> None:
        """Until the appends under way go through."""
        before = len(self.written)
        await eventually(lambda: _same(len(self.written) > before, True))

    async def until_written(self) -> None:
        """Append until it works again."""
        before = len(self.written)
        while len(self.written) == before:
            await self.append()

    async def check(self, log: Log) -> None:
        found = await read_all(log)
        count = collections.Counter(body for bodies in found.values() for body in bodies)
        assert max(count.values()) == 1
        for body, (partition, position) in self.written.items():
            assert found[partition][position] == body
        assert not count.keys() & set(self.unavailable)
        assert count.keys() <= self.written.keys() | set(self.unknown)
        for bodies in found.values():  # in the order of their appends, the unknown ones too
            numbers = [int(body.split()[1]) for body in bodies]
            assert numbers == sorted(numbers)


async def _same(found: object, wanted: object) -> bool:
    return found == wanted


@contextlib.asynccontextmanager
async def appending(ledger: Ledger) -> AsyncIterator[None]:
    task = asyncio.create_task(ledger.keep_appending())
    try:
        await ledger.until_more()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def through_proxy(
    broker: Broker, *, timeout_ms: int = TIMEOUT_MS
) -> AsyncIterator[tuple[Proxy, Log, Expected, KafkaPlace]]:
    async with Proxy(broker.proxy_port, broker.port) as proxy:
        place = broker.place
        expected = await make(place)
        async with opened(place, expected, log_append_timeout_ms=timeout_ms) as log:
            await log.append(0, b"record 0")
            yield proxy, log, expected, place
            proxy.set_mode(Mode.PASS)


# ---------------------------------------------------------------- the broker and the link


def test_a_broker_that_is_killed_under_appends(broker: Broker) -> None:
    async def test() -> None:
        async with through_proxy(broker) as (_, log, _, _):
            ledger = Ledger(log)
            reader = log.reader()
            await reader.assign({3: 0})
            async with appending(ledger):
                await broker.kill()
                await eventually(lambda: _same(troubled(log) and bool(ledger.unavailable), True))
            await broker.start()
            await ledger.until_written()
            assert await reader.read(bytes_max=1_000_000, wait_s=10.0)
            await eventually(lambda: _well(log))
            await reader.close()
            ledger.written[b"record 0"] = 0, 0
            await ledger.check(log)

    run(test())


@pytest.mark.parametrize("mode", [Mode.BLACKHOLE, Mode.MUTE])
def test_a_link_that_goes_silent_under_appends(broker: Broker, mode: Mode) -> None:
    async def test() -> None:
        async with through_proxy(broker) as (proxy, log, _, _):
            ledger = Ledger(log)
            async with appending(ledger):
                proxy.set_mode(mode)
                await eventually(lambda: _same(troubled(log) and bool(ledger.unknown), True))
            proxy.set_mode(Mode.PASS)
            await ledger.until_written()
            ledger.written[b"record 0"] = 0, 0
            await ledger.check(log)

    run(test())


def test_links_that_are_cut_again_and_again(broker: Broker) -> None:
    async def test() -> None:
        async with through_proxy(broker, timeout_ms=10_000) as (proxy, log, _, _):
            ledger = Ledger(log)
            async with appending(ledger):
                for _ in range(10):
                    proxy.cut()
                    await ledger.until_more()
            assert not ledger.unknown + ledger.unavailable
            ledger.written[b"record 0"] = 0, 0
            await ledger.check(log)

    run(test())


def test_an_answer_that_is_lost_is_asked_for_again(broker: Broker) -> None:
    """The broker has written the batch; sent again under the same number, it is not written again."""

    async def test() -> None:
        async with through_proxy(broker, timeout_ms=10_000) as (proxy, log, expected, place):
            muted = list(proxy.links)
            for link in muted:
                link.mode = Mode.MUTE
            waiting = log.append(0, b"record 1")
            async with opened(place, expected) as other:
                await eventually(lambda: _ends_at(other, 0, 2))
            for link in muted:
                link.cut()
            assert await waiting == 1
            assert (await read_all(log))[0] == [b"record 0", b"record 1"]

    run(test())


async def _well(log: Log) -> bool:
    return not troubled(log)


async def _append_without_end(log: Log, body: bytes) -> None:
    while True:
        await log.append(1, body)


async def _ends_at(log: Log, partition: int, end: int) -> bool:
    return (await log.bounds())[partition].end == end


async def _limit_batches(admin: AIOKafkaAdminClient, topic: str, size: int) -> None:
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(size)})])


def test_a_batch_that_arrives_after_its_successor_is_refused(broker: Broker) -> None:
    """It was reported as not known; the records behind it went on under the next epoch of the producer."""

    async def test() -> None:
        async with through_proxy(broker) as (proxy, log, _, _):
            proxy.set_mode(Mode.HOLD)  # the links there are, and those on which the batch is sent again
            with pytest.raises(OutcomeUnknownError):
                await log.append(0, b"straggler")
            held = list(proxy.links)
            proxy.mode = Mode.PASS
            position = await _until_written(log, b"successor")
            for link in held:
                link.release()
                await link.answered.wait()
            assert position == 1
            assert await log.append(0, b"last") == 2
            assert (await read_all(log))[0] == [b"record 0", b"successor", b"last"]

    run(test())


async def _until_written(log: Log, body: bytes) -> int:
    while True:
        with contextlib.suppress(UnavailableError):
            return await log.append(0, body)


def test_a_broker_that_is_away_at_the_start(broker: Broker) -> None:
    async def test() -> None:
        place = broker.place
        settings = place.settings(log_append_timeout_ms=500)
        async with Proxy(broker.proxy_port, broker.port) as proxy:
            expected = await make(place)
            proxy.refuse = True
            proxy.cut()
            with pytest.raises(UnavailableError):
                await open_log(settings, expected, client_id="test")
            proxy.refuse, proxy.mode = False, Mode.BLACKHOLE
            with pytest.raises(UnavailableError):
                await open_log(settings, expected, client_id="test")
        with pytest.raises(UnavailableError):
            await open_log(settings, expected, client_id="test")

    run(test())


def test_a_producer_the_broker_disagrees_with_is_replaced(broker: Broker) -> None:
    """Provoked by a number that is wrong: the broker's own answers do the rest."""

    async def test() -> None:
        async with through_proxy(broker) as (_, log, _, _):
            assert isinstance(log, KafkaLog)
            lane = log._writer._lanes[0]
            producer = lane.producer
            lane.sequence += 7  # out of order
            assert await log.append(0, b"record 1") == 1
            assert (lane.producer, lane.epoch) == (producer, 1)
            lane.epoch = 0  # fenced
            assert await log.append(0, b"record 2") == 2
            assert lane.producer != producer
            assert not troubled(log)
            assert (await read_all(log))[0] == [b"record 0", b"record 1", b"record 2"]

    run(test())


def test_records_that_were_deleted_with_the_producers_state(broker: Broker) -> None:
    async def test() -> None:
        async with through_proxy(broker) as (_, log, expected, place):
            for n in range(1, 4):
                assert await log.append(0, b"record %d" % n) == n
            await place.forget(log, expected, {0: 4})
            assert await log.append(0, b"record 4") == 4
            assert (await read_all(log))[0] == [b"record 4"]

    run(test())


def test_a_batch_the_broker_refuses_harms_nobody_else(broker: Broker) -> None:
    async def test() -> None:
        async with through_proxy(broker) as (_, log, expected, place):
            async with place.admin() as admin:
                await _limit_batches(admin, expected.name, 5_000)
            with pytest.raises(UnavailableError, match="refuses"):
                await _append_without_end(log, bytes(10_000))  # until the broker has heard of the limit
            end = (await log.bounds())[1].end
            assert list(await asyncio.gather(log.append(1, b"a"), log.append(0, b"b"))) == [end, 1]

    run(test())


def test_a_topic_that_is_deleted_under_appends(broker: Broker) -> None:
    async def test() -> None:
        async with through_proxy(broker, timeout_ms=500) as (_, log, expected, place):
            await place.destroy(expected)
            for _ in range(3):
                with pytest.raises((UnavailableError, OutcomeUnknownError)):
                    await log.append(0, b"lost")
            assert troubled(log)
            with pytest.raises(UnavailableError):
                await log.bounds()

    run(test())


def test_a_broker_behind_tls(broker: Broker, tmp_path: Path) -> None:
    async def test() -> None:
        certificate, tls = await asyncio.to_thread(_self_signed, tmp_path)
        async with Proxy(broker.proxy_port, broker.port, tls):
            place = KafkaPlace(f"kafkas://127.0.0.1:{broker.proxy_port}?cafile={certificate}")
            expected = await make(place)
            async with opened(place, expected) as log:
                assert await log.append(0, b"over TLS") == 0
                assert (await read_all(log))[0] == [b"over TLS"]
            distrustful = KafkaPlace(f"kafkas://127.0.0.1:{broker.proxy_port}")
            with pytest.raises(UnavailableError, match="certificate"):
                await open_log(distrustful.settings(log_append_timeout_ms=500), expected, client_id="test")

    run(test())


def _self_signed(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for loopback, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path, key_path = directory / "certificate.pem", directory / "key.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key_path)
    return path, context


# ---------------------------------------------------------------- the file and the disk


def test_a_file_that_is_removed(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        async with opened(sqlite_place) as log:
            await log.append(0, b"written")
            for path in sqlite_place.directory.glob("*.db*"):
                path.unlink()
            with pytest.raises(UnavailableError, match="no file"):
                await log.append(0, b"lost")
            assert troubled(log)
            with pytest.raises(LogMisfitError):
                await log.bounds()

    run(test())


def test_a_file_that_another_process_keeps_locked(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        expected = await make(sqlite_place)
        async with opened(sqlite_place, expected, log_append_timeout_ms=300) as log:
            other = sqlite3.connect(sqlite_place.path(expected), isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            futures = [log.append(0, b"not written") for _ in range(3)]
            for future in futures:
                with pytest.raises(UnavailableError, match="locked"):
                    await future
            assert troubled(log)
            assert log.queued_bytes == 0
            other.execute("ROLLBACK")
            other.close()
            await eventually(lambda: _well(log))  # noticed without an append
            assert await log.append(0, b"written") == 0

    run(test())


def test_a_file_that_may_not_grow(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        async with opened(sqlite_place) as log:
            assert isinstance(log, SqliteLog)
            await log.bounds()
            (pages,) = await log._in_thread(_pragma, log, "page_count")
            await log._in_thread(_pragma, log, f"max_page_count = {pages + 2}")
            with pytest.raises(UnavailableError, match="full"):
                await log.append(0, bytes(100_000))
            assert troubled(log)
            assert await log.append(0, b"fits") == 0
            assert troubled(log)  # for what failed would fail again
            await eventually(lambda: _well(log))  # the connection that had the limit is gone

    run(test())


def _pragma(log: SqliteLog, text: str) -> tuple[int]:
    assert log._store._connection is not None
    found: tuple[int] = log._store._connection.execute(f"PRAGMA {text}").fetchone()
    return found


def test_a_full_disk_is_told_once_though_a_little_can_be_written(
    sqlite_place: SqlitePlace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for a page or two is no room for records."""
    monkeypatch.setattr("runtime.log.sqlite_log.WATCH_S", 0.02)
    caplog.set_level("INFO", "sluice.log")
    trials: list[int] = []
    probe = Store.probe

    def counted(store: Store, size: int, wait_s: float) -> None:
        trials.append(size)
        probe(store, size, wait_s)

    monkeypatch.setattr(Store, "probe", counted)

    async def test() -> None:
        async with opened(sqlite_place) as log:
            await log.append(0, b"first")
            with file_size_limit(200_000):
                replies = await asyncio.gather(log.append(0, bytes(300_000)), return_exceptions=True)
                assert isinstance(replies[0], OutcomeUnknownError | UnavailableError)
                assert await log.append(0, b"little") == 1

                async def tried_again() -> bool:
                    return len(trials) >= 5

                await eventually(tried_again)
                assert troubled(log)
            await eventually(lambda: _well(log))
            assert await log.append(0, bytes(300_000)) == 2
            assert [len(body) for body in (await read_all(log))[0]] == [5, 6, 300_000]

    run(test())
    assert [one.message for one in caplog.records] == ["the log cannot be used", "the log can be used again"]


def test_a_commit_the_disk_does_not_confirm(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        expected = await make(sqlite_place)
        async with opened(sqlite_place, expected) as log:
            await log.append(0, b"first")
            with file_size_limit(100_000):
                with pytest.raises(OutcomeUnknownError):
                    await log.append(0, bytes(200_000))
                assert troubled(log)
            assert await log.append(0, b"second") == 1
            assert (await read_all(log))[0] == [b"first", b"second"]

    run(test())


def test_a_file_of_another_format_is_refused(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        expected = await make(sqlite_place)
        path = sqlite_place.path(expected)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 2")
        connection.close()
        with pytest.raises(LogMisfitError, match="format 2"):
            await open_log(sqlite_place.settings(), expected, client_id="test")
        path.write_bytes(b"something else entirely" * 1_000)
        with pytest.raises(LogMisfitError, match="no log"):
            await open_log(sqlite_place.settings(), expected, client_id="test")

    run(test())


# Appends for ever and prints the number of each record once it is durable.
ENDLESS = """
import asyncio, sys
from uuid import UUID
from runtime.log import Expected, LogSettings, open_log

async def one(log, n):
    await log.append(n % log.partitions, b"%d" % n)
    print(n, flush=True)

async def main(url, source, name, identity):
    log = await open_log(LogSettings(log_url=url), Expected(UUID(source), name, identity, 4), client_id="test")
    for n in range(10**9):
        task = asyncio.create_task(one(log, n))
        await asyncio.sleep(0.0001)

asyncio.run(main(*sys.argv[1:]))
"""


def test_what_a_killed_process_was_told_is_written_is_written(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        expected = await make(sqlite_place)
        where = [sqlite_place.settings().log_url, str(expected.source), expected.name, expected.identity]
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", ENDLESS, *where],
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        told = {int(await process.stdout.readline()) for _ in range(1_000)}
        process.send_signal(signal.SIGKILL)
        told |= {int(line) for line in (await process.stdout.read()).splitlines()}
        await process.wait()
        async with opened(sqlite_place, expected) as log:
            found = await read_all(log)
            numbers = [[int(body) for body in bodies] for bodies in found.values()]
            assert told <= {number for partition in numbers for number in partition}
            for partition, appended in enumerate(numbers):
                assert appended == list(range(partition, partition + PARTITIONS * len(appended), PARTITIONS))

    run(test())


def flip_the_middle(path: Path) -> None:
    with path.open("r+b") as file:
        middle = file.seek(path.stat().st_size // 2)
        found = file.read(8)
        file.seek(middle)
        file.write(bytes(byte ^ 0xFF for byte in found))


def test_a_log_that_lost_what_it_acknowledged_is_not_opened(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        expected = await make(sqlite_place)
        where = [sqlite_place.settings().log_url, str(expected.source), expected.name, expected.identity]
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", ENDLESS, *where],
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(1_000):
            await process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        await process.communicate()
        wal = Path(f"{sqlite_place.path(expected)}-wal")
        flip_the_middle(wal)
        for _ in range(2):  # the first attempt leaves everything as it was
            with pytest.raises(UnavailableError, match=r"is damaged.*--new-generation"):
                await open_log(sqlite_place.settings(), expected, client_id="test")
        flip_the_middle(wal)
        async with opened(sqlite_place, expected) as log:
            assert sum(end for _, end in (await log.bounds()).values()) >= 1_000

    run(test())


def test_a_file_whose_records_land_stops_growing(sqlite_place: SqlitePlace) -> None:
    async def test() -> None:
        expected = await make(sqlite_place)
        async with opened(sqlite_place, expected) as log:
            sizes = []
            for _ in range(4):
                await asyncio.gather(*(log.append(n % PARTITIONS, bytes(2_000)) for n in range(2_000)))
                ends = {partition: bounds.end for partition, bounds in (await log.bounds()).items()}
                await sqlite_place.forget(log, expected, ends)
                assert isinstance(log, SqliteLog)
                (pages,) = await log._in_thread(_pragma, log, "page_count")
                sizes.append(pages)
            assert sizes[-1] <= sizes[0] * 1.2

    run(test())
