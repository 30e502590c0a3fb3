"""The role `api`: queries and the registry, over HTTP."""

import socket
from dataclasses import replace
from typing import Final

from api.access.settings import AccessSettings
from api.metrics import ApiMetrics
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from deploy.process import Process
from deploy.roles.role import Role, serve
from deploy.settings import public_url
from ingest.http.description import described
from ingest.settings import IngestSettings
from runtime.http.cors import CorsSettings, Origins
from runtime.secrets import KeyRing, SecretSettings


async def make_api(process: Process, ring: KeyRing, ingest_address: str, *, beside_ingest: bool) -> ApiFace:
    """The API on sessions of its own, started; it ends with the process.

    Its document describes the ingest face too, which is served beside it or at an address of its own.
    """
    settings = process.settings.get(ApiSettings)
    settings = replace(settings, public_url=public_url(process.settings, ingest_address))
    pool = await process.pool("sluice_app", statement_timeout=str(settings.api_statement_timeout_ms))
    process.watch_database(pool)
    metrics = ApiMetrics()
    app = create_app(
        pool=pool,
        ring=ring,
        settings=settings,
        metrics=metrics,
        access=process.settings.get(AccessSettings),
        trusted_proxies=process.settings.get(IngestSettings).trusted_proxies,
        described=[described(None if beside_ingest else settings.public_url)],
        origins=Origins(process.settings.get(CorsSettings).api_cors_origins),
    )
    face = ApiFace(app, metrics)
    await face.start()
    process.teardown.add("api", face.stop)
    return face


async def _work_api(process: Process, listeners: list[socket.socket]) -> None:
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    face = await make_api(process, ring, process.settings.get(IngestSettings).http_listen, beside_ingest=False)
    await serve(process, listeners[0], face.handler, face.refuse, face.request_factory)


API: Final = Role(
    "api",
    9463,
    lambda settings: settings.get(ApiSettings).api_processes,
    lambda settings: ("SLUICE_API_LISTEN", settings.get(ApiSettings).api_listen),
    _work_api,
)
