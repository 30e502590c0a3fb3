"""Admission: every rule by which a reading is accepted, flagged or refused, and that none costs another."""

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ingest.admit import SENT_BYTES_MAX, Admission, Admitted, Sender
from ingest.formats.measurements_json import Sent
from ingest.formats.measurements_json import decode as decode_json
from ingest.formats.shape import BadNumber, Malformed, Measurement, Submission
from schemas.errors import ReadingCode
from schemas.record import PG_EPOCH_US, PLAIN_VERSION, Quality, decode, encode
from tests.ingest_rig import rows

SECOND = 1_000_000
DAY = 86_400 * SECOND
RECEIVED = 1_779_006_120 * SECOND  # 2026-05-17T08:22:00Z
RETENTION_DAYS = 30
SENDER = Sender(bytes(16), bytes(range(16)))
ADMISSION = Admission(future_us=600 * SECOND, year_floor=2015)
WINDOW = ADMISSION.window(RECEIVED, RETENTION_DAYS)
STAMPED = Quality.TIME_STAMPED
REPLACED = Quality.TIME_REPLACED
SHIFTED = Quality.TIME_SHIFTED


def admit(*measurements: Any, ts: object = None) -> Admitted:
    return admit_all(Submission([*measurements], None, ts))


def admit_all(*submissions: Submission) -> Admitted:
    indexed, first = [], 0
    for submission in submissions:
        indexed.append((first, submission))
        first += len(submission.measurements)
    return ADMISSION.admit(indexed, SENDER, WINDOW, record_id=bytes(16), request_id="r", way="http")


def at(*seconds: float, metric: str = "co2", first: float = 1.0) -> list[Measurement]:
    """One reading at each of these times, its value telling which it was."""
    return [Measurement(metric, first + number, ts=ts) for number, ts in enumerate(seconds)]


def only(admitted: Admitted) -> tuple[str, str, str, int, Any, int]:
    """The one reading, which was accepted."""
    assert (admitted.accepted, admitted.rejections) == (1, [])
    (row,) = rows(admitted.record)
    return row


def stored(value: Any, metric: str = "custom", unit: str | None = None) -> tuple[str, Any, int]:
    """Unit, value and flags of one reading sent at its receive time."""
    _, _, stored_unit, _, stored_value, flags = only(admit(Measurement(metric, value, None, unit, RECEIVED)))
    return stored_unit, stored_value, flags


def refusal(*measurements: Any, ts: object = None) -> tuple[str, str]:
    """Code and message of the one refusal; the record carries the same."""
    admitted = admit(*measurements, ts=ts)
    (told,), (kept,) = admitted.rejections, admitted.record.refused
    assert (told.index, told.code, told.message, told.retryable) == (kept.index, kept.code, kept.message, False)
    return told.code, told.message


def times(admitted: Admitted) -> list[float]:
    """Seconds before (or after) the receive time, by value."""
    return [(row[3] - RECEIVED) / SECOND for row in sorted(rows(admitted.record), key=lambda row: row[4])]


def flags(admitted: Admitted) -> set[int]:
    return {row[5] for row in rows(admitted.record)}


# ---------------------------------------------------------------- names, units, labels


def test_a_record_says_whose_it_is_and_when_it_came() -> None:
    record = admit(Measurement("temperature", 21.5, "front", "C", "2026-05-17T08:21:00Z")).record
    assert (record.version, record.organisation, record.device) == (PLAIN_VERSION, SENDER.organisation, SENDER.device)
    assert (record.received_at, record.way, record.request_id) == (RECEIVED - PG_EPOCH_US, "http", "r")
    assert rows(record) == [("temperature", "front", "°C", RECEIVED - 60 * SECOND, 21.5, 0)]
    assert decode(encode(record)) == record


@pytest.mark.parametrize("spelling", ["temperature", "Temperature", "temp", "TEMP"])
def test_a_metric_has_spellings(spelling: str) -> None:
    assert only(admit(Measurement(spelling, 1, None, None, RECEIVED)))[:3] == ("temperature", "", "°C")


