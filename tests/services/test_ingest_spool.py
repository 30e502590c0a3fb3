"""The ingest face while the log cannot be reached: what it acknowledges, and what its receipts say."""

import asyncio
import os
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ingest.receipts import Place, Receipt
from runtime.errors import OutcomeUnknownError, OverloadedError, UnavailableError
from tests.ingest_rig import Face, Installation, Reply, Tenant, measured
from tests.landing_rig import until
from tests.services.test_ingest_faults import Partial, locked, spread, told_to_retry
from tests.spool_rig import Faulty
from tests.support import run

ONE = measured(("temperature", 21.5))
NONE_OF = {"duplicates": 0, "conflicts": 0, "quarantined": 0}


def durable(reply: Reply) -> str:
    assert reply.status == 202, reply.body
    return str(reply.json()["durable"])


async def cut_over(face: Face) -> None:
    spool = face.service._keeper._spool
    assert spool is not None

    async def left() -> bool:
        return not any(spool.holds(partition) for partition in range(face.log.partitions))

    await until(left)


async def asked(face: Face, tenant: Tenant, receipt: str) -> Any:
    reply = await face.get(f"/v1/receipts/{receipt}", tenant.token)
    assert reply.status == 200
    return {name: value for name, value in reply.json().items() if name != "receipt"}


async def move_on(installation: Installation, place: Place, to: int) -> None:
    """As landing does."""
    await installation.superuser(
        "INSERT INTO spool_positions (spool, partition, next) VALUES ($1, $2, $3)"
        " ON CONFLICT (spool, partition) DO UPDATE SET next = excluded.next",
        UUID(bytes=place.spool),
        place.partition,
        to,
    )


