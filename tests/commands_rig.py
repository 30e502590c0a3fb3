"""What the tests of commands share: workers that send, devices that listen, and what stands in the database.

Left out: the API (`people_rig`), the bridge (`bridge_rig`).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import aiomqtt
import asyncpg
from prometheus_client import CollectorRegistry

from runtime.clock import Clock, SystemClock
from runtime.mqtt import endpoint
from runtime.secrets import KeyRing
from tests.databases import Database
from tests.landing_rig import until
from workers.commands.metrics import CommandsMetrics
from workers.commands.sender import Commands
from workers.commands.settings import CommandsSettings

#: Quick enough that a test of what comes with time is not a wait.
SETTINGS: dict[str, Any] = {
    "commands_check_s": 0.1,
    "commands_claim_s": 1,
    "commands_timeout_s": 2,
    "commands_retry_min_ms": 10,
    "commands_retry_max_ms": 200,
}


@dataclass
class Sending:
    """A worker that sends, in this process."""

    commands: Commands
    registry: CollectorRegistry

    def counted(self, outcome: str) -> float:
        return self.registry.get_sample_value("sluice_commands_total", {"outcome": outcome}) or 0

    def told(self, name: str) -> float:
        found = self.registry.get_sample_value(f"sluice_commands_{name}")
        assert found is not None
        return found


@asynccontextmanager
async def sender(
    database: Database, url: str | None, ring: KeyRing | None, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Sending]:
    registry = CollectorRegistry()
    broker = None if url is None else endpoint(url)
    made = Commands(
        database.settings, CommandsSettings(**(SETTINGS | settings)), broker, ring, clock or SystemClock(),
        CommandsMetrics(registry),
    )  # fmt: skip
    task = asyncio.create_task(made.run())
    try:
        yield Sending(made, registry)
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass
class Device:
    """What a device hears on its topics, in order."""

    client: aiomqtt.Client
    heard: list[aiomqtt.Message] = field(default_factory=list)

    @property
    def payloads(self) -> list[bytes]:
        return [bytes(one.payload) for one in self.heard]

    def told(self, number: int = 0) -> Any:
        return json.loads(self.payloads[number])

    async def hears(self, count: int) -> None:
        async def has() -> bool:
            return len(self.heard) >= count

        await until(has)

    async def listen(self) -> None:
        async for message in self.client.messages:
            self.heard.append(message)


@asynccontextmanager
async def listening(port: int, topic: str) -> AsyncIterator[Device]:
    """A device that is connected and subscribed."""
    async with aiomqtt.Client(
        "127.0.0.1", port, identifier=uuid4().hex, protocol=aiomqtt.ProtocolVersion.V5
    ) as client:
        await client.subscribe(topic, qos=1)
        device = Device(client)
        task = asyncio.create_task(device.listen())
        try:
            yield device
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def rows(database: Database, sql: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(database.superuser_url)
    try:
        return list(await connection.fetch(sql, *values))
    finally:
        await connection.close()


async def command(database: Database, command_id: str) -> Any:
    return (await rows(database, "SELECT * FROM commands WHERE command_id = $1", command_id))[0]


async def reaches(database: Database, command_id: str, state: str) -> Any:
    """The command, once it is in that state."""

    async def is_there() -> bool:
        return bool((await command(database, command_id))["state"] == state)

    await until(is_there)
    return await command(database, command_id)
