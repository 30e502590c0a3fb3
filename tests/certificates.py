"""Certificates for tests, made on the spot: authorities, and what they sign. Left out: who shows or checks them."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Files:
    """A certificate and its key, in PEM."""

    certificate: str
    key: str


class Authority:
    """Signs certificates, and keeps its own and theirs in `directory`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        made = self._made(self._name, self._key.public_key())
        signed = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = signed.sign(self._key, hashes.SHA256())
        self.file = str(directory / f"{name}.pem")
        Path(self.file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def sign(self, name: str, *hosts: str, passphrase: bytes | None = None) -> Files:
        """A certificate for `hosts`, names or addresses, in files called `name`; what stood there is replaced."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._made(_name(name), key.public_key())
        named = made.add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
        )
        certificate = named.sign(self._key, hashes.SHA256())
        files = Files(str(self._directory / f"{name}.crt"), str(self._directory / f"{name}.key"))
        encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        Path(files.key).write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        Path(files.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return files

    def _made(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=2))
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)
