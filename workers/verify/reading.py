"""The log, read again: each record's readings become claims on the store, stand in quarantine, or are lost.

Landing is not asked what it did but for what only it can know: which readings it set aside, counted as repeats of a
named request, or moved. Left out: whether the claims are met (`matching`).
"""

import asyncio
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

from runtime.errors import ConfigurationError, UnavailableError
from runtime.log.port import BehindRetentionError, Log, Slice
from schemas.record import (
    NONCE_SCOPE,
    TIME_MADE_UP,
    Channel,
    Note,
    Origin,
    Record,
    UndecodableError,
    UnknownVersionError,
    decode,
)
from workers.landing.deliveries import Deliveries
from workers.landing.quarantine import Place, of_refused, time_of
from workers.landing.tombstones import Tombstones, within
from workers.verify import notes, tally
from workers.verify.claims import UNJUDGED, WIDTH, Blobs, Sorter, add_note, entries, move
from workers.verify.pace import Pace
from workers.verify.store import ALWAYS, NEVER, Asked, Exceptions, Held, Store, StoredOutcome
from workers.verify.tally import HOUR_US, Finding, Findings, Group, Tally
from workers.verify.times import as_text

_READ_BYTES: Final = 1_000_000
_RECORDS_AT_ONCE: Final = 2_000
_SILENCE_S: Final = 30.0
_WAIT_S: Final = 1.0
_SERIES_MAX: Final = 500_000
_RELEASED_MAX: Final = 1_000_000
_NOTHING_TOLD: Final = StoredOutcome(False, 0, 0, 0, 0, 0)
_WHOLE: Final = 2**31
_GONE: Final = {"discarded": tally.DISCARDED, "expired": tally.EXPIRED}


class Span(NamedTuple):
    """Which records are judged: those received from `since` up to `until`, of one organisation or of all."""

    since: int
    until: int
    organisation: UUID | None


@dataclass
class Covered:
    """What was read of a partition."""

    start: int
    end: int
    records: int = 0
    readings: int = 0
    first_received: int | None = None
    last_received: int | None = None
    direct_received: int | None = None
    """Receive time of the oldest record that went straight into the log: it was appended right after."""
    is_broken: bool = False
    """The log deleted records while they were being read."""


class Target(NamedTuple):
    """Where what is found goes."""

    tally: Tally
    findings: Findings
    numbers: Sorter
    words: Sorter
    blobs: Blobs


