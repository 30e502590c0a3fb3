"""Messages through real parts that break under load, one after another: each stands once, none is lost.

The broker is restarted in order: what one loses that is killed, no bridge has seen.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from bench.publish import message, publish
from ingest.mqtt.topics import FAMILIES
from tests.conftest import exports, run_services
from tests.support import eventually
from tests.system.roles import Role, clean_environment, role, sluice, start_role

DEVICES = 8
MESSAGES = 40_000
#: How two bridges share the sessions.
HALVES = [len(FAMILIES) // 2, -(-len(FAMILIES) // 2)]
QUICK = {
    "SLUICE_MQTT_LEASE_TTL_S": "2",
    "SLUICE_MQTT_LEASE_RENEW_S": "0.3",
    "SLUICE_MQTT_RETRY_MAX_MS": "500",
    "SLUICE_LIMIT_DEVICE_REQUESTS_PER_MINUTE": "0",
    "SLUICE_LIMIT_ORGANISATION_REQUESTS_PER_MINUTE": "0",
    "SLUICE_LANDING_LEASE_TTL_S": "2",
    "SLUICE_LANDING_LEASE_RENEW_S": "0.3",
}


@dataclass
class Stage:
    """Parts of the test's own, and what was published there."""

    directory: Path
    environment: dict[str, str]
    organisation: str
    devices: list[str]
    published: int = 0
    publishers: list[Thread] = field(default_factory=list)

    def part(self, command: str, name: str) -> None:
        run_services("--dir", str(self.directory), command, name)

    def publish(self, count: int) -> None:
        """In the background: each message has a value of its own, no time, and one of the two topics."""
        first, self.published = self.published, self.published + count
        lanes: list[list[Any]] = [[] for _ in range(4)]
        for number in range(first, first + count):
            device = self.devices[number % DEVICES]
            topic = f"v1/readings/{self.organisation}/{device}"
            if number % 3 == 0:
                topic = f"opensense/{self.organisation}/{device}"
            payload = json.dumps({"measurements": [{"type": "counted", "value": number}]})
            lanes[number % DEVICES % 4].append(message(topic, payload.encode()))
        port = urlsplit(self.environment["SLUICE_MQTT_URL"]).port or 1883
        thread = Thread(target=lambda: asyncio.run(_publish(port, lanes)))
        thread.start()
        self.publishers.append(thread)

    def stored(self) -> int:
        return int(self.query("SELECT count(*) FROM readings"))

    def query(self, text: str) -> Any:
        async def ask() -> Any:
            settings = {"role": "sluice_worker"}
            connection = await asyncpg.connect(self.environment["SLUICE_DATABASE_URL"], server_settings=settings)
            try:
                return await connection.fetchval(text)
            finally:
                await connection.close()

        return asyncio.run(ask())

    def under_way(self) -> None:
        """Some of what is published now is stored, and not all of it."""
        before = self.published - MESSAGES
        eventually("messages flow", lambda: self.stored() > before + 200, 60)
        assert self.stored() < self.published

    def all_stored(self) -> None:
        for thread in self.publishers:
            thread.join(60)
            assert not thread.is_alive()
        eventually(f"all {self.published} stand", lambda: self.stored() >= self.published, 120)
        assert self.stored() == self.published
        assert self.query("SELECT count(DISTINCT value) FROM readings") == self.published


async def _publish(port: int, lanes: list[list[Any]]) -> None:
    await publish("127.0.0.1", port, lanes, 60)


@pytest.fixture
def stage() -> Iterator[Stage]:
    directory = Path(mkdtemp(prefix="sluice-bridge-"))
    try:
        found = exports(run_services("--dir", str(directory), "start"))
        environment = clean_environment(**found, **QUICK)
        environment["SLUICE_SECRET_KEYS"] = sluice(environment, "token", "keys").strip()
        sluice(environment, "migrate")
        demo = json.loads(sluice(environment, "seed", "--json"))
        organisation = demo["organisation_id"]
        devices = asyncio.run(_devices(environment["SLUICE_DATABASE_URL"], organisation))
        yield Stage(directory, environment, organisation, devices)
    finally:
        run_services("--dir", str(directory), "wipe")
        shutil.rmtree(directory, ignore_errors=True)


async def _devices(url: str, organisation: str) -> list[str]:
    connection = await asyncpg.connect(url, server_settings={"role": "sluice_app"})
    try:
        await connection.execute("SELECT set_config('sluice.organisation', $1, false)", organisation)
        made = []
        for number in range(DEVICES):
            device = await connection.fetchval(
                "INSERT INTO devices (device_id, organisation_id, name, local_id)"
                " VALUES (gen_random_uuid(), $1::text::uuid, 'test', $2) RETURNING device_id",
                organisation,
                f"d{number}",
            )
            made.append(str(device))
        return made
    finally:
        await connection.close()


def test_no_message_is_lost_or_doubled_whatever_breaks(stage: Stage) -> None:
    roles: list[Role] = []

    def start(name: str) -> Role:
        started = start_role(stage.environment, name)
        roles.append(started)
        started.wait_ready()
        return started

    try:
        first, worker = start("bridge"), start("worker")
        second = start("bridge")
        eventually("each has half of the sessions", lambda: _shares(stage) == HALVES, 30)

        stage.publish(MESSAGES)
        stage.under_way()
        first.kill()
        stage.all_stored()
        eventually("one has all sessions", lambda: _shares(stage) == [len(FAMILIES)], 30)

        stage.publish(MESSAGES)
        stage.under_way()
        stage.part("kill", "kafka")
        time.sleep(2)
        stage.part("start", "kafka")
        stage.all_stored()

        stage.publish(MESSAGES)
        stage.under_way()
        worker.kill()
        start("worker")
        stage.all_stored()

        stage.publish(MESSAGES)
        for thread in stage.publishers:
            thread.join(60)
        stage.part("restart", "mosquitto")
        stage.all_stored()

        third = start("bridge")
        eventually("each has half of the sessions", lambda: _shares(stage) == HALVES, 30)
        stage.publish(MESSAGES)
        stage.under_way()
        second.kill()
        third.kill()
        start("bridge")
        stage.all_stored()
        sluice(stage.environment, "verify")
    finally:
        for one in roles:
            one.end()


def _shares(stage: Stage) -> list[int]:
    """How many sessions each bridge has."""
    rows = stage.query(
        "SELECT array_agg(n ORDER BY n)::int[] FROM (SELECT count(*) AS n FROM mqtt_slots"
        " WHERE lease_until > now() GROUP BY bridge) s"
    )
    return list(rows or [])


def test_a_bridge_within_up_needs_no_more_than_a_broker(stage: Stage) -> None:
    """The one process takes by MQTT what it takes by HTTP."""
    directory = mkdtemp(prefix="sluice-up-")
    environment = clean_environment(SLUICE_MQTT_URL=stage.environment["SLUICE_MQTT_URL"])
    try:
        with role(environment, "up", "--data", directory, "--port", "0") as up:
            eventually(
                "it is connected",
                lambda: (
                    sum("connected to the broker" in str(line.get("event")) for line in up.lines) == len(FAMILIES)
                ),
                30,
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
