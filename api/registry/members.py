"""Who belongs to an organisation, as what, and who is invited. The organisation's row is the lock of all of it.

Left out: people's accounts (`api.access.accounts`).
"""

from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.http.operations import Caller, Role
from api.http.problems import FORBIDDEN, Problem
from api.problems import (
    ALREADY_MEMBER,
    INVITATION_LIMIT,
    INVITATION_NOT_FOUND,
    LAST_OWNER,
    MEMBER_NOT_FOUND,
)
from api.registry import audit
from api.registry.organisations import lock
from runtime.ids import uuid7
from runtime.secrets import INVITATION_PREFIX, TokenHasher, make_token

INVITATIONS_MAX: Final = 200
FIRST: Final = UUID(int=0)

_LISTED: Final = """
SELECT m.user_id, u.email, u.name, m.role, m.created_at FROM memberships m JOIN users u USING (user_id)
WHERE m.organisation_id = $1 AND m.user_id > $2 ORDER BY m.user_id LIMIT $3
"""
_ONE: Final = """
SELECT m.user_id, u.email, u.name, m.role, m.created_at FROM memberships m JOIN users u USING (user_id)
WHERE m.organisation_id = $1 AND m.user_id = $2
"""
_OTHER_OWNERS: Final = """
SELECT EXISTS (SELECT FROM memberships WHERE organisation_id = $1 AND role = 'owner' AND user_id <> $2)
"""
_SET_ROLE: Final = "UPDATE memberships SET role = $3 WHERE organisation_id = $1 AND user_id = $2"
_REMOVE: Final = "DELETE FROM memberships WHERE organisation_id = $1 AND user_id = $2"
_ADD: Final = """
INSERT INTO memberships (organisation_id, user_id, role) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING user_id
"""
_IS_MEMBER: Final = """
SELECT EXISTS (SELECT FROM memberships m JOIN users u USING (user_id)
               WHERE m.organisation_id = $1 AND lower(u.email) = lower($2))
"""

_OPEN: Final = "accepted_at IS NULL AND revoked_at IS NULL AND expires_at > now()"
_INVITED: Final = f"""
SELECT invitation_id, email, role, invited_by, created_at, expires_at FROM invitations
WHERE organisation_id = $1 AND invitation_id > $2 AND {_OPEN} ORDER BY invitation_id LIMIT $3
"""  # noqa: S608
_INVITATION: Final = """
SELECT invitation_id, email, role, invited_by, created_at, expires_at FROM invitations WHERE invitation_id = $1
"""
_COUNT: Final = f"SELECT count(*) FROM invitations WHERE organisation_id = $1 AND {_OPEN}"  # noqa: S608
_SUPERSEDE: Final = f"""
UPDATE invitations SET revoked_at = now() WHERE organisation_id = $1 AND lower(email) = lower($2) AND {_OPEN}
"""  # noqa: S608
_FORGET: Final = """
DELETE FROM invitations WHERE organisation_id = $1 AND expires_at < now() - interval '90 days'
"""
_INVITE: Final = """
INSERT INTO invitations (invitation_id, organisation_id, email, role, token_hash, invited_by, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, now() + $7::interval)
"""
_REVOKE: Final = f"""
UPDATE invitations SET revoked_at = now() WHERE invitation_id = $1 AND {_OPEN} RETURNING email, role
"""  # noqa: S608
_ACCEPT: Final = f"""
UPDATE invitations SET accepted_at = now() WHERE invitation_id = $1 AND {_OPEN} RETURNING role
"""  # noqa: S608


class Invited(NamedTuple):
    """An invitation, and the secret of its link, which is told once."""

    row: Any
    token: str


def may(caller: Caller) -> Role:
    """What a caller may do to members; an API key without an owner's scope, what an admin may."""
    return caller.role or Role.ADMIN


async def members(connection: Any, organisation: UUID, after: UUID, limit: int) -> list[Any]:
    rows: list[Any] = await connection.fetch(_LISTED, organisation, after, limit)
    return rows


