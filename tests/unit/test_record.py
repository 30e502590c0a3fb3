"""The log's record: small, readable for ever, and told apart from what is newer and from what is none."""

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.record import (
    LATE_VERSION,
    NOBODY,
    ORIGIN_BYTES_MAX,
    PLAIN_VERSION,
    VERSION,
    Channel,
    Delivery,
    Idempotency,
    Note,
    Origin,
    Record,
    Refused,
    UndecodableError,
    UnknownVersionError,
    decode,
    encode,
)

RECORD_ID, ORGANISATION, DEVICE = bytes(range(16)), bytes(range(16, 32)), bytes(range(32, 48))
RECEIVED = 831_817_320_000_000

#: Written by version 1 on the day it was fixed. Whatever the code becomes, it reads this.
GOLDEN = bytes.fromhex(
    "9a01c410000102030405060708090a0b0c0d0e0fc410101112131415161718191a1b1c1d1e1fc4102021222324252627"
    "28292a2b2c2d2e2fcf0002f4888fe06a00a468747470a872657175657374319396ab74656d7065726174757265a56672"
    "6f6e74a3c2b043c4100002f4888f47d3800002f4888fe06a00c4104010cccccccccccdc01c0000000000000096a4646f"
    "6f72a0a0c4080002f4888fe06a0091a46f70656e0496ab74656d7065726174757265a566726f6e74a3c2b043c4100000"
    "0000000000010000000000000002c4103fe00000000000003ff8000000000000c40400080018919403aa6e6f745f6669"
    "6e697465ba612076616c756520697320612066696e697465206e756d626572c40c7b2274797065223a2278227d929502"
    "01b3323031382d30332d30325431383a32353a3033a3c2b046c0950100c0c0c4027b7d"
)


def record(*channels: Channel, refused: tuple[Refused, ...] = (), notes: tuple[Note, ...] = ()) -> Record:
    return Record(
        PLAIN_VERSION,
        RECORD_ID,
        ORGANISATION,
        DEVICE,
        RECEIVED,
        "http",
        "request1",
        [*channels],
        [*refused],
        [*notes],
    )


def channel(times: list[int], values: list[float] | list[str], quality: int | list[int] = 0) -> Channel:
    packed = values if values and isinstance(values[0], str) else struct.pack(f">{len(values)}d", *values)
    flags = quality if isinstance(quality, int) else struct.pack(f">{len(quality)}h", *quality)
    return Channel("temperature", "front", "°C", struct.pack(f">{len(times)}q", *times), packed, flags)


def full() -> Record:
    return record(
        channel([RECEIVED - 10_000_000, RECEIVED], [4.2, -7.0]),
        Channel("door", "", "", struct.pack(">q", RECEIVED), ["open"], 4),
        channel([1, 2], [0.5, 1.5], [8, 24]),
        refused=(Refused(3, "not_finite", "a value is a finite number", b'{"type":"x"}'),),
        notes=(Note(2, 1, "2018-03-02T18:25:03", "°F"), Note(1, 0, metadata=b"{}")),
    )


def test_a_record_of_version_1_written_long_ago_is_read() -> None:
    assert decode(GOLDEN) == full()
    # What is written under this number today says more only where a reader of that day passes over it.
    today = encode(full())
    assert today[1 : len(GOLDEN)] == GOLDEN[1:]
    assert today[len(GOLDEN) :] == msgspec.msgpack.encode([None, None, b"", False, None])[1:]
    assert today[0] == GOLDEN[0] + 5


def late(**fields: Any) -> Record:
    return msgspec.structs.replace(full(), version=LATE_VERSION, **fields)


def test_what_version_2_adds_is_read_back() -> None:
    known = late(
        origin=Origin(RECORD_ID, 3, 17, 18),
        idempotency=Idempotency(DEVICE, RECORD_ID, ORGANISATION),
        replays=RECORD_ID,
        in_doubt=True,
    )
    assert decode(encode(known)) == known
    assert not known.is_gap
    gap = late(channels=[], refused=[], notes=[], origin=Origin(RECORD_ID, 3, 17, 20))
    assert decode(encode(gap)).is_gap
    single = late(organisation=NOBODY, channels=[], refused=[], notes=[], origin=Origin(RECORD_ID, 3, 17, 18))
    assert decode(encode(single)).is_gap


