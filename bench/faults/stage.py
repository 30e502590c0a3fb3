"""What a fault happens to: Kafka and a database of the suite's own, each behind a proxy, and the roles on top.

The parts live as long as the suite. Each run has a database and a log of its own, an organisation, two ingest
processes, workers, and a data directory; all of it is removed after it. Left out: what happens to them
(`bench.faults.catalogue`).
"""

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg

from bench.books import Books
from bench.errors import BenchError
from bench.faults.sender import Landing
from bench.faults.traffic import Device, Reading
from bench.load import LOOPBACK
from bench.parts import (
    CHECKOUT,
    READY_TIMEOUT_S,
    START_TIMEOUT_S,
    Parts,
    Role,
    Workshop,
    progress,
    read_superuser_url,
    run_services,
    sluice_command,
    workshop,
)
from bench.proxy import Proxy
from bench.registry import register
from bench.usage import family, free_port, listener
from runtime.secrets import VARIABLE as KEYS_VARIABLE
from runtime.secrets import new_ring

DEVICES: Final = 64
INGEST_PROCESSES: Final = 2
BACK_BY_US: Final = 3_600_000_000
LOOK_EVERY_S: Final = 0.1
LOOK_TIMEOUT_S: Final = 2.0
BOOTSTRAP: Final = CHECKOUT / "deploy" / "sql" / "bootstrap.sql"
KAFKA, DATABASE, BROKER = "kafka", "timescaledb", "mosquitto"
BRIDGES: Final = 2

_IS_STORED: Final = """
SELECT count(*) FROM readings JOIN series USING (series_id) WHERE device_id = $1 AND metric = $2 AND value = $3"""
_LANDED: Final = "SELECT coalesce(sum(received), 0)::bigint FROM ledger"


class Instance:
    """Kafka and PostgreSQL in a state directory of the suite's own, and the proxies that lead there."""

    def __init__(self, home: Path, kafka_port: int, database_port: int, *, small_disk: bool) -> None:
        self.home = home
        self.kafka_proxy = Proxy(kafka_port, 0)
        self.database_proxy = Proxy(database_port, 0)
        self._kafka_port = kafka_port
        self._database_port = database_port
        self._small_disk = small_disk
        self._urls: dict[str, str] = {}
        self._runs = itertools.count(1)

    @property
    def log_url(self) -> str:
        return f"kafka://{LOOPBACK}:{self._kafka_port}"

    @property
    def data(self) -> Path:
        """The database's own directory."""
        return self.home / DATABASE / "volume" / "pgdata"

    def next_name(self) -> str:
        return f"fault_{next(self._runs)}"

    async def services(self, *arguments: str) -> str:
        return await asyncio.to_thread(run_services, self.home, *arguments)

    async def start(self, *names: str) -> None:
        """Those named that do not run, when none is the log and the database; done when they answer."""
        small = ["--small-disk"] if self._small_disk else []
        advertise = ["--kafka-advertise", str(self._kafka_port)]
        exported = await self.services("start", *(names or (KAFKA, DATABASE)), *small, *advertise)
        lines = [line.removeprefix("export ") for line in exported.splitlines()]
        self._urls |= dict(line.split("=", 1) for line in lines)
        self.kafka_proxy.target_port = _port(self._urls["SLUICE_LOG_URL"])
        self.database_proxy.target_port = _port(self._urls["SLUICE_DATABASE_URL"])

    async def fresh_broker(self) -> None:
        """One without the sessions of an earlier run, for which it would keep everything."""
        await self.services("stop", BROKER)
        shutil.rmtree(self.home / BROKER / "data", ignore_errors=True)
        await self.start(BROKER)

    async def save_broker(self) -> None:
        """Sessions, subscriptions and messages, into its file."""
        file = self.home / BROKER / "data" / "mosquitto.db"
        signal_process(listener(self.broker_port), signal.SIGUSR1)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not await asyncio.to_thread(file.exists):
            if time.monotonic() > deadline:
                raise BenchError("the broker does not write down what it has")
            await asyncio.sleep(LOOK_EVERY_S)

    @property
    def broker_url(self) -> str:
        return self._urls["SLUICE_MQTT_URL"]

    @property
    def broker_port(self) -> int:
        return _port(self.broker_url)

    async def restart(self, name: str) -> None:
        await self.services("restart", name, "--kafka-advertise", str(self._kafka_port))

    def url(self, variable: str, database: str, *, proxied: bool = True) -> str:
        place = urlsplit(self._urls[variable])
        port = self._database_port if proxied else place.port
        login = f"{place.username}:{place.password}"
        return urlunsplit(place._replace(netloc=f"{login}@{LOOPBACK}:{port}", path=f"/{database}"))

    def superuser_url(self, database: str) -> str:
        """Straight to the database."""
        return urlunsplit(urlsplit(read_superuser_url(self.home))._replace(path=f"/{database}"))

    @asynccontextmanager
    async def superuser(self, database: str) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.superuser_url(database))
        try:
            yield connection
        finally:
            connection.terminate()


