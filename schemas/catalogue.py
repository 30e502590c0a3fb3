"""The metric catalogue: names, canonical units, plausible ranges, and how other units become the canonical one.

Units follow the SI brochure's symbols where there is one. Left out: metrics of a user's own, which need no entry.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Final, NamedTuple

#: No float needs more.
_DIGITS_MAX: Final = 17


class Conversion:
    """canonical = (value + add) × times ÷ by, in decimals.

    What was sent is meant as a decimal: in binary, 300 K would be 26.850000000000023 °C.
    """

    __slots__ = ("_add", "_by", "_times", "metric")

    def __init__(self, *, add: float = 0.0, times: float = 1.0, by: float = 1.0, metric: str | None = None) -> None:
        self._add, self._times, self._by = (Decimal(repr(number)) for number in (add, times, by))
        self.metric = metric
        """Where a unit means another quantity (a battery in volts), the metric it belongs to."""

    @property
    def keeps_value(self) -> bool:
        return not self._add and self._times == self._by

    def __call__(self, value: float) -> float:
        return float((Decimal(repr(value)) + self._add) * self._times / self._by)

    def undo(self, canonical: float) -> float | None:
        """The decimal of fewest places that becomes exactly `canonical`; None where none is found."""
        exact = Decimal(repr(canonical)) * self._by / self._times - self._add
        for form in "fg":
            for digits in range(_DIGITS_MAX + 1):
                found = float(f"{exact:.{digits}{form}}") + 0.0  # no -0.0
                if self(found) == canonical:
                    return found
        return None


class Metric(NamedTuple):
    """A metric we know: `low` and `high` are in its unit, both plausible."""

    name: str
    unit: str
    low: float
    high: float
    conversions: Mapping[str, Conversion] = {}
    boolean: bool = False


SAME: Final = Conversion()

_TEMPERATURE: Final = {"°F": Conversion(add=-32.0, times=5.0, by=9.0), "K": Conversion(add=-273.15)}
_PRESSURE: Final = {
    "Pa": Conversion(by=100.0),
    "kPa": Conversion(times=10.0),
    "mbar": SAME,
    "bar": Conversion(times=1000.0),
    "psi": Conversion(times=68.947572931683),
    "mmHg": Conversion(times=1.333223874150),
}
_VOLT: Final = {"mV": Conversion(by=1000.0), "kV": Conversion(times=1000.0)}
_AMPERE: Final = {"mA": Conversion(by=1000.0), "kA": Conversion(times=1000.0)}
_WATT: Final = {"mW": Conversion(by=1000.0), "kW": Conversion(times=1e3), "MW": Conversion(times=1e6)}
_WATT_HOUR: Final = {
    "kWh": Conversion(times=1e3),
    "MWh": Conversion(times=1e6),
    "J": Conversion(by=3600.0),
    "kJ": Conversion(by=3.6),
    "Wmin": Conversion(by=60.0),
}
_VAR: Final = {"kvar": Conversion(times=1000.0)}
_VOLT_AMPERE: Final = {"kVA": Conversion(times=1000.0)}
_BATTERY: Final = {
    "V": Conversion(metric="battery_voltage"),
    "mV": Conversion(by=1000.0, metric="battery_voltage"),
}
_SPEED: Final = {
    "km/h": Conversion(by=3.6),
    "mph": Conversion(times=0.44704),
    "kn": Conversion(times=1852.0, by=3600.0),
}
_METRE: Final = {"mm": Conversion(by=1000.0), "cm": Conversion(by=100.0), "km": Conversion(times=1000.0)}
_MILLIMETRE: Final = {"cm": Conversion(times=10.0), "m": Conversion(times=1000.0), "in": Conversion(times=25.4)}
_GRAM: Final = {"g": Conversion(by=1000.0), "t": Conversion(times=1000.0)}
_LITRE: Final = {"m³": Conversion(times=1000.0), "ml": Conversion(by=1000.0)}
_HERTZ: Final = {"kHz": Conversion(times=1e3), "MHz": Conversion(times=1e6)}
_SECOND: Final = {"ms": Conversion(by=1000.0), "min": Conversion(times=60.0), "h": Conversion(times=3600.0)}
_RATIO: Final = {"1": Conversion(times=100.0)}

METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("temperature", "°C", -273.15, 2000.0, _TEMPERATURE),
        Metric("dew_point", "°C", -273.15, 200.0, _TEMPERATURE),
        Metric("humidity", "%", 0.0, 100.0, _RATIO),
        Metric("soil_moisture", "%", 0.0, 100.0, _RATIO),
        Metric("pressure", "hPa", 0.0, 1_000_000.0, _PRESSURE),
        Metric("co2", "ppm", 0.0, 1_000_000.0, {"%": Conversion(times=10_000.0)}),
        Metric("gas", "ppm", 0.0, 1_000_000.0, {"%": Conversion(times=10_000.0)}),
        Metric("tvoc", "ppb", 0.0, 1_000_000.0, {"ppm": Conversion(times=1000.0)}),
        Metric("pm2_5", "µg/m³", 0.0, 100_000.0, {"mg/m³": Conversion(times=1000.0)}),
        Metric("pm10", "µg/m³", 0.0, 100_000.0, {"mg/m³": Conversion(times=1000.0)}),
        Metric("illuminance", "lx", 0.0, 1_000_000.0, {"klx": Conversion(times=1000.0)}),
        Metric("voltage", "V", -1e6, 1e6, _VOLT),
        Metric("current", "A", -1e6, 1e6, _AMPERE),
        Metric("power", "W", -1e10, 1e10, _WATT),
        Metric("apparent_power", "VA", -1e10, 1e10, _VOLT_AMPERE),
        Metric("reactive_power", "var", -1e10, 1e10, _VAR),
        Metric("power_factor", "1", -1.0, 1.0, {"%": Conversion(by=100.0)}),
        Metric("energy", "Wh", -1e15, 1e15, _WATT_HOUR),
        Metric("energy_produced", "Wh", -1e15, 1e15, _WATT_HOUR),
        Metric("energy_imported", "Wh", -1e15, 1e15, _WATT_HOUR),
        Metric("energy_exported", "Wh", -1e15, 1e15, _WATT_HOUR),
        Metric("frequency", "Hz", 0.0, 1e12, _HERTZ),
        Metric("battery", "%", 0.0, 100.0, _BATTERY),
        Metric("battery_voltage", "V", 0.0, 1000.0, _VOLT),
        Metric("signal", "dBm", -200.0, 50.0),
        Metric("wind_speed", "m/s", 0.0, 200.0, _SPEED),
        Metric("wind_direction", "°", 0.0, 360.0),
        Metric("rain", "mm", 0.0, 100_000.0, _MILLIMETRE),
        Metric("distance", "m", -1e9, 1e9, _METRE),
        Metric("level", "%", 0.0, 100.0, _RATIO),
        Metric("volume", "l", -1e12, 1e12, _LITRE),
        Metric("flow", "l/min", -1e9, 1e9, {"l/h": Conversion(by=60.0), "m³/h": Conversion(times=1000.0, by=60.0)}),
        Metric("weight", "kg", -1e9, 1e9, _GRAM),
        Metric("duration", "s", 0.0, 1e12, _SECOND),
        Metric("uptime", "s", 0.0, 1e12, _SECOND),
        Metric("tilt", "°", -360.0, 360.0),
        Metric("leak", "", 0.0, 1.0, boolean=True),
        Metric("motion", "", 0.0, 1.0, boolean=True),
        Metric("open", "", 0.0, 1.0, boolean=True),
        Metric("smoke", "", 0.0, 1.0, boolean=True),
        Metric("vibration", "", 0.0, 1.0, boolean=True),
        Metric("occupancy", "", 0.0, 1.0, boolean=True),
        Metric("switch", "", 0.0, 1.0, boolean=True),
        Metric("external_power", "", 0.0, 1.0, boolean=True),
        Metric("online", "", 0.0, 1.0, boolean=True),
    )
}

#: Other spellings of a unit that mean the very same: no conversion, no flag.
UNIT_SPELLINGS: Final[Mapping[str, str]] = {
    "C": "°C", "degC": "°C", "celsius": "°C", "Celsius": "°C", "℃": "°C", "ºC": "°C",
    "F": "°F", "degF": "°F", "fahrenheit": "°F", "Fahrenheit": "°F", "℉": "°F", "ºF": "°F",
    "kelvin": "K", "Kelvin": "K",
    "percent": "%", "pct": "%", "%RH": "%", "%rh": "%", "RH": "%",
    "hpa": "hPa", "HPA": "hPa", "kpa": "kPa", "pa": "Pa",
    "volt": "V", "volts": "V", "amp": "A", "amps": "A", "watt": "W", "watts": "W",
    "wh": "Wh", "kwh": "kWh", "KWH": "kWh", "KWh": "kWh", "kw": "kW", "KW": "kW",
    "VAr": "var", "VAR": "var", "kVAr": "kvar", "kVAR": "kvar",
    "lux": "lx", "hz": "Hz", "L": "l", "L/min": "l/min", "L/h": "l/h", "m3": "m³", "m3/h": "m³/h",
    "ug/m3": "µg/m³", "μg/m³": "µg/m³", "mg/m3": "mg/m³",
    "deg": "°", "degrees": "°", "sec": "s", "seconds": "s", "mL": "ml", "kmh": "km/h", "ratio": "1",
}  # fmt: skip

#: Other names of a metric that devices in the field use.
METRIC_SPELLINGS: Final[Mapping[str, str]] = {
    "temp": "temperature",
    "hum": "humidity",
    "rh": "humidity",
    "lux": "illuminance",
    "rssi": "signal",
    "flood": "leak",
    "batt": "battery",
}


def metric_name(spelt: str) -> str:
    """What a metric is called, however it is spelt: in small letters, and by the catalogue's name if it has one."""
    name = spelt.lower()
    return METRIC_SPELLINGS.get(name, name)