DELIVERY = Delivery(RECORD_ID, 65_535, True, b"8 bytes.", 2**40 + 7, 2**40 + 3, 2**40 + 5)


def test_what_version_3_adds_is_read_back_and_version_2_stays_what_it_was() -> None:
    known = msgspec.structs.replace(full(), version=VERSION, delivery=DELIVERY)
    assert decode(encode(known)) == known
    assert decode(encode(late(replays=RECORD_ID))).version == LATE_VERSION == VERSION - 1


@pytest.mark.parametrize(
    "fields",
    [
        {"session": b"short"},
        {"digest": b"nine bytes"},
        {"packet": 0},
        {"packet": 65_536},
        {"began": 2**40 + 8},
        {"floor": 2**40 + 8},
        {"floor": -1},
        {"number": 2**63},
    ],
)
def test_what_version_3_adds_is_checked(fields: dict[str, Any]) -> None:
    delivery = msgspec.structs.replace(DELIVERY, **fields)
    with pytest.raises(UndecodableError):
        decode(encode(msgspec.structs.replace(full(), version=VERSION, delivery=delivery)))


def test_a_place_in_a_spool_takes_no_more_room_than_is_kept_for_it() -> None:
    known = full()
    largest = Origin(RECORD_ID, 65_535, 2**48, 2**48 + 1)
    drained = encode(msgspec.structs.replace(known, version=VERSION, origin=largest))
    assert len(drained) - len(encode(known)) <= ORIGIN_BYTES_MAX


@pytest.mark.parametrize(
    "fields",
    [
        {"origin": Origin(b"short", 0, 0, 1)},
        {"origin": Origin(RECORD_ID, 0, 5, 5)},
        {"origin": Origin(RECORD_ID, 0, -1, 0)},
        {"idempotency": Idempotency(RECORD_ID, b"short", RECORD_ID)},
        {"replays": b"short"},
    ],
)
def test_what_version_2_adds_is_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(UndecodableError):
        decode(encode(late(**fields)))


def test_columns_are_unpacked_as_they_were_packed() -> None:
    known = decode(GOLDEN)
    plain, texts, flagged = known.channels
    assert (plain.unpack_times(), plain.unpack_values()) == ((RECEIVED - 10_000_000, RECEIVED), (4.2, -7.0))
    assert plain.unpack_quality() == (0, 0)
    assert (texts.unpack_values(), texts.unpack_quality()) == (["open"], (4,))
    assert flagged.unpack_quality() == (8, 24)
    assert (known.accepted, [len(one) for one in known.channels]) == (5, [2, 1, 2])
    assert (known.organisation, known.device) == (ORGANISATION, DEVICE)


@pytest.mark.parametrize("channels", [1, 5, 10])
def test_a_hundred_readings_take_at_most_24_bytes_each(channels: int) -> None:
    """In one channel or in ten, each with flags of its own, which is the dearest way."""
    each = 100 // channels
    flags = [0] * (each - 1) + [8]
    body = encode(record(*(channel([RECEIVED] * each, [21.5] * each, flags) for _ in range(channels))))
    assert len(body) <= 100 * 24


@pytest.mark.parametrize("fields", [8, 9])
def test_fields_missing_at_the_end_get_their_defaults(fields: int) -> None:
    known = full()
    older = msgspec.msgpack.encode(list(msgspec.structs.astuple(known))[:fields])
    expected = msgspec.structs.replace(known, refused=known.refused if fields == 9 else [], notes=[])
    assert decode(older) == expected


def test_a_field_more_at_the_end_is_passed_over() -> None:
    known = full()
    assert decode(msgspec.msgpack.encode([*msgspec.structs.astuple(known), {"new": 1}])) == known


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.integers(VERSION + 1, 2**64 - 1), st.lists(_ANYTHING, max_size=20))
def test_a_newer_version_is_told_whatever_follows_its_number(version: int, rest: list[object]) -> None:
    with pytest.raises(UnknownVersionError) as raised:
        decode(msgspec.msgpack.encode([version, *rest]))
    assert raised.value.version == version


