"""Devices, and where they stand."""

from typing import Any
from uuid import UUID

from runtime.ids import uuid7


async def add_device(connection: Any, organisation: UUID, site: UUID | None, name: str, local_id: str) -> UUID:
    """A device, standing at `site` from now on."""
    device = uuid7()
    await connection.execute(
        "INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES ($1, $2, $3, $4)",
        device,
        organisation,
        name,
        local_id,
    )
    await connection.execute(
        "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from) VALUES ($1, $2, $3, now())",
        device,
        organisation,
        site,
    )
    return device