class LogReading:
    """One pass over the log, from its start up to the positions given."""

    def __init__(
        self, log: Log, store: Store, span: Span, target: Target, pace: Pace, *, knows_beginnings: bool
    ) -> None:
        self._log = log
        self._store = store
        self._span = span
        self._pace = pace
        self._series: dict[bytes, int] = {}
        self._judge = Judge(log.source, span, target, self._series, store.tombstones)
        self._knows_beginnings = knows_beginnings
        self.covered: dict[int, Covered] = {}

    @property
    def repeats(self) -> int:
        """Records that had come before, and were not to land again."""
        return self._judge.repeats

    async def run(self, positions: dict[int, int]) -> None:
        """Raises `UnavailableError` when the log is away for long, `ConfigurationError` for newer records."""
        bounds = await self._log.bounds()
        self.covered = {
            partition: Covered(min(bounds[partition].start, end), end) for partition, end in sorted(positions.items())
        }
        self._judge.spools_begin = self._knows_beginnings and not any(part.start for part in self.covered.values())
        left = {partition: part.start for partition, part in self.covered.items() if part.start < part.end}
        reader = self._log.reader()
        try:
            await reader.assign(left)
            silence = 0.0
            while left:
                try:
                    slices = await reader.read(bytes_max=_READ_BYTES, wait_s=_WAIT_S)
                except BehindRetentionError as error:
                    self._break(error, left)
                    await reader.assign(left)
                    continue
                silence = 0.0 if slices else silence + _WAIT_S
                if silence > _SILENCE_S:
                    raise UnavailableError(f"the log gives no records: {self._log.trouble or 'it does not say why'}")
                if await self._take_all(slices, left):
                    await reader.assign(left)
        finally:
            await reader.close()

    def _break(self, error: BehindRetentionError, left: dict[int, int]) -> None:
        """Go on where the log begins now; what was read before proves nothing about the gap."""
        part = self.covered[error.partition]
        part.is_broken, part.direct_received = True, None
        part.start = min(error.start, part.end)
        left.pop(error.partition)
        if error.start < part.end:
            left[error.partition] = error.start

    async def _take_all(self, slices: Sequence[Slice], left: dict[int, int]) -> bool:
        """Whether a partition was read to its end."""
        done = False
        for read in slices:
            if read.partition not in left:
                continue
            end = self.covered[read.partition].end
            bodies = read.bodies[: max(0, end - read.first)]
            for first in range(0, len(bodies), _RECORDS_AT_ONCE):
                await self._take(read.partition, read.first + first, bodies[first : first + _RECORDS_AT_ONCE])
            left[read.partition] = read.next_position
            if read.next_position >= end:
                del left[read.partition]
                done = True
        return done

    async def _take(self, partition: int, first: int, bodies: Sequence[bytes]) -> None:
        """Judge some records, with what the books tell of them."""
        records = [_decoded(body) for body in bodies]
        self._cover(self.covered[partition], records)
        wanted = [record for record in records if record is not None and self._concerns(record)]
        await self._find_series(wanted)
        found = await self._store.exceptions(
            partition,
            first,
            first + len(records),
            _asked(wanted),
        )
        await self._store.learn()
        for position, record in enumerate(records, first):
            if record is None or self._concerns(record):
                self._judge.take(partition, position, record, found)
        await self._pace.spend(sum(record.accepted for record in wanted), "reading the log")

    def _concerns(self, record: Record) -> bool:
        """A spool's records all do: their sequence is checked."""
        organisation = self._span.organisation
        if organisation is not None and record.organisation != organisation.bytes:
            return False
        return record.received_at >= self._span.since or record.origin is not None

    def _cover(self, part: Covered, records: Sequence[Record | None]) -> None:
        part.records += len(records)
        for record in records:
            if record is None:
                continue
            received = record.received_at
            part.readings += record.accepted
            if part.first_received is None:
                part.first_received = received
            part.last_received = received
            if part.direct_received is None and record.origin is None and not record.replays:
                part.direct_received = received

    async def _find_series(self, records: Sequence[Record]) -> None:
        if len(self._series) > _SERIES_MAX:
            self._series.clear()
        missing: dict[bytes, tuple[bytes, bytes, str, str]] = {}
        for record in records:
            for channel in record.channels:
                key = _series_key(record, channel)
                if key not in self._series:
                    missing[key] = record.organisation, record.device, channel.metric, channel.label
        if missing:
            found = await self._store.find(list(missing.values()))
            pairs = zip(missing, found, strict=True)
            self._series.update((key, series_id) for key, series_id in pairs if series_id is not None)


async def oldest_received(log: Log) -> int:
    """A receive time that hardly any record of the log is older than, but those that were long on their way.

    `NEVER` for a log that has all its records, `ALWAYS` for one without any. Raises `UnavailableError`.
    """
    bounds = await log.bounds()
    if not any(found.start for found in bounds.values()):
        return NEVER
    left = {partition: found.start for partition, found in bounds.items() if found.start < found.end}
    oldest: list[int] = []
    reader = log.reader()
    try:
        async with asyncio.timeout(_SILENCE_S):
            while left:
                await reader.assign(left)
                try:
                    slices = await reader.read(bytes_max=1, wait_s=_WAIT_S)
                except BehindRetentionError as error:
                    left[error.partition] = error.start
                    continue
                for read in slices:
                    left.pop(read.partition, None)
                    oldest += [record.received_at for body in read.bodies if (record := _decoded(body)) is not None]
    except TimeoutError:
        raise UnavailableError(f"the log gives no records: {log.trouble or 'it does not say why'}") from None
    finally:
        await reader.close()
    return min(oldest, default=ALWAYS)


