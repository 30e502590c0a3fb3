"""Metrics of the broker's identities. Labels are bounded: never a client."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


class BrokerMetrics:
    """In `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.clients = Gauge(
            "sluice_broker_clients",
            "Clients of the broker. state: wanted (by the registry), there (in the broker), waiting (without their "
            "password, which is not at hand any more), beyond (more than SLUICE_BROKER_CLIENTS_MAX).",
            ["state"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.changes = Counter(
            "sluice_broker_changes_total",
            "Differences from the registry that were applied. kind: created, changed (a password), enabled, "
            "disabled, deleted, kicked.",
            ["kind"],
            registry=registry,
        )
        self.failures = Counter(
            "sluice_broker_failures_total",
            "What could not be done. part: command (refused by the broker), list (of revoked certificates), broker, "
            "database.",
            ["part"],
            registry=registry,
        )
        self.agreed = Gauge(
            "sluice_broker_agreed_timestamp_seconds",
            "When the broker was last known to be as the registry says.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.list_ends = Gauge(
            "sluice_broker_crl_next_update_timestamp_seconds",
            "When the first of the lists that the broker has ends: from then on it lets no certificate in.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
