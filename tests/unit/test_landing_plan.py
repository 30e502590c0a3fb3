"""What a plan takes as fresh, what it doubts and what it refuses, without a database."""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from runtime.ids import uuid7
from schemas.record import (
    PLAIN_VERSION,
    VERSION,
    Channel,
    Note,
    Origin,
    Quality,
    Record,
    Refused,
    UnknownVersionError,
    encode,
)
from workers.landing.plan import Bounds, Limits, Part, Plan
from workers.landing.series import NEVER, Found, Refusal, SeriesCache

SECOND = 1_000_000
DAY = 86_400 * SECOND
NOW = 800_000_000 * SECOND
ORGANISATION = uuid7().bytes
DEVICE = uuid7().bytes
LIMITS = {ORGANISATION: Limits(30 * DAY, 1000)}
BOUNDS = Bounds(future_us=600 * SECOND, payload_max=200)


def channel(
    metric: str, times: Sequence[int], values: Sequence[Any] | None = None, unit: str = "W", quality: int = 0
) -> Channel:
    values = [float(number) for number in range(len(times))] if values is None else values
    texts = any(isinstance(value, str) for value in values)
    column = [*values] if texts else struct.pack(f">{len(values)}d", *values)
    return Channel(metric, "", unit, struct.pack(f">{len(times)}q", *times), column, quality)


def body(*channels: Channel, notes: Sequence[Note] = (), refused: Sequence[Refused] = ()) -> bytes:
    ids = uuid7().bytes, ORGANISATION, DEVICE
    return encode(Record(VERSION, *ids, NOW, "http", "request", [*channels], [*refused], [*notes]))


class Planning:
    """A plan of one partition whose series are all found at once, numbered from 1."""

    def __init__(self, cache: SeriesCache | None = None, ahead: Part | None = None, careful_until: int = 0) -> None:
        self.plan = Plan(LIMITS, BOUNDS)
        self.part = Part(0, 0, cache or SeriesCache(NEVER), ahead=ahead, careful_until=careful_until)
        self.plan.parts[0] = self.part

    def add(self, *bodies: bytes, is_new: bool = True, refusal: Refusal | None = None) -> "Planning":
        for one in bodies:
            self.plan.add(self.part, one, NOW)
        known = self.part.cache.count
        found = {key: refusal or Found(known + number, is_new) for number, key in enumerate(self.part.unknown, 1)}
        self.plan.settle(found, refusals_until=1.0)
        return self

    @property
    def fresh(self) -> list[tuple[int, list[int]]]:
        runs = zip(self.plan.fresh.series_ids, self.plan.fresh.times, strict=True)
        return [(series, _times(times)) for series, times in runs]

    @property
    def suspects(self) -> list[tuple[int, list[int], list[int]]]:
        runs = self.plan.suspects
        columns = zip(runs.series_ids, runs.times, runs.items, strict=True)
        return [(series, _times(times), [*items]) for series, times, items in columns]

    @property
    def codes(self) -> list[tuple[str, int]]:
        return [(row.code, row.item) for row in self.plan.quarantine]


def _times(column: bytes) -> list[int]:
    return [*struct.unpack(f">{len(column) // 8}q", column)]


def test_a_new_series_is_fresh_and_stays_so_while_it_ascends() -> None:
    planning = Planning().add(body(channel("a", [NOW, NOW + 1])), body(channel("a", [NOW + 2])))
    assert planning.fresh == [(1, [NOW, NOW + 1]), (1, [NOW + 2])]
    assert planning.suspects == []


