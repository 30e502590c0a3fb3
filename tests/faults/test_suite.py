"""`sluice bench faults` in short: the machinery and the faults that need whole roles, each for a few seconds.

Left out: what a fault costs (figures of a full run), and what `test_landing` does to a worker alone.
"""

import asyncio
from collections.abc import Iterator

import pytest
import uvloop

from bench.faults.catalogue import FAULTS
from bench.faults.run import Options, run_fault
from bench.faults.stage import Instance, own_parts

RATE = 3_000.0
FAULT_TIMEOUT_S = 180.0
#: Leases that end, and waits that double, on the scale of a short fault.
SHORT = {
    "SLUICE_LANDING_LEASE_TTL_S": "2",
    "SLUICE_LANDING_LEASE_RENEW_S": "0.2",
    "SLUICE_LANDING_RETRY_MAX_MS": "500",
    "SLUICE_LOG_APPEND_TIMEOUT_MS": "1000",
}
OPTIONS = Options(seconds=7.0, hold=3.0, rate=RATE, settings=SHORT)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner


@pytest.fixture(scope="module")
def instance(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Kafka and TimescaleDB of the suite's own: it kills them."""
    parts = own_parts(tmp_path_factory.mktemp("parts"))
    yield runner.run(parts.__aenter__())
    runner.run(parts.__aexit__(None, None, None))


@pytest.mark.parametrize(
    "name",
    [
        "kafka-kill",
        "kafka-away-at-start",
        "database-kill",
        "database-read-only",
        "database-refuses-content",
        "database-deadlock",
        "worker-kill",
        "newer-record-version",
        "undecodable-flood",
        "ingest-kill",
        "rolling-restart-ingest",
    ],
)
def test_nothing_acknowledged_is_lost_or_doubled(name: str, instance: Instance, runner: asyncio.Runner) -> None:
    async def test() -> None:
        async with asyncio.timeout(FAULT_TIMEOUT_S):
            faulted = await run_fault(FAULTS[name], RATE, OPTIONS, instance)
        assert faulted.harm == [], faulted
        assert faulted.verdict.acknowledged > RATE
        assert faulted.first_acknowledged_s is not None
        assert faulted.first_landed_s is not None

    runner.run(test())
