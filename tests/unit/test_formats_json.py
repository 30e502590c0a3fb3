"""The JSON body: what is understood, what is refused alone, and what is refused as a whole."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.formats.measurements_json import Sent, decode
from ingest.formats.shape import BadNumber, BodyError, Malformed, Measurement, Submission
from schemas.errors import RequestCode

ESP32 = (
    b'{"device":"f1","ts":"2026-05-17T08:22:00Z","measurements":[{"type":"temperature","value":4.2,"label":"front"}]}'
)


def only(body: bytes) -> Any:
    """The one measurement of a body's one submission."""
    ((found,),) = [one.measurements for one in decode(body)]
    return found


def with_value(raw: str) -> bytes:
    return f'{{"measurements":[{{"type":"temperature","value":{raw}}}]}}'.encode()


def test_an_esp32_body_says_all_that_stands_in_it() -> None:
    measured = Measurement("temperature", 4.2, "front")
    assert decode(ESP32) == [Submission([measured], "f1", "2026-05-17T08:22:00Z")]


def test_a_backlog_is_an_array_in_its_order() -> None:
    one = b'{"ts":1,"measurements":[{"type":"a","value":1,"unit":"W","ts":3}]}'
    two = b'{"device":"d","measurements":[]}'
    expected = [Submission([Measurement("a", 1, None, "W", 3)], None, 1), Submission([], "d", None)]
    assert decode(b"[" + one + b"," + two + b"]") == expected
    assert decode(b"[]") == []


def test_unknown_fields_and_white_space_are_passed_over() -> None:
    body = b' {"firmware": {"a": [1]}, "measurements" : [ {"value" : true , "type":"door","rssi":-60} ] }\n'
    assert only(body) == Measurement("door", True)


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"[", b"nul", b"tru", ESP32[:-1], ESP32[:40], ESP32 + b"}", ESP32 + ESP32,
        b'{"measurements":[1,]}',
        b'{"measurements":[{"type":"a","value":01}]}', b"{'measurements':[]}", b'{"measurements":[{"type":"a\n"}]}',
        b"\xef\xbb\xbf" + ESP32, ESP32.decode().encode("utf-16"), ESP32[:10] + b"\xff" + ESP32[11:], b"\x00" * 100,
        b'{"measurements":[],"note":"\xff\xfe"}', b'{"\xff":1,"measurements":[]}',
        b'{"measurements":[{"type":"a","value":1,"note":"\xff"}]}',
        b'{"measurements":[{"type":"\xed\xa0\x80","value":1}]}', b"[" * 100_000, b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"measurements":[{"type":"a","value":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"x":' + b'{"x":' * 100_000 + b"1" + b"}" * 100_001,
    ],
    ids=lambda body: ascii(body)[2:32],
)  # fmt: skip
def test_what_is_no_json_in_utf_8_is_refused_as_a_whole(body: bytes) -> None:
    with pytest.raises(BodyError) as raised:
        decode(body)
    assert raised.value.code is RequestCode.BAD_JSON
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"1", b'"text"', b"null", b"true", b"{}", b"NaN", b'{"measurements":null}', b'{"measurements":{}}',
        b"[1]", b"[[]]",
        b'{"measurements":"[]"}', b'[{"measurements":[]},null]', b'{"measurement":[]}', b'[{"measurements":[]},{}]',
    ],
    ids=ascii,
)  # fmt: skip
def test_json_of_another_shape_is_refused_as_a_whole(body: bytes) -> None:
    with pytest.raises(BodyError) as raised:
        decode(body)
    assert raised.value.code is RequestCode.INVALID_BODY


@pytest.mark.parametrize(
    "raw", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "9" * 5000, "-" + "1" * 400]
)
def test_a_number_that_no_float_holds_is_marked_alone(raw: str) -> None:
    body = f'{{"measurements":[{{"type":"a","value":{raw}}},{{"type":"b","value":2}}]}}'.encode()
    (submission,) = decode(body)
    bad, good = submission.measurements
    if isinstance(bad.value, int):  # below Python's own limit of digits it arrives whole
        assert bad.value == int(raw)
    else:
        assert bad.value == BadNumber(raw[:40])
    assert good == Measurement("b", 2)


