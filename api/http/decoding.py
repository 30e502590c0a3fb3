"""From a request to what its operation takes. Left out: who may call it (`api.access`)."""

import asyncio
import re
from collections.abc import Collection, Mapping
from functools import cache, lru_cache
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import hdrs, web
from multidict import MultiMapping

from api.http import spelt
from api.http.faults import FAULTS_MAX, NUL_FAULT, detail_of, faults, problem_of
from api.http.operations import Nothing, Operation
from api.http.problems import (
    BAD_REQUEST,
    BODY_TOO_LARGE,
    INVALID,
    INVALID_BODY,
    INVALID_PARAMETER,
    REQUEST_TIMEOUT,
    UNSUPPORTED_ENCODING,
    UNSUPPORTED_TYPE,
    Detail,
    Problem,
)

_BODY_S: Final = 10.0
_PARAMETER_CHARACTERS_MAX: Final = 4_096
_NO_PARAMETERS: Final = "is not known: there are no parameters here"
_PLAIN: Final = "identity"
#: curl and simple clients name these for a JSON text they send.
_TYPES: Final = frozenset(
    {"", "application/json", "text/plain", "application/octet-stream", "application/x-www-form-urlencoded"}
)
#: Not behind an escaped backslash, which makes it the text `\u0000`.
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

T = TypeVar("T", bound=msgspec.Struct)


def read_path(operation: Operation, found: Mapping[str, str]) -> Any:
    """Raises the problem of a thing that is not there: an id that none can have is nobody's, or is malformed."""
    named = dict(found)
    try:
        if all(_storable(text) for text in named.values()):
            return msgspec.convert(named, operation.path_type, strict=False, dec_hook=spelt.read)
    except (msgspec.ValidationError, ValueError):
        pass
    if operation.malformed is not None:
        raise Problem(operation.malformed)
    wrong = [detail.field for detail in faults(operation.path_type, named, strict=False)]
    wrong += [name for name, text in named.items() if not _storable(text)]
    # The path names what is in a thing after the thing itself.
    first = next((name for name in named if name in wrong), "")
    raise Problem(operation.missing_at(first))


def read_query(kind: type[T], query: MultiMapping[str]) -> T:
    """Raises the problem that names each parameter that is unknown, stands twice, or has no value it can have."""
    fields = _fields(kind)
    known = fields.keys()
    wrong = [Detail(name[:64], why) for name in dict.fromkeys(query) if (why := _parameter_fault(name, query, known))]
    given = {name: query[name] for name in known if name in query}
    first: Detail | None = None
    try:
        if not wrong:
            found = msgspec.convert(given, kind, strict=False, dec_hook=spelt.read)
            if not any(getattr(found, fields[name]) is None for name in given):
                return found
    except (msgspec.ValidationError, ValueError) as error:
        first = detail_of(error)
    named = {detail.field for detail in wrong}
    wrong += [detail for detail in faults(kind, given, strict=False) if detail.field not in named]
    raise problem_of(INVALID_PARAMETER, wrong[:FAULTS_MAX] or [first or Detail("", "is no query of this operation")])


@cache
def _fields(kind: type[msgspec.Struct]) -> Mapping[str, str]:
    """Of each parameter, how its field is called: msgspec looks through annotations for it each time."""
    return {field.encode_name: field.name for field in msgspec.structs.fields(kind)}


def _parameter_fault(name: str, query: MultiMapping[str], known: Collection[str]) -> str | None:
    """What is wrong with a parameter whatever its type is."""
    if name not in known:
        return f"is not known: the parameters are {', '.join(sorted(known))}" if known else _NO_PARAMETERS
    if len(query.getall(name)) > 1:
        return "stands twice"
    if len(query[name]) > _PARAMETER_CHARACTERS_MAX:
        return f"must have up to {_PARAMETER_CHARACTERS_MAX} characters"
    if not _storable(query[name]):
        return "holds what no text may"
    return None


async def take_body(request: web.Request, bytes_max: int) -> bytes:
    """Raises the problem of a body that is too large, too slow, cut off, packed, or no JSON."""
    kind = request.content_type
    if request.body_exists and kind not in _TYPES and not kind.endswith("+json"):
        raise Problem(UNSUPPORTED_TYPE, "the body is JSON: send Content-Type: application/json")
    if request.headers.get(hdrs.CONTENT_ENCODING, _PLAIN).strip().lower() not in ("", _PLAIN):
        message = "the body is taken as it is: send it without a Content-Encoding"
        raise Problem(UNSUPPORTED_ENCODING, message, headers={hdrs.ACCEPT_ENCODING: _PLAIN})
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
    """Raises the problem of a body that is no JSON, or that names each field not of the operation's shape."""
    if kind is Nothing and not body.strip():
        return Nothing()
    try:
        if not _NUL.search(body):
            return _decoded(kind, body)
        wrong = faults(kind, _whole(msgspec.json.decode(body))) or [Detail("", NUL_FAULT)]
    except (msgspec.ValidationError, Problem) as error:
        wrong = _all_faults(kind, body) or [detail_of(error)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(INVALID_BODY, f"the body is not JSON: {error}") from None
    raise problem_of(INVALID, wrong)


def _all_faults(kind: Any, body: bytes) -> list[Detail]:
    """Empty where the body cannot be read to its end: whoever reads it typed ends at the first fault."""
    try:
        return faults(kind, _whole(msgspec.json.decode(body)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


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
