"""`sluice bench pipeline`: from a device's request to a committed row on the real parts, beside two yardsticks.

Readings of a fleet go end to end; then the same again is landed from a full log with nothing else to do; then single
readings. Everything acknowledged is counted in the database before a figure is given. Left out: how it is shown.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg

from bench.books import Books
from bench.errors import BenchError
from bench.load import Load, percentiles_ms, send
from bench.parts import Parts, Role, Workshop, progress, real_parts, workshop
from bench.registry import register
from bench.usage import Meter, cpu_s, free_port, memory_bytes
from bench.workload import INTERVAL_S, METRICS, Fleet, Round, in_lanes, json_post, shelly_get, single_post
from bench.yardsticks import Copied, CopyTable, bare_handler

TIMEOUT_S: Final = 600.0
SINGLES_WARM_UP: Final = 3_000
TRICKLE_SAMPLES: Final = 60
TRICKLE_PAUSE_S: Final = 0.15
TRICKLE_TIMEOUT_S: Final = 10.0
SINGLE_DEVICES_PER_CONNECTION: Final = 10
#: A tenth of the run, so that the broker has compiled what it runs most, and at least every device once.
WARM_UP_SHARE: Final = 10
SYSTEM: Final = ("ingest", "kafka", "worker", "postgresql")
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    readings: int
    readings_per_request: int
    connections: int
    processes: int
    series: int
    singles: int
    epoch_times: bool

    @property
    def devices(self) -> int:
        return self.series // len(METRICS)

    @property
    def requests(self) -> int:
        return self.readings // self.readings_per_request

    def check(self) -> None:
        """Raises `BenchError` for options that do not go together."""
        if self.series % len(METRICS) or self.devices < self.connections:
            raise BenchError(
                f"--series is a multiple of {len(METRICS)} (metrics a device), with a device a connection at least"
            )
        if self.readings % self.readings_per_request or self.requests < self.devices:
            raise BenchError("--readings is a multiple of --readings-per-request, with a request a device at least")


def measure(options: Options, services: Path) -> dict[str, Any]:
    """All figures, as plain values. Raises `BenchError` when a run cannot be made, or its books do not add up."""
    options.check()
    with real_parts(services) as parts:
        return asyncio.run(_measure(options, parts), loop_factory=None) if False else _run(options, parts)
