"""The JSON body: `{device?, ts?, measurements:[{type, value, label?, unit?, ts?}]}`, or an array of such objects.

Well-formed bodies go through one typed decode. Anything else is decoded again piece by piece, so that one bad
number or one measurement that is no object is refused alone. Left out: whether a reading is any good.
"""

import json
from typing import Any, Final

import msgspec

from ingest.formats.shape import BadNumber, BodyError, Malformed, Measurement, Submission
from schemas.errors import ReadingCode, RequestCode


class _Typed(msgspec.Struct, gc=False):
    measurements: list[Measurement]
    device: Any = None
    ts: Any = None


_decoder: Final = msgspec.json.Decoder(_Typed | list[_Typed])
_INTEGER_DIGITS_MAX: Final = 400


def decode(body: bytes) -> list[Submission]:
    """The submissions in `body`, in order. Raises `BodyError` where nothing in it can be told apart."""
    try:
        typed = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _decode_piecemeal(body)
    if type(typed) is list:
        return [Submission(one.measurements, one.device, one.ts) for one in typed]
    return [Submission(typed.measurements, typed.device, typed.ts)]


def _decode_piecemeal(body: bytes) -> list[Submission]:
    try:
        content = json.loads(
            body.decode("utf-8"), parse_float=_parse_float, parse_int=_parse_int, parse_constant=BadNumber
        )
    except RecursionError:
        raise BodyError(RequestCode.BAD_JSON, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise BodyError(RequestCode.BAD_JSON, f"the body is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise BodyError(RequestCode.BAD_JSON, f"the body is not JSON: {error}") from None
    if isinstance(content, list):
        return [_submission(one, f"[{index}]") for index, one in enumerate(content)]
    return [_submission(content, "the body")]


def _parse_float(text: str) -> float | BadNumber:
    value = float(text)
    return value if abs(value) != float("inf") else BadNumber(text[:40])


def _parse_int(text: str) -> int | BadNumber:
    return int(text) if len(text) < _INTEGER_DIGITS_MAX else BadNumber(text[:40])


def _submission(content: object, where: str) -> Submission:
    if not isinstance(content, dict):
        raise BodyError(RequestCode.INVALID_BODY, f"{where} is not an object with `measurements`")
    measurements = content.get("measurements")
    if not isinstance(measurements, list):
        raise BodyError(RequestCode.INVALID_BODY, f"`measurements` of {where} is not an array")
    return Submission([_measurement(one) for one in measurements], content.get("device"), content.get("ts"))


def _measurement(content: object) -> Measurement | Malformed:
    if not isinstance(content, dict):
        return Malformed(ReadingCode.INVALID_MEASUREMENT, "a measurement is an object", content)
    return Measurement(
        content.get("type"), content.get("value"), content.get("label"), content.get("unit"), content.get("ts")
    )
