"""People's accounts: logging in and out, sessions, passwords. Left out: HTTP, and what a person may do.

Whatever takes long (a password's hash) is done outside of transactions; what it was done for is looked at again in
the one that follows.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from api.access.authority import Waits, act_for, open_transaction
from api.access.guesses import Guesses, limited
from api.access.passwords import PASSWORD_CHARACTERS, Passwords
from api.access.settings import AccessSettings
from api.access.tokens import AccessTokens, Claims
from api.http.operations import Caller
from api.http.problems import NOT_FOUND, Problem, invalid, token_invalid
from api.problems import INVITATION_NOT_FOUND, LOGIN_FAILED, SESSION_NOT_FOUND
from api.registry import audit, members
from runtime.ids import uuid7
from runtime.secrets import INVITATION_PREFIX, REFRESH_PREFIX, RESET_PREFIX, TokenHasher, make_token, plausible_token

_log = logging.getLogger("sluice.api")

AGENT_CHARACTERS_MAX: Final = 200
#: Of one person; the one that was used longest ago ends for a new one.
SESSIONS_MAX: Final = 50
#: Open at once, of one person: each is a mail.
RESETS_MAX: Final = 3

_BEGIN_LOGIN: Final = "SELECT wait_s, in_flight, user_id, password_hash FROM begin_login($1, $2, $3, $4, $5, $6)"
_END_ATTEMPT: Final = "SELECT end_attempt($1, $2, $3)"
_FORGET_ATTEMPTS: Final = "SELECT forget_attempts($1, $2)"
_BY_EMAIL: Final = "SELECT user_of_email($1)"
_HAS_PASSWORD: Final = "SELECT has_password($1)"  # noqa: S105
_HOLD_USER: Final = "SELECT user_id, email, name, super_admin FROM users WHERE user_id = $1 FOR NO KEY UPDATE"
_USER: Final = "SELECT user_id, email, name, super_admin, created_at FROM users WHERE user_id = $1"
_SET_PASSWORD: Final = "UPDATE users SET password_hash = $2 WHERE user_id = $1"  # noqa: S105

_MEMBERSHIPS: Final = """
SELECT m.organisation_id, o.name, m.role FROM memberships m JOIN organisations o USING (organisation_id)
WHERE m.user_id = $1 ORDER BY m.organisation_id LIMIT $2
"""
# Of a super-admin those count that he is a member of, unless he names another.
_CHOICE: Final = """
SELECT o.organisation_id FROM organisations o
LEFT JOIN memberships m ON m.organisation_id = o.organisation_id AND m.user_id = $1
WHERE CASE WHEN $2::uuid IS NULL THEN m.user_id IS NOT NULL ELSE o.organisation_id = $2 END
ORDER BY m.created_at LIMIT 1
"""

_SESSION: Final = """
INSERT INTO sessions (session_id, user_id, organisation_id, user_agent) VALUES ($1, $2, $3, $4)
"""
_FORGET_SESSIONS: Final = """
DELETE FROM sessions WHERE user_id = $1
    AND (ended_at < now() - interval '30 days' OR last_used_at < now() - $2::interval)
"""
_END_OLDEST: Final = """
UPDATE sessions SET ended_at = now() WHERE session_id IN (
    SELECT session_id FROM sessions WHERE user_id = $1 AND ended_at IS NULL
    ORDER BY last_used_at DESC, session_id DESC OFFSET $2)
