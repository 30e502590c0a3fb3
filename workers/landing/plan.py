"""Records into what one transaction writes. Pure: no I/O, no clock; the same records and caches give the same plan.

A series' readings newer than all that landed are fresh and go by COPY, whole columns at once; the others are suspect
and are judged in the database. Left out: looking series up (`registry`), writing (`store`).
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from operator import lt
from typing import Final, NamedTuple

from schemas.record import (
    NONCE_SCOPE,
    PLAIN_VERSION,
    TIME_MADE_UP,
    Channel,
    Note,
    Record,
    UndecodableError,
    decode_sound,
)
from workers.landing import quarantine
from workers.landing.columns import Runs, StagedRuns
from workers.landing.late import Answers, Late, Memory, Question, hold_again
from workers.landing.quarantine import Place, QuarantineRow, Reading
from workers.landing.series import NEVER, Found, Refusal, SeriesCache, SeriesName, cache_key
from workers.landing.tombstones import NONE, Spans, Tombstones, within

_HOUR_US: Final = 3_600_000_000
_MONDAY_US: Final = 48 * _HOUR_US  # 2000-01-03, the first Monday of record times
_WEEK_US: Final = 168 * _HOUR_US
_ENDS: Final = struct.Struct(">2q").unpack

# What others cost against a fresh reading, in memory and in the database: a flood of them makes batches smaller.
_SUSPECT_WEIGHT: Final = 4
_QUARANTINE_WEIGHT: Final = 10
_QUESTION_WEIGHT: Final = 4
# Of a channel whose series is not known yet, which takes some kB until it is: a fleet's first batches stay small.
_UNKNOWN_WEIGHT: Final = 50

_NO_SLOTS: Final[Mapping[bytes, int]] = {}
_NOTHING: Final[frozenset[int]] = frozenset()
_CONFLICT: Final = "a reading of this series and time is stored already, with another value"
_TOO_OLD: Final = Refusal("too_old", "it is older than the organisation keeps raw readings")
_NAMED_TWICE: Final = Refusal(
    "idempotency_conflict", "another request with this Idempotency-Key and another content came within 24 hours"
)

_NONCE_REUSED: Final = Refusal("nonce_reused", "another message of the plant came under this nonce")


class Limits(NamedTuple):
    """What landing needs to know of an organisation."""

    retention_us: int
    series_max: int


class Bounds(NamedTuple):
    """The settings that a plan depends on."""

    future_us: int
    payload_max: int
    move_max_us: int = 0
    nonce_us: int = 3_600_000_000


class TextReading(NamedTuple):
    series_id: int
    quality: int
    ts: int
    value: str
    outcome: int
    number: int


class NoteRow(NamedTuple):
    series_id: int
    ts: int
    organisation: bytes
    received_at: int
    note: Note


class Outcome:
    """What became of a record of which more is to be told than that all of it was stored."""

    __slots__ = (
        "at", "conflicts", "duplicates", "erased", "erased_refused", "part", "place", "quarantined", "record",
        "refused",
    )  # fmt: skip

    def __init__(self, part: "Part", at: int, place: Place, record: Record) -> None:
        self.part = part
        self.at = at
        self.place = place
        self.record = record
        self.duplicates = self.conflicts = self.quarantined = self.refused = 0
        self.erased = 0
        """Of the readings accepted: dropped, because tombstones are on their times."""
        self.erased_refused = 0
        """The same of those refused at the door."""

    @property
    def is_plain(self) -> bool:
        told = self.duplicates or self.conflicts or self.quarantined or self.refused
        return not (told or self.erased or self.erased_refused)

    @property
    def hour(self) -> tuple[bytes, int]:
        """The ledger's key within a source's partition."""
        return self.record.organisation, self.record.received_at // _HOUR_US


class Part:
    """One partition of a plan: from which position to which, and what is new of its series."""

    def __init__(
        self,
        partition: int,
        position: int,
        cache: SeriesCache,
        *,
        ahead: "Part | None" = None,
        careful_until: int = 0,
        landed_until: int = 0,
        rejected: Mapping[int, str] | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.partition = partition
        self.expected = position
        self.position = position
        self.cache = cache
        self.ahead = ahead if ahead is not None and ahead.cache is cache else None
        """What the transaction under way will have landed before this one begins."""
        self.careful_until = careful_until
        """Records before this position are suspect whatever their times."""
        self.landed_until = landed_until
        """Records before this position have landed before."""
        self.rejected = {at: Refusal("rejected_by_store", said) for at, said in (rejected or {}).items()}
        """Records that are refused whole, by position: with what the database said, for one."""
        self.memory = Memory({}) if memory is None else memory
        self.newest: dict[int, int] = {}
        self.high_water = NEVER
        self.received_through = NEVER
        self.oldest_received = 2**63 - 1
        self.received: dict[tuple[bytes, int], int] = {}
        """Readings, those refused at the door among them, by organisation and hour of receipt."""
        self.received_from: dict[tuple[bytes, int], dict[tuple[bytes, int], int]] = {}
        """The same of records out of spools, by spool and its partition."""
        self.unknown: dict[bytes, SeriesName] = {}

    def newest_of(self, slot: int) -> int:
        """No reading of the series that landed, will have before this plan, or is in it, is newer."""
        newest = self.newest.get(slot)
        if newest is None and self.ahead is not None:
            newest = self.ahead.newest.get(slot)
        return self.cache.newest[slot] if newest is None else newest

    def received_at(self, place: Place) -> dict[tuple[bytes, int], int]:
        """Where readings of a record at `place` are counted."""
        return self.received_from.setdefault((place.spool, place.partition), {}) if place.spool else self.received

    def organisations(self) -> set[bytes]:
        counted = (self.received, *self.received_from.values())
        return {organisation for counts in counted for organisation, _ in counts}

    def moved(self, slot: int, newest: int) -> None:
        self.newest[slot] = newest
        if newest > self.high_water:
            self.high_water = newest

    def apply(self) -> None:
        """The transaction is committed: the cache may know."""
        cache = self.cache
        cache.high_water = max(cache.high_water, self.high_water)
        newest = cache.newest
        for slot, time in self.newest.items():
            newest[slot] = time


class Spot(NamedTuple):
    """A channel that cannot be taken at a glance."""

    part: Part
    at: int
    """Where its record stands in the log's partition."""
    place: Place
    record: Record
    ordinal: int
    """Which of the record's channels."""
    base: int
    """The number of its first reading in the record."""

    @property
    def channel(self) -> Channel:
        return self.record.channels[self.ordinal]

    @property
    def key(self) -> bytes:
        channel = self.channel
        return cache_key(self.record.device, channel.metric, channel.label, channel.unit)

    @property
    def is_careful(self) -> bool:
        return self.at < self.part.careful_until

    def reading(self, index: int, note: Note | None) -> Reading:
        return Reading(self.place, self.record, self.channel, index, self.base + index, note)


