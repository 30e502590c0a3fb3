"""What an operator sees of a process: `/metrics`, `/health/live` and `/health/ready` on a port of their own.

Left out: the metrics themselves; each role has all of its own in one file. `runtime.merged_metrics` adds up those of
several processes.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

import orjson
import prometheus_client
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from runtime.health import Health
from runtime.http.answers import Answer
from runtime.http.refusals import count_refused
from runtime.http.server import HttpServer, HttpSettings
from runtime.ids import uuid7
from runtime.settings import setting
from runtime.sockets import address_of
from runtime.tls import ServerTls, TlsSettings, Variables, server_tls

_log = logging.getLogger("sluice.metrics")

# When a counter was made is of no use to anyone here and doubles the size of the answer.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

VARIABLE: Final = "SLUICE_METRICS_LISTEN"
TLS_VARIABLES: Final = Variables(
    "SLUICE_METRICS_TLS_CERTIFICATE_FILE", "SLUICE_METRICS_TLS_KEY_FILE", "SLUICE_METRICS_TLS_CLIENT_CA_FILE"
)
#: An end is not held up by whoever scrapes.
_STOP_S: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """Where probes and Prometheus find a process."""

    metrics_listen: str = setting(
        "",
        why="host:port of /metrics and /health; unset: 127.0.0.1 with port 9461 for ingest, 9462 for worker, 9463 "
        "for api, 9464 for bridge, and any free one for up, which says where; port 0 takes any free one",
    )
    metrics_tls_certificate_file: str = setting(
        "",
        why="PEM, as SLUICE_TLS_CERTIFICATE_FILE, and may be the same file; set: probes and metrics speak TLS only. "
        "A setting of its own, since what probes this machine need not know the authority that devices do.",
    )
    metrics_tls_key_file: str = setting(
        "", why="PEM, without a passphrase; unset: the key stands in the certificate's file."
    )
    metrics_tls_client_ca_file: str = setting(
        "", why="PEM; set: only clients that show a certificate of these authorities may look, probes as well."
    )


def metrics_tls(metrics: MetricsSettings, tls: TlsSettings) -> ServerTls | None:
    """What the listener shows, waiting and watching as the others do; None for plain HTTP.

    Raises `ConfigurationError` naming the setting of a file that does not fit.
    """
    shown = replace(
        tls,
        tls_certificate_file=metrics.metrics_tls_certificate_file,
        tls_key_file=metrics.metrics_tls_key_file,
        tls_client_ca_file=metrics.metrics_tls_client_ca_file,
    )
    return server_tls(shown, TLS_VARIABLES)


#: The text of `/metrics`, without blocking for long: it runs in a thread.
Render = Callable[[], bytes]


def render_own() -> bytes:
    """The metrics of this process alone."""
    return prometheus_client.generate_latest()


class MetricsServer:
    """Serves probes and metrics on `listener` between `start` and `stop`; with `tls` over HTTPS."""

    def __init__(
        self,
        listener: socket.socket,
        health: Health,
        render: Render = render_own,
        *,
        settings: HttpSettings | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self._listener = listener
        self._health = health
        self._render = render
        self._routes: dict[str, Callable[[], Awaitable[web.StreamResponse]]] = {
            "/metrics": self._metrics,
            "/health/live": self._live,
            "/health/ready": self._ready,
        }
        self._server = HttpServer(
            listener, self._handle, settings or HttpSettings(), _refuse, tls=tls, refused=count_refused("metrics")
        )

    async def start(self) -> None:
        address = str(address_of(self._listener))
        await self._server.start()
        _log.info("metrics and probes are served", extra={"address": address})

    async def stop(self) -> None:
        await self._server.stop(_STOP_S)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        route = self._routes.get(request.path)
        if route is None:
            return _answer(404)
        return await route() if request.method in ("GET", "HEAD") else _answer(405, headers=b"Allow: GET, HEAD\r\n")

    async def _metrics(self) -> web.StreamResponse:
        body = await asyncio.to_thread(self._render)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _live(self) -> web.StreamResponse:
        return _answer(200, {"live": True})

    async def _ready(self) -> web.StreamResponse:
        reasons, notes = self._health.not_ready(), self._health.notes()
        found = {"ready": not reasons, "not_ready": reasons} | ({"notes": notes} if notes else {})
        return _answer(503 if reasons else 200, found)


def _answer(status: int, content: object = None, headers: bytes = b"") -> Answer:
    return Answer(status, b"" if content is None else orjson.dumps(content), str(uuid7()), headers)


def _refuse(status: int, path: str | None) -> Answer:
    return _answer(status)