async def change_role(connection: Any, organisation: UUID, caller: Caller, user: UUID, role: str) -> Any:
    """Raises the problems of no such member, of a role that only owners give or take, and of the last owner."""
    await lock(connection, organisation)
    row = await _member(connection, organisation, user)
    _check_owners_matter(caller, row["role"], role)
    if row["role"] == "owner" and role != "owner":
        await _check_another_owner(connection, organisation, user)
    if row["role"] != role:
        await connection.execute(_SET_ROLE, organisation, user, role)
        await audit.record(connection, "member.role_changed", user, before=row["role"], role=role)
    return await _member(connection, organisation, user)


async def remove(connection: Any, organisation: UUID, caller: Caller, user: UUID) -> None:
    """Everybody may go himself; raises what `change_role` raises."""
    await lock(connection, organisation)
    row = await _member(connection, organisation, user)
    if caller.user != user:
        if may(caller) < Role.ADMIN:
            raise Problem(FORBIDDEN, "it takes the role admin to remove others")
        _check_owners_matter(caller, row["role"])
    if row["role"] == "owner":
        await _check_another_owner(connection, organisation, user)
    await connection.execute(_REMOVE, organisation, user)
    await audit.record(connection, "member.removed", user, role=row["role"])


async def _member(connection: Any, organisation: UUID, user: UUID) -> Any:
    row = await connection.fetchrow(_ONE, organisation, user)
    if row is None:
        raise Problem(MEMBER_NOT_FOUND)
    return row


def _check_owners_matter(caller: Caller, *roles: str) -> None:
    if "owner" in roles and may(caller) < Role.OWNER:
        raise Problem(FORBIDDEN, "only an owner gives or takes the role owner")


async def _check_another_owner(connection: Any, organisation: UUID, user: UUID) -> None:
    if not await connection.fetchval(_OTHER_OWNERS, organisation, user):
        raise Problem(LAST_OWNER)


# ---------------------------------------------------------------- invitations


async def invitations(connection: Any, organisation: UUID, after: UUID, limit: int) -> list[Any]:
    """Those that may still be accepted."""
    rows: list[Any] = await connection.fetch(_INVITED, organisation, after, limit)
    return rows


async def invite(
    connection: Any, hasher: TokenHasher, caller: Caller, organisation: UUID, email: str, role: str, lasts: timedelta
) -> Invited:
    """In place of an earlier one to the same e-mail. Raises the problems of a member, an owner's matter, too many."""
    await lock(connection, organisation)
    _check_owners_matter(caller, role)
    if await connection.fetchval(_IS_MEMBER, organisation, email):
        raise Problem(ALREADY_MEMBER)
    await connection.execute(_SUPERSEDE, organisation, email)
    await connection.execute(_FORGET, organisation)
    if await connection.fetchval(_COUNT, organisation) >= INVITATIONS_MAX:
        raise Problem(INVITATION_LIMIT, f"an organisation has up to {INVITATIONS_MAX} open invitations")
    invitation, token = uuid7(), make_token(INVITATION_PREFIX)
    digest = hasher.digest(token)
    await connection.execute(_INVITE, invitation, organisation, email, role, digest, caller.user, lasts)
    row = await connection.fetchrow(_INVITATION, invitation)
    await audit.record(connection, "invitation.created", invitation, email=email, role=role)
    return Invited(row, token)


async def revoke_invitation(connection: Any, caller: Caller, organisation: UUID, invitation: UUID) -> None:
    """Raises the problem of one that is not open."""
    await lock(connection, organisation)
    row = await connection.fetchrow(_REVOKE, invitation)
    if row is None:
        raise Problem(INVITATION_NOT_FOUND)
    _check_owners_matter(caller, row["role"])
    await audit.record(connection, "invitation.revoked", invitation, email=row["email"])


async def accept(connection: Any, organisation: UUID, invitation: UUID, user: UUID) -> str | None:
    """The role that the user has from now on, in a transaction that acts for both; None: it is no longer open."""
    await lock(connection, organisation)
    role: str | None = await connection.fetchval(_ACCEPT, invitation)
    if role is None:
        return None
    if await connection.fetchval(_ADD, organisation, user, role) is None:
        raise Problem(ALREADY_MEMBER)
    await audit.record(connection, "invitation.accepted", invitation, user=user, role=role)
    return role
