"""Every metric of the ingest role.

The hot path only adds to plain numbers; `publish` hands them to the Prometheus client once a second, which costs a
lock and, with several processes, a write to a mapped file a value. Left out: how metrics are served.
"""

from bisect import bisect_left
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_REQUESTS: Final = Counter(
    "sluice_ingest_requests", "Ingest requests answered, by format and status.", ["format", "status"]
)
_READINGS: Final = Counter(
    "sluice_ingest_readings",
    "Readings of answered requests: accepted, or refused with a reason.",
    ["outcome", "reason"],
)
_BODY_BYTES: Final = Counter("sluice_ingest_body_bytes", "Bytes of request bodies as they came, packed or not.")
_RECORDS: Final = Counter("sluice_ingest_records", "Records given to the log, by what became of them.", ["outcome"])
_APPEND_SECONDS: Final = Histogram(
    "sluice_ingest_append_seconds", "From giving a record to the log until it is durable.", buckets=_SECONDS
)
_LOOKUPS: Final = Counter(
    "sluice_ingest_credential_lookups", "Uses of a credential: known, known as unknown, or asked for.", ["result"]
)
_IN_FLIGHT: Final = Gauge(
    "sluice_ingest_in_flight_bytes", "Bytes of request bodies being worked on.", multiprocess_mode="livesum"
)
_QUEUED: Final = Gauge(
    "sluice_ingest_log_queued_bytes",
    "Bytes of records whose durability is not known yet.",
    multiprocess_mode="livesum",
)
_CONNECTIONS: Final = Gauge("sluice_ingest_connections", "Open client connections.", multiprocess_mode="livesum")


class _Tally:
    """Counts by label values since they were last published. Label values come from closed sets."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, labels: tuple[str, ...], amount: int = 1) -> None:
        self._counts[labels] = self._counts.get(labels, 0) + amount

    def publish(self) -> None:
        counts, self._counts = self._counts, {}
        for labels, amount in counts.items():
            (self._counter.labels(*labels) if labels else self._counter).inc(amount)


class _Lookups(_Tally):
    def hit(self) -> None:
        self.add(("known",))

    def hit_unknown(self) -> None:
        self.add(("known_as_unknown",))

    def miss(self) -> None:
        self.add(("asked",))


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


REQUESTS: Final = _Tally(_REQUESTS)
READINGS: Final = _Tally(_READINGS)
BODY_BYTES: Final = _Tally(_BODY_BYTES)
RECORDS: Final = _Tally(_RECORDS)
APPEND_SECONDS: Final = _Durations(_APPEND_SECONDS)
CREDENTIAL_LOOKUPS: Final = _Lookups(_LOOKUPS)


def publish(*, in_flight_bytes: int, queued_bytes: int, connections: int) -> None:
    """Hand everything over to the Prometheus client; called once a second and before the end."""
    for tally in (REQUESTS, READINGS, BODY_BYTES, RECORDS, CREDENTIAL_LOOKUPS):
        tally.publish()
    APPEND_SECONDS.publish()
    _IN_FLIGHT.set(in_flight_bytes)
    _QUEUED.set(queued_bytes)
    _CONNECTIONS.set(connections)