def test_a_device_is_heard_when_its_newest_record_was_received() -> None:
    planning = Planning()
    own, ids = uuid7().bytes, (uuid7().bytes, ORGANISATION)
    for version, device, received_at, origin in (
        (PLAIN_VERSION, DEVICE, NOW, None),
        (PLAIN_VERSION, own, NOW + 1, None),
        (PLAIN_VERSION, own, NOW + 2, None),
        (VERSION, own, NOW - DAY, Origin(uuid7().bytes, 0, 0, 1)),  # out of a spool, after what came later
    ):
        record = Record(version, *ids, device, received_at, "http", "request", [channel("a", [NOW])], origin=origin)
        planning.add(encode(record))
    assert planning.plan.heard == {DEVICE: NOW, own: NOW + 2}


def test_times_out_of_order_are_fresh_once_sorted() -> None:
    planning = Planning().add(body(channel("a", [NOW + 2, NOW, NOW + 1], [2.0, 0.0, 1.0])))
    assert planning.fresh == [(1, [NOW, NOW + 1, NOW + 2])]
    assert struct.unpack(">3d", planning.plan.fresh.values[0]) == (0.0, 1.0, 2.0)


def test_the_second_of_two_equal_times_is_suspect() -> None:
    planning = Planning().add(body(channel("b", [NOW - 1]), channel("a", [NOW, NOW, NOW + 1])))
    assert planning.fresh == [(1, [NOW - 1]), (2, [NOW, NOW + 1])]
    assert planning.suspects == [(2, [NOW], [2])]


def test_a_series_found_in_the_database_is_as_new_as_its_partition() -> None:
    planning = Planning(SeriesCache(NOW)).add(body(channel("a", [NOW, NOW + 1])), is_new=False)
    assert planning.suspects == [(1, [NOW], [0])]
    assert planning.fresh == [(1, [NOW + 1])]


def test_the_cache_moves_only_when_applied() -> None:
    planning = Planning().add(body(channel("a", [NOW])))
    assert planning.part.cache.newest[0] == NEVER
    planning.part.apply()
    assert planning.part.cache.newest[0] == planning.part.cache.high_water == NOW


def test_a_plan_knows_what_the_one_before_it_will_have_landed() -> None:
    first = Planning().add(body(channel("a", [NOW])))
    second = Planning(first.part.cache, ahead=first.part).add(body(channel("a", [NOW, NOW + 1])))
    assert second.suspects == [(1, [NOW], [0])]
    assert second.fresh == [(1, [NOW + 1])]


def test_what_was_planned_with_another_cache_is_not_believed() -> None:
    first = Planning().add(body(channel("a", [NOW])))
    assert Planning(SeriesCache(NEVER), ahead=first.part).part.ahead is None


def test_where_a_stamp_may_have_to_move_nothing_is_fresh() -> None:
    cache = SeriesCache(NOW)
    planning = Planning(cache).add(body(channel("a", [NOW - 1], quality=4)), is_new=False)
    planning.add(body(channel("a", [NOW, NOW + 1], quality=4)), body(channel("a", [NOW + 4])))
    assert planning.suspects == [(1, [NOW - 1], [0]), (1, [NOW, NOW + 1], [0, 1])]
    assert planning.fresh == [(1, [NOW + 4])]
    assert planning.part.high_water == NOW + 4


def test_a_time_of_the_device_that_came_late_moves_nothing() -> None:
    planning = Planning(SeriesCache(NOW)).add(body(channel("a", [NOW - 1])), is_new=False)
    planning.add(body(channel("a", [NOW + 1])))
    assert planning.fresh == [(1, [NOW + 1])]


def test_what_stood_before_the_partition_was_set_back_may_have_landed() -> None:
    planning = Planning(careful_until=2)
    planning.part.landed_until = 1
    planning.add(body(channel("a", [NOW], quality=4)), body(channel("a", [NOW], quality=4)))
    assert [planning.plan.may_have_landed(outcome) for outcome in (0, 1)] == [True, False]


def test_a_channel_without_a_unit_is_one_with_the_series_own() -> None:
    planning = Planning().add(body(channel("a", [NOW], unit="")))
    assert planning.part.cache.count == 1
    planning.add(body(channel("a", [NOW], unit="W")), body(channel("a", [NOW + 1], unit="")))
    assert planning.suspects == [(1, [NOW], [0])]
    assert planning.fresh == [(1, [NOW]), (1, [NOW + 1])]
    assert planning.part.cache.count == 1


