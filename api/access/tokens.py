"""Access tokens: JWTs (ES256) of a session, and the keys that sign them. Left out: whether the session still lives.

A key signs for a month; the next one stands in the key set a day before, the former one until no token of its lives.
"""

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from api.http.problems import token_invalid
from runtime.clock import Clock
from runtime.ids import uuid7
from runtime.postgres import cut_after
from runtime.secrets import BadSealError, KeyRing, Seal, base64url

_log = logging.getLogger("sluice.api")

ALGORITHM: Final = "ES256"
TYPE: Final = "at+jwt"
CHARACTERS_MAX: Final = 2_048
SKEW_S: Final = 30
MONTH: Final = timedelta(days=31)
AHEAD: Final = timedelta(days=1)
RELOAD_S: Final = 60.0
ACQUIRE_S: Final = 2.0
#: Whoever brings a token waits meanwhile.
READ_S: Final = 15.0
#: An unknown key id is asked about again after it; a stream of made-up ones costs a query each time at most.
RELOAD_UNKNOWN_S: Final = 1.0
_LOCK: Final = 0x736C_7569_6365_0003
_REQUIRED: Final = ["exp", "iat", "iss", "aud", "sub", "sid"]

_KEYS: Final = """
SELECT kid, public_key, sealed_private, signs_from, retires_at FROM signing_keys WHERE retires_at > $1
ORDER BY signs_from, kid
"""
_ADD: Final = """
INSERT INTO signing_keys (kid, public_key, sealed_private, signs_from, retires_at) VALUES ($1, $2, $3, $4, $5)
"""


def is_jwt(token: str) -> bool:
    return token.startswith("eyJ") and token.count(".") == 2


def is_access_token(token: str) -> bool:
    """Whether it says that it is one: who knows whether that is true."""
    with suppress(jwt.PyJWTError):
        return bool(jwt.get_unverified_header(token).get("typ") == TYPE)
    return False


class Claims(NamedTuple):
    """What an access token says."""

    user: UUID
    session: UUID
    organisation: UUID | None


class JsonWebKey(msgspec.Struct, rename={"use_": "use"}):
    """A public key (RFC 7517)."""

    kid: str
    x: str
    y: str
    kty: str = "EC"
    crv: str = "P-256"
    use_: str = "sig"
    alg: str = ALGORITHM


class _Key(NamedTuple):
    kid: str
    public: ec.EllipticCurvePublicKey
    private: ec.EllipticCurvePrivateKey | None
    """None where the ring no longer has what it was sealed under."""
    signs_from: datetime
    retires_at: datetime

    def signs(self, now: datetime) -> bool:
        return self.private is not None and self.signs_from <= now < self.retires_at


