"""The role `bridge`: readings from an MQTT broker, into the log."""

import socket
from typing import Final

from deploy.process import Process
from deploy.roles.ingest import WayIn, way_in
from deploy.roles.role import Role
from ingest.mqtt.bridge import Bridge
from ingest.mqtt.compose import make_bridge
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.settings import BridgeSettings
from ingest.settings import IngestSettings
from runtime.clock import SystemClock
from runtime.log.port import Log
from runtime.mqtt import MqttSettings, endpoint
from runtime.notifications import Notifications
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing, SecretSettings


async def bridge_to(process: Process, log: Log, ring: KeyRing, common: WayIn, metrics: BridgeMetrics) -> Bridge:
    """A bridge to the broker that the settings name, started; it ends with the process."""
    settings = process.settings
    application = f"sluice {process.name} bridge"
    bridge = make_bridge(
        endpoint(settings.get(MqttSettings).mqtt_url),
        log=log,
        pool=common.pool,
        listener=Notifications(settings.get(PostgresSettings), role="sluice_ingest", application=application),
        ring=ring,
        limits=common.limits,
        settings=settings.get(BridgeSettings),
        ingest=settings.get(IngestSettings),
        clock=SystemClock(),
        metrics=metrics,
    )
    await bridge.start()
    process.teardown.add("bridge", bridge.stop)
    process.run_beside("bridge tasks", bridge.watch())
    process.health.note("bridge", lambda: bridge.note)
    return bridge


async def _work_bridge(process: Process, listeners: list[socket.socket]) -> None:
    endpoint(process.settings.get(MqttSettings).mqtt_url)  # a bad URL is told before anything is waited for
    ring = KeyRing.parse(process.settings.get(SecretSettings).secret_keys)
    _, log = await process.log()
    metrics = BridgeMetrics()
    common = await way_in(process, metrics)

    async def close() -> None:
        common.limits.close()

    process.teardown.add("limits", close)
    bridge = await bridge_to(process, log, ring, common, metrics)
    process.health.register("broker", lambda: bridge.trouble)


BRIDGE: Final = Role("bridge", 9464, lambda settings: 1, lambda settings: None, _work_bridge)
