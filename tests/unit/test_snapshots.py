"""Plants' snapshots: which are believed, what they say, and when it was measured."""

import json
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest

from ingest.admit import Admission, Sender, TimeWindow
from ingest.formats.shape import Malformed, Measurement
from ingest.mqtt.snapshots import Snapshot, SnapshotError, read
from ingest.plants import Plants
from runtime.secrets import Seal, new_ring
from schemas.errors import ReadingCode
from schemas.plants import SECRET_SEAL
from schemas.record import NONCE_SCOPE
from schemas.signing import signature, snapshot_parts

SECRET, FORMER, OTHER = (bytes([number]) * 32 for number in (1, 2, 3))
PLANT, ORGANISATION = UUID(int=0xAB), UUID(int=0xCD)
CABINET_TEMPLATE, METER_TEMPLATE, OWN_METER = UUID(int=1), UUID(int=2), UUID(int=3)
NOW_MS = 1_780_000_000_000
NOW_US = NOW_MS * 1_000
WINDOW = TimeWindow(NOW_US, NOW_US - 400 * 86_400_000_000, NOW_US + 600_000_000, 1_420_000_000_000_000)
REPLAY_US = 300_000_000
SEAL = Seal(new_ring(), SECRET_SEAL)
DEVICES = [
    {"externalId": "C1", "type": "CABINET", "raw": 5},
    {"externalId": "M1", "type": "METER", "values": {"power": 230.5, "imported": 12.25}},
]
TEMPLATES: list[dict[str, Any]] = [
    {
        "template_id": CABINET_TEMPLATE, "organisation_id": None, "level": "PLANT", "type": "CABINET",
        "signals": '[{"name": "grid_present", "bit": 0}, {"name": "door_open", "bit": 1},'
        ' {"name": "alarm", "bit": 31}]',
    },
    {
        "template_id": METER_TEMPLATE, "organisation_id": None, "level": "DEVICE", "type": "METER",
        "signals": '[{"name": "power", "field": "power", "unit": "W"},'
        ' {"name": "energy_imported", "field": "imported", "unit": "kWh"}]',
    },
]  # fmt: skip
OWN: dict[str, Any] = {
    "template_id": OWN_METER, "organisation_id": ORGANISATION, "level": "DEVICE", "type": "METER",
    "signals": '[{"name": "power", "field": "power", "unit": "W", "scale": 0.1},'
    ' {"name": "power_copy", "field": "power"}]',
}  # fmt: skip


def plant(method: str = "TOKEN", *, templates: list[dict[str, Any]] | None = None, **fields: Any) -> Any:
    row = {
        "device_id": PLANT, "organisation_id": ORGANISATION, "auth_method": method, "secret": SEAL.seal(SECRET),
        "former_secret": None, "former_until_us": None, "plant_template": CABINET_TEMPLATE,
    }  # fmt: skip
    return Plants(SEAL).reader(templates or TEMPLATES)(row | fields)


def envelope(secret: bytes | None = SECRET, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"ts": NOW_MS, "n": "0a1b2c3d4e5f", "devices": DEVICES} | fields
    if secret is not None:
        parts = snapshot_parts(str(PLANT), made["ts"], made["n"], made.get("timestamp"), made["devices"])
        made.setdefault("sig", signature(secret, *parts))
    return made


def taken(made: Mapping[str, Any] | bytes, of: Any = None) -> Snapshot:
    payload = made if isinstance(made, bytes) else json.dumps(made).encode()
    return read(payload, of or plant(), WINDOW, REPLAY_US)


def refused(made: Mapping[str, Any] | bytes, of: Any = None) -> SnapshotError:
    with pytest.raises(SnapshotError) as caught:
        taken(made, of)
    return caught.value


def said(snapshot: Snapshot) -> list[tuple[Any, ...]]:
    found = snapshot.submission.measurements
    assert all(type(one) is Measurement for one in found), found
    return [(one.type, one.value, one.label, one.unit) for one in found]


# ---------------------------------------------------------------- what is said