class Judge:
    """Decides of each record what must stand where. Pure but for the files that claims go to."""

    def __init__(
        self, source: UUID, span: Span, target: Target, series: dict[bytes, int], tombstones: Tombstones
    ) -> None:
        self._source = source
        self._span = span
        self._tally, self._findings, self._numbers, self._words, self._blobs = target
        self._series = series
        self._tombstones = tombstones
        self._spools: dict[tuple[bytes, int], int] = {}
        self._delivered: dict[int, Deliveries] = {}
        self._first_delivered: dict[tuple[int, bytes], int] = {}
        self._released: set[bytes] = set()
        self.spools_begin = False
        """Whether the first record of a spool's partition must be its number 0."""
        self.repeats = 0
        """Records that had come before, and were not to land again."""

    def take(self, partition: int, position: int, record: Record | None, found: Exceptions) -> None:
        place = Place(partition, position)
        if record is not None and record.origin is not None:
            if not self._follows(place, record, record.origin):
                return
            place = place_of(record.origin)
        told = found.outcomes.get(place, _NOTHING_TOLD)
        if record is None or told.unreadable:
            self._take_unreadable(place, told, found)
        elif record.received_at < self._span.since or (record.replays and not self._releases(record, found)):
            return
        else:
            spot = _Spot(partition, position, place, record, found.quarantine.get(place, {}), told)
            spot.is_judged = record.received_at < self._span.until
            if spot.is_judged:
                source = place.spool or self._source.bytes
                hour = record.received_at // HOUR_US
                spot.group = self._tally.number(Group(record.organisation, hour, source, place.partition))
                self._tally.add(spot.group, tally.TOLD, told.duplicates)
                self._tally.add(spot.group, tally.TOLD_CONFLICTS, told.conflicts)
            is_named = record.idempotency is not None
            is_repeat = is_named and place not in found.named and not spot.held and not told.erased
            if record.idempotency is not None and record.idempotency.scope == NONCE_SCOPE:
                # Nonces are forgotten before the log is: of one that is gone, landing is believed.
                is_repeat = is_repeat and told.duplicates == record.accepted
            if is_repeat or self._is_delivered_again(spot):
                self._take_repeat(spot)
            else:
                self._take_readings(spot, found.moved.get(record.record_id, {}))

    # ------------------------------------------------------------ records that are not to land

    def _take_unreadable(self, place: Place, told: StoredOutcome, found: Exceptions) -> None:
        if self._span.organisation is not None:
            return
        if 0 not in found.quarantine.get(place, {}):
            self._findings.add(
                Finding(
                    kind="lost",
                    message="a record that cannot be read does not stand in quarantine",
                    source=self._source,
                    partition=place.partition,
                    position=place.position,
                )
            )
        elif not told.unreadable:
            self._findings.add(
                Finding(
                    kind="outcome",
                    message="a record that cannot be read has no outcome that says so",
                    source=self._source,
                    partition=place.partition,
                    position=place.position,
                )
            )

    def _follows(self, place: Place, record: Record, origin: Origin) -> bool:
        """Whether a record out of a spool has readings to land: it is neither a repeat nor a gap."""
        spool = origin.spool, origin.partition
        expected = self._spools.get(spool, 0 if self.spools_begin else origin.sequence)
        if origin.through <= expected:
            self.repeats += 1
            return False
        self._spools[spool] = origin.through
        end = origin.through if record.is_gap else origin.sequence
        first = max(expected, origin.sequence) if record.is_gap and origin.sequence <= expected else expected
        is_judged = self._span.organisation is None and self._span.since <= record.received_at < self._span.until
        if end > first and is_judged:
            self._findings.add(
                Finding(
                    kind="gap",
                    message=f"records {first} to {end - 1} of a spool are lost",
                    source=UUID(bytes=origin.spool),
                    partition=origin.partition,
                    position=place.position,
                    readings=end - first,
                )
            )
        return not record.is_gap

    def _releases(self, record: Record, found: Exceptions) -> bool:
        """Whether it is the record that released its quarantine row, which only one does."""
        row = found.replays.get(record.replays)
        is_first = record.replays not in self._released
        if row is None or row.state != "released" or row.record_id != record.record_id or not is_first:
            self.repeats += 1
            return False
        if len(self._released) >= _RELEASED_MAX:
            raise ConfigurationError(f"more than {_RELEASED_MAX} replays: ask for less with --organisation")
        self._released.add(record.replays)
        return True

    def _is_delivered_again(self, spot: "_Spot") -> bool:
        """Whether its message came before. Where not all was read that came before, landing is believed."""
        delivery = spot.record.delivery
        if delivery is None:
            return False
        known = self._delivered.setdefault(spot.partition, Deliveries({}))
        first = self._first_delivered.setdefault((spot.partition, delivery.session), delivery.number)
        is_repeat = known.take(delivery)
        if delivery.again and not is_repeat and delivery.floor <= first:
            return spot.told.duplicates == spot.record.accepted and not spot.held
        return is_repeat

    # ------------------------------------------------------------ readings

    def _take_repeat(self, spot: "_Spot") -> None:
        """Of a named request or a message: readings without a time of their own stand at the first one's."""
        if not spot.is_judged:
            return
        accepted = spot.record.accepted
        for column in (tally.RECEIVED, tally.FOUND, tally.REPEATED):
            self._tally.add(spot.group, column, accepted)
        if spot.told.duplicates != accepted:
            self._findings.add(
                Finding(
                    kind="outcome",
                    message=f"a repeat of a request or message with {accepted} readings, by its outcome with "
                    f"{spot.told.duplicates} duplicates",
                    readings=abs(accepted - spot.told.duplicates),
                    **spot.names(),
                )
            )

    def _take_readings(self, spot: "_Spot", moved: Mapping[int, int]) -> None:
        record = spot.record
        if spot.is_judged:
            self._tally.add(spot.group, tally.RECEIVED, record.accepted + len(record.refused))
            self._check_quarantine(spot)
            self._check_erased(spot, moved)
        noted = notes.of_record(record) if record.notes else {}
        base = 0
        for ordinal, channel in enumerate(record.channels):
            self._claim(spot, channel, base, moved, noted.get(ordinal, ()))
            base += len(channel)

    def _check_quarantine(self, spot: "_Spot") -> None:
        refused = 0
        for item, held in spot.held.items():
            refused += item >= 0
            column = tally.CONFLICTS if held.code == "conflict" else tally.QUARANTINED
            self._tally.add(spot.group, _GONE.get(held.state, column))
        told = spot.told
        if spot.record.refused:
            for row in of_refused(spot.place, spot.record, _WHOLE):
                if row.item in spot.held:
                    continue
                if self._is_erased(spot.record, time_of(row)):
                    self._tally.add(spot.group, tally.ERASED)
                else:
                    self._lose(spot, row.item, f"refused as {row.code}, and not in quarantine")
        if (told.set_aside, told.refused) != (len(spot.held) - refused, refused):
            self._findings.add(
                Finding(
                    kind="outcome",
                    message=f"by its outcome {told.set_aside} readings of the record were set aside and "
                    f"{told.refused} refused, by the quarantine {len(spot.held) - refused} and {refused}",
                    readings=abs(told.set_aside + told.refused - len(spot.held)) or 1,
                    **spot.names(),
                )
            )

    def _check_erased(self, spot: "_Spot", moved: Mapping[int, int]) -> None:
        """No reading was dropped that is not to be erased."""
        if not spot.told.erased:
            return
        times = [time for channel in spot.record.channels for time in channel.unpack_times()]
        erased = sum(self._is_erased(spot.record, moved.get(item, time)) for item, time in enumerate(times))
        if spot.told.erased > erased:
            self._findings.add(
                Finding(
                    kind="outcome",
                    message=f"by its outcome {spot.told.erased} readings of the record were erased, and {erased} are "
                    "to be",
                    readings=spot.told.erased - erased,
                    **spot.names(),
                )
            )

    def _is_erased(self, record: Record, time: int) -> bool:
        spans = self._tombstones.spans.get(record.device)
        return spans is not None and within(spans, time)

    def _claim(
        self, spot: "_Spot", channel: Channel, base: int, moved: Mapping[int, int], noted: Sequence[Note]
    ) -> None:
        """What is not in quarantine has to stand in the store."""
        count = len(channel)
        kept: Sequence[int] = range(count)
        if spot.held:
            kept = [index for index in kept if -1 - base - index not in spot.held]
        series_id = self._series.get(_series_key(spot.record, channel))
        if series_id is None:
            self._claim_nowhere(spot, channel, base, moved, kept if spot.is_judged else ())
            return
        if not kept:
            return
        block = self._entries(spot, channel, series_id, base)
        for item, ts in moved.items():
            if base <= item < base + count:
                move(block, item - base, ts)
        for note in noted:
            blob = notes.encode(_value(channel, note.reading), spot.record, note)
            add_note(block, note.reading, self._blobs.add(blob))
        if len(kept) < count:
            block = bytearray().join(block[index * WIDTH : (index + 1) * WIDTH] for index in kept)
        (self._numbers if isinstance(channel.values, bytes) else self._words).add(block)

    def _claim_nowhere(
        self, spot: "_Spot", channel: Channel, base: int, moved: Mapping[int, int], kept: Sequence[int]
    ) -> None:
        """Readings of a series that does not exist."""
        times = channel.unpack_times()
        for index in kept:
            if self._is_erased(spot.record, moved.get(base + index, times[index])):
                self._tally.add(spot.group, tally.ERASED)
            else:
                message = "its series does not exist, and it is not in quarantine"
                self._lose(spot, base + index, message, channel, index)

    def _entries(self, spot: "_Spot", channel: Channel, series_id: int, base: int) -> bytearray:
        values, place = channel.values, (spot.partition, spot.position)
        packed = values if isinstance(values, bytes) else b"".join(self._blobs.add(one.encode()) for one in values)
        flags = 0 if spot.is_judged else UNJUDGED
        return entries(series_id, channel.times, packed, channel.quality, place, base, spot.group, flags)

    def _lose(self, spot: "_Spot", item: int, message: str, channel: Channel | None = None, index: int = 0) -> None:
        self._tally.add(spot.group, tally.LOST)
        names = spot.names() | {"item": item}
        if channel is not None:
            (time,) = struct.unpack_from(">q", channel.times, 8 * index)
            value = channel.unpack_values()[index]
            names |= {"metric": channel.metric, "label": channel.label, "time": as_text(time), "value": value}
        self._findings.add(Finding(kind="lost", message=message, **names))


