"""The log of changes, as an operation. Left out: what is in it (`api.registry.audit`)."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec
import orjson

from api.access.scopes import AUDIT_READ
from api.faces import PLATFORM
from api.http.lists import LIMIT_DEFAULT, Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Role, needs, operation
from api.http.parameters import Name, Span
from api.registry import audit
from runtime.secrets import KeyRing, Seal

PATH: Final = "/api/v1/audit"
_READS: Final = needs(Role.ADMIN, AUDIT_READ)._replace(unowned=True)


class Listed(Span, kw_only=True):
    """Which entries."""

    action: Name | None = None
    subject: Name | None = None
    user_id: UUID | None = None
    credential_id: UUID | None = None
    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class Entry(msgspec.Struct):
    """What was done: by a user, by an API key, or with neither by an operator on the command line.

    `hash` is SHA-256 over the hash of the entry before and this one's content.
    """

    sequence: int
    at: datetime
    user_id: UUID | None
    credential_id: UUID | None
    action: str
    subject: str
    details: dict[str, Any]
    hash: str


class Entries(msgspec.Struct):
    """A page of entries, newest first."""

    data: list[Entry]
    next_cursor: str | None


class AuditOperations:
    """`/api/v1/audit`."""

    def __init__(self, ring: KeyRing) -> None:
        self._cursors: Cursors[int] = Cursors(Seal(ring, "audit cursor"), int)

    @operation(PLATFORM, "GET", PATH, _READS)
    async def audit(self, call: Call[Nothing, Listed, Nothing]) -> Entries:
        """What was changed in the organisation, when, and by whom

        A super-admin who acts for no organisation reads what belongs to none: logins, passwords, super-admins.
        """
        query = call.query
        wanted = audit.Wanted(query.action, query.subject, query.user_id, query.credential_id, query.start, query.end)
        mark = (call.caller.organisation, wanted)
        before = self._cursors.take(mark, query.cursor)
        found = await audit.find(call.connection, wanted, audit.LAST if before is None else before, query.limit + 1)
        rows, more = cut(found, query.limit)
        return Entries(
            [Entry(**_shown(row)) for row in rows], self._cursors.give(mark, rows[-1]["sequence"]) if more else None
        )


def _shown(row: Any) -> dict[str, Any]:
    return {**row, "details": orjson.loads(row["details"]), "hash": row["hash"].hex()}
