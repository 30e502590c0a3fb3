"""What the devices of a fault run send. A request follows from its kind, its device and its number alone.

So a run of millions of readings is recorded as one byte a request, and its readings are made again when they are
looked up. Values are unique within a series, and no two devices have one in common. Left out: how requests are sent,
and what became of them (`bench.faults.sender`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple
from uuid import UUID

import orjson

from bench.workload import json_post

CHANNELS: Final = ("a", "b", "c", "d")
TIMES_A_BATCH: Final = 25
READINGS_A_BATCH: Final = TIMES_A_BATCH * len(CHANNELS)
NAMED_READINGS: Final = 5
TIME_STEP_US: Final = 1_000
#: Keeps devices apart: none sends so many values of a series, and a hundred of them stay within 10 GW.
VALUES_A_DEVICE: Final = 100_000_000
LEVEL, COUNT, POWER, ENERGY, REFUSED_METRIC = "fault_level", "fault_count", "power", "energy", "temperature"
REFUSED_UNIT: Final = "furlong"


class Kind(Enum):
    """A kind of request: how many of its readings are accepted and refused, and whether it may be repeated."""

    BATCH = (READINGS_A_BATCH - 1, 1, True)
    """JSON, each reading with its own time; one in a hundred has a unit that nobody knows."""
    SINGLE = (2, 0, False)
    """A Shelly's GET, without a time: sent once, for a repeat would be another reading."""
    NAMED = (NAMED_READINGS, 0, True)
    """JSON without times under an Idempotency-Key."""

    def __init__(self, accepted: int, refused: int, repeatable: bool) -> None:
        self.accepted = accepted
        self.refused = refused
        self.repeatable = repeatable

    @property
    def readings(self) -> int:
        return self.accepted + self.refused


#: In turn, by every device.
MIX: Final = (*[Kind.BATCH] * 3, Kind.SINGLE, *[Kind.BATCH] * 3, Kind.SINGLE, Kind.NAMED, Kind.SINGLE)
#: Over MQTT, where nothing names a message.
MQTT_MIX: Final = (Kind.BATCH, Kind.SINGLE, Kind.SINGLE, Kind.SINGLE)


class Reading(NamedTuple):
    """As it is sent; `ts_us` (Unix) is None where ingest is to stamp it."""

    metric: str
    label: str
    ts_us: int | None
    value: float


@dataclass(frozen=True)
class Device:
    """One device of the run, by its number, its id and its token."""

    number: int
    device: UUID
    token: str
    begin_us: int
    """Unix; every time of its own lies after it."""

    def readings(self, kind: Kind, number: int) -> list[Reading]:
        """What a request holds that is to be accepted."""
        base = self.number * VALUES_A_DEVICE
        if kind is Kind.BATCH:
            return list(self._batch(base, number))[:-1]
        if kind is Kind.SINGLE:
            return [Reading(POWER, "", None, float(base + number)), Reading(ENERGY, "", None, float(base + number))]
        first = base + number * NAMED_READINGS
        return [Reading(COUNT, "", None, float(first + at)) for at in range(NAMED_READINGS)]

    def refused_value(self, number: int) -> float:
        """By which the refused reading of a batch is found in the quarantine."""
        return float(self.number * VALUES_A_DEVICE + number)

    def body(self, kind: Kind, number: int) -> bytes:
        """As JSON, the refused reading of a batch among them."""
        measurements = [_plain(reading) for reading in self.readings(kind, number)]
        if kind is Kind.BATCH:
            refused = {"type": REFUSED_METRIC, "value": self.refused_value(number), "unit": REFUSED_UNIT}
            measurements.append(refused)
        return orjson.dumps({"measurements": measurements})

    def request(self, kind: Kind, number: int) -> bytes:
        """As it is sent over HTTP."""
        if kind is Kind.SINGLE:
            return self._get(self.readings(kind, number))
        body = self.body(kind, number)
        if kind is Kind.BATCH:
            return json_post(self.token, body)
        head, _, rest = json_post(self.token, body).partition(b"\r\n")
        return b"%s\r\nIdempotency-Key: %s\r\n%s" % (head, f'"{self.device}-{number}"'.encode(), rest)

    def _batch(self, base: int, number: int) -> Iterator[Reading]:
        for time in range(number * TIMES_A_BATCH, (number + 1) * TIMES_A_BATCH):
            for at, label in enumerate(CHANNELS):
                value = base + time * len(CHANNELS) + at
                yield Reading(LEVEL, label, self.begin_us + time * TIME_STEP_US, float(value))

    def _get(self, readings: list[Reading]) -> bytes:
        query = "&".join(f"{reading.metric}={reading.value:.0f}" for reading in readings)
        return (
            f"GET /v1/ingest/shelly/{self.token}?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "User-Agent: ShellyHT/20230913-113421\r\nConnection: keep-alive\r\n\r\n"
        ).encode()


def _plain(reading: Reading) -> dict[str, object]:
    plain: dict[str, object] = {"type": reading.metric, "value": reading.value}
    if reading.label:
        plain["label"] = reading.label
    if reading.ts_us is not None:
        plain["ts"] = reading.ts_us
    return plain
