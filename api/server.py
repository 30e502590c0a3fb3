"""The API as an aiohttp application: routes, who may use them, and one shape for every error.

Left out: the listener (`api.serving`) and the process around it (`deploy`).
"""

import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
from aiohttp import web

from api.auth import READ_SCOPE, Authority, presented_key
from api.errors import ApiError, error_response, unavailable
from api.ledger import LedgerRoutes
from api.metrics import ApiMetrics
from api.parameters import known_once, series_filter, span
from api.quarantine_routes import QuarantineRoutes
from api.readings import Cursors, find_series, fingerprint, read_latest, read_page, render
from api.settings import ApiSettings
from runtime.ids import uuid7
from runtime.postgres import UNAVAILABLE
from runtime.secrets import KeyRing, Seal, TokenHasher

_log = logging.getLogger("sluice.api")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SERIES_PARAMETERS: Final = frozenset({"device_id", "metric", "label"})
_PAGE_PARAMETERS: Final = _SERIES_PARAMETERS | {"from", "to", "order", "limit", "cursor"}


def create_app(
    *, pool: "asyncpg.Pool[asyncpg.Record]", ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics
) -> web.Application:
    """The application, to be served through `api.serving`."""
    authority = Authority(pool, TokenHasher(ring), connection_wait_s=settings.api_connection_wait_ms / 1000)
    readings = _Readings(authority, Cursors(Seal(ring, "cursor")), settings, metrics)
    app = web.Application(middlewares=[_Edge(metrics).handle])
    app.router.add_get("/api/v1/readings", readings.page, allow_head=False)
    app.router.add_get("/api/v1/readings/latest", readings.latest, allow_head=False)
    LedgerRoutes(authority, Seal(ring, "ledger cursor"), settings).add_to(app.router)
    QuarantineRoutes(authority, Seal(ring, "quarantine cursor"), settings).add_to(app.router)
    return app


class _Readings:
    """The reading routes."""

    def __init__(self, authority: Authority, cursors: Cursors, settings: ApiSettings, metrics: ApiMetrics) -> None:
        self._authority = authority
        self._cursors = cursors
        self._settings = settings
        self._metrics = metrics

    async def page(self, request: web.Request) -> web.Response:
        key = presented_key(request.headers.get("Authorization"))
        query = known_once(request.query, _PAGE_PARAMETERS)
        wanted = series_filter(query)
        read = span(
            query,
            limit_default=self._settings.api_page_readings_default,
            limit_max=self._settings.api_page_readings_max,
        )
        async with self._authority.session(key, READ_SCOPE) as session:
            query_mark = fingerprint(session.organisation, wanted, read)
            after = None if read.cursor is None else self._cursors.take(query_mark, read.cursor)
            series = await find_series(session.connection, wanted)
            page = await read_page(session.connection, list(series), read, after)
        next_cursor = None if page.end is None else self._cursors.give(query_mark, page.end)
        return self._answer(page.rows, series, next_cursor)

    async def latest(self, request: web.Request) -> web.Response:
        key = presented_key(request.headers.get("Authorization"))
        wanted = series_filter(known_once(request.query, _SERIES_PARAMETERS))
        async with self._authority.session(key, READ_SCOPE) as session:
            series = await find_series(session.connection, wanted)
            rows = await read_latest(session.connection, list(series), datetime.now(UTC))
        return self._answer(rows, series, None)

    def _answer(self, rows: Any, series: Any, next_cursor: str | None) -> web.Response:
        self._metrics.readings.inc(len(rows))
        return web.Response(body=render(rows, series, next_cursor), content_type="application/json")


class _Edge:
    """What every request passes through: a request id, the errors of this face, counts."""

    def __init__(self, metrics: ApiMetrics) -> None:
        self._metrics = metrics

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = str(uuid7())
        route = _route(request)
        started = time.perf_counter()
        with self._metrics.in_flight.track_inprogress():
            response = await self._answered(request, handler, request_id)
        response.headers["X-Request-Id"] = request_id
        response.headers["Cache-Control"] = "no-store"
        # Otherwise aiohttp names itself and Python, with their versions.
        response.headers["Server"] = "sluice"
        self._metrics.requests.labels(route, str(response.status)).inc()
        self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
        return response

    async def _answered(self, request: web.Request, handler: Handler, request_id: str) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return error_response(error, request_id)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not possible here: {allowed}"
            return error_response(ApiError(405, "method_not_allowed", message, Allow=allowed), request_id)
        except web.HTTPNotFound:
            return error_response(ApiError(404, "not_found", "nothing is at this path"), request_id)
        except web.HTTPException as error:
            return error_response(ApiError(error.status, "bad_request", error.reason), request_id)
        except asyncpg.QueryCanceledError:
            return error_response(
                unavailable("query_timeout", "the query took too long: ask for a shorter span"), request_id
            )
        except UNAVAILABLE as error:
            _log.warning("the database is away", extra={"request_id": request_id, "reason": str(error)})
            return error_response(unavailable("database_unavailable", "the database is away: try again"), request_id)
        except Exception:
            _log.exception("a request failed", extra={"request_id": request_id, "route": _route(request)})
            return error_response(
                ApiError(500, "internal_error", "something broke here; it has been logged"), request_id
            )


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical
