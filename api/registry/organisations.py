"""Organisations, and acting for one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

ROLE: Final = "sluice_app"


@asynccontextmanager
async def acting_for(connection: Any, organisation: UUID) -> AsyncIterator[None]:
    """A transaction that sees and changes what `organisation` owns, and nothing else."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ROLE}")
        await connection.execute("SELECT set_config('sluice.organisation', $1, true)", str(organisation))
        yield


async def add_organisation(connection: Any, organisation: UUID, name: str) -> None:
    await connection.execute("INSERT INTO organisations (organisation_id, name) VALUES ($1, $2)", organisation, name)
