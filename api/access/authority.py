"""Who asks: a credential is looked up for every request, so that a revoked one ends at once.

The look-up is one indexed row beside a query for many; a cache would save little and would have to be told of
every change. Left out: how credentials are made.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg

from api.http.operations import Audience, Caller, Needs, Role
from api.http.problems import (
    FORBIDDEN,
    NOT_FOUND,
    OVERLOADED,
    SCOPE_MISSING,
    Problem,
    auth_required,
    token_invalid,
    unavailable,
)
from runtime.secrets import API_KEY_PREFIX, TokenHasher, plausible_token

OWNER_SCOPE: Final = "owner"

_AUTHENTICATE: Final = "SELECT credential_id, organisation_id, scopes FROM authenticate_api_key($1)"
_NOBODY: Final = Caller(None, None, None, None)


@dataclass(frozen=True)
class Session:
    """A transaction on behalf of a caller, which sees the caller's organisation only."""

    connection: Any
    caller: Caller


class Authority:
    """Opens sessions for those who may have one."""

    def __init__(
        self, pool: "asyncpg.Pool[asyncpg.Record]", hasher: TokenHasher, *, connection_wait_s: float
    ) -> None:
        self._pool = pool
        self._hasher = hasher
        self._connection_wait_s = connection_wait_s

    def presented(self, needs: Needs, headers: Mapping[str, str]) -> str | None:
        """The credential of a request, None where none is needed. Raises its problem; costs no look-up."""
        if needs.audience is Audience.PUBLIC:
            return None
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise auth_required()
        token = token.strip()
        if not plausible_token(token, API_KEY_PREFIX):
            raise token_invalid()
        return token

    @asynccontextmanager
    async def session(
        self, presented: str | None, needs: Needs, organisation: str | None, *, writes: bool
    ) -> AsyncIterator[Session]:
        """A transaction for a request about `organisation`, where its path names one.

        Raises the problems of a credential that is not valid or may not do it, and of a pool that is busy for too
        long. Another organisation is one that is not there.
        """
        try:
            connection = await self._pool.acquire(timeout=self._connection_wait_s)
        except TimeoutError:
            raise unavailable(OVERLOADED, "too many requests are being answered: try again") from None
        try:
            async with connection.transaction(readonly=not writes):
                caller = _NOBODY
                if presented is not None:
                    caller = await self._key(connection, presented, needs)
                    if organisation is not None and _uuid(organisation) != caller.organisation:
                        raise Problem(NOT_FOUND, "no such organisation")
                yield Session(connection, caller)
        finally:
            await self._pool.release(connection)

    async def _key(self, connection: Any, token: str, needs: Needs) -> Caller:
        row = await connection.fetchrow(_AUTHENTICATE, self._hasher.digests(token))
        if row is None:
            raise token_invalid()
        if needs.audience is Audience.USER:
            raise Problem(FORBIDDEN, "an API key is nobody: log in")
        if OWNER_SCOPE not in row["scopes"] and needs.scope not in row["scopes"]:
            raise Problem(SCOPE_MISSING, f"the API key lacks the scope {needs.scope}")
        role = Role.OWNER if OWNER_SCOPE in row["scopes"] else None
        return Caller(row["organisation_id"], role, row["credential_id"], None)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
