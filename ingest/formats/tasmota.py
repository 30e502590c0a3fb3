"""Tasmota over MQTT: `SENSOR` with an object a sensor, and of `STATE` what is measured.

`Time` is the device's local time and tells no zone, unless it was set to: it is read as of the site's zone. A time
that the zone has twice, or never, says nothing for certain: such a reading is stamped on arrival, as one from before
the clock was set. Units stand beside the sensors where they can be chosen. Left out: `LWT`, and whether a reading is
any good.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

from ingest.formats.json_text import parse_object
from ingest.formats.shape import BadNumber, Measurement, Said, Submission

_FLAGS: Final = {"ON": True, "OFF": False}
#: What fields mean: a metric and a unit. Of all others the name is the metric.
_FIELDS: Final[Mapping[str, tuple[str, str | None]]] = {
    "Humidity": ("humidity", "%"), "Illuminance": ("illuminance", "lx"), "CarbonDioxide": ("co2", "ppm"),
    "eCO2": ("co2", "ppm"), "TVOC": ("tvoc", "ppb"), "PM2.5": ("pm2_5", "µg/m³"), "PM10": ("pm10", "µg/m³"),
    "Distance": ("distance", "cm"), "Moisture": ("soil_moisture", "%"), "Gas": ("gas_resistance", "kΩ"),
    "Total": ("energy", "kWh"), "Today": ("energy_today", "kWh"), "Yesterday": ("energy_yesterday", "kWh"),
    "Period": ("energy_period", "Wh"), "ExportActive": ("energy_exported", "kWh"), "Power": ("power", "W"),
    "ApparentPower": ("apparent_power", "VA"), "ReactivePower": ("reactive_power", "var"),
    "Factor": ("power_factor", None), "Voltage": ("voltage", "V"), "Current": ("current", "A"),
    "Frequency": ("frequency", "Hz"),
}  # fmt: skip
_TEMPERATURES: Final = {"Temperature": "temperature", "DewPoint": "dew_point"}
_PRESSURES: Final = {"Pressure": "pressure", "SeaPressure": "sea_pressure"}
_IGNORED: Final = {"Id", "Address"}


def decode_sensor(payload: bytes, said: Said) -> list[Submission]:
    """What the sensors of a device tell. Raises `BodyError` for what is no object."""
    content = parse_object(payload)
    units = _units(content, said)
    return [Submission([*_sensors(content, units)], None, _time(content.get("Time"), said.zone))]


def decode_state(payload: bytes, said: Said) -> list[Submission]:
    """What a device tells of itself that is a measurement. Raises `BodyError` for what is no object."""
    content = parse_object(payload)
    return [Submission([*_state(content)], None, _time(content.get("Time"), said.zone))]


def _units(content: Mapping[str, Any], said: Said) -> Mapping[str, tuple[str, str | None]]:
    """Of the fields whose units can be chosen."""
    temperature = content.get("TempUnit", said.temperature_unit)
    pressure = content.get("PressureUnit", "hPa")
    return {name: (metric, temperature) for name, metric in _TEMPERATURES.items()} | {
        name: (metric, pressure) for name, metric in _PRESSURES.items()
    }


def _sensors(content: Mapping[str, Any], units: Mapping[str, tuple[str, str | None]]) -> Iterator[Measurement]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _sensor(name, value, units)
        elif isinstance(value, str) and value in _FLAGS:
            yield Measurement("switch", _FLAGS[value], name)


def _sensor(
    label: str, values: Mapping[str, Any], units: Mapping[str, tuple[str, str | None]]
) -> Iterator[Measurement]:
    for name, value in values.items():
        metric, unit = units.get(name) or _FIELDS.get(name) or (name, None)
        if name in _IGNORED:
            continue
        if isinstance(value, list):  # one for each phase or channel, from 1 on
            for number, one in enumerate(value, 1):
                if _is_measured(one):
                    yield Measurement(metric, one, f"{label}:{number}", unit)
        elif isinstance(value, dict):
            yield from _sensor(f"{label}:{name}", value, units)
        elif _is_measured(value):
            yield Measurement(metric, value, label, unit)


def _is_measured(value: object) -> bool:
    """Texts tell of the sensor; null tells that it failed, which is refused like any value that is none."""
    return value is None or isinstance(value, int | float | BadNumber)


def _state(content: Mapping[str, Any]) -> Iterator[Measurement]:
    if "UptimeSec" in content:
        yield Measurement("uptime", content["UptimeSec"], None, "s")
    wifi = content.get("Wifi")
    if isinstance(wifi, dict) and "Signal" in wifi:  # its RSSI is a percentage
        yield Measurement("signal", wifi["Signal"], None, "dBm")
    if "Vcc" in content:
        yield Measurement("voltage", content["Vcc"], "Vcc", "V")
    for name, value in content.items():
        if name.startswith("POWER") and isinstance(value, str) and value in _FLAGS:
            yield Measurement("switch", _FLAGS[value], name)


def _time(told: object, zone: str) -> object:
    """With its offset where the zone tells one; as it came where not."""
    if not isinstance(told, str):
        return told
    try:
        local = datetime.fromisoformat(told)
        if local.tzinfo is not None:
            return told
        early, late = (local.replace(tzinfo=ZoneInfo(zone), fold=fold) for fold in (0, 1))
        return early.astimezone(UTC).isoformat() if early.utcoffset() == late.utcoffset() else told
    except (ValueError, OverflowError):
        return told
