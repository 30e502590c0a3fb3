"""The JSON body: `{device?, ts?, measurements:[{type, value, label?, unit?, ts?}]}`, or an array of such objects.

Well-formed bodies go through one typed decode. Anything else is decoded again piece by piece, so that one bad
number or one measurement that is no object is refused alone. Left out: whether a reading is any good.
"""

import re
from typing import Any, Final

import msgspec

from ingest.formats import json_text
from ingest.formats.shape import BodyError, Malformed, Measurement, Submission
from schemas.errors import ReadingCode, RequestCode


class _Typed(msgspec.Struct, gc=False):
    measurements: list[Measurement]
    device: Any = None
    ts: Any = None


_decoder: Final = msgspec.json.Decoder(_Typed | list[_Typed])
#: The names that must not stand twice in an object: decoders keep the last, and readings would be lost unsaid, or be
#: another's.
_NAMES: Final = ("measurements", "value", "type", "device", "ts", "label", "unit")
#: A letter of a name may be written so.
_ESCAPED_LETTERS: Final = (b"\\u006", b"\\u007")


def decode(body: bytes) -> list[Submission]:
    """The submissions in `body`, in order. Raises `BodyError` where nothing in it can be told apart."""
    try:
        if not body.isascii():
            body.decode()  # the decoder looks into no text that it passes over
        decoded = _decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _decode_piecemeal(body)
    typed = decoded if type(decoded) is list else [decoded]
    if _may_double(body, typed):
        return _decode_piecemeal(body)
    return [Submission(one.measurements, one.device, one.ts) for one in typed]


class _Texts(msgspec.Struct, gc=False):
    measurements: list[msgspec.Raw]


_texts_decoder: Final = msgspec.json.Decoder(_Texts | list[_Texts])
#: What stands before the next of the numbers that only some writers of JSON know, strings whole, and that number.
_CONSTANT: Final = re.compile(rb'((?:[^"NI-]++|-(?!I)|"(?:[^"\\]++|\\.)*+")*+)(-?Infinity|NaN|\Z)', re.DOTALL)
_CONSTANTS_MAX: Final = 10_000


class Sent(msgspec.Struct, gc=False):
    """The measurements of a body that was decoded, each as it was sent: looked for once one of them is refused."""

    _body: bytes
    _texts: list[msgspec.Raw] | None = None

    def text(self, index: int) -> bytes | None:
        """The JSON text of a measurement, in body order; None where it cannot be told.

        NaN and Infinity, which JSON does not have, stand in it as `{"not_finite":"NaN"}`.
        """
        if self._texts is None:
            self._texts = _find_texts(self._body)
        return bytes(self._texts[index]) if index < len(self._texts) else None


def _find_texts(body: bytes) -> list[msgspec.Raw]:
    if b"NaN" in body or b"Infinity" in body:
        body = _CONSTANT.sub(_shown_constant, body, _CONSTANTS_MAX)
    try:
        found = _texts_decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return []
    return [text for submission in (found if type(found) is list else [found]) for text in submission.measurements]


def _shown_constant(found: re.Match[bytes]) -> bytes:
    return b'%b{"not_finite":"%b"}' % found.groups() if found[2] else found[0]


def _may_double(body: bytes, typed: list[_Typed]) -> bool:
    """Whether a name stands in the body more often than objects have it: one stands twice, or in a text.

    False is certain: each object that has a name holds it once at least, and nobody has one that was passed over.
    """
    if b"\\" in body and any(letter in body for letter in _ESCAPED_LETTERS):
        return True
    if body.count(b'"measurements"') != len(typed):
        return True
    measurements = typed[0].measurements if len(typed) == 1 else [m for one in typed for m in one.measurements]
    # The decoder has seen to it that each measurement has these.
    if not body.count(b'"value"') == body.count(b'"type"') == len(measurements):
        return True
    if (named := body.count(b'"ts"')) and named != sum([one.ts is not None for one in typed]) + sum(
        [one.ts is not None for one in measurements]
    ):
        return True
    if (named := body.count(b'"device"')) and named != sum([one.device is not None for one in typed]):
        return True
    if (named := body.count(b'"label"')) and named != sum([one.label is not None for one in measurements]):
        return True
    return bool(named := body.count(b'"unit"')) and named != sum([one.unit is not None for one in measurements])


def _decode_piecemeal(body: bytes) -> list[Submission]:
    content = json_text.parse(body, _object)
    if isinstance(content, list):
        return [_submission(one, f"[{index}]") for index, one in enumerate(content)]
    return [_submission(content, "the body")]


class _Doubled(msgspec.Struct, gc=False):
    """An object that says something twice: which of the two is meant, nobody can tell."""

    name: str
    content: dict[str, Any]


def _object(pairs: list[tuple[str, Any]]) -> "dict[str, Any] | _Doubled":
    content = dict(pairs)
    if len(content) == len(pairs):
        return content
    names = [name for name, _ in pairs]
    doubled = next((name for name in _NAMES if names.count(name) > 1), None)
    return content if doubled is None else _Doubled(doubled, content)


def _submission(content: object, where: str) -> Submission:
    if isinstance(content, _Doubled):
        raise BodyError(RequestCode.INVALID_BODY, f"`{content.name}` stands twice in {where}")
    if not isinstance(content, dict):
        raise BodyError(RequestCode.INVALID_BODY, f"{where} is not an object with `measurements`")
    measurements = content.get("measurements")
    if not isinstance(measurements, list):
        raise BodyError(RequestCode.INVALID_BODY, f"`measurements` of {where} is not an array")
    return Submission([_measurement(one) for one in measurements], content.get("device"), content.get("ts"))


def _measurement(content: object) -> Measurement | Malformed:
    if isinstance(content, _Doubled):
        message = f"`{content.name}` stands twice in a measurement"
        return Malformed(ReadingCode.INVALID_MEASUREMENT, message, content.content)
    if not isinstance(content, dict):
        return Malformed(ReadingCode.INVALID_MEASUREMENT, "a measurement is an object", content)
    return Measurement(
        content.get("type"), content.get("value"), content.get("label"), content.get("unit"), content.get("ts")
    )