class _Spot:
    """A record with what the books tell of it. `place` is where they have it, `position` where the log has it."""

    __slots__ = ("group", "held", "is_judged", "partition", "place", "position", "record", "told")

    def __init__(
        self,
        partition: int,
        position: int,
        place: Place,
        record: Record,
        held: dict[int, Held],
        told: StoredOutcome,
    ) -> None:
        self.partition = partition
        self.position = position
        self.place = place
        self.record = record
        self.held = held
        self.told = told
        self.group = 0
        self.is_judged = True

    def names(self) -> dict[str, Any]:
        """Of a finding about it."""
        return {
            "organisation_id": UUID(bytes=self.record.organisation),
            "device_id": UUID(bytes=self.record.device),
            "partition": self.partition,
            "position": self.position,
        }


def place_of(origin: Origin) -> Place:
    """Where the books have a record that came out of a spool."""
    return Place(origin.partition, origin.sequence, origin.spool)


def _value(channel: Channel, index: int) -> bytes:
    values = channel.values
    return values[8 * index : 8 * index + 8] if isinstance(values, bytes) else values[index].encode()


def _asked(records: Sequence[Record]) -> Asked:
    return Asked(
        [place_of(record.origin) for record in records if record.origin is not None],
        [record.record_id for record in records if any(map(_is_made_up, record.channels))],
        [record.replays for record in records if record.replays],
        [
            (record.device, record.idempotency, record.received_at)
            for record in records
            if record.idempotency is not None
        ],
    )


def _decoded(body: bytes) -> Record | None:
    try:
        return decode(body)
    except UndecodableError:
        return None
    except UnknownVersionError as error:
        raise ConfigurationError(f"{error}: verify with the Sluice that landed it") from error


def _series_key(record: Record, channel: Channel) -> bytes:
    return record.device + f"{channel.metric}\0{channel.label}".encode()


def _is_made_up(channel: Channel) -> bool:
    quality = channel.quality
    if isinstance(quality, int):
        return bool(quality & TIME_MADE_UP)
    return any(flags & TIME_MADE_UP for flags in channel.unpack_quality())
