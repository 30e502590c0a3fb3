"""Tokens (RS256) of sites' servers and edge devices, which have no end, and of plants; the keys that sign them.

The former are known by their hash, as every other: the signature is for those who cannot ask us. So no key retires;
one that was sealed under a secret key which is no longer kept is followed by a new one. Left out: access tokens.
"""

import asyncio
import time
from contextlib import suppress
from typing import Any, Final

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from runtime.clock import Clock
from runtime.ids import uuid7
from runtime.secrets import BadSealError, KeyRing, Seal, base64url

ALGORITHM: Final = "RS256"
TYPE: Final = "gateway+jwt"
#: An unknown key id is asked about again after it; a stream of made-up ones costs a query each time at most.
RELOAD_UNKNOWN_S: Final = 1.0
_BITS: Final = 2_048
_EXPONENT: Final = 65_537
_LOCK: Final = 0x736C_7569_6365_0004

_KEYS: Final = "SELECT kid, sealed_private FROM gateway_signing_keys ORDER BY created_at DESC, kid DESC"
_PUBLIC_KEYS: Final = "SELECT kid, public_key FROM gateway_signing_keys ORDER BY created_at DESC, kid DESC"
_ADD: Final = "INSERT INTO gateway_signing_keys (kid, public_key, sealed_private) VALUES ($1, $2, $3)"


class RsaJsonWebKey(msgspec.Struct, rename={"use_": "use"}):
    """A public RSA key (RFC 7517)."""

    kid: str
    n: str
    e: str
    kty: str = "RSA"
    use_: str = "sig"
    alg: str = ALGORITHM


class Signer:
    """Signs in a request's transaction. Registrations are rare: each reads the keys, so that none is stale."""

    def __init__(self, ring: KeyRing, *, issuer: str) -> None:
        self._seal = Seal(ring, "gateway signing key")
        self._issuer = issuer

    async def sign(self, connection: Any, claims: dict[str, Any], kind: str = TYPE) -> str:
        """`kind` tells tokens apart by what they are for (`typ`)."""
        kid, private = await self._key(connection)
        content = {"iss": self._issuer, "aud": self._issuer, "iat": int(time.time())} | claims
        return jwt.encode(content, private, ALGORITHM, headers={"kid": kid, "typ": kind})

    async def _key(self, connection: Any) -> tuple[str, rsa.RSAPrivateKey]:
        found = await self._newest(connection)
        if found is not None:
            return found
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
        return await self._newest(connection) or await self._add(connection)

    async def _newest(self, connection: Any) -> tuple[str, rsa.RSAPrivateKey] | None:
        for row in await connection.fetch(_KEYS):
            with suppress(BadSealError):
                # The seal vouches for it; checking the primes again takes 60 ms.
                private = serialization.load_der_private_key(
                    self._seal.open(row["sealed_private"]), None, unsafe_skip_rsa_key_validation=True
                )
                if isinstance(private, rsa.RSAPrivateKey):
                    return row["kid"], private
        return None

    async def _add(self, connection: Any) -> tuple[str, rsa.RSAPrivateKey]:
        private = await asyncio.to_thread(rsa.generate_private_key, _EXPONENT, _BITS)  # a tenth of a second
        kid = uuid7().hex
        sealed = self._seal.seal(
            private.private_bytes(
                serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        public = private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        await connection.execute(_ADD, kid, public, sealed)
        return kid, private


class Signatures:
    """Tells what was signed here, by keys that are read when they are first met."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._keys: dict[str, rsa.RSAPublicKey] = {}
        self._read_at = float("-inf")

    async def holds(self, connection: Any, token: str) -> bool:
        """Whether a token carries one of ours: says nothing about its being known or revoked."""
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") != ALGORITHM or header.get("typ") != TYPE:
                return False
            key = await self._key(connection, str(header.get("kid", "")))
            if key is None:
                return False
            jwt.api_jws.decode(token, key, algorithms=[ALGORITHM])
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
            return False
        return True

    async def _key(self, connection: Any, kid: str) -> rsa.RSAPublicKey | None:
        now = self._clock.monotonic()
        if kid not in self._keys and now - self._read_at > RELOAD_UNKNOWN_S:
            self._read_at = now
            self._keys = {row["kid"]: _loaded(row["public_key"]) for row in await connection.fetch(_PUBLIC_KEYS)}
        return self._keys.get(kid)


async def public_keys(connection: Any) -> list[RsaJsonWebKey]:
    """Of all tokens that may live: for the key set."""
    return [_public(row["kid"], row["public_key"]) for row in await connection.fetch(_PUBLIC_KEYS)]


def _public(kid: str, raw: bytes) -> RsaJsonWebKey:
    numbers = _loaded(raw).public_numbers()
    return RsaJsonWebKey(kid, _text_of(numbers.n), _text_of(numbers.e))


def _loaded(raw: bytes) -> rsa.RSAPublicKey:
    key = serialization.load_der_public_key(raw)
    if not isinstance(key, rsa.RSAPublicKey):
        raise TypeError("a gateway signing key is not RSA")
    return key


def _text_of(number: int) -> str:
    raw = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return base64url(raw)
