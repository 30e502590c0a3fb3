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
