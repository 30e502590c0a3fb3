"""The log of changes: who did what to which thing, appended in the transaction that does it, chained by hashes.

Whose doing it is follows from the transaction (`api.access.authority`). Left out: the chain itself, which the
database makes, and its verification (`deploy.auditing`).
"""

from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson

from runtime.secrets import without_secrets

_APPEND: Final = "SELECT append_audit($1, $2, $3::text::jsonb)"
_LISTED: Final = """
SELECT sequence, at, user_id, credential_id, action, subject, details::text AS details, hash FROM audit_log
WHERE chain = coalesce(current_organisation(), '00000000-0000-0000-0000-000000000000') AND sequence < $1
  AND ($2::text IS NULL OR action = $2) AND ($3::text IS NULL OR subject = $3)
  AND ($4::uuid IS NULL OR user_id = $4) AND ($5::uuid IS NULL OR credential_id = $5)
  AND at >= coalesce($6::timestamptz, '-infinity') AND at < coalesce($7::timestamptz, 'infinity')
ORDER BY sequence DESC LIMIT $8
"""
LAST: Final = 2**63 - 1


async def record(connection: Any, action: str, subject: object, /, **details: Any) -> None:
    """Append what the transaction did, as its last step: `site.created`, the thing's id, and what is worth knowing.

    Never a secret: everybody who may read the log reads the details.
    """
    told = orjson.dumps(details, default=str).decode()
    # What a thing is called, or was looked for by, may be anything.
    await connection.execute(_APPEND, action, without_secrets(str(subject)), without_secrets(told))


class Wanted(NamedTuple):
    """Which entries; None: any."""

    action: str | None = None
    subject: str | None = None
    user: UUID | None = None
    credential: UUID | None = None
    start: datetime | None = None
    end: datetime | None = None


async def find(connection: Any, wanted: Wanted, before: int, limit: int) -> list[Any]:
    """Entries before a place in its chain, newest first: of the transaction's organisation, or of what has none.

    Row-level security shows the latter to super-admins alone.
    """
    rows: list[Any] = await connection.fetch(_LISTED, before, *wanted, limit)
    return rows
