"""Every metric of the ingest role.

The hot path only adds to plain numbers; `publish` hands them to the Prometheus client once a second, which costs a
lock and, with several processes, a write to a mapped file a value. Left out: how metrics are served.
"""

from bisect import bisect_left
from typing import Final, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Tally:
    """Counts by label values since they were last published."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._counts: dict[tuple[str | int, ...], int] = {}

    def add(self, labels: tuple[str | int, ...], amount: int = 1) -> None:
        self._counts[labels] = self._counts.get(labels, 0) + amount

    def publish(self) -> None:
        counts, self._counts = self._counts, {}
        for labels, amount in counts.items():
            (self._counter.labels(*labels) if labels else self._counter).inc(amount)


class _Durations:
    """Durations since they were last published, bounded by what a second can hold."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sums = [0.0] * (len(_SECONDS) + 1)

    def observe(self, seconds: float) -> None:
        bucket = bisect_left(_SECONDS, seconds)
        self._counts[bucket] += 1
        self._sums[bucket] += seconds

    def publish(self) -> None:
        counts, sums = self._counts, self._sums
        self._counts, self._sums = [0] * len(counts), [0.0] * len(sums)
        for bucket, (count, total) in enumerate(zip(counts, sums, strict=True)):
            if count:
                # The client has no call for many observations at once; one by one they took 2 % of a busy core.
                self._histogram._buckets[bucket].inc(count)
                self._histogram._sum.inc(total)


