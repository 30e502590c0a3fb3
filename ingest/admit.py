"""The one use case of ingest: judge each reading of a device's request on its own, and make the log record.

Pure but for a bounded cache of channel specifications: time and identity are passed in. What fails is answered per
reading and travels in the same record, for the quarantine. Left out: who may send (`ingest.credentials`), and what
only the store knows (series limits, units first reported, conflicts: `workers.landing`).
"""

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import orjson

from ingest.formats.shape import BadNumber, Malformed, Measurement, Submission, is_unexpanded, storable
from runtime.secrets import without_secrets, without_secrets_in_json
from schemas.catalogue import METRICS, UNIT_SPELLINGS, Conversion, Metric, metric_name
from schemas.errors import ReadingCode
from schemas.record import PG_EPOCH_US, PLAIN_VERSION, TIME_MADE_UP, Channel, Note, Quality, Record, Refused
from schemas.times import parse_time

TEXT_LENGTH_MAX: Final = 1_000
LABEL_LENGTH_MAX: Final = 64
UNIT_LENGTH_MAX: Final = 16
#: What holds the longest text there may be, written out as JSON: a reading that is cut cannot be replayed.
PAYLOAD_BYTES_MAX: Final = 8_000
#: A record has to stay small enough for the log: after so many bytes of what was sent, only fields we know are kept.
SENT_BYTES_MAX: Final = 200_000
TS_LENGTH_MAX: Final = 64
INTEGER_EXACT_MAX: Final = 2**53
INTEGER_BITS_MAX: Final = 320
_FLOAT_MAX: Final = sys.float_info.max

_METRIC_NAME: Final = re.compile(r"[a-z_][a-z0-9_.:/\-]{0,63}")
_MICROSECONDS_A_DAY: Final = 86_400_000_000
_SPECIFICATIONS_MAX: Final = 20_000


class TimeWindow(NamedTuple):
    """Which times are believed, all in microseconds since 1970-01-01 UTC, both ends included."""

    received: int
    oldest: int
    newest: int
    floor: int
    """Before it stands a clock that was never set, not old data."""


class Sender(msgspec.Struct, frozen=True, gc=False):
    """Whose readings these are, as 16-byte ids."""

    organisation: bytes
    device: bytes


class Sent(Protocol):
    """A request as it came."""

    def text(self, index: int) -> bytes | None:
        """The measurement of this index as it was sent, as JSON; None where it cannot be told."""
        ...


class Rejection(msgspec.Struct, frozen=True, gc=False):
    """A reading's refusal, as the client is told."""

    index: int
    code: str
    message: str
    retryable: bool = False


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """What became of one device's part of a request."""

    record: Record
    accepted: int
    rejections: list[Rejection]