class AccessTokens:
    """Makes and reads them; keys are made when they are needed."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", ring: KeyRing, clock: Clock, *, issuer: str, lifetime_s: int
    ) -> None:
        self.lifetime_s = lifetime_s
        self._pool = pool
        self._seal = Seal(ring, "signing key")
        self._clock = clock
        self._issuer = issuer
        self._keys: dict[str, _Key] = {}
        self._loaded_at = float("-inf")
        self._loading = asyncio.Lock()

    async def issue(self, claims: Claims) -> str:
        await self._fresh(RELOAD_S)
        key = _signer(self._keys.values(), self._now())
        if key is None:
            await self._fresh(0)
            key = _signer(self._keys.values(), self._now())
        if key is None:
            raise RuntimeError("there is no key to sign with")
        now = int(self._clock.now_us() // 1_000_000)
        content: dict[str, Any] = {
            "iss": self._issuer,
            "aud": self._issuer,
            "iat": now,
            "exp": now + self.lifetime_s,
            "jti": str(uuid7()),
            "sub": str(claims.user),
            "sid": str(claims.session),
        }
        if claims.organisation is not None:
            content["org"] = str(claims.organisation)
        return jwt.encode(content, key.private, ALGORITHM, headers={"kid": key.kid, "typ": TYPE})  # type: ignore[arg-type]

    async def read(self, token: str) -> Claims:
        """Raises the problem of a token that is not ours, not for us, or too old."""
        if len(token) > CHARACTERS_MAX:
            raise token_invalid()
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") != ALGORITHM or header.get("typ") != TYPE:
                raise token_invalid()
            key = await self._key(str(header.get("kid", "")))
            content = jwt.decode(
                token,
                key.public,
                algorithms=[ALGORITHM],
                audience=self._issuer,
                issuer=self._issuer,
                leeway=SKEW_S,
                options={"require": _REQUIRED},
            )
            organisation = content.get("org")
            return Claims(
                UUID(content["sub"]), UUID(content["sid"]), None if organisation is None else UUID(organisation)
            )
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
            raise token_invalid() from None

    async def key_set(self) -> list[JsonWebKey]:
        """The public keys of all tokens that may live, and of those to come within a day."""
        await self._fresh(RELOAD_S)
        return [_public(key) for key in self._keys.values()]

    async def _key(self, kid: str) -> _Key:
        await self._fresh(RELOAD_S)
        if kid not in self._keys:
            await self._fresh(RELOAD_UNKNOWN_S)
        if kid not in self._keys:
            raise token_invalid()
        return self._keys[kid]

    # ------------------------------------------------------------ keys

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now_us() / 1e6, UTC)

    async def _fresh(self, seconds: float) -> None:
        """Keys that were read no longer than `seconds` ago."""
        if self._clock.monotonic() - self._loaded_at <= seconds:
            return
        async with self._loading:
            if self._clock.monotonic() - self._loaded_at <= seconds:
                return
            async with self._pool.acquire(timeout=ACQUIRE_S) as connection:
                with cut_after(connection, READ_S):
                    rows = await self._read(connection)
                    if self._is_due(rows):
                        rows = await self._rotate(connection)
            self._keys = {key.kid: key for key in rows}
            self._loaded_at = self._clock.monotonic()

    async def _read(self, connection: Any) -> list[_Key]:
        living = self._now() - timedelta(seconds=self.lifetime_s + 2 * SKEW_S)
        return [self._opened(row) for row in await connection.fetch(_KEYS, living)]

    def _opened(self, row: Any) -> _Key:
        public = serialization.load_pem_public_key(row["public_key"].encode())
        private = None
        with suppress(BadSealError):
            private = serialization.load_pem_private_key(self._seal.open(row["sealed_private"]), None)
        return _Key(row["kid"], public, private, row["signs_from"], row["retires_at"])  # type: ignore[arg-type]

    def _is_due(self, keys: list[_Key]) -> bool:
        now = self._now()
        return _signer(keys, now) is None or _signer(keys, now + AHEAD) is None

    async def _rotate(self, connection: Any) -> list[_Key]:
        """The keys after making those that are due, by one process at a time."""
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            keys = await self._read(connection)
            now = self._now()
            if _signer(keys, now) is None:
                keys.append(await self._add(connection, now))
            if _signer(keys, now + AHEAD) is None:
                keys.append(await self._add(connection, max(key.retires_at for key in keys if key.private)))
            await connection.execute("DELETE FROM signing_keys WHERE retires_at < $1", now - MONTH)
            return keys

    async def _add(self, connection: Any, signs_from: datetime) -> _Key:
        private = ec.generate_private_key(ec.SECP256R1())
        key = _Key(uuid7().hex, private.public_key(), private, signs_from, signs_from + MONTH)
        sealed = self._seal.seal(
            private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        pem = key.public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ).decode()
        await connection.execute(_ADD, key.kid, pem, sealed, key.signs_from, key.retires_at)
        _log.info("a signing key was made", extra={"kid": key.kid, "signs_from": key.signs_from.isoformat()})
        return key


def _signer(keys: Any, now: datetime) -> _Key | None:
    signing = [key for key in keys if key.signs(now)]
    return max(signing, key=lambda key: (key.signs_from, key.kid)) if signing else None


def _public(key: _Key) -> JsonWebKey:
    numbers = key.public.public_numbers()
    x, y = (base64url(n.to_bytes(32, "big")) for n in (numbers.x, numbers.y))
    return JsonWebKey(key.kid, x, y)
