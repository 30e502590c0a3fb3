"""Who asks: a credential is looked up for every request, so that a revoked key and an ended session end at once.

The look-up is one indexed row beside a query for many; a cache would save little and would have to be told of
every change. Left out: how credentials are made.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self
from uuid import UUID

import asyncpg

from api.access.background import Background
from api.access.guesses import Guesses
from api.access.scopes import OWNER
from api.access.shares import Shares
from api.access.signing import Signatures
from api.access.tokens import AccessTokens, Claims, is_access_token, is_jwt
from api.http.operations import Audience, Caller, Needs, Role
from api.http.problems import (
    FORBIDDEN,
    NOT_FOUND,
    OVERLOADED,
    SCOPE_MISSING,
    TOKEN_INVALID,
    Problem,
    auth_required,
    token_invalid,
    unavailable,
)
from api.settings import ApiSettings
from runtime.postgres import cut_after
from runtime.secrets import API_KEY_PREFIX, GATEWAY_PREFIX, TokenHasher, plausible_jwt, plausible_token

_AUTHENTICATE: Final = "SELECT credential_id, organisation_id, scopes, unused FROM authenticate_api_key($1)"
AUTHENTICATE_SESSION: Final = "SELECT role, super_admin FROM authenticate_session($1, $2, $3)"
_USED: Final = """
UPDATE credentials SET last_used_at = now()
WHERE credential_id = $1 AND (last_used_at IS NULL OR last_used_at < now() - interval '1 hour')
"""
_KNOWN_MAX: Final = 1_024
_AUTHENTICATE_GATEWAY: Final = "SELECT credential_id, organisation_id, site_id FROM authenticate_gateway($1)"
_FOR_MACHINES: Final = "it takes the token of the site's server or of one of its edge devices"
_NOBODY: Final = Caller(None, None, None, None)


#: A batch begins no further statement once three were as long as one may be; each may be that long.
_STATEMENTS_LONG: Final = 5


class Waits(NamedTuple):
    """For how many seconds a request waits: for a session of the database, and for all it does in a transaction."""

    session_s: float
    transaction_s: float

    @classmethod
    def of(cls, settings: ApiSettings) -> Self:
        statement_s = settings.api_statement_timeout_ms / 1000
        return cls(settings.api_connection_wait_ms / 1000, _STATEMENTS_LONG * statement_s)


@dataclass(frozen=True)
class Session:
    """A transaction on behalf of a caller, which sees the caller's organisation only."""

    connection: Any
    """None for an operation that opens its own."""
    caller: Caller


