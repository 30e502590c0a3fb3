"""A face on a socket: aiohttp's low-level server with bounds on what a client may hold, and an end in order.

Left out: what is answered (the faces), and the listening socket itself (`runtime.sockets`).
"""

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from aiohttp import StreamReader, hdrs, web
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from runtime.http.answers import DATE, Answer
from runtime.http.handshakes import Handshakes
from runtime.http.places import Addresses, Network
from runtime.http.refusals import Refused, uncounted
from runtime.settings import setting
from runtime.tls import ServerTls

_log = logging.getLogger("sluice.http")

_HEAD_LINE_BYTES_MAX: Final = 8_190
_HEADERS_MAX: Final = 64
_LINGER_S: Final = 2.0
_DATE_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.02
_DRAIN_SHARE: Final = 0.8
#: How long a connection without a request stays open when the server stops: whoever is about to send is answered.
_LAST_CHANCE_S: Final = 1.0

#: A request line as far as it came: its method, the path of its target, and its end.
_REQUEST_LINE: Final = re.compile(
    rb"(?:\r\n)*([!#-'*+.^_`|~0-9A-Za-z-]+) (?:[a-z]+://[^/?# ]*)?(/[!\"$->@-~]*)(?:[?#][!-~]*)?( HTTP/1\.[01]\r?\n)?"
)
_TOO_MANY_HEADERS: Final = "Too many headers received"

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
#: A face's words for what never became a request of it, by status and, where that can be told, path: 400 malformed,
#: 408 too slow, 414 and 431 too long, 500 failed, 501 a method that HTTP does not have.
Refuse = Callable[[int, str | None], Answer]


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """What the connections of one listener may hold, and for how long."""

    http_connections_max: int = setting(
        10_000, unit="connections", least=1, why="Per process; further ones are closed at once."
    )
    http_connections_per_address_max: int = setting(
        2_000, unit="connections", least=1,
        why="Per process; an IPv6 /64 is one address. A site may stand behind one; none fills a process alone.",
    )  # fmt: skip
    http_idle_timeout_s: float = setting(
        75.0, unit="s", least=0.1, why="Of a connection without a request: longer than common proxies keep one."
    )
    http_head_timeout_s: float = setting(
        10.0, unit="s", least=0.1, why="From the first byte of a request's head to its last; heads fit two packets."
    )
    http_unread_timeout_s: float = setting(
        30.0, unit="s", least=0.1, why="How long a client may leave answers unread, once they fill its connection."
    )


class _UnreadError(Exception):
    """A request that could not be read: the status that it is refused with, and its path where that can be told."""

    def __init__(self, status: int, path: str | None) -> None:
        super().__init__(status)
        self.status = status
        self.path = path


class _RequestLine(NamedTuple):
    """What can be told of the first line of a head, as far as it came."""

    method: str = ""
    path: str | None = None
    """None where it may go on, or is none."""
    is_whole: bool = False
    is_long: bool = False

    @classmethod
    def of(cls, head: bytes) -> "_RequestLine":
        line = _REQUEST_LINE.match(head)
        if line is None:
            return cls()
        ended, is_long = line.end(2), line.end() > _HEAD_LINE_BYTES_MAX
        is_path = is_long or head[ended : ended + 1] in (b" ", b"?", b"#")
        return cls(line[1].decode(), line[2].decode() if is_path else None, line[3] is not None, is_long)


def _unread(error: BaseException, head: bytes) -> _UnreadError:
    """Of what the parser found wrong, and the head that it found it in, from its first byte on."""
    line = _RequestLine.of(head)
    if isinstance(error, LineTooLong):
        return _UnreadError(414 if line.is_long else 431, line.path)
    if isinstance(error, HttpProcessingError) and error.message == _TOO_MANY_HEADERS:
        return _UnreadError(431, line.path)
    is_strange = line.is_whole and isinstance(error, BadHttpMethod) and line.method not in hdrs.METH_ALL
    return _UnreadError(501 if is_strange else 400, line.path)


