"""The API on a socket: aiohttp's application server, with bounded connections and our own words for bad HTTP.

Left out: what is answered (`api.server`).
"""

import asyncio
import logging
import socket
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from api.errors import ApiError, error_response

_log = logging.getLogger("sluice.api")


class _Connection(RequestHandler):
    """One client connection. What the parser says is not passed on: it quotes the request, and a token with it."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status < 500:
            error = ApiError(400, "bad_request", "the request is not well-formed HTTP")
        else:
            _log.error("a request failed", exc_info=exc)
            error = ApiError(500, "internal_error", "something broke here; it has been logged")
        response = error_response(error, "-")
        response.force_close()
        return response


class _Full(asyncio.Protocol):
    """One connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            transport.abort()


class ApiServer:
    """Serves `app` on `listener` between `start` and `stop`; `options` are aiohttp's of a connection."""

    def __init__(
        self, app: web.Application, listener: socket.socket, *, connections_max: int, timeout_s: float, **options: Any
    ) -> None:
        self._listener = listener
        self._connections_max = connections_max
        self._runner = web.AppRunner(
            app, handle_signals=False, shutdown_timeout=timeout_s, **{"access_log": None} | options
        )
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connect, sock=self._listener)

    def _connect(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        if server is None or len(server.connections) >= self._connections_max:
            return _Full()
        return _Connection(server, loop=asyncio.get_running_loop(), **server._kwargs)

    async def stop(self) -> None:
        """Accept nothing more, let requests in flight answer within the time, close the rest."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