"""
_END: Final = """
UPDATE sessions SET ended_at = now() WHERE session_id = $1 AND user_id = $2 AND ended_at IS NULL RETURNING session_id
"""
_END_OTHERS: Final = """
UPDATE sessions SET ended_at = now()
WHERE user_id = $1 AND ended_at IS NULL AND session_id IS DISTINCT FROM $2::uuid
"""
_SESSIONS: Final = """
SELECT session_id, organisation_id, user_agent, created_at, last_used_at FROM sessions
WHERE user_id = $1 AND ended_at IS NULL AND last_used_at > now() - $2::interval
ORDER BY last_used_at DESC, session_id DESC LIMIT $3
"""
_ACT_FOR: Final = "UPDATE sessions SET organisation_id = $2 WHERE session_id = $1 AND ended_at IS NULL"

_REFRESH_PRESENTED: Final = "SELECT token_hash, session_id, user_id FROM refresh_token_presented($1)"
_ADD_REFRESH: Final = """
INSERT INTO refresh_tokens (token_hash, session_id, user_id, expires_at) VALUES ($1, $2, $3, now() + $4::interval)
"""
_USE_REFRESH: Final = """
UPDATE refresh_tokens SET used_at = now() WHERE token_hash = $1 AND used_at IS NULL AND expires_at > now()
RETURNING session_id
"""
_WAS_USED: Final = "SELECT used_at IS NOT NULL FROM refresh_tokens WHERE token_hash = $1"
_FORGET_REFRESH: Final = "DELETE FROM refresh_tokens WHERE session_id = $1 AND expires_at < now()"
_USE_SESSION: Final = """
UPDATE sessions SET last_used_at = now() WHERE session_id = $1 AND ended_at IS NULL RETURNING organisation_id
"""

_INVITATION_PRESENTED: Final = """
SELECT i.invitation_id, i.organisation_id, i.email, user_of_email(i.email) IS NOT NULL AS known
FROM invitation_presented($1) i
"""
_ADD_USER: Final = "INSERT INTO users (user_id, email, name, password_hash) VALUES ($1, $2, $3, $4)"

_RESET_PRESENTED: Final = "SELECT token_hash, user_id FROM password_reset_presented($1)"
_ADD_RESET: Final = """
INSERT INTO password_resets (token_hash, user_id, expires_at) VALUES ($1, $2, now() + $3::interval)
"""
_OPEN_RESETS: Final = """
SELECT count(*) FROM password_resets WHERE user_id = $1 AND used_at IS NULL AND expires_at > now()
"""
_USE_RESET: Final = """
UPDATE password_resets SET used_at = now() WHERE token_hash = $1 AND used_at IS NULL AND expires_at > now()
RETURNING user_id
"""
_FORGET_RESETS: Final = "DELETE FROM password_resets WHERE user_id = $1"


class LoggedIn(NamedTuple):
    """A session's tokens; the refresh token is told once."""

    access: str
    refresh: str
    user: UUID
    organisation: UUID | None


class _Opened(NamedTuple):
    claims: Claims
    refresh: str


