"""What is secret of a plant: made when it is provisioned, rotated, ended; and the package that it is brought in.

Each method runs in the transaction of a request, with the plant held. Secrets that have to be known again are sealed,
passwords and tokens are hashed as a broker keeps them. Left out: making certificates (`api.certificates`), and who
reads signatures.
"""

import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from api.access.signing import Signer
from api.certificates import issuing
from api.certificates.authorities import trusted
from api.certificates.issuing import Issuer
from api.http.problems import Problem
from api.problems import PLANT_REFUSED
from api.registry import audit, commands, devices, plants
from api.registry.broker_passwords import Handovers, make_password
from api.settings import ApiSettings, broker_address
from runtime.ids import uuid7
from runtime.secrets import BadSealError, KeyRing, Seal
from schemas.plants import (
    PACKAGE_HOURS,
    PACKAGE_SEAL,
    SECRET_BYTES,
    SECRET_GRACE_MINUTES,
    SECRET_SEAL,
    TOKEN_AUDIENCE,
    AuthMethod,
    Lifecycle,
    topic,
)

TOKEN_TYPE: Final = "mqtt+jwt"  # noqa: S105

_PROVISION: Final = """
UPDATE plants SET activated_at = now(), secret = $2, broker_password = $3, broker_password_until = NULL
WHERE device_id = $1
"""
_ROTATE: Final = """
UPDATE plants SET secret = $2, former_secret = secret, former_secret_until = now() + $3, secret_rotated_at = now()
WHERE device_id = $1
"""
_GIVE: Final = """
UPDATE plants SET broker_password = $2, broker_password_until = $3, token_id = $4 WHERE device_id = $1
"""
_END: Final = """
UPDATE plants SET secret = NULL, former_secret = NULL, former_secret_until = NULL, broker_password = NULL,
    broker_password_until = NULL, token_id = NULL,
    certificate_revoked_at = CASE WHEN certificate_fingerprint IS NULL THEN NULL
                                  ELSE coalesce(certificate_revoked_at, now()) END
WHERE device_id = $1
"""
_KEEP: Final = """
INSERT INTO plant_packages (device_id, organisation_id, sealed, expires_at) VALUES ($1, $2, $3, now() + $4)
"""
_KEPT: Final = (
    "SELECT sealed, expires_at - now() AS left FROM plant_packages WHERE device_id = $1 AND expires_at > now()"
)
_DROP: Final = "DELETE FROM plant_packages WHERE device_id = $1"


# ---------------------------------------------------------------- the package


class Topics(msgspec.Struct):
    """Where a plant publishes, and where it listens for commands."""

    ack: str
    commands: str
    status: str
    telemetry: str


class Mqtt(msgspec.Struct):
    """Which broker."""

    broker: str
    port: int
    topics: Topics


class Security(msgspec.Struct, rename="camel"):
    """What a plant proves itself by: a certificate with its key, or a name with a password; its signing key, and whom
    it believes that it is the broker."""

    hmac_secret: str
    """32 bytes, hexadecimal: the key of HMAC-SHA-256 is those bytes."""
    ca_cert: str | UnsetType = UNSET
    client_cert: str | UnsetType = UNSET
    client_key: str | UnsetType = UNSET
    username: str | UnsetType = UNSET
    password: str | UnsetType = UNSET


class Package(msgspec.Struct, rename="camel"):
    """All that a plant needs to connect."""

    auth_method: AuthMethod
    mqtt: Mqtt
    plant_id: UUID
    protocol: dict[str, Any]
    security: Security


class Token(NamedTuple):
    """For the broker, in the place of a password."""

    text: str
    expires_at: datetime


# ---------------------------------------------------------------- what is done