def test_bits_and_values_are_read_by_templates_and_nothing_is_lost() -> None:
    snapshot = taken(envelope(timestamp="2026-05-17T08:22:00Z"))
    assert said(snapshot) == [
        ("grid_present", True, "C1", None),
        ("door_open", False, "C1", None),
        ("alarm", False, "C1", None),
        ("raw", 5, "C1", None),
        ("power", 230.5, "M1", "W"),
        ("energy_imported", 12.25, "M1", "kWh"),
    ]
    assert snapshot.submission.ts == "2026-05-17T08:22:00Z"
    assert (snapshot.is_signed, snapshot.is_stale) == (True, False)
    unnamed = [
        {"externalId": "M1", "type": "METER", "values": {"power": 1, "temperature": 21.5}},
        {"externalId": "X", "type": "EV_CHARGER", "values": {"state": "idle"}},
        {"externalId": "C", "type": "CABINET", "raw": 2**32 - 1, "values": {"door": True}},
    ]
    no_template = plant(plant_template=None)
    assert said(taken(envelope(devices=unnamed), no_template)) == [
        ("power", 1, "M1", "W"),
        ("raw.temperature", 21.5, "M1", None),
        ("raw.state", "idle", "X", None),
        ("raw", 2**32 - 1, "C", None),
        ("raw.door", True, "C", None),
    ]


def test_an_organisation_s_own_template_comes_before_the_system_s_and_a_plant_s_before_both() -> None:
    meter = [{"externalId": "M1", "type": "METER", "values": {"power": 2305, "imported": 1}}]
    found = said(taken(envelope(devices=meter), plant(templates=[*TEMPLATES, OWN])))
    # In decimals: 2305 tenths are 230.5, and none of 230.50000000000003.
    assert found == [
        ("power", 230.5, "M1", "W"),
        ("power_copy", 2305, "M1", None),
        ("raw.imported", 1, "M1", None),
    ]
    theirs = OWN | {"organisation_id": UUID(int=99)}
    assert said(taken(envelope(devices=meter), plant(templates=[*TEMPLATES, theirs])))[0][1] == 2305
    newer = OWN | {"template_id": UUID(int=9), "signals": '[{"name": "load", "field": "power"}]'}
    assert said(taken(envelope(devices=meter), plant(templates=[*TEMPLATES, newer, OWN])))[0][0] == "load"
    level = newer | {"level": "PLANT", "template_id": UUID(int=4)}
    both = plant(templates=[*TEMPLATES, OWN, level], plant_template=UUID(int=4))
    assert said(taken(envelope(devices=meter), both))[0][0] == "load"


@pytest.mark.parametrize("value", [True, "on", None, {"a": 1}, [1], 10**400])
def test_what_is_no_number_is_not_scaled(value: Any) -> None:
    devices = [{"externalId": "M1", "type": "METER", "values": {"power": value}}]
    unsigned = plant("MTLS", templates=[*TEMPLATES, OWN])
    assert said(taken(envelope(None, devices=devices), unsigned))[0][:2] == ("power", value)


@pytest.mark.parametrize(
    "device",
    [
        7,
        {"type": "METER", "values": {"power": 1}},
        {"externalId": "", "type": "METER", "values": {"power": 1}},
        {"externalId": "M1", "type": 3, "values": {"power": 1}},
        {"externalId": "M1", "type": "METER"},
        {"externalId": "M1", "type": "METER", "values": [1]},
        {"externalId": "C1", "type": "CABINET"},
        {"externalId": "C1", "type": "CABINET", "raw": -1},
        {"externalId": "C1", "type": "CABINET", "raw": 2**32},
        {"externalId": "C1", "type": "CABINET", "raw": 1.5},
        {"externalId": "C1", "type": "CABINET", "raw": True},
        {"externalId": "C1", "type": "CABINET", "raw": "5"},
        {"type": "power", "value": 230},
    ],
)
def test_one_bad_device_is_refused_alone(device: Any) -> None:
    snapshot = taken(envelope(devices=[device, DEVICES[1]]))
    bad, *good = snapshot.submission.measurements
    assert isinstance(bad, Malformed)
    assert (bad.code, bad.payload) == (ReadingCode.INVALID_MEASUREMENT, {"device": device})
    assert [one.type for one in good] == ["power", "energy_imported"]


