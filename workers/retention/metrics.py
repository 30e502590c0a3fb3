"""Metrics of retention. Labels are bounded: a tier, a reason."""

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

#: Why chunks that nobody keeps still stand.
REASONS: Final = ("unsettled", "uncomputed", "marked", "locked", "failed")


class RetentionMetrics:
    """In `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.chunks = Counter(
            "sluice_retention_chunks_total",
            "Chunks or partitions that were dropped whole. tier: raw, 5m, 1h, 1d.",
            ["tier"],
            registry=registry,
        )
        self.bytes = Counter(
            "sluice_retention_bytes_total",
            "What these took on disk, indexes included. tier: raw, 5m, 1h, 1d.",
            ["tier"],
            registry=registry,
        )
        self.rows = Counter(
            "sluice_retention_rows_total",
            "Rows deleted one by one, of organisations that keep less than others, and commands that are over. "
            "kind: a table.",
            ["kind"],
            registry=registry,
        )
        self.shares = Gauge(
            "sluice_retention_waiting_shares",
            "Chunks of which an organisation that keeps less than others still has rows, counted for each such "
            "organisation; 0 with workers that are not at it.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.passed = Gauge(
            "sluice_retention_passed_timestamp_seconds",
            "When a pass last came to its end, in Unix time; of a worker that made none, when it began.",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.oldest = Gauge(
            "sluice_retention_oldest_seconds",
            "How long ago the oldest chunk of a tier begins, as the worker saw it that looked last.",
            ["tier"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.waiting = Gauge(
            "sluice_retention_waiting_chunks",
            "Chunks that nobody keeps and that stand yet, 0 with workers that are not at it. why: unsettled (a "
            "transaction is open for long), uncomputed (their roll-ups), marked (repairs to come), locked (somebody "
            "reads them), failed (see the log).",
            ["why"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
