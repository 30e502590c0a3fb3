"""What landing sets aside is written as the JSON format takes it again: the same reading comes out."""

import json
import struct
from datetime import UTC, datetime

import pytest

from ingest.admit import Admission
from ingest.formats import measurements_json
from ingest.replay import judge
from runtime.ids import uuid7
from schemas.record import PG_EPOCH_US, Channel, Quality, Record
from tests.ingest_rig import rows
from workers.landing.quarantine import Place, Reading, of_reading

RECEIVED_US = 1_779_006_120_000_000
ADMISSION = Admission(future_us=600_000_000, year_floor=2015)


def set_aside(channel: Channel) -> tuple[Record, bytes]:
    """A record of one reading, and what stands in quarantine of it."""
    ids = uuid7().bytes, uuid7().bytes, uuid7().bytes
    record = Record(1, *ids, RECEIVED_US - PG_EPOCH_US, "http", "request-1", [channel])
    return record, of_reading(
        Reading(Place(0, 0), record, channel, 0, 0), "conflict", "another value", 65_536
    ).payload


def channel(metric: str, value: float | str, unit: str = "", quality: int = 0, time: int = -1_234_567) -> Channel:
    times = struct.pack(">q", RECEIVED_US - PG_EPOCH_US + time)
    values = [value] if isinstance(value, str) else struct.pack(">d", value)
    return Channel(metric, "front", unit, times, values, quality)


CHANNELS = [
    channel("temperature", 21.380000000000003, "°C"),
    channel("temperature", -0.1, "°C", Quality.UNIT_CONVERTED | Quality.TIME_STAMPED),
    channel("power", 1e-9, "W"),
    channel("open", 1.0, "", Quality.BOOLEAN),
    channel("custom", 0.0, "", Quality.BOOLEAN | Quality.TIME_REPLACED),
    channel("count", str(-(10**60)), "", Quality.INTEGER),
    channel("note", "12", ""),
    channel("note", 'ä"\\\n☃', "", Quality.TIME_SHIFTED),
]


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_replay_of_it_is_the_same_reading(channel: Channel) -> None:
    record, payload = set_aside(channel)
    row = {
        "quarantine_id": uuid7(),
        "replay_id": uuid7(),
        "organisation_id": uuid7(),
        "device_id": uuid7(),
        "payload": payload,
        "edited": False,
        "request_id": "request-1",
        "received_at": datetime.fromtimestamp(RECEIVED_US / 1e6, UTC),
        "status": "active",
        "raw_retention_days": 30,
    }
    again = judge(ADMISSION, row, RECEIVED_US + 60_000_000)
    assert isinstance(again, Record), again
    assert rows(again) == rows(record)


def test_it_has_the_names_of_the_format() -> None:
    _, payload = set_aside(CHANNELS[0])
    shown = json.loads(payload)
    assert set(shown) == {"type", "label", "unit", "ts", "value", "quality"}
    (submission,) = measurements_json.decode(b'{"measurements":[%b]}' % payload)
    assert submission.measurements[0].type == "temperature"


def test_an_integer_that_is_none_stays_a_text() -> None:
    _, payload = set_aside(channel("count", '1,"unit":"W"', "", Quality.INTEGER))
    assert json.loads(payload)["value"] == '1,"unit":"W"'
