"""Organisations, their members and invitations, as operations. Left out: the rules (`api.registry`)."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec

from api.access.accounts import person
from api.access.mail import Mailer
from api.access.scopes import ORGANISATION_READ, ORGANISATION_WRITE
from api.access.settings import AccessSettings
from api.faces import PLATFORM
from api.http.lists import LIMIT_DEFAULT, Cursors, CursorText, Limit, cut
from api.http.operations import USER, Call, Nothing, Reply, Role, needs, operation
from api.http.problems import STALE
from api.platform.auth import RoleName, invitation_link
from api.problems import (
    ALREADY_MEMBER,
    INVITATION_LIMIT,
    INVITATION_NOT_FOUND,
    LAST_OWNER,
    MEMBER_NOT_FOUND,
    ORGANISATION_LIMIT,
)
from api.registry import members, organisations
from api.registry.members import FIRST
from api.registry.texts import Email, Name
from runtime.secrets import KeyRing, Seal, TokenHasher

PATH: Final = "/api/v1/organisations"
_READS: Final = needs(Role.VIEWER, ORGANISATION_READ)
_LEAVES: Final = needs(Role.VIEWER, ORGANISATION_WRITE)
_CHANGES: Final = needs(Role.ADMIN, ORGANISATION_WRITE)

RawDays = Annotated[int, msgspec.Meta(ge=1, le=36_600)]
RollupDays = Annotated[int, msgspec.Meta(ge=0, le=36_600)]


class Which(msgspec.Struct, rename="camel"):
    """Which organisation."""

    org_id: UUID


class WhichMember(Which, rename="camel"):
    """Which member."""

    user_id: UUID


class WhichInvitation(Which, rename="camel"):
    """Which invitation."""

    invitation_id: UUID


class Page(msgspec.Struct):
    """Which part of a list."""

    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class NewOrganisation(msgspec.Struct, forbid_unknown_fields=True):
    """What it is called."""

    name: Name


class OrganisationChange(msgspec.Struct, forbid_unknown_fields=True):
    """What is absent stays. All but the name are for an owner to change.

    Days of roll-ups: 0 for ever, null as the installation has it; never less than what they are computed from.
    """

    name: Name | msgspec.UnsetType = msgspec.UNSET
    raw_retention_days: RawDays | msgspec.UnsetType = msgspec.UNSET
    rollups_5m_days: RollupDays | msgspec.UnsetType | None = msgspec.UNSET
    rollups_1h_days: RollupDays | msgspec.UnsetType | None = msgspec.UNSET
    rollups_1d_days: RollupDays | msgspec.UnsetType | None = msgspec.UNSET


class RoleChange(msgspec.Struct, forbid_unknown_fields=True):
    """What a member is from now on."""

    role: RoleName


class NewInvitation(msgspec.Struct, forbid_unknown_fields=True):
    """Who is to be what."""

    email: Email
    role: RoleName


class Organisation(msgspec.Struct):
    """An organisation; `version` is its ETag."""

    organisation_id: UUID
    name: str
    raw_retention_days: int
    rollups_5m_days: int | None
    rollups_1h_days: int | None
    rollups_1d_days: int | None
    series_max: int
    version: int
    created_at: datetime
    updated_at: datetime


class Mine(Organisation):
    """An organisation, and what one is there: null for a super-admin who is no member."""

    role: RoleName | None = None


class MineList(msgspec.Struct):
    """A page of one's organisations."""

    data: list[Mine]
    next_cursor: str | None


class Member(msgspec.Struct):
    """A person in an organisation."""

    user_id: UUID
    email: str
    name: str
    role: RoleName
    created_at: datetime


class Members(msgspec.Struct):
    """A page of an organisation's members."""

    data: list[Member]
    next_cursor: str | None


class Invitation(msgspec.Struct):
    """An invitation that may still be accepted."""

    invitation_id: UUID
    email: str
    role: RoleName
    invited_by: UUID | None
    created_at: datetime
    expires_at: datetime


class Invitations(msgspec.Struct):
    """A page of an organisation's open invitations."""

    data: list[Invitation]
    next_cursor: str | None


class Created(Invitation):
    """An invitation; with its link, where no mail server is set to send it."""

    link: str | msgspec.UnsetType = msgspec.UNSET


