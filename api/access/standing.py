"""Whether callers who were let in a while ago would still be: for what lasts longer than a request."""

from collections.abc import Collection
from typing import Any, Final

from api.access.authority import AUTHENTICATE_SESSION
from api.access.scopes import OWNER
from api.http.operations import Caller, Needs, Role

_KEYS: Final = """
SELECT credential_id FROM credentials
WHERE credential_id = ANY ($1::uuid[]) AND kind = 'api_key' AND revoked_at IS NULL
  AND (expires_at IS NULL OR expires_at > now()) AND scopes && $2::text[]
"""


async def still_let_in(connection: Any, callers: Collection[Caller], needs: Needs) -> set[Caller]:
    """Those of `callers`, all of the organisation that the transaction acts for, who may go on.

    Afterwards the transaction may act for one of them.
    """
    keys = {caller.credential for caller in callers if caller.credential is not None}
    rows = await connection.fetch(_KEYS, list(keys), [OWNER, needs.scope]) if keys else []
    valid = {row["credential_id"] for row in rows}
    found = {caller for caller in callers if caller.credential in valid}
    for caller in callers:
        if caller.session is not None and await _may(connection, caller, needs):
            found.add(caller)
    return found


async def _may(connection: Any, caller: Caller, needs: Needs) -> bool:
    row = await connection.fetchrow(AUTHENTICATE_SESSION, caller.session, caller.user, caller.organisation)
    return row is not None and row["role"] is not None and Role[row["role"].upper()] >= needs.role