class Provisioning:
    """Gives plants what they need to connect, and takes it away."""

    def __init__(self, ring: KeyRing, signer: Signer, issuer: Issuer, settings: ApiSettings) -> None:
        self._secrets = Seal(ring, SECRET_SEAL)
        self._packages = Seal(ring, PACKAGE_SEAL)
        self._handovers = Handovers(ring)
        self._signer = signer
        self._issuer = issuer
        self._settings = settings

    async def provision(self, connection: Any, plant: UUID) -> Package:
        """Raises the problems of a plant that is not there, or is none that waits for it."""
        held = await plants.hold(connection, plant)
        plants.require(held, "be provisioned", Lifecycle.PENDING)
        method = AuthMethod(held["auth_method"])
        secret = secrets.token_bytes(SECRET_BYTES)
        # Of a broker whose certificate is ours as well; where there is no authority, it cannot be.
        security = Security(secret.hex(), ca_cert=await trusted(connection) or UNSET)
        kept = None
        if method is AuthMethod.MTLS:
            issued = await self._issuer.issue(connection, held["organisation_id"], plant, None)
            security.client_cert, security.client_key = issued.presented, issued.private_key or UNSET
        else:
            security.username = str(plant)
        if method is AuthMethod.PASSWORD:
            security.password = make_password()
            kept = await self._handovers.give(connection, held["organisation_id"], plant, security.password)
        await connection.execute(_PROVISION, plant, self._secrets.seal(secret), kept)
        await plants.set_lifecycle(connection, plant, Lifecycle.ACTIVE)
        package = Package(method, self._mqtt(plant, method), plant, _protocol(method), security)
        await self._keep(connection, held, package, timedelta(hours=PACKAGE_HOURS))
        await audit.record(connection, "plant.provisioned", plant, auth_method=method)
        return package

    async def package(self, connection: Any, plant: UUID) -> Package:
        """As it was made, with the newest secret. Raises the problems of a plant or a package that is not there."""
        held = await plants.hold(connection, plant)
        plants.require(held, "be brought its package", Lifecycle.ACTIVE)
        kept = await self._kept(connection, plant)
        if kept is None:
            raise Problem(PLANT_REFUSED, f"a package is kept for {PACKAGE_HOURS} hours, and the plant's is gone")
        await audit.record(connection, "plant.package_downloaded", plant)
        return kept[0]

    async def rotate_secret(self, connection: Any, plant: UUID) -> str:
        """The new one, hexadecimal; the old one is good for a while. Raises the problems of no active plant."""
        held = await plants.hold(connection, plant)
        plants.require(held, "have its secret rotated", Lifecycle.ACTIVE)
        secret = secrets.token_bytes(SECRET_BYTES)
        grace = timedelta(minutes=SECRET_GRACE_MINUTES)
        await connection.execute(_ROTATE, plant, self._secrets.seal(secret), grace)
        kept = await self._kept(connection, plant)
        if kept is not None:
            package, left = kept
            package.security.hmac_secret = secret.hex()
            await connection.execute(_DROP, plant)
            await self._keep(connection, held, package, left)
        await plants.touch(connection, plant)
        await audit.record(connection, "plant.secret_rotated", plant)
        return secret.hex()

    async def issue_token(self, connection: Any, plant: UUID) -> Token:
        """In the place of the one before. Raises the problems of no active plant that logs in by token."""
        held = await plants.hold(connection, plant)
        if held["auth_method"] != AuthMethod.TOKEN:
            raise Problem(PLANT_REFUSED, f"the plant's authMethod is {held['auth_method']}: it takes no token")
        plants.require(held, "be given a token", Lifecycle.ACTIVE)
        expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=self._settings.plant_token_s)
        token_id = uuid7()
        claims = {
            "aud": TOKEN_AUDIENCE, "sub": str(plant), "jti": str(token_id), "exp": int(expires_at.timestamp()),
        }  # fmt: skip
        text = await self._signer.sign(connection, claims, TOKEN_TYPE)
        kept = await self._handovers.give(connection, held["organisation_id"], plant, text)
        await connection.execute(_GIVE, plant, kept, expires_at, token_id)
        await plants.touch(connection, plant)
        await audit.record(connection, "plant.token_issued", plant, token_id=token_id, expires_at=expires_at)
        return Token(text, expires_at)

    async def suspend(self, connection: Any, plant: UUID) -> None:
        """Raises the problems of a plant that is not there or not active."""
        held = await plants.hold(connection, plant)
        plants.require(held, "be suspended", Lifecycle.ACTIVE)
        await issuing.revoke(connection, held["organisation_id"], plant, issuing.HOLD)
        await plants.set_lifecycle(connection, plant, Lifecycle.SUSPENDED)
        await audit.record(connection, "plant.suspended", plant)

    async def reactivate(self, connection: Any, plant: UUID) -> None:
        """Raises the problems of a plant that is not there or not suspended."""
        held = await plants.hold(connection, plant)
        plants.require(held, "be reactivated", Lifecycle.SUSPENDED)
        await issuing.release(connection, held["organisation_id"], plant)
        await plants.set_lifecycle(connection, plant, Lifecycle.ACTIVE)
        await audit.record(connection, "plant.reactivated", plant)

    async def revoke(self, connection: Any, plant: UUID) -> None:
        """For good. Raises the problems of a plant that is not there or was revoked before."""
        held = await plants.hold(connection, plant)
        plants.require(held, "be revoked", Lifecycle.PENDING, Lifecycle.ACTIVE, Lifecycle.SUSPENDED)
        await issuing.revoke(connection, held["organisation_id"], plant, "privilegeWithdrawn")
        await connection.execute(_END, plant)
        await connection.execute(_DROP, plant)
        await connection.execute(devices.REVOKE, plant)
        await commands.give_up(connection, plant, "the plant was revoked")
        await plants.set_lifecycle(connection, plant, Lifecycle.DECOMMISSIONED)
        await audit.record(connection, "plant.revoked", plant)

    # ------------------------------------------------------------ parts

    async def _keep(self, connection: Any, held: Any, package: Package, left: timedelta) -> None:
        sealed = self._packages.seal(msgspec.json.encode(package))
        await connection.execute(_KEEP, held["device_id"], held["organisation_id"], sealed, left)

    async def _kept(self, connection: Any, plant: UUID) -> tuple[Package, timedelta] | None:
        """None also for one that was sealed under a key that is gone."""
        row = await connection.fetchrow(_KEPT, plant)
        if row is None:
            return None
        try:
            return msgspec.json.decode(self._packages.open(row["sealed"]), type=Package), row["left"]
        except BadSealError:
            return None

    def _mqtt(self, plant: UUID, method: AuthMethod) -> Mqtt:
        settings, address = self._settings, broker_address(self._settings)
        own = {AuthMethod.TOKEN: settings.mqtt_token_port, AuthMethod.PASSWORD: settings.mqtt_password_port}
        topics = Topics(*(topic(plant, kind) for kind in ("ack", "command", "status", "telemetry")))
        return Mqtt(address.host, own.get(method) or address.port, topics)


def _protocol(method: AuthMethod) -> dict[str, Any]:
    """How what is sent has to look, beside the topics."""
    return {
        "mqttVersions": ["5.0", "3.1.1"],
        "qos": 1,
        "signature": {"algorithm": "HMAC-SHA256", "encoding": "hex", "required": method is not AuthMethod.MTLS},
    }
