"""The API as an application: every operation of every face. Left out: the listener (`api.serving`), the process."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import asyncpg
from aiohttp import web

from api.access.door import Door
from api.access.settings import AccessSettings
from api.access.signing import Signer
from api.certificates.issuing import Issuer
from api.certificates.registration import Registrations
from api.certificates.revocation import RevocationLists
from api.certificates.settings import CertificateSettings
from api.devices.downlink import Downlink, NoDownlink
from api.devices.measurements import MeasurementOperations
from api.devices.operations import DeviceOperations
from api.faces import FACES
from api.http.edge import create_app as create_app_of
from api.http.operations import Operation, operations_of
from api.http.repeats import Repeats
from api.live.hub import Live
from api.live.settings import LiveSettings
from api.metrics import ApiMetrics
from api.plants.operations import PlantOperations
from api.plants.security import PlantSecurityOperations
from api.plants.telemetry import TelemetryOperations
from api.platform.aggregates import AggregateOperations
from api.platform.audit import AuditOperations
from api.platform.auth import AuthOperations
from api.platform.certificates import CertificateOperations
from api.platform.commands import DeviceCommandOperations
from api.platform.device_groups import DeviceGroupOperations
from api.platform.documents import DocumentOperations
from api.platform.erasures import ErasureOperations
from api.platform.keys import KeyOperations
from api.platform.ledger import LedgerOperations
from api.platform.live import LiveOperations
from api.platform.organisations import OrganisationOperations
from api.platform.quarantine import QuarantineOperations
from api.platform.readings import ReadingOperations
from api.platform.templates import TemplateOperations
from api.platform.unassigned_devices import UnassignedDeviceOperations
from api.readings.streams import Streams
from api.registry.provisioning import Provisioning
from api.settings import ApiSettings
from api.sites.brokers import BrokerOperations
from api.sites.machines import MachineOperations
from api.sites.sites import SiteOperations
from runtime.addresses import Proxies
from runtime.http.cors import Origins
from runtime.secrets import KeyRing, TokenHasher

_ACCESS: Final = AccessSettings()
_CERTIFICATES: Final = CertificateSettings()
_NO_ORIGINS: Final = Origins(())
_LIMITS: Final = LiveSettings()
_NO_DOWNLINK: Final = NoDownlink()


def create_app(
    *,
    pool: "asyncpg.Pool[asyncpg.Record]",
    ring: KeyRing,
    settings: ApiSettings,
    metrics: ApiMetrics,
    access: AccessSettings = _ACCESS,
    certificates: CertificateSettings = _CERTIFICATES,
    trusted_proxies: tuple[str, ...] = (),
    origins: Origins = _NO_ORIGINS,
    described: Sequence[Mapping[str, Any]] = (),
    live: Live | None = None,
    limits: LiveSettings = _LIMITS,
    downlink: Downlink = _NO_DOWNLINK,
) -> web.Application:
    """The application, to be served through `api.serving`; what `live` does goes on as long as it.

    `described` are others' parts of its OpenAPI document; `downlink` is the way to devices, if there is one.
    """
    door = Door(pool, ring, settings, access)
    documents = DocumentOperations(described)
    operations = [
        *_operations(door, ring, settings, metrics),
        *operations_of(
            DeviceOperations(ring, TokenHasher(ring), settings.public_url, downlink),
            DeviceCommandOperations(ring, settings),
        ),
        *operations_of(*_people(door, ring, settings, access), documents),
        *operations_of(_certificates(door, ring, settings, certificates)),
        *operations_of(*_plants(ring, settings, certificates)),
        *operations_of(LiveOperations(live, settings, limits)),
    ]
    documents.operations = operations
    app = create_app_of(operations, door.authority, Repeats(ring), Proxies(trusted_proxies), FACES, origins, metrics)
    app.on_cleanup.append(door.close)
    if live is not None:
        app.cleanup_ctx.append(partial(_beside, live))
    return app


async def _beside(live: Live, _: web.Application) -> AsyncIterator[None]:
    task = asyncio.create_task(live.run(), name="live")
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _people(door: Door, ring: KeyRing, settings: ApiSettings, access: AccessSettings) -> tuple[object, ...]:
    return (
        AuthOperations(door.accounts, door.tokens, door.mailer, door.background, settings.api_url),
        OrganisationOperations(ring, access, door.mailer, settings.api_url),
        KeyOperations(ring),
        AuditOperations(ring),
    )


def _certificates(
    door: Door, ring: KeyRing, settings: ApiSettings, certificates: CertificateSettings
) -> CertificateOperations:
    acting = door.accounts.acting
    registrations = Registrations(ring, certificates, door.guesses, acting)
    return CertificateOperations(registrations, RevocationLists(ring, certificates), acting, settings)


def _operations(door: Door, ring: KeyRing, settings: ApiSettings, metrics: ApiMetrics) -> list[Operation]:
    return [
        *operations_of(
            ReadingOperations(ring, settings, metrics, Streams(door.acting_for, settings, metrics)),
            AggregateOperations(settings, metrics),
            LedgerOperations(ring, settings),
            QuarantineOperations(ring, settings),
            ErasureOperations(ring),
            SiteOperations(ring, settings),
            MachineOperations(_signer(ring, settings), TokenHasher(ring), settings),
            MeasurementOperations(ring, settings, metrics),
            DeviceGroupOperations(ring),
            TelemetryOperations(settings, metrics),
            BrokerOperations(ring),
            UnassignedDeviceOperations(ring),
        )
    ]


def _plants(ring: KeyRing, settings: ApiSettings, certificates: CertificateSettings) -> tuple[object, ...]:
    provisioning = Provisioning(ring, _signer(ring, settings), Issuer(ring, certificates), settings)
    return (
        PlantOperations(settings),
        PlantSecurityOperations(provisioning, settings),
        TemplateOperations(ring),
    )


def _signer(ring: KeyRing, settings: ApiSettings) -> Signer:
    return Signer(ring, issuer=settings.public_url or "sluice")