@pytest.mark.parametrize(
    ("metric", "value", "unit", "expected"),
    [
        ("temperature", 68, "°F", ("°C", 20.0, 8)),
        ("temperature", 300.0, "K", ("°C", pytest.approx(26.85), 8)),
        ("pressure", 101.325, "kPa", ("hPa", 1013.25, 8)),
        ("pressure", 1, "bar", ("hPa", 1000.0, 8)),
        ("pressure", 1013, "mbar", ("hPa", 1013.0, 0)),  # the same by another name
        ("voltage", 3300, "mV", ("V", 3.3, 8)),
        ("power", 1.5, "kW", ("W", 1500.0, 8)),
        ("energy", 2, "kWh", ("Wh", 2000.0, 8)),
        ("energy", 2, "KWH", ("Wh", 2000.0, 8)),
        ("humidity", 45, "%RH", ("%", 45.0, 0)),
        ("humidity", 0.45, "1", ("%", 45.0, 8)),
        ("energy", 10**17, "J", ("Wh", 10**17 / 3600, 8)),
        ("custom", 5, "furlong", ("furlong", 5.0, 0)),
        ("custom", 5, None, ("", 5.0, 0)),
    ],
)
def test_a_unit_becomes_the_metrics_own_and_says_so(metric: str, value: float, unit: str, expected: Any) -> None:
    assert stored(value, metric, unit) == expected


def test_a_battery_in_volts_is_another_metric() -> None:
    volts, millivolts = Measurement("battery", 3.1, None, "V", 1), Measurement("battery", 2900, None, "mV", 2)
    found = rows(admit(volts, millivolts, ts=RECEIVED).record)
    assert [(row[0], row[2], row[4], row[5] & 8) for row in found] == [
        ("battery_voltage", "V", 3.1, 0),
        ("battery_voltage", "V", 2.9, 8),
    ]


def test_a_unit_that_was_converted_stands_in_the_notes() -> None:
    admitted = admit(Measurement("power", 1, "a", "kW"), Measurement("power", 2, "a", "kW"), ts=RECEIVED)
    assert [
        (note.channel, note.reading, note.original_unit, note.original_time) for note in admitted.record.notes
    ] == [
        (0, 0, "kW", None),
        (0, 1, "kW", None),
    ]


def test_an_unknown_unit_of_a_known_metric_is_refused_by_itself() -> None:
    admitted = admit(Measurement("temperature", 1, unit="°R"), Measurement("humidity", 40))
    assert [(one.index, one.code, one.message) for one in admitted.rejections] == [
        (0, "unknown_unit", "temperature takes °C, °F, K, not `°R`")
    ]
    assert [row[0] for row in rows(admitted.record)] == ["humidity"]
    assert json.loads(admitted.record.refused[0].payload) == {"type": "temperature", "value": 1, "unit": "°R"}


def test_a_metric_without_a_unit_takes_none() -> None:
    assert refusal(Measurement("motion", True, unit="%")) == ("unknown_unit", "motion takes no unit, not `%`")


@pytest.mark.parametrize("name", ["a", "_x", "co2.room-1", "a/b:c", "A" * 64])
def test_a_metric_of_ones_own_is_accepted_under_a_sane_name(name: str) -> None:
    assert only(admit(Measurement(name, 1)))[0] == name.lower()


@pytest.mark.parametrize("name", [None, "", "1a", "a b", "ä", "a\n", "a\0", "a" * 65, "${ev}", "-a", "\ud800"])
def test_any_other_name_is_refused(name: str | None) -> None:
    assert refusal(Measurement(name, 1))[0] == "invalid_metric"


@pytest.mark.parametrize(
    ("label", "unit", "code"),
    [
        ("l" * 65, None, "invalid_label"),
        ("a\nb", None, "invalid_label"),
        ("a\0", None, "invalid_label"),
        ("\ud800", None, "invalid_label"),
        (None, "u" * 17, "invalid_unit"),
        (None, "\x7f", "invalid_unit"),
        (None, "\udcff", "invalid_unit"),
    ],
)
def test_labels_and_units_are_short_and_printable(label: str | None, unit: str | None, code: str) -> None:
    assert refusal(Measurement("custom", 1, label, unit))[0] == code
    assert only(admit(Measurement("custom", 1, "Kühlraum Nº 1 " + "x" * 50, "µg/m³ (corr.)!!!")))[1][:8] == "Kühlraum"


