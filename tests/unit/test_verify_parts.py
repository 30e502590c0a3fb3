"""The parts of `sluice verify` that need no database: entries that sort, values that are equal, books that differ."""

import random
import struct
from pathlib import Path

import pytest

from workers.verify import tally
from workers.verify.claims import KEY_BYTES, NOTED, WIDTH, Blobs, Sorter, add_note, entries, move, unpack, unpack_key
from workers.verify.ledger import differing, differing_set_aside
from workers.verify.matching import is_same_number
from workers.verify.tally import Booked, SetAside


def claimed(series: int, times: list[int], *, place: tuple[int, int] = (0, 0), base: int = 0) -> bytearray:
    count = len(times)
    values = struct.pack(f">{count}d", *map(float, range(count)))
    return entries(series, struct.pack(f">{count}q", *times), values, 4, place, base, 7, 1)


def test_an_entry_holds_what_it_was_made_of() -> None:
    block = claimed(5, [-3, 2**62, 9], place=(1023, 2**40), base=4)
    found = [unpack(bytes(block[at : at + WIDTH])) for at in range(0, len(block), WIDTH)]
    assert [(one.series_id, one.ts, one.partition, one.position, one.item) for one in found] == [
        (5, time, 1023, 2**40, 4 + at) for at, time in enumerate([-3, 2**62, 9])
    ]
    assert [(struct.unpack(">d", one.value)[0], one.quality, one.flags, one.group) for one in found] == [
        (0.0, 4, 1, 7),
        (1.0, 4, 1, 7),
        (2.0, 4, 1, 7),
    ]
    each = entries(5, bytes(16), bytes(16), struct.pack(">2h", 4, 2**15 - 1), (0, 0), 0, 7, 0)
    add_note(each, 1, b"in blobs")
    first, second = (unpack(bytes(each[at : at + WIDTH])) for at in (0, WIDTH))
    assert (first.quality, first.flags, first.value) == (4, 0, bytes(8))
    assert (second.quality, second.flags, second.value) == (2**15 - 1, NOTED, b"in blobs")
    move(block, 1, -(2**62))
    assert unpack(bytes(block[WIDTH : 2 * WIDTH])).ts == -(2**62)
    assert unpack_key(bytes(block[:KEY_BYTES])) == (5, -3)


@pytest.mark.parametrize("entries_max", [10, 97, 100_000])
def test_any_number_sorts_by_series_time_and_place(tmp_path: Path, entries_max: int) -> None:
    chance = random.Random(7)
    sorter = Sorter(tmp_path, "test", entries_max)
    expected = []
    for number in range(1_500):
        series, partition, position = chance.randint(1, 9), chance.randint(0, 3), chance.randint(0, 10**9)
        times = [chance.randint(-50, 50) for _ in range(chance.randint(1, 3))]
        sorter.add(claimed(series, times, place=(partition, position), base=number))
        expected += [(series, time, partition, position, number + at) for at, time in enumerate(times)]
    found = [unpack(entry) for entry in sorter.in_order()]
    assert [(one.series_id, one.ts, one.partition, one.position, one.item) for one in found] == sorted(expected)


