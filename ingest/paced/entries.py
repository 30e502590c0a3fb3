"""What stands in a file of the paced lane: a record, whose limits it waits for, and what it costs of them.

Every call blocks that takes a store. Left out: when it is let into the log (`lane`).
"""

from typing import Final, NamedTuple

import msgspec

from ingest.limits import Cost
from runtime.log.sqlite_store import Store
from schemas.record import Record, UndecodableError, UnknownVersionError, decode

VERSION: Final = 1
ENTRY_BYTES_MAX: Final = 128
"""What an `Entry` adds to its record, at most."""


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A record that waits. Fields are only ever added at the end, with a default."""

    version: int
    kind: str
    """Of the credential it came by: `device` or `gateway`."""
    organisation: bytes
    subject: bytes
    """The device or the site whose limits hold, beside the organisation's; 16 bytes."""
    requests: int
    """1 for one record of a request that was not counted on arrival, else 0."""
    readings: int
    size: int
    """Its share of the request's body."""
    record: bytes

    @property
    def cost(self) -> Cost:
        return Cost(self.requests, self.readings, self.size)


class Ahead(NamedTuple):
    """What stands next in a slot."""

    entries: list[Entry | None]
    """None for one that cannot be read."""
    next: int
    """Where the first of them stands; beyond the position asked for when those between are lost."""


encode: Final = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Entry)


def unpack(body: bytes) -> Entry:
    """Raises `UndecodableError`, and `UnknownVersionError` for one of a newer Sluice."""
    try:
        entry = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UndecodableError(f"not an entry: {error}") from error
    if entry.version > VERSION:
        raise UnknownVersionError(entry.version)
    if {len(entry.organisation), len(entry.subject)} != {16}:
        raise UndecodableError("not an entry: an id is not 16 bytes long")
    if min(entry.cost) < 0:
        raise UndecodableError("not an entry: it costs less than nothing")
    return entry


def record_of(body: bytes) -> Record:
    """Raises as `unpack`."""
    return decode(unpack(body).record)


def received_us(entry: Entry) -> int:
    """When its record was received, µs since 2000-01-01; 0 where that cannot be read."""
    try:
        return decode(entry.record).received_at
    except (UndecodableError, UnknownVersionError):
        return 0


def look_ahead(store: Store, slot: int, position: int, end: int, bytes_max: int) -> Ahead:
    """What stands from `position` on, before `end`: as far as about `bytes_max` go, and at least one entry.

    Raises what the store does, and `UnknownVersionError`.
    """
    part = store.read_on(slot, position, bytes_max)
    first = min(part.first, end) if part.bodies else end
    return Ahead([_readable(body) for body in part.bodies[: end - first]], first)


def _readable(body: bytes) -> Entry | None:
    try:
        return unpack(body)
    except UndecodableError:
        return None
