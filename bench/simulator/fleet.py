"""A fleet of plants: all of them made, connected and measuring at a rate, for a time; and what came of it.

Left out: one plant (`bench.simulator.device`).
"""

import asyncio
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Final

from bench.simulator import speech
from bench.simulator.device import Counts, Device
from bench.simulator.plants import Api
from bench.simulator.speech import Form, Measuring
from schemas.plants import AuthMethod

PLANTS_MAX: Final = 10_000
RATE_MAX: Final = 10_000.0
#: At a time: a broker's one thread makes their handshakes one by one, and all together they would time out.
CONNECTING_MAX: Final = 64
END_S: Final = 10.0
BEHIND_MAX_S: Final = 1.0
LOOK_EVERY_S: Final = 0.05
_MAKERS: Final = {"snapshot": speech.snapshot, "readings": speech.readings}


@dataclass(frozen=True)
class Options:
    """How many plants do what."""

    plants: int
    method: AuthMethod
    rate: float
    """Messages a second, of all together; 0: they are connected and say nothing."""
    devices: int = 3
    """Behind each plant."""
    seed: int | None = None
    """Of values and jitter; nonces are never the same."""
    form: Form = "snapshot"


@dataclass(frozen=True)
class Summary:
    """What a fleet did."""

    plants: int
    connected: int
    """That were connected at least once."""
    waiting: int
    """Messages that nobody has acknowledged."""
    seconds: float
    counts: Counts

    def as_object(self) -> dict[str, Any]:
        """For programs."""
        told: dict[str, Any] = asdict(self)
        counts: dict[str, Any] = told.pop("counts")
        return told | counts | {"failures": dict(self.counts.failures)}


class Fleet:
    """Made by `make`; entered, it is connected and measures; left, it ends as devices do that are switched off."""

    def __init__(self, devices: list[Device], counts: Counts, options: Options, random: Random) -> None:
        self.devices = devices
        self.counts = counts
        self._options = options
        self._random = random
        self._measuring: list[asyncio.Task[None]] = []
        self._running: list[asyncio.Task[None]] = []
        self._began_s = 0.0
        self._ended_s = 0.0

    @classmethod
    async def make(cls, api: Api, options: Options) -> "Fleet":
        """Its plants, through the API. Raises `SluiceError`."""
        counts, random = Counts(), Random(options.seed)
        gate = asyncio.Semaphore(CONNECTING_MAX)
        plants = api.fleet(options.method, options.plants)
        devices = [Device(plant, counts, random, gate, api.renew) async for plant in plants]
        return cls(devices, counts, options, random)

    @property
    def connected(self) -> int:
        """At this moment."""
        return sum(device.is_connected for device in self.devices)

    async def __aenter__(self) -> "Fleet":
        self._began_s = time.monotonic()
        self._running = [asyncio.create_task(device.run()) for device in self.devices]
        self._measuring = [asyncio.create_task(self._measure(device)) for device in self.devices]
        return self

    async def __aexit__(self, *_: object) -> None:
        await _cancelled(self._measuring)
        self._ended_s = time.monotonic()
        for device in self.devices:
            device.stop()
        try:
            await asyncio.wait(self._running, timeout=END_S)
        finally:
            await _cancelled(self._running)

    async def silence(self) -> None:
        """They stay connected, and measure nothing any more."""
        await _cancelled(self._measuring)

    async def until_connected(self, timeout_s: float) -> float | None:
        """Seconds until all are; None where some are not in time."""
        began_s = time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connected < len(self.devices):  # noqa: ASYNC110 - nothing else tells
                    await asyncio.sleep(LOOK_EVERY_S)
                return time.monotonic() - began_s
        return None

    def summary(self) -> Summary:
        seconds = (self._ended_s or time.monotonic()) - self._began_s
        ever = sum(device.was_connected for device in self.devices)
        waiting = sum(device.waiting for device in self.devices)
        return Summary(len(self.devices), ever, waiting, seconds, self.counts)

    async def _measure(self, device: Device) -> None:
        rate = self._options.rate
        if not rate:
            return
        make, random, who = _MAKERS[self._options.form], self._random, device.plant.identity
        measuring = Measuring(self._options.devices, random)
        loop = asyncio.get_running_loop()
        due_s = loop.time() + random.uniform(0, len(self.devices) / rate)
        while True:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            now_ms = time.time_ns() // 1_000_000
            device.send(make(who, measuring.at(now_ms / 1_000), now_ms))
            due_s += len(self.devices) / rate * random.uniform(0.5, 1.5)
            due_s = max(due_s, loop.time() - BEHIND_MAX_S)


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
