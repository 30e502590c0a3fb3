"""Thousands of plants with certificates on a broker that is restarted: how soon all are back, and what became of it.

They are made through the API and act as `bench.simulator` has it, on a Mosquitto of the run's own with TLS, taken by
a bridge of its own. Left out: how figures are shown (`bench.report`).
"""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import quote, urlencode

import asyncpg

from bench.api import add_key
from bench.books import Books
from bench.errors import BenchError
from bench.parts import Parts, Workshop, progress, sluice_command
from bench.registry import register
from bench.simulator.fleet import Fleet, Options
from bench.simulator.plants import Api, Broker
from bench.usage import free_port, memory_bytes
from runtime.mqtt import Address
from runtime.tls import client_context
from schemas.plants import AuthMethod

LOOPBACK: Final = "127.0.0.1"
PROGRAM: Final = "/usr/sbin/mosquitto"
#: Messages a second, of each plant: within the limit that a device has.
RATE: Final = 0.1
FLOWS_S: Final = 10.0
CONNECTED_TIMEOUT_S: Final = 300.0
LANDED_TIMEOUT_S: Final = 120.0
STARTS_S: Final = 20.0

_ACT: Final = "SELECT set_config('sluice.organisation', $1, true)"
_CONFIGURATION: Final = """
per_listener_settings true
user root
persistence true
persistence_location {directory}/
autosave_interval 60
max_queued_messages 0
max_queued_bytes 0
max_inflight_messages 2000
log_dest none
listener {plain} 127.0.0.1
allow_anonymous true
listener {tls} 127.0.0.1
allow_anonymous false
cafile {directory}/roots.pem
certfile {directory}/server.crt
keyfile {directory}/server.key
require_certificate true
use_identity_as_username true
acl_file {directory}/acl
"""
_ACL: Final = """
pattern readwrite cpi/%u/#
pattern write v1/readings/+/%u
"""


@dataclass(frozen=True)
class Reconnected:
    """What a fleet went through."""

    plants: int
    provisioned_s: float
    connected_s: float
    """Until all were, for the first time."""
    back_s: float | None
    """From the broker's new start until all were connected again; None: not all were."""
    flowed_s: float | None
    """From the broker's new start until a reading sent after it was committed."""
    acknowledged: int
    """Messages of one reading, by the broker."""
    redelivered: int
    stored: int
    waiting: int
    failures: int
    cpu_ms_a_connection: float
    """Of the fleet's process."""
    idle_cpu_share: float
    """Of one core, with all connected and nothing said."""
    kilobytes_a_plant: float

    @property
    def lost(self) -> int:
        """Readings that the broker acknowledged and nobody has."""
        return self.acknowledged - self.stored


async def reconnected(parts: Parts, shop: Workshop, plants: int, pid: int) -> Reconnected:
    """`pid` is this process's. Raises `BenchError` when it cannot be run."""
    with TemporaryDirectory(prefix="sluice-bench-broker-") as name:
        directory = Path(name)
        await asyncio.to_thread(_certify, parts, directory)
        with _broker(directory) as broker:
            url = f"mqtt://{LOOPBACK}:{broker.plain}"
            await shop.role("bridge", SLUICE_MQTT_URL=url, SLUICE_MQTT_BROKER=f"bench-{broker.tls}")
            await shop.role("worker")
            async with _api(parts, shop, broker.tls, directory) as (api, books):
                return await _run(api, books, broker, plants, pid)


async def _run(api: Api, books: Books, broker: "_Broker", plants: int, pid: int) -> Reconnected:
    progress(f"making and provisioning {plants} plants")
    began_s = time.perf_counter()
    fleet = await Fleet.make(api, Options(plants, AuthMethod.MTLS, RATE * plants, 1, form="readings"))
    provisioned_s = time.perf_counter() - began_s
    progress("connecting them")
    before_bytes, before_cpu_s = memory_bytes(pid, "VmRSS"), time.process_time()
    async with fleet:
        connected_s = await fleet.until_connected(CONNECTED_TIMEOUT_S)
        if connected_s is None:
            raise BenchError(f"{fleet.connected} of {plants} plants are connected: {dict(fleet.counts.failures)}")
        cpu_ms = (time.process_time() - before_cpu_s) * 1e3 / plants
        kilobytes = (memory_bytes(pid, "VmRSS") - before_bytes) / 1e3 / plants
        await asyncio.sleep(FLOWS_S)
        progress("restarting their broker")
        await asyncio.to_thread(broker.restart)
        before = await books.stored()
        restarted_s = time.perf_counter()
        flowing = asyncio.create_task(_until_more(books, before))
        back_s = await fleet.until_connected(CONNECTED_TIMEOUT_S)
        flowed_s = await flowing
        await asyncio.sleep(FLOWS_S)
        await fleet.silence()
        idle_s, idle_began_s = time.process_time(), time.perf_counter()
        await asyncio.sleep(FLOWS_S)
        idle = (time.process_time() - idle_s) / (time.perf_counter() - idle_began_s)
    summary = fleet.summary()
    counts = summary.counts
    stored = await _settled(books, counts.acknowledged)
    return Reconnected(
        plants=plants,
        provisioned_s=provisioned_s,
        connected_s=connected_s,
        back_s=back_s,
        flowed_s=None if flowed_s is None else flowed_s - restarted_s,
        acknowledged=counts.acknowledged,
        redelivered=counts.redelivered,
        stored=stored,
        waiting=summary.waiting,
        failures=sum(counts.failures.values()),
        cpu_ms_a_connection=cpu_ms,
        idle_cpu_share=idle,
        kilobytes_a_plant=kilobytes,
    )


