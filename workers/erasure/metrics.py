"""Metrics of erasing sites. Labels are bounded: a kind of row, never a site."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


class ErasureMetrics:
    """In `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.open = Gauge(
            "sluice_erasure_open_sites",
            "Sites that were deleted and are not erased yet, as the worker saw it that looked last.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.rows = Counter(
            "sluice_erasure_rows_total",
            "Rows erased with sites. kind: readings, text_readings, notes, quarantined, rollups (whose readings were "
            "beyond retention).",
            ["kind"],
            registry=registry,
        )
