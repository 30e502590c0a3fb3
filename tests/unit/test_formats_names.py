"""What Shelly's two generations and Tasmota publish: values, labels, units and times, and the traps of each."""

import json
from typing import Any, NamedTuple

import pytest

from ingest.formats import shelly_gen1, shelly_rpc, tasmota
from ingest.formats.shape import BodyError, Malformed, Measurement, Submission
from schemas.errors import ReadingCode


class Said(NamedTuple):
    words: tuple[str, ...] = ()
    zone: str = "Europe/Prague"
    temperature_unit: str = "°C"


def gen1(topic: str, payload: str, temperature_unit: str = "°C") -> Measurement | Malformed:
    said = Said(tuple(topic.split("/")), temperature_unit=temperature_unit)
    (submission,) = shelly_gen1.decode(payload.encode(), said)
    one: Measurement | Malformed = submission.measurements[0]
    assert (len(submission.measurements), submission.ts) == (1, None)
    return one


def rpc(frame: Any) -> Submission:
    (submission,) = shelly_rpc.decode_notification(json.dumps(frame).encode(), Said())
    return submission


def status(component: str, content: Any) -> list[Any]:
    (submission,) = shelly_rpc.decode_status(json.dumps(content).encode(), Said(("status", component)))
    assert submission.ts is None
    return submission.measurements


def sensor(content: Any, zone: str = "Europe/Prague", temperature_unit: str = "°C") -> Submission:
    said = Said(("SENSOR",), zone, temperature_unit)
    (submission,) = tasmota.decode_sensor(json.dumps(content).encode(), said)
    return submission


# ---------------------------------------------------------------- Gen1


@pytest.mark.parametrize(
    ("topic", "payload", "expected"),
    [
        ("sensor/temperature", "21.38", Measurement("temperature", 21.38, None, "°C")),
        ("sensor/humidity", " 45 ", Measurement("humidity", 45.0)),
        ("sensor/battery", "87", Measurement("battery", 87.0)),
        ("sensor/flood", "true", Measurement("leak", True)),
        ("sensor/state", "close", Measurement("open", False)),
        ("sensor/ext_power", "false", Measurement("external_power", False)),
        ("sensor/act_reasons", '["sensor"]', Measurement("wake_reason", '["sensor"]')),
        ("relay/0", "on", Measurement("switch", True, "relay:0")),
        ("relay/0/power", "12.5", Measurement("power", 12.5, "relay:0", "W")),
        ("relay/1/energy", "90", Measurement("energy", 90.0, "relay:1", "Wmin")),
        ("emeter/2/total", "1234.5", Measurement("energy", 1234.5, "emeter:2", "Wh")),
        ("emeter/2/total_returned", "7", Measurement("energy_exported", 7.0, "emeter:2", "Wh")),
        ("emeter/0/pf", "0.97", Measurement("power_factor", 0.97, "emeter:0")),
        ("temperature", "48.1", Measurement("temperature", 48.1, "device", "°C")),
        ("ext_temperature/1", "4.5", Measurement("temperature", 4.5, "ext_temperature:1", "°C")),
    ],
)
def test_a_bare_value_means_what_its_topic_says(topic: str, payload: str, expected: Measurement) -> None:
    assert gen1(topic, payload) == expected


@pytest.mark.parametrize("topic", ["sensor/temperature", "temperature", "ext_temperature/0"])
def test_a_temperature_is_in_the_unit_that_the_site_says(topic: str) -> None:
    found = gen1(topic, "70.5", "°F")
    assert isinstance(found, Measurement)
    assert (found.value, found.unit) == (70.5, "°F")
    assert gen1("sensor/humidity", "45", "°F") == Measurement("humidity", 45.0)


@pytest.mark.parametrize(
    ("topic", "payload", "code"),
    [
        ("sensor/temperature", "", ReadingCode.INVALID_VALUE),
        ("sensor/temperature", "null", ReadingCode.INVALID_VALUE),
        ("sensor/temperature", "warm", ReadingCode.INVALID_VALUE),
        ("relay/0/power", "${power}", ReadingCode.UNEXPANDED),
        ("sensor/colour", "1", ReadingCode.UNKNOWN_PARAMETER),
    ],
)
def test_a_value_that_is_none_is_refused_with_its_reason(topic: str, payload: str, code: ReadingCode) -> None:
    found = gen1(topic, payload)
    assert isinstance(found, Malformed)
    assert found.code == code


@pytest.mark.parametrize("payload", [b"\xff\xfe", b"1" * 1_001])
def test_what_is_no_short_text_is_undecodable(payload: bytes) -> None:
    with pytest.raises(BodyError):
        shelly_gen1.decode(payload, Said(("sensor", "temperature")))


# ---------------------------------------------------------------- Gen2

