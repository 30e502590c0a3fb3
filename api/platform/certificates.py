"""Certificates of devices, as operations: first ones, and what brokers check them by.

Left out: what is issued and revoked (`api.certificates`).
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec

from api.access.scopes import DEVICES_WRITE
from api.certificates.authorities import NO_AUTHORITY, trusted
from api.certificates.registration import Registrations
from api.certificates.requests import CHARACTERS_MAX
from api.certificates.revocation import RevocationLists
from api.faces import PLATFORM
from api.http.operations import PUBLIC, Call, Example, Nothing, Reply, Role, needs, operation
from api.http.problems import NOT_FOUND, TOKEN_INVALID, Problem, invalid
from api.http.spelt import STORABLE
from api.problems import (
    AUTHORITY_MISSING,
    CERTIFICATE_LIMIT,
    DEVICE_NOT_FOUND,
    DEVICE_SUSPENDED,
    REGISTRATION_LIMIT,
)
from api.registry.texts import Name
from api.settings import ApiSettings, broker_address

DEVICES: Final = "/api/v1/devices"
CERTIFICATES: Final = "/api/v1/certificates"
PROVISION: Final = f"{DEVICES}/provision"
PEM: Final = "application/x-pem-file"
_REGISTERS: Final = needs(Role.ADMIN, DEVICES_WRITE)
#: Asked again each time, and answered in a line where nothing has changed.
_FRESH: Final = {"Cache-Control": "public, no-cache"}
_BODY_BYTES: Final = 2 * CHARACTERS_MAX

Token = Annotated[str, msgspec.Meta(max_length=256, extra_json_schema=STORABLE)]
Request = Annotated[
    str,
    msgspec.Meta(
        max_length=CHARACTERS_MAX, description="A certificate request (PKCS 10) in PEM.", extra_json_schema=STORABLE
    ),
]


class NewRegistration(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What a new device is called, or which device is to get its certificate anew."""

    device_name: Name | None = None
    device_id: UUID | None = None

    def __post_init__(self) -> None:
        if (self.device_name is None) == (self.device_id is None):
            raise invalid("deviceName", "must name a new device, unless deviceId says which one: one of the two")


class Registered(msgspec.Struct, rename="camel"):
    """A token, which is shown here and never again."""

    token: str
    device_id: UUID
    device_name: str
    provision_endpoint: str
    expires_at: datetime


class Provision(msgspec.Struct, forbid_unknown_fields=True):
    """The token, and a request signed with the device's own key; of what it says only the key is believed."""

    token: Token
    csr: Request


class Topics(msgspec.Struct, rename="camel"):
    """Where the device publishes; `commands` is what it subscribes to."""

    readings: str
    health: str
    status: str
    config_reported: str
    commands: str
    commands_response: str


class Mqtt(msgspec.Struct):
    """How the device reaches the broker: with TLS, showing its certificate."""

    broker: str
    port: int
    topics: Topics


class Provisioned(msgspec.Struct, rename="camel"):
    """What the device shows, the certificates of those who vouch for it and for the broker, and where to go."""

    device_id: UUID
    organization_id: UUID
    certificate: str
    ca_chain: str
    certificate_fingerprint: str
    certificate_serial_number: str
    certificate_expires_at: datetime
    mqtt: Mqtt


_REGISTERED: Final = {
    "token": "a1b2c3d4-….d1e2f3a4-….dr_live_J4kQ7m…",
    "deviceId": "d1e2f3a4-e5f6-7890-abcd-ef1234567890",
    "deviceName": "warehouse-gateway-01",
    "provisionEndpoint": "https://<host>/api/v1/devices/provision",
    "expiresAt": "2024-01-16T10:30:00Z",
}


