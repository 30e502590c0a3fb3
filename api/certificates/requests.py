"""Certificate requests (PKCS 10): the public key in one, once its owner has proven to hold the private one.

Whatever else stands in a request is not looked at: who it is for follows from who may ask. Left out: signing.
"""

from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from api.certificates.building import PublicKey
from api.http.problems import invalid

FIELD: Final = "csr"
#: The largest that is taken, of RSA with 4,096 bits, is 1.7 kB.
CHARACTERS_MAX: Final = 8_000
RSA_BITS: Final = (2_048, 4_096)
KINDS: Final = "an EC key on P-256 or P-384, or an RSA key of 2048 to 4096 bits"
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
#: What a public exponent is in practice; a large one makes each check of a signature slow.
_EXPONENT_MAX: Final = 65_537
_BAD: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)


def requested_key(text: str) -> PublicKey:
    """Raises the problem of what is no request, of another kind of key, and of a signature that is not the key's."""
    if len(text) > CHARACTERS_MAX:
        raise invalid(FIELD, f"must have up to {CHARACTERS_MAX} characters")
    try:
        request = x509.load_pem_x509_csr(text.encode("ascii"))
        key = request.public_key()
    except _BAD:
        raise invalid(FIELD, "must be a certificate request (PKCS 10) in PEM") from None
    found = taken(key)
    if found is None:
        raise invalid(FIELD, f"must be of {KINDS}")
    if not _is_signed(request):
        raise invalid(FIELD, "must be signed with its own key")
    return found


def taken(key: object) -> PublicKey | None:
    """The key, if it is of a kind that is taken."""
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return key
    if isinstance(key, rsa.RSAPublicKey):
        least, most = RSA_BITS
        if least <= key.key_size <= most and key.public_numbers().e <= _EXPONENT_MAX:
            return key
    return None


def _is_signed(request: x509.CertificateSigningRequest) -> bool:
    try:
        return request.is_signature_valid
    except _BAD:
        return False
