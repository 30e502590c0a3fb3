"""Passwords at the broker, and what it keeps of one: PBKDF2 with SHA-512, as Mosquitto writes it.

`$7$iterations$salt$hash`; its dynamic-security plugin keeps the same three parts. As many rounds as Mosquitto makes
by default: the passwords are of 190 random bits, which rounds cannot make harder to guess, and a broker computes
them in its only thread for every client that connects. Left out: people's passwords (`api.access.passwords`).
"""

import base64
import hashlib
import secrets
import string
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from runtime.secrets import KeyRing, Seal
from schemas.plants import HANDOVER_HOURS, HANDOVER_SEAL

ITERATIONS: Final = 101
#: Mosquitto 2.0 takes no other length.
SALT_BYTES: Final = 12
_ALPHABET: Final = string.ascii_letters + string.digits
_CHARACTERS: Final = 32

_HAND_OVER: Final = """
INSERT INTO broker_handovers (subject_id, organisation_id, device_id, site_id, hash, sealed, expires_at)
VALUES (coalesce($2::uuid, $3::uuid), $1, $2, $3, $4, $5, now() + $6)
ON CONFLICT (subject_id) DO UPDATE
SET hash = EXCLUDED.hash, sealed = EXCLUDED.sealed, expires_at = EXCLUDED.expires_at
"""


def make_password() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(_CHARACTERS))


def broker_hash(password: str) -> str:
    salt = secrets.token_bytes(SALT_BYTES)
    made = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS)
    return f"$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(made).decode()}"


class Handovers:
    """Brings new passwords to the broker, sealed: it takes no hash from whoever changes one while it runs."""

    def __init__(self, ring: KeyRing) -> None:
        self._seal = Seal(ring, HANDOVER_SEAL)

    async def give(self, connection: Any, organisation: UUID, device: UUID, password: str) -> str:
        """In the transaction that keeps the hash, which is returned; in place of what was on its way."""
        return await self._give(connection, organisation, device, None, password)

    async def give_site(self, connection: Any, organisation: UUID, site: UUID, password: str) -> str:
        """The same for what a site's own devices log in with."""
        return await self._give(connection, organisation, None, site, password)

    async def _give(
        self, connection: Any, organisation: UUID, device: UUID | None, site: UUID | None, password: str
    ) -> str:
        made, sealed = broker_hash(password), self._seal.seal(password.encode())
        hours = timedelta(hours=HANDOVER_HOURS)
        await connection.execute(_HAND_OVER, organisation, device, site, made, sealed, hours)
        return made
