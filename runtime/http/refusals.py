"""Connections that a listener turned away or gave up, as a metric: one family, whichever listeners a process has.

Left out: when that is (`server`, `handshakes`).
"""

from collections.abc import Callable
from typing import Final, Literal, get_args

from prometheus_client import Counter

Reason = Literal["connections", "address", "handshake", "head", "unread"]

#: Told of each of them.
Refused = Callable[[Reason], None]

REFUSED: Final = Counter(
    "sluice_http_refused_connections",
    "Connections that a listener (ingest, api, up, metrics) turned away or gave up: too many in all (connections) or"
    " of one address (address), no TLS in the end (handshake), a request's head not in time (head), answers left"
    " unread (unread).",
    ["listener", "reason"],
)


def count_refused(listener: str) -> Refused:
    """Count those of `listener`, a name from a closed set; all of its series are there from the start."""
    counters = {reason: REFUSED.labels(listener, reason) for reason in get_args(Reason)}
    return lambda reason: counters[reason].inc()


def uncounted(_: Reason) -> None:
    """For a listener that nobody watches."""
