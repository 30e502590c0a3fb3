"""Plants' snapshots: `{ts, n, sig?, timestamp?, devices: [{externalId, type, raw | values}]}`, told from forged ones.

`ts` is when it was published, `timestamp` when it was measured, `n` a nonce. What a device behind a plant sends is
read by a template, and its name is the label. Pure: no I/O, no clock. Left out: whether the nonce was used before,
which landing knows, and whether a reading is any good (`ingest.admit`).
"""

import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import Annotated, Any, Final, NamedTuple

import msgspec

from ingest.admit import TimeWindow
from ingest.formats.shape import Malformed, Measurement, Submission
from ingest.plants import Plant, Template
from schemas.errors import ReadingCode
from schemas.record import NONCE_SCOPE, Idempotency
from schemas.signing import NotCanonicalError, snapshot_parts
from schemas.times import parse_time

RAW_METRIC: Final = "raw"
"""What no template names: the mask as a number; of values, `raw.` and the field's own name."""

_CABINET: Final = "CABINET"
_MASK_MAX: Final = 2**32 - 1
#: Whole numbers beyond it have digits that no scale keeps: admission says what it thinks of them.
_SCALED_MAX: Final = 2**63
_DIGEST_BYTES: Final = 16
_NONCE: Final = re.compile(r"[0-9a-fA-F]{8,64}", re.ASCII)
_UNREAD: Final = Template("", b"[]")
#: A name behind which something else than its colon stands.
_SPACED_NAME: Final = re.compile(rb'"\s+:')


class _Envelope(msgspec.Struct, gc=False):
    ts: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    n: str
    devices: list[Any]
    sig: str | None = None
    timestamp: str | int | float | None = None


_decoder: Final = msgspec.json.Decoder(_Envelope)


class SnapshotError(ValueError):
    """There is nothing in a message that may be believed: `code` says why."""

    def __init__(self, code: ReadingCode, message: str, *, is_forged: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_forged = is_forged
        """Whether somebody who is not the plant may have made it."""


class Snapshot(NamedTuple):
    """What a message says that may be believed."""

    submission: Submission
    nonce: Idempotency
    is_signed: bool
    is_late: bool
    """It came outside the replay window, and says when it was measured."""
    is_stale: bool
    """It came outside the replay window, and nobody can tell when it was measured."""

    @property
    def kind(self) -> str:
        """What it counts as."""
        if self.is_stale:
            return str(ReadingCode.STALE_ENVELOPE)
        return "late" if self.is_late else "signed" if self.is_signed else "unsigned"


def read(payload: bytes, plant: Plant, window: TimeWindow, replay_us: int) -> Snapshot:
    """The snapshot in `payload`. Raises `SnapshotError`.

    `window`: of its receipt; `replay_us`: how far `ts` may be from that.
    """
    envelope = _decode(payload)
    parts = _check_signature(envelope, plant, window.received)
    if parts is None:
        _check_names(payload, envelope)
        content: bytes = payload
    else:
        content = b"|".join([part if type(part) is bytes else str(part).encode() for part in parts])
    nonce = Idempotency(NONCE_SCOPE, _digest(envelope.n.lower().encode()), _digest(content))
    is_outside = abs(window.received - envelope.ts * 1000) > replay_us
    is_late = is_outside and _tells_time(envelope.timestamp, window)
    time = envelope.ts if envelope.timestamp is None else envelope.timestamp
    measurements = [one for device in envelope.devices for one in _read_device(device, plant)]
    submission = Submission(measurements, None, time)
    return Snapshot(submission, nonce, parts is not None, is_late, is_outside and not is_late)


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=_DIGEST_BYTES).digest()


# ---------------------------------------------------------------- the envelope


def _decode(payload: bytes) -> _Envelope:
    try:
        if not payload.isascii():
            payload.decode()  # the decoder looks into no text that it passes over
        envelope = _decoder.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise SnapshotError(ReadingCode.UNDECODABLE, f"the message is no snapshot: {error}") from None
    if _NONCE.fullmatch(envelope.n) is None:
        raise SnapshotError(ReadingCode.UNDECODABLE, "`n` is 8 to 64 hexadecimal digits")
    return envelope