@pytest.mark.parametrize("field", ["type", "label", "unit"])
@pytest.mark.parametrize("junk", [1, 1.5, True, [], ["x"], {}, {"a": 1}, BadNumber("NaN")], ids=repr)
def test_a_name_that_is_no_text_is_refused_by_itself(field: str, junk: object) -> None:
    bad = Measurement(**({"type": "custom", "value": 1} | {field: junk}))
    admitted = admit(Measurement("custom", 1), bad, Measurement("custom", 2))
    assert [(one.index, one.code) for one in admitted.rejections] == [(1, "invalid_measurement")]
    assert [row[4] for row in rows(admitted.record)] == [1.0, 2.0]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, (1.0, 0)),
        (-0.5, (-0.5, 0)),
        (True, (1.0, 16)),
        (False, (0.0, 16)),
        ("open", ("open", 0)),
        ("x" * 1000, ("x" * 1000, 0)),
        ("naïve ☃", ("naïve ☃", 0)),
        (2**53, (2.0**53, 0)),
        (-(2**53), (-(2.0**53), 0)),
        (2**53 + 1, ("9007199254740993", 32)),
        (-(2**53) - 1, ("-9007199254740993", 32)),
        (10**96 - 1, ("9" * 96, 32)),
        (1e308, (1e308, 0)),
        (5e-324, (5e-324, 0)),
    ],
)
def test_what_is_stored_of_a_value(value: object, expected: tuple[object, int]) -> None:
    assert stored(value)[1:] == expected


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "invalid_value"),
        ([], "invalid_value"),
        ({"a": 1}, "invalid_value"),
        ("", "invalid_value"),
        ("a\0b", "invalid_value"),
        ("\ud800", "invalid_value"),
        ("${ev.tC}", "unexpanded_placeholder"),
        ("{{ev.tC}}", "unexpanded_placeholder"),
        ("door %{state}", "unexpanded_placeholder"),
        ("x" * 1001, "out_of_range"),
        (2**320, "out_of_range"),
        (-(10**399), "out_of_range"),
        (BadNumber("NaN"), "not_finite"),
        (math.nan, "not_finite"),
        (math.inf, "not_finite"),
        (-math.inf, "not_finite"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_value_that_cannot_be_stored_is_refused(value: object, code: str) -> None:
    assert refusal(Measurement("custom", value))[0] == code


@pytest.mark.parametrize(
    ("metric", "value", "unit", "code"),
    [
        ("temperature", -273.16, None, "out_of_range"),
        ("temperature", 2001, None, "out_of_range"),
        ("humidity", 100.1, None, "out_of_range"),
        ("temperature", 1e308, "°F", "out_of_range"),
        ("energy", 1e308, "kWh", "not_finite"),
        ("temperature", 10**20, None, "out_of_range"),
        ("energy", 10**400, "kWh", "not_finite"),
        ("temperature", math.nan, "°F", "not_finite"),
        ("temperature", BadNumber("1e400"), None, "not_finite"),
        ("temperature", True, None, "invalid_value"),
        ("temperature", "21.5", None, "invalid_value"),
        ("temperature", None, None, "invalid_value"),
        ("temperature", "${ev.tC}", None, "unexpanded_placeholder"),
        ("temperature", "${ev.tC}", "K", "unexpanded_placeholder"),
        ("motion", "${ev.state}", None, "unexpanded_placeholder"),
        ("motion", 2, None, "out_of_range"),
        ("motion", 0.5, None, "out_of_range"),
        ("motion", math.nan, None, "out_of_range"),
        ("motion", 10**400, None, "invalid_value"),
        ("motion", "yes", None, "invalid_value"),
    ],
)
def test_a_known_metric_takes_what_it_can_have(metric: str, value: object, unit: str | None, code: str) -> None:
    assert refusal(Measurement(metric, value, None, unit))[0] == code


@pytest.mark.parametrize(("value", "stored_as"), [(True, 1.0), (0, 0.0), (1.0, 1.0), (False, 0.0)])
def test_a_metric_of_states_takes_booleans_and_their_numbers(value: object, stored_as: float) -> None:
    assert stored(value, "motion") == ("", stored_as, 16)


def test_texts_and_numbers_of_one_series_stand_in_channels_of_their_own() -> None:
    admitted = admit(*(Measurement("state", value) for value in (1, "on", 2, "off", 10**20)))
    assert [(channel.unpack_values(), channel.unpack_quality()) for channel in admitted.record.channels] == [
        ((1.0, 2.0), (4, 4)),
        (["on", "off", "1" + "0" * 20], (4, 4, 36)),
    ]


# ---------------------------------------------------------------- times


def test_a_missing_time_is_the_receive_time_and_says_so() -> None:
    assert only(admit(Measurement("co2", 1)))[3:] == (RECEIVED, 1.0, STAMPED)


def test_a_reading_without_a_time_has_that_of_its_submission() -> None:
    admitted = admit(
        Measurement("co2", 1), Measurement("co2", 2, ts="2026-05-17T08:20:00Z"), ts="2026-05-17T08:21:00Z"
    )
    assert (times(admitted), flags(admitted)) == ([-60, -120], {0})


@pytest.mark.parametrize("edge", [RECEIVED - RETENTION_DAYS * DAY, RECEIVED + 600 * SECOND])
def test_the_ends_of_the_window_are_believed(edge: int) -> None:
    assert only(admit(Measurement("co2", 1, ts=edge)))[3:] == (edge, 1.0, 0)


def test_data_older_than_the_organisation_keeps_is_refused() -> None:
    oldest = RECEIVED - RETENTION_DAYS * DAY
    assert refusal(Measurement("co2", 1, ts=oldest - 1))[0] == "too_old"
    assert refusal(Measurement("co2", 1, ts="2015-01-01T00:00:00Z"))[0] == "too_old"


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        ("2014-12-31T23:59:59Z", "2014-12-31T23:59:59Z"),  # a clock that was never set
        (3.1, "3.1"),
        (0, "0"),
        (-5, "-5"),
        ("2018-03-02T18:25:03", "2018-03-02T18:25:03"),  # nobody knows whose local time
        (RECEIVED + 600 * SECOND + 1, str(RECEIVED + 600 * SECOND + 1)),
        ("2018-03-02\x0018:25:03", "'2018-03-02\\x0018:25:03'"),
        ("2018-03-02\ud80018:25:03", "'2018-03-02\\ud80018:25:03'"),
    ],
)
def test_a_time_that_cannot_be_is_replaced_and_kept_beside(raw: object, kept: str) -> None:
    admitted = admit(Measurement("co2", 1, ts=raw))
    assert only(admitted)[3:] == (RECEIVED, 1.0, REPLACED)
    (note,) = admitted.record.notes
    assert (note.channel, note.reading, note.original_time, note.original_unit) == (0, 0, kept, None)
    assert decode(encode(admitted.record)).notes == [note]