@pytest.mark.parametrize("head", [b"\x98\xcc\x04", b"\xdc\x00\x08\x04", b"\xdd\x00\x00\x00\x08\xcd\x00\x04"])
def test_a_newer_version_is_told_however_it_is_written(head: bytes) -> None:
    with pytest.raises(UnknownVersionError):
        decode(head + b"cut off anywhere")


@pytest.mark.parametrize("version", [0, -1, None, "1", 1.0])
def test_a_version_that_never_was_is_no_record(version: object) -> None:
    with pytest.raises(UndecodableError):
        decode(msgspec.msgpack.encode([version, *msgspec.structs.astuple(full())[1:]]))


@given(st.binary(max_size=200))
def test_junk_is_never_anything_but_undecodable_or_newer(junk: bytes) -> None:
    for body in (junk, b"\x98\x01" + junk):
        with pytest.raises((UndecodableError, UnknownVersionError)):
            decode(body)


@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_one_wrong_byte_never_raises_anything_else(position: int, byte: int) -> None:
    body = bytearray(GOLDEN)
    body[position] = byte
    try:
        found = decode(bytes(body))
    except (UndecodableError, UnknownVersionError):
        return
    for one in found.channels:
        assert len(one.unpack_times()) == len(one.unpack_values()) == len(one.unpack_quality())


@given(st.integers(0, len(GOLDEN) - 1))
def test_a_record_that_was_cut_off_is_undecodable(length: int) -> None:
    with pytest.raises(UndecodableError):
        decode(GOLDEN[:length])


def test_endless_nesting_and_claims_of_size_are_undecodable() -> None:
    head = b"\x9b" + GOLDEN[1:]
    for body in (head + b"\x91" * 100_000 + b"\xc0", b"\x98\x01\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff\x01"):
        with pytest.raises(UndecodableError):
            decode(body)


@pytest.mark.parametrize(
    "wrong",
    [
        record(Channel("m", "", "", bytes(7), bytes(7))),
        record(Channel("m", "", "", bytes(16), bytes(8))),
        record(Channel("m", "", "", bytes(8), ["a", "b"])),
        record(Channel("m", "", "", bytes(16), bytes(16), bytes(2))),
        record(channel([1], [1.0]), notes=(Note(1, 0),)),
        record(channel([1], [1.0]), notes=(Note(0, 1),)),
        record(channel([1], [1.0]), notes=(Note(0, -1),)),
        msgspec.structs.replace(full(), device=bytes(15)),
        msgspec.structs.replace(full(), organisation=b""),
        msgspec.structs.replace(full(), record_id=bytes(17)),
    ],
)
def test_parts_that_do_not_fit_each_other_are_undecodable(wrong: Record) -> None:
    with pytest.raises(UndecodableError):
        decode(encode(wrong))


_TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
_TIMES = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)


@st.composite
def _channels(draw: st.DrawFn) -> Channel:
    times = draw(_TIMES)
    n = len(times)
    numbers = st.lists(st.floats(allow_nan=False), min_size=n, max_size=n)
    values = draw(numbers | st.lists(_TEXTS, min_size=n, max_size=n))
    quality = draw(st.integers(0, 63) | st.lists(st.integers(0, 63), min_size=n, max_size=n))
    return msgspec.structs.replace(channel(times, values, quality), metric=draw(_TEXTS), label=draw(_TEXTS))


@given(
    st.lists(_channels(), max_size=4), st.lists(st.builds(Refused, st.integers(0, 9999), _TEXTS, _TEXTS, st.binary()))
)
def test_what_is_written_is_read(channels: list[Channel], refused: list[Refused]) -> None:
    known = record(*channels, refused=tuple(refused), notes=tuple(Note(at, 0, "x") for at in range(len(channels))))
    assert decode(encode(known)) == known
