"""`sluice bench faults` in short: the machinery and the faults that need whole roles, each for a few seconds.

Left out: what a fault costs (figures of a full run), and what `test_landing` does to a worker alone.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import pytest
import uvloop

from bench.errors import BenchError
from bench.faults import stage as stage_module
from bench.faults.catalogue import FAULTS, Fault
from bench.faults.run import Options, run_fault
from bench.faults.sender import Landing, Sender
from bench.faults.stage import DATABASE, Instance, Stage, open_stage, own_parts, watch
from bench.proxy import Proxy
from bench.usage import free_port

RATE = 3_000.0
FAULT_TIMEOUT_S = 600.0
#: Leases that end, and waits that double, on the scale of a short fault.
SHORT = {
    "SLUICE_LANDING_LEASE_TTL_S": "2",
    "SLUICE_LANDING_LEASE_RENEW_S": "0.2",
    "SLUICE_LANDING_RETRY_MAX_MS": "500",
    # Longer than recovery is waited for: it must not be what recovery rests on.
    "SLUICE_LANDING_TRANSACTION_TIMEOUT_S": "300",
    "SLUICE_LOG_APPEND_TIMEOUT_MS": "1000",
    "SLUICE_SHUTDOWN_TIMEOUT_MS": "5000",
}
END_OTHERS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""
OPTIONS = Options(seconds=5.0, hold=2.5, rate=RATE, tail=2.0, settings=SHORT, compares=False)


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
        "database-cut",
        "database-read-only",
        "database-refuses-content",
        "database-deadlock",
        "worker-kill",
        "newer-record-version",
        "undecodable-flood",
        "ingest-kill",
        "rolling-restart-ingest",
        "bridge-kill",
        "broker-restart",
        "mqtt-kafka-kill",
        "mqtt-worker-kill",
        "mqtt-database-kill",
    ],
)
def test_nothing_acknowledged_is_lost_or_doubled(name: str, instance: Instance, runner: asyncio.Runner) -> None:
    async def test() -> None:
        async with asyncio.timeout(FAULT_TIMEOUT_S):
            faulted = await run_fault(FAULTS[name], RATE, OPTIONS, instance)
        assert faulted.harm == [], (faulted, faulted.verdict.examples)
        assert faulted.verdict.acknowledged > RATE
        assert faulted.first_acknowledged_s is not None
        assert faulted.first_landed_s is not None

    runner.run(test())


def test_what_a_killed_broker_loses_is_counted_and_nothing_else_is_lost(
    instance: Instance, runner: asyncio.Runner
) -> None:
    """It had its sessions written down before; what came since is its own to lose."""
    faulted = runner.run(run_fault(FAULTS["broker-kill"], RATE, OPTIONS, instance))
    assert faulted.harm == [], (faulted, faulted.verdict.examples)
    verdict = faulted.verdict
    assert verdict.acknowledged > verdict.lost_by_broker
    assert verdict.stored + verdict.lost_by_broker >= verdict.acknowledged - verdict.quarantined


async def looked(watching: "asyncio.Task[None]", landing: Landing, times: int) -> None:
    while len(landing.moments) < times:
        assert not watching.done(), watching.exception()
        await asyncio.sleep(0.01)


def test_a_server_that_said_farewell_and_has_not_hung_up_yet_does_not_end_the_looks(
    instance: Instance, runner: asyncio.Runner
) -> None:
    """As each session of a killed server says it, a moment before it ends."""

    async def test(stage: Stage, proxy: Proxy, port: int) -> None:
        def url() -> str:
            place = urlsplit(instance.superuser_url(stage.database))
            return urlunsplit(place._replace(netloc=place.netloc.replace(f":{place.port}", f":{port}")))

        landing = Landing()
        watching = asyncio.create_task(watch(url, landing))
        await looked(watching, landing, 1)
        (first,) = proxy.links
        async with stage.superuser() as other:
            assert await other.fetchval(END_OTHERS) == 1
        await looked(watching, landing, len(landing.moments) + 2)
        assert first not in proxy.links
        watching.cancel()

    async def run() -> None:
        port = free_port()
        async with open_stage(instance, SHORT) as stage:
            target = urlsplit(instance.superuser_url(stage.database)).port
            assert target is not None
            async with Proxy(port, target) as proxy, asyncio.timeout(60):
                proxy.keeps_ended = True
                await test(stage, proxy, port)

    runner.run(run())


def test_a_look_that_never_comes_is_not_waited_for_without_end(
    instance: Instance, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with open_stage(instance, SHORT) as stage:
            async with stage.watched():
                await stage.looked()
                await instance.services("kill", DATABASE)
                with monkeypatch.context() as patched:
                    patched.setattr(stage_module, "LOOKED_TIMEOUT_S", 0.5)
                    with pytest.raises(BenchError, match="in vain for a look"):
                        await stage.looked()
                await instance.start(DATABASE)
                await stage.looked()
            with pytest.raises(BenchError, match="nobody looks any more"):
                await stage.looked()

    runner.run(run())


@asynccontextmanager
async def sabotage(stage: Stage, _: Sender) -> AsyncIterator[None]:
    """One row is deleted, one moved by a microsecond, one invented."""
    yield
    some = "SELECT series_id, ts FROM readings WHERE quality = 0 ORDER BY ts LIMIT 1"
    async with stage.superuser() as connection:
        for change in (
            f"DELETE FROM readings WHERE (series_id, ts) IN ({some})",
            f"UPDATE readings SET ts = ts + interval '1 us' WHERE (series_id, ts) IN ({some})",
            f"INSERT INTO readings SELECT series_id, 0, ts + interval '2 us', -1 FROM ({some}) s",
        ):
            await connection.execute(change)


def test_what_is_missing_moved_or_invented_is_found(instance: Instance, runner: asyncio.Runner) -> None:
    fault = Fault("sabotage", sabotage, "nothing says so", says_after=True)
    faulted = runner.run(run_fault(fault, RATE, OPTIONS, instance))
    assert (faulted.verdict.lost, faulted.verdict.doubled) == (1, 2)
    assert "never sent" in "".join(faulted.verdict.examples)
    assert faulted.harm == ["1 lost", "2 doubled", "the logs do not tell"]
