"""Thousands of hostile requests: none is a fault of ours, and a good device is served meanwhile.

Every request is made from a seed, so that a failure comes again. `sluice bench hostile` is the long form of this, on
the real parts. Left out: bodies and queries by themselves, which Hypothesis makes in the tests of the formats.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import pytest
import uvloop

from bench.attacks import Attacker, Stolen
from bench.hostile import HONEST, NO_METHOD
from tests.databases import Server
from tests.ingest_rig import Face, Installation, Tenant, install, measured, post_bytes
from tests.landing_rig import until

SEED = 20_261_121
ATTACKERS = 8
ATTACKS = 500
SILENCE_S = 0.05


@pytest.fixture(scope="module")
def fortress(
    timescaledb: Server, timescaledb_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    yield from install(timescaledb, timescaledb_template, tmp_path_factory.mktemp("hostile"))


async def attack(face: Face, attacker: Attacker, seen: Counter[int]) -> None:
    for _ in range(ATTACKS):
        raw = attacker.request()
        async with face.connect() as wire:
            with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(SILENCE_S):  # what is cut off has no answer before its time is over
                    cut = attacker.cut(raw)
                    await wire.send(raw[:cut])
                    await asyncio.sleep(attacker.pause_s())
                    await wire.send(raw[cut:])
                    while (reply := await wire.reply(to_head=raw.startswith(b"HEAD"))).status == 100:
                        pass
                seen[reply.status] += 1
                assert reply.status in HONEST, (reply, raw)
                assert attacker.secret not in reply.body, (reply, raw)


def faults(face: Face) -> dict[str, float]:
    """Answers of 5xx that the face counted, seen by the attackers or not."""
    face.service._publish()
    counted = [
        sample
        for metric in face.registry.collect()
        for sample in metric.samples
        if sample.name == "sluice_ingest_requests_total"
    ]
    statuses = {one.labels["status"]: one.value for one in counted}
    return {status: value for status, value in statuses.items() if status >= "500" and status != str(NO_METHOD)}


async def serve_good(face: Face, tenant: Tenant, stop: asyncio.Event) -> tuple[int, float]:
    """A device that sends a reading every few milliseconds; how many, and the most CPU that went by for one."""
    sent, longest_s = 0, 0.0
    async with face.connect() as wire:
        while not stop.is_set():
            began = time.process_time()  # what others take of the machine is not the attackers' doing
            reply = await wire.ask(post_bytes(tenant.token, measured(("co2", sent))))
            longest_s = max(longest_s, time.process_time() - began)
            assert (reply.status, reply.json()["accepted"]) == (202, 1)
            sent += 1
            await asyncio.sleep(0.005)
    return sent, longest_s


def test_no_hostile_request_is_a_fault_of_ours_or_anybody_elses(
    fortress: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        tenant, victim = await fortress.tenant(), await fortress.tenant()
        seen: Counter[int] = Counter()
        stop = asyncio.Event()
        async with fortress.face(wait_stored_s=0.01, http_body_timeout_s=0.5) as face:
            good = asyncio.create_task(serve_good(face, victim, stop))
            stolen = Stolen(tenant.token, tenant.gateway, tenant.api_key)
            attackers = [Attacker(SEED + number, stolen) for number in range(ATTACKERS)]
            await asyncio.gather(*(attack(face, attacker, seen) for attacker in attackers))
            stop.set()
            sent, longest_s = await good
            assert sent > 50
            assert longest_s < 2.0
            # On a machine that has much else to do, an answer may come after its attacker has left.
            assert sum(seen.values()) > 0.2 * ATTACKERS * ATTACKS
            assert {202, 400, 401, 403, 404, 405, 413, 415, 422} <= set(seen)
            values = [record.channels[0].unpack_values() for record in await face.records_of(victim.device)]
            assert values == [(float(number),) for number in range(sent)]
            assert faults(face) == {}
            await until(lambda: _quiet(face))

        for secret in (tenant.token, tenant.gateway, tenant.api_key, victim.token):
            assert secret[8:] not in caplog.text
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []

    with caplog.at_level("DEBUG"), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the roles run
        runner.run(asyncio.wait_for(test(), 240))


async def _quiet(face: Face) -> bool:
    return face.server.count() == 0 and face.service._room.taken == 0
