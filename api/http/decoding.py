"""From a request to what its operation takes. Left out: who may call it (`api.access`)."""

import asyncio
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web
from multidict import MultiMapping

from api.http import spelt
from api.http.operations import Nothing, Operation
from api.http.problems import (
    BAD_REQUEST,
    BODY_TOO_LARGE,
    INVALID,
    INVALID_BODY,
    INVALID_PARAMETER,
    NOT_FOUND,
    REQUEST_TIMEOUT,
    UNSUPPORTED_TYPE,
    Detail,
    Problem,
    invalid,
    invalid_parameter,
)

_BODY_S: Final = 10.0
_PARAMETER_CHARACTERS_MAX: Final = 4_096
#: curl and simple clients name these for a JSON text they send.
_TYPES: Final = frozenset(
    {"", "application/json", "text/plain", "application/octet-stream", "application/x-www-form-urlencoded"}
)
_WHERE: Final = re.compile(r"^(.*?)(?: - at `(.*)`)?$", re.DOTALL)
#: Not behind an escaped backslash, which makes it the text `\u0000`.
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_NAMED: Final = re.compile(r"(?:missing required|contains unknown) field `(.*?)`")

T = TypeVar("T", bound=msgspec.Struct)


def read_path(operation: Operation, found: Mapping[str, str]) -> Any:
    """Raises the problem of a thing that is not there: an id that none can have is nobody's."""
    if not all(_storable(text) for text in found.values()):
        raise Problem(operation.missing or NOT_FOUND)
    try:
        return msgspec.convert(dict(found), operation.path_type, strict=False, dec_hook=spelt.read)
    except (msgspec.ValidationError, ValueError):
        raise Problem(operation.missing or NOT_FOUND) from None


def read_query(kind: type[T], query: MultiMapping[str]) -> T:
    """Raises the problem of a parameter that is unknown, stands twice, or has no value that it can have."""
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    for name in query:
        if name not in known:
            takes = f"the parameters are {', '.join(sorted(known))}" if known else "there are no parameters here"
            raise invalid_parameter(name[:64], f"is not known: {takes}")
        if len(query.getall(name)) > 1:
            raise invalid_parameter(name, "stands twice")
        if len(query[name]) > _PARAMETER_CHARACTERS_MAX:
            raise invalid_parameter(name, f"has up to {_PARAMETER_CHARACTERS_MAX} characters")
        if not _storable(query[name]):
            raise invalid_parameter(name, "holds what no text may")
    try:
        found = msgspec.convert(dict(query), kind, strict=False, dec_hook=spelt.read)
    except (msgspec.ValidationError, ValueError) as error:
        detail = _detail(str(error))
        raise Problem(INVALID_PARAMETER, f"{detail.field}: {detail.message}", details=[detail]) from None
    _check_null(found, query)
    return found


def _check_null(found: msgspec.Struct, query: MultiMapping[str]) -> None:
    """A filter that says null was not left out: msgspec reads that text as None, which finds everything."""
    for field in msgspec.structs.fields(found):
        if field.encode_name in query and getattr(found, field.name) is None:
            raise invalid_parameter(field.encode_name, "has a value: it is left out where it has none")


async def take_body(request: web.Request, bytes_max: int) -> bytes:
    """Raises the problem of a body that is too large, too slow, cut off, or no JSON."""
    kind = request.content_type
    if request.body_exists and kind not in _TYPES and not kind.endswith("+json"):
        raise Problem(UNSUPPORTED_TYPE, "the body is JSON: send Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > bytes_max:
                    raise Problem(BODY_TOO_LARGE, f"the body has up to {bytes_max} bytes")
    except TimeoutError:
        raise Problem(REQUEST_TIMEOUT, f"the body did not come within {_BODY_S:g} s") from None
    except (web.RequestPayloadError, ConnectionError):
        raise Problem(BAD_REQUEST, "the body was cut off") from None
    return bytes(body)


def read_body(kind: Any, body: bytes) -> Any:
    """Raises the problem of a body that is no JSON, or not of the operation's shape."""
    if kind is Nothing and not body.strip():
        return Nothing()
    try:
        if _NUL.search(body):
            raise invalid("", "holds a NUL character, which no text may")
        return _decoded(kind, body)
    except msgspec.ValidationError as error:
        detail = _detail(str(error))
        message = f"{detail.field}: {detail.message}" if detail.field else f"the body {detail.message}"
        raise Problem(INVALID, message, details=[detail]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(INVALID_BODY, f"the body is not JSON: {error}") from None


def _decoded(kind: Any, body: bytes) -> Any:
    try:
        return _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        if "got `float`" not in str(error):
            raise
    # JSON knows one kind of number: 5.0 is a whole one, and clients whose language has no other write it so.
    return _decoder(kind).decode(msgspec.json.encode(_whole(msgspec.json.decode(body))))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache(maxsize=1_024)
def _decoder(kind: Any) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(kind, dec_hook=spelt.read)


def _storable(text: str) -> bool:
    """Whether the database can hold it: no NUL, no half of a pair."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


def _detail(message: str) -> Detail:
    """What msgspec found wrong, and the field it found it at."""
    match = _WHERE.match(message)
    words, place = (match.group(1), match.group(2) or "") if match else (message, "")
    field = place.removeprefix("$").removeprefix(".")
    if named := _NAMED.search(words):
        field = f"{field}.{named.group(1)}" if field else named.group(1)
        return Detail(field, "is missing" if "missing" in words else "is not known here")
    return Detail(field, "is not a UUID" if words == "Invalid UUID" else words[:1].lower() + words[1:])
