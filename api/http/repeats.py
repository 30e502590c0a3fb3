"""Requests that clients name with an `Idempotency-Key`: the same again is answered as it was, and done once.

The answer is kept by the transaction that does what it tells of, for a day, and sealed: it may hold a secret that is
shown once. Of two at the same time, the second waits for the first. What ends in a problem is not kept: nothing was
done. Source: draft-ietf-httpapi-idempotency-key-header-07. Left out: deleting what is older (`workers.presence`).
"""

from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from api.http.operations import Call, Operation
from api.http.problems import IDEMPOTENCY_CONFLICT, Problem, invalid_parameter
from api.http.spelt import write
from runtime.secrets import BadSealError, KeyRing, Seal

HEADER: Final = "Idempotency-Key"
_REPLAYED: Final = "Idempotency-Replayed"
KEY_CHARACTERS_MAX: Final = 128
#: Printable ASCII that begins and ends with no blank; in quotes or not, it is not empty.
KEY_PATTERN: Final = r'^(?!""$)[!-~](?:[ -~]*[!-~])?$'
_DIGEST_BYTES: Final = 16
#: Under which requests of a person stand who acts for no organisation.
_NOBODYS: Final = UUID(int=0)
_OTHER: Final = "another request with this Idempotency-Key, and another content, came within 24 hours"

# Waits for a request of the same name that is being answered.
_BEGIN: Final = """
INSERT INTO repeats AS r (organisation_id, caller_id, key, fingerprint) VALUES ($1, $2, $3, $4)
ON CONFLICT (organisation_id, caller_id, key) DO UPDATE
    SET fingerprint = EXCLUDED.fingerprint, answer = '', made_at = EXCLUDED.made_at
    WHERE r.made_at < now() - interval '24 hours'
RETURNING true
"""
_KEPT: Final = "SELECT fingerprint, answer FROM repeats WHERE organisation_id = $1 AND caller_id = $2 AND key = $3"
_KEEP: Final = "UPDATE repeats SET answer = $4 WHERE organisation_id = $1 AND caller_id = $2 AND key = $3"

_encoder: Final = msgspec.msgpack.Encoder(enc_hook=write)


class Rendered(NamedTuple):
    """An answer as it goes out."""

    status: int
    body: bytes
    content_type: str
    headers: dict[str, str]


_decoder: Final = msgspec.msgpack.Decoder(Rendered)


class _Name(NamedTuple):
    organisation: UUID
    caller: UUID
    key: bytes


class Repeats:
    """What named requests were answered, in the database, for every process."""

    def __init__(self, ring: KeyRing) -> None:
        self._seal = Seal(ring, "repeats")

    async def once(
        self, operation: Operation, call: Call[Any, Any, Any], header: str, answer: Callable[[], Awaitable[Rendered]]
    ) -> Rendered:
        """What `answer` gives, the first time; afterwards, what it gave then.

        Raises the problems of a key that is none, and of one that named another request.
        """
        caller = call.caller.credential or call.caller.user
        if caller is None:
            raise RuntimeError("an operation that anybody may call is not repeatable")
        name = _Name(call.caller.organisation or _NOBODYS, caller, _digest(_key(header).encode()))
        fingerprint = _digest(_encoder.encode((operation.name, call.path, call.query, call.body)))
        if await call.connection.fetchval(_BEGIN, *name, fingerprint):
            answered = await answer()
            await call.connection.execute(_KEEP, *name, self._seal.seal(_encoder.encode(answered)))
            return answered
        kept = await call.connection.fetchrow(_KEPT, *name)
        if kept is None or kept["fingerprint"] != fingerprint:
            raise Problem(IDEMPOTENCY_CONFLICT, _OTHER)
        answered = self._opened(kept["answer"])
        return answered._replace(headers=answered.headers | {_REPLAYED: "true"})

    def _opened(self, answer: str) -> Rendered:
        try:
            return _decoder.decode(self._seal.open(answer))
        except BadSealError:
            raise Problem(
                IDEMPOTENCY_CONFLICT,
                "this was done, and its answer is gone: with the key that it was sealed with, or with a site",
            ) from None


def _key(header: str) -> str:
    """Without the quotes of a structured field."""
    key = header.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 0 < len(key) <= KEY_CHARACTERS_MAX or not (key.isascii() and key.isprintable()):
        raise invalid_parameter(HEADER, f"must be 1 to {KEY_CHARACTERS_MAX} printable ASCII characters")
    return key


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=_DIGEST_BYTES).digest()