def _port(url: str) -> int:
    port = urlsplit(url).port
    if port is None:
        raise BenchError("a part tells no port")
    return port


def _home(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="faults-", dir=directory))


@asynccontextmanager
async def own_parts(directory: Path, *, small_disk: bool = False) -> AsyncIterator[Instance]:
    """Parts that answer; stopped and removed at the end."""
    home = await asyncio.to_thread(_home, directory)
    instance = Instance(home, free_port(), free_port(), small_disk=small_disk)
    progress(f"starting Kafka and TimescaleDB in {home}")
    try:
        async with instance.kafka_proxy, instance.database_proxy:
            await instance.start()
            yield instance
    finally:
        await asyncio.shield(instance.services("wipe"))


# ---------------------------------------------------------------- one run


class Stage:
    """Everything of one run."""

    def __init__(
        self,
        instance: Instance,
        database: str,
        parts: Parts,
        shop: Workshop,
        organisation: UUID,
        devices: Sequence[Device],
        settings: Mapping[str, str],
    ) -> None:
        self.instance = instance
        self.database = database
        self.parts = parts
        self.organisation = organisation
        self.devices = devices
        self.landing = Landing()
        self.port = free_port()
        self.roles: list[Role] = []
        self.bridges: list[Role] = []
        self.killed: list[Role] = []
        self.ingest: Role | None = None
        self._shop = shop
        self._settings = settings

    # ------------------------------------------------------------ roles

    async def start_ingest(self) -> None:
        self.ingest = await self._start(
            "ingest",
            SLUICE_HTTP_LISTEN=f"{LOOPBACK}:{self.port}",
            SLUICE_HTTP_PROCESSES=str(INGEST_PROCESSES),
        )

    async def start_bridges(self) -> None:
        await asyncio.gather(*(self.start_bridge() for _ in range(BRIDGES)))

    async def start_bridge(self) -> None:
        self.bridges.append(await self._start("bridge", SLUICE_MQTT_URL=self.instance.broker_url))

    async def kill_bridge(self, bridge: Role) -> None:
        """As a machine that goes away."""
        self.bridges.remove(bridge)
        self.killed.append(bridge)
        bridge.process.send_signal(signal.SIGKILL)

    async def start_worker(self, processes: int = 1, settings: Mapping[str, str] | None = None) -> Role:
        self.worker = await self._start("worker", SLUICE_WORKER_PROCESSES=str(processes), **(settings or {}))
        return self.worker

    async def start_patched_worker(self, patch: str) -> Role:
        """A worker of another release: `patch` is Python that runs before it starts."""
        metrics = free_port()
        environment = {**self.parts.environment, **self._settings, "SLUICE_METRICS_LISTEN": f"{LOOPBACK}:{metrics}"}
        command = sluice_command("worker")
        program = f"import sys\n{patch}\nsys.argv = ['sluice', 'worker']\nfrom deploy.cli import main\nmain()"
        argv = [command[0], "-c", program]
        process = await self._shop.start("patched worker", argv, _probe(metrics), environment)
        role = Role(process, metrics)
        self.roles.append(role)
        return role

    async def _start(self, name: str, **settings: str) -> Role:
        role = await self._shop.role(name, **{**self._settings, **settings})
        self.roles.append(role)
        return role

    def children(self, role: Role) -> list[int]:
        """The processes that do a role's work."""
        found = family(role.pid)
        return [pid for pid, stat in found.items() if stat.parent == role.pid]

    async def wait_children(self, role: Role, number: int) -> list[int]:
        """That so many have been started. Raises `BenchError` when that takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while len(found := self.children(role)) < number:
            if time.monotonic() > deadline:
                raise BenchError(f"{role.process.name} has {len(found)} processes instead of {number}")
            await asyncio.sleep(LOOK_EVERY_S)
        return found

    def said(self) -> str:
        """What all roles have logged."""
        return "\n".join(role.process.output() for role in self.roles)

    # ------------------------------------------------------------ the database and the log

    @asynccontextmanager
    async def superuser(self) -> AsyncIterator[Any]:
        async with self.instance.superuser(self.database) as connection:
            yield connection

    async def watch(self) -> None:
        """Look how much has landed, again and again, whether or not the database answers; its owner cancels it."""
        connection: Any = None
        try:
            while True:
                try:
                    if connection is None:
                        url = self.instance.superuser_url(self.database)
                        connection = await asyncpg.connect(url, timeout=LOOK_TIMEOUT_S)
                    landed = await connection.fetchval(_LANDED, timeout=LOOK_TIMEOUT_S)
                    self.landing.add(time.monotonic(), landed)
                except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    if connection is not None:
                        connection.terminate()
                    connection = None
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            if connection is not None:
                connection.terminate()

    async def looked(self) -> None:
        """Once `watch` has looked again."""
        now = time.monotonic()
        while not self.landing.moments or self.landing.moments[-1] < now:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(LOOK_EVERY_S)

    async def _spooled(self) -> float:
        return (
            0.0 if self.ingest is None else (await self.ingest.metrics()).get("sluice_ingest_spool_depth_records", 0)
        )

    async def stored(self, readings: Sequence[tuple[Device, Reading]], timeout_s: float) -> None:
        """Once all of these are. Raises `BenchError` when that takes too long."""
        deadline = time.monotonic() + timeout_s
        async with self.superuser() as connection:
            for device, reading in readings:
                while not await connection.fetchval(_IS_STORED, device.device, reading.metric, reading.value):
                    if time.monotonic() > deadline:
                        raise BenchError(f"not stored after {timeout_s:g} s: device {device.number}, {reading}")
                    await asyncio.sleep(LOOK_EVERY_S)

    async def settled(self, timeout_s: float) -> None:
        """Once no spool holds a record and all of the log has landed. Raises `BenchError` when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while depth := await self._spooled():
            if time.monotonic() > deadline:
                raise BenchError(f"{depth:.0f} records are still in spools after {timeout_s:g} s")
            await asyncio.sleep(LOOK_EVERY_S)
        books = Books(self.parts, self.organisation)
        await books.open()
        try:
            await books.landed(max(1.0, deadline - time.monotonic()))
        finally:
            await books.close()


