"""Certificates and revocation lists (RFC 5280), made and signed. Left out: where keys and certificates are kept.

What a certificate says follows from what it is for; nothing that an applicant writes into a request is taken over but
the public key. Times are whole seconds, as X.509 has them.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

#: A device whose clock is behind by less takes a new certificate all the same.
BACKDATED: Final = timedelta(hours=1)
#: Likewise a broker and a new list. Less than a certificate, as no list is older than the last one.
LIST_BACKDATED: Final = timedelta(minutes=5)
_SERIAL_CHARACTERS: Final = 8

_USAGES: Final = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


class Signer(NamedTuple):
    """An authority that can sign."""

    certificate: x509.Certificate
    key: PrivateKey


class Span(NamedTuple):
    """When a certificate is good."""

    start: datetime
    end: datetime

    @classmethod
    def of(cls, now: datetime, days: int) -> "Span":
        whole = now.replace(microsecond=0)
        return cls(whole - BACKDATED, whole + timedelta(days=days))


class Revoked(NamedTuple):
    """What a list says of a certificate."""

    serial: int
    at: datetime
    reason: x509.ReasonFlags


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


# ---------------------------------------------------------------- authorities


def make_root(name: str, key: PrivateKey, span: Span) -> x509.Certificate:
    """Signed by itself; it signs issuing authorities and nothing below them."""
    subject = _authority_name(f"{name} Root CA", key)
    return _authority(subject, Span(span.start, span.end), key.public_key(), path_length=1, issuer=None).sign(
        key, hashes.SHA256()
    )


def make_issuing(name: str, key: PrivateKey, root: Signer, span: Span) -> x509.Certificate:
    """Signed by `root`; it signs certificates of devices and brokers, and the lists of revoked ones."""
    subject = _authority_name(f"{name} Issuing CA", key)
    made = _authority(subject, _within(span, root), key.public_key(), path_length=0, issuer=root)
    return made.sign(root.key, hashes.SHA256())


def _authority_name(name: str, key: PrivateKey) -> x509.Name:
    """With a part of its key's identifier, so that no two authorities have the same name."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {identifier[:_SERIAL_CHARACTERS]}")])


def _authority(
    subject: x509.Name, span: Span, key: PublicKey, *, path_length: int, issuer: Signer | None
) -> x509.CertificateBuilder:
    return (
        _builder(subject, subject if issuer is None else issuer.certificate.subject, span, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(_authority_key(key) if issuer is None else _key_of(issuer.certificate), critical=False)
    )


# ---------------------------------------------------------------- what they sign


def sign_client(signer: Signer, key: PublicKey, organisation: UUID, plant: UUID, span: Span) -> x509.Certificate:
    """A device's: a broker takes the common name for who is there."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, str(organisation)),
            x509.NameAttribute(NameOID.COMMON_NAME, str(plant)),
        ]
    )
    made = _leaf(signer, subject, key, span, ExtendedKeyUsageOID.CLIENT_AUTH)
    return made.sign(signer.key, hashes.SHA256())


def sign_server(signer: Signer, key: PublicKey, hosts: Sequence[str], span: Span) -> x509.Certificate:
    """A broker's, for these names and addresses."""
    # Clients look at the names alone; a common name may not be as long as a host's.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    made = _leaf(signer, subject, key, span, ExtendedKeyUsageOID.SERVER_AUTH)
    named = made.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return named.sign(signer.key, hashes.SHA256())


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _leaf(
    signer: Signer, subject: x509.Name, key: PublicKey, span: Span, purpose: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    return (
        _builder(subject, signer.certificate.subject, _within(span, signer), key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_key_of(signer.certificate), critical=False)
    )


def _builder(subject: x509.Name, issuer: x509.Name, span: Span, key: PublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(span.start)
        .not_valid_after(span.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _within(span: Span, signer: Signer) -> Span:
    """Nothing outlives who vouches for it."""
    return Span(span.start, min(span.end, signer.certificate.not_valid_after_utc))


def _usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _USAGES})


def _authority_key(key: PublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _key_of(certificate: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """As the certificate spells it, where it does: an authority that was brought along may do so in its own way."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return _authority_key(certificate.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


# ---------------------------------------------------------------- lists of what is revoked


def make_list(
    signer: Signer, number: int, start: datetime, end: datetime, revoked: Iterable[Revoked]
) -> x509.CertificateRevocationList:
    # Handed over at once: the builder copies the whole list for each one that is added.
    entries = [_entry(one) for one in revoked]
    return (
        x509.CertificateRevocationListBuilder(revoked_certificates=entries)
        .issuer_name(signer.certificate.subject)
        .last_update(start)
        .next_update(end)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_key_of(signer.certificate), critical=False)
        .sign(signer.key, hashes.SHA256())
    )


def _entry(one: Revoked) -> x509.RevokedCertificate:
    made = x509.RevokedCertificateBuilder().serial_number(one.serial).revocation_date(one.at.replace(microsecond=0))
    # RFC 5280, 5.3.1: one that says nothing is left out.
    if one.reason is not x509.ReasonFlags.unspecified:
        made = made.add_extension(x509.CRLReason(one.reason), critical=False)
    return made.build()


# ---------------------------------------------------------------- as texts


def pem_of(made: x509.Certificate | x509.CertificateRevocationList) -> str:
    return made.public_bytes(serialization.Encoding.PEM).decode()


def key_pem_of(key: PrivateKey, passphrase: bytes | None = None) -> str:
    """PKCS 8; anybody's who reads it, without a passphrase."""
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption).decode()


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256, in hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def serial_of(certificate: x509.Certificate) -> str:
    """In hexadecimal digits."""
    return f"{certificate.serial_number:x}"


def utc_now() -> datetime:
    return datetime.now(UTC)
