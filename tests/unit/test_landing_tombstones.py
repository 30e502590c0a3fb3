"""Tombstones, without a database: what they cover, and what a plan makes of records that they are on."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.ids import uuid7
from schemas.record import PLAIN_VERSION, Channel, Note, Record, Refused, encode
from workers.landing.moving import Met, place
from workers.landing.plan import Bounds, Limits, Part, Plan
from workers.landing.quarantine import time_told
from workers.landing.series import NEVER, Found, SeriesCache
from workers.landing.tombstones import Span, Tombstones, within

SECOND = 1_000_000
DAY = 86_400 * SECOND
NOW = 800_000_000 * SECOND  # 2025-05-08T06:13:20Z
ORGANISATION, DEVICE, OTHER = uuid7(), uuid7(), uuid7()
LEAST, MOST = -(2**63), 2**63 - 1


def channel(metric: str, *times: int) -> Channel:
    values = struct.pack(f">{len(times)}d", *map(float, range(len(times))))
    return Channel(metric, "", "W", struct.pack(f">{len(times)}q", *times), values)


def planned(
    tombstones: Tombstones,
    *channels: Channel,
    device: bytes = DEVICE.bytes,
    refused: tuple[Refused, ...] = (),
    notes: tuple[Note, ...] = (),
    rejected: dict[int, str] | None = None,
) -> tuple[Plan, Part]:
    plan = Plan({ORGANISATION.bytes: Limits(400 * DAY, 100)}, Bounds(600 * SECOND, 1_000), tombstones)
    part = plan.parts[0] = Part(0, 0, SeriesCache(NEVER), rejected=rejected)
    ids = uuid7().bytes, ORGANISATION.bytes, device
    body = encode(Record(PLAIN_VERSION, *ids, NOW, "http", "request", [*channels], [*refused], [*notes]))
    plan.add(part, body, NOW)
    return plan, part


def erased(first: int, end: int) -> Tombstones:
    found = Tombstones()
    found.take([(3, DEVICE, None, first, end)])
    return found


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda one: (one[0], sum(one))), max_size=8)


@given(SPANS, st.integers(-2, 45))
def test_what_several_cover_together_they_cover(spans: list[tuple[int, int]], time: int) -> None:
    tombstones = Tombstones()
    for epoch, span in enumerate(spans, 1):
        tombstones.take([(epoch, DEVICE, None, *span)])
    assert tombstones.epoch == len(spans)
    found = tombstones.spans.get(DEVICE.bytes, ())
    assert within(found, time) == any(first <= time < end for first, end in spans)
    assert all(one.end < other.first for one, other in pairwise(found))


def test_an_epoch_without_others_moves_alone() -> None:
    tombstones = Tombstones()
    tombstones.take([(7, None, None, 0, 0)])
    assert (tombstones.epoch, tombstones.spans, tombstones.horizons) == (7, {}, {})


def test_a_record_of_erased_times_asks_for_no_series() -> None:
    plan, part = planned(erased(LEAST, MOST), channel("power", NOW, NOW + 1), channel("energy", NOW))
    assert (plan.is_settled, part.unknown, plan.rows, plan.epoch) == (True, {}, 3, 3)
    (told,) = plan.outcomes
    assert (told.erased, told.quarantined, told.is_plain) == (3, 0, False)
    assert plan.quarantine == []


def test_another_device_s_are_taken_at_a_glance() -> None:
    plan, part = planned(erased(LEAST, MOST), channel("power", NOW), device=OTHER.bytes)
    plan.settle({key: Found(1, True) for key in part.unknown}, 0.0)
    assert plan.fresh.series_ids == [1]
    assert all(told.is_plain for told in plan.outcomes)


def test_of_a_record_on_the_edge_what_is_outside_is_taken_with_its_number_and_note() -> None:
    times = [NOW - 1, NOW, NOW + 1, NOW + 2]
    notes = tuple(Note(0, reading, metadata=b"{}") for reading in range(4))
    plan, part = planned(erased(NOW, NOW + 2), channel("power", *times), notes=notes)
    plan.settle({key: Found(1, True) for key in part.unknown}, 0.0)
    assert plan.fresh.times == [struct.pack(">2q", NOW - 1, NOW + 2)]
    assert plan.fresh.values == [struct.pack(">2d", 0.0, 3.0)]
    assert sorted(number for _, number in plan.notes) == [0, 3]
    assert plan.outcomes[0].erased == 2


def test_what_the_database_refuses_is_quarantined_but_for_what_is_erased() -> None:
    plan, _ = planned(erased(NOW, NOW + 1), channel("power", NOW - 1, NOW), rejected={0: "no"})
    assert [(row.code, row.item) for row in plan.quarantine] == [("rejected_by_store", -1)]
    assert (plan.outcomes[0].quarantined, plan.outcomes[0].erased) == (1, 1)


def test_what_was_refused_at_the_door_goes_by_the_time_it_told() -> None:
    payloads = [b'{"ts": 1746684799}', b'{"ts": 1746684801}', b"{}", b'{"ts": 3.1}', b"no JSON"]
    refused = tuple(Refused(at, "x", "no", payload) for at, payload in enumerate(payloads))
    plan, _ = planned(erased(NOW, MOST), refused=refused)
    assert [row.item for row in plan.quarantine] == [0]
    told = plan.outcomes[0]
    assert (told.refused, told.erased_refused, told.erased) == (1, 4, 0)


@pytest.mark.parametrize(
    ("payload", "item", "expected"),
    [
        (b'{"ts":"2025-05-08T06:13:19Z"}', 0, NOW - SECOND),
        (b'{"ts":1746684799000,"type":"x"}', 0, NOW - SECOND),
        (b'{"ts":"2025-05-08T06:13:19"}', 0, NOW),  # without a zone
        (b'{"ts":"2000-05-08T06:13:19Z"}', 0, NOW),  # of a clock that was never set
        (b'{"ts":"2025-05-08T06:53:19Z"}', 0, NOW),  # of one that is ahead
        (b'{"ts":"2000-01-01T00:00:01Z"}', -1, SECOND),  # as landing wrote it
        (b'{"ts":true}', 0, NOW),
        (b'{"ts":"', 0, NOW),
        (b"\xff", 0, NOW),
        (b"[" * 100_000, 0, NOW),
        (b"", 0, NOW),
    ],
)
def test_when_something_in_quarantine_was_measured(payload: bytes, item: int, expected: int) -> None:
    assert time_told(payload, NOW, item) == expected


def test_nothing_is_moved_to_an_erased_time() -> None:
    moving = [Met(0, number, 1, 4, NOW, 1.0, False) for number in range(3)]
    spans = (Span(NOW + 2, NOW + 9),)
    placed, crowded = place(moving, {(1, NOW)}, 100, lambda _, time: within(spans, time))
    assert [time for _, time in placed] == [NOW + 1]
    assert len(crowded) == 2