class IngestMetrics:
    """Metrics of the ingest role, in `registry`. Label values come from closed sets, never from a device."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._published: list[_Tally | _Durations] = []
        self._declare_requests()
        self._declare_outcomes()
        self._declare_load()
        self._declare_spool()
        self._declare_paced()
        self._declare_dangers()
        self.connections = self._gauge("sluice_ingest_connections", "Open client connections.")

    def publish(self) -> None:
        """Hand over what was added since the last time; called once a second and before the end."""
        for one in self._published:
            one.publish()

    # ------------------------------------------------------------ what there is

    def _declare_requests(self) -> None:
        self.requests = self._tally(
            "sluice_ingest_requests",
            "Requests answered, by route (ingest, shelly, receipt, none) and HTTP status.",
            "route",
            "status",
        )
        self.readings = self._tally(
            "sluice_ingest_readings",
            "Readings of answered requests: accepted, or refused with the reason that the client was told.",
            "outcome",
            "reason",
        )
        self.body_bytes = self._tally("sluice_ingest_body_bytes", "Bytes of request bodies, unpacked.")

    def _declare_outcomes(self) -> None:
        self.records = self._tally(
            "sluice_ingest_records",
            "Records given to the log: durable, not_written for certain, or unknown.",
            "outcome",
        )
        self.credential_lookups = self._tally(
            "sluice_ingest_credential_lookups",
            "Uses of a credential: known, known_as_unknown, or asked for in the database.",
            "result",
        )
        self.replays = self._tally(
            "sluice_ingest_replays",
            "Quarantined readings taken up for a replay: durable, refused again, not_written for certain, or "
            "unknown; the last two are taken up again.",
            "outcome",
        )
        self.append_seconds = self._durations(
            "sluice_ingest_append_seconds", "From giving a request's records to the log until all are durable."
        )
        self.limited = self._tally(
            "sluice_ingest_limited_requests",
            "Requests answered 429, by the limit (requests_per_minute, readings_per_minute, bytes_per_day) and"
            " whose it is (device, gateway, organisation, address).",
            "limit",
            "scope",
        )

    def _declare_load(self) -> None:
        self.loop_lag_seconds = self._durations(
            "sluice_ingest_loop_lag_seconds",
            "How late the event loop was, ten times a second: what every request waits before it is looked at.",
        )
        self.overloaded = self._gauge(
            "sluice_ingest_overloaded",
            "Processes that answer 503 because their event loop is late (SLUICE_OVERLOAD_LAG_MS).",
        )
        self.in_flight_bytes = self._gauge(
            "sluice_ingest_in_flight_bytes", "Bytes of request bodies being worked on."
        )
        self.log_queued_bytes = self._gauge(
            "sluice_ingest_log_queued_bytes", "Bytes of records whose durability is not known yet."
        )

    def _declare_spool(self) -> None:
        self.spooled = self._tally(
            "sluice_ingest_spool_records",
            "Records of the spool: appended, drained into the log, or lost in a damaged file and declared so.",
            "outcome",
        )
        self.spool_damaged_files = Counter(
            "sluice_ingest_spool_damaged_files",
            "Spool files that were found damaged and set aside.",
            registry=self._registry,
        )
        self.spool_depth_records = self._gauge(
            "sluice_ingest_spool_depth_records", "Records in spools that have not been drained yet."
        )
        self.spool_depth_bytes = self._gauge(
            "sluice_ingest_spool_depth_bytes", "Their bytes; SLUICE_SPOOL_BYTES_MAX bounds them per process."
        )
        self.spool_age_seconds = self._gauge(
            "sluice_ingest_spool_age_seconds",
            "Since the oldest of them was received; SLUICE_SPOOL_AGE_MAX_S bounds it.",
            mode="livemax",
        )
        self.spool_partitions = self._gauge(
            "sluice_ingest_spool_partitions",
            "Partitions whose new records go through a spool, added up over processes.",
        )

    def _declare_paced(self) -> None:
        self.paced = self._tally(
            "sluice_ingest_paced_records",
            "Records of the paced lane: accepted though a limit was exceeded, drained into the log when it"
            " permitted them, or lost in a damaged file and declared so.",
            "outcome",
        )
        self.paced_depth_records = self._gauge(
            "sluice_ingest_paced_depth_records", "Records in the paced lane that wait until limits permit them."
        )
        self.paced_depth_bytes = self._gauge(
            "sluice_ingest_paced_depth_bytes", "Their bytes; SLUICE_PACED_BYTES_MAX bounds them per process."
        )
        self.paced_age_seconds = self._gauge(
            "sluice_ingest_paced_age_seconds",
            "Since the oldest of them was received; who is later than SLUICE_PACED_AGE_MAX_S gets no more in.",
            mode="livemax",
        )
        self.paced_senders = self._gauge(
            "sluice_ingest_paced_senders",
            "Devices, and sites with gateways, that have a backlog there, added up over processes.",
        )

    def _declare_dangers(self) -> None:
        self.registry_age_seconds = self._gauge(
            "sluice_ingest_registry_age_seconds",
            "Since changes of credentials were last read; SLUICE_CREDENTIAL_GRACE_S bounds how long that may be.",
            mode="livemax",
        )
        self.expiring_records = self._gauge(
            "sluice_ingest_expiring_records",
            "Records that have not landed though half of the time is over after which readings are refused"
            " (SLUICE_LOG_RETENTION_SHARE of the log's retention).",
            mode="livemax",
        )
        self.retention_refusing = self._gauge(
            "sluice_ingest_retention_refusing",
            "Processes that refuse readings (503) because the log is about to delete what has not landed.",
        )

    # ------------------------------------------------------------ how it is kept

    def _tally(self, name: str, what: str, *labels: str) -> _Tally:
        tally = _Tally(Counter(name, what, labels, registry=self._registry))
        self._published.append(tally)
        return tally

    def _durations(self, name: str, what: str) -> _Durations:
        durations = _Durations(Histogram(name, what, buckets=_SECONDS, registry=self._registry))
        self._published.append(durations)
        return durations

    def _gauge(self, name: str, what: str, mode: Literal["livesum", "livemax"] = "livesum") -> Gauge:
        """Over several processes, the sum of what the living ones say, or the most that one does."""
        return Gauge(name, what, multiprocess_mode=mode, registry=self._registry)
