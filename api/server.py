"""The API as an application: every operation of every face. Left out: the listener (`api.serving`), the process."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import asyncpg
from aiohttp import web

from api.access.door import Door
from api.access.settings import AccessSettings
from api.access.signing import Signer
from api.devices.downlink import NoDownlink
from api.devices.measurements import MeasurementOperations
from api.devices.operations import DeviceOperations
from api.faces import FACES
from api.http.edge import create_app as create_app_of
from api.http.operations import Operation, operations_of
from api.http.repeats import Repeats
from api.metrics import ApiMetrics
from api.platform.aggregates import AggregateOperations
from api.platform.audit import AuditOperations
from api.platform.auth import AuthOperations
from api.platform.device_groups import DeviceGroupOperations
from api.platform.documents import DocumentOperations
from api.platform.erasures import ErasureOperations
from api.platform.keys import KeyOperations
from api.platform.ledger import LedgerOperations
from api.platform.organisations import OrganisationOperations
from api.platform.quarantine import QuarantineOperations
from api.platform.readings import ReadingOperations
from api.readings.streams import Streams
from api.settings import ApiSettings
from api.sites.machines import MachineOperations
from api.sites.sites import SiteOperations
from runtime.addresses import Proxies
from runtime.http.cors import Origins
from runtime.secrets import KeyRing, TokenHasher

_ACCESS: Final = AccessSettings()
_NO_ORIGINS: Final = Origins(())


def create_app(
    *,
    pool: "asyncpg.Pool[asyncpg.Record]",
    ring: KeyRing,
    settings: ApiSettings,
    metrics: ApiMetrics,
    access: AccessSettings = _ACCESS,
    trusted_proxies: tuple[str, ...] = (),
    origins: Origins = _NO_ORIGINS,
    described: Sequence[Mapping[str, Any]] = (),
) -> web.Application:
    """The application, to be served through `api.serving`; `described` are others' parts of its OpenAPI document."""
    door = Door(pool, ring, settings, access)
    documents = DocumentOperations(described)
    operations = [
        *_operations(door, ring, settings, metrics),
        *operations_of(*_people(door, ring, settings, access), documents),
    ]
    documents.operations = operations
    app = create_app_of(operations, door.authority, Repeats(ring), Proxies(trusted_proxies), FACES, origins, metrics)
    app.on_cleanup.append(door.close)
    return app


def _people(door: Door, ring: KeyRing, settings: ApiSettings, access: AccessSettings) -> tuple[object, ...]:
    return (
        AuthOperations(door.accounts, door.tokens, door.mailer, door.background, settings.public_url),
        OrganisationOperations(ring, access, door.mailer, settings.public_url),
        KeyOperations(ring),
        AuditOperations(ring),
    )


def _operations(door: Door, ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics) -> list[Operation]:
    return [
        *operations_of(
            ReadingOperations(ring, settings, metrics, Streams(door.acting_for, settings, metrics)),
            AggregateOperations(settings, metrics),
            LedgerOperations(ring, settings),
            QuarantineOperations(ring, settings),
            ErasureOperations(ring),
            SiteOperations(ring, settings),
            MachineOperations(Signer(ring, issuer=settings.public_url or "sluice"), TokenHasher(ring), settings),
            MeasurementOperations(ring, settings, metrics),
            DeviceOperations(ring, TokenHasher(ring), settings.public_url, NoDownlink()),
            DeviceGroupOperations(ring),
        )
    ]