def test_texts_come_back(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    places = {text: blobs.add(text.encode()) for text in ("", "eco", "été", "x" * 70_000)}
    assert {text: blobs.get(place).decode() for text, place in places.items()} == {text: text for text in places}
    blobs.close()


@pytest.mark.parametrize(
    ("value", "standing", "same"),
    [
        (1.0, 1.0, True),
        (0.0, -0.0, True),
        (100.0, 100.0 * (1 + 9e-10), True),
        (100.0, 100.0 * (1 + 2e-9), False),
        (1e-300, 0.0, False),
        (5e-324, -5e-324, False),
        (1.7976931348623157e308, -1.7976931348623157e308, False),
    ],
)
def test_values_are_equal_as_landing_has_it(value: float, standing: float, same: bool) -> None:
    assert is_same_number(value, standing) is same
    assert is_same_number(standing, value) is same


def found(**counts: int) -> list[int]:
    row = [0] * 14
    for name, count in counts.items():
        row[getattr(tally, name)] = count
    return row


BOOKED = Booked(received=10, stored=5, duplicates=2, conflicts=1, quarantined=2, erased=0)
AS_BOOKED = {"RECEIVED": 10, "FOUND": 7, "REPEATED": 2, "TOLD": 2, "TOLD_CONFLICTS": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"FOUND": 5, "REPEATED": 0, "RETIRED": 2}, []),
        ({"REPEATED": 1, "OPEN": 1}, []),
        ({"REPEATED": 0, "OPEN": 1}, ["by the records"]),
        ({"REPEATED": 3, "OPEN": 1}, ["by the records"]),
        ({"RECEIVED": 11}, ["received 10 in the ledger, 11 in the log"]),
        ({"FOUND": 6, "LOST": 1}, []),
        ({"FOUND": 6}, ["in the store"]),
        ({"TOLD": 1}, ["duplicates 2 in the ledger, 1 in the outcomes"]),
        ({"TOLD_CONFLICTS": 0}, ["conflicts 1 in the ledger, 0 in the outcomes"]),
        # What has tombstones on it was stored once, or set aside, and is counted as that.
        ({"FOUND": 5, "REPEATED": 1, "ERASED": 2}, []),
        ({"FOUND": 6, "TOLD_CONFLICTS": 0, "ERASED": 1}, []),
        ({"FOUND": 4, "ERASED": 2}, ["in the store"]),
        ({"FOUND": 8, "ERASED": 2}, ["in the store"]),
    ],
)
def test_a_row_of_the_ledger_differs(changes: dict[str, int], said: list[str]) -> None:
    differences = differing(found(**AS_BOOKED | changes), BOOKED)
    assert len(differences) == len(said)
    assert all(words in difference for words, difference in zip(said, differences, strict=True))
    assert differing(found(**AS_BOOKED | changes), BOOKED._replace(received=9, stored=5))


def test_the_ledger_has_no_more_erased_than_there_are_tombstones_for() -> None:
    booked = BOOKED._replace(stored=3, erased=2)
    assert differing(found(**AS_BOOKED | {"FOUND": 5, "ERASED": 2}), booked) == []
    (said,) = differing(found(**AS_BOOKED | {"FOUND": 5, "ERASED": 1}), booked)
    assert said == "erased 2 in the ledger, 1 with tombstones on them"


SET_ASIDE = SetAside(
    booked=9, replayed=3, discarded=2, expired=1, lost=0,
    held=3, rows_released=3, rows_discarded=2, rows_expired=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"replayed": 4}, ["2 still in quarantine", "replayed 4"]),
        ({"discarded": 0, "replayed": 5}, ["replayed 5", "discarded 0"]),
        ({"held": 4}, ["3 still in quarantine by the ledger, 4"]),
        ({"held": 2}, ["3 still in quarantine by the ledger, 2"]),
        ({"lost": 2}, ["lost 2"]),
        # Of rows that are forgotten only the sum can be told.
        ({"rows_released": 1}, []),
        ({"rows_released": 0, "rows_discarded": 0, "rows_expired": 0}, []),
        ({"rows_released": 2, "replayed": 1, "expired": 3}, ["replayed 1", "expired 3"]),
        ({"rows_released": 2, "replayed": 4}, ["2 still in quarantine", "replayed 4"]),
        ({"booked": 10, "rows_released": 2}, ["4 still in quarantine by the ledger, 3"]),
    ],
)
def test_the_quarantine_differs_from_the_ledger(changes: dict[str, int], said: list[str]) -> None:
    differences = differing_set_aside(SET_ASIDE._replace(**changes))
    assert len(differences) == len(said), differences
    assert all(words in difference for words, difference in zip(said, differences, strict=True)), differences
