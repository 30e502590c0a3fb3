"""Shelly's first generation over MQTT: a bare value a topic, `sensor/temperature` or `relay/0/power`.

No time comes with any of them. A sensor's names are those of the parameters that the same firmware sends by GET. Left
out: which device it is (`ingest.mqtt.topics`), whether it is there (`online`), and what it says of itself.
"""

from typing import Final

from ingest.formats.shape import BodyError, Malformed, Measurement, Said, Submission
from ingest.formats.shelly_get import measurement, number
from schemas.errors import RequestCode

_VALUE_BYTES_MAX: Final = 1_000
#: What meters tell: a metric, and the unit that the firmware counts in. A relay's counter is in watt-minutes; that of
#: an energy meter is `total`, in watt-hours.
_METERED: Final[dict[str, tuple[str, str | None]]] = {
    "power": ("power", "W"),
    "reactive_power": ("reactive_power", "var"),
    "voltage": ("voltage", "V"),
    "current": ("current", "A"),
    "pf": ("power_factor", None),
    "energy": ("energy", "Wmin"),
    "total": ("energy", "Wh"),
    "total_returned": ("energy_exported", "Wh"),
}
#: Of which a device may have several, by the parameter that says the same.
_NUMBERED: Final = {
    "relay": "output", "ext_temperature": "temperature", "ext_humidity": "humidity", "adc": "voltage",
}  # fmt: skip
#: What a device measures of itself, beside the sensor that it is.
_OWN: Final = "device"


def decode(payload: bytes, said: Said) -> list[Submission]:
    """The one reading of a message. Raises `BodyError` for what is no short text in UTF-8."""
    if len(payload) > _VALUE_BYTES_MAX:
        raise BodyError(RequestCode.INVALID_BODY, f"a value has up to {_VALUE_BYTES_MAX} bytes")
    try:
        text = payload.decode().strip()
    except UnicodeDecodeError as error:
        raise BodyError(RequestCode.INVALID_BODY, f"the value is not UTF-8 (byte {error.start})") from None
    return [Submission([_reading(said, text)])]


def _reading(said: Said, text: str) -> Measurement | Malformed:
    label = ""
    match said.words:
        case (component, which, what) if what in _METERED:
            found = number(what, text, *_METERED[what])
            label = f"{component}:{which}"
        case (component, which) if component in _NUMBERED:
            found = measurement(_NUMBERED[component], text)
            label = f"{component}:{which}"
        case ("sensor", name):
            found = measurement(name, text)
        case words:
            found = measurement("/".join(words), text)
            label = _OWN
    if isinstance(found, Measurement):
        found.label = label or None
        if found.type == "temperature":
            found.unit = said.temperature_unit
    return found
