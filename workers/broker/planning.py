"""What has to be said to the broker, so that whom it knows is whom the registry wants it to know. Pure.

An entry of ours is marked in its `textname`, which tells as well which password it has; others are left alone. Its
`textdescription` tells when a certificate was revoked last: an entry that changes there throws its client out.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final, NamedTuple

#: An entry's `textname` begins with it if it is ours.
MARK: Final = "sluice "
NO_PASSWORD: Final = MARK + "-"


class Kind(StrEnum):
    """What a command does."""

    CREATED = "created"
    CHANGED = "changed"
    ENABLED = "enabled"
    DISABLED = "disabled"
    DELETED = "deleted"
    KICKED = "kicked"


#: Those that take something away go first.
URGENT: Final = frozenset((Kind.DISABLED, Kind.DELETED, Kind.KICKED))


class Client(NamedTuple):
    """As the registry wants it."""

    mark: str
    """Which password: `textname`."""
    is_enabled: bool
    revoked: str = ""
    """When the last of its certificates was revoked: `textdescription`."""
    changes_at: datetime | None = None

    @property
    def is_there(self) -> bool:
        """Whether the broker has to know it: who shows a certificate is let in by that."""
        return self.mark != NO_PASSWORD or bool(self.revoked)


class Entry(NamedTuple):
    """As the broker has it."""

    mark: str
    is_enabled: bool
    revoked: str = ""

    @property
    def is_ours(self) -> bool:
        return self.mark.startswith(MARK)


class Command(NamedTuple):
    """One of the plugin, and the entry that it leaves; None: none."""

    user_name: str
    kind: Kind
    body: dict[str, Any]
    leaves: Entry | None
    needs_list: bool = False
    """It throws out, or lets in, who shows a certificate: for nothing until the broker knows which are revoked."""


def mark_of(hashed: str | None) -> str:
    """Says which password an entry has, and nothing about it: hashes are salted."""
    return NO_PASSWORD if hashed is None else MARK + sha256(hashed.encode()).hexdigest()[:16]


def commands_for(user_name: str, client: Client | None, entry: Entry | None, password: str | None) -> list[Command]:
    """What is to be said of one; `password` is that of the client's mark, None where it is not at hand."""
    if client is None or not client.is_there:
        return [] if entry is None or not entry.is_ours else [_delete(user_name, entry)]
    made: list[Command] = []
    if entry is None or not entry.is_ours:
        entry = _create(made, user_name, client, password, entry)
    elif entry.mark != client.mark:
        entry = _change_password(made, user_name, client, entry, password)
    # Without a password nobody gets in by it, and on certificates it has no bearing.
    is_enabled = entry.mark == client.mark and (client.is_enabled or client.mark == NO_PASSWORD)
    if is_enabled != entry.is_enabled:
        kind, name = (Kind.ENABLED, "enableClient") if is_enabled else (Kind.DISABLED, "disableClient")
        entry = entry._replace(is_enabled=is_enabled)
        made.append(Command(user_name, kind, {"command": name, "username": user_name}, entry))
    if client.revoked != entry.revoked:
        entry = entry._replace(revoked=client.revoked)
        body = {"command": "modifyClient", "username": user_name, "textdescription": client.revoked}
        made.append(Command(user_name, Kind.KICKED, body, entry, needs_list=True))
    return made


def _delete(user_name: str, entry: Entry) -> Command:
    body = {"command": "deleteClient", "username": user_name}
    return Command(user_name, Kind.DELETED, body, None, needs_list=bool(entry.revoked))


def _create(made: list[Command], user_name: str, client: Client, password: str | None, former: Entry | None) -> Entry:
    if former is not None:
        made.append(_delete(user_name, former)._replace(needs_list=False))
    mark = client.mark if password is not None else NO_PASSWORD
    body: dict[str, Any] = {"command": "createClient", "username": user_name, "textname": mark}
    if password is not None:
        body["password"] = password
    entry = Entry(mark, is_enabled=True)
    made.append(Command(user_name, Kind.CREATED, body, entry))
    return entry


def _change_password(
    made: list[Command], user_name: str, client: Client, entry: Entry, password: str | None
) -> Entry:
    """Where the new one is not at hand, the old one stays, and is made useless."""
    if password is None and client.mark != NO_PASSWORD:
        return entry
    if password is None:
        # There is no command that takes a password away.
        return _create(made, user_name, client, None, entry)
    changed = entry._replace(mark=client.mark)
    body = {"command": "modifyClient", "username": user_name, "textname": client.mark, "password": password}
    made.append(Command(user_name, Kind.CHANGED, body, changed))
    return changed


def in_order(commands: Iterable[list[Command]]) -> list[list[Command]]:
    """Clients that lose something first; what is said of one stays together."""
    return sorted(commands, key=lambda some: not any(one.kind in URGENT for one in some))


def plugin_file(clients: Mapping[str, Client], hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the plugin reads at its start. The ACL file says who may do what: it gives no rights itself."""
    return {
        "defaultACLAccess": {
            "publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True,
        },
        "clients": [_seeded(name, client, hashes.get(name)) for name, client in clients.items()],
        "groups": [],
        "roles": [],
    }  # fmt: skip


def _seeded(user_name: str, client: Client, hashed: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"username": user_name, "textname": client.mark, "textdescription": client.revoked}
    if hashed is not None:
        _, _, iterations, salt, password = hashed.split("$")
        made |= {"password": password, "salt": salt, "iterations": int(iterations)}
        if not client.is_enabled:
            made["disabled"] = True
    return made | {"roles": []}
