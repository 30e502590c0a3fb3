"""What an operator sees of a process: `/metrics`, `/health/live` and `/health/ready` on a port of their own.

Left out: the metrics themselves; each role has all of its own in one file. `runtime.merged_metrics` adds up those of
several processes.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import prometheus_client
from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from runtime.health import Health
from runtime.settings import setting
from runtime.sockets import address_of

_log = logging.getLogger("sluice.metrics")

# When a counter was made is of no use to anyone here and doubles the size of the answer.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

VARIABLE: Final = "SLUICE_METRICS_LISTEN"


@dataclass(frozen=True, kw_only=True)
class MetricsSettings:
    """Where probes and Prometheus find a process."""

    metrics_listen: str = setting(
        "",
        why="host:port of /metrics and /health; unset: 127.0.0.1 with port 9461 for ingest, 9462 for worker, 9463 "
        "for api, and any free one for up, which says where; port 0 takes any free one",
    )


#: The text of `/metrics`, without blocking for long: it runs in a thread.
Render = Callable[[], bytes]


def render_own() -> bytes:
    """The metrics of this process alone."""
    return prometheus_client.generate_latest()


class MetricsServer:
    """Serves probes and metrics on `listener` between `start` and `stop`."""

    def __init__(self, listener: socket.socket, health: Health, render: Render = render_own) -> None:
        self._listener = listener
        self._health = health
        self._render = render
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)

    async def start(self) -> None:
        await self._runner.setup()
        await web.SockSite(self._runner, self._listener).start()
        _log.info("metrics and probes are served", extra={"address": str(address_of(self._listener))})

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        body = await asyncio.to_thread(self._render)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, _: web.Request) -> web.Response:
        reasons, notes = self._health.not_ready(), self._health.notes()
        return web.json_response(
            {"ready": not reasons, "not_ready": reasons} | ({"notes": notes} if notes else {}),
            status=503 if reasons else 200,
            dumps=lambda value: json.dumps(value, ensure_ascii=False),
        )
