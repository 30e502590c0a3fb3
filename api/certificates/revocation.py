"""Lists of revoked certificates, one for each authority that issues: made when something changed or one grows old.

A broker that is given one list after the other keeps to the newest by their times, which are in seconds: so each is a
second younger than the last at least. Left out: revoking (`issuing`), and bringing a list to a broker.
"""

import asyncio
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from cryptography import x509

from api.certificates.authorities import Authorities
from api.certificates.building import LIST_BACKDATED, Revoked, make_list, pem_of
from api.certificates.settings import CertificateSettings
from runtime.errors import ConfigurationError
from runtime.secrets import KeyRing

_SECOND: Final = timedelta(seconds=1)

_LISTS: Final = """
SELECT l.authority_id, l.number, l.list, l.entries, l.this_update, l.next_update,
       l.is_stale OR l.made_at < now() - $1::interval OR EXISTS (
           SELECT FROM certificate_revocations r WHERE r.authority_id = l.authority_id
           AND r.revoked_at > l.made_at AND r.revoked_at <= now()) AS is_due
FROM certificate_revocation_lists l JOIN certificate_authorities a USING (authority_id)
WHERE a.not_after > now() ORDER BY a.created_at DESC, a.authority_id DESC
"""
_HOLD: Final = "SELECT FROM certificate_revocation_lists WHERE authority_id = $1 FOR UPDATE"
_MOMENT: Final = "SELECT clock_timestamp()"
_REVOKED: Final = """
SELECT serial, revoked_at, reason FROM certificate_revocations WHERE authority_id = $1 AND revoked_at <= $2
ORDER BY revoked_at, serial
"""
_KEEP: Final = """
UPDATE certificate_revocation_lists
SET number = $2, list = $3, entries = $4, this_update = $5, next_update = $6, made_at = $7, is_stale = false
WHERE authority_id = $1
"""
_FORGET: Final = "SELECT forget_revocations()"


class Listed(NamedTuple):
    """A list as it is kept."""

    authority: UUID
    number: int
    pem: str
    entries: int
    this_update: datetime
    next_update: datetime
    is_due: bool


class RevocationLists:
    """The lists that brokers and others check certificates by."""

    def __init__(self, ring: KeyRing, settings: CertificateSettings) -> None:
        """Raises `ConfigurationError` for lists that would end before the next is made."""
        if settings.crl_lifetime_hours < 2 * settings.crl_renewal_hours:
            raise ConfigurationError(
                f"SLUICE_CRL_LIFETIME_HOURS={settings.crl_lifetime_hours} is less than twice "
                f"SLUICE_CRL_RENEWAL_HOURS={settings.crl_renewal_hours}: a list has to outlive the making of the next"
            )
        self._authorities = Authorities(ring)
        self._renewal = timedelta(hours=settings.crl_renewal_hours)
        self._lifetime = timedelta(hours=settings.crl_lifetime_hours)

    async def current(self, connection: Any) -> list[Listed]:
        """Of each authority that has not ended, the newest first; in a transaction that may write.

        They tell of everything that was revoked before. Raises the problem of a key that cannot be read.
        """
        found = await self.kept(connection)
        held = sorted(one.authority for one in found if one.is_due)
        if not held:
            return found
        for authority in held:
            await connection.execute(_HOLD, authority)
        # Others may have made them meanwhile; what is committed from here on makes them stale again.
        for one in await self.kept(connection):
            if one.is_due and one.authority in held:
                await self._make(connection, one)
        await connection.execute(_FORGET)
        return await self.kept(connection)

    async def kept(self, connection: Any) -> list[Listed]:
        """As they were made last, though they be due to be made again."""
        return [Listed(*row) for row in await connection.fetch(_LISTS, self._renewal)]

    async def _make(self, connection: Any, last: Listed) -> None:
        moment: datetime = await connection.fetchval(_MOMENT)
        second = moment.replace(microsecond=0)
        start, end = max(second - LIST_BACKDATED, last.this_update + _SECOND), second + self._lifetime
        if start > second:
            return  # so many within minutes that this one would begin ahead: the next who asks makes it
        authority = await self._authorities.one(connection, last.authority)
        revoked = [_revoked(row) for row in await connection.fetch(_REVOKED, last.authority, moment)]
        # Counted on from the time, so that the numbers rise also where an older database was restored.
        number = max(last.number + 1, int(second.timestamp()))
        # Most of a second with as many entries as there may be.
        made = await asyncio.to_thread(make_list, authority.signer, number, start, end, revoked)
        await connection.execute(_KEEP, last.authority, number, pem_of(made), len(revoked), start, end, moment)


def _revoked(row: Any) -> Revoked:
    return Revoked(int(row["serial"], 16), row["revoked_at"], x509.ReasonFlags(row["reason"]))