@pytest.mark.parametrize("junk", ["", "yesterday", True, [], {"t": 1}, BadNumber("NaN"), 10**30, "9" * 400], ids=repr)
def test_a_time_that_is_none_is_refused(junk: object) -> None:
    code, message = refusal(Measurement("co2", 1, ts=junk))
    assert (code, message[:4]) == ("invalid_time", "ts: ")
    admitted = admit(Measurement("co2", 1), Measurement("co2", 2, ts=RECEIVED), ts=junk)
    assert [one.index for one in admitted.rejections] == [0]


def test_a_backlog_without_a_clock_keeps_its_spacing() -> None:
    admitted = admit(*at(3.1, 63.1, 123.1))
    assert (times(admitted), flags(admitted)) == ([-120, -60, 0], {SHIFTED})
    assert [note.original_time for note in admitted.record.notes] == ["3.1", "63.1", "123.1"]


def test_a_backlog_of_several_submissions_and_channels_keeps_its_spacing_as_a_whole() -> None:
    early = Submission(at(None, metric="temperature"), None, 3.1)  # type: ignore[arg-type]
    late = Submission([*at(63.1, first=2.0), *at(None, metric="humidity", first=3.0)], None, 33.1)  # type: ignore[arg-type]
    admitted = admit_all(early, late)
    assert (times(admitted), flags(admitted)) == ([-60, 0, -30], {SHIFTED})


