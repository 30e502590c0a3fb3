"""What the spool costs at the log port: appending while the log is away, and draining into it when it is back.

`pytest bench/test_spool.py --benchmark-only`. Each engine on its real part; Kafka is the one at SLUICE_LOG_URL, or
that of `deploy/local/services`. Left out: HTTP, and landing.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client import CollectorRegistry

from bench.test_ingest import Admit, body_of
from bench.test_log import PARTITIONS, TURN, Rig, _kafka_url
from ingest.formats import measurements_json
from ingest.metrics import IngestMetrics
from ingest.settings import SpoolSettings
from ingest.spool.spool import Spool
from runtime.clock import SystemClock
from runtime.log import Log, LogSettings
from schemas import record as records

RECORDS: Final = 50_000
BODY: Final = records.encode(Admit(measurements_json.decode(body_of(1)))().record)


class Away:
    """A real log that can be said to be away; the spool never asks it then."""

    def __init__(self, log: Log) -> None:
        self.trouble: str | None = None
        self._log = log
        self.partitions = log.partitions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


class SpoolRig:
    """A spool before a new log."""

    def __init__(self, url: str, directory: Path) -> None:
        self._rig = Rig(url)
        self.run = self._rig.run
        self.log = Away(self._rig.log)
        self.spool = self.run(self._make(directory))

    async def _make(self, directory: Path) -> Spool:
        log: Any = self.log
        spool = Spool(
            log=log,
            directory=directory,
            settings=SpoolSettings(),
            log_settings=LogSettings(),
            clock=SystemClock(),
            metrics=IngestMetrics(CollectorRegistry()),
        )
        await spool.start()
        return spool

    async def append(self, count: int = RECORDS) -> None:
        self.log.trouble = "away"
        futures = []
        for begin in range(0, count, TURN):
            futures += [self.spool.append(n % PARTITIONS, BODY) for n in range(begin, begin + TURN)]
            await asyncio.sleep(0)
        await asyncio.gather(*futures)

    async def drain(self) -> None:
        self.log.trouble = None
        while any(self.spool.holds(partition) for partition in range(PARTITIONS)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.run(self.spool.close())
        self._rig.close()


@pytest.fixture(params=["sqlite", "kafka"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SpoolRig]:
    rig = SpoolRig(f"sqlite:///{tmp_path}/log" if request.param == "sqlite" else _kafka_url(), tmp_path / "spool")
    yield rig
    rig.close()


def test_appending_50_000_records_while_the_log_is_away(benchmark: Any, tmp_path: Path) -> None:
    rig = SpoolRig(f"sqlite:///{tmp_path}/log", tmp_path / "spool")
    benchmark.pedantic(lambda: rig.run(rig.append()), setup=lambda: rig.run(rig.drain()), rounds=5, warmup_rounds=1)
    rig.close()


def test_draining_50_000_records(benchmark: Any, rig: SpoolRig) -> None:
    benchmark.pedantic(lambda: rig.run(rig.drain()), setup=lambda: rig.run(rig.append()), rounds=5, warmup_rounds=1)
