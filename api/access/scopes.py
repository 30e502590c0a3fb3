"""What an API key may be made for."""

from typing import Final

OWNER: Final = "owner"
READINGS_READ: Final = "readings:read"
SITES_READ: Final = "sites:read"
SITES_WRITE: Final = "sites:write"
DEVICES_READ: Final = "devices:read"
DEVICES_WRITE: Final = "devices:write"
QUARANTINE_WRITE: Final = "quarantine:write"
ORGANISATION_READ: Final = "organisation:read"
ORGANISATION_WRITE: Final = "organisation:write"
KEYS_READ: Final = "keys:read"
KEYS_WRITE: Final = "keys:write"
AUDIT_READ: Final = "audit:read"

#: `owner` has all others, and what only an owner may do.
SCOPES: Final = (
    OWNER, READINGS_READ, SITES_READ, SITES_WRITE, DEVICES_READ, DEVICES_WRITE, QUARANTINE_WRITE, ORGANISATION_READ,
    ORGANISATION_WRITE, KEYS_READ, KEYS_WRITE, AUDIT_READ,
)  # fmt: skip