def test_names_and_units_go_through_admission() -> None:
    devices = [
        {"externalId": "x" * 65, "type": "METER", "values": {"power": 1}},
        {"externalId": "M1", "type": "METER", "values": {"Bad Name": 1, "power": "high", "imported": 1.5}},
    ]
    admission = Admission(future_us=600_000_000, year_floor=2015)
    admitted = admission.admit(
        [(0, taken(envelope(devices=devices)).submission)], Sender(bytes(16), PLANT.bytes), WINDOW,
        record_id=bytes(16), request_id="r", way="mqtt",
    )  # fmt: skip
    (channel,) = admitted.record.channels
    assert (channel.metric, channel.label, channel.unit, channel.unpack_values()) == (
        "energy_imported", "M1", "Wh", (1500.0,),
    )  # fmt: skip
    assert [(one.index, one.code) for one in admitted.rejections] == [
        (0, "invalid_label"), (1, "invalid_metric"), (2, "invalid_value"),
    ]  # fmt: skip
    # With its time, so that it can be mended and replayed alone.
    assert json.loads(admitted.record.refused[2].payload) == {
        "type": "power", "value": "high", "label": "M1", "unit": "W", "ts": NOW_MS,
    }  # fmt: skip


# ---------------------------------------------------------------- who said it


def test_a_signature_is_the_plant_s_by_either_secret_for_as_long_as_it_is_good() -> None:
    rotated = plant(former_secret=SEAL.seal(FORMER), former_until_us=NOW_US + 1.0)
    assert taken(envelope(), rotated).is_signed
    assert taken(envelope(FORMER), rotated).is_signed
    assert refused(envelope(OTHER), rotated).code is ReadingCode.BAD_SIGNATURE
    over = plant(former_secret=SEAL.seal(FORMER), former_until_us=float(NOW_US))
    assert taken(envelope(), over).is_signed
    assert refused(envelope(FORMER), over).is_forged


@pytest.mark.parametrize(
    "changed",
    [
        {"ts": NOW_MS + 1}, {"n": "0a1b2c3d4e5e"}, {"timestamp": NOW_MS}, {"devices": DEVICES[:1]}, {"sig": "0" * 64},
        {"sig": ""}, {"sig": "é"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["MTLS", "TOKEN", "PASSWORD"])
def test_whatever_is_changed_breaks_it_for_every_plant(method: str, changed: dict[str, Any]) -> None:
    error = refused(envelope() | changed, plant(method))
    assert (error.code, error.is_forged) == (ReadingCode.BAD_SIGNATURE, True)
    assert "0a1b" not in str(error)


def test_another_plant_s_signature_is_none_of_its() -> None:
    parts = snapshot_parts(str(UUID(int=7)), NOW_MS, "0a1b2c3d4e5f", None, DEVICES)
    assert refused(envelope(sig=signature(SECRET, *parts))).is_forged


@pytest.mark.parametrize(("method", "is_taken"), [("MTLS", True), ("TOKEN", False), ("PASSWORD", False)])
def test_only_a_certificate_makes_up_for_a_signature(method: str, is_taken: bool) -> None:
    for unsigned in (envelope(None), envelope(None, sig=None)):
        if is_taken:
            assert not taken(unsigned, plant(method)).is_signed
        else:
            assert refused(unsigned, plant(method)).is_forged


def test_a_plant_without_a_secret_signs_nothing_and_one_whose_secret_is_lost_has_forged_nothing() -> None:
    assert refused(envelope(), plant(secret=None)).is_forged
    error = refused(envelope(), plant(secret=Seal(new_ring(), SECRET_SEAL).seal(SECRET)))
    assert (error.code, error.is_forged) == (ReadingCode.BAD_SIGNATURE, False)


def test_secrets_are_in_no_representation() -> None:
    made = plant(former_secret=SEAL.seal(FORMER), former_until_us=NOW_US + 1.0)
    assert "x01" not in repr(made)
    assert "x02" not in repr(made)


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"garbage", b"\xff\xfe", bytes(range(256)), b"[]", b"7", b"{}", b'{"ts":1}', b"[" * 100_000,
        b'{"ts":1.5,"n":"0a1b2c3d","devices":[]}', b'{"ts":-1,"n":"0a1b2c3d","devices":[]}',
        b'{"ts":1,"n":"0a1b2c3","devices":[]}', b'{"ts":1,"n":"0a1b2c3z","devices":[]}',
        b'{"ts":1,"n":"' + b"0" * 65 + b'","devices":[]}', '{"ts":1,"n":"٠a1b2c3d","devices":[]}'.encode(),
        b'{"ts":1,"n":"0a1b2c3d","devices":{}}', b'{"ts":1,"n":"0a1b2c3d","devices":[NaN]}',
        b'{"ts":' + b"9" * 5_000 + b',"n":"0a1b2c3d","devices":[]}',
        b'{"ts":1,"n":"0a1b2c3d","timestamp":true,"devices":[]}', b'{"ts":1,"n":"0a1b2c3d","devices":[1e999]}',
    ],
)  # fmt: skip
def test_what_is_no_snapshot_is_told_from_a_forged_one(payload: bytes) -> None:
    for method in ("MTLS", "TOKEN"):
        error = refused(payload, plant(method))
        assert (error.code, error.is_forged) == (ReadingCode.UNDECODABLE, False)