def test_a_clock_that_runs_a_year_ahead_keeps_its_spacing_too() -> None:
    ahead = RECEIVED / SECOND + 365 * 86_400
    assert times(admit(*at(ahead, ahead + 10, ahead + 5))) == [-10, 0, -5]


def test_one_time_that_is_believed_takes_the_others_spacing_away() -> None:
    admitted = admit(*at(3.1, 63.1), Measurement("co2", 9.0, ts=RECEIVED - SECOND))
    assert times(admitted) == [0, 1e-6, -1]
    assert [row[5] for row in rows(admitted.record)] == [REPLACED, REPLACED, 0]


def test_spacing_wider_than_the_retention_is_none() -> None:
    admitted = admit(*at(0, RETENTION_DAYS * 86_400 + 1))
    assert (times(admitted), flags(admitted)) == ([0, 1e-6], {REPLACED})


def test_a_local_time_in_a_backlog_is_replaced_alone() -> None:
    admitted = admit(*at(3.1, 63.1), Measurement("co2", 9.0, ts="2018-03-02T18:25:03"))
    assert sorted(row[5] for row in rows(admitted.record)) == [REPLACED, SHIFTED, SHIFTED]
    assert sorted(times(admitted)) == [-60, 0, 1e-6]


def test_equal_stamps_move_on_by_a_microsecond() -> None:
    assert times(admit(*at(None, None, None))) == [0, 1e-6, 2e-6]  # type: ignore[arg-type]
    assert times(admit(*at(5, 5, 5, 4))) == [0, 1e-6, 2e-6, -1]


def test_equal_stamps_of_different_series_stay() -> None:
    admitted = admit(Measurement("co2", 1), Measurement("co2", 2, "b"), Measurement("humidity", 3))
    assert times(admitted) == [0, 0, 0]


def test_equal_stamps_of_one_series_in_two_spellings_move_on() -> None:
    admitted = admit(Measurement("temp", 20), Measurement("temperature", 69.8, unit="F"), Measurement("temp", 22))
    assert sorted(times(admitted)) == [0, 1e-6, 2e-6]
    assert len(set(times(admitted))) == 3


def test_a_stamp_makes_way_for_the_devices_own_times() -> None:
    own = [Measurement("co2", 9.0 + step, ts=RECEIVED + step) for step in (0, 1, 3)]
    admitted = admit(*at(None, None), *own)  # type: ignore[arg-type]
    assert times(admitted) == [2e-6, 4e-6, 0, 1e-6, 3e-6]


def test_equal_times_of_the_device_are_left_to_landing() -> None:
    assert times(admit(*at(RECEIVED, RECEIVED))) == [0, 0]


# ---------------------------------------------------------------- refusals


def test_what_stood_where_a_measurement_should_is_refused_as_the_format_said() -> None:
    admitted = admit(Malformed("unknown_parameter", "`warp` is none", {"parameter": "warp"}), Measurement("co2", 1))
    assert [(one.index, one.code, one.message) for one in admitted.rejections] == [
        (0, "unknown_parameter", "`warp` is none")
    ]
    assert (admitted.accepted, admitted.record.refused[0].payload) == (1, b'{"parameter":"warp"}')


def test_indexes_go_on_through_the_submissions() -> None:
    bad = Measurement("co2", None)
    admitted = admit_all(Submission([bad, Measurement("co2", 1)]), Submission([Measurement("co2", 2), bad]))
    assert [one.index for one in admitted.rejections] == [0, 3]


TOKEN = "ds_live_0123456789abcdefghijABCDEFGHIJ012345"


