"""What a fault happens to: Kafka and a database of the suite's own, each behind a proxy, and the roles on top.

The parts live as long as the suite. Each run has a database and a log of its own, an organisation, two ingest
processes, workers, and a data directory; all of it is removed after it. Left out: what happens to them
(`bench.faults.catalogue`).
"""

import asyncio
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import asyncpg

from bench.books import Books, connect
from bench.errors import BenchError, within
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
from bench.registry import Registered, register
from bench.usage import family, free_port, listener
from runtime.postgres import UNAVAILABLE
from runtime.secrets import VARIABLE as KEYS_VARIABLE
from runtime.secrets import new_ring

DEVICES: Final = 64
INGEST_PROCESSES: Final = 2
BACK_BY_US: Final = 3_600_000_000
LOOK_EVERY_S: Final = 0.1
LOOK_TIMEOUT_S: Final = 2.0
LOOKED_TIMEOUT_S: Final = 60.0
ENDS_TIMEOUT_S: Final = 60.0
#: A slow load, or a busy machine, takes its time to meet a fault.
TOLD_TIMEOUT_S: Final = 60.0
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
        async with session(self.superuser_url(database)) as connection:
            yield connection


@asynccontextmanager
async def session(url: str) -> AsyncIterator[Any]:
    """Cut at its end. Raises `BenchError` when the database does not answer in time."""
    connection: Any = None
    try:
        connection = await connect(url)
        yield connection
    except TimeoutError:
        raise BenchError(f"waited in vain for an answer of the database {urlsplit(url).path[1:]}") from None
    finally:
        if connection is not None:
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
        self._watching: asyncio.Task[None] | None = None
        self._past: dict[Role, int] = {}

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
        """What all roles have logged, since `forget_said` if that was asked for."""
        return "\n".join(role.process.output()[self._past.get(role, 0) :] for role in self.roles)

    def forget_said(self) -> None:
        self._past = {role: len(role.process.output()) for role in self.roles}

    async def told(self, says: str) -> None:
        """Once the logs hold what `says` finds, or so late that they never will: that is judged at the end."""
        deadline = time.monotonic() + TOLD_TIMEOUT_S
        while not is_told(says, self.said()) and time.monotonic() < deadline:  # noqa: ASYNC110 - nothing else tells
            await asyncio.sleep(LOOK_EVERY_S)

    # ------------------------------------------------------------ the database and the log

    @asynccontextmanager
    async def superuser(self) -> AsyncIterator[Any]:
        async with self.instance.superuser(self.database) as connection:
            yield connection

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Meanwhile it is looked how much has landed, again and again, whether or not the database answers."""
        url = partial(self.instance.superuser_url, self.database)
        self._watching = asyncio.create_task(watch(url, self.landing), name="watch")
        try:
            yield
        finally:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def looked(self) -> None:
        """Once it was looked again. Raises `BenchError` when that takes too long, or nobody looks any more."""
        now = time.monotonic()
        async with within(LOOKED_TIMEOUT_S, "a look at how much has landed"):
            while not self.landing.moments or self.landing.moments[-1] < now:
                self._check_watching()
                await asyncio.sleep(LOOK_EVERY_S)

    async def landed(self, readings: int, timeout_s: float) -> None:
        """Once so many have. Raises `BenchError` when that takes too long, or nobody looks any more."""
        async with within(timeout_s, f"{readings} readings to land"):
            while not self.landing.landed or self.landing.landed[-1] < readings:
                self._check_watching()
                await asyncio.sleep(LOOK_EVERY_S)

    def _check_watching(self) -> None:
        assert self._watching is not None
        if self._watching.done():
            error = None if self._watching.cancelled() else self._watching.exception()
            raise BenchError(f"nobody looks any more how much has landed: {error!r}") from error

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
        left_s = max(1.0, deadline - time.monotonic())
        books = Books(self.parts, self.organisation)
        # It has a limit of its own, once it is known where the log ends.
        async with within(left_s + ENDS_TIMEOUT_S, "the ends of the log"):
            await books.open()
            try:
                await books.landed(left_s)
            finally:
                await books.close()


async def watch(url: Callable[[], str], landing: Landing) -> None:
    """Look how much has landed, again and again, whether or not the database answers; its owner cancels it."""
    connection: Any = None
    try:
        while True:
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_S):
                    if connection is None:
                        connection = await connect(url())
                    landed = await connection.fetchval(_LANDED)
                landing.add(time.monotonic(), landed)
            except (*UNAVAILABLE, asyncpg.PostgresError):
                if connection is not None:
                    connection.terminate()
                connection = None
            await asyncio.sleep(LOOK_EVERY_S)
    finally:
        if connection is not None:
            connection.terminate()


def is_told(says: str, said: str) -> bool:
    """Whether the logs hold what the regular expression finds, over all lines."""
    return re.search(says, said, re.DOTALL) is not None


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
        registered = await registered_in(parts, DEVICES)
        devices = [
            Device(number, device, token, begin_us)
            for number, (device, token) in enumerate(zip(registered.devices, registered.tokens, strict=True))
        ]
        shop = await stack.enter_async_context(workshop(parts))
        yield Stage(instance, database, parts, shop, registered.organisation, devices, settings)


async def registered_in(parts: Parts, devices: int) -> Registered:
    """An organisation with so many devices."""
    async with session(parts.database_url) as connection:
        return await register(connection, parts.environment[KEYS_VARIABLE], devices)


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
    try:
        async with within(START_TIMEOUT_S, "`sluice migrate`"):
            if await process.wait():
                raise BenchError("`sluice migrate` failed")
    finally:
        if process.returncode is None:
            process.kill()


async def _create(instance: Instance, database: str) -> None:
    async with instance.superuser("postgres") as connection:
        await connection.execute(f"CREATE DATABASE {database}")
    async with instance.superuser(database) as connection:
        await connection.execute(BOOTSTRAP.read_text())


async def _drop(instance: Instance, database: str) -> None:
    """A database that does not answer now goes with its server."""
    with suppress(BenchError, *UNAVAILABLE, asyncpg.PostgresError):
        async with instance.superuser("postgres") as connection:
            await connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


def signal_process(pid: int, number: signal.Signals) -> None:
    """To a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
