"""The API as an application: every operation of every face. Left out: the listener (`api.serving`), the process."""

import asyncpg
from aiohttp import web

from api.access.authority import Authority
from api.faces import FACES
from api.http.edge import create_app as create_app_of
from api.http.operations import Operation, operations_of
from api.metrics import ApiMetrics
from api.platform.ledger import LedgerOperations
from api.platform.quarantine import QuarantineOperations
from api.platform.readings import ReadingOperations
from api.settings import ApiSettings
from runtime.secrets import KeyRing, TokenHasher


def create_app(
    *, pool: "asyncpg.Pool[asyncpg.Record]", ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics
) -> web.Application:
    """The application, to be served through `api.serving`."""
    authority = Authority(pool, TokenHasher(ring), connection_wait_s=settings.api_connection_wait_ms / 1000)
    return create_app_of(_operations(ring, settings, metrics), authority, FACES, metrics)


def _operations(ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics) -> list[Operation]:
    return [
        *operations_of(
            ReadingOperations(ring, settings, metrics),
            LedgerOperations(ring, settings),
            QuarantineOperations(ring, settings),
        )
    ]
