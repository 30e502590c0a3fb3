"""A landing worker as a process of its own, for tests that stop and kill one.

`python -m tests.landing_process` with a JSON object: the settings of database and log, and those of landing.
"""

import asyncio
import json
import signal
import sys

import uvloop

from deploy.generation import open_generation
from runtime.clock import SystemClock
from runtime.health import Health
from runtime.log import LogSettings
from runtime.logging import LoggingSettings, set_up_logging
from runtime.postgres import PostgresSettings, connect
from workers.landing.worker import run_worker
from workers.metrics import LandingMetrics
from workers.settings import LandingSettings


async def main() -> None:
    given = json.loads(sys.argv[1])
    postgres, log_settings = PostgresSettings(**given["postgres"]), LogSettings(**given["log"])
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    connection = await connect(postgres, role="sluice_reader", application="test")
    _, log = await open_generation(connection, log_settings, client_id="test-worker")
    await connection.close()
    await run_worker(
        postgres,
        LandingSettings(**given["landing"]),
        log,
        stop=stop,
        clock=SystemClock(),
        metrics=LandingMetrics(),
        health=Health(),
    )
    await log.close()


if __name__ == "__main__":
    set_up_logging(LoggingSettings())
    uvloop.run(main())
