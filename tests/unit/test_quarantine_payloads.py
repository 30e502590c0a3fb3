"""What landing sets aside is written as the JSON format takes it again: the same reading comes out."""

import json
import struct
from datetime import UTC, datetime

import pytest

from ingest.admit import Admission
from ingest.formats import measurements_json
from ingest.replay import Verdict, judge
from runtime.ids import uuid7
from runtime.secrets import DEVICE_PREFIX, make_token
from schemas.record import PG_EPOCH_US, Channel, Note, Quality, Record
from tests.ingest_rig import rows
from workers.landing.quarantine import Place, Reading, of_body, of_reading

RECEIVED_US = 1_779_006_120_000_000
ADMISSION = Admission(future_us=600_000_000, year_floor=2015)


def set_aside(channel: Channel, note: Note | None = None) -> tuple[Record, bytes]:
    """A record of one reading, and what stands in quarantine of it."""
    ids = uuid7().bytes, uuid7().bytes, uuid7().bytes
    notes = [] if note is None else [note]
    record = Record(1, *ids, RECEIVED_US - PG_EPOCH_US, "http", "request-1", [channel], [], notes)
    reading = Reading(Place(0, 0), record, channel, 0, 0, note)
    return record, of_reading(reading, "conflict", "another value", 65_536).payload


def replayed(payload: bytes, *, item: int = -1, edited: bool = False) -> Record | Verdict:
    """What comes of a row with this payload."""
    row = {
        "quarantine_id": uuid7(),
        "replay_id": uuid7(),
        "organisation_id": uuid7(),
        "device_id": uuid7(),
        "payload": payload,
        "edited": edited,
        "item": item,
        "request_id": "request-1",
        "received_at": datetime.fromtimestamp(RECEIVED_US / 1e6, UTC),
        "status": "active",
        "raw_retention_days": 30,
    }
    return judge(ADMISSION, row, RECEIVED_US + 60_000_000)


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
    again = replayed(payload)
    assert isinstance(again, Record), again
    assert (rows(again), again.notes) == (rows(record), [])


CONVERTED = Quality.UNIT_CONVERTED
NOTED = [
    (channel("temperature", 21.11111111111111, "°C", CONVERTED), Note(0, 0, None, "°F"), {"value": 70, "unit": "°F"}),
    (channel("pressure", 1013.25, "hPa", CONVERTED), Note(0, 0, None, "Pa"), {"value": 101_325, "unit": "Pa"}),
    # A unit or value that says nothing to this version stands beside what is stored.
    (channel("power", 3.0, "W", CONVERTED), Note(0, 0, None, "hp"), {"value": 3, "unit": "W", "original_unit": "hp"}),
    (
        channel("temperature", 1e-300, "°C", CONVERTED),
        Note(0, 0, None, "K"),
        {"value": 1e-300, "unit": "°C", "original_unit": "K"},
    ),
    (channel("co2", 1.0, "ppm", Quality.TIME_SHIFTED), Note(0, 0, "3.1"), {"original_time": "3.1"}),
    (
        channel("energy", 1500.0, "Wh", CONVERTED | Quality.TIME_REPLACED),
        Note(0, 0, "2001-01-01T00:00:00", "kWh", b'{"rssi":-60}'),
        {"value": 1.5, "unit": "kWh", "original_time": "2001-01-01T00:00:00", "metadata": {"rssi": -60}},
    ),
]


@pytest.mark.parametrize(("channel", "note", "shown"), NOTED)
def test_what_a_note_tells_is_shown_and_comes_back_with_a_replay(
    channel: Channel, note: Note, shown: dict[str, object]
) -> None:
    record, payload = set_aside(channel, note)
    assert shown.items() <= json.loads(payload).items()
    again = replayed(payload)
    assert isinstance(again, Record), again
    assert (rows(again), again.notes) == (rows(record), [note])


def test_names_of_landing_mean_nothing_where_a_device_or_a_person_wrote_them() -> None:
    _, payload = set_aside(channel("power", 1.0, "W", Quality.TIME_SHIFTED), Note(0, 0, "3.1", "hp", b"{}"))
    for again in (replayed(payload, item=0), replayed(payload, edited=True)):
        assert isinstance(again, Record), again
        assert (rows(again)[0][5], again.notes) == (0, [])


def test_a_note_that_is_none_is_no_note() -> None:
    for junk in (b'{"type":"a","value":1,"original_time":5}', b'{"type":"a","value":1,"quality":"x"}'):
        again = replayed(junk)
        assert isinstance(again, Record), again
        assert again.notes == []


def test_no_token_is_kept_of_a_record_that_nobody_can_read() -> None:
    token = make_token(DEVICE_PREFIX).encode()
    body = b"\x9e\xff\xd9\x2c" + token + b"\xd9\x04eyJhbGciOi.eyJzdWIi.c2ln\x00"
    assert of_body(Place(0, 0), body, "junk", 0, 100).payload == b"\x9e\xff\xd9\x2c***\xd9\x04***\x00"
    assert token[:9] not in of_body(Place(0, 0), b"\xff" * 91 + token, "junk", 0, 100).payload


def test_it_has_the_names_of_the_format() -> None:
    _, payload = set_aside(CHANNELS[0])
    shown = json.loads(payload)
    assert set(shown) == {"type", "label", "unit", "ts", "value", "quality"}
    (submission,) = measurements_json.decode(b'{"measurements":[%b]}' % payload)
    assert submission.measurements[0].type == "temperature"


def test_an_integer_that_is_none_stays_a_text() -> None:
    _, payload = set_aside(channel("count", '1,"unit":"W"', "", Quality.INTEGER))
    assert json.loads(payload)["value"] == '1,"unit":"W"'