class _Connection(RequestHandler):
    """One client connection: answers malformed HTTP in the face's own words."""

    __slots__ = ("_head", "_head_timer", "_newest", "_owner", "_unread_timer", "malformed", "place")

    def __init__(self, owner: "_Connections", **options: Any) -> None:
        super().__init__(owner, **options)
        self._owner = owner
        self.place: str | None = None
        """The address that it is counted under, while it is."""
        self._newest: StreamReader = EMPTY_PAYLOAD
        self._head = b""
        """The beginning of a head that came in pieces, while the rest of it is waited for."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self.malformed: StreamReader | None = None
        """The body that ends here because its rest could not be read."""

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for the first byte of a request."""
        return self._waiter is not None and not self._waiter.done() and self._head_timer is None

    @property
    def is_closing(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        in_body = not self._newest.is_eof()
        super().data_received(data)
        if self._messages:
            message, body = self._messages[-1]
            if type(message) is not _ErrInfo:
                self._newest = body
                return
            if not self._newest.is_eof():
                # aiohttp answers what is malformed in its turn, but does not tell who waits for the rest of a body.
                self.malformed = self._newest
                self._newest.feed_eof()
            unread = _unread(message.exc, b"" if in_body else self._head + data)
            self._messages[-1] = (_ErrInfo(unread.status, unread, ""), body)
        elif not in_body:
            self._wait_for_head(data)

    def _wait_for_head(self, data: bytes) -> None:
        if len(self._head) <= _HEAD_LINE_BYTES_MAX:
            self._head += data
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(self._owner.head_timeout_s, self._give_up_head)

    def _give_up_head(self) -> None:
        if self._waiter is not None and not self._waiter.done() and self.transport is not None:
            self._owner.refused("head")
            self.transport.write(self._owner.refuse(408, _RequestLine.of(self._head).path).encode_last())
            self.force_close()

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
            self._head = b""
        if self._owner.is_draining:
            resp.force_close()
        return super().finish_response(request, resp, start_time)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self._loop.call_later(self._owner.unread_timeout_s, self._give_up_unread)

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        super().resume_writing()

    def _give_up_unread(self) -> None:
        if self.transport is not None:
            self._owner.refused("unread")
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # What the parser says is not passed on: it may quote the request, and with it a token.
        if isinstance(exc, _UnreadError):
            answer = self._owner.refuse(exc.status, exc.path)
        elif status >= 500:
            _log.error("a request failed", exc_info=exc)
            answer = self._owner.refuse(500, request.rel_url.raw_path)
        else:
            answer = self._owner.refuse(400, None)
        answer.force_close()
        return answer


class _Connections(web.Server):
    """The open connections of one listener, bounded in all and by address."""

    def __init__(
        self,
        handler: Handler,
        settings: HttpSettings,
        refuse: Refuse,
        request_factory: Any,
        exempt: Iterable[Network],
        refused: Refused,
    ) -> None:
        super().__init__(
            handler,
            request_factory=request_factory,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=settings.http_idle_timeout_s,
            lingering_time=_LINGER_S,
            max_line_size=_HEAD_LINE_BYTES_MAX,
            max_field_size=_HEAD_LINE_BYTES_MAX,
            max_headers=_HEADERS_MAX,
        )
        self._connections_max = settings.http_connections_max
        self._addresses = Addresses(settings.http_connections_per_address_max, exempt)
        self.head_timeout_s = settings.http_head_timeout_s
        self.unread_timeout_s = settings.http_unread_timeout_s
        self.refuse = refuse
        self.refused = refused
        self.is_draining = False
        """Whether every answer is the last one of its connection."""

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: _Connection, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if handler.place is None:
            handler.place = self.admit(transport.get_extra_info("peername"))
        super().connection_made(handler, transport)
        if handler.place is None:
            transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self.dismiss(handler)

    def admit(self, peer: object, *, coming: int = 0) -> str | None:
        if len(self._connections) + coming >= self._connections_max:
            self.refused("connections")
            return None
        place = self._addresses.enter(peer)
        if place is None:
            self.refused("address")
        return place

    def welcome(self, place: str) -> asyncio.Protocol:
        connection = _Connection(self, loop=self._loop, **self._kwargs)
        connection.place = place
        return connection

    def dismiss(self, protocol: asyncio.BaseProtocol) -> None:
        if isinstance(protocol, _Connection) and protocol.place is not None:
            self._addresses.leave(protocol.place)
            protocol.place = None

    @property
    def count(self) -> int:
        return len(self._connections)

    def open(self) -> list[_Connection]:
        return [one for one in self.connections if isinstance(one, _Connection) and not one.is_closing]


class HttpServer:
    """Serves `handler` on `listener` between `start` and `stop`.

    `request_factory` makes the requests that the handler takes, where they are not aiohttp's basic ones. With `tls`
    it serves HTTPS, and watches for a renewed certificate. Connections from the networks of `exempt` (proxies, which
    bring those of many) are not bounded by address. `refused` is told of each connection that is turned away.
    """

    def __init__(
        self,
        listener: socket.socket,
        handler: Handler,
        settings: HttpSettings,
        refuse: Refuse,
        request_factory: Any = None,
        *,
        tls: ServerTls | None = None,
        exempt: Iterable[Network] = (),
        refused: Refused = uncounted,
    ) -> None:
        self._listener = listener
        self._parts = (handler, settings, refuse, request_factory, tuple(exempt), refused)
        self._tls = tls
        self._connections: _Connections | None = None
        self._door: asyncio.Server | Handshakes | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._connections = _Connections(*self._parts)
        self._tasks.append(asyncio.create_task(_keep_date(), name="date header"))
        if self._tls is None:
            loop = asyncio.get_running_loop()
            self._door = await loop.create_server(self._connections, sock=self._listener, backlog=4096)
        else:
            self._tasks.append(asyncio.create_task(self._tls.watch(), name="certificate"))
            self._door = Handshakes(self._listener, self._connections, self._tls)
            self._door.start()

    async def stop(self, timeout_s: float) -> None:
        """Accept nothing more, let requests in hand arrive and be answered for up to `timeout_s`, close the rest."""
        if self._door is None or self._connections is None:
            return
        self._door.close()
        self._connections.is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * _DRAIN_SHARE):
                await self._drain(self._connections)
        await self._connections.shutdown(timeout_s * (1 - _DRAIN_SHARE))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _drain(self, connections: _Connections) -> None:
        """Until no request is in hand. What was accepted just now becomes a connection a moment later."""
        loop = asyncio.get_running_loop()
        closing_idle = loop.time() + _LAST_CHANCE_S
        while True:
            await asyncio.sleep(_DRAIN_POLL_S)
            waiting = self._handshakes(over=loop.time() >= closing_idle)
            for connection in connections.open():
                if connection.is_waiting and loop.time() >= closing_idle:
                    connection.force_close()
                else:
                    waiting += 1
            if not waiting:
                return

    def _handshakes(self, *, over: bool) -> int:
        """How many handshakes are under way, and may still bring a request; none once their time is over."""
        if not isinstance(self._door, Handshakes):
            return 0
        if over:
            self._door.give_up()
            return 0
        return self._door.under_way

    def count(self) -> int:
        """Open connections."""
        return 0 if self._connections is None else self._connections.count


async def _keep_date() -> None:
    while True:
        DATE.renew()
        await asyncio.sleep(_DATE_S)
