"""What the tests of the bridge share: a broker of their own, bridges in this process, and a publisher.

Left out: the registry and the log (`ingest_rig`), landing (`landing_rig`).
"""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from prometheus_client import CollectorRegistry

from ingest.limits import Limits, LimitSettings
from ingest.mqtt.bridge import Bridge
from ingest.mqtt.compose import make_bridge
from ingest.mqtt.intake import Announcement
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import FAMILIES
from ingest.settings import IngestSettings
from runtime.clock import SystemClock
from runtime.log import Log
from runtime.mqtt import endpoint
from runtime.notifications import Notifications
from runtime.postgres import PostgresSettings, open_pool
from schemas import record as records
from schemas.record import Record
from tests.conftest import exports, run_services
from tests.ingest_rig import LIMIT_FIELDS, ROLE, UNLIMITED, Installation, Tenant
from tests.landing_rig import until

#: Quick enough that a test of a lost lease is not a wait.
SETTINGS: dict[str, Any] = {
    "mqtt_lease_ttl_s": 1.5,
    "mqtt_lease_renew_s": 0.1,
    "mqtt_retry_min_ms": 10,
    "mqtt_retry_max_ms": 200,
    "mqtt_stop_timeout_s": 5,
}


@dataclass
class Broker:
    """A Mosquitto of a test's own, in a state directory of its own."""

    directory: Path
    url: str

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def start(self) -> None:
        run_services("--dir", str(self.directory), "start", "mosquitto")

    def stop(self) -> None:
        run_services("--dir", str(self.directory), "stop", "mosquitto")

    def kill(self) -> None:
        run_services("--dir", str(self.directory), "kill", "mosquitto")

    def publish(self, topic: str, payload: bytes | str, *options: str) -> None:
        """One message at QoS 1, by the broker's own tool: success is its acknowledgement."""
        raw = payload if isinstance(payload, bytes) else payload.encode()
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.port), "-q", "1", "-t", topic, "-s", *options]
        subprocess.run(command, input=raw, check=True, timeout=20)

    def forget(self, topic: str) -> None:
        """What is retained there."""
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.port), "-q", "1", "-t", topic, "-r", "-n"]
        subprocess.run(command, check=True, timeout=20)

    def publish_lines(self, topic: str, lines: list[str]) -> None:
        """A message a line, on one connection and in order."""
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.port), "-q", "1", "-t", topic, "-l"]
        subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), check=True, timeout=60)


@contextmanager
def own_broker() -> Iterator[Broker]:
    directory = Path(mkdtemp(prefix="sluice-broker-"))
    try:
        printed = run_services("--dir", str(directory), "start", "mosquitto")
        yield Broker(directory, exports(printed)["SLUICE_MQTT_URL"])
    finally:
        run_services("--dir", str(directory), "wipe")
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Running:
    """A bridge that runs in this process."""

    bridge: Bridge
    log: Log
    registry: CollectorRegistry
    heard: list[Announcement] = field(default_factory=list)
    is_killed: bool = False

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels among others."""
        self.bridge._publish()
        return sum(
            sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def messages(self, result: str) -> float:
        return self.counted("sluice_mqtt_messages_total", result=result)

    async def done(self, result: str, count: int) -> None:
        """Until so many messages had this result."""

        async def reached() -> bool:
            return self.messages(result) >= count

        await until(reached)
        assert self.messages(result) == count

    async def connected(self, sessions: int = len(FAMILIES)) -> None:
        async def all_there() -> bool:
            return self.counted("sluice_mqtt_sessions") == sessions

        await until(all_there)

    async def settled(self) -> None:
        """Until the broker has an answer for everything that it sent."""

        async def nothing_open() -> bool:
            sessions = [session for session, _ in self.bridge._sessions.values()]
            return all(not len(session._window) and session._window.is_settled for session in sessions)

        await until(nothing_open)

    def mute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on nothing that it writes reaches the broker."""
        for session, _ in self.bridge._sessions.values():
            assert session._connection is not None
            monkeypatch.setattr(session._connection, "_flush", session._connection._acks.clear)
            monkeypatch.setattr(session._connection, "tick", lambda: None)

    async def kill(self) -> None:
        """As if the process was killed: nothing more is acknowledged, nothing given back."""
        bridge, self.is_killed = self.bridge, True
        for session, task in bridge._sessions.values():
            session.abort("killed by the test")
            task.cancel()
        tasks = [*bridge._tasks, *bridge._credentials.tasks, *(task for _, task in bridge._sessions.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bridge._intake.stop()


@asynccontextmanager
async def bridge(installation: Installation, broker: Broker, log: Log, **settings: Any) -> AsyncIterator[Running]:
    """A bridge with sessions of its own, unless `mqtt_broker` names some.

    `settings` are those of the bridge, of ingest and of limits.
    """
    postgres = PostgresSettings(database_url=installation.database.url)
    pool = await open_pool(postgres, role=ROLE, application="test", size_max=4)
    limits = UNLIMITED | {name: settings.pop(name) for name in list(settings) if name in LIMIT_FIELDS}
    ingest = {name: settings.pop(name) for name in list(settings) if not name.startswith("mqtt_")}
    registry = CollectorRegistry()
    clock = SystemClock()
    counted = Limits(LimitSettings(**limits), clock, installation.limits)
    heard: list[Announcement] = []
    made = make_bridge(
        endpoint(broker.url),
        log=log,
        pool=pool,
        listener=Notifications(postgres, role=ROLE, application="test"),
        limits=counted,
        settings=BridgeSettings(**(SETTINGS | {"mqtt_broker": uuid4().hex} | settings)),
        ingest=IngestSettings(**ingest),
        clock=clock,
        metrics=BridgeMetrics(registry),
        hear=heard.append,
    )
    await made.start()
    running = Running(made, log, registry, heard)
    watching = asyncio.create_task(made.watch())
    try:
        yield running
        assert running.is_killed or not watching.done(), watching.result()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        if not running.is_killed:
            await made.stop()
        counted.close()
        pool.terminate()


def topic(tenant: Tenant, device: Any = None) -> str:
    return f"v1/readings/{tenant.organisation}/{device or tenant.device}"


async def all_records(log: Log) -> list[Record]:
    """Everything that stands in the log."""
    reader = log.reader()
    bounds = await log.bounds()
    found: list[bytes] = []
    await reader.assign({partition: where.start for partition, where in bounds.items()})
    total = sum(where.end - where.start for where in bounds.values())
    while len(found) < total:
        for part in await reader.read(bytes_max=64_000_000, wait_s=1.0):
            found += part.bodies
    await reader.close()
    return [records.decode(body) for body in found]


async def records_of(log: Log, tenant: Tenant) -> list[Record]:
    return [record for record in await all_records(log) if record.organisation == tenant.organisation.bytes]
