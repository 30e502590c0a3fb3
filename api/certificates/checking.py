"""Whether a certificate and a key that somebody brings along make an authority: what is wrong, in words for him.

Left out: what it is used for then (`authorities`).
"""

from datetime import datetime
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from api.certificates.building import PrivateKey, Signer, pem_of
from api.certificates.requests import KINDS, taken
from runtime.errors import ConfigurationError

FILE_BYTES_MAX: Final = 200_000
CHAIN_MAX: Final = 8


class Brought(NamedTuple):
    """An authority that may be used."""

    signer: Signer
    chain: tuple[x509.Certificate, ...]
    """Those above it, the nearest first."""

    @property
    def signs_authorities(self) -> bool:
        """Whether it may have others below it: then it is kept as a root."""
        length = _rights(self.signer.certificate, "").path_length
        return length is None or length > 0

    @property
    def chain_pem(self) -> str:
        return "".join(map(pem_of, self.chain))


def brought(certificates: bytes, key: bytes, passphrase: bytes | None, now: datetime) -> Brought:
    """Its certificate first, then those above it, up to the root. Raises `ConfigurationError`."""
    found = read_certificates(certificates)
    private = read_key(key, passphrase)
    own, above = found[0], found[1:]
    check_pair(own, private)
    for place, certificate in enumerate(found):
        _check_authority(certificate, "the certificate" if place == 0 else f"certificate {place + 1}", now)
    _check_chain(found)
    return Brought(Signer(own, private), tuple(above))


def read_certificates(raw: bytes) -> list[x509.Certificate]:
    """Raises `ConfigurationError`."""
    try:
        found = x509.load_pem_x509_certificates(raw)
    except (ValueError, x509.InvalidVersion):
        raise ConfigurationError("the file of the certificate holds none in PEM, or one that is damaged") from None
    if len(found) > CHAIN_MAX:
        raise ConfigurationError(
            f"the file holds {len(found)} certificates: the authority's and those above it, {CHAIN_MAX} at most"
        )
    return found


def read_key(raw: bytes, passphrase: bytes | None) -> PrivateKey:
    """Raises `ConfigurationError`; its words tell nothing of the key."""
    try:
        key = serialization.load_pem_private_key(raw, passphrase)
    except TypeError:
        needed = "needs a passphrase" if passphrase is None else "has no passphrase, but one was given"
        raise ConfigurationError(f"the file of the key {needed}") from None
    except (ValueError, UnsupportedAlgorithm):
        reason = "" if passphrase is None else ", or the passphrase is wrong"
        raise ConfigurationError(f"the file of the key holds none in PEM{reason}") from None
    if taken(key.public_key()) is None:
        raise ConfigurationError(f"the key is none that is taken: {KINDS}")
    return key  # type: ignore[return-value]


def check_pair(certificate: x509.Certificate, key: PrivateKey) -> None:
    """Raises `ConfigurationError` where one is not of the other."""
    if certificate.public_key() != key.public_key():
        raise ConfigurationError(
            f"the key is not that of the certificate {_named(certificate)}: the file has to begin with its own"
        )


def _check_authority(certificate: x509.Certificate, which: str, now: datetime) -> None:
    which = f"{which} {_named(certificate)}"
    if certificate.not_valid_after_utc <= now:
        raise ConfigurationError(f"{which} ended at {certificate.not_valid_after_utc.isoformat()}")
    if certificate.not_valid_before_utc > now:
        raise ConfigurationError(f"{which} is good from {certificate.not_valid_before_utc.isoformat()} only")
    if not _rights(certificate, which).ca:
        raise ConfigurationError(f"{which} is no authority's: its basicConstraints lack CA:TRUE")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return  # which allows everything
    if not (usage.key_cert_sign and usage.crl_sign):
        raise ConfigurationError(f"{which} may not sign: its keyUsage lacks keyCertSign or cRLSign")


def _rights(certificate: x509.Certificate, which: str) -> x509.BasicConstraints:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise ConfigurationError(f"{which} is no authority's: it has no basicConstraints") from None
    except ValueError:
        raise ConfigurationError(f"{which} has extensions that cannot be read") from None


def _check_chain(found: list[x509.Certificate]) -> None:
    """Each is signed by the next, and the last by itself: devices and brokers trust it by that one."""
    for below, certificate in enumerate(found):
        above = found[below + 1] if below + 1 < len(found) else certificate
        try:
            certificate.verify_directly_issued_by(above)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            if above is certificate:
                raise ConfigurationError(
                    f"the file ends with {_named(certificate)}, which is no root: those above it are missing"
                ) from None
            raise ConfigurationError(f"{_named(certificate)} was not signed by {_named(above)}") from None
        length = _rights(above, _named(above)).path_length
        if above is not certificate and length is not None and length <= below:
            raise ConfigurationError(f"{_named(above)} allows no more than {length} authorities below it")


def _named(certificate: x509.Certificate) -> str:
    return repr(certificate.subject.rfc4514_string())