@pytest.mark.parametrize(
    ("raw", "value"),
    [("1e308", 1e308), ("5e-324", 5e-324), ("0.1", 0.1), ("9007199254740993", 9007199254740993), ("-0.0", -0.0),
     ("18446744073709551616", 2**64), ("9" * 96, int("9" * 96)), ('"x"', "x"), ("false", False), ("null", None),
     ("1.0000000000000000000000000000000000001", 1.0)],
)  # fmt: skip
def test_values_arrive_as_they_were_meant(raw: str, value: object) -> None:
    found = only(with_value(raw)).value
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("item", ["1", "null", '"text"', "[]", "true"])
def test_an_item_that_is_no_object_is_marked_alone(item: str) -> None:
    (submission,) = decode(f'{{"measurements":[{{"type":"a","value":1}},{item}]}}'.encode())
    good, bad = submission.measurements
    assert good == Measurement("a", 1)
    assert bad == Malformed("invalid_measurement", "a measurement is an object", json.loads(item))


def test_measurements_given_twice_are_refused_as_a_whole() -> None:
    """Most decoders keep the last of them: the readings of the first would be lost, and nobody told."""
    twice = b'{"measurements":[{"type":"a","value":1}],"measurements":[{"type":"b","value":2}]}'
    for body in (twice, b'[{"measurements":[]},' + twice + b"]"):
        with pytest.raises(BodyError, match="`measurements` stands twice") as raised:
            decode(body)
        assert raised.value.code is RequestCode.INVALID_BODY


def test_a_value_given_twice_is_refused_alone() -> None:
    body = b'{"measurements":[{"type":"a","value":1,"value":2},{"type":"b","value":3}]}'
    (submission,) = decode(body)
    assert submission.measurements == [
        Malformed("invalid_measurement", "`value` stands twice in a measurement", {"type": "a", "value": 2}),
        Measurement("b", 3),
    ]


@pytest.mark.parametrize("text", ["value", "measurements", '"value"', '\\"measurements\\"', "`value` stands twice"])
def test_these_names_in_a_text_or_elsewhere_do_no_harm(text: str) -> None:
    body = {"x": {"value": 1, "measurements": 2}, "measurements": [{"type": "state", "value": text, "label": text}]}
    assert only(json.dumps(body).encode()) == Measurement("state", text, text)


@pytest.mark.parametrize("name", ["type", "value", "ts"])
def test_a_name_given_twice_in_a_measurement_refuses_it_alone(name: str) -> None:
    doubled = f'{{"type":"a","value":1,"ts":1,"{name}":2}}'
    (submission,) = decode(f'{{"measurements":[{doubled},{{"type":"b","value":1,"ts":1}}],"ts":1}}'.encode())
    first, second = submission.measurements
    assert isinstance(first, Malformed)
    assert first.message == f"`{name}` stands twice in a measurement"
    assert second == Measurement("b", 1, ts=1)


@pytest.mark.parametrize(
    "doubled",
    [
        '"value":1,"value":2',
        '"value":1,"ts":1,"ts":2',
        '"value":1,"label":"in","label":"out"',
        '"value":1,"unit":"F","unit":"C"',
        '"value":1,"valu\\u0065":2',
        '"value":1,"\\u0074ype":"b"',
        '"value":1,"label":"in","lab\\u0065l":null',
    ],
)
def test_a_name_given_twice_is_refused_though_others_lack_it(doubled: str) -> None:
    for others in ("", ',{"type":"b"}', ',{"type":"b","value":3},{"type":"c"}'):
        body = f'{{"measurements":[{{"type":"a",{doubled}}}{others}]}}'
        first = decode(body.encode())[0].measurements[0]
        assert isinstance(first, Malformed)
        assert "stands twice" in first.message


def test_a_name_given_twice_in_one_of_several_bodies_refuses_them() -> None:
    for doubled in ('"device":"a","device":"b"', '"ts":1,"ts":2'):
        with pytest.raises(BodyError, match="stands twice"):
            decode(f'[{{{doubled},"measurements":[]}},{{"measurements":[]}}]'.encode())


@pytest.mark.parametrize("name", ["measurements", "device", "ts"])
def test_a_name_given_twice_in_a_body_refuses_the_body(name: str) -> None:
    body = f'{{"device":"a","ts":1,"measurements":[{{"type":"a","value":1,"ts":1}}],"{name}":[]}}'
    with pytest.raises(BodyError, match=f"`{name}` stands twice"):
        decode(body.encode())


