"""What stands in the log: one record a request and device, a versioned msgpack array.

Readings are grouped by channel and kept in columns in PostgreSQL's own byte order and epoch, so that landing
copies them as they are. Left out: which partition a record goes to (`schemas.topics`) and what becomes of it.
"""

import struct
from enum import IntFlag
from typing import Final

import msgspec

VERSION: Final = 3
"""The newest version this code writes and reads. A worker that meets a newer one waits for its upgrade."""

LATE_VERSION: Final = 2
"""Of a record that sets one of the fields from `origin` to `in_doubt`."""

PLAIN_VERSION: Final = 1
"""Of a record whose last fields are all unset: workers that know nothing of those fields read it as well."""

PG_EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01T00:00:00Z in microseconds of the Unix epoch; record times count from there."""


class Quality(IntFlag):
    """Flags of a stored reading (`readings.quality`); 0 is a plain, good one."""

    TIME_REPLACED = 1
    """Its own time was implausible; the receive time stands in its place."""
    TIME_SHIFTED = 2
    """A request without a usable clock kept its spacing, its newest reading at the receive time."""
    TIME_STAMPED = 4
    """It came without a time and was stamped once, on arrival."""
    UNIT_CONVERTED = 8
    """Its value was converted to the metric's canonical unit."""
    BOOLEAN = 16
    """It came as true or false and is stored as 1 or 0."""
    INTEGER = 32
    """An integer beyond 2^53, kept as text so that no digit is lost."""
    LATE = 64
    """A plant's message brought it longer after, or before, the time of its publishing than may be."""


TIME_MADE_UP: Final = (Quality.TIME_REPLACED | Quality.TIME_SHIFTED | Quality.TIME_STAMPED).value
"""A time of our making has any of these: it makes way where another reading of its series has it already."""


