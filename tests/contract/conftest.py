"""Where the contract suite keeps its logs: each engine on its real part."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import UUID, uuid4

import pytest
import uvloop
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import TopicPartition

from bench.usage import free_port
from runtime.log import Expected, Log, LogSettings, create_log, open_log
from tests.conftest import exports, run_services

PARTITIONS = 4
RUN_TIMEOUT_S = 240.0

T = TypeVar("T")


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run a test to its end, which is never far."""

    async def bounded() -> T:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            return await test

    return uvloop.run(bounded())  # as every role does


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds; `run` bounds how long."""
    for _ in range(1_000_000):
        if await check():
            return
        await asyncio.sleep(0.01)


def troubled(log: Log) -> bool:
    return log.trouble is not None


class Place(Protocol):
    """One engine, with what a test does to a log behind its back."""

    engine: str

    def settings(self, **overrides: Any) -> LogSettings: ...

    async def forget(self, log: Log, expected: Expected, positions: Mapping[int, int]) -> None:
        """Delete what stands below these positions, and return when it is gone."""
        ...

    async def destroy(self, expected: Expected) -> None:
        """Delete the log."""
        ...


class SqlitePlace:
    engine = "sqlite"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def settings(self, **overrides: Any) -> LogSettings:
        fields: dict[str, Any] = {"log_url": f"sqlite:///{self.directory}", "log_keep_landed_h": 0}
        return LogSettings(**fields | overrides)

    def path(self, expected: Expected) -> Path:
        return self.directory / f"{expected.name}.db"

    async def forget(self, log: Log, expected: Expected, positions: Mapping[int, int]) -> None:
        before = await log.bounds()
        await log.landed(positions)

        async def changed() -> bool:
            return before != await log.bounds()

        await eventually(changed)

    async def destroy(self, expected: Expected) -> None:
        for path in self.directory.glob(f"{expected.name}.db*"):
            path.unlink()


class KafkaPlace:
    engine = "kafka"

    def __init__(self, url: str) -> None:
        self._url = url
        self._broker = url.removeprefix("kafka://")

    def settings(self, **overrides: Any) -> LogSettings:
        return LogSettings(log_url=self._url, **overrides)

    @contextlib.asynccontextmanager
    async def admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        admin = AIOKafkaAdminClient(bootstrap_servers=self._broker)
        await admin.start()
        try:
            yield admin
        finally:
            await admin.close()

    async def forget(self, log: Log, expected: Expected, positions: Mapping[int, int]) -> None:
        async with self.admin() as admin:
            await admin.delete_records(
                {TopicPartition(expected.name, n): RecordsToDelete(position) for n, position in positions.items()}
            )

    async def destroy(self, expected: Expected) -> None:
        async with self.admin() as admin:
            await admin.delete_topics([expected.name])


async def make(place: Place, partitions: int = PARTITIONS, source: UUID | None = None) -> Expected:
    """A new log, as the database would know it."""
    source = source or uuid4()
    name = f"test.{source}"
    identity = await create_log(place.settings(), source=source, name=name, partitions=partitions)
    return Expected(source, name, identity, partitions)


@contextlib.asynccontextmanager
async def opened(place: Place, expected: Expected | None = None, **overrides: Any) -> AsyncIterator[Log]:
    """A log that is open; a new one, unless `expected` says which."""
    mine = expected is None
    expected = expected or await make(place)
    try:
        log = await open_log(place.settings(**overrides), expected, client_id="test")
        try:
            yield log
        finally:
            await log.close()
    finally:
        if mine:
            await place.destroy(expected)


async def read_all(log: Log, *, wait_s: float = 10.0) -> dict[int, list[bytes]]:
    """Everything from the start to the end the log has now, with the positions checked."""
    bounds = await log.bounds()
    found: dict[int, list[bytes]] = {partition: [] for partition in bounds}
    missing = sum(end - start for start, end in bounds.values())
    reader = log.reader()
    try:
        await reader.assign({partition: start for partition, (start, _) in bounds.items()})
        while missing > 0:
            slices = await reader.read(bytes_max=1_000_000, wait_s=wait_s)
            assert slices, f"{missing} records are missing: {log.trouble}"
            for part in slices:
                assert part.first == bounds[part.partition].start + len(found[part.partition])
                found[part.partition] += part.bodies
                missing -= len(part.bodies)
    finally:
        await reader.close()
    return found


@pytest.fixture(params=["sqlite", "kafka"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each engine in turn."""
    if request.param == "sqlite":
        return SqlitePlace(tmp_path)
    return KafkaPlace(request.getfixturevalue("services")["SLUICE_LOG_URL"])


@pytest.fixture
def sqlite_place(tmp_path: Path) -> SqlitePlace:
    return SqlitePlace(tmp_path)


@dataclasses.dataclass(frozen=True)
class Broker:
    """A broker of its own, to be harmed. It sends its clients to `proxy_port`, where a test listens, or nobody."""

    directory: Path
    port: int
    proxy_port: int

    @property
    def place(self) -> KafkaPlace:
        return KafkaPlace(f"kafka://127.0.0.1:{self.proxy_port}")

    async def services(self, *arguments: str) -> None:
        await asyncio.to_thread(run_services, *arguments, "--dir", str(self.directory))

    async def kill(self) -> None:
        await self.services("kill", "kafka")

    async def start(self) -> None:
        await self.services("start", "kafka", "--kafka-advertise", str(self.proxy_port))


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    directory = tmp_path_factory.mktemp("broker")
    proxy_port = free_port()
    try:
        printed = run_services("start", "kafka", "--kafka-advertise", str(proxy_port), "--dir", str(directory))
        port = int(exports(printed)["SLUICE_LOG_URL"].rpartition(":")[2])
        yield Broker(directory, port, proxy_port)
    finally:
        run_services("wipe", "--dir", str(directory))