@pytest.mark.parametrize(
    "bad",
    [
        Measurement("co2", "value", TOKEN * 2),
        Measurement("temperature", 1, None, TOKEN[:16]),
        Measurement("co2", None, None, None, {"authorization": f"Bearer {TOKEN}"}),
        Malformed("unknown_parameter", f"`{TOKEN}` is no parameter", {"parameter": TOKEN}),
        Measurement("co2", [f"gw{TOKEN[2:]}", f"sk{TOKEN[2:]}", "eyJhbGciOi.eyJzdWIi.c2ln"]),
    ],
)
def test_no_token_is_kept_or_told(bad: Any) -> None:
    admitted = admit(bad)
    told = admitted.rejections[0].message + admitted.record.refused[0].payload.decode()
    assert admitted.record.refused[0].message == admitted.rejections[0].message
    assert "***" in told
    for secret in (TOKEN[8:], TOKEN[8:16], "eyJ"):
        assert secret not in told


def test_what_is_kept_of_a_refused_reading_is_bounded_json() -> None:
    nested: Any = 1
    for _ in range(900):
        nested = [nested]
    for value in ("x" * 100_000, "☃" * 100_000, "\ud800", 10**399, nested, {"a": BadNumber("NaN")}):
        (kept,) = admit(Measurement("temperature", value)).record.refused
        assert len(kept.payload) <= 8_000
    assert json.loads(admit(Measurement("temperature", "x")).record.refused[0].payload)["value"] == "x"


def payload(submission: Submission) -> Any:
    (kept,) = admit_all(submission).record.refused
    return json.loads(kept.payload)


def test_a_refused_reading_is_kept_with_the_time_of_its_request() -> None:
    bad = Measurement("temperature", 1, None, "°R")
    shown = {"type": "temperature", "value": 1, "unit": "°R"}
    assert payload(Submission([bad], None, "2026-05-17T08:22:00Z")) == shown | {"ts": "2026-05-17T08:22:00Z"}
    assert payload(Submission([bad], None, RECEIVED)) == shown | {"ts": RECEIVED}
    own = Measurement("temperature", 1, None, "°R", 5)
    assert payload(Submission([own], None, RECEIVED)) == shown | {"ts": 5}
    stray = Malformed("invalid_measurement", "twice", {"type": "a", "value": 1})
    assert payload(Submission([stray], None, RECEIVED)) == {"type": "a", "value": 1, "ts": RECEIVED}
    assert payload(Submission([Malformed("invalid_measurement", "none", 7)], None, RECEIVED)) == 7
    assert payload(Submission([bad], None, {"much": "x" * 100_000})) == shown
    assert payload(Submission([bad], None, "x" * 100_000)) == shown | {"ts": "x" * 64}


def test_the_longest_text_is_kept_whole() -> None:
    old = RECEIVED - 400 * 86_400_000_000
    (kept,) = admit(Measurement("a" * 64, "\N{SNOWMAN}" * 1_000, "\N{SNOWMAN}" * 64, "m", old)).record.refused
    assert (kept.code, json.loads(kept.payload)["value"]) == ("too_old", "\N{SNOWMAN}" * 1_000)


def test_what_is_no_json_again_keeps_its_shape() -> None:
    assert payload(Submission([Measurement("temperature", 10**30)]))["value"] == 10**30
    assert payload(Submission([Measurement("note", BadNumber("NaN"))]))["value"] == {"not_finite": "NaN"}


def kept_of(body: str, *, is_refused: bool = False) -> list[str]:
    """The payloads of what is refused of a body of one device."""
    indexed, first, raw = [], 0, body.encode()
    for submission in decode_json(raw):
        indexed.append((first, submission))
        first += len(submission.measurements)
    ids: dict[str, Any] = {"record_id": bytes(16), "request_id": "r", "way": "http", "sent": Sent(raw)}
    if is_refused:
        code = ReadingCode.DEVICE_SUSPENDED
        admitted = ADMISSION.refuse(indexed, SENDER, WINDOW, code, "suspended", **ids)
    else:
        admitted = ADMISSION.admit(indexed, SENDER, WINDOW, **ids)
    return [refused.payload.decode() for refused in admitted.record.refused]


