"""Certificates of devices: issuing, renewing, revoking, in the transaction of whoever asks for it.

A device has one that counts; when it gets the next, the one before stays good for a while, and for no longer than it
says itself. Left out: how authorities sign (`building`), and who may ask.
"""

from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

from cryptography import x509

from api.certificates.authorities import Authorities
from api.certificates.building import (
    Span,
    fingerprint_of,
    key_pem_of,
    new_key,
    pem_of,
    serial_of,
    sign_client,
    utc_now,
)
from api.certificates.requests import requested_key
from api.certificates.settings import CertificateSettings
from api.http.problems import Problem
from api.problems import CERTIFICATE_LIMIT, DEVICE_NOT_FOUND
from api.registry import audit
from runtime.secrets import KeyRing

#: RFC 5280, 5.3.1, as far as it is of devices.
Reason = Literal[
    "unspecified", "keyCompromise", "affiliationChanged", "superseded", "cessationOfOperation", "certificateHold",
    "privilegeWithdrawn",
]  # fmt: skip
HOLD: Final[Reason] = "certificateHold"

# One after the other: whoever deletes the device, or revokes what it has, ends this certificate too.
_HOLD_DEVICE: Final = """
SELECT status FROM devices WHERE device_id = $2 AND organisation_id = $1 FOR NO KEY UPDATE
"""
_COUNT: Final = """
SELECT count(*) FROM (SELECT FROM certificates WHERE organisation_id = $1 AND not_after > now() LIMIT $2) unended
"""
_LISTED: Final = "SELECT coalesce(sum(entries), 0) FROM certificate_revocation_lists"
_ADD: Final = """
INSERT INTO certificates (fingerprint, authority_id, serial, organisation_id, device_id, not_before, not_after)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""
# What has ended, or was revoked for good, is only told which one follows it.
_REPLACE: Final = """
UPDATE certificates SET replaced_by = $3,
    revoked_at = CASE WHEN revoked_at IS NULL AND not_after > now() THEN now() + $4::interval ELSE revoked_at END,
    reason = CASE WHEN revoked_at IS NULL AND not_after > now() THEN 'superseded' ELSE reason END
WHERE organisation_id = $1 AND device_id = $2 AND fingerprint <> $3 AND replaced_by IS NULL
"""
# What was revoked for good stays as it was; what is held, or will be replaced, is revoked now.
_REVOKE: Final = """
UPDATE certificates SET revoked_at = now(), reason = $3
WHERE organisation_id = $1 AND device_id = $2 AND not_after > now()
  AND (revoked_at IS NULL OR revoked_at > now() OR (reason = 'certificateHold' AND $3 <> 'certificateHold'))
RETURNING serial
"""
_RELEASE: Final = """
UPDATE certificates SET revoked_at = CASE WHEN replaced_by IS NULL THEN NULL ELSE now() END,
    reason = CASE WHEN replaced_by IS NULL THEN NULL ELSE 'superseded' END
WHERE organisation_id = $1 AND device_id = $2 AND reason = 'certificateHold'
RETURNING serial
"""
_NEWEST: Final = """
SELECT fingerprint, serial, not_before, not_after, revoked_at, reason FROM certificates
WHERE organisation_id = $1 AND device_id = $2 ORDER BY issued_at DESC, fingerprint LIMIT 1
"""


class Issued(NamedTuple):
    """A device's certificate, as it is told once."""

    certificate: str
    """PEM."""
    chain: str
    """PEM: of the authority that signed it, and of those above it."""
    private_key: str | None
    """PEM, where it was made here: it is kept nowhere."""
    fingerprint: str
    """SHA-256, in hexadecimal digits."""
    serial_number: str
    """In hexadecimal digits."""
    not_after: datetime

    @property
    def presented(self) -> str:
        """PEM: what the device shows a broker, which knows the root and need not know who is below it."""
        between = x509.load_pem_x509_certificates(self.chain.encode())
        return self.certificate + "".join(pem_of(one) for one in between if one.issuer != one.subject)


class Issuer:
    """Signs in a request's transaction, which acts for the organisation."""

    def __init__(self, ring: KeyRing, settings: CertificateSettings) -> None:
        self._authorities = Authorities(ring)
        self._settings = settings

    async def issue(self, connection: Any, organisation: UUID, plant: UUID, request_pem: str | None) -> Issued:
        """A certificate for the device, of the key in a request or of one made here; the first, or the next.

        Raises the problems of a device that is not there, of a request that is not good, of too many certificates,
        and of no authority that can sign.
        """
        made = new_key() if request_pem is None else None
        public = requested_key(request_pem or "") if made is None else made.public_key()
        if await connection.fetchval(_HOLD_DEVICE, organisation, plant) in (None, "deleted"):
            raise Problem(DEVICE_NOT_FOUND)
        await self._check_room(connection, organisation)
        authority = await self._authorities.issuing(connection)
        span = Span.of(utc_now(), self._settings.certificate_device_days)
        certificate = sign_client(authority.signer, public, organisation, plant, span)
        issued = Issued(
            pem_of(certificate),
            authority.chain,
            None if made is None else key_pem_of(made),
            fingerprint_of(certificate),
            serial_of(certificate),
            certificate.not_valid_after_utc,
        )
        await connection.execute(
            _ADD, issued.fingerprint, authority.authority, issued.serial_number, organisation, plant,
            certificate.not_valid_before_utc, issued.not_after,
        )  # fmt: skip
        overlap = timedelta(hours=self._settings.certificate_overlap_hours)
        await connection.execute(_REPLACE, organisation, plant, issued.fingerprint, overlap)
        await audit.record(
            connection, "certificate.issued", plant, serial=issued.serial_number, not_after=issued.not_after
        )
        return issued

    async def _check_room(self, connection: Any, organisation: UUID) -> None:
        most = self._settings.certificates_per_organisation_max
        if await connection.fetchval(_COUNT, organisation, most) >= most:
            raise Problem(CERTIFICATE_LIMIT, f"an organisation has up to {most} certificates that have not ended")
        if await connection.fetchval(_LISTED) >= self._settings.crl_entries_max:
            raise Problem(CERTIFICATE_LIMIT, "the lists of revoked certificates are as long as they may be")


async def revoke(connection: Any, organisation: UUID, plant: UUID, reason: Reason) -> int:
    """End all that the device has, or with `HOLD` until they are released; how many there were. May be repeated."""
    await connection.fetchval(_HOLD_DEVICE, organisation, plant)
    revoked = await connection.fetch(_REVOKE, organisation, plant, reason)
    if revoked:
        serials = [row["serial"] for row in revoked]
        await audit.record(connection, "certificate.revoked", plant, serials=serials, reason=reason)
    return len(revoked)


async def release(connection: Any, organisation: UUID, plant: UUID) -> int:
    """Let the device use again what was held; how many there were."""
    await connection.fetchval(_HOLD_DEVICE, organisation, plant)
    released = await connection.fetch(_RELEASE, organisation, plant)
    if released:
        serials = [row["serial"] for row in released]
        await audit.record(connection, "certificate.released", plant, serials=serials)
    return len(released)


async def newest_of(connection: Any, organisation: UUID, plant: UUID) -> Any:
    """The device's certificate that counts: `fingerprint`, `serial`, `not_after`, `revoked_at`; None without one."""
    return await connection.fetchrow(_NEWEST, organisation, plant)