class _Refusal(Exception):  # noqa: N818 - a verdict that unwinds to the loop, not an error of ours
    def __init__(self, code: ReadingCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Specification(NamedTuple):
    """What a (type, label, unit) means: where its readings go and how its values are judged."""

    metric: str
    label: str
    series: str
    """Metric and label in one: the same for every way to spell them."""
    unit: str
    sent_unit: str
    """As it came, where values are converted; empty where they are not."""
    conversion: Conversion | None
    low: float
    high: float
    known: bool
    boolean: bool


class _Column:
    """The readings of one channel while a request is worked on; times in µs since 1970."""

    __slots__ = ("claims", "flags", "specification", "times", "values")

    def __init__(self, specification: Specification) -> None:
        self.specification = specification
        self.times: list[int] = []
        self.values: list[Any] = []
        self.flags: list[int] = []
        self.claims: dict[int, tuple[str, int | None]] | None = None
        """By position, the times that were not believed: as sent, and as a moment where that can be told."""


class Admission:
    """Judges requests. Its state is a cache only: one object serves a whole process."""

    def __init__(self, *, future_us: int, year_floor: int) -> None:
        self._future_us = future_us
        self._floor = round(datetime(year_floor, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
        self._specifications: dict[tuple[Any, Any, Any], Specification] = {}

    def window(self, received: int, retention_days: int) -> TimeWindow:
        """What is believed of a request received at `received` (µs since 1970) for an organisation."""
        oldest = received - retention_days * _MICROSECONDS_A_DAY
        return TimeWindow(received, oldest, received + self._future_us, self._floor)

    def admit(
        self,
        submissions: Iterable[tuple[int, Submission]],
        sender: Sender,
        window: TimeWindow,
        *,
        record_id: bytes,
        request_id: str,
        way: str,
        sent: Sent | None = None,
    ) -> Admitted:
        """Judge one device's submissions; each comes with the index of its first measurement in the request."""
        work = _Work(self._specify, window, sent)
        for first, submission in submissions:
            work.take(first, submission)
        channels, notes = work.pack()
        record = Record(
            PLAIN_VERSION,
            record_id,
            sender.organisation,
            sender.device,
            window.received - PG_EPOCH_US,
            way,
            request_id,
            channels,
            work.refused,
            notes,
        )
        return Admitted(record, work.accepted, work.rejections)

    def refuse(
        self,
        submissions: Iterable[tuple[int, Submission]],
        sender: Sender,
        window: TimeWindow,
        code: ReadingCode,
        message: str,
        *,
        record_id: bytes,
        request_id: str,
        way: str,
        sent: Sent | None = None,
    ) -> Admitted:
        """Refuse all of one device's submissions, for a reason that is not theirs."""
        work = _Work(self._specify, window, sent)
        for first, submission in submissions:
            work.refuse(first, submission, code, message)
        ids = record_id, sender.organisation, sender.device
        received = window.received - PG_EPOCH_US
        record = Record(PLAIN_VERSION, *ids, received, way, request_id, [], work.refused)
        return Admitted(record, 0, work.rejections)

    def _specify(self, key: tuple[Any, Any, Any]) -> Specification:
        known = self._specifications.get(key)
        if known is None:
            known = specify(*key)
            if len(self._specifications) >= _SPECIFICATIONS_MAX:
                self._specifications.clear()
            self._specifications[key] = known
        return known


class _Work:
    """One request of one device, being judged."""

    __slots__ = (
        "_columns",
        "_dated",
        "_doubted",
        "_made_up",
        "_sent",
        "_sent_bytes",
        "_specify",
        "_window",
        "accepted",
        "refused",
        "rejections",
    )

    def __init__(
        self, specify: Callable[[tuple[Any, Any, Any]], Specification], window: TimeWindow, sent: Sent | None
    ) -> None:
        self._specify = specify
        self._window = window
        self._sent = sent
        self._sent_bytes = 0
        """Of what was sent and is kept as it was."""
        self._columns: dict[Any, _Column] = {}
        self._dated = False
        self._doubted = False
        self._made_up = False
        """Whether any of the times is ours, not the device's."""
        self.accepted = 0
        self.refused: list[Refused] = []
        self.rejections: list[Rejection] = []

    def take(self, first: int, submission: Submission) -> None:
        """Judge every measurement. This loop is the hot path: the common case is decided in it, the rest below."""
        received, oldest, newest, _ = self._window
        common_ts, columns = submission.ts, self._columns
        moments: dict[Any, int | None] = {}
        for index, measurement in enumerate(submission.measurements, first):
            try:
                key = (measurement.type, measurement.label, measurement.unit)
                column = columns.get(key)
                if column is None:
                    column = columns[key] = _Column(self._specify(key))
                specification = column.specification
                value = measurement.value
                flags = 0
                if type(value) is int and -INTEGER_EXACT_MAX <= value <= INTEGER_EXACT_MAX:
                    value = float(value)
                if type(value) is not float or specification.boolean:
                    column, value, flags = self._other_value(key, column, value)
                elif specification.conversion is not None:
                    value = specification.conversion(value)
                    flags = _CONVERTED
                if type(value) is float and not specification.low <= value <= specification.high:
                    raise _beyond(specification, value)
                raw_time = measurement.ts
                if raw_time is None:
                    raw_time = common_ts
                if raw_time is None:
                    stamp = received
                    flags |= _STAMPED
                    self._made_up = True
                else:
                    # Readings of one moment share its text or number; reading a time costs as much as all the rest.
                    kind = type(raw_time)
                    moment = moments.get(raw_time) if kind is str or kind is int else None
                    if moment is None:
                        moment = moments[raw_time] = parse_time(raw_time)
                    if moment is not None and oldest <= moment <= newest:
                        stamp = moment
                        self._dated = True
                    else:
                        stamp = received
                        self._doubt(column, raw_time, moment)
                        flags |= _REPLACED
                column.times.append(stamp)
                column.values.append(value)
                column.flags.append(flags)
            except (_Refusal, ValueError, TypeError, AttributeError) as error:
                self._refuse(index, measurement, common_ts, error)

    def _other_value(self, key: Any, column: _Column, value: object) -> tuple[_Column, float | str, int]:
        """A value that is no plain number: its column (texts have one of their own), value and flags."""
        judged, flags = _judge_other(column.specification, value)
        if type(judged) is str:
            column = self._columns.setdefault((key, "text"), _Column(column.specification))
        return column, judged, flags

    def _doubt(self, column: _Column, raw: object, moment: int | None) -> None:
        """Remember what an unbelievable time claimed, for when the whole request is known."""
        window = self._window
        if moment is not None and window.floor <= moment < window.oldest:
            raise _Refusal(ReadingCode.TOO_OLD, "its time is older than the organisation keeps readings")
        if column.claims is None:
            column.claims = {}
        shown = without_secrets(str(raw))[:64]
        column.claims[len(column.times)] = (shown if shown.isprintable() else ascii(shown)[:64], moment)
        self._made_up = self._doubted = True

    def refuse(self, first: int, submission: Submission, code: ReadingCode, message: str) -> None:
        """Refuse every measurement, whatever it is."""
        for index, measurement in enumerate(submission.measurements, first):
            self._refuse(index, measurement, submission.ts, _Refusal(code, message))

    def _refuse(self, index: int, measurement: Any, common_ts: object, error: Exception) -> None:
        shown: object = measurement
        if isinstance(measurement, Malformed):
            code, message, shown = measurement.code, measurement.message, measurement.payload
        elif isinstance(error, _Refusal):
            code, message = error.code, error.message
        elif isinstance(error, ValueError):
            code, message = ReadingCode.INVALID_TIME, f"ts: {error}"
        elif isinstance(measurement, Measurement) and not _texts(measurement):
            code, message = ReadingCode.INVALID_MEASUREMENT, "type, label and unit are texts"
        else:
            raise error
        message = without_secrets(message)
        self.rejections.append(Rejection(index, str(code), message))
        payload = self._as_sent(index, common_ts, is_whole=isinstance(measurement, Measurement))
        if payload is None:
            payload = _payload(_timed(shown, common_ts))
        self.refused.append(Refused(index, str(code), message, payload))

    def _as_sent(self, index: int, common_ts: object, *, is_whole: bool) -> bytes | None:
        """What was refused as it was sent, without secrets; None where that cannot be told or would be cut."""
        text = None if self._sent is None else self._sent.text(index)
        if text is None or len(text) > PAYLOAD_BYTES_MAX or self._sent_bytes + len(text) > SENT_BYTES_MAX:
            return None
        common_ts = _common_time(common_ts)
        if common_ts is not None:
            text = _timed_text(text, json.dumps(common_ts).encode(), is_whole=is_whole)
        payload = without_secrets_in_json(text.decode(errors="replace")).encode()
        if len(payload) > PAYLOAD_BYTES_MAX:
            return None
        self._sent_bytes += len(payload)
        return payload

    def _space(self) -> None:
        """A request that told times, none of them believable, keeps its spacing, its newest at the receive time."""
        columns = [column for column in self._columns.values() if column.claims]
        moments = [moment for column in columns for _, moment in (column.claims or {}).values() if moment is not None]
        newest, window = max(moments, default=0), self._window
        if self._dated or not 0 < newest - min(moments, default=0) <= window.received - window.oldest:
            return
        for column in columns:
            for position, (_, moment) in (column.claims or {}).items():
                if moment is not None:
                    column.times[position] = window.received - (newest - moment)
                    column.flags[position] ^= _REPLACED | Quality.TIME_SHIFTED

    def pack(self) -> tuple[list[Channel], list[Note]]:
        """The record's channels, and the notes of readings that lose something in their plain row."""
        if self._doubted:
            self._space()
        if self._made_up:
            _part_coinciding(self._columns)
        channels: list[Channel] = []
        notes: list[Note] = []
        for column in self._columns.values():
            count = len(column.times)
            if not count:
                continue
            if column.claims or column.specification.sent_unit:
                notes += _notes(column, len(channels))
            channels.append(_channel(column, count))
            self.accepted += count
        return channels, notes


_CONVERTED: Final = Quality.UNIT_CONVERTED.value
_STAMPED: Final = Quality.TIME_STAMPED.value
_REPLACED: Final = Quality.TIME_REPLACED.value


def _texts(measurement: Measurement) -> bool:
    return all(part is None or type(part) is str for part in (measurement.type, measurement.label, measurement.unit))


def specify(raw_metric: str | None, label: str | None, unit: str | None) -> Specification:
    """What a measurement's (type, label, unit) means. Raises a refusal for a bad name or an unknown unit."""
    if not all(part is None or type(part) is str for part in (raw_metric, label, unit)):
        raise TypeError("type, label and unit are texts")
    if not raw_metric:
        raise _Refusal(ReadingCode.INVALID_METRIC, "`type` is missing")
    name = metric_name(raw_metric)
    if not _METRIC_NAME.fullmatch(name):
        raise _Refusal(
            ReadingCode.INVALID_METRIC, "`type` is up to 64 of a-z 0-9 _ . : / - and begins with a letter or _"
        )
    if without_secrets(name) != name:
        raise _Refusal(ReadingCode.INVALID_METRIC, "`type` holds a token or a key, which are never stored")
    label, unit = label or "", unit or ""
    if len(label) > LABEL_LENGTH_MAX or not (label.isprintable()):
        raise _Refusal(ReadingCode.INVALID_LABEL, f"`label` is up to {LABEL_LENGTH_MAX} printable characters")
    if len(unit) > UNIT_LENGTH_MAX or not unit.isprintable():
        raise _Refusal(ReadingCode.INVALID_UNIT, f"`unit` is up to {UNIT_LENGTH_MAX} printable characters")
    label = without_secrets(label)
    known = METRICS.get(name)
    if known is None:
        series = f"{name} {label}"
        return Specification(name, label, series, unit, "", None, -_FLOAT_MAX, _FLOAT_MAX, known=False, boolean=False)
    return _specify_known(known, label, unit)


def _specify_known(metric: Metric, label: str, sent_unit: str) -> Specification:
    unit = UNIT_SPELLINGS.get(sent_unit, sent_unit)
    conversion: Conversion | None = None
    if unit and unit != metric.unit:
        conversion = metric.conversions.get(unit)
        if conversion is None:
            takes = ", ".join([metric.unit, *metric.conversions]).strip(", ") or "no unit"
            raise _Refusal(ReadingCode.UNKNOWN_UNIT, f"{metric.name} takes {takes}, not `{sent_unit}`")
        if conversion.metric is not None:
            metric = METRICS[conversion.metric]
    if conversion is not None and conversion.keeps_value:
        conversion = None
    return Specification(
        metric.name,
        label,
        f"{metric.name} {label}",
        metric.unit,
        "" if conversion is None else sent_unit,
        conversion,
        metric.low,
        metric.high,
        known=True,
        boolean=metric.boolean,
    )


def _judge_other(specification: Specification, value: object) -> tuple[float | str, int]:
    """A boolean, text or big integer, or a value of a boolean metric: what is stored, and its flags."""
    if type(value) is bool:
        if specification.known and not specification.boolean:
            raise _Refusal(ReadingCode.INVALID_VALUE, f"{specification.metric} takes a number")
        return float(value), Quality.BOOLEAN.value
    if type(value) is float:
        if value not in (0.0, 1.0):
            raise _Refusal(ReadingCode.OUT_OF_RANGE, f"{specification.metric} takes true or false, 1 or 0")
        return value, Quality.BOOLEAN.value
    if isinstance(value, BadNumber):
        raise _Refusal(ReadingCode.NOT_FINITE, "a value is a finite number")
    if type(value) is str and is_unexpanded(value):
        raise _Refusal(ReadingCode.UNEXPANDED, "the value is a placeholder the device did not fill in")
    if type(value) is int and specification.known and not specification.boolean:
        return _judge_large(specification, value)
    if specification.known:
        raise _Refusal(ReadingCode.INVALID_VALUE, f"{specification.metric} takes {_takes(specification)}")
    if type(value) is int:
        if value.bit_length() > INTEGER_BITS_MAX:
            raise _Refusal(ReadingCode.OUT_OF_RANGE, "an integer has up to 96 digits")
        return str(value), Quality.INTEGER.value
    if type(value) is not str:
        raise _Refusal(ReadingCode.INVALID_VALUE, "a value is a number, true, false or a text")
    return _judge_text(value), 0


def _judge_large(specification: Specification, value: int) -> tuple[float, int]:
    """An integer beyond 2^53 of a metric that takes numbers; the caller checks its range."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    conversion = specification.conversion
    return (number, 0) if conversion is None else (conversion(number), _CONVERTED)


def _judge_text(value: str) -> str:
    if not value:
        raise _Refusal(ReadingCode.INVALID_VALUE, "a value is not empty")
    if len(value) > TEXT_LENGTH_MAX:
        raise _Refusal(ReadingCode.OUT_OF_RANGE, f"a text has up to {TEXT_LENGTH_MAX} characters")
    if not storable(value):
        raise _Refusal(ReadingCode.INVALID_VALUE, "the text holds characters that cannot be stored")
    return without_secrets(value)


def _takes(specification: Specification) -> str:
    return "true or false" if specification.boolean else "a number"


def _beyond(specification: Specification, value: float) -> _Refusal:
    if not abs(value) <= _FLOAT_MAX:
        return _Refusal(ReadingCode.NOT_FINITE, "a value is a finite number")
    low, high, unit = specification.low, specification.high, specification.unit
    return _Refusal(
        ReadingCode.OUT_OF_RANGE, f"{specification.metric} lies between {low:g} and {high:g} {unit}".rstrip()
    )


def _part_coinciding(columns: Mapping[Any, _Column]) -> None:
    """Move times of our making on by 1 µs where they would coincide with another of their series."""
    if max([len(column.times) for column in columns.values()]) == 1 and (
        len(columns) == len({column.specification.series for column in columns.values()})
    ):
        return
    by_series: dict[str, list[tuple[Any, _Column]]] = {}
    for key, column in columns.items():
        by_series.setdefault(column.specification.series, []).append((key, column))
    for spellings in by_series.values():
        if len(spellings) > 1:
            # By spelling, not by what came first: that may have been refused, which is to move nothing else.
            _part_series([column for _, column in sorted(spellings, key=lambda spelling: repr(spelling[0]))])
        elif len(spellings[0][1].times) > 1:
            _part_series([spellings[0][1]])


def _part_series(columns: list[_Column]) -> None:
    times, flags = columns[0].times, columns[0].flags
    count = len(times)
    if len(columns) == 1 and times.count(times[0]) == count == flags.count(flags[0]) and flags[0] & TIME_MADE_UP:
        times[:] = range(times[0], times[0] + count)  # the usual case: a request without a time
        return
    theirs: set[int] = set()
    ours: list[tuple[int, int, int]] = []
    for number, column in enumerate(columns):
        for position, (moment, flag) in enumerate(zip(column.times, column.flags, strict=True)):
            if flag & TIME_MADE_UP:
                ours.append((moment, number, position))
            else:
                theirs.add(moment)
    taken = -1
    for moment, number, position in sorted(ours):
        taken = max(moment, taken + 1)
        while taken in theirs:
            taken += 1
        columns[number].times[position] = taken


_TIME: Final = struct.Struct(">q")
_VALUE: Final = struct.Struct(">d")


def _channel(column: _Column, count: int) -> Channel:
    specification, times, values, flags = column.specification, column.times, column.values, column.flags
    if count == 1:
        packed_times = _TIME.pack(times[0] - PG_EPOCH_US)
        packed_values = values if type(values[0]) is str else _VALUE.pack(values[0])
        quality: int | bytes = flags[0]
    else:
        packed_times = struct.pack(f">{count}q", *[moment - PG_EPOCH_US for moment in times])
        packed_values = values if type(values[0]) is str else struct.pack(f">{count}d", *values)
        quality = flags[0] if flags.count(flags[0]) == count else struct.pack(f">{count}h", *flags)
    return Channel(
        specification.metric, specification.label, specification.unit, packed_times, packed_values, quality
    )


def _notes(column: _Column, channel: int) -> list[Note]:
    unit = column.specification.sent_unit or None
    claims = column.claims or {}
    positions = range(len(column.times)) if unit else sorted(claims)
    return [
        Note(channel, position, claims[position][0] if position in claims else None, unit) for position in positions
    ]


def _common_time(common_ts: object) -> str | float | None:
    """The time of a request as far as it can be kept with each of its readings."""
    if type(common_ts) is str:
        return common_ts[:TS_LENGTH_MAX]
    return common_ts if type(common_ts) is int or type(common_ts) is float else None


def _timed(shown: object, common_ts: object) -> object:
    """What was refused, with the time of its request if it has none: it may be replayed alone."""
    common_ts = _common_time(common_ts)
    if common_ts is None:
        return shown
    if isinstance(shown, Measurement) and shown.ts is None:
        return Measurement(shown.type, shown.value, shown.label, shown.unit, common_ts)
    return {**shown, "ts": common_ts} if isinstance(shown, dict) and shown.get("ts") is None else shown


_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _timed_text(text: bytes, common_ts: bytes, *, is_whole: bool) -> bytes:
    """The same for a JSON text. One that says something twice (not `is_whole`) keeps all of it."""
    try:
        members = _members.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return text  # no object: it has no time
    if "ts" in members and bytes(members["ts"]) != b"null":
        return text
    if "ts" in members and is_whole:
        return msgspec.json.encode(members | {"ts": msgspec.Raw(common_ts)})
    return b'%b%b"ts":%b}' % (text[:-1].rstrip(), b"," if members else b"", common_ts)


def _payload(shown: object) -> bytes:
    """What was refused, as JSON of bounded size; tokens in it are blotted out."""
    try:
        text = orjson.dumps(shown, default=_plain).decode()
    except (TypeError, ValueError, RecursionError):
        text = _spelt_out(shown)
    return without_secrets(text).encode()[:PAYLOAD_BYTES_MAX]


def _spelt_out(shown: object) -> str:
    """As JSON, of what orjson does not write: an integer beyond 64 bits, a lone surrogate, a deep nesting."""
    try:
        return json.dumps(shown, default=_plain)
    except (TypeError, ValueError, RecursionError):
        return '"this cannot be shown as JSON"'


def _plain(value: object) -> object:
    if isinstance(value, Measurement):
        fields = {"type": value.type, "value": value.value, "label": value.label, "unit": value.unit, "ts": value.ts}
        return {name: field for name, field in fields.items() if field is not None}
    if isinstance(value, BadNumber):
        return {"not_finite": value.text}  # as a text it would be taken for one when it is replayed
    raise TypeError(f"{type(value).__name__} is no JSON value")
