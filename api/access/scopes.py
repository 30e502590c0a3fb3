"""What an API key may be made for."""

from typing import Final, Literal, get_args

#: `owner` has all others, and what only an owner may do.
Scope = Literal[
    "owner", "readings:read", "sites:read", "sites:write", "devices:read", "devices:write", "quarantine:write",
    "organisation:read", "organisation:write", "keys:read", "keys:write", "audit:read",
]  # fmt: skip
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

OWNER: Final[Scope] = "owner"
READINGS_READ: Final[Scope] = "readings:read"
SITES_READ: Final[Scope] = "sites:read"
SITES_WRITE: Final[Scope] = "sites:write"
DEVICES_READ: Final[Scope] = "devices:read"
DEVICES_WRITE: Final[Scope] = "devices:write"
QUARANTINE_WRITE: Final[Scope] = "quarantine:write"
ORGANISATION_READ: Final[Scope] = "organisation:read"
ORGANISATION_WRITE: Final[Scope] = "organisation:write"
KEYS_READ: Final[Scope] = "keys:read"
KEYS_WRITE: Final[Scope] = "keys:write"
AUDIT_READ: Final[Scope] = "audit:read"
