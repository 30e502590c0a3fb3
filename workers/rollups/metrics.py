"""Metrics of the roll-ups. Labels are bounded: a tier, a kind of pass."""

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1_800.0)


class RollupsMetrics:
    """In `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.lag = Gauge(
            "sluice_rollups_lag_seconds",
            "How far behind the present the roll-ups end, as the worker saw it that computed last. In health up to "
            "300 beyond SLUICE_ROLLUPS_DELAY_S and what landing lags.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.marks = Gauge(
            "sluice_rollups_marks",
            "Ranges of buckets that wait for a repair, at most 100001 of them counted.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.oldest_mark = Gauge(
            "sluice_rollups_oldest_mark_seconds",
            "How long the first of them has waited; 60 is too long.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.passes = Histogram(
            "sluice_rollups_pass_seconds",
            "Time of a pass that had work. kind: close (new buckets), repair (marked ones).",
            ["kind"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rows = Counter(
            "sluice_rollups_rows_total",
            "Roll-ups written, anew or again. tier: 5m, 1h, 1d.",
            ["tier"],
            registry=registry,
        )
        self.unsettled = Counter(
            "sluice_rollups_unsettled_total",
            "Passes that gave up waiting for a transaction that was older than the closing.",
            registry=registry,
        )
