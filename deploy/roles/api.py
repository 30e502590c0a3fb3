"""The role `api`: queries and the registry, over HTTP."""

import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from api.access.authority import Waits
from api.access.settings import AccessSettings
from api.certificates.settings import CertificateSettings
from api.devices.downlink import CommandDownlink, Downlink, NoDownlink
from api.live.hub import Live
from api.live.settings import LiveSettings
from api.metrics import ApiMetrics
from api.platform.live import LISTENS
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from deploy.process import Process
from deploy.roles.role import Role, serve
from deploy.settings import api_url, http_address, public_url
from ingest.http.description import described
from ingest.settings import IngestSettings
from runtime.http.cors import CorsSettings, Origins
from runtime.log.port import Log
from runtime.mqtt import MqttSettings
from runtime.secrets import KeyRing, SecretSettings
from runtime.sockets import Address, address_of
from workers.commands.settings import CommandsSettings

#: For the log at the start, before requests are taken: whoever comes back for a stream finds it.
_LOG_WAIT_S: Final = 5.0
OpenLog = Callable[[], Awaitable[Log]]


async def make_api(
    process: Process, ring: KeyRing, address: Address, ingest_address: Address | None, open_log: OpenLog
) -> tuple[ApiFace, Live]:
    """The API on sessions of its own, started, and its streams; they end with the process.

    Its document describes the ingest face too, which is served beside it or, if that is not None, at an address of
    its own.
    """
    settings = replace(
        process.settings.get(ApiSettings),
        public_url=public_url(process.settings, ingest_address or address),
        api_url=api_url(process.settings, address),
    )
    pool = await process.pool("sluice_app", statement_timeout=str(settings.api_statement_timeout_ms))
    process.watch_database(pool)
    metrics, limits = ApiMetrics(), process.settings.get(LiveSettings)
    live = Live(pool, ring, limits, metrics, open_log, needs=LISTENS, waits=Waits.of(settings))
    process.health.note("streams", lambda: live.trouble)
    app = create_app(
        pool=pool,
        ring=ring,
        settings=settings,
        metrics=metrics,
        access=process.settings.get(AccessSettings),
        certificates=process.settings.get(CertificateSettings),
        trusted_proxies=process.settings.get(IngestSettings).trusted_proxies,
        described=[described(None if ingest_address is None else settings.public_url)],
        origins=Origins(process.settings.get(CorsSettings).api_cors_origins),
        live=live,
        limits=limits,
        downlink=_downlink(process, settings),
    )
    face = ApiFace(app, metrics)
    await face.start()
    process.teardown.add("api", face.stop)
    await live.first_try(_LOG_WAIT_S)
    return face, live


def _downlink(process: Process, settings: ApiSettings) -> Downlink:
    """A worker sends commands where there is a broker, which this process need not reach."""
    brokers = (
        process.settings.get(MqttSettings).mqtt_url,
        process.settings.get(CommandsSettings).commands_mqtt_url,
        settings.mqtt_public_url,
    )
    return CommandDownlink(settings.commands_open_max) if any(brokers) else NoDownlink()


def end_streams_first(process: Process, live: Live) -> None:
    """Before the listener waits for what is in hand: a stream never ends by itself. To be called after `serve`."""

    async def end() -> None:
        live.end()

    process.teardown.add("streams", end)


class _OwnLog:
    """A log that is only read: nothing holds its generation, so that it may be closed and followed by another."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._log: Log | None = None

    async def open(self) -> Log:
        """Raises as `Process.open_log_alone`."""
        await self.close()
        self._log = await self._process.open_log_alone()
        return self._log

    async def close(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            await log.close()


async def _work_api(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    log = _OwnLog(process)
    process.teardown.add("log", log.close)
    address, ingest_address = address_of(listeners[0]), http_address(process.settings)
    face, live = await make_api(process, ring, address, ingest_address, log.open)
    await serve(process, listeners[0], face.handler, face.refuse, face.request_factory)
    end_streams_first(process, live)


API: Final = Role(
    "api",
    9463,
    lambda settings: settings.get(ApiSettings).api_processes,
    lambda settings: ("SLUICE_API_LISTEN", settings.get(ApiSettings).api_listen),
    _work_api,
)
