"""The ingest face on a socket: aiohttp's low-level server, without a router, with bounds on what a client may hold.

Left out: what is answered (`ingest.http.service`).
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from ingest.http.answers import Refusal
from ingest.settings import IngestSettings
from schemas.errors import RequestCode

_log = logging.getLogger("sluice.ingest")

_HEAD_LINE_BYTES_MAX: Final = 8_190
_HEADERS_MAX: Final = 64
_LINGER_S: Final = 2.0

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _Connection(RequestHandler):
    """One client connection: answers malformed HTTP in the face's own words."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._request_in_progress and self._messages and isinstance(self._messages[-1][0], _ErrInfo):
            # What is malformed is the rest of a body, or stands behind it: whoever waits for it is not told.
            request = self._current_request
            if request is not None and not request.content.is_eof():
                request.content.set_exception(web.RequestPayloadError("malformed"))

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
        """Accept nothing more, let requests in flight answer for up to `timeout_s`, close the rest."""
        if self._server is None or self._connections is None:
            return
        self._server.close()
        self._connections.pre_shutdown()
        await self._connections.shutdown(timeout_s)

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