def test_other_names_given_twice_are_nobodys_loss() -> None:
    assert only(b'{"x":1,"x":2,"measurements":[{"type":"a","y":1,"y":2,"value":1}]}').type == "a"


def test_a_lone_surrogate_is_left_to_be_judged() -> None:
    assert only(with_value('"\\ud800"')).value == "\ud800"


def texts(body: bytes) -> list[bytes | None]:
    """Of each measurement of a body that is decoded, as it was sent."""
    sent = Sent(body)
    return [sent.text(index) for index in range(sum(len(one.measurements) for one in decode(body)))]


def test_each_measurement_is_told_as_it_was_sent() -> None:
    odd = [b'{ "type":"a" ,\n"value":21.50,"value":3e400, "extra":{"a":[1]}}', b"7", b'"x"', b"null", b"[ ]"]
    one, two = b'{"measurements":[%b, %b]}' % (odd[0], odd[1]), b'{"measurements" : [ %b ]}' % b" , ".join(odd[2:])
    assert texts(b"[%b,%b]" % (one, two)) == odd
    assert texts(one) == odd[:2]
    assert texts(two) == odd[2:]
    assert Sent(two).text(3) is None


def test_numbers_that_json_does_not_have_are_told_as_what_they_are() -> None:
    odd = b'{"type":"NaN \\"Infinity\\\\","value":%b,"x":[NaN,-1]}'
    (found,) = texts(b'{"measurements":[%b],"NaN":NaN}' % (odd % b"-Infinity"))
    shown = b'{"not_finite":"%b"}'
    assert found == (odd % (shown % b"-Infinity")).replace(b"[NaN", b"[" + shown % b"NaN")


def test_what_cannot_be_told_apart_has_no_text() -> None:
    assert texts(with_value('"\\ud800"')) == [None]
    for constants, found in ((9_999, b"-1"), (10_001, None)):
        assert texts(b'{"measurements":[-1],"x":[%b-2]}' % (b"NaN," * constants)) == [found]


def test_ten_thousand_items_of_junk_are_ten_thousand_refusals() -> None:
    (submission,) = decode(b'{"measurements":[' + b"1," * 9_999 + b"1]}")
    assert len(submission.measurements) == 10_000
    assert all(isinstance(one, Malformed) for one in submission.measurements)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
_NAMES = st.sampled_from(["type", "value", "label", "unit", "ts", "device", "measurements", "x"])
_NEAR = st.dictionaries(_NAMES, _JSON | st.lists(_JSON | st.dictionaries(_NAMES, _JSON)))


def _check(body: bytes) -> None:
    try:
        found = decode(body)
    except BodyError:
        return
    count, sent = sum(len(one.measurements) for one in found), Sent(body)
    assert sent.text(count) is None
    assert all(text is None or text == text.strip() for text in map(sent.text, range(count)))
    for submission in found:
        assert type(submission) is Submission
        assert all(type(one) in (Measurement, Malformed) for one in submission.measurements)


@given(st.binary() | st.binary(max_size=20).map(lambda junk: ESP32[:50] + junk + ESP32[50:]))
def test_any_bytes_are_submissions_or_a_body_error(body: bytes) -> None:
    _check(body)


@given(_NEAR | st.lists(_NEAR) | _JSON)
def test_any_json_is_submissions_or_a_body_error(content: Any) -> None:
    _check(json.dumps(content).encode())
    _check(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass"))


@given(st.lists(st.lists(_JSON)))
def test_any_measurement_is_told_as_it_was_sent(content: list[list[Any]]) -> None:
    body = json.dumps([{"measurements": one} for one in content]).encode()
    if b"NaN" in body or b"Infinity" in body:
        return
    assert [json.loads(text or b"") for text in texts(body)] == [one for part in content for one in part]


@given(st.integers(0, len(ESP32)), st.integers(0, len(ESP32)), st.binary(max_size=3))
def test_a_damaged_body_is_submissions_or_a_body_error(start: int, end: int, junk: bytes) -> None:
    _check(ESP32[:start] + junk + ESP32[end:])


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**90), 10**90) | st.text()))
def test_values_survive_the_way(values: list[float | int | str]) -> None:
    body = json.dumps({"measurements": [{"type": "a", "value": value} for value in values]}).encode()
    (submission,) = decode(body)
    for one, value in zip(submission.measurements, values, strict=True):
        assert one.value == value or (isinstance(value, float) and math.isclose(one.value, value))
