"""Small requests: what ingest takes for one, beside a bare handler that is sent the very same requests.

Both are measured in turns, short enough that whatever else the machine does meets both alike; the middle turn counts.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

from bench.load import Clients, Load
from bench.usage import Meter

TURNS: Final = 5
WARM_UP_SHARE: Final = 3
TIMEOUT_S: Final = 120.0


class Way(NamedTuple):
    """A way of sending what was measured at one moment."""

    name: str
    readings: int
    request: Callable[[str, int], bytes]
    """Made from a device's token and a number."""


@dataclass(frozen=True)
class Server:
    """A process that answers on a port."""

    port: int
    pid: int


@dataclass(frozen=True)
class Single:
    """The middle of all turns; CPU in µs a request, of ingest, of the broker and of the bare handler's process."""

    name: str
    readings: int
    """Of each request."""
    connections: int
    requests: int
    requests_per_s: float
    latencies_s: "array[float]"
    ingest_us: float
    kafka_us: float
    load_us: float
    bare_us: float
    to_bare: float
    """The middle of each turn's ratio."""
    bare_requests_per_s: float

    @property
    def bare_cpu_s(self) -> float:
        """Of all turns."""
        return self.bare_us * self.requests / 1e6


@dataclass(frozen=True)
class _Turn:
    load: Load
    ingest_us: float
    kafka_us: float
    bare: Load
    bare_us: float


class Singles:
    """Sends requests of devices, each of which keeps to one connection and so to one process."""

    def __init__(self, ingest: Server, bare: Server, kafka: int, tokens: Sequence[str]) -> None:
        self._ingest = ingest
        self._bare = bare
        self._kafka = kafka
        self._tokens = tokens
        self.sent = 0
        """Readings."""

    async def measure(self, way: Way, *, count: int, connections: int) -> Single:
        """`count` requests in all turns together."""
        lanes = self._lanes(way, count // TURNS, connections)
        async with (
            Clients(self._ingest.port, connections) as clients,
            Clients(self._bare.port, connections) as bare_clients,
        ):
            warm_up = [lane[: len(lane) // WARM_UP_SHARE] for lane in lanes]
            self.sent += (await clients.send(warm_up, way.readings, TIMEOUT_S)).readings
            await bare_clients.send(warm_up, way.readings, TIMEOUT_S)
            turns = [await self._turn(lanes, way.readings, clients, bare_clients) for _ in range(TURNS)]
        return _middle(way, connections, turns)

    def _lanes(self, way: Way, count: int, connections: int) -> list[list[bytes]]:
        mine = [self._tokens[lane::connections] for lane in range(connections)]
        return [
            [way.request(mine[lane][number % len(mine[lane])], number) for number in range(lane, count, connections)]
            for lane in range(connections)
        ]

    async def _turn(self, lanes: list[list[bytes]], each: int, clients: Clients, bare_clients: Clients) -> _Turn:
        meter = Meter(ingest=self._ingest.pid, kafka=self._kafka)
        load = await clients.send(lanes, each, TIMEOUT_S)
        taken = meter.read()
        self.sent += load.readings
        meter = Meter(bare=self._bare.pid)
        bare = await bare_clients.send(lanes, each, TIMEOUT_S)
        ingest_us, kafka_us = (taken[part] * 1e6 / load.requests for part in ("ingest", "kafka"))
        return _Turn(load, ingest_us, kafka_us, bare, meter.read()["bare"] * 1e6 / bare.requests)


def _middle(way: Way, connections: int, turns: Sequence[_Turn]) -> Single:
    latencies_s = array("d")
    for turn in turns:
        latencies_s.extend(turn.load.latencies_s)
    return Single(
        way.name,
        way.readings,
        connections,
        sum(turn.load.requests for turn in turns),
        median(turn.load.requests_per_s for turn in turns),
        latencies_s,
        median(turn.ingest_us for turn in turns),
        median(turn.kafka_us for turn in turns),
        median(turn.load.cpu_us_per_request for turn in turns),
        median(turn.bare_us for turn in turns),
        median(turn.ingest_us / turn.bare_us for turn in turns),
        median(turn.bare.requests_per_s for turn in turns),
    )