def test_a_wrong_clock_moves_no_high_water() -> None:
    ahead_of_time = NOW + 601 * SECOND
    planning = Planning().add(body(channel("a", [NOW, ahead_of_time])), body(channel("a", [NOW + 1])))
    assert planning.suspects == [(1, [ahead_of_time], [1])]
    assert planning.fresh == [(1, [NOW]), (1, [NOW + 1])]
    assert planning.part.high_water == NOW + 1


def test_careful_means_that_everything_is_suspect() -> None:
    planning = Planning(careful_until=1).add(body(channel("a", [NOW])), body(channel("a", [NOW + 1])))
    assert planning.suspects == [(1, [NOW], [0])]
    assert planning.fresh == [(1, [NOW + 1])]


def test_records_are_told_apart_in_the_order_they_came() -> None:
    """The first to wait for its series' look-up comes first, whatever else is known of those after it."""
    cache = SeriesCache(NOW)
    Planning(cache).add(body(channel("known", [NOW])), is_new=False)
    second = body(channel("known", [NOW]), channel("unknown", [NOW]))
    planning = Planning(cache).add(body(channel("unknown", [NOW])), second, is_new=False)
    places = [planning.plan.outcomes[number].place.position for number in planning.plan.suspects.records]
    assert dict(zip(places, planning.plan.suspects.records, strict=True)) == {0: 0, 1: 1}


def test_too_old_is_refused_reading_by_reading() -> None:
    planning = Planning().add(body(channel("b", [NOW]), channel("a", [NOW - 31 * DAY, NOW])))
    assert planning.fresh == [(1, [NOW]), (2, [NOW])]
    assert planning.codes == [("too_old", -2)]
    assert planning.plan.outcomes[0].quarantined == 1


def test_a_refused_series_takes_all_its_readings_along_and_is_remembered() -> None:
    refusal = Refusal("unit_mismatch", "no")
    planning = Planning().add(body(channel("a", [NOW, NOW + 1])), refusal=refusal)
    planning.plan.add(planning.part, body(channel("a", [NOW + 2])), NOW)
    assert planning.codes == [("unit_mismatch", -1), ("unit_mismatch", -2), ("unit_mismatch", -1)]
    assert not planning.part.unknown
    planning.part.cache.forget_refused(2.0)
    assert not planning.part.cache.refused


def test_texts_are_always_staged() -> None:
    planning = Planning().add(body(channel("a", [NOW + 1, NOW], ["x", "y"])))
    assert [(text.ts, text.value, text.number) for text in planning.plan.texts] == [(NOW, "y", 1), (NOW + 1, "x", 0)]


def test_what_postgresql_cannot_hold_is_refused_before_it_is_asked() -> None:
    bad = [Note(1, 0, metadata=b'{"a":"\\u0000"}'), Note(1, 1, metadata=b"{"), Note(1, 2, original_time="\0")]
    notes = [*bad, Note(1, 3, metadata=b'{"a":1}')]
    channels = channel("a", [NOW], ["nul \0"]), channel("b", [NOW, NOW + 1, NOW + 2, NOW + 3])
    planning = Planning().add(body(*channels, notes=notes))
    assert planning.codes == [("rejected_by_store", item) for item in (-1, -2, -3, -4)]
    assert list(planning.plan.notes) == [(0, 4)]


