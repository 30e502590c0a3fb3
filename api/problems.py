"""What the registry and the store say no with. Left out: what any request may meet (`api.http.problems`)."""

from typing import Final

from api.http.problems import Kind

DEVICE_NOT_FOUND: Final = Kind("device_not_found", 404, "The organisation has no such device.")
QUARANTINE_NOT_FOUND: Final = Kind("quarantine_not_found", 404, "The organisation has no such row in quarantine.")
NOT_HELD: Final = Kind("not_held", 409, "The row is being replayed, or has left the quarantine.")
INVALID_NOTE: Final = Kind("invalid_note", 400, "The note is missing, empty or too long.")
INVALID_PAYLOAD: Final = Kind("invalid_payload", 400, "The payload is not one measurement.")
