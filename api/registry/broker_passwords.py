"""What a broker keeps of a password: PBKDF2 with SHA-512, as Mosquitto writes it (`$7$iterations$salt$hash`).

Its dynamic-security plugin takes the same three parts. As many rounds as Mosquitto makes by default: the passwords
are of 190 random bits, which rounds cannot make harder to guess, and a broker computes them in its only thread for
every client that connects. Left out: people's passwords (`api.access.passwords`).
"""

import base64
import hashlib
import secrets
import string
from typing import Final

ITERATIONS: Final = 101
#: Mosquitto 2.0 takes no other length.
SALT_BYTES: Final = 12
_ALPHABET: Final = string.ascii_letters + string.digits
_CHARACTERS: Final = 32


def make_password() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(_CHARACTERS))


def broker_hash(password: str) -> str:
    salt = secrets.token_bytes(SALT_BYTES)
    made = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS)
    return f"$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(made).decode()}"
