"""A STAND-IN for the certificate authority (another branch's `api/certificates/issuing.py`): the merge replaces it.

It signs with a key of the process's own, which nobody keeps: what it issues is well-formed and worth nothing.
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Final, Literal
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Reason = Literal["certificateHold", "privilegeWithdrawn"]
HOLD: Final[Reason] = "certificateHold"
_DAYS: Final = 365


@dataclass(frozen=True)
class Issued:
    """A certificate as it is handed out, once."""

    certificate: str
    """PEM."""
    chain: str
    """PEM: the issuing authority's and those above it."""
    private_key: str | None
    """PEM; None where the plant made the request and keeps its key."""
    fingerprint: str
    """SHA-256 of the DER, hexadecimal."""
    serial_number: str
    """Hexadecimal."""
    not_after: datetime

    @property
    def presented(self) -> str:
        """PEM: what the plant shows a broker, which knows the root alone."""
        return self.certificate


class Issuer:
    """Signs in a request's transaction."""

    async def issue(self, connection: Any, organisation: UUID, plant: UUID, request_pem: str | None) -> Issued:
        """A certificate whose subject is the plant's id."""
        return await asyncio.to_thread(_issue, plant)


async def revoke(connection: Any, organisation: UUID, plant: UUID, reason: Reason) -> int:
    """All of the plant's certificates, in the caller's transaction: for good, or with `HOLD` until their release."""
    return 0


async def release(connection: Any, organisation: UUID, plant: UUID) -> int:
    """Those that are held."""
    return 0


def _issue(plant: UUID) -> Issued:
    authority, authority_key = _authority()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(str(plant), key.public_key(), authority.subject, authority_key, _DAYS)
    return Issued(
        _pem(certificate),
        _pem(authority),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        certificate.fingerprint(hashes.SHA256()).hex(),
        f"{certificate.serial_number:x}",
        certificate.not_valid_after_utc,
    )


@cache
def _authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Stand-in")])
    return _signed("Stand-in", key.public_key(), name, key, 10 * _DAYS), key


def _signed(
    name: str, public: ec.EllipticCurvePublicKey, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.Certificate:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .sign(key, hashes.SHA256())
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