FULL: dict[str, Any] = {
    "src": "shellyplusht-b8d61a8b17cc",
    "dst": "x/events",
    "method": "NotifyFullStatus",
    "params": {
        "ts": 1680962879.62,
        "temperature:0": {"id": 0, "tC": 19.8, "tF": 67.6},
        "humidity:0": {"id": 0, "rh": 42.2},
        "devicepower:0": {"id": 0, "battery": {"V": 0.43, "percent": 0}, "external": {"present": True}},
        "sys": {"unixtime": None, "uptime": 3, "wakeup_period": 600},
    },
}


def test_a_full_status_has_a_time_for_all_of_it_and_a_mains_powered_one_has_no_flat_battery() -> None:
    found = rpc(FULL)
    assert found.ts == 1680962879.62
    assert found.measurements == [
        Measurement("temperature", 19.8, None, "°C"),
        Measurement("humidity", 42.2, None, "%"),
        Measurement("external_power", True),
    ]


def test_a_battery_that_feeds_the_device_is_told() -> None:
    power = {"id": 0, "battery": {"V": 5.6, "percent": 88}, "external": {"present": False}}
    assert status("devicepower:0", power) == [
        Measurement("battery_voltage", 5.6, None, "V"),
        Measurement("battery", 88, None, "%"),
        Measurement("external_power", False),
    ]


def test_a_partial_overlay_tells_what_it_has_and_nulls_tell_nothing() -> None:
    params = {"ts": 12.5, "switch:0": {"id": 0, "apower": 8.9, "voltage": None}, "humidity:0": None, "cloud": {}}
    found = rpc({"method": "NotifyStatus", "params": params})
    assert (found.ts, found.measurements) == (12.5, [Measurement("power", 8.9, "switch:0", "W")])


def test_meters_tell_power_and_counters_under_their_component() -> None:
    content = {
        "id": 0, "output": True, "apower": 8.9, "voltage": 237.5, "current": 0.04, "freq": 50.0, "pf": 0.9,
        "aenergy": {"total": 6.532, "by_minute": [45.199, 47.1, 88.4], "minute_ts": 1626935779},
        "ret_aenergy": {"total": 1.0}, "temperature": {"tC": 23.5, "tF": 74.4},
    }  # fmt: skip
    found = {(one.type, one.unit): one.value for one in status("switch:0", content)}
    assert found == {
        ("power", "W"): 8.9, ("voltage", "V"): 237.5, ("current", "A"): 0.04, ("power_factor", None): 0.9,
        ("frequency", "Hz"): 50.0, ("energy", "Wh"): 6.532, ("energy_exported", "Wh"): 1.0,
        ("temperature", "°C"): 23.5, ("switch", None): True,
    }  # fmt: skip
    assert {one.label for one in status("switch:0", content)} == {"switch:0"}
    assert status("pm1:0", {"apower": 1.0}) == [Measurement("power", 1.0, "pm1:0", "W")]


def test_phases_of_a_meter_are_told_apart() -> None:
    content = {"a_voltage": 230.1, "b_act_power": -12.0, "c_pf": None, "total_act_power": 88.0}
    assert status("em:0", content) == [
        Measurement("power", 88.0, "em:0", "W"),
        Measurement("voltage", 230.1, "em:0:a", "V"),
        Measurement("power", -12.0, "em:0:b", "W"),
    ]
    stored = {"a_total_act_energy": 10.0, "total_act": 30.0, "total_act_ret": 1.0}
    assert status("emdata:0", stored) == [
        Measurement("energy", 30.0, "emdata:0", "Wh"),
        Measurement("energy_exported", 1.0, "emdata:0", "Wh"),
        Measurement("energy", 10.0, "emdata:0:a", "Wh"),
    ]


def test_further_sensors_have_their_component_as_label() -> None:
    assert status("temperature:100", {"tC": 4.25}) == [Measurement("temperature", 4.25, "temperature:100", "°C")]


def test_events_have_times_of_their_own() -> None:
    event = {"component": "input:0", "id": 0, "event": "single_push", "ts": 1690100000.5}
    found = rpc({"method": "NotifyEvent", "params": {"ts": 1690100001.0, "events": [event, "push"]}})
    assert found.measurements[0] == Measurement("event", "single_push", "input:0", None, 1690100000.5)
    assert isinstance(found.measurements[1], Malformed)


@pytest.mark.parametrize("frame", [{"id": 1, "result": {}}, {"method": "Shelly.GetStatus"}, {}])
def test_what_is_no_notification_has_no_readings(frame: Any) -> None:
    assert shelly_rpc.decode_notification(json.dumps(frame).encode(), Said()) == []


@pytest.mark.parametrize("payload", [b"", b"[1]", b"{", b"\xff", b'{"method":"NotifyStatus"}',
                                     b'{"method":"NotifyEvent","params":{}}'])  # fmt: skip
def test_what_is_malformed_is_undecodable(payload: bytes) -> None:
    with pytest.raises(BodyError):
        shelly_rpc.decode_notification(payload, Said())


