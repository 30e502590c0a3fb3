"""Requests that their clients named with an Idempotency-Key: repeats that this process can tell are answered here.

Others reach landing under the same name, which lands a name once: this is the quick answer, not the rule.
Source: draft-ietf-httpapi-idempotency-key-header-07. Left out: what a request holds, and HTTP.
"""

import asyncio
from collections import OrderedDict
from hashlib import blake2b
from typing import Final, Generic, TypeVar

from runtime.clock import Clock
from schemas.record import IDEMPOTENCY_WINDOW_S, Idempotency

KEY_LENGTH_MAX: Final = 255
_DIGEST_BYTES: Final = 16

T = TypeVar("T")


class BadKeyError(ValueError):
    """The header holds no key that can be told again."""


class ConflictError(Exception):
    """Another request of this name had another content."""


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


class Request(Generic[T]):
    """A named request of this process; `answer` is cancelled where nothing is known to be durable."""

    __slots__ = ("answer", "fingerprint", "key", "until_s")

    def __init__(self, key: bytes, fingerprint: bytes, until_s: float) -> None:
        self.key = key
        self.fingerprint = fingerprint
        self.until_s = until_s
        self.answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()


class Repeats(Generic[T]):
    """The named requests that this process has answered or is answering, bounded in number and time."""

    def __init__(self, entries_max: int, clock: Clock) -> None:
        self._entries_max = entries_max
        self._clock = clock
        self._requests: OrderedDict[bytes, Request[T]] = OrderedDict()

    def begin(self, name: Idempotency, devices: str) -> tuple[Request[T], bool]:
        """The first request of this name about these devices, and whether that is this one, which then calls `end`.

        Raises `ConflictError`. `devices` is how the request names them: those of another are another request.
        """
        key = name.scope + name.key + devices.encode("utf-8", "surrogatepass")
        now = self._clock.monotonic()
        known = self._requests.get(key)
        if known is not None and now < known.until_s:
            if known.fingerprint != name.fingerprint:
                raise ConflictError
            return known, False
        first: Request[T] = Request(key, name.fingerprint, now + IDEMPOTENCY_WINDOW_S)
        self._requests[key] = first
        self._requests.move_to_end(key)
        if len(self._requests) > self._entries_max:
            self._requests.popitem(last=False)
        return first, True

    def end(self, request: Request[T]) -> None:
        """Unless it was answered, the next of its name, and whoever waits for it, is as good as the first."""
        if not request.answer.done():
            request.answer.cancel()
            if self._requests.get(request.key) is request:
                del self._requests[request.key]
