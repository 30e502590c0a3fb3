"""Shelly's GET requests: readings as query parameters, Gen1 firmware and Gen2/Gen3 webhooks alike.

Firmware joins its parameters onto the configured URL with `&` or with a second `?`; both separate here. A
parameter nobody knows is refused by itself. Left out: who sends (`ingest.credentials`) and units' ranges.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, unquote_plus

from ingest.formats.shape import BodyError, Malformed, Measurement, Submission, is_unexpanded
from schemas.errors import ReadingCode, RequestCode

_PARAMETERS_MAX: Final = 100
#: What firmware puts where it has no value.
_EMPTY: Final = ("", "null")


#: What parameters of numbers mean: a metric, and its unit where the name says which.
NUMBERS: Final[dict[str, tuple[str, str | None]]] = {
    "temp": ("temperature", None), "temperature": ("temperature", None), "tc": ("temperature", "°C"),
    "tempc": ("temperature", "°C"), "tf": ("temperature", "°F"), "tempf": ("temperature", "°F"),
    "hum": ("humidity", None), "humidity": ("humidity", None), "rh": ("humidity", None),
    "battery": ("battery", None), "bat": ("battery", None), "batv": ("battery_voltage", "V"),
    "batterymv": ("battery_voltage", "mV"), "signal": ("signal", None), "rssi": ("signal", None),
    "lux": ("illuminance", None), "illuminance": ("illuminance", None), "tilt": ("tilt", None),
    "ppm": ("gas", None), "co2": ("co2", None), "pressure": ("pressure", None),
    "voltage": ("voltage", None), "current": ("current", None), "power": ("power", None),
    "apower": ("power", None), "energy": ("energy", None), "aenergy": ("energy", None),
    "freq": ("frequency", None), "frequency": ("frequency", None), "pf": ("power_factor", None),
    "uptime": ("uptime", None), "rotation": ("rotation", "°"), "distance": ("distance", None),
    "event_cnt": ("event_count", None), "wakeup_count": ("wakeup_count", None),
}  # fmt: skip
FLAGS: Final = {
    "flood": "leak", "leak": "leak", "state": "open", "open": "open", "window": "open", "motion": "motion",
    "vibration": "vibration", "smoke": "smoke", "alarm": "alarm", "presence": "occupancy", "lwt": "online",
    "online": "online", "output": "switch", "ext_power": "external_power", "charger": "external_power",
}  # fmt: skip
FLAG_VALUES: Final = {
    "1": True, "true": True, "on": True, "open": True, "opened": True, "online": True, "detected": True,
    "0": False, "false": False, "off": False, "close": False, "closed": False, "offline": False, "none": False,
    "mild": True, "heavy": True, "test": False, "sleep": False,
}  # fmt: skip
TEXTS: Final = {"event": "event", "act_reasons": "wake_reason", "wakeup_reason": "wake_reason", "error": "error"}


class Query(NamedTuple):
    """A request's query: the token and device it names, and the readings in it."""

    token: str | None
    submission: Submission


class _Rule(NamedTuple):
    metric: str
    unit: str | None
    parse: "Callable[[str], Any]"


def _number(text: str) -> float:
    if "_" in text or not text.isascii():  # Python reads 1_0, and the digits of every script; nobody else does
        raise ValueError(text)
    return float(text)


def _flag(text: str) -> bool:
    known = FLAG_VALUES.get(text.lower())
    if known is None:
        raise ValueError(text)
    return known


def _rules() -> dict[str, _Rule]:
    return (
        {name: _Rule(metric, unit, _number) for name, (metric, unit) in NUMBERS.items()}
        | {name: _Rule(metric, None, _flag) for name, metric in FLAGS.items()}
        | {name: _Rule(metric, None, str) for name, metric in TEXTS.items()}
    )


_RULES: Final = _rules()
#: Says what the firmware calls itself; the token decides which device it is.
_IGNORED: Final = frozenset({"id", "cid", "mac", "src", "component", "user", "username"})


def decode(raw_query: str) -> Query:
    """The readings in a request's raw (still percent-encoded) query string.

    Raises `BodyError` for a query of more than 100 parameters.
    """
    parts = raw_query.replace("?", "&").split("&")
    if len(parts) > _PARAMETERS_MAX:
        raise BodyError(RequestCode.INVALID_PARAMETER, f"more than {_PARAMETERS_MAX} parameters")
    encoded = "%" in raw_query or "+" in raw_query
    token: str | None = None
    submission = Submission([])
    for part in parts:
        name, _, value = part.partition("=")
        if encoded:
            # Of a time's +02:00 the sign is meant, though a form would read it as a space.
            name, value = unquote_plus(name), unquote(value) if name == "ts" else unquote_plus(value)
        if name == "token":
            token = value
        elif name == "device":
            submission.device = value or None
        elif name == "ts":
            # An unexpanded or empty time says nothing of the readings: they are stamped like untimed ones.
            submission.ts = None if value in _EMPTY or is_unexpanded(value) else value
        elif name and name not in _IGNORED:
            submission.measurements.append(measurement(name, value))
    return Query(token, submission)


def measurement(name: str, value: str) -> Measurement | Malformed:
    """What a parameter says, as firmware of the first generation also names its topics."""
    return _read(name, value, _RULES.get(name) or _RULES.get(name.lower()))


def number(name: str, value: str, metric: str, unit: str | None) -> Measurement | Malformed:
    """The same of a name that stands for a metric of its own."""
    return _read(name, value, _Rule(metric, unit, _number))


def _read(name: str, value: str, rule: _Rule | None) -> Measurement | Malformed:
    if is_unexpanded(value):
        return _malformed(ReadingCode.UNEXPANDED, name, value, "holds a placeholder the device did not fill in")
    if rule is None:
        return _malformed(ReadingCode.UNKNOWN_PARAMETER, name, value, "is no parameter that Sluice knows")
    if value in _EMPTY:
        return _malformed(ReadingCode.INVALID_VALUE, name, value, "is empty")
    try:
        return Measurement(rule.metric, rule.parse(value), None, rule.unit)
    except ValueError:
        return _malformed(ReadingCode.INVALID_VALUE, name, value, "holds no value it can have")


def _malformed(code: ReadingCode, name: str, value: str, what: str) -> Malformed:
    shown = name[:64] if name.isprintable() else ascii(name[:64])
    return Malformed(code, f"`{shown}` {what}", {"parameter": name[:64], "value": value[:200]})