def _check_signature(envelope: _Envelope, plant: Plant, now_us: int) -> tuple[str | bytes, ...] | None:
    """What was signed; None of a plant that need not sign, and did not. Raises `SnapshotError`."""
    if envelope.sig is None:
        if plant.must_sign:
            raise _forged("the plant signs what it sends, and `sig` is missing")
        return None
    if not plant.is_readable:
        raise SnapshotError(ReadingCode.BAD_SIGNATURE, "the plant's secret cannot be opened here: rotate it")
    try:
        parts = snapshot_parts(plant.name, envelope.ts, envelope.n, envelope.timestamp, envelope.devices)
    except NotCanonicalError as error:
        raise _forged(f"it cannot be signed: {error}") from None
    if not plant.signed(envelope.sig, parts, now_us):
        raise _forged("`sig` is not the plant's")
    return parts


def _forged(message: str) -> SnapshotError:
    return SnapshotError(ReadingCode.BAD_SIGNATURE, message, is_forged=True)


def _check_names(payload: bytes, envelope: _Envelope) -> None:
    """Raises `SnapshotError` where an object names something twice: the decoder keeps the last.

    Whoever signed it signed what the decoder kept; of what is unsigned nobody can tell which is meant.
    """
    known = 3 + (envelope.timestamp is not None)
    for device in envelope.devices:
        if type(device) is dict:
            known += len(device)
            values = device.get("values")
            if type(values) is dict:
                known += len(values)
    if payload.count(b'":') == known and _SPACED_NAME.search(payload) is None:
        return
    try:
        json.loads(payload, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(ReadingCode.UNDECODABLE, f"the message is no snapshot: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return content


def _tells_time(timestamp: object, window: TimeWindow) -> bool:
    """Whether it says when it was measured, so that nothing needs to be made up."""
    try:
        moment = None if timestamp is None else parse_time(timestamp)
    except (ValueError, OverflowError):
        return False
    return moment is not None and window.floor <= moment <= window.newest


# ---------------------------------------------------------------- the devices behind a plant


def _read_device(device: object, plant: Plant) -> Iterator[Measurement | Malformed]:
    """What one of them sent; what is wrong with it is told in the place of its readings."""
    if type(device) is not dict:
        yield _malformed("a device is an object", device)
        return
    name, kind, mask, values = (device.get(key) for key in ("externalId", "type", "raw", "values"))
    if type(name) is not str or not name or type(kind) is not str:
        yield _malformed("a device has an `externalId` and a `type`, both texts", device)
        return
    if mask is None and type(values) is not dict:
        wanted = "`raw`, a mask of 32 bits" if kind == _CABINET else "`values`, an object"
        yield _malformed(f"a device of the type {kind[:64]} has {wanted}", device)
        return
    template = plant.templates.get(kind, _UNREAD)
    if mask is not None:
        yield from _read_mask(mask, name, template, device)
    if type(values) is dict:
        yield from _read_values(values, name, template)
    elif values is not None:
        yield _malformed("`values` is an object", device)


def _read_mask(mask: object, name: str, template: Template, device: object) -> Iterator[Measurement | Malformed]:
    if type(mask) is not int or not 0 <= mask <= _MASK_MAX:
        yield _malformed("`raw` is a whole number of 32 bits", device)
        return
    for bit in template.bits:
        yield Measurement(bit.name, mask & bit.mask != 0, name, bit.unit)
    # All of it, once more: what bits mean that no template names may be known one day.
    yield Measurement(RAW_METRIC, mask, name)


def _read_values(values: dict[str, Any], name: str, template: Template) -> Iterator[Measurement]:
    for field, value in values.items():
        known = template.fields.get(field)
        if known is None:
            yield Measurement(f"{RAW_METRIC}.{field}", value, name)
            continue
        for signal in known:
            if signal.scale is not None and _is_number(value):
                yield Measurement(signal.name, signal.scale(value), name, signal.unit)
            else:
                yield Measurement(signal.name, value, name, signal.unit)


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _SCALED_MAX)


def _malformed(message: str, device: object) -> Malformed:
    """Under a name of its own: a device with a `type` and a `value` would be replayed as a measurement."""
    return Malformed(ReadingCode.INVALID_MEASUREMENT, message, {"device": device})
