"""Settings of the whole, and every group there is: a variable that none of them declares stops a start."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from api.access.settings import AccessSettings
from api.certificates.settings import CertificateSettings
from api.live.settings import LiveSettings
from api.settings import ApiSettings
from ingest.limits import LimitSettings
from ingest.mqtt.settings import BridgeSettings
from ingest.settings import IngestSettings, PacedSettings, ReplaySettings, SpoolSettings
from runtime.http.cors import CorsSettings
from runtime.http.server import HttpSettings
from runtime.lifecycle import LifecycleSettings
from runtime.log import LogSettings, check_log_url
from runtime.logging import LoggingSettings
from runtime.metrics import MetricsSettings
from runtime.mqtt import MqttSettings
from runtime.postgres import PostgresSettings
from runtime.secrets import SecretSettings
from runtime.settings import CONFIG_VARIABLE, Settings, setting
from runtime.sockets import Address, parse_address, reachable
from runtime.tls import TlsSettings
from schemas.topics import PARTITIONS_DEFAULT
from workers.broker.settings import BrokerSettings
from workers.commands.settings import CommandsSettings
from workers.erasure.settings import ErasureSettings
from workers.retention.settings import RetentionSettings
from workers.rollups.settings import RollupsSettings
from workers.settings import LandingSettings, LedgerSettings, PresenceSettings, QuarantineSettings
from workers.verify.settings import VerifySettings

HTTP_VARIABLE: Final = "SLUICE_HTTP_LISTEN"
#: Of `sluice up`, in its data directory: what leads to its parts.
SETTINGS_FILE: Final = "sluice.toml"


@dataclass(frozen=True, kw_only=True)
class DeploySettings:
    """How the parts are put together on a machine."""

    data_dir: str = setting(
        ".sluice",
        why="Where `sluice up` keeps its database, log and keys, and ingest its spool and counts: a disk that stays, "
        "the same for all processes of a machine.",
    )
    log_partitions: int = setting(
        PARTITIONS_DEFAULT,
        unit="partitions",
        least=1,
        most=1024,
        why="Of a new generation of the log, fixed for its life: at least as many as workers that will share it.",
    )
    closing_log_url: str = setting(
        "",
        secret=True,
        check=check_log_url,
        why="For `sluice migrate --new-generation`: where the log to be closed stands, if not at SLUICE_LOG_URL.",
    )
    worker_processes: int = setting(
        1, unit="processes", least=1, most=256, why="They share the partitions; one event loop uses one core."
    )
    json: bool = setting(False, why="Print JSON for programs instead of text for people.")


GROUPS: Final = (
    DeploySettings,
    PostgresSettings,
    LogSettings,
    SecretSettings,
    HttpSettings,
    TlsSettings,
    IngestSettings,
    SpoolSettings,
    PacedSettings,
    LimitSettings,
    ReplaySettings,
    MqttSettings,
    BridgeSettings,
    BrokerSettings,
    LandingSettings,
    VerifySettings,
    QuarantineSettings,
    LedgerSettings,
    PresenceSettings,
    CommandsSettings,
    ErasureSettings,
    RollupsSettings,
    RetentionSettings,
    ApiSettings,
    CorsSettings,
    LiveSettings,
    AccessSettings,
    CertificateSettings,
    MetricsSettings,
    LoggingSettings,
    LifecycleSettings,
)


def load(overrides: Mapping[str, object] | None = None) -> Settings:
    """All settings: the command line's over the environment's over the file's. Raises `ConfigurationError`."""
    return Settings.load(GROUPS, os.environ, overrides)


def settings_of_up(environ: Mapping[str, str]) -> Path | None:
    """The file that leads to the parts of a `sluice up` in this directory: None without, or where one is named."""
    file = Path(environ.get("SLUICE_DATA_DIR", DeploySettings.data_dir)) / SETTINGS_FILE
    return file if CONFIG_VARIABLE not in environ and file.is_file() else None


def http_address(settings: Settings) -> Address:
    """Where the ingest face listens."""
    return parse_address(HTTP_VARIABLE, settings.get(IngestSettings).http_listen)


def public_url(settings: Settings, address: Address) -> str:
    """How devices reach the ingest face, which listens at `address`."""
    return settings.get(ApiSettings).public_url.rstrip("/") or _url(settings, address)


def api_url(settings: Settings, address: Address) -> str:
    """How people reach the API, which listens at `address`."""
    return settings.get(ApiSettings).api_url.rstrip("/") or _url(settings, address)


def _url(settings: Settings, address: Address) -> str:
    scheme = "https" if settings.get(TlsSettings).tls_certificate_file else "http"
    return f"{scheme}://{reachable(address)}"
