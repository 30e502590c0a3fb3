"""Every metric of the API. Labels are bounded: a route and a status, never a device, organisation or key."""

from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_SECONDS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class ApiMetrics:
    """Metrics of the API role, in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "sluice_api_requests_total",
            "Requests by route and HTTP status; `unknown` for a path that leads nowhere, `malformed` for no HTTP.",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "sluice_api_request_seconds",
            "From the request's head to the whole answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "sluice_api_requests_in_flight",
            "Requests being answered.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.readings = Counter("sluice_api_readings_total", "Readings handed out.", registry=registry)
        self.live_listeners = Gauge(
            "sluice_api_live_listeners",
            "Streams of readings that are open.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.live_events = Counter("sluice_api_live_events_total", "Events with readings sent.", registry=registry)
        self.live_queued_bytes = Gauge(
            "sluice_api_live_queued_bytes",
            "Waiting for listeners to read them.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.live_ended = Counter(
            "sluice_api_live_ended_total",
            "Streams that ended: `gone` by the client, `slow` for one that did not read, or by what `end` told it.",
            ["reason"],
            registry=registry,
        )
        self.live_refused = Counter(
            "sluice_api_live_refused_total",
            "Streams that were not begun. reason: process (as many streams or devices as it may have), organisation "
            "(as many streams here), unavailable (the log cannot be read, or the process ends).",
            ["reason"],
            registry=registry,
        )
        for reason in ("process", "organisation", "unavailable"):
            self.live_refused.labels(reason)  # the first counts, too
        self.live_ended.labels("slow")
        self.live_lag = Gauge(
            "sluice_api_live_lag_records",
            "Records that have landed and of which listeners were not told yet, those left out who catch up.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.live_delay = Histogram(
            "sluice_api_live_delay_seconds",
            "From a record's arrival at ingest to its event, of the last record of each turn.",
            buckets=_SECONDS,
            registry=registry,
        )
