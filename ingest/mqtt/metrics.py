"""Metrics of the bridge, beside those that it shares with the rest of ingest. Left out: how they are handed over."""

from prometheus_client import REGISTRY, CollectorRegistry

from ingest.metrics import IngestMetrics


class BridgeMetrics(IngestMetrics):
    """Of a process with a bridge, whatever else takes readings there."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        super().__init__(registry)
        self.messages = self._tally(
            "sluice_mqtt_messages",
            "Messages that are done, by family of topics and result: accepted, quarantined (all of it was refused),"
            " empty, retained, echo (what was said with its time already), unknown_device (or prefix of a site),"
            " tray_full, foreign_organisation, malformed_topic; of what is no reading:"
            " announced (whether a device is there), noted (the database has what it said), repeated (it is no news),"
            " unknown_command, no_plant (an alarm of another device), malformed, suspended, rate_limited, or failed"
            " (the database refused it).",
            "family",
            "result",
        )
        self.repeated = self._tally(
            "sluice_mqtt_repeated_messages",
            "Messages that the broker may have sent before (DUP), by family; landing knows which it has.",
            "family",
        )
        self.snapshots = self._tally(
            "sluice_mqtt_snapshots",
            "Plants' snapshots by what was found of them: signed, unsigned (of plants that need not sign), late"
            " (outside the replay window, with a time of their own), or the code that they are quarantined under:"
            " bad_signature, stale_envelope, device_suspended, unknown_device, undecodable.",
            "result",
        )
        self.unacknowledged = self._tally(
            "sluice_mqtt_unacknowledged_messages",
            "Messages that the broker keeps, because the log did not take them or did not say so, by family.",
            "family",
        )
        self.broken = self._tally(
            "sluice_mqtt_connections_ended",
            "Connections to the broker that were refused, or broke, by family.",
            "family",
        )
        self.sessions_lost = self._tally(
            "sluice_mqtt_sessions_lost",
            "Sessions that the broker no longer had: what it kept for them is lost, by family.",
            "family",
        )
        self.acknowledge_seconds = self._durations(
            "sluice_mqtt_acknowledge_seconds", "From a message's arrival until its record was durable."
        )
        self.sessions = self._gauge("sluice_mqtt_sessions", "Sessions that are connected and subscribed.")
        self.sessions_leased = self._gauge("sluice_mqtt_sessions_leased", "Sessions that this bridge is to have.")
        self.in_flight = self._gauge("sluice_mqtt_in_flight_messages", "Taken and not acknowledged yet.")
        self.held = self._gauge(
            "sluice_mqtt_held_messages", "Of those, messages that wait for a look-up of their device, or for a limit."
        )
        self.oldest_seconds = self._gauge(
            "sluice_mqtt_oldest_seconds", "Since the oldest message in flight came.", mode="livemax"
        )
        self.broker_stored = self._gauge(
            "sluice_mqtt_broker_stored_messages", "Messages that the broker keeps, as it says.", mode="livemax"
        )
        self.broker_dropped = self._gauge(
            "sluice_mqtt_broker_dropped_messages",
            "Messages that the broker dropped since it started, as it says: queues were full, or sessions too many.",
            mode="livemax",
        )
