"""The ingest face on a socket: aiohttp's low-level server, without a router, with bounds on what a client may hold.

Left out: what is answered (`ingest.http.service`).
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

from aiohttp import StreamReader, web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from ingest.http.answers import Refusal
from ingest.settings import IngestSettings
from schemas.errors import RequestCode

_log = logging.getLogger("sluice.ingest")

_HEAD_LINE_BYTES_MAX: Final = 8_190
_HEADERS_MAX: Final = 64
_LINGER_S: Final = 2.0
_DRAIN_POLL_S: Final = 0.02
_SHARE_OF_REQUESTS: Final = 0.8

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _Connection(RequestHandler):
    """One client connection: answers malformed HTTP in the face's own words."""

    __slots__ = ("_newest", "malformed")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._newest: StreamReader = EMPTY_PAYLOAD
        self.malformed: StreamReader | None = None
        """The body that ends here because its rest could not be read."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages:
            message, body = self._messages[-1]
            if type(message) is not _ErrInfo:
                self._newest = body
            elif not self._newest.is_eof():
                # aiohttp answers what is malformed in its turn, but does not tell who waits for the rest of a body.
                self.malformed = self._newest
                self._newest.feed_eof()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            _log.error("a request failed", exc_info=exc)
            return Refusal(RequestCode.INTERNAL, "this is our fault, not yours", close=True).answer("-")
        # What the parser says may quote the request, and with it a token.
        return Refusal(RequestCode.BAD_REQUEST, "the request is not well-formed HTTP", close=True).answer("-")


class _Connections(web.Server):
    """The open connections of one listener, bounded."""

    def __init__(self, handler: Handler, settings: IngestSettings, **options: Any) -> None:
        super().__init__(handler, **options)
        self._connections_max = settings.http_connections_max

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) > self._connections_max:
            transport.abort()

    @property
    def count(self) -> int:
        return len(self._connections)

    def close_idle(self) -> bool:
        """Close the connections without a request in hand; whether there are others."""
        busy = False
        for connection in self.connections:
            # aiohttp's own close() would stop reading at once, and with it a body that is still on its way.
            if connection._request_in_progress or connection._messages:
                busy = True
            else:
                connection.close()
        return busy


class HttpServer:
    """Serves `handler` on `listener` between `start` and `stop`."""

    def __init__(self, listener: socket.socket, handler: Handler, settings: IngestSettings) -> None:
        self._listener = listener
        self._handler = handler
        self._settings = settings
        self._connections: _Connections | None = None
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._connections = _Connections(self._handler, self._settings, **connection_options(self._settings))
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connections, sock=self._listener, backlog=4096)

    async def stop(self, timeout_s: float) -> None:
        """Accept nothing more, let requests in hand arrive and be answered for up to `timeout_s`, close the rest."""
        if self._server is None or self._connections is None:
            return
        self._server.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * _SHARE_OF_REQUESTS):
                while self._connections.close_idle():  # noqa: ASYNC110 - aiohttp tells nobody when a request ends
                    await asyncio.sleep(_DRAIN_POLL_S)
        await self._connections.shutdown(timeout_s * (1 - _SHARE_OF_REQUESTS))

    def count(self) -> int:
        """Open connections."""
        return 0 if self._connections is None else self._connections.count


def connection_options(settings: IngestSettings) -> dict[str, Any]:
    """How aiohttp treats a connection that may carry ingest requests: bodies stay packed, heads are bounded."""
    return {
        "access_log": None,
        "auto_decompress": False,
        "keepalive_timeout": settings.http_idle_timeout_s,
        "lingering_time": _LINGER_S,
        "max_line_size": _HEAD_LINE_BYTES_MAX,
        "max_field_size": _HEAD_LINE_BYTES_MAX,
        "max_headers": _HEADERS_MAX,
    }
