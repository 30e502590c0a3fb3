"""What is sent: the readings of a fleet of devices as requests, and as the rows that they become.

A reading follows from its device and its number alone, so that the same rows can be made again for a yardstick.
Left out: how requests are sent (`bench.load`).
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

import orjson

#: Name and the middle of what it measures.
METRICS: Final = (("temperature", 21.0), ("humidity", 45.0), ("pressure", 1013.0), ("co2", 600.0))
INTERVAL_S: Final = 10
ROW: Final = struct.Struct(">hiiihiqid")
PG_EPOCH_S: Final = 946_684_800


class Row(NamedTuple):
    """A reading as it is stored."""

    series: int
    second: int
    value: float


@dataclass(frozen=True)
class Fleet:
    """Devices that each measure the same metrics every ten seconds, from `begin_s` (Unix seconds) on.

    Reading `n` of a device is the one of metric `n % 4` at its time `n // 4`: a request holds consecutive readings,
    as a device sends what it has gathered.
    """

    tokens: Sequence[str]
    begin_s: int
    epoch_times: bool = False
    """Times as epoch seconds instead of RFC 3339."""

    @property
    def series(self) -> int:
        return len(self.tokens) * len(METRICS)

    def reading(self, device: int, number: int) -> Row:
        time, metric = divmod(number, len(METRICS))
        wave = (device * 31 + time * 17 + metric * 7) % 997
        value = METRICS[metric][1] + wave / 100
        return Row(device * len(METRICS) + metric + 1, self.begin_s + time * INTERVAL_S, round(value, 2))

    def body(self, device: int, first: int, count: int) -> bytes:
        """Readings `first` to `first + count` of a device, as its firmware would send them."""
        measurements = []
        for number in range(first, first + count):
            _, second, value = self.reading(device, number)
            ts: int | str = second if self.epoch_times else datetime.fromtimestamp(second, UTC).isoformat()
            measurements.append({"type": METRICS[number % len(METRICS)][0], "value": value, "ts": ts})
        return orjson.dumps({"measurements": measurements})


@dataclass(frozen=True)
class Round:
    """So many requests of the fleet, device after device, each with the next `each` readings from `first` on."""

    fleet: Fleet
    first: int
    each: int
    requests: int

    @property
    def readings(self) -> int:
        return self.requests * self.each

    @property
    def next_first(self) -> int:
        """Where a further round may begin: beyond every reading of this one."""
        return self.first + self.each * -(-self.requests // len(self.fleet.tokens))

    def _spans(self) -> Iterator[tuple[int, int]]:
        devices = len(self.fleet.tokens)
        for request in range(self.requests):
            yield request % devices, self.first + self.each * (request // devices)

    def lanes(self, connections: int) -> list[list[bytes]]:
        """The requests, by connection: a device keeps to one, so that its readings arrive in their order."""
        lanes: list[list[bytes]] = [[] for _ in range(connections)]
        for device, first in self._spans():
            body = self.fleet.body(device, first, self.each)
            lanes[device % connections].append(json_post(self.fleet.tokens[device], body))
        return lanes

    def copies(self, rows_per_copy: int) -> Iterator[tuple[bytes, int]]:
        """The rows as bodies of binary COPY, in the order sent, each sorted by series and time; and their number."""
        rows: list[Row] = []
        for device, first in self._spans():
            rows += [self.fleet.reading(device, number) for number in range(first, first + self.each)]
            if len(rows) >= rows_per_copy:
                yield binary_copy(rows), len(rows)
                rows = []
        if rows:
            yield binary_copy(rows), len(rows)


def binary_copy(rows: list[Row]) -> bytes:
    """What COPY (series_id, quality, ts, value) takes in its binary format."""
    packed = [
        ROW.pack(4, 4, series, 2, 0, 8, (second - PG_EPOCH_S) * 1_000_000, 8, value)
        for series, second, value in sorted(rows)
    ]
    return b"".join([b"PGCOPY\n\xff\r\n\0", bytes(8), *packed, b"\xff\xff"])


def json_post(token: str, body: bytes) -> bytes:
    """As common HTTP libraries of devices send it."""
    return (
        b"POST /v1/ingest HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer %s\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (token.encode(), len(body), body)
    )


def shelly_get(token: str, temperature: float, humidity: float | None = None) -> bytes:
    """As a Shelly reports: the token in the path, no time; some have one sensor, some two."""
    readings = f"temp={temperature:.2f}" if humidity is None else f"temp={temperature:.2f}&hum={humidity:.1f}"
    return (
        f"GET /v1/ingest/shelly/{token}?{readings} HTTP/1.1\r\n"
        "Host: 127.0.0.1\r\nUser-Agent: ShellyHT/20230913-113421\r\nConnection: keep-alive\r\n\r\n"
    ).encode()


def single_post(token: str, value: float) -> bytes:
    """One reading without a time, as JSON."""
    return json_post(token, orjson.dumps({"measurements": [{"type": "temperature", "value": round(value, 2)}]}))