class Plan:
    """What one transaction writes, growing record by record. `limits` is read as it stands, and may grow."""

    def __init__(self, limits: Mapping[bytes, Limits], bounds: Bounds, tombstones: Tombstones = NONE) -> None:
        self._limits = limits
        self._bounds = bounds
        self._tombstones = tombstones.spans
        self._horizons = tombstones.horizons
        self.epoch = tombstones.epoch
        """Which tombstones it knows."""
        self.parts: dict[int, Part] = {}
        self.fresh = Runs()
        self.suspects = StagedRuns()
        self.texts: list[TextReading] = []
        self.notes: dict[tuple[int, int], NoteRow] = {}
        """By outcome and reading number; only those of readings that are stored stay."""
        self.outcomes: list[Outcome] = []
        self.quarantine: list[QuarantineRow] = []
        self.undecodable: list[tuple[int, int]] = []
        """Partitions and positions."""
        self.late = Late()
        self.heard: dict[bytes, int] = {}
        """The devices its records are from, with the receive time of the newest of each."""
        self.rows = self.records = self.bytes = 0
        self.weight = 0
        """What it costs to land, in fresh readings."""
        self.unknown_organisations: set[bytes] = set()
        self._outcome_of: dict[Place, int] = {}
        self._waiting: list[Spot] = []
        # Channels of a record mostly share their times: what the last ones were found to be.
        self._times = b""
        self._stamps: tuple[int, ...] = ()
        self._ascends = True
        self._noted: tuple[Record, dict[tuple[int, int], Note]] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether nothing in it waits for a look-up."""
        return not self._waiting and not self.late.questions

    @property
    def move_max_us(self) -> int:
        """How far a reading may be moved on from a time of our making."""
        return self._bounds.move_max_us

    def weeks(self) -> set[int]:
        """The weeks, from Monday to Monday and counted from 2000-01-03, that its readings lie in or may move to."""
        found = {_week(reading.ts + reach) for reading in self.texts for reach in (0, self.move_max_us)}
        for times in self.fresh.times + self.suspects.times:
            first, last = _ENDS(times[:8] + times[-8:])
            found |= {_week(first), _week(last + self.move_max_us)}
            if _week(first) != _week(last):
                found.update(map(_week, struct.unpack(f">{len(times) // 8}q", times)))
        return found

    def add(self, part: Part, body: bytes, now: int) -> None:
        """Take the next record of `part`. Raises `UnknownVersionError` and `SpoolJumpError` with nothing taken."""
        try:
            record = decode_sound(body)
            if record.version == PLAIN_VERSION:
                self._take(part, record, part.position)
            else:
                self._take_late(part, record)
        except UndecodableError as error:
            place = Place(part.partition, part.position)
            self.undecodable.append((part.partition, part.position))
            self.quarantine.append(quarantine.of_body(place, body, str(error), now, self._bounds.payload_max))
        part.position += 1
        self.records += 1
        self.bytes += len(body)

    def settle(self, resolved: Mapping[bytes, Found | Refusal], refusals_until: float) -> None:
        """Take what waited, now that every unknown series is found, made or refused and every organisation known."""
        for part in self.parts.values():
            for key, name in part.unknown.items():
                result = resolved[key]
                if isinstance(result, Refusal):
                    part.cache.refuse(key, result, refusals_until)
                else:
                    part.cache.learn(name, result)
            part.unknown = {}
        self.unknown_organisations = set()
        waiting, self._waiting = self._waiting, []
        for spot in waiting:
            self._consider(spot)

    def answer(self, answers: Answers) -> None:
        """Take the records that were asked about, or leave them where they had landed before."""
        questions, self.late.questions = self.late.questions, []
        for question in questions:
            part, at, place, record = question
            if record.replays and not self.late.claims(question, record.replays, answers):
                continue
            if record.idempotency is not None:
                earlier = self.late.earlier(question, record.idempotency, answers, self._bounds.nonce_us)
                if earlier is not None and earlier.fingerprint == record.idempotency.fingerprint:
                    self._count_repeat(question)
                    continue
                if earlier is not None:
                    part.rejected[at] = _NONCE_REUSED if record.idempotency.scope == NONCE_SCOPE else _NAMED_TWICE
            oldest = part.oldest_received
            self._take(part, record, at, place)
            if record.replays:
                part.oldest_received = oldest  # how long it lay in quarantine is no delay of landing

    def judged(
        self, outcome: int, duplicates: Sequence[int], conflicts: Sequence[int], message: str = _CONFLICT
    ) -> None:
        """The database found these readings of an outcome, by number, stored already."""
        told = self.outcomes[outcome]
        told.duplicates += len(duplicates)
        told.conflicts += len(conflicts)
        for number in (*duplicates, *conflicts):
            self.notes.pop((outcome, number), None)
        for ordinal, reading in _readings(told.place, told.record, sorted(conflicts)):
            noted = reading._replace(note=self._note_of(told.record, ordinal, reading.at))
            row = quarantine.of_reading(noted, "conflict", message, self._bounds.payload_max)
            if told.record.replays:
                told.conflicts -= 1
                self._hold_again(told.part, told.place, told.record, row)
            else:
                self.quarantine.append(row)

    def moved(self, outcome: int, number: int, time: int) -> None:
        """This reading of an outcome stands at another time than its own."""
        note = self.notes.get((outcome, number))
        if note is not None:
            self.notes[outcome, number] = note._replace(ts=time)

    def may_have_landed(self, outcome: int) -> bool:
        """Whether what stands at the times of an outcome's record may be its own: it is landed or sent again."""
        told = self.outcomes[outcome]
        return told.record.in_doubt or told.at < told.part.landed_until

    def is_erased(self, outcome: int, time: int) -> bool:
        """Whether a tombstone is on that time of the device of an outcome's record."""
        spans = self._tombstones.get(self.outcomes[outcome].record.device)
        return spans is not None and within(spans, time)

    def _take_late(self, part: Part, record: Record) -> None:
        place = Place(part.partition, part.position)
        if record.origin is not None:
            if not self.late.advance(part.memory, part.position, record, record.origin):
                return
            place = Place(record.origin.partition, record.origin.sequence, record.origin.spool)
        if record.delivery is not None:
            deliveries = part.memory.deliveries
            if deliveries.take(record.delivery, has_landed=part.position < part.landed_until):
                self._count_repeat(Question(part, part.position, place, record))
                return
        if record.idempotency is None and not record.replays:
            self._take(part, record, part.position, place)
            return
        self.late.questions.append(Question(part, part.position, place, record))
        self.weight += _QUESTION_WEIGHT
        # Numbered in the order of arrival, though it is taken later.
        self._outcome(part, part.position, place, record)

    def _count_repeat(self, question: Question) -> None:
        part, at, place, record = question
        counts, hour = part.received_at(place), (record.organisation, record.received_at // _HOUR_US)
        counts[hour] = counts.get(hour, 0) + record.accepted
        self.outcomes[self._outcome(part, at, place, record)].duplicates += record.accepted
        self.late.repeats += 1

    def _hold_again(self, part: Part, place: Place, record: Record, row: QuarantineRow) -> None:
        """A replay that is refused changes its row; the books go on telling of the first receipt alone."""
        # It may be known before the record itself is counted.
        counts, hour = part.received_at(place), (record.organisation, record.received_at // _HOUR_US)
        counts[hour] = counts.get(hour, 0) - 1
        hold_again(self.late, row, record.replays)

    def _take(self, part: Part, record: Record, at: int, place: Place | None = None) -> None:
        """Every microsecond here is a tenth of what a record of one reading costs: nothing is called in vain."""
        device, received_at = record.device, record.received_at
        # What came a way of its own may be older than what came before it.
        if place is None or received_at > self.heard.get(device, -1):
            self.heard[device] = received_at
        limits = self._limits.get(record.organisation)
        slots, oldest = _NO_SLOTS, 0
        is_doubted = place is not None and record.in_doubt
        if limits is not None and not (record.notes or part.rejected or is_doubted) and at >= part.careful_until:
            slots, oldest = part.cache.slots, received_at - limits.retention_us
            if self._horizons:
                oldest = max(oldest, self._horizons.get(record.organisation, oldest))
        if self._tombstones and (spans := self._tombstones.get(device)) is not None:
            slots = _NO_SLOTS
            self._count_erased(part, at, place or Place(part.partition, at), record, spans)
        latest = received_at + self._bounds.future_us
        base = 0
        for ordinal, channel in enumerate(record.channels):
            slot = slots.get(device + f"{channel.metric}\0{channel.label}\0{channel.unit}".encode())
            if slot is None or not self._take_fresh(part, channel, slot, oldest, latest):
                self._consider(Spot(part, at, place or Place(part.partition, at), record, ordinal, base))
            base += len(channel.times) // 8
        self.rows += base
        self.weight += base
        if record.refused:
            self._keep_refused(part, at, place or Place(part.partition, at), record)
            base += len(record.refused)
        hour = (record.organisation, received_at // _HOUR_US)
        counts = part.received if place is None else part.received_at(place)
        counts[hour] = counts.get(hour, 0) + base
        if received_at > part.received_through:
            part.received_through = received_at
        if received_at < part.oldest_received:
            part.oldest_received = received_at

    def _take_fresh(self, part: Part, channel: Channel, slot: int, oldest: int, latest: int) -> bool:
        """Take the channel as it is if all of it is fresh."""
        times, values = channel.times, channel.values
        if times != self._times:
            self._look_at(times)
        if not self._ascends or type(values) is not bytes:
            return False
        first, last = self._stamps[0], self._stamps[-1]
        if first <= part.newest_of(slot) or first < oldest or last > latest:
            return False
        part.newest[slot] = last
        if last > part.high_water:
            part.high_water = last
        self.fresh.add(part.cache.ids[slot], times, values, channel.quality)
        return True

    def _look_at(self, times: bytes) -> None:
        self._times = times
        self._stamps = stamps = struct.unpack(f">{len(times) // 8}q", times)
        self._ascends = bool(stamps) and all(map(lt, stamps, stamps[1:]))

    def _consider(self, spot: Spot) -> None:
        """Take a channel by the rules in full, refuse it, or let it wait for a look-up: what of it is not erased."""
        part, record = spot.part, spot.record
        spans = self._tombstones.get(record.device)
        erased = _NOTHING if spans is None else _within(spans, spot.channel)
        if erased and len(erased) == len(spot.channel):
            return
        rejected = part.rejected.get(spot.at)
        if rejected is not None:
            self._refuse(spot, rejected, erased)
            return
        key = spot.key
        slot = part.cache.slots.get(key)
        limits = self._limits.get(record.organisation)
        if slot is None and key in part.cache.refused:
            self._refuse(spot, part.cache.refused[key], erased)
        elif slot is None or limits is None:
            self._wait(spot, key if slot is None else None)
        else:
            oldest = record.received_at - limits.retention_us
            oldest = max(oldest, self._horizons.get(record.organisation, oldest))
            window = oldest, record.received_at + self._bounds.future_us
            by_one = spot.is_careful or record.notes or record.in_doubt or erased
            if by_one or not self._take_fresh(part, spot.channel, slot, *window):
                self._take_each(spot, slot, *window, erased)

    def _wait(self, spot: Spot, key: bytes | None) -> None:
        record, channel = spot.record, spot.channel
        self._waiting.append(spot)
        self.weight += _UNKNOWN_WEIGHT
        # Numbered in the order of arrival: of two readings with the same time the first stays.
        self._outcome(spot.part, spot.at, spot.place, record)
        if record.organisation not in self._limits:
            self.unknown_organisations.add(record.organisation)
        if key is not None:
            name = SeriesName(record.organisation, record.device, channel.metric, channel.label, channel.unit)
            spot.part.unknown[key] = name

    def _take_each(self, spot: Spot, slot: int, oldest: int, latest: int, erased: frozenset[int]) -> None:
        """Reading by reading, in the order of their times: fresh, suspect, or refused."""
        part, channel = spot.part, spot.channel
        self._look_at(channel.times)
        stamps = self._stamps
        flags = channel.unpack_quality() if channel.quality else ()
        newest = part.newest_of(slot)
        fresh: list[int] = []
        suspects: list[int] = []
        for index in sorted(range(len(stamps)), key=stamps.__getitem__):
            if index in erased:
                continue
            time = stamps[index]
            refusal = self._refusal(spot, index, time, oldest)
            if refusal is not None:
                self._quarantine(spot, index, refusal)
                continue
            is_fresh = newest < time <= latest and not spot.is_careful and type(channel.values) is bytes
            (fresh if is_fresh else suspects).append(index)
            if newest < time <= latest:
                newest = time
            if not is_fresh and time <= latest and flags and flags[index] & TIME_MADE_UP:
                newest += 1  # it may have to move on: the next one must not be taken for fresh there
            self._note(spot, index, slot)
            if spot.record.in_doubt and flags and flags[index] & TIME_MADE_UP:
                known = spot.record.record_id, spot.base + index, part.cache.ids[slot], time
                self.late.doubted.append(known)
        part.moved(slot, newest)
        series_id = part.cache.ids[slot]
        if type(channel.values) is list:
            self._take_texts(spot, series_id, suspects)
            return
        if fresh:
            self.fresh.add(series_id, *_picked(channel, fresh))
        if suspects:
            numbers = [spot.base + index for index in suspects]
            self.suspects.add(series_id, *_picked(channel, suspects))
            self.suspects.records.append(self._outcome(part, spot.at, spot.place, spot.record))
            self.suspects.items.append(numbers)
            self.weight += len(suspects) * _SUSPECT_WEIGHT

    def _take_texts(self, spot: Spot, series_id: int, indices: list[int]) -> None:
        channel = spot.channel
        flags = channel.unpack_quality()
        outcome = self._outcome(spot.part, spot.at, spot.place, spot.record)
        self.weight += len(indices) * _SUSPECT_WEIGHT
        for index in indices:
            time, value = self._stamps[index], channel.values[index]
            self.texts.append(TextReading(series_id, flags[index], time, str(value), outcome, spot.base + index))

    def _refusal(self, spot: Spot, index: int, time: int, oldest: int) -> Refusal | None:
        if time < oldest:
            return _TOO_OLD
        values = spot.channel.values
        if type(values) is list and not quarantine.is_storable_text(values[index]):
            return Refusal("rejected_by_store", "a text with a NUL character cannot be stored")
        note = self._note_of(spot.record, spot.ordinal, index)
        if note is not None and not _is_storable(note):
            return Refusal("rejected_by_store", "its metadata, original time or unit cannot be stored")
        return None

    def _note_of(self, record: Record, ordinal: int, index: int) -> Note | None:
        """Of reading `index` of the channel `ordinal`."""
        if not record.notes:
            return None
        if self._noted is None or self._noted[0] is not record:
            self._noted = record, {(note.channel, note.reading): note for note in record.notes}
        return self._noted[1].get((ordinal, index))

    def _note(self, spot: Spot, index: int, slot: int) -> None:
        record = spot.record
        note = self._note_of(record, spot.ordinal, index)
        if note is not None:
            row = NoteRow(
                spot.part.cache.ids[slot], self._stamps[index], record.organisation, record.received_at, note
            )
            self.notes[self._outcome(spot.part, spot.at, spot.place, record), spot.base + index] = row

    def _refuse(self, spot: Spot, refusal: Refusal, erased: frozenset[int]) -> None:
        for index in range(len(spot.channel)):
            if index not in erased:
                self._quarantine(spot, index, refusal)

    def _count_erased(self, part: Part, at: int, place: Place, record: Record, spans: Spans) -> None:
        erased = sum(len(_within(spans, channel)) for channel in record.channels)
        if erased:
            self.outcomes[self._outcome(part, at, place, record)].erased = erased

    def _quarantine(self, spot: Spot, index: int, refusal: Refusal) -> None:
        reading = spot.reading(index, self._note_of(spot.record, spot.ordinal, index))
        row = quarantine.of_reading(reading, refusal.code, refusal.message, self._bounds.payload_max)
        self.weight += _QUARANTINE_WEIGHT
        if spot.record.replays:
            self.rows -= 1
            self._hold_again(spot.part, spot.place, spot.record, row)
            return
        self.outcomes[self._outcome(spot.part, spot.at, spot.place, spot.record)].quarantined += 1
        self.quarantine.append(row)

    def _keep_refused(self, part: Part, at: int, place: Place, record: Record) -> None:
        outcome = self.outcomes[self._outcome(part, at, place, record)]
        rows = quarantine.of_refused(place, record, self._bounds.payload_max)
        spans = self._tombstones.get(record.device)
        if spans is not None:
            rows = [row for row in rows if not within(spans, quarantine.time_of(row))]
            outcome.erased_refused = len(record.refused) - len(rows)
        outcome.refused = len(rows)
        self.quarantine += rows
        self.weight += len(rows) * _QUARANTINE_WEIGHT

    def _outcome(self, part: Part, at: int, place: Place, record: Record) -> int:
        number = self._outcome_of.get(place)
        if number is None:
            number = self._outcome_of[place] = len(self.outcomes)
            self.outcomes.append(Outcome(part, at, place, record))
        return number


def _within(spans: Spans, channel: Channel) -> frozenset[int]:
    """Which readings of the channel have such times."""
    return frozenset([index for index, time in enumerate(channel.unpack_times()) if within(spans, time)])


def _week(time: int) -> int:
    return (time - _MONDAY_US) // _WEEK_US


def _picked(channel: Channel, indices: list[int]) -> tuple[bytes, bytes, int | bytes]:
    """Times, values and quality of these readings of a channel of numbers."""
    times, values, quality = channel.times, channel.values, channel.quality
    if not isinstance(values, bytes):
        raise TypeError("a channel of texts has no columns")
    if indices == [*range(len(channel))]:
        return times, values, quality
    picked = quality if isinstance(quality, int) else _items(quality, 2, indices)
    return _items(times, 8, indices), _items(values, 8, indices), picked


def _items(column: bytes, size: int, indices: list[int]) -> bytes:
    return b"".join([column[size * index : size * (index + 1)] for index in indices])


def _is_storable(note: Note) -> bool:
    return (
        quarantine.is_storable_text(note.original_time)
        and quarantine.is_storable_text(note.original_unit)
        and (note.metadata is None or quarantine.is_storable_json(note.metadata))
    )


def _readings(place: Place, record: Record, numbers: Sequence[int]) -> Iterator[tuple[int, Reading]]:
    """The readings of a record with these numbers, which ascend, each with the number of its channel."""
    channels = enumerate(record.channels)
    base, end, index = 0, 0, 0
    for number in numbers:
        while number >= end:
            index, channel = next(channels)
            base, end = end, end + len(channel)
        yield index, Reading(place, record, record.channels[index], number - base, number)
