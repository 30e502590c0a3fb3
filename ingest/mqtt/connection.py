"""One connection to a broker: PUBLISH in, PUBACK out, kept alive.

The hot path: a message costs a few slices, and acknowledgements that fall together are written together. Left out:
what messages mean (`intake`), and when there is a connection (`session`).
"""

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec

from ingest.mqtt import packets
from ingest.mqtt.packets import PUBLISH, Connack, Filter, Login, ProtocolError, Version, read_length
from ingest.mqtt.window import Mark, Window
from runtime.clock import Clock
from runtime.mqtt import Address

_log = logging.getLogger("sluice.bridge")

#: Topic, packet identifier and the lengths around them.
_HEAD_MAX: Final = 65_535 + 16
_EVIDENCE_MAX: Final = 4_096
_PING_EVERY: Final = 8_192
#: Before an end: one finds out whether the broker has more, the next whether it has heard everything, two to spare.
_SETTLE_PINGS: Final = 4
_SETTLE_S: Final = 0.25
_QOS: Final = 0x06
_QOS_1: Final = 0x02
_AGAIN: Final = 0x08
_RETAINED: Final = 0x01


class Message(msgspec.Struct, gc=False):
    """A PUBLISH as it came."""

    topic: bytes
    payload: bytes
    """As much of it as may be taken."""
    size: int
    """Of the whole payload."""
    packet: int
    """0 at QoS 0, where nothing is acknowledged."""
    number: int
    """Of its delivery (`Window`)."""
    again: bool
    retained: bool
    arrived_us: int
    """Microseconds since 1970."""
    is_counted: bool = False
    """Whether limits have counted it as a request."""


class Bounds(NamedTuple):
    """What a connection may hold."""

    messages: int
    bytes: int
    message_bytes: int
    timeout_s: float
    """For any answer of the broker."""


class ClosedError(Exception):
    """The connection has ended, or was refused: why."""