async def _until_more(books: Books, before: int) -> float | None:
    """When more was stored; None where that takes too long."""
    deadline = time.perf_counter() + LANDED_TIMEOUT_S
    while await books.stored() <= before:
        if time.perf_counter() > deadline:
            return None
        await asyncio.sleep(0.1)
    return time.perf_counter()


async def _settled(books: Books, wanted: int) -> int:
    """What is stored once it is all there, or nothing more comes."""
    deadline = time.perf_counter() + LANDED_TIMEOUT_S
    while True:
        stored = await books.stored()
        if stored >= wanted or time.perf_counter() > deadline:
            return stored
        await asyncio.sleep(0.2)


# ---------------------------------------------------------------- the broker


@dataclass
class _Broker:
    """A Mosquitto of the run's own: a listener for the bridge, and one that asks for certificates."""

    directory: Path
    plain: int
    tls: int
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Once it listens. Raises `BenchError`."""
        self.process = subprocess.Popen(
            [PROGRAM, "-c", str(self.directory / "mosquitto.conf")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + STARTS_S
        while not _listens(self.plain):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError("a broker of the run's own does not start")
            time.sleep(0.02)

    def restart(self) -> None:
        """In order: what it has is written down."""
        self.stop()
        self.start()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(STARTS_S)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


@contextmanager
def _broker(directory: Path) -> Iterator[_Broker]:
    broker = _Broker(directory, free_port(), free_port())
    (directory / "acl").write_text(_ACL)
    (directory / "acl").chmod(0o600)
    text = _CONFIGURATION.format(directory=directory, plain=broker.plain, tls=broker.tls)
    (directory / "mosquitto.conf").write_text(text)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def _certify(parts: Parts, directory: Path) -> None:
    """The installation's authority vouches for the broker; it is made where there is none."""
    if not json.loads(_sluice(parts, "ca", "show", "--json"))["authorities"]:
        _sluice(parts, "ca", "init", "--name", "Bench")
    _sluice(parts, "ca", "export", "--output", str(directory / "roots.pem"))
    _sluice(parts, "ca", "server-certificate", "--name", LOOPBACK, "--output", str(directory))


def _sluice(parts: Parts, *arguments: str) -> str:
    done = subprocess.run(
        sluice_command(*arguments), env=dict(parts.environment), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"`sluice {' '.join(arguments[:2])}` failed")
    return done.stdout


# ---------------------------------------------------------------- the API


@asynccontextmanager
async def _api(parts: Parts, shop: Workshop, port: int, directory: Path) -> AsyncIterator[tuple[Api, Books]]:
    """The Plants face for an organisation of the run's own, and its books."""
    connection = await asyncpg.connect(parts.database_url)
    try:
        registered = await register(connection, parts.environment["SLUICE_SECRET_KEYS"], 1)
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE sluice_app")
            await connection.execute(_ACT, str(registered.organisation))
            key = await add_key(connection, registered, parts)
    finally:
        await connection.close()
    listens = free_port()
    await shop.role("api", SLUICE_API_LISTEN=f"{LOOPBACK}:{listens}")
    books = Books(parts, registered.organisation)
    await books.open()
    asked = http.client.HTTPConnection(LOOPBACK, listens, timeout=60)

    def ask(method: str, *path: str, body: object = None, **query: object) -> Any:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        target = "/" + "/".join(quote(part, safe="") for part in path) + (f"?{urlencode(query)}" if query else "")
        asked.request(method, target, None if body is None else json.dumps(body), headers)
        answer = asked.getresponse()
        raw = answer.read()
        if answer.status >= 300:
            raise BenchError(f"{method} {target} was answered {answer.status}: {raw[:200]!r}")
        return json.loads(raw)

    tls = client_context("bench", {"cafile": str(directory / "roots.pem")})
    try:
        yield Api(ask, registered.organisation, Broker(Address(LOOPBACK, port, tls), None)), books
    finally:
        asked.close()
        await books.close()
