"""The first certificate of a device that keeps its key: a one-time token for its installer, and what it is good for.

A token has the form of the platform's: two ids and a secret, of which a hash is kept. Left out: signing (`issuing`).
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.access.authority import act_for
from api.access.guesses import Guesses
from api.certificates.authorities import Authorities
from api.certificates.issuing import Issued, Issuer
from api.certificates.settings import CertificateSettings
from api.http.problems import Problem, token_invalid
from api.problems import DEVICE_NOT_FOUND, DEVICE_SUSPENDED, REGISTRATION_LIMIT
from api.registry import audit, devices
from api.registry.organisations import lock
from api.registry.texts import LocalId, Slug
from runtime.ids import uuid7
from runtime.secrets import REGISTRATION_PREFIX, KeyRing, TokenHasher, make_token, plausible_token

Acting = Callable[[], AbstractAsyncContextManager[Any]]
"""Opens a transaction that acts for nobody yet."""

_DEVICE: Final = "SELECT name FROM devices WHERE device_id = $1 AND status <> 'deleted' FOR NO KEY UPDATE"
# Those of long ago tell nothing that the log of changes does not.
_FORGET: Final = """
DELETE FROM device_registrations WHERE organisation_id = $1 AND expires_at < now() - interval '30 days'
"""
_END_OTHERS: Final = """
UPDATE device_registrations SET expires_at = now()
WHERE organisation_id = $1 AND device_id = $2 AND used_at IS NULL AND expires_at > now()
"""
_OPEN: Final = """
SELECT count(*) FROM device_registrations WHERE organisation_id = $1 AND used_at IS NULL AND expires_at > now()
"""
_ADD: Final = """
INSERT INTO device_registrations (registration_id, organisation_id, device_id, token_hash, expires_at)
VALUES ($1, $2, $3, $4, now() + $5::interval) RETURNING expires_at
"""
_PRESENTED: Final = "SELECT registration_id, organisation_id, device_id FROM registration_presented($1)"
# Of several at once the first one has it; the others wait for its end, and find it used.
_USE: Final = """
UPDATE device_registrations SET used_at = now()
WHERE registration_id = $1 AND used_at IS NULL AND expires_at > now() RETURNING device_id
"""
# First of all, as whoever gives out another token has it.
_HOLD_DEVICE: Final = "SELECT status FROM devices WHERE device_id = $1 FOR NO KEY UPDATE"
_ACT_AS: Final = "SELECT set_config('sluice.credential', $1, true)"


class Registration(NamedTuple):
    """A token, which is told once, and of which device it is."""

    token: str
    device: UUID
    name: str
    expires_at: datetime


class Provisioned(NamedTuple):
    """What a device has become."""

    organisation: UUID
    device: UUID
    issued: Issued


class Registrations:
    """Gives out tokens, and certificates for them."""

    def __init__(self, ring: KeyRing, settings: CertificateSettings, guesses: Guesses, acting: Acting) -> None:
        self._hasher = TokenHasher(ring)
        self._authorities = Authorities(ring)
        self._issuer = Issuer(ring, settings)
        self._settings = settings
        self._guesses = guesses
        self._acting = acting

    async def register(
        self, connection: Any, organisation: UUID, name: str | None, device: UUID | None
    ) -> Registration:
        """A token for a new device of that name, or for one that is there; others of the device end.

        Raises the problems of a device that is not there, of too many tokens, and of no authority that could sign.
        """
        await self._authorities.issuing(connection)
        await lock(connection, organisation)
        if device is None:
            name = name or ""
            device = await devices.create(connection, organisation, None, devices.NewDevice(name, _local_id(name)))
        else:
            name = await connection.fetchval(_DEVICE, device)
            if name is None:
                raise Problem(DEVICE_NOT_FOUND)
        await connection.execute(_FORGET, organisation)
        await connection.execute(_END_OTHERS, organisation, device)
        most = self._settings.registration_tokens_max
        if await connection.fetchval(_OPEN, organisation) >= most:
            raise Problem(REGISTRATION_LIMIT, f"up to {most} registration tokens wait to be used")
        registration = uuid7()
        token = f"{registration}.{device}.{make_token(REGISTRATION_PREFIX)}"
        lasts = timedelta(hours=self._settings.registration_token_hours)
        digest = self._hasher.digest(token)
        expires_at = await connection.fetchval(_ADD, registration, organisation, device, digest, lasts)
        await audit.record(connection, "device.registration_issued", device, expires_at=expires_at)
        return Registration(token, device, name, expires_at)

    async def provision(self, token: str, request_pem: str, address: bytes) -> Provisioned:
        """The device's certificate, for a token that is used up by it.

        Raises the problems of a token that is not good, or not any more, of too many guesses, of a device that is
        suspended, and of `Issuer.issue`: then the token can be used again.
        """
        self._guesses.check(address)
        if plausible_token(token.rpartition(".")[2], REGISTRATION_PREFIX):
            async with self._acting() as connection:
                found = await self._use(connection, token)
                if found is not None:
                    return Provisioned(*found, await self._issuer.issue(connection, *found, request_pem))
        self._guesses.count(address)
        raise token_invalid()

    async def _use(self, connection: Any, token: str) -> tuple[UUID, UUID] | None:
        """Whose device it is; None for a token that is not good."""
        row = await connection.fetchrow(_PRESENTED, self._hasher.digests(token))
        if row is None:
            return None
        registration, organisation, device = row
        await act_for(connection, organisation=organisation)
        await connection.execute(_ACT_AS, str(registration))
        status = await connection.fetchval(_HOLD_DEVICE, device)
        if status == "deleted" or await connection.fetchval(_USE, registration) is None:
            return None
        if status == "suspended":
            raise Problem(DEVICE_SUSPENDED)
        return organisation, device


def _local_id(name: str) -> str:
    """As it is called, where that can stand in a topic."""
    try:
        return str(LocalId.parse(name))
    except ValueError:
        return str(Slug.of(name))