class Connection(asyncio.Protocol):
    """Opened by `open`, ended by `close` or `abort`; `closed` tells why it ended."""

    def __init__(
        self,
        version: Version,
        login: Login,
        bounds: Bounds,
        window: Window,
        clock: Clock,
        *,
        holds: Callable[[], bool],
        take: Callable[["Connection", Message], None],
        settled: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`holds` says whether the session is certainly ours; `take` is called for every message.

        `settled` is told of a number when nothing delivered before it is sent again.
        """
        self._version = version
        self._is_v5 = version is Version.V5
        self._login = login
        self._bounds = bounds
        self._clock = clock
        self._holds = holds
        self._take = take
        self._settled = settled
        self.window = window
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._skip = 0
        self._skipped: Message | None = None
        self._acks = bytearray()
        self._arrived_us = 0
        self._marks: deque[Mark] = deque()
        self._marked = window.next
        self._heard_s = 0.0
        self._answered: asyncio.Future[None] = self._loop.create_future()
        self._written_s = 0.0
        self._packet = 0
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._connack: asyncio.Future[Connack] = self._loop.create_future()
        self._keep_alive_s = login.keep_alive_s
        self._is_paused = False
        self._is_stopped = False
        self._has_left_some = False
        """Whether messages came that were not taken, since it was stopped: then nothing before them is certain."""
        self.reason = "the broker closed the connection"
        self.was_taken_over = False
        self.closed: asyncio.Future[str] = self._loop.create_future()

    async def open(self, address: Address) -> Connack:
        """Raises `ClosedError` when the broker cannot be reached, does not answer, or refuses us."""
        try:
            async with asyncio.timeout(self._bounds.timeout_s):
                await self._loop.create_connection(lambda: self, address.host, address.port, ssl=address.tls)
                return await self._connack
        except TimeoutError:
            self.abort(f"the broker did not answer within {self._bounds.timeout_s:g} s")
            raise ClosedError(self.reason) from None
        except (OSError, ssl.SSLError) as error:
            raise ClosedError(f"the broker cannot be reached: {error}") from error
        except BaseException:
            self.abort("it was given up")
            raise

    async def subscribe(self, filters: Sequence[Filter]) -> bytes:
        """The code of each: its QoS, or from `packets.FAILED` on why not. Raises `ClosedError`."""
        return await self._ask(lambda packet: packets.subscribe(self._version, packet, filters))

    async def unsubscribe(self, patterns: Sequence[str]) -> None:
        """Raises `ClosedError`."""
        await self._ask(lambda packet: packets.unsubscribe(self._version, packet, patterns))

    def acknowledge(self, message: Message, *, is_known_again: bool = False) -> None:
        """The message is where it is to be; does nothing for one of an earlier connection.

        `is_known_again`: its record tells how it was delivered.
        """
        self._acknowledge(self.window.done(message.number, is_known_again=is_known_again))
        if self._is_paused:
            self._throttle()

    def tick(self) -> None:
        """To be called about once a second."""
        if self._transport is None or self.closed.done():
            return
        now = self._loop.time()
        if self._marks and not self._is_paused and now - self._heard_s > self._bounds.timeout_s:
            self.abort(f"the broker did not answer a ping within {self._bounds.timeout_s:g} s")
        elif (not self._marks and not self.window.is_settled) or now - self._written_s > self._keep_alive_s / 2:
            self._ping()

    def stop(self) -> None:
        """Take nothing more."""
        self._is_stopped = True
        self._throttle()

    async def close(self, *, within_s: float) -> None:
        """End after what was taken is done, or as much of it as is done in this time; the broker keeps the rest."""
        self.stop()
        deadline = self._loop.time() + within_s
        while self.window.waiting and not self.closed.done() and self._loop.time() < deadline:
            await asyncio.wait({self.closed}, timeout=0.01)
        await self._settle()
        if self._transport is not None and not self.closed.done():
            self._flush()
            self._transport.write(packets.disconnect())
            self.reason = "it was ended by us"
            self._transport.close()
            await asyncio.wait({self.closed}, timeout=self._bounds.timeout_s)
        self.abort("it was ended by us")

    async def _settle(self) -> None:
        """Leave nothing behind that is sent again, where the broker answers at once: then it has nothing waiting."""
        for _ in range(_SETTLE_PINGS):
            if self.window.is_settled or self.closed.done() or self._transport is None:
                return
            self._transport.resume_reading()
            self._ping()
            self._answered = self._loop.create_future()
            either: set[asyncio.Future[Any]] = {self._answered, self.closed}
            await asyncio.wait(either, timeout=_SETTLE_S, return_when=asyncio.FIRST_COMPLETED)

    def abort(self, reason: str) -> None:
        """Cut it, now; the broker keeps what is not acknowledged."""
        if self.closed.done():
            return
        self.reason = reason
        if self._transport is not None:
            self._transport.abort()
        self._end()

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = opened = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it
        opened.write(packets.connect(self._version, self._login))
        self._written_s = self._loop.time()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None and not self.closed.done():
            self.reason = f"the connection broke: {error}"
        self._end()

    def data_received(self, data: bytes) -> None:
        if self.closed.done():
            return
        self._arrived_us = self._clock.now_us()
        self._heard_s = self._loop.time()
        try:
            self._read(self._rest + data if self._rest else data)
        except (ProtocolError, IndexError) as error:
            self.abort(f"the broker sent what is no MQTT: {error}")
            return
        except Exception as error:
            _log.exception("a message cannot be taken: the broker sends it again")
            self.abort(f"a message cannot be taken: {error}")
            return
        if self.window.next - self._marked >= _PING_EVERY and not self._marks:
            self._ping()
        self._throttle()

    # ------------------------------------------------------------ reading

    def _read(self, data: bytes) -> None:
        at, end = 0, len(data)
        if self._skip:
            at = self._pass_over(data)
        while end - at >= 2 and not self.closed.done():
            head, length, start = data[at], data[at + 1], at + 2
            if length >= 0x80:
                if end - at < 5 and data[end - 1] >= 0x80:
                    break
                length, start = read_length(data, at + 1)
            stop = start + length
            if stop > end:
                if head & 0xF0 == PUBLISH and self._is_too_large(length, end - start):
                    self._begin_passing_over(head, data, start, stop)
                    at = end
                break
            if head & 0xF0 == PUBLISH:
                if self._is_stopped:
                    self._has_left_some = True
                else:
                    self._take(self, self._message(head, data, start, stop))
            else:
                self._control(head, data[start:stop])
            at = stop
        self._rest = data[at:]

    def _message(self, head: int, data: bytes, start: int, stop: int) -> Message:
        at = start + 2 + (data[start] << 8 | data[start + 1])
        topic = data[start + 2 : at]
        packet = 0
        if head & _QOS:
            packet = data[at] << 8 | data[at + 1]
            at += 2
            if head & _QOS != _QOS_1 or not packet:
                raise ProtocolError("a message with another QoS than was asked for")
        if self._is_v5:
            length = data[at]
            at += 1
            if length:
                if length >= 0x80:
                    length, at = read_length(data, at - 1)
                at += length
        size = stop - at
        if size < 0 or not self._connack.done():
            raise ProtocolError("a message that is cut off, or comes too early")
        payload = data[at:stop] if size <= self._bounds.message_bytes else data[at : min(stop, at + _EVIDENCE_MAX)]
        number = self.window.take(packet, len(payload), self._arrived_us)
        again, retained = bool(head & _AGAIN), bool(head & _RETAINED)
        return Message(topic, payload, size, packet, number, again, retained, self._arrived_us)

    def _is_too_large(self, length: int, there: int) -> bool:
        """Whether a message is not to be kept until it is whole, and enough of it is there to tell whose it is."""
        return length > self._bounds.message_bytes + _HEAD_MAX and there >= _HEAD_MAX + _EVIDENCE_MAX

    def _begin_passing_over(self, head: int, data: bytes, start: int, stop: int) -> None:
        self._skipped = self._message(head, data, start, stop)
        self._skip = stop - len(data)

    def _pass_over(self, data: bytes) -> int:
        """Where what is too large ends. Once all of it has come it is taken, to be refused."""
        passed = min(self._skip, len(data))
        self._skip -= passed
        if not self._skip and self._skipped is not None and not self._is_stopped:
            message, self._skipped = self._skipped, None
            self._take(self, message)
        return passed

    def _control(self, head: int, body: bytes) -> None:
        kind = head & 0xF0
        if not self._connack.done():
            if kind != packets.CONNACK:
                raise ProtocolError("something before the CONNACK")
            self._let_in(packets.read_connack(self._version, body))
        elif kind == packets.PINGRESP:
            self._hear_pong()
        elif kind in (packets.SUBACK, packets.UNSUBACK):
            packet, codes = packets.read_suback(self._version, body)
            if (answer := self._answers.get(packet)) is not None and not answer.done():
                answer.set_result(codes)
        elif kind == packets.DISCONNECT:
            code = body[0] if body else 0
            self.was_taken_over = code == packets.SESSION_TAKEN_OVER
            self.abort(f"the broker ended the connection: {packets.reason(code)}")
        else:
            raise ProtocolError(f"a packet of kind {kind >> 4}")

    def _hear_pong(self) -> None:
        if not self._answered.done():
            self._answered.set_result(None)
        if not self._marks or self._has_left_some:
            return
        is_idle = self.window.confirm(self._marks.popleft())
        # Whoever has the session next is told by the database, which has to be there for it.
        if is_idle and self._holds() and (released := self.window.release()):
            self._acknowledge(released)
            self._ping()
        if self.window.settled:
            self._settled(self.window.settled)

    def _let_in(self, connack: Connack) -> None:
        if connack.code:
            self.abort(f"the broker refuses us: {packets.reason(connack.code)}")
        elif connack.maximum_qos < 1:
            self.abort("the broker knows no QoS 1")
        elif not self._holds():
            # Somebody else may have the session by now, and has it back at once.
            self.abort("the lease ended while the connection was made")
        else:
            if connack.keep_alive_s is not None:
                self._keep_alive_s = connack.keep_alive_s
            self.window.connected()
            self._connack.set_result(connack)

    # ------------------------------------------------------------ writing

    async def _ask(self, packet_of: Callable[[int], bytes]) -> bytes:
        self._packet = self._packet % 65_535 + 1
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._answers[self._packet] = answer
        try:
            if self._transport is None or self.closed.done():
                raise ClosedError(self.reason)
            self._transport.write(packet_of(self._packet))
            either: set[asyncio.Future[Any]] = {answer, self.closed}
            await asyncio.wait(either, timeout=self._bounds.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self.closed.done():
                raise ClosedError(self.reason)
            if not answer.done():
                self.abort(f"the broker did not answer within {self._bounds.timeout_s:g} s")
                raise ClosedError(self.reason)
            return answer.result()
        finally:
            del self._answers[self._packet]

    def _acknowledge(self, acknowledged: list[int]) -> None:
        """What falls together is written together."""
        if acknowledged and not self._acks:
            self._loop.call_soon(self._flush)
        for packet in acknowledged:
            self._acks += packets.PUBACK.pack(*packets.PUBACK_HEAD, packet)

    def _flush(self) -> None:
        if self._acks and self._transport is not None and not self.closed.done():
            self._transport.write(bytes(self._acks))
            self._written_s = self._loop.time()
        self._acks.clear()

    def _ping(self) -> None:
        assert self._transport is not None
        self._flush()
        mark = self.window.mark()
        self._marked = mark.next
        self._marks.append(mark)
        self._transport.write(packets.PINGREQ)
        self._written_s = self._loop.time()

    def _throttle(self) -> None:
        """Read no more than may be open."""
        bounds, window = self._bounds, self.window
        is_full = len(window) >= bounds.messages or window.bytes >= bounds.bytes or self._is_stopped
        if is_full == self._is_paused or self._transport is None or self.closed.done():
            return
        if is_full:
            self._transport.pause_reading()
        elif len(window) > bounds.messages // 2 or window.bytes > bounds.bytes // 2:
            return  # not for every single message
        else:
            self._transport.resume_reading()
            self._heard_s = self._loop.time()
        self._is_paused = is_full

    def _end(self) -> None:
        if not self.closed.done():
            self.closed.set_result(self.reason)
        self._acks.clear()
        if not self._connack.done():
            self._connack.set_exception(ClosedError(self.reason))
            self._connack.exception()
