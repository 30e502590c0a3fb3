"""How the certificates of an organisation's devices stand: what is good, ends soon, has ended, was revoked.

Of each device the newest one counts: that the one before was replaced is no news. Left out: what is shown of devices.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

# Each device stands in one of the four.
_STANDING: Final = """
WITH newest AS MATERIALIZED (
    SELECT c.not_after, coalesce(c.revoked_at <= now(), false) AS is_revoked
    FROM certificates c JOIN devices d USING (organisation_id, device_id)
    WHERE c.organisation_id = $1 AND c.replaced_by IS NULL AND d.status <> 'deleted')
SELECT count(*) FILTER (WHERE NOT is_revoked AND not_after > now() + $2::interval) AS active,
       count(*) FILTER (WHERE NOT is_revoked AND not_after > now() AND not_after <= now() + $2::interval)
           AS expiring_soon,
       count(*) FILTER (WHERE NOT is_revoked AND not_after <= now()) AS expired,
       count(*) FILTER (WHERE is_revoked) AS revoked,
       min(not_after) FILTER (WHERE NOT is_revoked AND not_after > now()) - $2::interval AS next_renewal_at
FROM newest
"""
_AT_RISK: Final = """
SELECT c.device_id, d.name, c.not_after
FROM certificates c JOIN devices d USING (organisation_id, device_id)
WHERE c.organisation_id = $1 AND c.replaced_by IS NULL AND d.status <> 'deleted'
  AND c.not_after <= now() + $2::interval AND (c.revoked_at IS NULL OR c.revoked_at > now())
ORDER BY c.not_after, c.device_id LIMIT $3
"""


class CertificateStats(NamedTuple):
    """How many devices have which, and what is to be done next."""

    active: int
    expiring_soon: int
    expired: int
    revoked: int
    next_renewal_at: datetime | None
    """When the next one is due to be renewed; in the past for one that is overdue, None where all have ended."""
    at_risk: Sequence[Any]
    """`device_id`, `name` and `not_after` of those that end soon or have ended, the first to end first."""


async def certificate_stats(
    connection: Any, organisation: UUID, renewal_days: int, at_risk_max: int
) -> CertificateStats:
    """`renewal_days` before its end one is due to be renewed."""
    due = timedelta(days=renewal_days)
    counts = await connection.fetchrow(_STANDING, organisation, due)
    at_risk = await connection.fetch(_AT_RISK, organisation, due, at_risk_max)
    return CertificateStats(**counts, at_risk=at_risk)