class Accounts:
    """What people do about themselves; every method is a request of its own."""

    def __init__(
        self,
        pool: "asyncpg.Pool[asyncpg.Record]",
        hasher: TokenHasher,
        passwords: Passwords,
        tokens: AccessTokens,
        guesses: Guesses,
        logins: Guesses,
        settings: AccessSettings,
        *,
        waits: Waits,
    ) -> None:
        self.passwords = passwords
        self._pool = pool
        self._hasher = hasher
        self._tokens = tokens
        self._guesses = guesses
        self._logins = logins
        self._settings = settings
        self._waits = waits
        self._idle = timedelta(days=settings.auth_session_idle_days)

    # ------------------------------------------------------------ sessions

    async def log_in(
        self, email: str, password: str, organisation: UUID | None, address: bytes, agent: str
    ) -> LoggedIn:
        """Raises the problems of a wrong e-mail or password, of too many, and of no such organisation."""
        user = await self.prove(email, password, address)
        async with self.acting(user=user.user) as connection:
            await self._still(connection, user)
            opened = await self.open_session(connection, user.user, organisation, agent)
        return await self.told(opened)

    async def prove(self, email: str, password: str, address: bytes) -> "Proven":
        """Who has this password, through all that slows guessing down. Raises the problems of `log_in`."""
        self.count_attempt(address)
        account = self._account(email)
        user, known = await self._begin(email, account, address)
        try:
            right = await self.passwords.verify(known, password)
        except Problem:
            # It was not looked at.
            await self._end_attempt(account, address, failed=False)
            raise
        if not right:
            await self._end_attempt(account, address, failed=True)
            raise Problem(LOGIN_FAILED)
        async with self.acting() as connection:
            await connection.execute(_FORGET_ATTEMPTS, account, address)
        return Proven(user, known)

    async def _begin(self, email: str, account: bytes, address: bytes) -> tuple[UUID, str]:
        """Counts an attempt: whose it is, and the hash to judge by. Raises the problem of too many."""
        settings = self._settings
        async with self.acting() as connection:
            wait_s, in_flight, user, known = await connection.fetchrow(
                _BEGIN_LOGIN,
                email,
                account,
                address,
                settings.auth_login_failures_max,
                timedelta(seconds=settings.auth_lockout_s),
                settings.auth_login_pressure_addresses,
            )
        if in_flight:
            raise limited("other logins to this account from this address are still being checked: try again", wait_s)
        if wait_s:
            raise limited("too many failed logins from this address: other addresses are not locked out", wait_s)
        return user, known

    async def _end_attempt(self, account: bytes, address: bytes, *, failed: bool) -> None:
        async with self.acting() as connection:
            await connection.execute(_END_ATTEMPT, account, address, failed)

    def _account(self, email: str) -> bytes:
        """What attempts are counted under."""
        return self._hasher.digest(f"login {email.lower()}")

    async def open_session(self, connection: Any, user: UUID, organisation: UUID | None, agent: str) -> "_Opened":
        """A session in a transaction that acts for the user alone. Raises the problem of no such organisation."""
        chosen = await connection.fetchval(_CHOICE, user, organisation)
        if chosen is None and organisation is not None:
            raise Problem(NOT_FOUND, "no such organisation")
        session = uuid7()
        await connection.execute(_FORGET_SESSIONS, user, self._idle)
        await connection.execute(_SESSION, session, user, chosen, _shown(agent))
        await connection.execute(_END_OLDEST, user, SESSIONS_MAX)
        refresh = await self._add_refresh(connection, session, user)
        await audit.record(connection, "session.started", session)
        return _Opened(Claims(user, session, chosen), refresh)

    async def told(self, opened: "_Opened") -> LoggedIn:
        """After the session is committed: making a token may take a look at the keys."""
        access = await self._tokens.issue(opened.claims)
        return LoggedIn(access, opened.refresh, opened.claims.user, opened.claims.organisation)

    async def refresh(self, token: str, address: bytes) -> LoggedIn:
        """New tokens for one that is used up by it; a second use ends the session. Raises `token_invalid`."""
        self._guesses.check(address)
        if plausible_token(token, REFRESH_PREFIX):
            async with self.acting() as connection:
                opened = await self._rotate(connection, token)
            if opened is not None:
                return await self.told(opened)
        self._guesses.count(address)
        raise token_invalid()

    async def _rotate(self, connection: Any, token: str) -> "_Opened | None":
        found = await connection.fetchrow(_REFRESH_PRESENTED, self._hasher.digests(token))
        if found is None:
            return None
        digest, session, user = found
        await act_for(connection, user=user)
        if await connection.fetchval(_USE_REFRESH, digest) is None:
            if await connection.fetchval(_WAS_USED, digest) and await connection.fetchval(_END, session, user):
                await audit.record(connection, "session.reuse_detected", session)
                _log.warning("a refresh token came twice: its session was ended", extra={"session": str(session)})
            return None
        used = await connection.fetchrow(_USE_SESSION, session)
        if used is None:
            return None
        chosen = used["organisation_id"]
        if chosen is not None:
            # None where he is no longer a member: he may choose another.
            chosen = await connection.fetchval(_CHOICE, user, chosen)
        await connection.execute(_FORGET_REFRESH, session)
        return _Opened(Claims(user, session, chosen), await self._add_refresh(connection, session, user))

    async def _add_refresh(self, connection: Any, session: UUID, user: UUID) -> str:
        token = make_token(REFRESH_PREFIX)
        await connection.execute(_ADD_REFRESH, self._hasher.digest(token), session, user, self._idle)
        return token

    async def switch(self, connection: Any, caller: Caller, organisation: UUID | None) -> str:
        """An access token for another organisation, or for none. Raises the problem of one that is not there."""
        user, session = person(caller)
        if organisation is not None and await connection.fetchval(_CHOICE, user, organisation) is None:
            raise Problem(NOT_FOUND, "no such organisation")
        await connection.execute(_ACT_FOR, session, organisation)
        return await self._tokens.issue(Claims(user, session, organisation))

    async def sessions(self, connection: Any, user: UUID) -> list[Any]:
        rows: list[Any] = await connection.fetch(_SESSIONS, user, self._idle, SESSIONS_MAX)
        return rows

    async def end_session(self, connection: Any, user: UUID, session: UUID) -> None:
        """Raises the problem of a session that is not there."""
        if await connection.fetchval(_END, session, user) is None:
            raise Problem(SESSION_NOT_FOUND)
        await audit.record(connection, "session.ended", session)

    # ------------------------------------------------------------ passwords

    async def change_password(self, caller: Caller, current: str, new: str, address: bytes) -> None:
        """All other sessions end. Raises the problems of a wrong password and of too many."""
        user, session = person(caller)
        async with self.acting(user=user) as connection:
            email = (await connection.fetchrow(_USER, user))["email"]
        proven = await self.prove(email, current, address)
        hashed = await self.passwords.hash(new)
        async with self.acting(user=user) as connection:
            await self._still(connection, proven)
            await connection.execute(_SET_PASSWORD, user, hashed)
            await end_former(connection, user, but=session)
            await audit.record(connection, "password.changed", user)

    async def make_reset(self, email: str) -> str | None:
        """The secret of a link; None for an e-mail that is nobody's, or for whom there are enough."""
        async with self.acting() as connection:
            user = await connection.fetchval(_BY_EMAIL, email)
            if user is None:
                return None
            await act_for(connection, user=user)
            await connection.fetchrow(_HOLD_USER, user)
            if await connection.fetchval(_OPEN_RESETS, user) >= RESETS_MAX:
                return None
            minutes = timedelta(minutes=self._settings.auth_reset_minutes)
            return await add_reset(connection, self._hasher, user, minutes)

    async def reset_password(self, token: str, new: str, address: bytes) -> None:
        """All sessions end. Raises the problems of a link that is not valid, and of too many."""
        self._guesses.check(address)
        if not plausible_token(token, RESET_PREFIX) or await self._user_of_reset(token) is None:
            self._guesses.count(address)
            raise _no_link()
        hashed = await self.passwords.hash(new)
        async with self.acting() as connection:
            found = await connection.fetchrow(_RESET_PRESENTED, self._hasher.digests(token))
            if found is None:
                raise _no_link()
            digest, user = found
            await act_for(connection, user=user)
            await connection.fetchrow(_HOLD_USER, user)
            if await connection.fetchval(_USE_RESET, digest) is None:
                raise _no_link()
            await connection.execute(_SET_PASSWORD, user, hashed)
            await end_former(connection, user)
            email = (await connection.fetchrow(_USER, user))["email"]
            await audit.record(connection, "password.reset", user)
            await self._forget_attempts(connection, email, address)

    async def _forget_attempts(self, connection: Any, email: str, address: bytes) -> None:
        """Who has shown otherwise whose he is may log in. The transaction acts for nobody from then on."""
        await act_for(connection)
        await connection.execute(_FORGET_ATTEMPTS, self._account(email), address)

    async def _user_of_reset(self, token: str) -> UUID | None:
        async with self.acting() as connection:
            row = await connection.fetchrow(_RESET_PRESENTED, self._hasher.digests(token))
        return None if row is None else row["user_id"]

    # ------------------------------------------------------------ invitations

    async def accept(self, token: str, name: str | None, password: str, address: bytes, agent: str) -> LoggedIn:
        """A session of who is invited: of a new account, or with the password of the one that has the e-mail.

        Raises the problems of an invitation that is not open, of a member, and of `log_in`.
        """
        self._guesses.check(address)
        invitation = await self._invitation(token)
        if invitation is None:
            self._guesses.count(address)
            raise Problem(INVITATION_NOT_FOUND)
        email, organisation = invitation["email"], invitation["organisation_id"]
        if invitation["known"]:
            proven, new = await self.prove(email, password, address), None
        else:
            new = NewUser(uuid7(), email, _name_given(name), await self.passwords.hash(_long_enough(password)))
            proven = Proven(new.user, new.password_hash)
        async with self.acting(organisation=organisation, user=proven.user) as connection:
            if new is not None:
                await _add_user(connection, new)
            if await members.accept(connection, organisation, invitation["invitation_id"], proven.user) is None:
                raise Problem(INVITATION_NOT_FOUND)
            await act_for(connection, user=proven.user)
            await self._still(connection, proven)
            opened = await self.open_session(connection, proven.user, organisation, agent)
            if new is not None:
                await self._forget_attempts(connection, email, address)
        return await self.told(opened)

    def count_attempt(self, address: bytes) -> None:
        """Of what anybody may ask for. Raises the problem of too many."""
        self._logins.check(address)
        self._logins.count(address)

    async def _invitation(self, token: str) -> Any:
        if not plausible_token(token, INVITATION_PREFIX):
            return None
        async with self.acting() as connection:
            return await connection.fetchrow(_INVITATION_PRESENTED, self._hasher.digests(token))

    # ------------------------------------------------------------ parts

    @asynccontextmanager
    async def acting(self, *, organisation: UUID | None = None, user: UUID | None = None) -> AsyncIterator[Any]:
        async with open_transaction(self._pool, self._waits) as connection:
            await act_for(connection, organisation=organisation, user=user)
            yield connection

    async def _still(self, connection: Any, proven: "Proven") -> None:
        """Raises the problem of a password that was changed while it was being checked."""
        await connection.fetchrow(_HOLD_USER, proven.user)
        if not await connection.fetchval(_HAS_PASSWORD, proven.password_hash):
            raise Problem(LOGIN_FAILED)


