"""A plant's connection: MQTT 5 at QoS 1, both ways, with a last will.

On the bare protocol, because thousands share a process: `runtime.mqtt`'s client takes a thread to connect, and two
more wake-ups a second. Left out: when there is a connection (`bench.simulator.device`), and what is said on it.
"""

import asyncio
import ssl
import struct
from collections.abc import Callable
from typing import Final, NamedTuple, cast

from bench.publish import PACKETS, message
from ingest.mqtt import packets
from ingest.mqtt.packets import ProtocolError, Version, read_length
from runtime.errors import UnavailableError
from runtime.mqtt import Endpoint

KEEP_ALIVE_S: Final = 60
ANSWER_S: Final = 30.0
PUBLISH_RETAINED: Final = 0x33
_CLEAN, _WILL_RETAINED, _USER, _PASSWORD = 0x02, 0x2C, 0x80, 0x40
_SESSION_EXPIRY: Final = 0x11
_NO_PROPERTIES: Final = b"\x00"
_NOBODY_SUBSCRIBED: Final = 0x10


class Login(NamedTuple):
    """What a plant says when it connects."""

    client: str
    will_topic: str
    will: bytes
    """Retained."""
    session_s: int
    """For so long the broker keeps what it has for a plant that is away."""


class Connection(asyncio.Protocol):
    """Made by `opened`, ended by `close`; `closed` tells why it ended."""

    def __init__(self, heard: Callable[[bytes], None]) -> None:
        """`heard` is given the payload of each message."""
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[str] = loop.create_future()
        self._loop = loop
        self._heard = heard
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._packet = 0
        self._answers: dict[int, asyncio.Future[int]] = {}
        """The code of what is answered, by packet; 0 is CONNACK's."""
        self._pinging: asyncio.TimerHandle | None = None
        self._is_waiting = False

    @classmethod
    async def opened(cls, to: Endpoint, login: Login, heard: Callable[[bytes], None]) -> "Connection":
        """Let in by the broker. Raises `UnavailableError`."""
        made = cls(heard)
        try:
            async with asyncio.timeout(ANSWER_S):
                await made._loop.create_connection(lambda: made, to.address.host, to.address.port, ssl=to.address.tls)
                await made._ask(0, _connect(to, login))
        except TimeoutError:
            made.abort("the broker did not answer")
            raise UnavailableError("the broker did not answer") from None
        except (OSError, ssl.SSLError) as error:
            raise UnavailableError(f"the broker cannot be reached: {type(error).__name__}") from error
        except BaseException:
            made.abort("it was given up")
            raise
        made._ping()
        return made

    async def subscribe(self, topic: str) -> None:
        """Raises `UnavailableError`, also where it is refused."""
        packet = self._next()
        await self._ask(packet, packets.subscribe(Version.V5, packet, [packets.Filter(topic, 1, False)]))

    async def publish(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        """Until it is acknowledged. Raises `UnavailableError`, also where it is refused."""
        packet = self._next()
        head, rest = message(topic, _NO_PROPERTIES + payload)
        if retained:
            head = bytes([PUBLISH_RETAINED]) + head[1:]
        await self._ask(packet, head + struct.pack(">H", packet) + rest)

    async def close(self) -> None:
        """In order: the will is not told."""
        if self._transport is not None and not self.closed.done():
            self._transport.write(packets.disconnect())
            self._transport.close()
            await asyncio.wait([self.closed], timeout=ANSWER_S)
        self.abort("it was ended")

    def abort(self, reason: str) -> None:
        """Now, as if it was cut."""
        self._end(reason)
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection broke" if error else "the broker closed the connection")

    def data_received(self, data: bytes) -> None:
        try:
            self._read(self._rest + data)
        except (ProtocolError, IndexError, struct.error):
            self.abort("the broker sent what is no MQTT")

    # ------------------------------------------------------------ parts

    def _read(self, data: bytes) -> None:
        at = 0
        while len(data) - at >= 2 and not self.closed.done():
            if len(data) - at < 5 and data[-1] >= 0x80:
                break
            length, start = read_length(data, at + 1)
            if start + length > len(data):
                break
            self._take(data[at], data[start : start + length])
            at = start + length
        self._rest = data[at:]

    def _take(self, head: int, body: bytes) -> None:
        kind = head & 0xF0
        if kind == packets.PUBLISH:
            self._take_message(head, body)
        elif kind == packets.CONNACK:
            self._answer(0, packets.read_connack(Version.V5, body).code)
        elif kind == packets.PUBACK_HEAD[0]:
            code = body[2] if len(body) > 2 else 0
            self._answer(body[0] << 8 | body[1], 0 if code == _NOBODY_SUBSCRIBED else code)
        elif kind == packets.SUBACK:
            packet, codes = packets.read_suback(Version.V5, body)
            self._answer(packet, next((code for code in codes if code >= packets.FAILED), 0))
        elif kind == packets.PINGRESP:
            self._is_waiting = False
        elif kind == packets.DISCONNECT:
            self.abort(f"the broker ended the connection: {packets.reason(body[0] if body else 0)}")

    def _take_message(self, head: int, body: bytes) -> None:
        assert self._transport is not None
        at = 2 + (body[0] << 8 | body[1])
        packet = 0
        if head & 0x06:
            packet = body[at] << 8 | body[at + 1]
            at += 2
        length, at = read_length(body, at)
        self._heard(body[at + length :])
        if packet:
            self._transport.write(packets.PUBACK.pack(*packets.PUBACK_HEAD, packet))

    def _answer(self, packet: int, code: int) -> None:
        answer = self._answers.pop(packet, None)
        if answer is not None and not answer.done():
            answer.set_result(code)

    def _next(self) -> int:
        self._packet = self._packet % PACKETS + 1
        return self._packet

    async def _ask(self, packet: int, raw: bytes) -> None:
        if self._transport is None or self.closed.done():
            raise UnavailableError(self.closed.result() if self.closed.done() else "there is no connection")
        self._answers[packet] = answer = self._loop.create_future()
        self._transport.write(raw)
        timer = self._loop.call_later(ANSWER_S, self.abort, "the broker did not answer")
        try:
            code = await answer
        finally:
            timer.cancel()
            self._answers.pop(packet, None)
        if code:
            raise UnavailableError(f"the broker refuses: {packets.reason(code)}")

    def _ping(self) -> None:
        if self.closed.done() or self._transport is None:
            return
        if self._is_waiting:
            self.abort("the broker did not answer")
            return
        if self._pinging is not None:  # not at once, but from the first time on
            self._is_waiting = True
            self._transport.write(packets.PINGREQ)
        self._pinging = self._loop.call_later(KEEP_ALIVE_S / 2, self._ping)

    def _end(self, reason: str) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
        if not self.closed.done():
            self.closed.set_result(reason)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(UnavailableError(reason))
                answer.exception()


def _connect(to: Endpoint, login: Login) -> bytes:
    flags = _WILL_RETAINED | (0 if login.session_s else _CLEAN)
    flags |= (_USER if to.user is not None else 0) | (_PASSWORD if to.password is not None else 0)
    expiry = struct.pack(">BBI", 5, _SESSION_EXPIRY, login.session_s)
    head = b"\x00\x04MQTT" + struct.pack(">BBH", Version.V5, flags, KEEP_ALIVE_S) + expiry
    parts = [_sized(login.client.encode()), _NO_PROPERTIES, _sized(login.will_topic.encode()), _sized(login.will)]
    parts += [_sized(text.encode()) for text in (to.user, to.password) if text is not None]
    body = head + b"".join(parts)
    length, digits = len(body), bytearray()
    while True:
        length, digit = length >> 7, length & 0x7F
        digits.append(digit | (0x80 if length else 0))
        if not length:
            return b"\x10" + bytes(digits) + body


def _sized(raw: bytes) -> bytes:
    return struct.pack(">H", len(raw)) + raw
