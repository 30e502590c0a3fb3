"""Plants as every part knows them: their topics, what they may be, and how what is secret of them is sealed.

A plant is a device with a serial number and a lifecycle of its own. Left out: what is kept of one (`schemas/sql`).
"""

from enum import StrEnum
from typing import Final
from uuid import UUID

#: What its HMAC secret and its package are sealed for, under SLUICE_SECRET_KEYS (`runtime.secrets.Seal`).
SECRET_SEAL: Final = "plant secret"  # noqa: S105
PACKAGE_SEAL: Final = "plant package"
#: For what a password is sealed that is on its way to the broker, and how long it may be.
HANDOVER_SEAL: Final = "broker password"
HANDOVER_HOURS: Final = 24
SECRET_BYTES: Final = 32
#: For so long both secrets of a plant are good once it has been given another.
SECRET_GRACE_MINUTES: Final = 60
#: A package is kept for so long after it was made.
PACKAGE_HOURS: Final = 24
#: Whom the tokens are for that plants log in with at the broker.
TOKEN_AUDIENCE: Final = "sluice-mqtt"  # noqa: S105

#: What has changed of whom the broker knows is told here: the id of a plant or another device.
PLANTS_CHANNEL: Final = "sluice_plants"
#: A command that waits to be sent is told here: its id.
COMMANDS_CHANNEL: Final = "sluice_commands"


class AuthMethod(StrEnum):
    """How a plant proves to the broker who it is."""

    MTLS = "MTLS"
    TOKEN = "TOKEN"  # noqa: S105
    PASSWORD = "PASSWORD"  # noqa: S105


class Lifecycle(StrEnum):
    """How far a plant has come; there is no way back but from SUSPENDED to ACTIVE."""

    PENDING = "PENDING"
    ACTIVE = "ACTIVE"
    SUSPENDED = "SUSPENDED"
    DECOMMISSIONED = "DECOMMISSIONED"


def topic(plant: UUID, kind: str) -> str:
    """Where a plant publishes (`telemetry`, `ack`, `alarm`, `status`, `info`, `config`) or listens (`command`)."""
    return f"cpi/{plant}/{kind}"
