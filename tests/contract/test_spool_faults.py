"""The spool before a real Kafka that is cut off, goes mute, or is killed: no jump, nothing lost or landed twice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.proxy import Mode, Proxy
from ingest.spool.spool import Spool
from runtime.errors import OutcomeUnknownError
from runtime.log import Log
from schemas.record import encode
from tests.contract.conftest import Broker, eventually, make, opened, run
from tests.spool_rig import SpoolRig, drained, land, record, spooled

COUNT = 20_000


@asynccontextmanager
async def spooling(broker: Broker, directory: Path) -> AsyncIterator[tuple[Proxy, Log, Spool]]:
    async with Proxy(broker.proxy_port, broker.port) as proxy:
        expected = await make(broker.place)
        async with opened(broker.place, expected, log_append_timeout_ms=500) as log:
            rig = SpoolRig(directory, broker.place.settings(log_append_timeout_ms=500), expected)
            async with rig.spool(log) as spool:
                yield proxy, log, spool


def test_a_mute_broker_leaves_the_outcome_open_and_the_copy_says_so(broker: Broker, tmp_path: Path) -> None:
    async def test() -> None:
        async with spooling(broker, tmp_path) as (proxy, log, spool):
            await log.append(0, encode(record(0)))
            proxy.set_mode(Mode.MUTE)
            error: Any = (await asyncio.gather(log.append(0, encode(record(1))), return_exceptions=True))[0]
            assert isinstance(error, OutcomeUnknownError)
            rescued = spool.rescue(0, record(1), encode(record(1)), error)
            assert rescued is not None
            await rescued
            proxy.set_mode(Mode.PASS)
            proxy.cut()
            await drained(spool)
            landed = await land(log)
            ids = [(one.record_id, one.in_doubt) for one in landed.records]
            assert ids[-1] == (record(1).record_id, True)
            assert {one for one, _ in ids} == {record(0).record_id, record(1).record_id}

    run(test())


def test_answers_lost_while_it_drains_repeat_windows_and_never_leave_a_jump(broker: Broker, tmp_path: Path) -> None:
    async def test() -> None:
        async with spooling(broker, tmp_path) as (proxy, log, spool):
            await log.append(0, encode(record(COUNT)))
            proxy.refuse = True
            proxy.cut()
            assert await asyncio.gather(log.append(0, b""), return_exceptions=True)
            assert log.trouble is not None
            await spooled(spool, COUNT)
            proxy.refuse = False
            for mode in (Mode.MUTE, Mode.BLACKHOLE, Mode.MUTE):
                proxy.set_mode(Mode.PASS)
                await asyncio.sleep(0.3)
                proxy.set_mode(mode)
                await asyncio.sleep(0.8)
                proxy.cut()
            proxy.set_mode(Mode.PASS)
            await drained(spool)
            landed = await land(log)
            assert sorted(set(landed.all)) == [*range(COUNT + 1)]
            assert len(landed.all) == COUNT + 1

    run(test())


def test_a_killed_broker_that_comes_back_has_everything_once(broker: Broker, tmp_path: Path) -> None:
    async def test() -> None:
        async with spooling(broker, tmp_path) as (_, log, spool):
            await log.append(0, encode(record(COUNT)))
            await broker.kill()
            await asyncio.gather(log.append(0, b""), return_exceptions=True)

            async def noticed() -> bool:
                return log.trouble is not None

            await eventually(noticed)
            await spooled(spool, COUNT)
            await broker.start()
            await drained(spool)
            assert (await land(log)).all == [*range(COUNT + 1)]

    run(test())
