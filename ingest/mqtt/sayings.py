"""What devices say beside readings: answers to commands, alarms, reports of themselves, and whether they are there.

Pure: bytes to what the database's `device_said` takes. What is wrong in a report is left out of it; whatever else is
wrong makes the message malformed. Left out: who said it, and what becomes of it (`events`, `presence`).
"""

from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import UUID

import msgspec

from ingest.formats.shape import storable
from ingest.mqtt.topics import Kind
from schemas.times import parse_time

#: Of a response; of a longer one it is said that there was one.
RESPONSE_BYTES_MAX: Final = 8_192
#: Of a report of itself.
REPORT_BYTES_MAX: Final = 16_384
_TYPE_CHARACTERS_MAX: Final = 64
_MESSAGE_CHARACTERS_MAX: Final = 1_000
_TEXT_CHARACTERS_MAX: Final = 64
_AMOUNT_MAX: Final = 1e12
_SEVERITIES: Final = ("INFO", "WARNING", "CRITICAL")
_STATES: Final = {
    "ACKNOWLEDGED": "ACKNOWLEDGED", "ACK": "ACKNOWLEDGED", "RECEIVED": "ACKNOWLEDGED", "ACCEPTED": "ACKNOWLEDGED",
    "SUCCESS": "SUCCESS", "OK": "SUCCESS", "DONE": "SUCCESS", "COMPLETED": "SUCCESS",
    "FAILED": "FAILED", "FAILURE": "FAILED", "ERROR": "FAILED", "REJECTED": "FAILED",
}  # fmt: skip
_IS_OVER: Final = {"ACTIVE": False, "RAISED": False, "RESOLVED": True, "CLEARED": True}
#: Of an answer, beside what it answers with.
_ENVELOPE: Final = frozenset({"cmdId", "commandId", "status", "deviceId", "ts", "n", "sig", "response"})
_PRESENT: Final = {
    "online": True, "connected": True, "true": True, "1": True,
    "offline": False, "disconnected": False, "false": False, "0": False,
}  # fmt: skip
_WILL_BYTES_MAX: Final = 1_024


class MalformedError(ValueError):
    """The message is not what its topic is for."""


def is_there(payload: bytes) -> bool:
    """What a will or a status says: a word, or an object with `status`, `state` or `online`.

    Raises `MalformedError`.
    """
    if len(payload) > _WILL_BYTES_MAX:
        raise MalformedError("is too long")
    said: Any = payload.decode(errors="replace")
    if payload.lstrip().startswith(b"{"):
        told = _object(payload)
        said = next((told[name] for name in ("status", "state", "online") if name in told), None)
    if type(said) is bool:
        return said
    found = _PRESENT.get(str(said).strip().lower())
    if found is None:
        raise MalformedError("says neither online nor offline")
    return found


def read(kind: Kind, payload: bytes, size: int) -> str:
    """As the database takes it, in JSON; `size` is that of the whole payload. Raises `MalformedError`."""
    if size > len(payload):
        raise MalformedError(f"has {size} bytes")
    told = _object(payload)
    said = _readers[kind](told) if kind in _readers else _report(payload, told)
    return msgspec.json.encode(said).decode()


def _object(payload: bytes) -> dict[str, Any]:
    try:
        told = msgspec.json.decode(payload)
        is_storable = _is_storable(told)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedError(f"is no JSON: {error}") from None
    except RecursionError:
        raise MalformedError("is nested too deeply") from None
    if type(told) is not dict:
        raise MalformedError("is no object")
    if not is_storable:
        raise MalformedError("holds what the database cannot")
    return told


def _is_storable(value: Any) -> bool:
    if type(value) is str:
        return storable(value)
    if type(value) is dict:
        return all(storable(name) and _is_storable(one) for name, one in value.items())
    return all(map(_is_storable, value)) if type(value) is list else True


# ---------------------------------------------------------------- answers