def _probe(port: int) -> str:
    return f"http://{LOOPBACK}:{port}/health/ready"


@asynccontextmanager
async def open_stage(instance: Instance, settings: Mapping[str, str]) -> AsyncIterator[Stage]:
    """A run's own database, log and devices; its roles are started by the run, and ended here."""
    await instance.start()
    database = instance.next_name()
    async with AsyncExitStack() as stack:
        await _create(instance, database)
        stack.push_async_callback(_drop, instance, database)
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="sluice-faults-", ignore_cleanup_errors=True)
        )
        parts = Parts(_environment(instance, database, directory), 0, 0, instance.superuser_url(database))
        await _migrate(parts)
        begin_us = time.time_ns() // 1_000 - BACK_BY_US
        connection = await asyncpg.connect(parts.database_url)
        registered = await register(connection, parts.environment[KEYS_VARIABLE], DEVICES)
        await connection.close()
        devices = [
            Device(number, device, token, begin_us)
            for number, (device, token) in enumerate(zip(registered.devices, registered.tokens, strict=True))
        ]
        shop = await stack.enter_async_context(workshop(parts))
        yield Stage(instance, database, parts, shop, registered.organisation, devices, settings)


def _environment(instance: Instance, database: str, directory: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    variables = ("SLUICE_DATABASE_URL", "SLUICE_DATABASE_OWNER_URL")
    return {
        **kept,
        **{variable: instance.url(variable, database) for variable in variables},
        "SLUICE_LOG_URL": instance.log_url,
        "SLUICE_DATA_DIR": directory,
        KEYS_VARIABLE: str(new_ring()),
    }


async def _migrate(parts: Parts) -> None:
    environment = {**parts.environment, "SLUICE_LOG_LEVEL": "error"}
    process = await asyncio.create_subprocess_exec(
        *sluice_command("migrate"), env=environment, stdout=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(START_TIMEOUT_S):
        if await process.wait():
            raise BenchError("`sluice migrate` failed")


async def _create(instance: Instance, database: str) -> None:
    async with instance.superuser("postgres") as connection:
        await connection.execute(f"CREATE DATABASE {database}")
    async with instance.superuser(database) as connection:
        await connection.execute(BOOTSTRAP.read_text())


async def _drop(instance: Instance, database: str) -> None:
    """A database that does not answer now goes with its server."""
    with suppress(OSError, asyncpg.PostgresError):
        async with instance.superuser("postgres") as connection:
            await connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


def signal_process(pid: int, number: signal.Signals) -> None:
    """To a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