# ---------------------------------------------------------------- Tasmota

AM2301 = {"Time": "2018-03-02T18:25:03", "AM2301": {"Temperature": 22.6, "Humidity": 32.4}, "TempUnit": "C"}


def test_sensors_are_labels_and_local_times_are_the_site_s() -> None:
    found = sensor(AM2301)
    assert found.ts == "2018-03-02T17:25:03+00:00"
    assert found.measurements == [
        Measurement("temperature", 22.6, "AM2301", "C"),
        Measurement("humidity", 32.4, "AM2301", "%"),
    ]
    assert sensor(AM2301, "UTC").ts == "2018-03-02T18:25:03+00:00"


@pytest.mark.parametrize(
    ("told", "ts"),
    [
        ("2018-03-02T18:25:03+02:00", "2018-03-02T18:25:03+02:00"),
        ("2018-07-02T18:25:03", "2018-07-02T16:25:03+00:00"),
        # Twice, or never: nobody can tell, so it is as good as none.
        ("2026-10-25T02:30:00", "2026-10-25T02:30:00"),
        ("2026-03-29T02:30:00", "2026-03-29T02:30:00"),
        ("1970-01-01T00:00:12", "1969-12-31T23:00:12+00:00"),
        ("0001-01-01T00:00:00", "0001-01-01T00:00:00"),
        ("yesterday", "yesterday"),
        (12, 12),
        (None, None),
    ],
)
def test_a_time_is_as_good_as_it_can_be_told(told: Any, ts: Any) -> None:
    assert sensor({"Time": told}).ts == ts


def test_units_are_what_the_device_says_or_else_the_site() -> None:
    content = {"BME280": {"Temperature": 70.5, "DewPoint": 50.1, "Pressure": 755.2}, "PressureUnit": "mmHg"}
    assert sensor(content | {"TempUnit": "F"}).measurements == [
        Measurement("temperature", 70.5, "BME280", "F"),
        Measurement("dew_point", 50.1, "BME280", "F"),
        Measurement("pressure", 755.2, "BME280", "mmHg"),
    ]
    assert sensor(content, temperature_unit="°F").measurements[0].unit == "°F"
    assert sensor({"B": {"Pressure": 990.0}}).measurements == [Measurement("pressure", 990.0, "B", "hPa")]


def test_energy_counts_what_rises_and_not_what_begins_anew() -> None:
    energy = {
        "TotalStartTime": "2018-02-01T00:00:00", "Total": 3.185, "Yesterday": 3.058, "Today": 0.127, "Period": 1,
        "Power": 24, "ApparentPower": 30, "ReactivePower": 18, "Factor": 0.8, "Voltage": 230, "Current": 0.13,
    }  # fmt: skip
    found = {one.type: (one.value, one.unit) for one in sensor({"ENERGY": energy}).measurements}
    assert found == {
        "energy": (3.185, "kWh"), "energy_yesterday": (3.058, "kWh"), "energy_today": (0.127, "kWh"),
        "energy_period": (1, "Wh"), "power": (24, "W"), "apparent_power": (30, "VA"), "reactive_power": (18, "var"),
        "power_factor": (0.8, None), "voltage": (230, "V"), "current": (0.13, "A"),
    }  # fmt: skip


def test_phases_nested_objects_and_switches_are_told_apart() -> None:
    content = {"Switch1": "ON", "ENERGY": {"Total": [0.0, 2.91]}, "ANALOG": {"A0": 512, "CT": {"Power": 3}},
               "DS18B20": {"Id": "00080", "Temperature": None}}  # fmt: skip
    assert sensor(content).measurements == [
        Measurement("switch", True, "Switch1"),
        Measurement("energy", 0.0, "ENERGY:1", "kWh"),
        Measurement("energy", 2.91, "ENERGY:2", "kWh"),
        Measurement("A0", 512, "ANALOG"),
        Measurement("power", 3, "ANALOG:CT", "W"),
        Measurement("temperature", None, "DS18B20", "°C"),
    ]


def test_of_its_state_only_what_is_measured_is_told() -> None:
    content = {
        "Time": "2018-03-02T18:25:03", "Uptime": "0T00:05:12", "UptimeSec": 312, "Vcc": 3.1, "POWER": "ON",
        "POWER2": "OFF", "Wifi": {"AP": 1, "SSId": "ours", "RSSI": 86, "Signal": -57}, "Heap": 27,
    }  # fmt: skip
    (found,) = tasmota.decode_state(json.dumps(content).encode(), Said())
    assert found.measurements == [
        Measurement("uptime", 312, None, "s"),
        Measurement("signal", -57, None, "dBm"),
        Measurement("voltage", 3.1, "Vcc", "V"),
        Measurement("switch", True, "POWER"),
        Measurement("switch", False, "POWER2"),
    ]