class OrganisationOperations:
    """`/api/v1/organisations`."""

    def __init__(self, ring: KeyRing, settings: AccessSettings, mailer: Mailer, api_url: str) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "people cursor"), UUID)
        self._hasher = TokenHasher(ring)
        self._lasts = timedelta(days=settings.auth_invitation_days)
        self._mailer = mailer
        self._api_url = api_url

    @operation(PLATFORM, "GET", PATH, USER)
    async def organisations(self, call: Call[Nothing, Page, Nothing]) -> MineList:
        """One's own organisations; all of them, for a super-admin"""
        user, _ = person(call.caller)
        limit, mark = call.query.limit, ("organisations", user)
        after = self._cursors.take(mark, call.query.cursor) or FIRST
        rows, more = cut(await organisations.mine(call.connection, user, after, limit + 1), limit)
        return MineList([Mine(**row) for row in rows], self._next(mark, rows, "organisation_id", more))

    @operation(PLATFORM, "POST", PATH, USER, status=201, repeatable=True, problems=[ORGANISATION_LIMIT])
    async def create_organisation(self, call: Call[Nothing, Nothing, NewOrganisation]) -> Reply[Organisation]:
        """Make an organisation of which one is the owner"""
        user, _ = person(call.caller)
        row = await organisations.create(call.connection, user, str(call.body.name))
        return replace(_whole(row), headers={"Location": f"{PATH}/{row['organisation_id']}"})

    @operation(PLATFORM, "GET", "/api/v1/organisation", _READS)
    async def own_organisation(self, call: Call[Nothing, Nothing, Nothing]) -> Reply[Organisation]:
        """The organisation that the credential acts for"""
        return _whole(await organisations.get(call.connection, call.organisation))

    @operation(PLATFORM, "GET", f"{PATH}/{{orgId}}", _READS)
    async def organisation(self, call: Call[Which, Nothing, Nothing]) -> Reply[Organisation]:
        """One organisation"""
        return _whole(await organisations.get(call.connection, call.organisation))

    @operation(PLATFORM, "PATCH", f"{PATH}/{{orgId}}", _CHANGES, problems=[STALE])
    async def update_organisation(self, call: Call[Which, Nothing, OrganisationChange]) -> Reply[Organisation]:
        """Change an organisation"""
        given = msgspec.structs.asdict(call.body)
        changes = {
            name: str(value) if name == "name" else value
            for name, value in given.items()
            if value is not msgspec.UNSET
        }
        is_owner = members.may(call.caller) >= Role.OWNER
        return _whole(
            await organisations.change(call.connection, call.organisation, call.versions, changes, is_owner=is_owner)
        )

    # ------------------------------------------------------------ members

    @operation(PLATFORM, "GET", f"{PATH}/{{orgId}}/members", _READS)
    async def members(self, call: Call[Which, Page, Nothing]) -> Members:
        """Who belongs to an organisation"""
        limit, mark = call.query.limit, ("members", call.organisation)
        after = self._cursors.take(mark, call.query.cursor) or FIRST
        rows, more = cut(await members.members(call.connection, call.organisation, after, limit + 1), limit)
        return Members([Member(**row) for row in rows], self._next(mark, rows, "user_id", more))

    @operation(
        PLATFORM, "PATCH", f"{PATH}/{{orgId}}/members/{{userId}}", _CHANGES, missing=MEMBER_NOT_FOUND,
        problems=[LAST_OWNER],
    )  # fmt: skip
    async def change_role(self, call: Call[WhichMember, Nothing, RoleChange]) -> Member:
        """Make a member something else; the role owner is given and taken by owners"""
        row = await members.change_role(
            call.connection, call.organisation, call.caller, call.path.user_id, call.body.role
        )
        return Member(**row)

    @operation(
        PLATFORM, "DELETE", f"{PATH}/{{orgId}}/members/{{userId}}", _LEAVES, status=204, missing=MEMBER_NOT_FOUND,
        problems=[LAST_OWNER],
    )  # fmt: skip
    async def remove_member(self, call: Call[WhichMember, Nothing, Nothing]) -> None:
        """Remove a member, or leave: the last owner stays"""
        await members.remove(call.connection, call.organisation, call.caller, call.path.user_id)

    # ------------------------------------------------------------ invitations

    @operation(
        PLATFORM, "POST", f"{PATH}/{{orgId}}/invitations", _CHANGES, status=201, repeatable=True,
        problems=[ALREADY_MEMBER, INVITATION_LIMIT],
    )  # fmt: skip
    async def invite(self, call: Call[Which, Nothing, NewInvitation]) -> Created:
        """Invite somebody, in place of an earlier invitation

        By mail; where no mail server is set, the answer has the link, which is told once.
        """
        email = str(call.body.email)
        invited = await members.invite(
            call.connection,
            self._hasher,
            call.caller,
            call.organisation,
            email,
            call.body.role,
            self._lasts,
        )
        link = invitation_link(self._api_url, invited.token)
        if not self._mailer.sends:
            return Created(**invited.row, link=link)
        self._mailer.send(email, "You are invited", f"To accept the invitation, open this link:\n\n{link}\n")
        return Created(**invited.row)

    @operation(PLATFORM, "GET", f"{PATH}/{{orgId}}/invitations", _CHANGES)
    async def invitations(self, call: Call[Which, Page, Nothing]) -> Invitations:
        """Who is invited"""
        limit, mark = call.query.limit, ("invitations", call.organisation)
        after = self._cursors.take(mark, call.query.cursor) or FIRST
        rows, more = cut(await members.invitations(call.connection, call.organisation, after, limit + 1), limit)
        return Invitations([Invitation(**row) for row in rows], self._next(mark, rows, "invitation_id", more))

    @operation(
        PLATFORM, "DELETE", f"{PATH}/{{orgId}}/invitations/{{invitationId}}", _CHANGES, status=204,
        missing=INVITATION_NOT_FOUND,
    )  # fmt: skip
    async def revoke_invitation(self, call: Call[WhichInvitation, Nothing, Nothing]) -> None:
        """Take an invitation back"""
        await members.revoke_invitation(call.connection, call.caller, call.organisation, call.path.invitation_id)

    def _next(self, mark: tuple[Any, ...], rows: Any, column: str, more: bool) -> str | None:
        return self._cursors.give(mark, UUID(int=rows[-1][column].int)) if more else None


def _whole(row: Any) -> Reply[Organisation]:
    return Reply(Organisation(**row), version=str(row["version"]))
