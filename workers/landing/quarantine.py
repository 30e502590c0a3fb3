"""What stands in the quarantine: one row a reading that did not land, with why and, bounded, what it was.

Items of a record: those refused at the door under their index in the request, from 0; those refused behind the log
under -1 - n, n being the reading's number in the record; a record that cannot be read whole under 0.
Left out: how rows are written (`store`).
"""

import re
import struct
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import msgspec

from runtime.secrets import without_secrets_in_bytes
from schemas.catalogue import METRICS, UNIT_SPELLINGS
from schemas.record import PG_EPOCH_US, Channel, Note, Quality, Record
from schemas.times import parse_time

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_TIME: Final = struct.Struct(">q")
_VALUE: Final = struct.Struct(">d")
_QUALITY: Final = struct.Struct(">h")
_INT4_MAX: Final = 2**31 - 1
_JSON_INTEGER: Final = re.compile(r"-?(0|[1-9]\d{0,399})", re.ASCII)
_MESSAGE_MAX: Final = 500
_REQUEST_ID_MAX: Final = 200
#: What a device says of times before 2015, or beyond this after its receipt, is not believed.
_CLOCKS_SET: Final = 15 * 31_557_600_000_000
_AHEAD_MAX: Final = 600_000_000


class Place(NamedTuple):
    """Where a record stands in the log; one that came through a spool goes by where it stood there."""

    partition: int
    position: int
    spool: bytes = b""
    """The spool's id; empty for the log."""


class QuarantineRow(NamedTuple):
    """As the table has it; ids as bytes, times in microseconds since 2000."""

    organisation: bytes | None
    device: bytes | None
    code: str
    message: str
    payload: bytes
    request_id: str
    received_at: int
    place: Place
    item: int


class Reading(NamedTuple):
    """Reading `at` of a channel; `number` counts from the record's first reading through all its channels."""

    place: Place
    record: Record
    channel: Channel
    at: int
    number: int
    note: Note | None = None
    """What the record says of it besides."""


def of_reading(reading: Reading, code: str, message: str, payload_max: int) -> QuarantineRow:
    payload = _as_json(reading)[:payload_max]
    return _row(reading.place, reading.record, code, message, payload, -1 - reading.number)


def of_refused(place: Place, record: Record, payload_max: int) -> list[QuarantineRow]:
    """What the record carries of readings refused at the door."""
    numbers = [refused.index for refused in record.refused]
    if len(set(numbers)) < len(numbers) or min(numbers) < 0 or max(numbers) > _INT4_MAX:
        numbers = [*range(len(numbers))]  # a number that the table does not take must not lose a row
    return [
        _row(place, record, refused.code, refused.message, refused.payload[:payload_max], number)
        for number, refused in zip(numbers, record.refused, strict=True)
    ]


def of_body(place: Place, body: bytes, message: str, received_at: int, payload_max: int) -> QuarantineRow:
    """A record of which nothing can be read, not even whose it is."""
    payload = without_secrets_in_bytes(body)[:payload_max]
    return QuarantineRow(None, None, "undecodable", message, payload, "", received_at, place, 0)


def time_of(row: QuarantineRow) -> int:
    """When its reading was measured, as far as that can be told; in microseconds since 2000."""
    return time_told(row.payload, row.received_at, row.item)


def time_told(payload: bytes, received_at: int, item: int) -> int:
    """The time in a payload as it came first; the receive time where there is none to believe."""
    try:
        told = parse_time(_timed.decode(payload).ts)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError):
        return received_at
    if told is None:
        return received_at
    told -= PG_EPOCH_US
    # Landing's own payloads tell the time that the reading was judged by.
    return told if item < 0 or _CLOCKS_SET <= told <= received_at + _AHEAD_MAX else received_at


class _Timed(msgspec.Struct, gc=False):
    ts: str | int | float | None = None


_timed: Final = msgspec.json.Decoder(_Timed)


def is_storable_json(raw: bytes) -> bool:
    """Whether a jsonb column takes it: PostgreSQL's text has no NUL."""
    try:
        msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return b"\\u0000" not in raw


def is_storable_text(text: str | None) -> bool:
    return text is None or "\0" not in text


def _row(place: Place, record: Record, code: str, message: str, payload: bytes, item: int) -> QuarantineRow:
    return QuarantineRow(
        record.organisation,
        record.device,
        _cleaned(code, _REQUEST_ID_MAX),
        _cleaned(message, _MESSAGE_MAX),
        payload,
        _cleaned(record.request_id, _REQUEST_ID_MAX),
        record.received_at,
        place,
        item,
    )


def _cleaned(text: str, length_max: int) -> str:
    return text[:length_max].replace("\0", "\N{REPLACEMENT CHARACTER}")


def _as_json(reading: Reading) -> bytes:
    """As the JSON format takes it again; its flags and note beside it, which a replay gives back."""
    channel, at, note = reading.channel, reading.at, reading.note
    (time,) = _TIME.unpack_from(channel.times, 8 * at)
    quality = channel.quality
    if isinstance(quality, bytes):
        (quality,) = _QUALITY.unpack_from(quality, 2 * at)
    shown = {
        "type": channel.metric,
        "label": channel.label,
        "unit": channel.unit,
        "ts": _as_text(time),
        "value": _value(channel, at, quality),
        "quality": quality,
    }
    return msgspec.json.encode(shown if note is None else shown | _noted(note, channel.metric, shown["value"]))


def _noted(note: Note, metric: str, value: object) -> dict[str, object]:
    """What a note tells: unit and value as they were sent, the rest under the note's own names."""
    shown: dict[str, object] = {}
    if note.original_unit is not None:
        sent = _before_conversion(metric, note.original_unit, value)
        unit = "unit" if sent is not None else "original_unit"
        shown |= {unit: note.original_unit, "value": value if sent is None else sent}
    if note.original_time is not None:
        shown["original_time"] = note.original_time
    if note.metadata is not None and is_storable_json(note.metadata):
        shown["metadata"] = msgspec.Raw(note.metadata)
    return shown


def _before_conversion(metric: str, unit: str, value: object) -> float | None:
    """The value in `unit` that became `value`; None where none is known to."""
    known = METRICS.get(metric)
    conversion = None if known is None else known.conversions.get(UNIT_SPELLINGS.get(unit, unit))
    return conversion.undo(value) if conversion is not None and isinstance(value, float) else None


def _value(channel: Channel, at: int, quality: int) -> object:
    """As it was sent: true and false, and integers of any length, are stored as something else."""
    if isinstance(channel.values, bytes):
        (value,) = _VALUE.unpack_from(channel.values, 8 * at)
        return value != 0 if quality & Quality.BOOLEAN else value
    text = channel.values[at]
    if quality & Quality.INTEGER and _JSON_INTEGER.fullmatch(text):
        return msgspec.Raw(text.encode())
    return text


def _as_text(time: int) -> str:
    try:
        return (_EPOCH + timedelta(microseconds=time)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return f"{time} microseconds since 2000"
