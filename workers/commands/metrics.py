"""Metrics of the sending of commands. Labels are bounded: an outcome."""

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class CommandsMetrics:
    """In `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.commands = Counter(
            "sluice_commands_total",
            "Commands to devices. outcome: sent (the broker has it; counted again if sent again), refused (by the "
            "broker: it is tried again), unsendable (nothing can be sent: it has failed), timed_out.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("sent", "refused", "unsendable", "timed_out"):
            self.commands.labels(outcome)
        self.waiting = Gauge(
            "sluice_commands_waiting",
            "Commands that could be sent and are not, as the worker saw it that looked last.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.oldest = Gauge(
            "sluice_commands_oldest_seconds",
            "How long the first of them has waited, as the worker saw it that looked last.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.connected = Gauge(
            "sluice_commands_connected",
            "Workers that are connected to the broker to send commands.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.sent_seconds = Histogram(
            "sluice_commands_sent_seconds",
            "From when a command was asked for until the broker had it.",
            buckets=_SECONDS,
            registry=registry,
        )