def test_while_the_log_is_away_requests_are_acknowledged_and_then_drained_in_order(
    installation: Installation, tmp_path: Path
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            async with installation.face(log=log, spool=tmp_path) as face:
                assert durable(await face.post(tenant.token, measured(("co2", 0)))) == "log"
                log.trouble = "away"
                for number in range(1, 20):
                    assert durable(await face.post(tenant.token, measured(("co2", number)))) == "spool"
                assert face.service.trouble is None
                log.trouble = None
                await cut_over(face)
                assert durable(await face.post(tenant.token, measured(("co2", 20)))) == "log"
                found = await face.records_of(tenant.device)
                values = [value for one in found for channel in one.channels for value in channel.unpack_values()]
                assert values == list(range(21))
                assert [one.origin is not None for one in found] == [False] + [True] * 19 + [False]

                async def told() -> bool:  # once a second
                    return face.counted("sluice_ingest_spool_records_total", outcome="drained") == 19

                await until(told)

    run(test())


def test_a_spool_s_end_is_said_before_its_file_is_deleted(installation: Installation, tmp_path: Path) -> None:
    async def ended(file: str) -> bool:
        spool = UUID(file.removesuffix(".spool"))
        return bool(await installation.superuser("SELECT FROM spool_ends WHERE spool = $1", spool))

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            log.trouble = "away"
            async with installation.face(log=log, spool=tmp_path) as face:
                assert durable(await face.post(tenant.token, ONE)) == "spool"
            (file,) = (name for name in os.listdir(tmp_path) if name.endswith(".spool"))
            assert not await ended(file)
            log.trouble = None
            async with installation.face(log=log, spool=tmp_path) as face:
                await cut_over(face)
        assert await ended(file)
        assert os.listdir(tmp_path) == []

    run(test())


def test_a_log_that_only_fails_while_it_is_used_is_no_different(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with (
            installation.open_log(log_append_timeout_ms=100) as log,
            installation.face(log=log, spool=tmp_path) as face,
        ):
            assert durable(await face.post(tenant.token, ONE)) == "log"
            with locked(installation, face):
                replies = await asyncio.gather(*(face.post(tenant.token, ONE) for _ in range(20)))
                assert {durable(reply) for reply in replies} == {"spool"}
                assert durable(await face.post(tenant.token, ONE)) == "spool"
            await cut_over(face)
            found = await face.records_of(tenant.device)
            assert len({one.record_id for one in found}) == 22

    run(test())


@pytest.mark.parametrize(
    ("error", "in_doubt"), [(OutcomeUnknownError("late"), True), (UnavailableError("no"), False)]
)
def test_what_the_log_did_not_take_is_spooled_under_the_same_record_id(
    installation: Installation, tmp_path: Path, error: Exception, in_doubt: bool
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log:
            good, _ = await spread(installation, tenant, log)
            failing = dict.fromkeys(range(log.partitions), error)
            partial: Any = Partial(log, failing, at_once=False)
            async with installation.face(log=partial, spool=tmp_path) as face:
                batch = [measured(("co2", 1), device=good), measured(("co2", 2), device="fridge")]
                reply = await face.post(tenant.gateway, batch)
                assert durable(reply) == "spool"
                assert reply.json()["accepted"] == 2
                await cut_over(face)
                (found,) = await face.records_of(tenant.device)
                assert found.in_doubt is in_doubt
                assert found.record_id.startswith(face.service._stamps._record_prefix)

    run(test())


def test_overload_of_a_log_that_is_well_stays_503(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log:
            failing: dict[int, Exception] = {n: OverloadedError("full") for n in range(log.partitions)}
            partial: Any = Partial(log, failing, at_once=True)
            async with installation.face(log=partial, spool=tmp_path) as face:
                assert told_to_retry(await face.post(tenant.token, ONE), "overloaded")

    run(test())


def test_a_full_spool_is_503_and_what_was_acknowledged_stays(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        large = {"measurements": [{"type": "state", "value": "x" * 900}] * 100}
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            async with installation.face(log=log, spool=tmp_path, spool_bytes_max=150_000) as face:
                log.trouble = "away"
                for _ in range(2):
                    assert durable(await face.post(tenant.token, large)) == "spool"
                assert told_to_retry(await face.post(tenant.token, ONE), "log_unavailable")
                assert str(face.service.trouble).startswith("away; ")
                log.trouble = None
                await cut_over(face)
                assert durable(await face.post(tenant.token, ONE)) == "log"
                assert sum(one.accepted for one in await face.records_of(tenant.device)) == 201

    run(test())


def test_with_a_disk_that_refuses_it_is_503(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        (tmp_path / "file").write_text("in the way")
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            async with installation.face(log=log, spool=tmp_path / "file") as face:
                log.trouble = "away"
                assert told_to_retry(await face.post(tenant.token, ONE), "log_unavailable")
                assert str(face.service.trouble).startswith("away; ")

    run(test())


def test_what_fits_the_log_fits_the_spool_s_drain(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            async with installation.face(log=log, spool=tmp_path) as face:
                log.trouble = "away"
                low, high = 100_000, log.body_bytes_max + 1_000
                while high - low > 1:
                    size = (low + high) // 2
                    sizes = [1_000] * (size // 1_000) + [size % 1_000]
                    texts = [{"type": "state", "value": "x" * one} for one in sizes if one]
                    reply = await face.post(tenant.token, {"measurements": texts})
                    assert reply.status in (202, 413)
                    low, high = (size, high) if reply.status == 202 else (low, size)
                assert low > log.body_bytes_max * 0.9
                log.trouble = None
                await cut_over(face)

    run(test())


# ---------------------------------------------------------------- receipts


def test_the_receipt_of_a_spooled_record_tells_what_landed(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            async with installation.face(log=log, spool=tmp_path) as face:
                log.trouble = "away"
                receipts = [
                    (await face.post(tenant.token, measured(("co2", 1), ("co2", 2)))).json()["receipt"]
                    for _ in range(3)
                ]
                places = [face.service._receipts.read(one, tenant.organisation.bytes).places[0] for one in receipts]
                assert [(place.position, place.accepted) for place in places] == [(0, 2), (1, 2), (2, 2)]
                assert await asked(face, tenant, receipts[0]) == {"state": "pending", "accepted": 2}
                await move_on(installation, places[0], 1)
                landed = {"state": "landed", "accepted": 2, "stored": 2} | NONE_OF
                assert await asked(face, tenant, receipts[0]) == landed
                assert await asked(face, tenant, receipts[1]) == {"state": "pending", "accepted": 2}
                await move_on(installation, places[1], 3)
                await installation.superuser(
                    "INSERT INTO outcomes (source, partition, position, organisation_id, received_at, duplicates)"
                    " VALUES ($1, $2, 1, $3, now(), 1)",
                    UUID(bytes=places[1].spool), places[1].partition, tenant.organisation,
                )  # fmt: skip
                await installation.superuser(
                    "INSERT INTO spool_losses (spool, partition, first_sequence, end_sequence) VALUES ($1, $2, 2, 3)",
                    UUID(bytes=places[2].spool),
                    places[2].partition,
                )
                told = await asked(face, tenant, receipts[1])
                assert (told["stored"], told["duplicates"]) == (1, 1)
                told = await asked(face, tenant, receipts[2])
                assert (told["stored"], told["lost"]) == (0, 2)
                log.trouble = None
                await cut_over(face)

    run(test())


def test_a_receipt_may_name_the_log_and_several_spools(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(spool=tmp_path) as face:
            receipts = face.service._receipts
            places = [Place(1, 10, 3), Place(2, 11, 4, b"a" * 16), Place(3, 2**40, 5, b"b" * 16), Place(0, 1, 1)]
            receipt = Receipt(face.log.source.bytes, tenant.organisation.bytes, places)
            assert receipts.read(receipts.make(receipt), tenant.organisation.bytes) == receipt

    run(test())


def test_who_waits_is_told_when_a_spooled_record_has_landed(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as real:
            log: Any = Faulty(real)
            async with installation.face(log=log, spool=tmp_path) as face:
                log.trouble = "away"
                first = (await face.post(tenant.token, ONE)).json()["receipt"]
                place = face.service._receipts.read(first, tenant.organisation.bytes).places[0]
                waiting = asyncio.create_task(face.post(tenant.token, ONE, Prefer="wait=stored"))

                async def spooled() -> bool:
                    return "2 records" in str(face.service._keeper._spool.note)  # type: ignore[union-attr]

                await until(spooled)
                await move_on(installation, place, 2)
                reply = await waiting
                assert (reply.status, reply.json()["stored"], reply.json()["durable"]) == (200, 1, "spool")
                log.trouble = None
                await cut_over(face)

    run(test())
