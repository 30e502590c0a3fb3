"""Shelly's second generation and later: status of components as JSON, in RPC notifications or one by one.

A notification (`events/rpc`) has the time of all it says; that may be the uptime, of a device that has no clock yet.
In `NotifyStatus` stands what has changed, and null for a key that was removed, which is no reading. A component's
status (`status/switch:0`) has no time. What is no measurement (the network, the cloud, settings) is passed over. Left
out: whether a reading is any good (`ingest.admit`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from ingest.formats.json_text import parse_object
from ingest.formats.shape import BodyError, Malformed, Measurement, Said, Submission
from schemas.errors import ReadingCode, RequestCode

_STATUS: Final = ("NotifyStatus", "NotifyFullStatus")
_EVENT: Final = "NotifyEvent"


class _Field(NamedTuple):
    metric: str
    unit: str | None = None


_METER: Final = {
    "apower": _Field("power", "W"), "act_power": _Field("power", "W"), "aprt_power": _Field("apparent_power", "VA"),
    "voltage": _Field("voltage", "V"), "current": _Field("current", "A"), "pf": _Field("power_factor"),
    "freq": _Field("frequency", "Hz"), "aenergy.total": _Field("energy", "Wh"),
    "ret_aenergy.total": _Field("energy_exported", "Wh"), "temperature.tC": _Field("temperature", "°C"),
    "output": _Field("switch"), "brightness": _Field("brightness", "%"), "current_pos": _Field("level", "%"),
}  # fmt: skip
_STORED: Final = {
    "total_act_energy": _Field("energy", "Wh"), "total_act_ret_energy": _Field("energy_exported", "Wh"),
}  # fmt: skip
_PHASES: Final = ("a", "b", "c", "n")
#: By kind of component, its fields; a point leads into an object within.
_COMPONENTS: Final[Mapping[str, Mapping[str, _Field]]] = {
    "temperature": {"tC": _Field("temperature", "°C")},
    "humidity": {"rh": _Field("humidity", "%")},
    "illuminance": {"lux": _Field("illuminance", "lx")},
    "devicepower": {
        "battery.V": _Field("battery_voltage", "V"), "battery.percent": _Field("battery", "%"),
        "external.present": _Field("external_power"),
    },
    "flood": {"alarm": _Field("leak")},
    "smoke": {"alarm": _Field("smoke")},
    "motion": {"motion": _Field("motion")},
    "input": {"state": _Field("input"), "percent": _Field("level", "%"), "counts.total": _Field("count")},
    "voltmeter": {"voltage": _Field("voltage", "V")},
    "wifi": {"rssi": _Field("signal", "dBm")},
    "em1data": _STORED,
    "emdata": {"total_act": _Field("energy", "Wh"), "total_act_ret": _Field("energy_exported", "Wh")},
    "em": {
        "total_current": _Field("current", "A"), "total_act_power": _Field("power", "W"),
        "total_aprt_power": _Field("apparent_power", "VA"),
    },
} | dict.fromkeys(("switch", "cover", "light", "rgb", "rgbw", "cct", "pm1", "em1"), _METER)  # fmt: skip
#: Of a component with phases, the fields of each, behind its letter.
_PHASED: Final[Mapping[str, Mapping[str, _Field]]] = {"em": _METER, "emdata": _STORED}
#: A device has one of each as a rule, and the first needs no name: by GET its values have none either.
_PLAIN: Final = {
    f"{kind}:0" for kind in ("temperature", "humidity", "illuminance", "devicepower", "flood", "smoke", "motion")
} | {"wifi"}  # fmt: skip
_BATTERY: Final = ("battery", "battery_voltage")


def decode_notification(payload: bytes, said: Said) -> list[Submission]:
    """What an RPC notification tells. Raises `BodyError` for what is none."""
    frame = parse_object(payload)
    params = frame.get("params")
    method = frame.get("method")
    if method not in (*_STATUS, _EVENT):
        return []
    if not isinstance(params, dict):
        raise BodyError(RequestCode.INVALID_BODY, "`params` is not an object")
    found = _events(params) if method == _EVENT else _all_readings(params)
    return [Submission([*found], None, params.get("ts"))]


def decode_status(payload: bytes, said: Said) -> list[Submission]:
    """What a component's status tells, stamped on arrival. Raises `BodyError` for what is none."""
    return [Submission([*_readings(said.words[-1], parse_object(payload))])]


def _all_readings(params: Mapping[str, Any]) -> Iterator[Measurement]:
    for component, status in params.items():
        if isinstance(status, dict):
            yield from _readings(component, status)


def _readings(component: str, status: Mapping[str, Any]) -> Iterator[Measurement]:
    kind = component.partition(":")[0]
    label = None if component in _PLAIN else component
    # On mains, a battery of 0 % and 0.43 V is none at all.
    on_mains = kind == "devicepower" and _value(status, "external.present") is True
    for path, field in _COMPONENTS.get(kind, {}).items():
        value = _value(status, path)
        if value is not None and not (on_mains and field.metric in _BATTERY):
            yield Measurement(field.metric, value, label, field.unit)
    for phase in _PHASES if kind in _PHASED else ():
        for path, field in _PHASED[kind].items():
            value = _value(status, f"{phase}_{path}")
            if value is not None:
                yield Measurement(field.metric, value, f"{component}:{phase}", field.unit)


def _value(status: Mapping[str, Any], path: str) -> Any:
    """None for what is not there, or was removed."""
    found: Any = status
    for name in path.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _events(params: Mapping[str, Any]) -> Iterator[Measurement | Malformed]:
    events = params.get("events")
    if not isinstance(events, list):
        raise BodyError(RequestCode.INVALID_BODY, "`events` is not an array")
    for event in events:
        if isinstance(event, dict):
            yield Measurement("event", event.get("event"), event.get("component"), None, event.get("ts"))
        else:
            yield Malformed(ReadingCode.INVALID_MEASUREMENT, "an event is an object", event)
