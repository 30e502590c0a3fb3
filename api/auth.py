"""Who asks: an API key is looked up for every request, so that a revoked one ends at once.

The look-up is one indexed row beside a query for many; a cache would save little and would have to be told of
every change. Left out: users and their JWTs.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg

from api.errors import auth_required, scope_missing, token_invalid, unavailable
from runtime.secrets import API_KEY_PREFIX, TokenHasher, plausible_token

OWNER_SCOPE: Final = "owner"
READ_SCOPE: Final = "readings:read"

_AUTHENTICATE: Final = "SELECT credential_id, organisation_id, scopes FROM authenticate_api_key($1)"


@dataclass(frozen=True)
class Session:
    """A transaction that sees one organisation only, on behalf of one credential."""

    connection: Any
    organisation: UUID
    credential: UUID


def presented_key(authorization: str | None) -> str:
    """The API key in an Authorization header. Raises the error to answer with; costs no look-up."""
    if not authorization:
        raise auth_required()
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise auth_required()
    token = token.strip()
    if not plausible_token(token, API_KEY_PREFIX):
        raise token_invalid()
    return token


class Authority:
    """Opens sessions for those who hold a valid key."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", hasher: TokenHasher, *, connection_wait_s: float
    ) -> None:
        self._pool = pool
        self._hasher = hasher
        self._connection_wait_s = connection_wait_s

    @asynccontextmanager
    async def session(self, key: str, scope: str, *, writes: bool = False) -> AsyncIterator[Session]:
        """Raises the errors of a key that is not valid or lacks `scope`, and of a pool that is busy for too long."""
        try:
            connection = await self._pool.acquire(timeout=self._connection_wait_s)
        except TimeoutError:
            raise unavailable("overloaded", "too many requests are being answered: try again") from None
        try:
            async with connection.transaction(readonly=not writes):
                row = await connection.fetchrow(_AUTHENTICATE, self._hasher.digests(key))
                if row is None:
                    raise token_invalid()
                if OWNER_SCOPE not in row["scopes"] and scope not in row["scopes"]:
                    raise scope_missing(scope)
                yield Session(connection, row["organisation_id"], row["credential_id"])
        finally:
            await self._pool.release(connection)
