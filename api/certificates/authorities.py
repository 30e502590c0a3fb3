"""The authorities of this installation, and their keys: made here or brought along, sealed under SLUICE_SECRET_KEYS.

A root signs issuing authorities, and the newest of those everything else; older ones vouch for what they have signed.
Left out: what is issued (`issuing`), and whether what somebody brings may be used (`checking`).
"""

from typing import Any, Final, NamedTuple, cast
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from api.certificates.building import PrivateKey, Signer, fingerprint_of, pem_of
from api.http.problems import Problem
from api.problems import AUTHORITY_MISSING
from runtime.ids import uuid7
from runtime.secrets import BadSealError, KeyRing, Seal

ROOT: Final = "root"
ISSUING: Final = "issuing"
_LOCK: Final = 0x736C_7569_6365_0005

_COLUMNS: Final = "a.authority_id, a.kind, a.certificate, a.above, a.not_before, a.not_after"
_NEWEST: Final = f"""
SELECT {_COLUMNS}, k.sealed_private FROM certificate_authorities a
LEFT JOIN certificate_authority_keys k USING (authority_id)
WHERE a.kind = $1 AND a.not_after > now() ORDER BY a.created_at DESC, a.authority_id DESC LIMIT 1
"""  # noqa: S608
_ONE: Final = f"""
SELECT {_COLUMNS}, k.sealed_private FROM certificate_authorities a
LEFT JOIN certificate_authority_keys k USING (authority_id) WHERE a.authority_id = $1
"""  # noqa: S608
_ALL: Final = f"""
SELECT {_COLUMNS}, a.fingerprint, k.sealed_private FROM certificate_authorities a
LEFT JOIN certificate_authority_keys k USING (authority_id) ORDER BY a.created_at DESC, a.authority_id DESC
"""  # noqa: S608
_TRUSTED: Final = """
SELECT certificate, above FROM certificate_authorities WHERE not_after > now()
ORDER BY created_at DESC, authority_id DESC
"""
_KNOWN: Final = "SELECT EXISTS (SELECT FROM certificate_authorities WHERE fingerprint = $1)"
_ADD: Final = """
INSERT INTO certificate_authorities (authority_id, kind, certificate, above, fingerprint, not_before, not_after)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""
_ADD_KEY: Final = "INSERT INTO certificate_authority_keys (authority_id, kind, sealed_private) VALUES ($1, $2, $3)"
_ADD_LIST: Final = "INSERT INTO certificate_revocation_lists (authority_id) VALUES ($1)"
_REMOVE_KEY: Final = "DELETE FROM certificate_authority_keys WHERE authority_id = $1 AND kind = 'root'"
_SEALED: Final = "SELECT authority_id, sealed_private FROM certificate_authority_keys FOR UPDATE"
_SEAL_AGAIN: Final = "UPDATE certificate_authority_keys SET sealed_private = $2 WHERE authority_id = $1"

NO_AUTHORITY: Final = "no certificate authority is there that could sign: an operator makes one with `sluice ca init`"
SEALED_AWAY: Final = (
    "the key of the certificate authority was sealed under a secret key that is no longer kept: put that back behind "
    "the others in SLUICE_SECRET_KEYS"
)


class Authority(NamedTuple):
    """One that signs, and who vouches for it."""

    authority: UUID
    signer: Signer
    chain: str
    """PEM: its own certificate and those above it."""


class Standing(NamedTuple):
    """One as it stands, for an operator."""

    authority: UUID
    kind: str
    certificate: x509.Certificate
    fingerprint: str
    key: str
    """`kept`, `taken away`, or `sealed away` where SLUICE_SECRET_KEYS lacks what it was sealed under."""


class Authorities:
    """Reads them in a request's transaction, so that none is stale; changes them in an operator's."""

    def __init__(self, ring: KeyRing) -> None:
        self._seal = Seal(ring, "certificate authority key")

    # ------------------------------------------------------------ signing

    async def issuing(self, connection: Any) -> Authority:
        """The one that signs now. Raises the problem of none, and of a key that cannot be read."""
        return self._authority(await connection.fetchrow(_NEWEST, ISSUING))

    async def root(self, connection: Any) -> Authority | None:
        """The newest, as an operator; None where there is none or its key was taken away."""
        row = await connection.fetchrow(_NEWEST, ROOT)
        return None if row is None or row["sealed_private"] is None else self._authority(row)

    async def one(self, connection: Any, authority: UUID) -> Authority:
        """Raises as `issuing`."""
        return self._authority(await connection.fetchrow(_ONE, authority))

    def _authority(self, row: Any) -> Authority:
        if row is None or row["sealed_private"] is None:
            raise Problem(AUTHORITY_MISSING, NO_AUTHORITY)
        certificate = x509.load_pem_x509_certificate(row["certificate"].encode())
        try:
            key = self._opened(row["sealed_private"])
        except BadSealError:
            raise Problem(AUTHORITY_MISSING, SEALED_AWAY) from None
        return Authority(row["authority_id"], Signer(certificate, key), row["certificate"] + row["above"])

    def _opened(self, sealed: str) -> PrivateKey:
        # The seal vouches for it; checking the primes of RSA again takes 60 ms.
        key: Any = serialization.load_der_private_key(
            self._seal.open(sealed), None, unsafe_skip_rsa_key_validation=True
        )
        return cast("PrivateKey", key)

    # ------------------------------------------------------------ as an operator

    async def hold(self, connection: Any) -> None:
        """Until the transaction ends nobody else changes which there are."""
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)

    async def add(self, connection: Any, kind: str, signer: Signer, chain: str = "") -> UUID:
        """`chain` is PEM of those above it, the nearest first."""
        certificate, authority = signer.certificate, uuid7()
        span = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        await connection.execute(
            _ADD, authority, kind, pem_of(certificate), chain, fingerprint_of(certificate), *span
        )
        await connection.execute(_ADD_KEY, authority, kind, self._sealed(signer.key))
        if kind == ISSUING:
            await connection.execute(_ADD_LIST, authority)
        return authority

    async def knows(self, connection: Any, certificate: x509.Certificate) -> bool:
        found: bool = await connection.fetchval(_KNOWN, fingerprint_of(certificate))
        return found

    async def take_root_key(self, connection: Any, authority: UUID) -> None:
        await connection.execute(_REMOVE_KEY, authority)

    async def seal_again(self, connection: Any) -> int:
        """All keys under the newest secret key; how many. Raises the problem of one that cannot be read."""
        rows = await connection.fetch(_SEALED)
        for row in rows:
            try:
                plain = self._seal.open(row["sealed_private"])
            except BadSealError:
                raise Problem(AUTHORITY_MISSING, SEALED_AWAY) from None
            await connection.execute(_SEAL_AGAIN, row["authority_id"], self._seal.seal(plain))
        return len(rows)

    async def standing(self, connection: Any) -> list[Standing]:
        """All there are, the newest first."""
        return [
            Standing(
                row["authority_id"],
                row["kind"],
                x509.load_pem_x509_certificate(row["certificate"].encode()),
                row["fingerprint"],
                self._key_state(row["sealed_private"]),
            )
            for row in await connection.fetch(_ALL)
        ]

    def _key_state(self, sealed: str | None) -> str:
        if sealed is None:
            return "taken away"
        try:
            self._seal.open(sealed)
        except BadSealError:
            return "sealed away"
        return "kept"

    def _sealed(self, key: PrivateKey) -> str:
        encryption = serialization.NoEncryption()
        return self._seal.seal(
            key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, encryption)
        )


async def trusted(connection: Any) -> str:
    """PEM: every certificate that a broker needs to judge those of devices, and devices that of a broker."""
    found: dict[str, None] = {}
    for row in await connection.fetch(_TRUSTED):
        for certificate in x509.load_pem_x509_certificates((row["certificate"] + row["above"]).encode()):
            found[pem_of(certificate)] = None
    return "".join(found)