@pytest.mark.parametrize(
    "doubled",
    [
        '{"ts":1,"ts":%d,"n":"0a1b2c3d","devices":[]}',
        '{"ts":%d,"n":"0a1b2c3d","devices":[{"externalId":"M","type":"METER","values":{"power":1,"power":2}}]}',
        '{"ts":%d,"n":"0a1b2c3d","devices":[{"externalId":"M","type":"METER","values":{"power":1,"pow\\u0065r":2}}]}',
        '{"ts":%d,"n":"0a1b2c3d","devices":[{"externalId" :"M","type":"METER","type":"X","values":{"power":1}}]}',
    ],
)
def test_of_what_is_said_twice_and_not_signed_nobody_knows_which_is_meant(doubled: str) -> None:
    error = refused((doubled % NOW_MS).encode(), plant("MTLS"))
    assert error.code is ReadingCode.UNDECODABLE
    assert "twice" in str(error)


def test_more_than_is_known_of_an_envelope_is_passed_over() -> None:
    assert said(taken(envelope(None, more={"a": 1}, devices=[]), plant("MTLS"))) == []


# ---------------------------------------------------------------- when


@pytest.mark.parametrize("method", ["MTLS", "TOKEN"])
@pytest.mark.parametrize("off_ms", [-300_001, 300_001, -86_400_000])
def test_outside_the_window_only_a_time_of_its_own_is_believed(method: str, off_ms: int) -> None:
    secret = SECRET if method == "TOKEN" else None
    inside = taken(envelope(secret, ts=NOW_MS + off_ms // 86_400_000), plant(method))
    assert (inside.is_late, inside.is_stale) == (False, False)
    stale = taken(envelope(secret, ts=NOW_MS + off_ms), plant(method))
    assert (stale.is_late, stale.is_stale, stale.submission.ts) == (False, True, NOW_MS + off_ms)
    for timestamp in (NOW_MS - 90_000_000, "2026-05-01T00:00:00+02:00", "2026-05-01T00:00:00.5Z"):
        late = taken(envelope(secret, ts=NOW_MS + off_ms, timestamp=timestamp), plant(method))
        assert (late.is_late, late.is_stale, late.submission.ts) == (True, False, timestamp)
    for useless in ("2026-05-01T00:00:00", "soon", 3.1, 0, NOW_MS + 10_000_000, 1e300, ""):
        assert taken(envelope(secret, ts=NOW_MS + off_ms, timestamp=useless), plant(method)).is_stale


def test_the_window_has_both_ends_and_a_snapshot_without_a_timestamp_has_its_publish_time() -> None:
    for off_ms in (-300_000, 0, 300_000):
        snapshot = taken(envelope(ts=NOW_MS + off_ms))
        assert (snapshot.is_late, snapshot.is_stale, snapshot.submission.ts) == (False, False, NOW_MS + off_ms)


# ---------------------------------------------------------------- its nonce


def test_a_nonce_names_the_message_and_its_fingerprint_what_was_said() -> None:
    first = taken(envelope()).nonce
    assert (first.scope, len(first.key), len(first.fingerprint)) == (NONCE_SCOPE, 16, 16)
    # The same said again, signed anew after a rotation and written otherwise.
    rotated = plant(secret=SEAL.seal(OTHER))
    again = json.dumps(envelope(OTHER), indent=1, sort_keys=True).encode()
    assert taken(again, rotated).nonce == first
    others = [envelope(ts=NOW_MS + 1), envelope(devices=[]), envelope(timestamp=NOW_MS)]
    assert all(taken(one).nonce.key == first.key for one in others)
    assert len({first.fingerprint, *(taken(one).nonce.fingerprint for one in others)}) == 4
    assert taken(envelope(n="0A1B2C3D4E5F")).nonce.key == first.key
    assert taken(envelope(n="0a1b2c3d4e60")).nonce.key != first.key
