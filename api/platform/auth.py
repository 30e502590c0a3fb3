"""Logging in and out, sessions and passwords, as operations. Left out: what they do (`api.access.accounts`)."""

from datetime import datetime
from typing import Annotated, Final, Literal
from uuid import UUID

import msgspec

from api.access import accounts
from api.access.accounts import Accounts, LoggedIn, person
from api.access.background import Background
from api.access.mail import Mailer
from api.access.passwords import NewPassword, Password
from api.access.signing import public_keys
from api.access.tokens import AccessTokens
from api.faces import PLATFORM
from api.http.operations import PUBLIC, USER, Call, Example, Nothing, Reply, operation
from api.http.problems import NOT_FOUND, TOKEN_INVALID
from api.http.spelt import STORABLE
from api.problems import INVITATION_NOT_FOUND, LOGIN_FAILED, SESSION_NOT_FOUND
from api.registry.texts import Email, Name

PATH: Final = "/api/v1/auth"
#: Of the page that links open.
ACCOUNT_PATH: Final = "/account"
MEMBERSHIPS_MAX: Final = 200
#: Well within the day that a key is published before it signs.
_KEYS_HEADERS: Final = {"Cache-Control": "public, max-age=300"}
_BODY_BYTES: Final = 8_000
_USER_ALONE: Final = USER._replace(keeps=False)

Secret = Annotated[str, msgspec.Meta(max_length=128, extra_json_schema=STORABLE)]
RoleName = Literal["owner", "admin", "member", "viewer"]


class Login(msgspec.Struct, forbid_unknown_fields=True):
    """Who logs in, and for which organisation: by default the first one joined."""

    email: Email
    password: Password
    organisation_id: UUID | None = None


class Refresh(msgspec.Struct, forbid_unknown_fields=True):
    """A refresh token, which is used up by it."""

    refresh_token: Secret


class PasswordChange(msgspec.Struct, forbid_unknown_fields=True):
    """The present password and the new one."""

    current_password: Password
    new_password: NewPassword


class PasswordForgotten(msgspec.Struct, forbid_unknown_fields=True):
    """Whose password it is."""

    email: Email


class PasswordReset(msgspec.Struct, forbid_unknown_fields=True):
    """The secret of a link, and the new password."""

    token: Secret
    new_password: NewPassword


class Acceptance(msgspec.Struct, forbid_unknown_fields=True):
    """The secret of an invitation's link, and the password of the account, which is made if there is none."""

    token: Secret
    password: Password
    name: Name | None = None
    """Of a new account."""


class Choice(msgspec.Struct, forbid_unknown_fields=True):
    """Which organisation to act for; null: none."""

    organisation_id: UUID | None


class Tokens(msgspec.Struct):
    """An access token for `expires_in` seconds, and the refresh token that the next one is got with."""

    access_token: str
    expires_in: int
    refresh_token: str
    user_id: UUID
    organisation_id: UUID | None
    token_type: str = "Bearer"  # noqa: S105


class AccessToken(msgspec.Struct):
    """An access token for `expires_in` seconds."""

    access_token: str
    expires_in: int
    organisation_id: UUID | None
    token_type: str = "Bearer"  # noqa: S105


class Membership(msgspec.Struct):
    """An organisation, and what one is there."""

    organisation_id: UUID
    name: str
    role: RoleName


class Me(msgspec.Struct):
    """Who one is, and where."""

    user_id: UUID
    email: str
    name: str
    super_admin: bool
    created_at: datetime
    session_id: UUID
    memberships: list[Membership]


class One(msgspec.Struct):
    """Which session."""

    id: UUID


class Session(msgspec.Struct):
    """A login that has not ended."""

    session_id: UUID
    organisation_id: UUID | None
    user_agent: str
    created_at: datetime
    last_used_at: datetime
    current: bool


class Sessions(msgspec.Struct):
    """All of a person's, the one used last first."""

    data: list[Session]


class KeySet(msgspec.Struct):
    """The public keys that tokens are signed with (RFC 7517)."""

    keys: list[dict[str, str]]


