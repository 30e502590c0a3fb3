"""How what plants send, and what they are sent, is signed: HMAC-SHA256 over parts joined by `|`, in hexadecimal.

Values are signed in their canonical form (RFC 8785), so that both sides may write the same JSON differently. Left
out: whose secret it is, and whether a time is too old.
"""

import hmac
from typing import Any, Final

import rfc8785

DIGEST: Final = "sha256"
_SEPARATOR: Final = b"|"


class NotCanonicalError(ValueError):
    """A value without a canonical form: a number that JSON's readers disagree about, or a text that is no Unicode."""


def canonical(value: Any) -> bytes:
    """JSON as RFC 8785 writes it. Raises `NotCanonicalError`."""
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
