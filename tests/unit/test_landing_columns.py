"""Rows for COPY are byte for byte what packing each with `struct` gives."""

import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from workers.landing import columns
from workers.landing.columns import BLOCK_ROWS, READING, SUSPECT, Runs, StagedRuns

INT8 = st.integers(-(2**63), 2**63 - 1)
READINGS = st.lists(st.tuples(INT8, st.floats(width=64), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=5)
RUNS = st.lists(st.tuples(st.integers(0, 2**31 - 1), READINGS, st.booleans()), min_size=1, max_size=5)


def _columns(readings: list[tuple[int, float, int]], one_flag: bool) -> tuple[bytes, bytes, int | bytes]:
    count = len(readings)
    times = struct.pack(f">{count}q", *(time for time, _, _ in readings))
    values = struct.pack(f">{count}d", *(value for _, value, _ in readings))
    flags = readings[0][2] if one_flag else struct.pack(f">{count}h", *(flag for _, _, flag in readings))
    return times, values, flags


def _framed(rows: list[bytes]) -> bytes:
    return b"PGCOPY\n\xff\r\n\0" + bytes(8) + b"".join(rows) + b"\xff\xff"


def _row(series: int, flag: int, time: int, value: float, *int4: int) -> bytes:
    fields = [struct.pack(">ii", 4, series), struct.pack(">ih", 2, flag), struct.pack(">iq", 8, time)]
    fields += [struct.pack(">id", 8, value), *(struct.pack(">ii", 4, number) for number in int4)]
    return struct.pack(">h", len(fields)) + b"".join(fields)


@given(RUNS)
def test_fresh_rows_are_sorted_by_series(given_runs: list[Any]) -> None:
    runs, expected = Runs(), []
    for series, readings, one_flag in given_runs:
        runs.add(series, *_columns(readings, one_flag))
        flag = readings[0][2]
        expected += [(series, _row(series, flag if one_flag else own, time, value)) for time, value, own in readings]
    expected.sort(key=lambda pair: pair[0])
    assert b"".join(columns.blocks(READING, runs.sorted())) == _framed([row for _, row in expected])


@given(RUNS)
def test_staged_rows_keep_their_order(given_runs: list[Any]) -> None:
    runs, expected = StagedRuns(), []
    for record, (series, readings, one_flag) in enumerate(given_runs):
        runs.add(series, *_columns(readings, one_flag))
        runs.records.append(record)
        runs.items.append([10 * item for item in range(len(readings))])
        for item, (time, value, own) in enumerate(readings):
            flag = readings[0][2] if one_flag else own
            expected.append(_row(series, flag, time, value, record, 10 * item))
    assert b"".join(columns.blocks(SUSPECT, runs.in_order())) == _framed(expected)


def test_more_rows_than_one_block() -> None:
    count = 2 * BLOCK_ROWS + 1
    runs = Runs()
    runs.add(7, struct.pack(f">{count}q", *range(count)), struct.pack(f">{count}d", *range(count)), 0)
    expected = _framed([_row(7, 0, number, float(number)) for number in range(count)])
    assert b"".join(columns.blocks(READING, runs.sorted())) == expected