def _answer(told: Mapping[str, Any]) -> dict[str, Any]:
    state = _STATES.get(str(told.get("status", "ACKNOWLEDGED")).strip().upper())
    if state is None:
        raise MalformedError("has no status that there is")
    return {"command": _command(told), "state": state, "response": _response(told)}


def _command(told: Mapping[str, Any]) -> str:
    try:
        return str(UUID(told.get("cmdId", told.get("commandId"))))
    except (TypeError, ValueError, AttributeError):
        raise MalformedError("names no command") from None


def _response(told: Mapping[str, Any]) -> Any:
    """What it answers with: its `response`, or whatever else it says; always an object."""
    found = told.get("response")
    if found is None:
        found = {name: value for name, value in told.items() if name not in _ENVELOPE}
    elif type(found) is not dict:
        found = {"value": found}
    size = len(msgspec.json.encode(found))
    if size > RESPONSE_BYTES_MAX:
        return {"omitted": f"the response has {size} bytes, up to {RESPONSE_BYTES_MAX} are kept"}
    return found or None


# ---------------------------------------------------------------- alarms


def _alarm(told: Mapping[str, Any]) -> dict[str, Any]:
    kind = told.get("type")
    if type(kind) is not str or not 1 <= len(kind.strip()) <= _TYPE_CHARACTERS_MAX:
        raise MalformedError(f"has no type of 1 to {_TYPE_CHARACTERS_MAX} characters")
    severity = str(told.get("severity", "WARNING")).upper()
    if severity not in _SEVERITIES:
        raise MalformedError(f"has a severity that is none of {', '.join(_SEVERITIES)}")
    is_over = _IS_OVER.get(str(told.get("status", "ACTIVE")).upper())
    if is_over is None:
        raise MalformedError(f"has a status that is none of {', '.join(_IS_OVER)}")
    message = told.get("message")
    if message is not None and type(message) is not str:
        raise MalformedError("has a message that is no text")
    if not message:
        message = None if is_over else kind
    cut = message and message[:_MESSAGE_CHARACTERS_MAX]
    return {"type": kind.strip(), "severity": severity, "message": cut, "is_over": is_over, "at_us": _time(told)}


def _time(told: Mapping[str, Any]) -> int | None:
    """When it was, if it says so in a way that can be read."""
    try:
        found = parse_time(told.get("timestamp", told.get("ts")))
    except ValueError:
        return None
    return None if found is None or abs(found) >= 2**62 else found


# ---------------------------------------------------------------- reports


def _text(value: Any) -> bool:
    return type(value) is str and 1 <= len(value) <= _TEXT_CHARACTERS_MAX


def _flag(value: Any) -> bool:
    return type(value) is bool


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _AMOUNT_MAX


#: What a device's row, or its plant's, has a place for: the names it may have in a report, and what it may be.
_TOLD: Final[dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]]] = {
    "fw_version": (("fwVersion", "fw_version", "firmwareVersion", "firmware"), _text),
    "esi_state": (("esiState", "esi_state"), _text),
    "config_enabled": (("configEnabled", "config_enabled"), _flag),
    "plant_with_load": (("plantWithLoad", "plant_with_load"), _flag),
    "capacity_kwh": (("capacityKwh", "capacity_kwh"), _amount),
    "fve_peak_power_kwp": (("fvePeakPowerKwp", "fve_peak_power_kwp"), _amount),
}


def _report(payload: bytes, report: Mapping[str, Any]) -> dict[str, Any]:
    if len(payload) > REPORT_BYTES_MAX:
        raise MalformedError(f"has {len(payload)} bytes, up to {REPORT_BYTES_MAX} are taken")
    told = {}
    for name, (spellings, fits) in _TOLD.items():
        found = next((report[spelling] for spelling in spellings if spelling in report), None)
        if fits(found):
            told[name] = found
    return {"report": report, "told": told}


_readers: Final[dict[Kind, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    Kind.ANSWER: _answer,
    Kind.ALARM: _alarm,
}
