"""Every metric of the workers. Labels are bounded: a partition, a path, a cause, never a device or organisation."""

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_ROWS: Final = (1, 10, 100, 1_000, 10_000, 50_000, 100_000, 200_000, 500_000)
_BYTES: Final = (1_000, 10_000, 100_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000)
_SECONDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_AGE_SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1_800.0, 7_200.0)


class LandingMetrics:
    """Metrics of the landing role, in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._count_readings(registry)
        self._count_records(registry)
        self._measure_batches(registry)
        self._count_failures(registry)
        self._count_leases(registry)

    def _count_readings(self, registry: CollectorRegistry) -> None:
        self.rows = Counter(
            "sluice_landing_rows_total",
            "Readings by what became of them. path: fresh (straight COPY), suspect (staged), text, none (quarantined "
            "or erased before either); outcome: stored, duplicate, conflict, quarantined, erased.",
            ["path", "outcome"],
            registry=registry,
        )
        self.refused = Counter(
            "sluice_landing_refused_total",
            "Readings refused at the door that were written to the quarantine.",
            registry=registry,
        )
        self.series_created = Counter("sluice_landing_series_created_total", "Series made.", registry=registry)
        self.series_cached = Gauge(
            "sluice_landing_series_cached", "Series kept in memory.", multiprocess_mode="livesum", registry=registry
        )

    def _count_records(self, registry: CollectorRegistry) -> None:
        self.records = Counter("sluice_landing_records_total", "Records landed.", registry=registry)
        self.undecodable = Counter(
            "sluice_landing_undecodable_total",
            "Records that cannot be read and were quarantined whole.",
            registry=registry,
        )
        self.rejected = Counter(
            "sluice_landing_rejected_records_total",
            "Records that the database refused for their content and that were quarantined whole.",
            registry=registry,
        )
        self.lost = Counter(
            "sluice_landing_lost_records_total",
            "Records that the log had deleted before they landed. Any is a loss of data.",
            registry=registry,
        )
        self.repeats = Counter(
            "sluice_landing_repeats_total",
            "Records that had landed before: drained or replayed again, or a request repeated under its name.",
            registry=registry,
        )
        self.spool_lost = Counter(
            "sluice_landing_spool_lost_records_total",
            "Records that a damaged spool could not give back. Any is a loss of data.",
            registry=registry,
        )
        self.lag = Gauge(
            "sluice_landing_lag_records",
            "Records of a partition that have not landed, as its holder sees it.",
            ["partition"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.waiting_for_upgrade = Gauge(
            "sluice_landing_waiting_for_upgrade",
            "Partitions that stand at a record of a newer version than this worker reads.",
            multiprocess_mode="livesum",
            registry=registry,
        )

    def _measure_batches(self, registry: CollectorRegistry) -> None:
        self.batch_rows = Histogram(
            "sluice_landing_batch_rows", "Readings of a transaction.", buckets=_ROWS, registry=registry
        )
        self.batch_bytes = Histogram(
            "sluice_landing_batch_bytes",
            "Bytes of a transaction's records in the log.",
            buckets=_BYTES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "sluice_landing_batch_seconds",
            "Time of a transaction, COMMIT included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.receipt_to_commit = Histogram(
            "sluice_landing_receipt_to_commit_seconds",
            "From arrival at the door to COMMIT, of the oldest record of each partition in a transaction.",
            buckets=_AGE_SECONDS,
            registry=registry,
        )

    def _count_failures(self, registry: CollectorRegistry) -> None:
        self.position_conflicts = Counter(
            "sluice_landing_position_conflicts_total",
            "Transactions given up because a position was not where it was expected.",
            registry=registry,
        )
        self.retries = Counter(
            "sluice_landing_retries_total",
            "Attempts given up and made again. cause: unavailable, contention, content, position, tombstones, "
            "log, database.",
            ["cause"],
            registry=registry,
        )

    def _count_leases(self, registry: CollectorRegistry) -> None:
        self.partitions_held = Gauge(
            "sluice_worker_partitions_held", "Partitions leased.", multiprocess_mode="livesum", registry=registry
        )
        self.assignments = Counter(
            "sluice_worker_assignments_total",
            "Changes of the partitions held. event: gained, lost, given_up.",
            ["event"],
            registry=registry,
        )
        self.lease_renewals = Counter(
            "sluice_worker_lease_renewals_total",
            "Renewals of all leases of this worker. outcome: renewed, failed.",
            ["outcome"],
            registry=registry,
        )
        self.sessions_ended = Counter(
            "sluice_worker_sessions_ended_total",
            "Database sessions of previous holders that had to be ended.",
            registry=registry,
        )


class QuarantineMetrics:
    """Metrics of the quarantine's bounds, in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.held = Gauge(
            "sluice_quarantine_held_rows",
            "Readings in quarantine, of all organisations, as the worker saw it that looked last.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.expired = Counter(
            "sluice_quarantine_expired_total",
            "Readings that left the quarantine because it was too full or they were too old.",
            registry=registry,
        )


class LedgerMetrics:
    """Metrics of the books, in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.readings = Gauge(
            "sluice_ledger_readings",
            "Readings received in this hour and the 24 before, of all organisations, by what the ledger says became "
            "of them: received, stored, duplicates, conflicts, quarantined, erased, replayed, discarded, expired, "
            "lost.",
            ["outcome"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.unaccounted = Gauge(
            "sluice_ledger_unaccounted_readings",
            "Of these, received less stored, duplicates, conflicts, quarantined and erased: all but 0 is a fault.",
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
        self.lost_records = Gauge(
            "sluice_ledger_lost_records",
            "Records known to be lost since the beginning, whose readings nobody can count. where: log, spool.",
            ["where"],
            multiprocess_mode="livemostrecent",
            registry=registry,
        )
