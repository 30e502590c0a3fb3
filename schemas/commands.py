"""Commands as the API that takes them, the worker that sends them and the devices know them.

Left out: what becomes of one (`schemas/sql`), and who sends it (`workers.commands`).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from schemas import plants, signing

#: Of a whole message, as it is published.
MESSAGE_BYTES_MAX: Final = 8_192
#: Any secret and any time are as long as these: how large a message gets is known before it is sent.
_SOME_SECRET: Final = bytes(plants.SECRET_BYTES)
_SOME_TIME_MS: Final = 10**13 - 1


class Way(StrEnum):
    """Which topic a device listens to."""

    PLANT = "plant"
    GATEWAY = "gateway"
    """What was provisioned over the platform face."""
    OPENSENSE = "opensense"
    """The command is the last level of the topic."""


class TooLargeError(ValueError):
    """The message would have more bytes than one may have."""


def topic(way: Way, organisation: UUID, device: UUID, action: str) -> str:
    """Where a command is published."""
    if way is Way.PLANT:
        return plants.topic(device, "command")
    if way is Way.GATEWAY:
        return f"v1/gateways/{organisation}/{device}/commands"
    return f"opensense/{organisation}/{device}/cmd/{action}"


def message(
    device: UUID,
    command: UUID,
    action: str,
    payload: Mapping[str, Any],
    target: str | None,
    *,
    ts_ms: int,
    secret: bytes | None,
) -> bytes:
    """What is published, in canonical JSON; `sig` stands in it where there is a secret.

    `deviceId` is what it is for, and is signed: the device, or the one behind it that `target` names.
    Raises `TooLargeError`, `NotCanonicalError`.
    """
    whom = target or str(device)
    told: dict[str, Any] = {
        "deviceId": whom, "cmdId": str(command), "ts": ts_ms, "action": action, "payload": payload,
    }  # fmt: skip
    if target is not None:
        told["target"] = target
    if secret is not None:
        told["sig"] = signing.signature(secret, *signing.command_parts(whom, str(command), ts_ms, action, payload))
    made = signing.canonical(told)
    if len(made) > MESSAGE_BYTES_MAX:
        raise TooLargeError(f"the command fills {len(made)} bytes, up to {MESSAGE_BYTES_MAX} are sent")
    return made


def check(device: UUID, command: UUID, action: str, payload: Mapping[str, Any], target: str | None) -> None:
    """Whether it can be sent at all. Raises `TooLargeError`, `NotCanonicalError`."""
    message(device, command, action, payload, target, ts_ms=_SOME_TIME_MS, secret=_SOME_SECRET)
