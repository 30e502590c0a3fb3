"""What became of deleted sites: how far each is erased. Left out: erasing them (`workers.erasure`)."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.http.problems import Problem
from api.problems import ERASURE_NOT_FOUND

_COLUMNS: Final = """
site_id, state, requested_at, finished_at, readings, text_readings, notes, quarantined, devices AS devices_removed"""
# Row-level security leaves the session's organisation, which the index begins with.
_PAGE: Final = f"""
SELECT {_COLUMNS} FROM erasures
WHERE organisation_id = $1 AND ($2::timestamptz IS NULL OR (requested_at, site_id) < ($2, $3::uuid))
ORDER BY requested_at DESC, site_id DESC LIMIT $4
"""  # noqa: S608
_ONE: Final = f"SELECT {_COLUMNS} FROM erasures WHERE site_id = $1"  # noqa: S608


class Place(NamedTuple):
    """Where a page ended."""

    requested_at: datetime
    site: UUID


async def find(connection: Any, organisation: UUID, after: Place | None, limit: int) -> Sequence[Any]:
    """The next `limit` after `after`, those asked for last first."""
    requested_at, site = (None, None) if after is None else after
    rows: list[Any] = await connection.fetch(_PAGE, organisation, requested_at, site, limit)
    return rows


async def get(connection: Any, site: UUID) -> Any:
    """Of one site. Raises the problem of one that was not deleted."""
    row = await connection.fetchrow(_ONE, site)
    if row is None:
        raise Problem(ERASURE_NOT_FOUND)
    return row
