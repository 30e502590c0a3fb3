"""Limits that differ from the settings: of a device, a site's gateways, or an organisation."""

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID


async def set_limits(
    connection: Any,
    organisation: UUID,
    values: Mapping[str, int | None],
    *,
    device: UUID | None = None,
    site: UUID | None = None,
) -> dict[str, int | None]:
    """Override limits of a device, of a site's gateways, or of the organisation itself; what is not named stays.

    `values` by name: None is what the settings say, 0 no limit. Returns all of them, as they are now.
    """
    subject = device or site or organisation
    row = await connection.fetchrow(_LIMITS_OF, subject)
    limits: dict[str, int | None] = dict.fromkeys(LIMITS) if row is None else dict(row)
    if not values:
        return limits
    limits |= values
    if any(value is not None for value in limits.values()):
        await connection.execute(_SET_LIMITS, organisation, device, site, *limits.values())
    elif row is not None:
        await connection.execute("DELETE FROM limit_overrides WHERE subject_id = $1", subject)
    return limits


LIMITS: Final = ("requests_per_minute", "readings_per_minute", "bytes_per_day")
_LIMITS_OF: Final = """
SELECT requests_per_minute, readings_per_minute, bytes_per_day FROM limit_overrides
WHERE subject_id = $1 FOR UPDATE
"""
_SET_LIMITS: Final = """
INSERT INTO limit_overrides
    (organisation_id, device_id, site_id, requests_per_minute, readings_per_minute, bytes_per_day)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (subject_id) DO UPDATE SET requests_per_minute = EXCLUDED.requests_per_minute,
    readings_per_minute = EXCLUDED.readings_per_minute, bytes_per_day = EXCLUDED.bytes_per_day, changed_at = now()
"""
