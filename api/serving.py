"""The API's application as a handler of `runtime.http.server`. Left out: what it answers (`api.server`)."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from api.faces import PLATFORM
from api.http.problems import BAD_REQUEST, INTERNAL, REQUEST_TIMEOUT, Problem
from api.metrics import ApiMetrics
from runtime.http.answers import Answer
from runtime.http.server import Handler
from runtime.ids import uuid7

_NO_REQUEST: Final = {
    400: Problem(BAD_REQUEST, "the request is not well-formed HTTP, or its head is too long"),
    408: Problem(REQUEST_TIMEOUT, "the head of the request did not come in time"),
    500: Problem(INTERNAL),
}


class _Refusal(Answer):
    """What never became a request has no path, and so the last face's shape."""

    media_type = PLATFORM.shape.content_type.encode()


class ApiFace:
    """`app` between `start` and `stop`: what handles its requests, what makes them, and what is no request at all."""

    def __init__(self, app: web.Application, metrics: ApiMetrics) -> None:
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None)
        self._metrics = metrics

    async def start(self) -> None:
        await self._runner.setup()

    async def stop(self) -> None:
        await self._runner.cleanup()

    @property
    def handler(self) -> Handler:
        return self._server.request_handler

    @property
    def request_factory(self) -> Any:
        return self._server.request_factory

    @property
    def _server(self) -> web.Server:
        if self._runner.server is None:
            raise RuntimeError("the application was not started")
        return self._runner.server

    def refuse(self, status: int) -> Answer:
        """The answer to what never became a request of this face: 400, 408 or 500."""
        request_id = str(uuid7())
        self._metrics.requests.labels("malformed", str(status)).inc()
        return _Refusal(status, PLATFORM.body(_NO_REQUEST[status], request_id), request_id)


def beside(serves: Callable[[str], bool], first: Handler, second: Handler) -> Handler:
    """Two faces on one listener: `first` has the paths that it serves, `second` the others."""

    def handle(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        return first(request) if serves(request.rel_url.raw_path) else second(request)

    return handle
