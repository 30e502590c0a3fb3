"""What every request passes through, from its head to its answer; `create_app` reads as the way.

Left out: the listener (`api.serving`), who may call (`api.access`), and what each operation does.
"""

import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final

import msgspec
from aiohttp import hdrs, web

from api.access.authority import Authority
from api.access.guesses import address_of
from api.http import spelt
from api.http.decoding import read_body, read_path, read_query, take_body
from api.http.faces import Face, face_of
from api.http.failures import failure_of
from api.http.operations import Call, Operation, Reply
from api.http.packing import Streamed, add_vary, pack, version_of
from api.http.problems import (
    BAD_REQUEST,
    DATABASE_UNAVAILABLE,
    INTERNAL,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    Problem,
)
from api.http.repeats import HEADER, Rendered, Repeats
from api.metrics import ApiMetrics
from runtime.addresses import Proxies
from runtime.http.cors import Origins
from runtime.http.request_ids import REQUEST_ID, taken
from runtime.ids import uuid7
from runtime.postgres import UNAVAILABLE

_log = logging.getLogger("sluice.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
JSON: Final = "application/json"

_encoder: Final = msgspec.json.Encoder(enc_hook=spelt.write, uuid_format="canonical")
_ID: Final = web.RequestKey("request_id", str)


#: What an application answers.
OPERATIONS: Final = web.AppKey("operations", tuple[Operation, ...])


def create_app(
    operations: Iterable[Operation],
    authority: Authority,
    repeats: Repeats,
    proxies: Proxies,
    faces: tuple[Face, ...],
    origins: Origins,
    metrics: ApiMetrics,
) -> web.Application:
    """The application of these operations; the last of the faces has all paths that are no other's."""
    app = web.Application(middlewares=[_Edge(faces, origins, metrics).handle])
    app[OPERATIONS] = tuple(operations)
    runner = _Runner(authority, repeats, proxies)
    methods: dict[str, set[str]] = {}
    for operation in app[OPERATIONS]:
        handler = functools.partial(runner.run, operation)
        served = {operation.method, hdrs.METH_HEAD} if operation.method == hdrs.METH_GET else {operation.method}
        methods.setdefault(operation.path, set()).update(served)
        for method in sorted(served):
            app.router.add_route(method, operation.path, handler)
    for path, allowed in methods.items():
        if "{" not in path:
            app.router.add_route(hdrs.METH_ANY, path, functools.partial(_not_allowed, frozenset(allowed)))
    return app


async def _not_allowed(allowed: frozenset[str], request: web.Request) -> web.StreamResponse:
    """Otherwise `/rows/summary` would be taken for `/rows/{id}` by the methods that only that has."""
    raise web.HTTPMethodNotAllowed(request.method, allowed)


class _Runner:
    """Runs a request through its operation: read, let in, decoded, handled, answered."""

    def __init__(self, authority: Authority, repeats: Repeats, proxies: Proxies) -> None:
        self._authority = authority
        self._proxies = proxies
        self._repeats = repeats

    async def run(self, operation: Operation, request: web.Request) -> web.StreamResponse:
        try:
            return await self._run(operation, request)
        except Problem as problem:
            problem.kind = operation.own(problem.kind)
            raise

    async def _run(self, operation: Operation, request: web.Request) -> web.StreamResponse:
        address = address_of(self._proxies, request)
        presented = self._authority.presented(operation.needs, request.headers, address)
        body = await take_body(request, operation.body_bytes_max)
        organisation = request.match_info.get("orgId")
        async with self._authority.session(
            presented, operation.needs, organisation, address, writes=operation.writes
        ) as session:
            call: Call[Any, Any, Any] = Call(
                read_path(operation, request.match_info),
                read_query(operation.query_type, request.query),
                read_body(operation.body_type, body),
                session.caller,
                session.connection,
                request[_ID],
                _versions(request.headers.get(hdrs.IF_MATCH)),
                address,
                request.headers.get(hdrs.USER_AGENT, ""),
                ", ".join(request.headers.getall(hdrs.ACCEPT, ())),
                _held(request.headers.get(hdrs.IF_NONE_MATCH, "")),
                request.headers.get("Last-Event-ID", ""),
                lambda: request.transport is None,
            )
            return await self._answer(operation, call, request)

    async def _answer(
        self, operation: Operation, call: Call[Any, Any, Any], request: web.Request
    ) -> web.StreamResponse:
        name = request.headers.get(HEADER)
        if name is not None and operation.repeatable:

            async def answer() -> Rendered:
                return _rendered(operation, _reply(await operation.handler(call)))

            return _response(await self._repeats.once(operation, call, name, answer))
        reply = _reply(await operation.handler(call))
        if reply.version is not None and (reply.status == 304 or (operation.versioned and call.known(reply.version))):
            return _unchanged(reply, reply.version, request.headers[hdrs.IF_NONE_MATCH])
        if isinstance(reply.content, AsyncIterator):
            return _streamed(operation, reply, reply.content, request)
        return _response(_rendered(operation, reply))


def _versions(header: str | None) -> tuple[str, ...] | None:
    if header is None or header.strip() == "*":
        return None
    # A weak tag never matches: what it stands for may differ.
    return tuple(version_of(tag) for tag in header.split(",") if not tag.strip().startswith("W/"))


def _held(header: str) -> tuple[str, ...]:
    """Compared weakly: what differs in its packing alone is known."""
    return tuple(version_of(tag) for tag in header.split(",") if tag.strip())


def _unchanged(reply: Reply[Any], version: str, held: str) -> web.Response:
    """Under the tag that the client knows it by."""
    known = [tag.strip() for tag in held.split(",") if version_of(tag) == version]
    return web.Response(status=304, headers=_headers(reply) | ({hdrs.ETAG: known[0]} if known else {}))


def _reply(result: Any) -> Reply[Any]:
    return result if isinstance(result, Reply) else Reply(result)


def _rendered(operation: Operation, reply: Reply[Any]) -> Rendered:
    body = reply.content if isinstance(reply.content, bytes) else _encoder.encode(reply.content)
    return Rendered(
        reply.status or operation.status, body, reply.content_type or operation.content_type, _headers(reply)
    )


def _streamed(
    operation: Operation, reply: Reply[Any], chunks: AsyncIterator[bytes], request: web.Request
) -> web.StreamResponse:
    headers = _headers(reply) | {hdrs.CONTENT_TYPE: reply.content_type or operation.content_type}
    return Streamed(
        request, chunks, reply.status or operation.status, headers, functools.partial(_broke_off, request)
    )


def _broke_off(request: web.Request, error: Exception) -> None:
    known = isinstance(error, (Problem, *UNAVAILABLE))
    extra = {"request_id": request[_ID], "route": _route(request), "reason": str(error)}
    _log.log(logging.WARNING if known else logging.ERROR, "an answer broke off", extra=extra, exc_info=not known)


def _headers(reply: Reply[Any]) -> dict[str, str]:
    if reply.version is None:
        return {**reply.headers}
    return {**reply.headers, hdrs.ETAG: f'{"W/" if reply.is_weak else ""}"{reply.version}"'}


def _response(rendered: Rendered) -> web.Response:
    if rendered.status == 204:
        return web.Response(status=204, headers=rendered.headers)
    headers = {**rendered.headers, hdrs.CONTENT_TYPE: rendered.content_type}
    return web.Response(status=rendered.status, body=rendered.body, headers=headers)


class _Edge:
    """A request id, the errors of the face whose path it is, what browsers are told, counts."""

    def __init__(self, faces: tuple[Face, ...], origins: Origins, metrics: ApiMetrics) -> None:
        self._faces = faces
        self._origins = origins
        self._metrics = metrics

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[_ID] = taken(request.headers.get(REQUEST_ID, "")) or str(uuid7())
        route = _route(request)
        started = time.perf_counter()
        with self._metrics.in_flight.track_inprogress():
            response = await self._answered(request, handler, request_id)
        response.headers[REQUEST_ID] = request_id
        response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        await pack(request, response)
        # Otherwise aiohttp names itself and Python, with their versions.
        response.headers[hdrs.SERVER] = "sluice"
        self._metrics.requests.labels(route, str(response.status)).inc()
        self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
        return response

    async def _answered(self, request: web.Request, handler: Handler, request_id: str) -> web.StreamResponse:
        allowed = None
        try:
            response = await handler(request)
        except Exception as error:
            if isinstance(error, web.HTTPMethodNotAllowed) and request.method == hdrs.METH_OPTIONS:
                allowed = _allowed(error)
                response = web.Response(status=204, headers={hdrs.ALLOW: allowed})
            else:
                # Under a name here it would hold this frame, which holds it: a body, until garbage is looked for.
                face = face_of(self._faces, request.path)
                response = problem_response(face, _problem(error, request, request_id), request_id)
        headers = self._origins.headers(request.headers, allowed)
        if name := headers.pop(hdrs.VARY, None):
            add_vary(response, name)
        response.headers.update(headers)
        return response


def _problem(error: Exception, request: web.Request, request_id: str) -> Problem:
    """What is told of it; what is not the client's doing is logged."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = _allowed(error)
        message = f"{request.method} is not possible here: {allowed}"
        return Problem(METHOD_NOT_ALLOWED, message, headers={hdrs.ALLOW: allowed})
    if isinstance(error, web.HTTPNotFound):
        return Problem(NOT_FOUND)
    if isinstance(error, web.HTTPException):
        return Problem(BAD_REQUEST, error.reason)
    if failure := failure_of(error):
        if failure.kind is DATABASE_UNAVAILABLE:
            _log.warning("the database is away", extra={"request_id": request_id, "reason": str(error)})
        return failure
    _log.error("a request failed", extra={"request_id": request_id, "route": _route(request)}, exc_info=error)
    return Problem(INTERNAL)


def _allowed(error: web.HTTPMethodNotAllowed) -> str:
    """Every path answers OPTIONS."""
    return ", ".join(sorted({*error.allowed_methods, hdrs.METH_OPTIONS}))


def problem_response(face: Face, problem: Problem, request_id: str) -> web.Response:
    return web.Response(
        status=face.kind(problem.kind).status,
        body=face.body(problem, request_id),
        content_type=face.shape.content_type,
        headers=problem.headers,
    )


def _route(request: web.Request) -> str:
    route = request.match_info.route
    return "unknown" if route.resource is None or route.method == hdrs.METH_ANY else route.resource.canonical