@pytest.mark.parametrize(
    "sent",
    [
        '{"type":"t","value":1,"value":2}',
        '{ "value" : 21.50, "type":"temperature","unit":"\\u00b0R", "metadata":{"rssi":[-60]},"extra":null }',
        '{"type":"co2","value":1e400,"ts":5}',
        '{"type":"co2","value":' + "9" * 500 + "}",
        '"junk"',
        "[1, 2]",
        "null",
    ],
)
def test_what_is_refused_is_kept_as_it_was_sent(sent: str) -> None:
    good = '{"type":"co2","value":1}'
    assert kept_of(f'{{"measurements":[{good}, {sent} ,{good}]}}') == [sent]
    assert kept_of(f'[{{"measurements":[{good}]}},{{"measurements":[{sent}]}}]', is_refused=True) == [good, sent]


def test_what_is_kept_as_it_was_sent_has_the_time_of_its_request() -> None:
    def timed(sent: str, ts: str = "1779006120.5") -> str:
        (kept,) = kept_of(f'{{"ts":{ts},"measurements":[{sent}]}}')
        return kept

    head = '{"type":"temperature","unit":"°R" , "x":{"ts":1},"value":1'
    assert timed(head + " }") == head + ',"ts":1779006120.5}'
    assert timed(head + "}", '"2026-05-17T08:22:00Z"') == head + ',"ts":"2026-05-17T08:22:00Z"}'
    assert timed(head + ',"ts":7}') == head + ',"ts":7}'
    assert json.loads(timed(head + ',"ts":null}')) == json.loads(head + ',"ts":1779006120.5}')
    # It has to be edited anyway, and must not lose what was said.
    doubled = '{"value":1,"value":2,"ts":null'
    assert timed(doubled + "}") == doubled + ',"ts":1779006120.5}'
    assert timed("{}") == '{"ts":1779006120.5}'
    assert timed("[]") == "[]"
    assert timed(head + "}", '{"a":1}') == head + "}"
    assert timed(head + "}", f'"{TOKEN}"') == head + ',"ts":"***"}'


@pytest.mark.parametrize(
    "spelt", [TOKEN, TOKEN.replace("_", "\\u005F"), "\\u0064" + TOKEN[1:], "eyJhbGci.e\\u0079J.c2"]
)
def test_no_token_is_kept_of_what_was_sent(spelt: str) -> None:
    names = (
        '{"%s":1,"type":"t"}',
        '{"type":"temperature","value":"a\\\\%s","value":1}',
        '["%s"]',
        '{"x":{"%s":"\\u00e9"}}',
    )
    for sent in names:
        (kept,) = kept_of('{"measurements":[' + sent % spelt + "]}")
        assert kept == sent % "***"


def test_what_would_have_to_be_cut_is_kept_without_what_nobody_knows() -> None:
    long = '{"type":"temperature","value":1,"unit":"°R","x":"' + "x" * 8_000 + '"}'
    assert kept_of(f'{{"measurements":[{long}]}}') == ['{"type":"temperature","value":1,"unit":"°R"}']


def test_what_is_kept_as_it_was_sent_is_bounded_in_each_record() -> None:
    each = '{"type":"temperature","value":1,"unit":"°R","x":"' + "x" * 4_000 + '"}'
    kept = kept_of('{"measurements":[' + ",".join([each] * 100) + "]}")
    whole = SENT_BYTES_MAX // len(each.encode())
    assert kept == [each] * whole + ['{"type":"temperature","value":1,"unit":"°R"}'] * (100 - whole)


def test_a_device_s_readings_are_refused_for_a_reason_that_is_not_theirs() -> None:
    readings = Submission([Measurement("co2", 1), Malformed("invalid_measurement", "none", 7)], None, RECEIVED)
    admitted = ADMISSION.refuse(
        [(3, readings)],
        SENDER,
        WINDOW,
        ReadingCode.DEVICE_SUSPENDED,
        "the device is suspended",
        record_id=bytes(16),
        request_id="r",
        way="http",
    )
    assert (admitted.accepted, admitted.record.channels) == (0, [])
    assert [(one.index, one.code) for one in admitted.rejections] == [
        (3, "device_suspended"),
        (4, "invalid_measurement"),
    ]
    assert json.loads(admitted.record.refused[0].payload) == {"type": "co2", "value": 1, "ts": RECEIVED}
    assert decode(encode(admitted.record)) == admitted.record


