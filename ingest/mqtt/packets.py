"""MQTT 5 and 3.1.1 as far as a client speaks it that only takes messages at QoS 0 and 1: packets to and from bytes.

Left out: PUBLISH and PUBACK, which the connection reads and writes in place (`connection`).
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple


class Version(IntEnum):
    """By the number that CONNECT has."""

    V3_1_1 = 4
    V5 = 5


VERSIONS: Final = {"5": Version.V5, "3.1.1": Version.V3_1_1}

CONNACK: Final = 0x20
PUBLISH: Final = 0x30
SUBACK: Final = 0x90
UNSUBACK: Final = 0xB0
PINGRESP: Final = 0xD0
DISCONNECT: Final = 0xE0
PINGREQ: Final = b"\xc0\x00"
PUBACK: Final = struct.Struct(">BBH")
PUBACK_HEAD: Final = 0x40, 2

SESSION_TAKEN_OVER: Final = 0x8E
FAILED: Final = 0x80
"""The least of the codes that refuse something."""

#: Reasons, by MQTT 5's codes and behind them 3.1.1's, for operators; whoever sees another looks into the standard.
_REASONS: Final = {
    0x80: "for no reason it tells", 0x81: "malformed packet", 0x82: "protocol error",
    0x84: "it does not speak MQTT 5 (SLUICE_MQTT_VERSION)", 0x85: "the client identifier is not allowed",
    0x86: "bad user name or password", 0x87: "not authorized", 0x88: "server unavailable", 0x89: "server busy",
    0x8A: "banned", 0x8B: "server shutting down", 0x8D: "keep alive timeout", 0x8E: "the session was taken over",
    0x8F: "topic filter not allowed", 0x93: "receive maximum exceeded", 0x95: "packet too large",
    0x97: "quota exceeded", 0x98: "administrative action", 0x9F: "connection rate exceeded",
    0xA2: "no wildcard subscriptions", 1: "it does not speak MQTT 3.1.1 (SLUICE_MQTT_VERSION)",
    2: "the client identifier is not allowed", 3: "server unavailable", 4: "bad user name or password",
    5: "not authorized",
}  # fmt: skip
_SESSION_EXPIRY: Final = 0x11
_SERVER_KEEP_ALIVE: Final = 0x13
_RECEIVE_MAXIMUM: Final = 0x21
_MAXIMUM_QOS: Final = 0x24
_LENGTHS: Final = {
    0x01: 1, 0x02: 4, 0x11: 4, 0x13: 2, 0x17: 1, 0x18: 4, 0x19: 1, 0x21: 2, 0x22: 2, 0x23: 2, 0x24: 1, 0x25: 1,
    0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1,
}  # fmt: skip
_TEXTS: Final = {0x03: 1, 0x08: 1, 0x09: 1, 0x12: 1, 0x15: 1, 0x16: 1, 0x1A: 1, 0x1C: 1, 0x1F: 1, 0x26: 2}
_HAS_PASSWORD: Final = 0x40
_HAS_USER: Final = 0x80


class ProtocolError(ValueError):
    """What came is no MQTT, or none that a client is sent."""


class Login(NamedTuple):
    """What a CONNECT says."""

    client: str
    user: str | None
    password: str | None
    keep_alive_s: int
    session_expiry_s: int
    receive_maximum: int


class Connack(NamedTuple):
    """What the broker answered."""

    session_present: bool
    code: int
    keep_alive_s: int | None = None
    session_expiry_s: int | None = None
    maximum_qos: int = 2


class Filter(NamedTuple):
    """A subscription."""

    pattern: str
    qos: int
    retained: bool
    """Whether what is retained is wanted; MQTT 3.1.1 sends it anyway."""
    only_if_new: bool = False
    """It is not wanted again where the session is subscribed already."""


def reason(code: int) -> str:
    return _REASONS.get(code, f"code {code:#04x}")


def connect(version: Version, login: Login) -> bytes:
    """The session is kept: clean start is off."""
    flags = (_HAS_USER if login.user is not None else 0) | (_HAS_PASSWORD if login.password is not None else 0)
    head = b"\x00\x04MQTT" + struct.pack(">BBH", version, flags, login.keep_alive_s)
    if version is Version.V5:
        expiry = struct.pack(">BI", _SESSION_EXPIRY, login.session_expiry_s)
        head += _with_length(expiry + struct.pack(">BH", _RECEIVE_MAXIMUM, login.receive_maximum))
    texts = [login.client, *(text for text in (login.user, login.password) if text is not None)]
    return _packet(0x10, head + b"".join(map(_text, texts)))


def subscribe(version: Version, packet: int, filters: Sequence[Filter]) -> bytes:
    body = struct.pack(">H", packet) + (b"\x00" if version is Version.V5 else b"")
    for wanted in filters:
        # In MQTT 5 bits 4 and 5: what is retained comes never (2), with a new subscription (1), or each time (0).
        handling = (1 if wanted.only_if_new else 0) if wanted.retained else 2
        options = wanted.qos | (handling << 4 if version is Version.V5 else 0)
        body += _text(wanted.pattern) + bytes([options])
    return _packet(0x82, body)


def unsubscribe(version: Version, packet: int, patterns: Sequence[str]) -> bytes:
    body = struct.pack(">H", packet) + (b"\x00" if version is Version.V5 else b"")
    return _packet(0xA2, body + b"".join(map(_text, patterns)))


def disconnect() -> bytes:
    """A normal end, which MQTT 5 writes alike; the session stays."""
    return _packet(DISCONNECT, b"")


def read_connack(version: Version, body: bytes) -> Connack:
    """Raises `ProtocolError`."""
    if len(body) < 2:
        raise ProtocolError("a CONNACK is too short")
    if version is not Version.V5 or len(body) == 2:
        return Connack(bool(body[0] & 1), body[1])
    found = _properties(body[2:])
    return Connack(
        bool(body[0] & 1),
        body[1],
        found.get(_SERVER_KEEP_ALIVE),
        found.get(_SESSION_EXPIRY),
        found.get(_MAXIMUM_QOS, 2),
    )


def read_suback(version: Version, body: bytes) -> tuple[int, bytes]:
    """The packet identifier, and a code a filter. UNSUBACK has the same shape but for 3.1.1, which has no codes."""
    if len(body) < 2:
        raise ProtocolError("a SUBACK is too short")
    codes = body[2:]
    if version is Version.V5:
        length, at = read_length(codes, 0)
        codes = codes[at + length :]
    return body[0] << 8 | body[1], codes


def read_length(data: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer, and where it ends. Raises `IndexError` where it is not whole, `ProtocolError`."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 21:
            raise ProtocolError("a length has more than four bytes")


def _properties(data: bytes) -> dict[int, int]:
    """Those that are numbers. Raises `ProtocolError`."""
    found: dict[int, int] = {}
    try:
        length, at = read_length(data, 0)
        end = at + length
        while at < end:
            name = data[at]
            at += 1
            if name in _LENGTHS:
                found[name] = int.from_bytes(data[at : at + _LENGTHS[name]], "big")
                at += _LENGTHS[name]
            elif name in _TEXTS:
                for _ in range(_TEXTS[name]):
                    at += 2 + (data[at] << 8 | data[at + 1])
            elif name == 0x0B:
                _, at = read_length(data, at)
            else:
                raise ProtocolError(f"a property {name:#04x} that there is not")
    except IndexError:
        raise ProtocolError("properties are cut off") from None
    return found


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">H", len(raw)) + raw


def _with_length(body: bytes) -> bytes:
    length, digits = len(body), bytearray()
    while True:
        length, digit = length >> 7, length & 0x7F
        digits.append(digit | (0x80 if length else 0))
        if not length:
            return bytes(digits) + body


def _packet(head: int, body: bytes) -> bytes:
    return bytes([head]) + _with_length(body)
