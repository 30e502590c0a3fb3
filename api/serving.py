"""The API's application as a handler of `runtime.http.server`. Left out: what it answers (`api.server`)."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from api.faces import FACES
from api.http.faces import PROBLEM_JSON, face_of
from api.http.problems import (
    BAD_REQUEST,
    EXPECTATION_FAILED,
    HEAD_TOO_LARGE,
    INTERNAL,
    NOT_IMPLEMENTED,
    REQUEST_TIMEOUT,
    URI_TOO_LONG,
    Problem,
)
from api.metrics import ApiMetrics
from runtime.http.answers import Answer
from runtime.http.server import Handler, Refuse
from runtime.ids import uuid7

_NO_REQUEST: Final = {
    400: Problem(BAD_REQUEST, "the request is not well-formed HTTP"),
    408: Problem(REQUEST_TIMEOUT, "the head of the request did not come in time"),
    414: Problem(URI_TOO_LONG),
    417: Problem(EXPECTATION_FAILED),
    431: Problem(HEAD_TOO_LARGE),
    500: Problem(INTERNAL),
    501: Problem(NOT_IMPLEMENTED),
}


class _ProblemAnswer(Answer):
    """In the shape of RFC 9457."""

    media_type = PROBLEM_JSON.encode()


class ApiFace:
    """`app` between `start` and `stop`: what handles its requests, what makes them, and what is no request at all."""

    def __init__(self, app: web.Application, metrics: ApiMetrics) -> None:
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None)
        self._metrics = metrics

    async def start(self) -> None:
        await self._runner.setup()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def handler(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._server.request_handler(request)
        except web.HTTPException as error:
            # aiohttp judges expectations before any middleware, and in words of its own.
            return self.refuse(error.status, request.path)

    @property
    def request_factory(self) -> Any:
        return self._server.request_factory

    @property
    def _server(self) -> web.Server:
        if self._runner.server is None:
            raise RuntimeError("the application was not started")
        return self._runner.server

    def refuse(self, status: int, path: str | None) -> Answer:
        """The answer to what never became a request (`runtime.http.server`): without a path, the last face's."""
        request_id = str(uuid7())
        self._metrics.requests.labels("malformed", str(status)).inc()
        face = face_of(FACES, path or "")
        kind = _ProblemAnswer if face.shape.content_type == PROBLEM_JSON else Answer
        return kind(status, face.body(_NO_REQUEST[status], request_id), request_id)


def beside(serves: Callable[[str], bool], first: Handler, second: Handler) -> Handler:
    """Two faces on one listener: `first` has the paths that it serves, `second` the others."""

    def handle(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        return first(request) if serves(request.rel_url.raw_path) else second(request)

    return handle


def refusing_beside(serves: Callable[[str], bool], first: Refuse, second: Refuse) -> Refuse:
    """The same of what never became a request; what has no path is the second's."""

    def refuse(status: int, path: str | None) -> Answer:
        return (first if path is not None and serves(path) else second)(status, path)

    return refuse
