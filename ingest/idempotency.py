"""Requests that their clients named with an Idempotency-Key: repeats that this process can tell are answered here.

Others reach landing under the same name, which lands a name once: this is the quick answer, not the rule.
Source: draft-ietf-httpapi-idempotency-key-header-07. Left out: what a request holds, and HTTP.
"""

import asyncio
from collections import OrderedDict
from hashlib import blake2b
from typing import Final, Generic, NamedTuple, TypeVar

from runtime.clock import Clock
from schemas.record import IDEMPOTENCY_WINDOW_S, Idempotency

KEY_LENGTH_MAX: Final = 255
_DIGEST_BYTES: Final = 16

T = TypeVar("T")


class BadKeyError(ValueError):
    """The header holds no key that can be told again."""


class ConflictError(Exception):
    """Another request of this name had another content."""


class _Request(NamedTuple):
    fingerprint: bytes
    until_s: float
    answer: "asyncio.Future[object]"


def name_request(header: str, credential: bytes, content: bytes) -> Idempotency:
    """What a request is known by; a structured-field string's quotes are no part of its key. Raises `BadKeyError`."""
    key = header.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 0 < len(key) <= KEY_LENGTH_MAX or not (key.isascii() and key.isprintable()):
        raise BadKeyError(f"Idempotency-Key is 1 to {KEY_LENGTH_MAX} printable ASCII characters")
    return Idempotency(_digest(credential), _digest(key.encode()), _digest(content))


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=_DIGEST_BYTES).digest()


class Repeats(Generic[T]):
    """The named requests that this process has answered or is answering, bounded in number and time."""

    def __init__(self, entries_max: int, clock: Clock) -> None:
        self._entries_max = entries_max
        self._clock = clock
        self._requests: OrderedDict[bytes, _Request] = OrderedDict()

    def begin(self, name: Idempotency) -> "asyncio.Future[T] | None":
        """The answer of the request that this one repeats, to be awaited; None when it is the first.

        The first one calls `end` or `abandon`. Raises `ConflictError`.
        """
        key, now = name.scope + name.key, self._clock.monotonic()
        known = self._requests.get(key)
        if known is None or known.until_s <= now:
            answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            self._requests[key] = _Request(name.fingerprint, now + IDEMPOTENCY_WINDOW_S, answer)  # type: ignore[arg-type]
            self._requests.move_to_end(key)
            if len(self._requests) > self._entries_max:
                self._requests.popitem(last=False)
            return None
        if known.fingerprint != name.fingerprint:
            raise ConflictError
        return known.answer  # type: ignore[return-value]

    def end(self, name: Idempotency, answer: T) -> None:
        """The first request's readings are durable."""
        known = self._requests.get(name.scope + name.key)
        if known is not None and not known.answer.done():
            known.answer.set_result(answer)

    def abandon(self, name: Idempotency) -> None:
        """Nothing is known to be durable: the next of this name is tried as if it were the first."""
        known = self._requests.pop(name.scope + name.key, None)
        if known is not None:
            known.answer.cancel()
