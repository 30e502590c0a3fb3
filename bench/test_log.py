"""What a record costs on its way into the log, and out of it: each engine on its real part.

Kafka is the one at SLUICE_LOG_URL, or that of `deploy/local/services`. Left out: what a record holds.
"""

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import pytest
import uvloop

from runtime.log import Expected, Log, LogSettings, create_log, open_log

PARTITIONS = 8
BODY = bytes(200)
RECORDS = 20_000
TURN = 500  # appends between two turns of the event loop
SERVICES = Path(__file__).resolve().parents[1] / "deploy" / "local" / "services"

T = TypeVar("T")


class Rig:
    """A new log, and the loop it lives in."""

    def __init__(self, url: str) -> None:
        self._loop = uvloop.new_event_loop()
        self.log = self.run(self._open(LogSettings(log_url=url)))
        self.run(self.append_one())  # connections and the like are made with the first

    async def _open(self, settings: LogSettings) -> Log:
        source = uuid4()
        name = f"bench.{source}"
        identity = await create_log(settings, source=source, name=name, partitions=PARTITIONS)
        return await open_log(settings, Expected(source, name, identity, PARTITIONS), client_id="bench")

    def run(self, work: Awaitable[T]) -> T:
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.log.close())
        self._loop.close()

    async def append_one(self) -> None:
        await self.log.append(0, BODY)

    async def append_many(self) -> None:
        futures = []
        for begin in range(0, RECORDS, TURN):
            futures += [self.log.append(n % PARTITIONS, BODY) for n in range(begin, begin + TURN)]
            await asyncio.sleep(0)
        await asyncio.wait(futures)

    async def read_many(self) -> int:
        reader = self.log.reader()
        await reader.assign({partition: bounds.start for partition, bounds in (await self.log.bounds()).items()})
        found = 0
        while found < RECORDS:
            found += sum(len(part.bodies) for part in await reader.read(bytes_max=4_000_000, wait_s=10.0))
        await reader.close()
        return found


def _kafka_url() -> str:
    url = os.environ.get("SLUICE_LOG_URL", "")
    if url.startswith("kafka"):
        return url
    printed = subprocess.run([SERVICES, "start", "kafka"], check=True, capture_output=True, text=True).stdout
    return next(line.partition("=")[2] for line in printed.splitlines() if "SLUICE_LOG_URL" in line)


@pytest.fixture(params=["sqlite", "kafka"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(f"sqlite:///{tmp_path}" if request.param == "sqlite" else _kafka_url())
    yield rig
    rig.close()


def test_one_append_until_durable(benchmark: Any, rig: Rig) -> None:
    """Latency with nobody beside it: the linger, then one request or commit."""

    benchmark.pedantic(lambda: rig.run(rig.append_one()), rounds=200, warmup_rounds=5)


def test_20_000_appends_until_durable(benchmark: Any, rig: Rig) -> None:
    benchmark.pedantic(lambda: rig.run(rig.append_many()), rounds=10, warmup_rounds=1)


def test_the_call_of_append(benchmark: Any, rig: Rig) -> None:
    """What an append costs its caller, before anything is sent."""

    async def call() -> None:
        calls = 5_000
        benchmark.pedantic(
            lambda: futures.extend([rig.log.append(n % PARTITIONS, BODY) for n in range(calls)]), rounds=10
        )
        await asyncio.wait(futures)

    futures: list[asyncio.Future[int]] = []
    rig.run(call())


def test_reading_20_000_records(benchmark: Any, rig: Rig) -> None:
    rig.run(rig.append_many())
    found = benchmark.pedantic(lambda: rig.run(rig.read_many()), rounds=10, warmup_rounds=1)
    assert found >= RECORDS
