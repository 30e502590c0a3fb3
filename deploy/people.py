"""What an operator does about people: makes a super-admin, makes a link for a forgotten password.

Left out: what people do themselves over HTTP (`api.access.accounts`).
"""

from datetime import timedelta
from typing import Any, Final

from api.access.accounts import add_reset, end_former
from api.access.authority import act_for
from api.access.passwords import PASSWORD_CHARACTERS, hash_password
from api.registry import audit
from api.registry.organisations import ROLE
from api.registry.texts import Email, Name, Text
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.secrets import TokenHasher

#: Of those that answer requests none may make a super-admin.
ADMIN_ROLE: Final = "sluice_worker"

_MAKE: Final = "SELECT make_super_admin($1, $2, $3, $4)"
_USER: Final = "SELECT user_of_email($1)"


def parsed(kind: type[Text], what: str, text: str) -> str:
    """A text that an operator gave. Raises `ConfigurationError` that names it."""
    try:
        return str(kind.parse(text))
    except ValueError as error:
        raise ConfigurationError(f"{what} {text!r} {error}") from None


async def create_admin(connection: Any, email: str, name: str, password: str) -> str:
    """The id of a new super-admin, or of the person with this e-mail, who becomes one and gets this password.

    Sessions and links of that person end: whoever has one would be a super-admin. `connection` is a session of the
    login itself. Raises `ConfigurationError`.
    """
    least, most = PASSWORD_CHARACTERS
    if not least <= len(password) <= most:
        raise ConfigurationError(f"the password has {len(password)} characters: it takes {least} to {most}")
    address, person = parsed(Email, "the e-mail", email), parsed(Name, "the name", name)
    hashed = hash_password(password)
    new = uuid7()
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ADMIN_ROLE}")
        user = await connection.fetchval(_MAKE, new, address, person, hashed)
        if user != new:
            await connection.execute(f"SET LOCAL ROLE {ROLE}")
            await act_for(connection, user=user)
            await end_former(connection, user)
            await act_for(connection)
            await audit.record(connection, "password.changed", user)
        await audit.record(connection, "admin.created", user)
    return str(user)


async def make_reset(connection: Any, hasher: TokenHasher, email: str, lasts: timedelta) -> str:
    """The secret of a link with which the person may set a new password. Raises `ConfigurationError`."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ROLE}")
        user = await connection.fetchval(_USER, email)
        if user is None:
            raise ConfigurationError(f"nobody has the e-mail {email!r}")
        await act_for(connection, user=user)
        return await add_reset(connection, hasher, user, lasts)
