"""Signatures of plants: what they cover, and that they are what others compute."""

import hashlib
import hmac
from typing import Any

import msgspec
import orjson
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from schemas.signing import NotCanonicalError, canonical, command_parts, is_signed, signature, snapshot_parts

SECRET = bytes.fromhex("0b" * 20)
PLANT = "01900000-0000-7000-8000-0000000000aa"
DEVICES = [{"type": "METER", "externalId": "m1", "values": {"power": 1.50, "é": True}}]


def test_it_is_the_hmac_of_the_parts_joined() -> None:
    # RFC 4231, test case 1: the key is 20 bytes of 0x0b, the data "Hi There".
    assert signature(SECRET, "Hi There") == "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    assert signature(SECRET, "a", b"b") == hmac.new(SECRET, b"a|b", hashlib.sha256).hexdigest()


def test_canonical_form_is_that_of_rfc_8785() -> None:
    # The example of the RFC's section 3.2.2.
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"\u002f",
        "literals": [None, True, False],
    }
    assert canonical(value) == (
        b'{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        b'"string":"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53, "\ud800", {1: 2}])
def test_what_has_no_canonical_form_is_told(value: object) -> None:
    with pytest.raises(NotCanonicalError):
        canonical(value)


def test_a_snapshot_is_signed_whole() -> None:
    given = signature(SECRET, *snapshot_parts(PLANT, 1_700_000_000_000, "0a1b2c3d", None, DEVICES))
    respelt = [{"externalId": "m1", "values": {"é": True, "power": 1.5}, "type": "METER"}]
    assert is_signed(SECRET, given.upper(), *snapshot_parts(PLANT, 1_700_000_000_000, "0a1b2c3d", None, respelt))
    others = [
        (PLANT[:-1] + "b", 1_700_000_000_000, "0a1b2c3d", None, DEVICES),
        (PLANT, 1_700_000_000_001, "0a1b2c3d", None, DEVICES),
        (PLANT, 1_700_000_000_000, "0a1b2c3e", None, DEVICES),
        (PLANT, 1_700_000_000_000, "0a1b2c3d", 1_700_000_000_000, DEVICES),
        (PLANT, 1_700_000_000_000, "0a1b2c3d", None, []),
    ]
    assert not any(is_signed(SECRET, given, *snapshot_parts(*other)) for other in others)


def test_a_command_is_signed_with_whom_it_is_for() -> None:
    given = signature(SECRET, *command_parts(PLANT, "c1", 1, "restart", {"in": 5}))
    assert is_signed(SECRET, given, *command_parts(PLANT, "c1", 1, "restart", {"in": 5.0}))
    assert not is_signed(SECRET, given, *command_parts(PLANT, "c2", 1, "restart", {"in": 5}))


@pytest.mark.parametrize("given", ["", "zz", "é" * 32, "0" * 64])
def test_anything_else_is_no_signature(given: str) -> None:
    assert not is_signed(SECRET, given, "a")


# Numbers as devices write them, and those at the edges of what readers agree about.
NUMBERS = st.one_of(
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**9), 10**9).map(lambda n: n / 100),
    st.integers(-(2**54), 2**54).map(float),
    st.sampled_from([0.0, -0.0, 1e15, 1e16, 1e20, 1e21, 1e22, 1e-5, 1e-6, 1e-7, 5e-324, 2.0**53, 2.0**53 - 1, 1e100]),
)
# Keys that UTF-16 sorts otherwise, texts that look like numbers, and everything that is escaped.
TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=st.sampled_from('\ue000\uffff\U00010000\U0010ffffaé\x7f\x00\x1f"\\/\b\n')),
    st.sampled_from([":1.0,", "[1e5,", "a", "b", ",12345678901234567", ""]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=20,
)


@given(VALUES)
def test_the_quick_way_writes_what_the_library_writes(value: Any) -> None:
    assert canonical(value) == rfc8785.dumps(value)
    assert canonical([value]) == rfc8785.dumps([value])


@given(st.one_of(st.integers(), st.floats()))
def test_the_quick_way_refuses_what_the_library_refuses(number: float) -> None:
    try:
        expected: bytes | None = rfc8785.dumps({"a": [number]})
    except rfc8785.CanonicalizationError:
        expected = None
    try:
        found: bytes | None = canonical({"a": [number]})
    except NotCanonicalError:
        found = None
    assert found == expected


@given(VALUES)
def test_what_was_read_from_json_is_signed_as_it_was_meant(value: Any) -> None:
    """A device's JSON and our reading of it, which may write a number otherwise."""
    devices = [value]
    assert canonical(msgspec.json.decode(orjson.dumps(devices))) == rfc8785.dumps(devices)
