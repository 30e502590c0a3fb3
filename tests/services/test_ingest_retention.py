"""Before the log deletes what has not landed: operators are told first, then readings are refused."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from deploy.database import connect_owner
from deploy.generation import ensure_generation, open_generation
from ingest.metrics import IngestMetrics
from ingest.retention import RetentionGuard
from runtime.log import LogSettings
from runtime.log.port import Log
from runtime.postgres import connect, open_pool
from tests.databases import Database
from tests.support import run

PARTITIONS = 2
RETENTION_H = 1


@asynccontextmanager
async def opened(database: Database, url: str) -> AsyncIterator[Log]:
    settings = LogSettings(log_url=url, log_retention_h=RETENTION_H)
    owner = await connect_owner(database.settings)
    await ensure_generation(owner, settings, PARTITIONS)
    _, log = await open_generation(owner, settings, client_id="test")
    await owner.close()
    try:
        yield log
    finally:
        await log.close()


async def told(log: Log, pool: Any, age_s: float) -> tuple[float | None, float | None, bool]:
    """What a guard says that refuses what is older: records told of, processes that refuse, whether it does."""
    registry = CollectorRegistry()
    guard = RetentionGuard(log, pool, age_s / 3600 / RETENTION_H, IngestMetrics(registry))
    await guard.check()
    names = ("sluice_ingest_expiring_records", "sluice_ingest_retention_refusing")
    expiring, refusing = (registry.get_sample_value(name) for name in names)
    return expiring, refusing, guard.trouble is not None


def test_operators_are_told_at_half_the_time_and_readings_refused_at_the_whole(
    database: Database, services: dict[str, str]
) -> None:
    async def test() -> None:
        async with opened(database, services["SLUICE_LOG_URL"]) as log:
            pool = await open_pool(database.settings, role="sluice_ingest", application="test")
            await asyncio.gather(*(log.append(partition, b"x") for partition in (0, 0, 1)))
            began = time.monotonic()
            await asyncio.sleep(3.0)  # records are told apart by their age alone
            nearly_twice = (time.monotonic() - began) * 1.9
            assert await told(log, pool, 60.0) == (0, 0, False)
            assert await told(log, pool, nearly_twice) == (3, 0, False)
            assert await told(log, pool, 1.0) == (3, 1, True)
            worker = await connect(database.settings, role="sluice_worker", application="test")
            await worker.execute("UPDATE log_positions SET position = 2 WHERE partition = 0")
            assert await told(log, pool, 1.0) == (1, 1, True)
            await worker.execute("UPDATE log_positions SET position = 1 WHERE partition = 1")
            assert await told(log, pool, 1.0) == (0, 0, False)
            await worker.close()
            await pool.close()

    run(test())