class Proven(NamedTuple):
    """Who gave the right password, and which one that was."""

    user: UUID
    password_hash: str


class NewUser(NamedTuple):
    """An account to be made."""

    user: UUID
    email: str
    name: str
    password_hash: str


def person(caller: Caller) -> tuple[UUID, UUID]:
    """The user and the session. Raises `RuntimeError` in an operation that is not declared for people."""
    if caller.user is None or caller.session is None:
        raise RuntimeError("the operation is not declared for people")
    return caller.user, caller.session


async def add_reset(connection: Any, hasher: TokenHasher, user: UUID, lasts: timedelta) -> str:
    """The secret of a link, in a transaction that acts for the user."""
    token = make_token(RESET_PREFIX)
    await connection.execute(_ADD_RESET, hasher.digest(token), user, lasts)
    await audit.record(connection, "password.reset_issued", user)
    return token


async def end_former(connection: Any, user: UUID, *, but: UUID | None = None) -> None:
    """What a former password, or a link, let in is let in no more: after a new one, in the user's transaction."""
    await connection.execute(_END_OTHERS, user, but)
    await connection.execute(_FORGET_RESETS, user)


async def user_of(connection: Any, user: UUID) -> Any:
    return await connection.fetchrow(_USER, user)


async def memberships_of(connection: Any, user: UUID, limit: int) -> list[Any]:
    """In a transaction that acts for the user alone."""
    rows: list[Any] = await connection.fetch(_MEMBERSHIPS, user, limit)
    return rows


async def _add_user(connection: Any, new: NewUser) -> None:
    try:
        await connection.execute(_ADD_USER, *new)
    except asyncpg.UniqueViolationError:
        raise Problem(LOGIN_FAILED, "an account with this e-mail was made meanwhile: give its password") from None


def _no_link() -> Problem:
    return invalid("token", "is no link's, or the link was used or is too old")


def _long_enough(password: str) -> str:
    least = PASSWORD_CHARACTERS[0]
    if len(password) < least:
        raise invalid("password", f"must have {least} characters at least")
    return password


def _name_given(name: str | None) -> str:
    if name is None:
        raise invalid("name", "is missing: a new account has one")
    return name


def _shown(agent: str) -> str:
    """What a client says it is, as far as it can be shown."""
    return "".join(character for character in agent if character.isprintable())[:AGENT_CHARACTERS_MAX]
