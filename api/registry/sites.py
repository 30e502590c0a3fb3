"""Sites: places at which devices stand."""

from typing import Any
from uuid import UUID

from runtime.ids import uuid7


async def add_site(connection: Any, organisation: UUID, name: str) -> UUID:
    site = uuid7()
    await connection.execute(
        "INSERT INTO sites (site_id, organisation_id, name) VALUES ($1, $2, $3)", site, organisation, name
    )
    return site
