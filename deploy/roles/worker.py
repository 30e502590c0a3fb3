"""The role `worker`: from the log into the database, and what goes on beside."""

import asyncio
import socket
from typing import Final

from deploy.process import Process
from deploy.roles.role import Role
from deploy.settings import DeploySettings
from ingest.mqtt.settings import BridgeSettings
from ingest.settings import IngestSettings, PacedSettings, SpoolSettings
from runtime.clock import SystemClock
from runtime.errors import ConfigurationError
from runtime.log import LogSettings
from runtime.log.port import Log
from runtime.mqtt import Endpoint, MqttSettings, endpoint
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing, SecretSettings
from runtime.settings import Settings
from workers.commands.metrics import CommandsMetrics
from workers.commands.sender import Commands
from workers.commands.settings import VARIABLE as COMMANDS_VARIABLE
from workers.commands.settings import CommandsSettings
from workers.erasure.eraser import Eraser
from workers.erasure.metrics import ErasureMetrics
from workers.erasure.settings import ErasureSettings
from workers.landing.worker import run_worker
from workers.ledger import LedgerTotals
from workers.metrics import LandingMetrics, LedgerMetrics, QuarantineMetrics
from workers.presence import Presence
from workers.quarantine import Bounds
from workers.retention.keeper import Retention
from workers.retention.metrics import RetentionMetrics
from workers.retention.settings import RetentionSettings
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.rollups import Rollups
from workers.rollups.settings import RollupsSettings
from workers.settings import LandingSettings, LedgerSettings, PresenceSettings, QuarantineSettings


async def work_on(process: Process, log: Log) -> None:
    """Land the log beside whatever else the process does, until its turn to end comes."""
    stop = asyncio.Event()
    presence = Presence(process.settings.get(PostgresSettings), process.settings.get(PresenceSettings))
    work = run_worker(
        process.settings.get(PostgresSettings),
        process.settings.get(LandingSettings),
        log,
        stop=stop,
        clock=SystemClock(),
        metrics=LandingMetrics(),
        health=process.health,
        heard=presence.hear,
    )
    process.run_beside("landing", work, stop=stop)
    process.run_beside("presence", presence.run())
    process.run_beside("quarantine bounds", make_bounds(process.settings).run())
    postgres, ledger = process.settings.get(PostgresSettings), process.settings.get(LedgerSettings)
    process.run_beside("ledger totals", LedgerTotals(postgres, ledger, LedgerMetrics()).run())
    rollups_metrics = RollupsMetrics()
    erasure = process.settings.get(ErasureSettings)
    eraser = Eraser(postgres, erasure, log, SystemClock(), ErasureMetrics(), rollups_metrics)
    process.health.note("erasure", lambda: eraser.doing)
    process.run_beside("erasure", eraser.run())
    rollups = Rollups(postgres, process.settings.get(RollupsSettings), log, SystemClock(), rollups_metrics)
    process.health.note("rollups", lambda: rollups.doing)
    process.run_beside("rollups", rollups.run())
    retention = Retention(postgres, process.settings.get(RetentionSettings), RetentionMetrics(), rollups_metrics)
    process.health.note("retention", lambda: retention.doing)
    process.run_beside("retention", retention.run())
    commands = make_commands(process.settings)
    process.health.note("commands", lambda: commands.trouble)
    process.run_beside("commands", commands.run())


def make_commands(settings: Settings) -> Commands:
    """Where no broker is named, commands are not sent, and time out."""
    keys = settings.get(SecretSettings).secret_keys
    return Commands(
        settings.get(PostgresSettings),
        settings.get(CommandsSettings),
        _commands_endpoint(settings),
        KeyRing.parse(keys) if keys else None,
        SystemClock(),
        CommandsMetrics(),
    )


def _commands_endpoint(settings: Settings) -> Endpoint | None:
    if own := settings.get(CommandsSettings).commands_mqtt_url:
        return endpoint(own, COMMANDS_VARIABLE)
    url = settings.get(MqttSettings).mqtt_url
    return endpoint(url) if url else None


def make_bounds(settings: Settings) -> Bounds:
    quarantine = settings.get(QuarantineSettings)
    check_memory(quarantine, settings.get(LogSettings), settings.get(SpoolSettings), settings.get(PacedSettings))
    check_receipts(quarantine, settings.get(IngestSettings))
    nonces_s = settings.get(LandingSettings).landing_nonce_memory_s
    check_nonces(nonces_s, settings.get(BridgeSettings))
    return Bounds(settings.get(PostgresSettings), quarantine, QuarantineMetrics(), nonce_memory_s=nonces_s)


def check_memory(
    quarantine: QuarantineSettings, log: LogSettings, spool: SpoolSettings, paced: PacedSettings
) -> None:
    """Raises `ConfigurationError` where it would be forgotten what became of records that can still come."""
    # What is paced goes from its lane straight to the log.
    waits_s = max(spool.spool_age_max_s, paced.paced_age_max_s)
    needed_h = 24 + waits_s / 3600 + log.log_retention_h
    if quarantine.books_memory_days * 24 <= needed_h:
        raise ConfigurationError(
            f"SLUICE_BOOKS_MEMORY_DAYS={quarantine.books_memory_days} is too short: a record can come up to "
            f"{needed_h:.0f} h after its request (a day, SLUICE_SPOOL_AGE_MAX_S or SLUICE_PACED_AGE_MAX_S, and "
            "SLUICE_LOG_RETENTION_H)"
        )


def check_receipts(quarantine: QuarantineSettings, ingest: IngestSettings) -> None:
    """Raises `ConfigurationError` where a receipt could be asked about longer than is known what became of it."""
    if quarantine.books_memory_days * 86_400 < ingest.receipt_ttl_s:
        raise ConfigurationError(
            f"SLUICE_RECEIPT_TTL_S={ingest.receipt_ttl_s:g} is too long: what became of a record is remembered for "
            f"SLUICE_BOOKS_MEMORY_DAYS={quarantine.books_memory_days}"
        )


def check_nonces(memory_s: float, bridge: BridgeSettings) -> None:
    """Raises `ConfigurationError` where a nonce would be forgotten while its message could be sent once more."""
    if memory_s < 2 * bridge.mqtt_replay_window_s:
        raise ConfigurationError(
            f"SLUICE_LANDING_NONCE_MEMORY_S={memory_s:g} is too short: a message may come again within twice "
            f"SLUICE_MQTT_REPLAY_WINDOW_S={bridge.mqtt_replay_window_s:g}"
        )


async def _work_worker(process: Process, listeners: list[socket.socket]) -> None:
    _, log = await process.log()
    await work_on(process, log)


WORKER: Final = Role(
    "worker",
    9462,
    lambda settings: settings.get(DeploySettings).worker_processes,
    lambda settings: None,
    _work_worker,
)