class Authority:
    """Opens sessions for those who may have one."""

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        hasher: TokenHasher,
        tokens: AccessTokens,
        guesses: Guesses,
        signatures: Signatures,
        background: Background,
        *,
        waits: Waits,
    ) -> None:
        self._pool = pool
        self._hasher = hasher
        self._tokens = tokens
        self._guesses = guesses
        self._signatures = signatures
        self._background = background
        self._waits = waits
        self._shares = Shares(pool, waits.session_s)
        self._known: dict[bytes, None] = {}
        """Hashes of keys that were good of late: whose address makes guesses, too, may go on using his own."""

    def presented(self, needs: Needs, headers: Mapping[str, str], address: bytes) -> str | None:
        """The credential of a request, None where none is needed. Raises its problem; costs no look-up."""
        if needs.audience is Audience.PUBLIC:
            return None
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise auth_required()
        token = token.strip()
        if not _plausible(token, needs):
            self._guesses.check(address)
            self._guesses.count(address)
            raise token_invalid()
        return token

    @asynccontextmanager
    async def session(
        self, presented: str | None, needs: Needs, organisation: str | None, address: bytes, *, writes: bool
    ) -> AsyncIterator[Session]:
        """A transaction for a request about `organisation`, where its path names one.

        Raises the problems of a credential that is not valid or may not do it, and of a pool that is busy for too
        long. Another organisation is one that is not there.
        """
        if presented is None:
            yield Session(None, _NOBODY)
            return
        claims = await self._claims(presented, needs, address)
        held: asyncio.Semaphore | None = None
        try:
            while True:
                async with open_transaction(self._pool, self._waits, writes=writes) as connection:
                    caller = await self._caller(connection, presented, claims, needs, organisation, address)
                    if not needs.keeps:
                        break
                    share = held or self._shares.of(caller.organisation)
                    if held is None and not share.locked():
                        await share.acquire()
                        held = share
                    if held is not None:
                        yield Session(connection, caller)
                        return
                # Waited for without a session, which others may have meanwhile.
                await self._shares.wait(share)
                held = share
        finally:
            if held is not None:
                held.release()
        yield Session(None, caller)

    async def _caller(
        self,
        connection: Any,
        presented: str,
        claims: Claims | None,
        needs: Needs,
        organisation: str | None,
        address: bytes,
    ) -> Caller:
        if claims is not None:
            return await self._person(connection, claims, needs, organisation)
        caller = await self._stranger(connection, presented, needs, address)
        if organisation is not None and _uuid(organisation) != caller.organisation:
            raise Problem(NOT_FOUND, "no such organisation")
        return caller

    async def _claims(self, token: str, needs: Needs, address: bytes) -> Claims | None:
        """What an access token says; None for a credential of another kind."""
        if not is_jwt(token) or (needs.audience is Audience.SITE and not is_access_token(token)):
            return None
        try:
            return await self._tokens.read(token)
        except Problem:
            self._guesses.check(address)
            self._guesses.count(address)
            raise

    async def _person(self, connection: Any, claims: Claims, needs: Needs, organisation: str | None) -> Caller:
        wanted = claims.organisation if organisation is None else _uuid(organisation)
        if needs.audience is Audience.USER:
            wanted = None
        row = await connection.fetchrow(AUTHENTICATE_SESSION, claims.session, claims.user, wanted)
        if row is None:
            raise token_invalid()
        if needs.audience is Audience.SITE:
            raise Problem(FORBIDDEN, _FOR_MACHINES)
        person = Caller(None, None, None, claims.user, session=claims.session, super_admin=row["super_admin"])
        if needs.audience is Audience.USER:
            return person
        if row["role"] is None and organisation is not None:
            raise Problem(NOT_FOUND, "no such organisation")
        if wanted is None and needs.unowned and person.super_admin:
            return person
        if row["role"] is None:
            raise Problem(FORBIDDEN, "act for an organisation of yours first: POST /api/v1/auth/organisation")
        role = Role[row["role"].upper()]
        if role < needs.role:
            raise Problem(FORBIDDEN, f"it takes the role {needs.role.name.lower()}: you are {role.name.lower()}")
        return person._replace(organisation=wanted, role=role)

    async def _stranger(self, connection: Any, token: str, needs: Needs, address: bytes) -> Caller:
        """Who holds a token that has to be looked up: an address that guesses too often is not asked about."""
        digest = self._hasher.digest(token)
        if digest not in self._known:
            await self._check_guesses(connection, token, address)
        try:
            if needs.audience is Audience.SITE and not token.startswith(API_KEY_PREFIX):
                caller = await self._gateway(connection, token)
            else:
                caller = await self._key(connection, token, needs)
        except Problem as problem:
            if problem.kind is TOKEN_INVALID:
                self._known.pop(digest, None)
                if not await self._signatures.holds(connection, token):
                    self._guesses.count(address)
            raise
        self._known[digest] = None
        if len(self._known) > _KNOWN_MAX:
            del self._known[next(iter(self._known))]
        return caller

    async def _check_guesses(self, connection: Any, token: str, address: bytes) -> None:
        """Raises the problem of an address that guesses too often, but for what nobody can have guessed."""
        try:
            self._guesses.check(address)
        except Problem:
            if not await self._signatures.holds(connection, token):
                raise

    async def _gateway(self, connection: Any, token: str) -> Caller:
        row = await connection.fetchrow(_AUTHENTICATE_GATEWAY, self._hasher.digests(token))
        if row is None:
            raise token_invalid()
        return Caller(row["organisation_id"], None, row["credential_id"], None, row["site_id"])

    async def _key(self, connection: Any, token: str, needs: Needs) -> Caller:
        row = await connection.fetchrow(_AUTHENTICATE, self._hasher.digests(token))
        if row is None:
            raise token_invalid()
        if row["unused"]:
            self._background.start(self._touch(row["organisation_id"], row["credential_id"]))
        if needs.audience is Audience.SITE:
            raise Problem(FORBIDDEN, _FOR_MACHINES)
        scopes = frozenset(row["scopes"])
        if needs.audience is Audience.USER:
            raise Problem(FORBIDDEN, "an API key is nobody: log in")
        wanted = OWNER if needs.role is Role.OWNER else needs.scope
        if OWNER not in scopes and wanted not in scopes:
            raise Problem(SCOPE_MISSING, f"the API key lacks the scope {wanted}")
        role = Role.OWNER if OWNER in scopes else None
        return Caller(row["organisation_id"], role, row["credential_id"], None, scopes=scopes)

    async def _touch(self, organisation: UUID, credential: UUID) -> None:
        """Note that a key is used: beside its request, which may be one that only reads."""
        async with open_transaction(self._pool, self._waits) as connection:
            await act_for(connection, organisation=organisation)
            await connection.execute(_USED, credential)


@asynccontextmanager
async def open_transaction(
    pool: "asyncpg.Pool[asyncpg.Record]", waits: Waits, *, writes: bool = True
) -> AsyncIterator[Any]:
    """A transaction that acts for nobody yet. Raises the problem of a pool that is busy for too long."""
    try:
        connection = await pool.acquire(timeout=waits.session_s)
    except TimeoutError:
        raise unavailable(OVERLOADED, "too many requests are being answered: try again") from None
    try:
        with cut_after(connection, waits.transaction_s):
            async with connection.transaction(readonly=not writes):
                yield connection
    finally:
        await pool.release(connection)


@asynccontextmanager
async def acting_for(pool: "asyncpg.Pool[asyncpg.Record]", waits: Waits, organisation: UUID) -> AsyncIterator[Any]:
    """A short transaction that reads what is this organisation's, after the one that let its caller in."""
    async with open_transaction(pool, waits, writes=False) as connection:
        await act_for(connection, organisation=organisation)
        yield connection


async def act_for(connection: Any, *, organisation: UUID | None = None, user: UUID | None = None) -> None:
    """From now on the transaction sees what is of this organisation, or else of this user."""
    await connection.execute(
        "SELECT set_config('sluice.organisation', $1, true), set_config('sluice.user', $2, true)",
        "" if organisation is None else str(organisation),
        "" if user is None else str(user),
    )


def _plausible(token: str, needs: Needs) -> bool:
    if plausible_jwt(token) or plausible_token(token, API_KEY_PREFIX):
        return True
    return needs.audience is Audience.SITE and plausible_token(token, GATEWAY_PREFIX)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