class Channel(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The readings of one (metric, label) in a record, n of them, in the order they came.

    `times`: n big-endian int64, microseconds since 2000-01-01 UTC. `values`: n big-endian float64, or n texts.
    `quality`: one `Quality` for all, or n big-endian int16. `unit`: as stored, the canonical one where known.
    """

    metric: str
    label: str
    unit: str
    times: bytes
    values: bytes | list[str]
    quality: int | bytes = 0

    def __len__(self) -> int:
        return len(self.times) // 8

    def unpack_times(self) -> tuple[int, ...]:
        return struct.unpack(f">{len(self.times) // 8}q", self.times)

    def unpack_values(self) -> tuple[float, ...] | list[str]:
        if isinstance(self.values, bytes):
            return struct.unpack(f">{len(self.values) // 8}d", self.values)
        return self.values

    def unpack_quality(self) -> tuple[int, ...]:
        if isinstance(self.quality, int):
            return (self.quality,) * len(self)
        return struct.unpack(f">{len(self.quality) // 2}h", self.quality)


class Note(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a plain row has no room for, of reading `reading` of channel `channel` (both from 0)."""

    channel: int
    reading: int
    original_time: str | None = None
    original_unit: str | None = None
    metadata: bytes | None = None
    """A JSON object, as it came."""


class Refused(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A reading that was refused at the door, on its way to the quarantine."""

    index: int
    """Which measurement of the request, in body order, from 0."""
    code: str
    message: str
    payload: bytes
    """The measurement as JSON, bounded, without secrets."""


NOBODY: Final = bytes(16)
"""Stands for organisation and device in a record that has none."""

ORIGIN_BYTES_MAX: Final = 48
"""What an `Origin` adds to a record, at most."""


class Origin(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where a record stood in a spool before it came into the log: landing takes each sequence number once."""

    spool: bytes
    """16 bytes: the id of the spool's file."""
    partition: int
    """Of the spool."""
    sequence: int
    """From 0, without gaps in each partition of a spool."""
    through: int
    """The next sequence number. More than `sequence` + 1 only in a gap, which is nobody's: these records are lost."""


IDEMPOTENCY_WINDOW_S: Final = 86_400
"""Two requests of one name received within it are one request."""


NONCE_SCOPE: Final = b"nonce of a plant"
"""In the place of a credential: the name is the nonce of a plant's message."""


class Idempotency(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a client named its request, so that a repeat of it is known; digests of 16 bytes each."""

    scope: bytes
    """Of the credential that named it, or `NONCE_SCOPE`."""
    key: bytes
    fingerprint: bytes
    """Of what the request held: the same key with another one is a conflict."""


FENCE_SHIFT: Final = 40
"""A delivery's number holds above these bits how often its session had been taken over by then."""


class Delivery(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a message came over MQTT, so that landing knows it again when the broker sends it once more."""

    session: bytes
    """16 bytes: which of the bridges' sessions it was sent to."""
    packet: int
    """The packet identifier that the broker gave it, which later ones of the session may have as well."""
    again: bool
    """The broker may have sent it before (DUP)."""
    digest: bytes
    """8 bytes, of topic and payload."""
    number: int
    """Ascends over the deliveries of the session as they came, whichever bridge had it (`FENCE_SHIFT`)."""
    began: int
    """The number of the first delivery of the same connection."""
    floor: int
    """Of the records in this partition, none with a lower number is of a message that is sent again."""


class Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One request of one device. Fields are only ever added at the end, with a default.

    From `origin` on they belong to version 2, `delivery` to version 3: a record that sets any of them has it.
    """

    version: int
    record_id: bytes
    """16 bytes, unique: the same on every attempt to append the same record."""
    organisation: bytes
    device: bytes
    received_at: int
    """Microseconds since 2000-01-01 UTC, stamped once, on arrival."""
    way: str
    """How it came: http, mqtt, …"""
    request_id: str
    channels: list[Channel]
    refused: list[Refused] = []
    notes: list[Note] = []
    origin: Origin | None = None
    idempotency: Idempotency | None = None
    replays: bytes = b""
    """The id of the quarantine row, 16 bytes, that this record's one reading was released from."""
    in_doubt: bool = False
    """Whether an earlier append of the very same record may stand in the log: its readings are then its own."""
    delivery: Delivery | None = None
    """Of a message whose readings are not known again by their times alone."""

    @property
    def is_gap(self) -> bool:
        """Whether it stands for records of a spool that cannot be read any more; it has no reading of its own."""
        return self.origin is not None and (
            self.organisation == NOBODY or self.origin.through != self.origin.sequence + 1
        )

    @property
    def accepted(self) -> int:
        return sum(map(len, self.channels))


class UnknownVersionError(Exception):
    """The record was written by newer code: wait for an upgrade, never quarantine it."""

    def __init__(self, version: int) -> None:
        super().__init__(f"record version {version} is newer than {VERSION}, the newest this worker reads")
        self.version = version


class UndecodableError(ValueError):
    """The bytes are no record of any known version: nothing will ever read them."""


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Record)
encode: Final = _encoder.encode

_VERSIONS: Final = frozenset({PLAIN_VERSION, LATE_VERSION, VERSION})
_FIXARRAY: Final = 0x90
#: By its first byte, where the first element of an array of 16 or more begins.
_LONG_ARRAYS: Final = {0xDC: 3, 0xDD: 5}
_POSITIVE_FIXINT_MAX: Final = 0x7F
#: How 16 bytes begin, as record id, organisation and device stand one after the other.
_BIN16: Final = b"\xc4\x10"
_DEVICE_END: Final = 2 + 3 * 18
_RECEIVED_MAX: Final = 200 * 8766 * 3_600_000_000
"""The year 2200, in microseconds: no ingest's clock is that wrong."""
_QUALITY_MAX: Final = 2**15 - 1
_PACKET_MAX: Final = 2**16 - 1
_NUMBER_END: Final = 2**63
_UINTS: Final = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}


def decode(body: bytes) -> Record:
    """The record in `body`.

    Raises `UnknownVersionError` for a newer version, whatever follows its number, and `UndecodableError` for
    bytes that are no record or whose columns do not fit each other.
    """
    if len(body) < 2 or body[1] not in _VERSIONS or body[0] & 0xF0 != _FIXARRAY:
        version = _version(body)
        if version > VERSION:
            raise UnknownVersionError(version)
    try:
        record = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableError(f"not a record: {error}") from error
    if record.version not in _VERSIONS:
        raise UndecodableError(f"not a record: there never was a version {record.version}")
    if len(record.organisation) != 16 or len(record.device) != 16 or len(record.record_id) != 16:
        raise UndecodableError("not a record: an id is not 16 bytes long")
    for channel in record.channels:
        _check_columns(channel)
    if record.notes:
        _check_notes(record)
    if record.version != PLAIN_VERSION:
        _check_late_fields(record)
    return record


def decode_sound(body: bytes) -> Record:
    """The record in `body` if landing takes it as one; raises as `decode`."""
    record = decode(body)
    if not 0 <= record.received_at < _RECEIVED_MAX:
        raise UndecodableError("not a record: its receive time is none")
    for channel in record.channels:
        if channel.quality and isinstance(channel.quality, int) and not 0 < channel.quality <= _QUALITY_MAX:
            raise UndecodableError("not a record: flags that are none")
    return record


def device_in(body: bytes) -> bytes | None:
    """Whose record it is, without decoding it; None where only `decode` can tell."""
    if len(body) < _DEVICE_END or body[0] & 0xF0 != _FIXARRAY or body[1] not in _VERSIONS:
        return None
    if body[2:4] != _BIN16 or body[20:22] != _BIN16 or body[38:40] != _BIN16:
        return None
    return body[_DEVICE_END - 16 : _DEVICE_END]


def _version(body: bytes) -> int:
    """The version, read alone: the rest of a newer record may have any shape. 0 where there is none."""
    if not body or (body[0] & 0xF0 != _FIXARRAY and body[0] not in _LONG_ARRAYS):
        return 0
    number = body[_LONG_ARRAYS.get(body[0], 1) :][:9]
    if not number or number[0] <= _POSITIVE_FIXINT_MAX:
        return number[0] if number else 0
    size = _UINTS.get(number[0], 0)
    return int.from_bytes(number[1 : 1 + size], "big") if len(number) > size else 0


def _check_columns(channel: Channel) -> None:
    size = len(channel.times)
    values = channel.values
    if size % 8 or (len(values) if isinstance(values, bytes) else len(values) * 8) != size:
        raise UndecodableError("not a record: times and values differ in number")
    if isinstance(channel.quality, bytes) and len(channel.quality) * 4 != size:
        raise UndecodableError("not a record: times and quality flags differ in number")


def _check_notes(record: Record) -> None:
    counts = [len(channel) for channel in record.channels]
    for note in record.notes:
        if not 0 <= note.channel < len(counts) or not 0 <= note.reading < counts[note.channel]:
            raise UndecodableError("not a record: a note is about a reading that is not there")


def _check_late_fields(record: Record) -> None:
    origin, idempotency = record.origin, record.idempotency
    if origin is not None and (len(origin.spool) != 16 or not 0 <= origin.sequence < origin.through):
        raise UndecodableError("not a record: its place in a spool is none")
    if idempotency is not None and {*map(len, (idempotency.scope, idempotency.key, idempotency.fingerprint))} != {16}:
        raise UndecodableError("not a record: a part of its idempotency key is not 16 bytes long")
    if len(record.replays) not in (0, 16):
        raise UndecodableError("not a record: the quarantine row it replays has no id")
    if record.delivery is not None:
        _check_delivery(record.delivery)


def _check_delivery(delivery: Delivery) -> None:
    ids = len(delivery.session), len(delivery.digest)
    numbers = 0 <= delivery.floor <= delivery.number < _NUMBER_END and 0 <= delivery.began <= delivery.number
    is_sound = 0 < delivery.packet <= _PACKET_MAX and numbers
    if ids != (16, 8) or not is_sound:
        raise UndecodableError("not a record: how it was delivered is none")