class CertificateOperations:
    """`/api/v1/certificates`, `/api/v1/devices/registration`, `/api/v1/devices/provision`."""

    def __init__(
        self,
        registrations: Registrations,
        lists: RevocationLists,
        acting: Callable[[], AbstractAsyncContextManager[Any]],
        settings: ApiSettings,
    ) -> None:
        self._registrations = registrations
        self._lists = lists
        self._acting = acting
        self._endpoint = f"{settings.api_url.rstrip('/')}{PROVISION}"
        self._broker = broker_address(settings)

    # ------------------------------------------------------------ first certificates

    @operation(
        PLATFORM, "POST", f"{DEVICES}/registration/tokens", _REGISTERS, status=201, repeatable=True,
        problems=[AUTHORITY_MISSING, DEVICE_NOT_FOUND, REGISTRATION_LIMIT],
        example=Example({"deviceName": "warehouse-gateway-01"}, _REGISTERED),
    )  # fmt: skip
    async def register_device(self, call: Call[Nothing, Nothing, NewRegistration]) -> Registered:
        """Register a device, and get the token that its first certificate is had with

        The device exchanges it at `provisionEndpoint`, once. With `deviceId`, for a device that is there: its earlier
        tokens end.
        """
        body = call.body
        name = None if body.device_name is None else str(body.device_name)
        made = await self._registrations.register(call.connection, call.organisation, name, body.device_id)
        return Registered(made.token, made.device, made.name, self._endpoint, made.expires_at)

    @operation(
        PLATFORM, "POST", PROVISION, PUBLIC, status=201, body_bytes_max=_BODY_BYTES,
        problems=[TOKEN_INVALID, DEVICE_SUSPENDED, AUTHORITY_MISSING, CERTIFICATE_LIMIT],
    )  # fmt: skip
    async def provision_device(self, call: Call[Nothing, Nothing, Provision]) -> Provisioned:
        """Exchange a registration token for a certificate

        The device makes its key itself and keeps it. The token is used up, unless the request is refused.
        """
        made = await self._registrations.provision(call.body.token, call.body.csr, call.address)
        issued = made.issued
        return Provisioned(
            made.device,
            made.organisation,
            issued.presented,
            issued.chain,
            issued.fingerprint,
            issued.serial_number,
            issued.not_after,
            Mqtt(self._broker.host, self._broker.port, _topics(made.organisation, made.device)),
        )

    # ------------------------------------------------------------ what is checked by

    @operation(PLATFORM, "GET", f"{CERTIFICATES}/ca", PUBLIC, content_type=PEM, problems=[NOT_FOUND])
    async def certificate_authorities(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """The certificates of the authorities that vouch for devices and brokers"""
        async with self._acting() as connection:
            found = await trusted(connection)
        if not found:
            raise Problem(NOT_FOUND, NO_AUTHORITY)
        return Reply(found.encode(), headers=_FRESH)

    @operation(
        PLATFORM, "GET", f"{CERTIFICATES}/crl", PUBLIC, content_type=PEM, versioned=True,
        problems=[NOT_FOUND, AUTHORITY_MISSING],
    )  # fmt: skip
    async def revoked_certificates(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[str]:
        """The lists of revoked certificates, one of each authority that issues

        Signed X.509 lists, for a broker that checks certificates by them. They tell of everything that was revoked
        before the request.
        """
        async with self._acting() as connection:
            found = await self._lists.current(connection)
        if not found:
            raise Problem(NOT_FOUND, NO_AUTHORITY)
        version = "-".join(str(one.number) for one in found)
        return Reply("".join(one.pem for one in found).encode(), version=version, headers=_FRESH)


def _topics(organisation: UUID, device: UUID) -> Topics:
    gateway = f"v1/gateways/{organisation}/{device}"
    return Topics(
        readings=f"v1/readings/{organisation}/{device}",
        health=f"{gateway}/health",
        status=f"{gateway}/status",
        config_reported=f"{gateway}/config/reported",
        commands=f"{gateway}/commands",
        commands_response=f"{gateway}/commands/response",
    )