def test_refused_at_the_door_goes_to_the_quarantine_under_its_own_number() -> None:
    planning = Planning().add(body(channel("a", [NOW]), refused=[Refused(4, "bad_value", "NaN\0", b"{}")]))
    (row,) = planning.plan.quarantine
    assert (row.code, row.message, row.item) == ("bad_value", "NaN\N{REPLACEMENT CHARACTER}", 4)
    assert planning.part.received == {(ORGANISATION, NOW // (3600 * SECOND)): 2}


def test_refused_ones_with_a_number_that_the_table_does_not_take_are_counted_through() -> None:
    refused = [Refused(number, "bad_value", "", b"{}") for number in (2**40, 7, 7)]
    planning = Planning().add(body(refused=refused))
    assert planning.codes == [("bad_value", 0), ("bad_value", 1), ("bad_value", 2)]


def _strange(**fields: Any) -> bytes:
    """A record that decodes and cannot be meant."""
    record = msgspec.msgpack.decode(body(channel("a", [NOW])), type=Record)
    return encode(msgspec.structs.replace(record, **fields))


BAD_FLAGS = [Channel("a", "", "W", bytes(8), bytes(8), 2**15)]


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"\x00",
        b"\x91\x01",
        encode([1, b"short"]),
        _strange(received_at=2**62),
        _strange(received_at=-1),
        _strange(channels=BAD_FLAGS),
    ],
)
def test_what_is_no_record_is_quarantined_alone(rubbish: bytes) -> None:
    planning = Planning().add(body(channel("a", [NOW])), rubbish, body(channel("a", [NOW + 1])))
    assert planning.codes == [("undecodable", 0)]
    assert planning.fresh == [(1, [NOW]), (1, [NOW + 1])]
    assert planning.part.position == 3


def test_a_newer_version_is_not_touched() -> None:
    planning = Planning().add(body(channel("a", [NOW])))
    newer = bytearray(body(channel("a", [NOW + 1])))
    newer[1] = VERSION + 1
    with pytest.raises(UnknownVersionError):
        planning.plan.add(planning.part, bytes(newer), NOW)
    assert planning.part.position == planning.plan.records == 1


def test_conflicts_tell_what_they_were() -> None:
    first, second = channel("a", [NOW, NOW + 1], [1.0, 2.0]), channel("b", [NOW], [3.5])
    planning = Planning(careful_until=1).add(body(first, second))
    planning.plan.judged(0, duplicates=[0], conflicts=[2, 1])
    assert planning.codes == [("conflict", -2), ("conflict", -3)]
    assert b'"type":"b"' in planning.plan.quarantine[1].payload
    assert b'"value":3.5' in planning.plan.quarantine[1].payload
    assert (planning.plan.outcomes[0].duplicates, planning.plan.outcomes[0].conflicts) == (1, 2)


def test_what_is_set_aside_tells_the_note_of_its_reading() -> None:
    quality = Quality.UNIT_CONVERTED.value
    first, second = channel("a", [NOW]), channel("power", [NOW, NOW + 1], [1500.0, 2500.0], quality=quality)
    one = body(first, second, notes=[Note(1, 0, "3.1", "kW"), Note(1, 1, None, "kW")])
    judged = Planning(careful_until=1).add(one)
    judged.plan.judged(0, duplicates=[], conflicts=[0, 1, 2])
    refused = Planning().add(one, refusal=Refusal("series_limit", "too many"))
    for planning in (judged, refused):
        shown = [msgspec.json.decode(row.payload) for row in planning.plan.quarantine]
        assert [(told["value"], told["unit"], told.get("original_time")) for told in shown] == [
            (0.0, "W", None),
            (1.5, "kW", "3.1"),
            (2.5, "kW", None),
        ]


def test_payloads_are_bounded() -> None:
    planning = Planning().add(body(channel("a" * 500, [NOW - 31 * DAY])))
    assert len(planning.plan.quarantine[0].payload) == BOUNDS.payload_max


def test_weeks_begin_on_monday() -> None:
    monday = 2 * DAY + 100 * 7 * DAY
    planning = Planning()
    planning.part.cache.bound = NEVER
    plan = planning.plan
    plan.fresh.add(1, struct.pack(">2q", monday - 1, monday), bytes(16), 0)
    assert plan.weeks() == {99, 100}