def test_specifications_are_kept_in_bounds() -> None:
    admission = Admission(future_us=0, year_floor=2015)
    for number in range(0, 30_000, 1000):
        labels = [Measurement("co2", 1, str(number + step)) for step in range(1000)]
        admission.admit([(0, Submission(labels))], SENDER, WINDOW, record_id=b"", request_id="", way="")
    assert len(admission._specifications) <= 20_000


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(BadNumber, st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
_TIMES = (
    st.none()
    | st.integers(RECEIVED - 40 * DAY, RECEIVED + DAY)
    | st.floats(0, 200)
    | st.sampled_from(["2026-05-17T08:21:00Z", "2018-03-02T18:25:03", RECEIVED, RECEIVED + 1, 3.1, 4.1])
)
_METRICS = st.sampled_from(["temperature", "temp", "energy", "motion", "battery", "custom", "x", "Bad Name", None])
_UNITS = st.sampled_from([None, "", "C", "°F", "K", "kWh", "mV", "%", "bogus"])
_MEASUREMENTS = st.builds(
    Measurement,
    _METRICS | _ANY,
    st.floats() | st.integers() | _ANY,
    st.none() | st.text(max_size=3),
    _UNITS,
    _TIMES | _ANY,
) | st.builds(Malformed, st.just("invalid_measurement"), st.text(), _ANY)


@given(st.lists(st.builds(Submission, st.lists(_MEASUREMENTS, max_size=6), st.none(), _TIMES | _ANY), max_size=4))
def test_every_reading_is_answered_exactly_once_and_what_is_accepted_can_be_stored(
    submissions: list[Submission],
) -> None:
    count = sum(len(one.measurements) for one in submissions)
    admitted = admit_all(*submissions)
    record = decode(encode(admitted.record))
    assert admitted.accepted == record.accepted == count - len(admitted.rejections)
    indexes = [one.index for one in admitted.rejections]
    assert indexes == sorted(set(indexes)) == [one.index for one in record.refused]
    assert all(0 <= index < count for index in indexes)
    for metric, label, unit, moment, value, quality in rows(record):
        assert (metric.isascii(), "\0" in metric + label + unit) == (True, False)
        assert WINDOW.oldest <= moment <= max(WINDOW.newest, RECEIVED + count)
        assert 0 <= quality < 64
        assert (0 < len(value) <= 1000 and "\0" not in value) if isinstance(value, str) else math.isfinite(value)


@given(st.lists(st.builds(Measurement, _METRICS, st.floats(0, 1), st.none(), _UNITS, _TIMES), max_size=12))
def test_times_of_our_making_never_coincide_within_a_series(measurements: list[Measurement]) -> None:
    ours = STAMPED | REPLACED | SHIFTED
    found = [(row[0], row[1], row[3]) for row in rows(admit(*measurements).record)]
    made_up = [(row[0], row[1], row[3]) for row in rows(admit(*measurements).record) if row[5] & ours]
    assert all(found.count(one) == 1 for one in made_up)


@example(
    [Measurement("temperature", 1.0, None, "", None), Measurement("temperature", 0.0, None, None, None)],
    Measurement("temperature", 0.0, None, None, RECEIVED - 39 * DAY),
    0,
)
@given(st.lists(_MEASUREMENTS, max_size=6), _MEASUREMENTS, st.integers(0, 6))
def test_a_bad_reading_never_costs_another(measurements: list[Measurement], bad: Any, place: int) -> None:
    alone = admit(bad)
    if alone.accepted:
        return
    before = admit(*measurements)
    after = admit(*measurements[:place], bad, *measurements[place:])
    assert sorted(rows(after.record), key=repr) == sorted(rows(before.record), key=repr)
