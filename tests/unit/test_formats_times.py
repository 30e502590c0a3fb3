"""Times as devices send them: what each way of writing one means, and that nothing else comes of junk."""

import math
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.times import parse_time

MOMENT = 1_779_006_120_000_000  # 2026-05-17T08:22:00Z


@pytest.mark.parametrize(
    "text",
    [
        "2026-05-17T08:22:00Z",
        "2026-05-17t08:22:00z",
        "2026-05-17 08:22:00Z",
        "2026-05-17T08:22:00.000Z",
        "2026-05-17T08:22Z",
        "2026-05-17T10:22:00+02:00",
        "2026-05-17T10:22:00+0200",
        "2026-05-17T03:52:00-04:30",
        "2026-05-17T08:22:00-00:00",
        "20260517T082200Z",
    ],
)
def test_rfc_3339_and_what_is_near_it(text: str) -> None:
    assert parse_time(text) == MOMENT


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("2026-05-17T08:22:00.1Z", 100_000),
        ("2026-05-17T08:22:00.000001Z", 1),
        ("2026-05-17T08:22:00.123456789Z", 123_456),  # cut, as PostgreSQL has no room for more
        ("2026-05-17T08:22:00,5+00:00", 500_000),
        ("2026-05-17t08:22:00.25z", 250_000),
    ],
)
def test_fractions_of_a_second(text: str, microseconds: int) -> None:
    assert parse_time(text) == MOMENT + microseconds


def test_a_leap_second_is_the_first_of_the_next_minute() -> None:
    turn = parse_time("2017-01-01T00:00:00Z")
    assert turn == 1_483_228_800_000_000
    assert parse_time("2016-12-31T23:59:60Z") == turn
    assert parse_time("2016-12-31t23:59:60.5z") == turn + 500_000
    assert parse_time("2017-01-01T00:59:60+01:00") == turn


@pytest.mark.parametrize(
    "epoch",
    [
        1_779_006_120,
        1_779_006_120_000,
        1_779_006_120_000_000,
        1_779_006_120_000_000_000,
        1_779_006_120.0,
        1.77900612e12,
    ],
)
def test_an_epoch_in_s_ms_us_and_ns_is_told_by_its_magnitude(epoch: float) -> None:
    assert parse_time(epoch) == MOMENT
    assert parse_time(str(epoch)) == MOMENT


@pytest.mark.parametrize(
    ("epoch", "moment"),
    [
        (1_680_962_879.62, 1_680_962_879_620_000),  # a Shelly frame
        (3.10, 3_100_000),  # its uptime, before it has a clock
        (0, 0),
        (-5, -5_000_000),
        (99_999_999_999, 99_999_999_999_000_000),
        (100_000_000_000, 100_000_000_000_000),
        (99_999_999_999_999, 99_999_999_999_999_000),
        (100_000_000_000_000, 100_000_000_000_000),
        (99_999_999_999_999_999, 99_999_999_999_999_999),
        (100_000_000_000_000_000, 100_000_000_000_000),
        (1_465_839_830_100_400_299, 1_465_839_830_100_400),
    ],
)
def test_the_edges_of_the_magnitudes(epoch: float, moment: int) -> None:
    assert parse_time(epoch) == moment


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("20260517", 20_260_517_000_000),  # Python reads a date
        ("2012010212345", 2_012_010_212_345_000),  # and here a date and a time
        ("1612011212345.678", 1_612_011_212_345_678),
        ("1e9", 1_000_000_000_000_000),
        (" 1779006120 ", MOMENT),
        ("+1779006120", MOMENT),
        ("-5", -5_000_000),
    ],
)
def test_numeric_text_is_an_epoch(text: str, moment: int) -> None:
    assert parse_time(text) == moment


@pytest.mark.parametrize("text", ["2018-03-02T18:25:03", "2018-03-02 18:25", "2018-03-02", "2018-W09-5T18:25:03"])
def test_a_local_time_says_nothing_without_its_zone(text: str) -> None:
    assert parse_time(text) is None


@pytest.mark.parametrize(
    "junk",
    [
        "", " ", "now", "null", "${ev.ts}", "12:00", "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z",
        "2026-05-17T24:00Z",
        "2026-05-17T08:22:61Z", "2026-05-17T08:22:60Z", "2026-05-17T08:22:00+25:00", "17.05.2026", "1_0",
        "0x10", "١٢٣",
        "nan", "inf", "-Infinity", "1e20", "1e400", "9" * 33, "9" * 5000, "\ud800", "\0",
        math.nan, math.inf, -math.inf, 1e20, -1e300, 10**20, -(10**400),
        True, False, None, [], {}, ["2026-05-17T08:22:00Z"], b"2026-05-17T08:22:00Z", 1j, datetime(2026, 5, 17,
        tzinfo=UTC),
    ],
    ids=lambda junk: ascii(junk)[:30],
)  # fmt: skip
def test_junk_is_refused(junk: object) -> None:
    with pytest.raises(ValueError):
        parse_time(junk)


_ZONES = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)).map(
    lambda offset: timezone(timedelta(minutes=offset // timedelta(minutes=1)))
)


_FROM, _TO = datetime.fromisoformat("1973-04-01"), datetime.fromisoformat("2106-01-01")


@given(st.datetimes(_FROM, _TO, timezones=_ZONES))
def test_what_rfc_3339_can_say_is_understood_to_the_microsecond(moment: datetime) -> None:
    expected = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert parse_time(moment.isoformat()) == expected
    assert parse_time(expected) == parse_time(expected * 1000) == expected


@given(
    st.text(max_size=40)
    | st.floats()
    | st.integers()
    | st.from_regex(r"\d{4}-\d\d-\d\d.\d\d:\d\d(:\d\d)?(\.\d*)?([zZ]|[+-]\d\d:?\d\d)?", fullmatch=True)
)
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
@example("9999-12-31T23:59:60Z")
@example("2018-03-02\ud80018:25:03")
def test_anything_is_a_moment_nothing_or_a_value_error(raw: object) -> None:
    try:
        found = parse_time(raw)
    except ValueError:
        return
    assert found is None or (type(found) is int and abs(found) < 2**62)
