"""How what plants send, and what they are sent, is signed: HMAC-SHA256 over parts joined by `|`, in hexadecimal.

Values are signed in their canonical form (RFC 8785), so that both sides may write the same JSON differently. Left
out: whose secret it is, and whether a time is too old.
"""

import hmac
import re
from typing import Any, Final

import orjson
import rfc8785

DIGEST: Final = "sha256"
_SEPARATOR: Final = b"|"


class NotCanonicalError(ValueError):
    """A value without a canonical form: a number that JSON's readers disagree about, or a text that is no Unicode."""


#: Where orjson and RFC 8785 may differ in an array or object: numbers with an exponent or without a fraction but for
#: their type, integers that some readers round, and null, which may have been NaN. Each stands behind one of `:`, `,`
#: and `[`; within a text this may be found in vain.
_DOUBTED: Final = re.compile(rb"[:,\[](?:n|-?(?:\d{16}|\d+(?:\.0[,}\]]|(?:\.\d+)?e)))")
#: Keys are sorted by UTF-16 there and by code points here, which differs from U+E000 on: this is UTF-8's first byte.
_SORTED_OTHERWISE: Final = 0xEE
_EXACT: Final = 2.0**53


def canonical(value: Any) -> bytes:
    """JSON as RFC 8785 writes it. Raises `NotCanonicalError`."""
    if type(value) is not list and type(value) is not dict:
        return _canonical_by_the_book(value)
    # A twentieth of what the library takes, which is written in Python.
    try:
        found = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        if _DOUBTED.search(found):
            found = orjson.dumps(_with_whole_numbers(value), option=orjson.OPT_SORT_KEYS)
            if _DOUBTED.search(found):
                return _canonical_by_the_book(value)
    except (TypeError, RecursionError):
        return _canonical_by_the_book(value)
    return found if found.isascii() or max(found) < _SORTED_OTHERWISE else _canonical_by_the_book(value)


def _with_whole_numbers(value: Any) -> Any:
    """The same, each 230.0 in it as 230."""
    kind = type(value)
    if kind is float:
        return int(value) if -_EXACT < value < _EXACT and value.is_integer() else value
    if kind is dict:
        return {name: _with_whole_numbers(one) for name, one in value.items()}
    return [_with_whole_numbers(one) for one in value] if kind is list else value


def _canonical_by_the_book(value: Any) -> bytes:
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, UnicodeEncodeError, RecursionError) as error:
        raise NotCanonicalError(f"has no canonical form: {error}") from error


def signature(secret: bytes, *parts: str | bytes) -> str:
    """64 lower-case hexadecimal digits. `secret`: the bytes that its hexadecimal digits spell."""
    joined = _SEPARATOR.join(part.encode() if isinstance(part, str) else part for part in parts)
    return hmac.digest(secret, joined, DIGEST).hex()


def is_signed(secret: bytes, given: str, *parts: str | bytes) -> bool:
    """Whether `given` is the signature, compared in constant time."""
    return hmac.compare_digest(signature(secret, *parts).encode(), given.lower().encode())


def snapshot_parts(plant: str, ts_ms: int, nonce: str, timestamp: Any, devices: Any) -> tuple[str | bytes, ...]:
    """What a plant signs of a snapshot.

    `plant`: its UUID with hyphens; `timestamp`: as in the envelope, None where there is none.
    Raises `NotCanonicalError`.
    """
    sampled = b"" if timestamp is None else timestamp.encode() if isinstance(timestamp, str) else canonical(timestamp)
    return plant, str(ts_ms), nonce, sampled, canonical(devices)


def command_parts(device: str, command: str, ts_ms: int, action: str, payload: Any) -> tuple[str | bytes, ...]:
    """What is signed of a command: for whom, its id, when it was sent, what is to be done and with what.

    Raises `NotCanonicalError`.
    """
    return device, command, str(ts_ms), action, canonical(payload)