class AuthOperations:
    """`/api/v1/auth`, and the key set."""

    def __init__(
        self, people: Accounts, tokens: AccessTokens, mailer: Mailer, background: Background, api_url: str
    ) -> None:
        self._people = people
        self._tokens = tokens
        self._mailer = mailer
        self._background = background
        self._api_url = api_url

    @operation(
        PLATFORM, "POST", f"{PATH}/login", PUBLIC, problems=[LOGIN_FAILED, NOT_FOUND],
        body_bytes_max=_BODY_BYTES,
        example=Example({"email": "ada@example.org", "password": "correct horse battery"}),
    )  # fmt: skip
    async def login(self, call: Call[Nothing, Nothing, Login]) -> Tokens:
        """Log in

        Who fails too often is told to wait, from the address that he fails from.
        """
        body = call.body
        return self._told(
            await self._people.log_in(str(body.email), body.password, body.organisation_id, call.address, call.agent)
        )

    @operation(PLATFORM, "POST", f"{PATH}/refresh", PUBLIC, problems=[TOKEN_INVALID], body_bytes_max=_BODY_BYTES)
    async def refresh(self, call: Call[Nothing, Nothing, Refresh]) -> Tokens:
        """Get new tokens for a refresh token, which is used up

        A refresh token that comes a second time ends its session: somebody else has it.
        """
        return self._told(await self._people.refresh(call.body.refresh_token, call.address))

    @operation(PLATFORM, "POST", f"{PATH}/logout", USER, status=204)
    async def logout(self, call: Call[Nothing, Nothing, Nothing]) -> None:
        """End this session"""
        user, session = person(call.caller)
        await self._people.end_session(call.connection, user, session)

    @operation(PLATFORM, "GET", f"{PATH}/me", USER)
    async def me(self, call: Call[Nothing, Nothing, Nothing]) -> Me:
        """Who one is, and in which organisations"""
        user, session = person(call.caller)
        row = await accounts.user_of(call.connection, user)
        joined = await accounts.memberships_of(call.connection, user, MEMBERSHIPS_MAX)
        return Me(**row, session_id=session, memberships=[Membership(*one) for one in joined])

    @operation(PLATFORM, "POST", f"{PATH}/organisation", USER, problems=[NOT_FOUND])
    async def choose_organisation(self, call: Call[Nothing, Nothing, Choice]) -> AccessToken:
        """Act for another organisation from now on, or for none"""
        organisation = call.body.organisation_id
        token = await self._people.switch(call.connection, call.caller, organisation)
        return AccessToken(token, self._tokens.lifetime_s, organisation)

    @operation(PLATFORM, "GET", f"{PATH}/sessions", USER)
    async def sessions(self, call: Call[Nothing, Nothing, Nothing]) -> Sessions:
        """One's own sessions"""
        user, session = person(call.caller)
        rows = await self._people.sessions(call.connection, user)
        return Sessions([Session(**row, current=row["session_id"] == session) for row in rows])

    @operation(PLATFORM, "DELETE", f"{PATH}/sessions/{{id}}", USER, status=204, missing=SESSION_NOT_FOUND)
    async def end_session(self, call: Call[One, Nothing, Nothing]) -> None:
        """End a session of one's own"""
        user, _ = person(call.caller)
        await self._people.end_session(call.connection, user, call.path.id)

    # ------------------------------------------------------------ passwords

    @operation(
        PLATFORM, "POST", f"{PATH}/password/change", _USER_ALONE, status=204, problems=[LOGIN_FAILED],
        body_bytes_max=_BODY_BYTES,
    )  # fmt: skip
    async def change_password(self, call: Call[Nothing, Nothing, PasswordChange]) -> None:
        """Change one's password: all other sessions end"""
        body = call.body
        await self._people.change_password(call.caller, body.current_password, body.new_password, call.address)

    @operation(PLATFORM, "POST", f"{PATH}/password/forgot", PUBLIC, status=204, body_bytes_max=_BODY_BYTES)
    async def forget_password(self, call: Call[Nothing, Nothing, PasswordForgotten]) -> None:
        """Have a link sent with which the password can be reset

        The answer is the same for an e-mail that nobody has. Where no mail server is set, an operator makes the link:
        `sluice admin reset-link`.
        """
        self._people.count_attempt(call.address)
        if self._mailer.sends:
            self._background.start(self._send_reset(str(call.body.email)))

    async def _send_reset(self, email: str) -> None:
        token = await self._people.make_reset(email)
        if token is not None:
            link = reset_link(self._api_url, token)
            self._mailer.send(email, "Reset your password", f"Whoever opens this link may set a new one:\n\n{link}\n")

    @operation(PLATFORM, "POST", f"{PATH}/password/reset", PUBLIC, status=204, body_bytes_max=_BODY_BYTES)
    async def reset_password(self, call: Call[Nothing, Nothing, PasswordReset]) -> None:
        """Set a new password with the secret of a link: all sessions end"""
        await self._people.reset_password(call.body.token, call.body.new_password, call.address)

    # ------------------------------------------------------------ invitations

    @operation(
        PLATFORM, "POST", "/api/v1/invitations/accept", PUBLIC, problems=[INVITATION_NOT_FOUND, LOGIN_FAILED],
        body_bytes_max=_BODY_BYTES,
    )  # fmt: skip
    async def accept_invitation(self, call: Call[Nothing, Nothing, Acceptance]) -> Tokens:
        """Accept an invitation, and be logged in

        With the password of the account that has the e-mail; where there is none it is made, and needs a name.
        """
        body = call.body
        name = None if body.name is None else str(body.name)
        return self._told(await self._people.accept(body.token, name, body.password, call.address, call.agent))

    # ------------------------------------------------------------ keys

    @operation(PLATFORM, "GET", "/.well-known/jwks.json", PUBLIC)
    async def key_set(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[KeySet]:
        """The public keys that tokens are signed with"""
        async with self._people.acting() as connection:
            gateways = await public_keys(connection)
        keys = [msgspec.to_builtins(key) for key in (*await self._tokens.key_set(), *gateways)]
        return Reply(KeySet(keys), headers=_KEYS_HEADERS)

    def _told(self, tokens: LoggedIn) -> Tokens:
        return Tokens(tokens.access, self._tokens.lifetime_s, tokens.refresh, tokens.user, tokens.organisation)


def reset_link(api_url: str, token: str) -> str:
    """In the part of a URL that no server is sent, and none logs."""
    return f"{api_url}{ACCOUNT_PATH}#reset={token}"


def invitation_link(api_url: str, token: str) -> str:
    """Likewise."""
    return f"{api_url}{ACCOUNT_PATH}#invitation={token}"
