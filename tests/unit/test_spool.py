"""The spool beside a real log in a file: what it takes, in which order it drains, what it survives, where it ends."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ingest.spool.files import Claim
from ingest.spool.spool import Kept, Spool
from runtime.clock import ManualClock
from runtime.errors import OutcomeUnknownError, OverloadedError, UnavailableError
from runtime.log.sqlite_store import CHUNK_BYTES_MAX
from schemas.record import LATE_VERSION, PG_EPOCH_US, decode, encode
from tests.landing_rig import until
from tests.spool_rig import PARTITIONS, Faulty, SpoolRig, drained, land, record, spooled
from tests.support import file_size_limit, run

AWAY = "gone, as the test has it"

# A process that spools records while its log is away, says so, and waits to be killed, or is while it drains them.
SPOOLER = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.spool_rig import SpoolRig, spooled
from runtime.log import Expected, LogSettings
from uuid import UUID

async def main(directory, source, identity, partitions, count, drain):
    expected = Expected(UUID(source), "log", identity, int(partitions))
    rig = SpoolRig(Path(directory), LogSettings(log_url=f"sqlite:///{directory}/log"), expected)
    async with rig.log() as log:
        log.trouble = "away"
        async with rig.spool(log) as spool:
            await spooled(spool, int(count))
            print("spooled", flush=True)
            log.trouble = None if drain == "drain" else "away"
            while not spool._drained:
                await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:]))
"""


async def left_behind(rig: SpoolRig, count: int, *, drain: bool = False) -> None:
    """A process spools so many records and is killed; with `drain` on the way of bringing them into the log."""
    expected = rig.expected
    arguments = [
        str(rig.directory),
        str(expected.source),
        expected.identity,
        str(PARTITIONS),
        str(count),
        "drain" * drain,
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SPOOLER, *arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"spooled\n"
    if not drain:
        os.kill(process.pid, signal.SIGKILL)
    assert await process.wait() == -signal.SIGKILL


def by_partition(count: int) -> dict[int, list[int]]:
    return {partition: list(range(partition, count, PARTITIONS)) for partition in range(PARTITIONS)}


# ---------------------------------------------------------------- the way of a record


def test_what_was_spooled_is_drained_in_order_and_the_log_is_used_again(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            kept = await spooled(spool, 20_000)
            assert kept[::PARTITIONS] == [Kept(kept[0].spool, sequence) for sequence in range(5_000)]
            assert "20000 records of 4 partitions" in str(spool.note)
            log.trouble = None
            await drained(spool)
            assert str(spool.note) == "None"
            landed = await land(log)
            assert landed.numbers == by_partition(20_000)
            assert {one.version for one in landed.records} == {LATE_VERSION}
            assert not any(one.in_doubt for one in landed.records)
        assert rig.files() == []

    run(test())


def test_nothing_is_made_on_disk_while_the_log_is_well(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log):
            assert rig.files() == []

    run(test())


async def send(spool: Spool, log: Faulty, number: int) -> None:
    """As the ingest face does."""
    partition, body = number % PARTITIONS, encode(record(number))
    if log.trouble is not None or spool.holds(partition):
        await spool.append(partition, body)
        return
    try:
        await log.append(partition, body)
    except (UnavailableError, OutcomeUnknownError, OverloadedError) as error:
        rescued = spool.rescue(partition, record(number), body, error)
        assert rescued is not None
        await rescued


async def keep_sending(spool: Spool, log: Faulty, lane: int, stop: asyncio.Event, sent: list[int]) -> None:
    """A device that sends one record after the other, each acknowledged before the next."""
    for number in range(lane, 1_000_000_000, 64):
        await send(spool, log, number)
        sent.append(number)
        if stop.is_set():
            return


def test_a_steady_load_is_cut_over_without_loss_and_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            stop = asyncio.Event()
            sent: list[list[int]] = [[] for _ in range(64)]
            devices = [asyncio.create_task(keep_sending(spool, log, lane, stop, sent[lane])) for lane in range(64)]

            async def more(count: int) -> None:
                enough = sum(map(len, sent)) + count

                async def came() -> bool:
                    return sum(map(len, sent)) >= enough

                await until(came)

            for _ in range(3):
                await more(200)
                log.trouble = AWAY
                await more(2_000)
                assert all(spool.holds(partition) for partition in range(PARTITIONS))
                log.trouble = None
                await drained(spool)  # although nobody stops sending
            stop.set()
            await asyncio.gather(*devices)
            await drained(spool)
            landed = await land(log)
            assert landed.all == sorted(chain(*sent))
            for lane in range(64):
                found = [number for number in landed.numbers[lane % PARTITIONS] if number % 64 == lane]
                assert found == sent[lane]
            assert len({one.origin is None for one in landed.records}) == 2

    run(test())


@pytest.mark.parametrize(
    "failures",
    [
        (UnavailableError,),
        (OutcomeUnknownError,),
        (OverloadedError, None, OutcomeUnknownError, OutcomeUnknownError, UnavailableError),
    ],
)
def test_a_window_that_fails_is_sent_again_before_any_later_one(tmp_path: Path, failures: tuple[Any, ...]) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            await spooled(spool, 20_000)
            log.failures = islice(cycle((*failures, None)), 30)
            log.trouble = None
            await drained(spool)
            landed = await land(log)  # fails at a jump
            assert landed.numbers == by_partition(20_000)
            assert (landed.repeats > 0) == (OutcomeUnknownError in failures)

    run(test())


def test_a_record_that_may_stand_in_the_log_is_spooled_with_its_id_and_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            for number, error in enumerate((OutcomeUnknownError("?"), UnavailableError("no"))):
                kept = spool.rescue(0, record(number), encode(record(number)), error)
                assert kept is not None
                await kept
            await drained(spool)
            landed = await land(log)
            assert [(one.record_id, one.in_doubt) for one in landed.records] == [
                (record(0).record_id, True),
                (record(1).record_id, False),
            ]

    run(test())


def test_overload_is_no_reason_to_spool_unless_the_log_is_in_trouble(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            one = record(0)
            assert spool.rescue(0, one, encode(one), OverloadedError("full")) is None
            log.trouble = AWAY
            kept = spool.rescue(0, one, encode(one), OverloadedError("full"))
            assert kept is not None
            assert (await kept).position == 0

    run(test())


def test_what_waits_for_the_cut_over_is_spooled_when_that_fails(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            await spooled(spool, 4)
            log.failures = repeat(UnavailableError, 8)
            log.trouble = None
            kept = await spooled(spool, 4, first=4)
            assert [one.position for one in kept] == [1, 1, 1, 1]
            await drained(spool)
            assert (await land(log)).numbers == by_partition(8)

    run(test())


# ---------------------------------------------------------------- the next process


def test_spools_of_earlier_generations_are_drained_and_those_of_others_are_left_alone(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log:
            log.trouble = AWAY
            for place, first in (("earlier", 0), ("another", 100)):
                async with rig.spool(log, directory=place) as spool:
                    await spooled(spool, 100, first=first)
            log.trouble = None
            async with rig.spool(log, elders=["earlier", "never"]) as spool:
                await drained(spool)
                assert (await land(log)).all == [*range(100)]
        assert not list((tmp_path / "earlier").iterdir())
        assert list((tmp_path / "another").glob("*.spool"))

    run(test())


def test_the_backlog_of_a_killed_process_is_adopted_drained_and_deleted(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        for _ in range(2):
            await left_behind(rig, 1_000)
        async with rig.log() as log:
            log.trouble = AWAY
            async with rig.spool(log) as spool:
                assert all(spool.holds(partition) for partition in range(PARTITIONS))
                await spooled(spool, 400, first=1_000)
                assert rig.files("spool") == ["spool"] * 3
            log.trouble = None
            async with rig.spool(log) as spool:  # and once more, by one that was stopped in order
                await drained(spool)
                landed = await land(log)
                assert landed.all == sorted([*range(1_000), *range(1_400)])
                assert len({one.origin.spool for one in landed.records if one.origin}) == 3
                for numbers in landed.numbers.values():
                    fresh = [number for number in numbers if number >= 1_000]
                    assert fresh == sorted(fresh)
        assert rig.files() == []

    run(test())


def test_a_process_killed_while_it_drains_is_followed_by_one_that_may_repeat_but_not_jump(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        await left_behind(rig, 20_000, drain=True)
        async with rig.log() as log:
            before = len((await land(log)).all)
            assert 0 < before < 20_000
            async with rig.spool(log) as spool:
                await drained(spool)
            landed = await land(log)
            assert landed.numbers == by_partition(20_000)
            assert landed.repeats == before

    run(test())


def test_a_living_process_keeps_its_files_and_a_drained_one_is_deleted_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.spool.spool.ADOPT_EVERY_S", 0.0)
    monkeypatch.setattr("ingest.spool.spool.TICK_S", 0.05)

    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        await left_behind(rig, 8)
        async with rig.log() as log, rig.spool(log) as one, rig.spool(log) as other:
            assert not any(other.holds(partition) for partition in range(PARTITIONS))
            await drained(one)

            async def deleted() -> bool:
                return rig.files() == []

            await until(deleted)
            assert (await land(log)).all == list(range(8))

    run(test())


def test_a_drained_file_stays_until_its_end_could_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.spool.spool.ADOPT_EVERY_S", 0.0)
    monkeypatch.setattr("ingest.spool.spool.TICK_S", 0.01)
    asked: list[UUID] = []
    said: set[UUID] = set()

    async def end(spool: UUID) -> bool:
        asked.append(spool)
        if len(asked) > 5:
            said.add(spool)
        return spool in said

    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log:
            async with rig.spool(log, end=end) as spool:
                log.trouble = AWAY
                (first, *_) = await spooled(spool, 8)
                log.trouble = None
                await drained(spool)
                assert asked == []  # it may yet be written
            assert asked == [UUID(bytes=first.spool)]
            assert rig.files("spool") == ["spool"]
            async with rig.spool(log, end=end):

                async def deleted() -> bool:
                    assert rig.files() or said
                    return rig.files() == []

                await until(deleted)
            assert said == set(asked) == {UUID(bytes=first.spool)}
            assert (await land(log)).all == list(range(8))

    run(test())


def test_a_spool_of_another_partition_count_is_drained_before_anything_new(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log:
            log.trouble = AWAY
            async with rig.spool(log) as spool:
                await spooled(spool, 40)
        other = await SpoolRig.make(tmp_path / "other")
        smaller = SpoolRig(tmp_path, other.log_settings, other.expected)
        async with smaller.log() as log:
            log.partitions = 3
            log.trouble = AWAY
            async with smaller.spool(log) as spool:
                assert [spool.holds(partition) for partition in range(3)] == [True] * 3
                later = asyncio.ensure_future(spool.append(1, encode(record(40))))
                log.trouble = None
                await later

                async def done() -> bool:
                    return not any(spool.holds(partition) for partition in range(3))

                await until(done)
            landed = await land(log)
            assert landed.all == list(range(41))
            assert landed.numbers[0] == sorted(landed.numbers[0], key=lambda number: (number % 4, number))

    run(test())


# ---------------------------------------------------------------- damage


async def fill(rig: SpoolRig, count: int) -> Path:
    """A spool with so many records in chunks of a hundred; its file."""
    async with rig.log() as log:
        log.trouble = AWAY
        async with rig.spool(log) as spool:
            for first in range(0, count, 400):
                await spooled(spool, min(400, count - first), first=first)
    (path,) = rig.spool_directory.glob("*.spool")
    return path


def overwrite(path: Path, begin: float, end: float) -> None:
    """This part of the file, from 0 to 1, with nonsense."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(int(size * begin))
        file.write(os.urandom(int(size * end) - int(size * begin)))


def misspell(path: Path) -> None:
    """Within a record: SQLite itself does not notice."""
    content = path.read_bytes()
    text = next(text for text in (b"request-%d" % number for number in range(11_000, 11_100)) if text in content)
    path.write_bytes(content.replace(text, text.upper()))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "in the middle": lambda path: overwrite(path, 0.4, 0.5),
    "one letter": misspell,
    "cut off": lambda path: os.truncate(path, path.stat().st_size * 2 // 3 + 123),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("found", ["at the start", "while draining"])
def test_of_a_damaged_file_the_rest_is_drained_and_what_is_missing_declared(
    tmp_path: Path, damage: str, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        path = await fill(rig, 20_000)
        async with rig.log() as log:
            if found == "at the start":
                DAMAGES[damage](path)
            log.trouble = AWAY
            async with rig.spool(log) as spool:
                await spooled(spool, 4, first=20_000)
                if found == "while draining":
                    DAMAGES[damage](path)
                log.trouble = None
                await drained(spool)
                assert await spool.append(0, encode(record(20_004)))
                await drained(spool)
            landed = await land(log)
            assert landed.lost + len(landed.all) == 20_005
            assert 0 < landed.lost < 12_000
            assert len(set(landed.all)) == len(landed.all)
            assert {20_000, 20_001, 20_002, 20_003, 20_004} <= set(landed.all)
            for numbers in landed.numbers.values():
                assert numbers[:-2] == sorted(numbers[:-2]) or numbers == sorted(numbers)
        assert rig.files("damaged") == ["damaged"]
        assert rig.files("spool") == rig.files("salvaged") == rig.files("lock") == []
        assert "set aside" in caplog.text

    run(test())


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_of_a_damaged_wal_the_rest_is_drained_and_what_is_missing_declared(
    tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        await left_behind(rig, 6_000)
        (wal,) = rig.spool_directory.glob("*.spool-wal")
        with wal.open("r+b") as file:
            file.seek(int(wal.stat().st_size * share))
            file.write(os.urandom(8))
        async with rig.log() as log:
            async with rig.spool(log) as spool:
                await drained(spool)
                assert rig.registry.get_sample_value("sluice_ingest_spool_damaged_files_total") == 1
            landed = await land(log)
        assert landed.lost + len(landed.all) == 6_000
        assert 0 <= landed.lost < 6_000
        assert "set aside" in caplog.text
        assert ("are lost" in caplog.text) == (landed.lost > 0)
        assert rig.files("damaged-wal") == ["damaged-wal"]
        assert rig.files("spool*") == rig.files("salvaged*") == []

    run(test())


def test_a_file_of_which_nothing_can_be_read_is_set_aside_and_the_start_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        path = await fill(rig, 400)
        overwrite(path, 0.0, 1.0)
        async with rig.log() as log:
            async with rig.spool(log) as spool:
                await drained(spool)
            assert (await land(log)).all == []
        assert rig.files("damaged") == ["damaged"]
        assert rig.files("salvaged") == []

    run(test())


def test_a_file_of_a_newer_sluice_waits_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        path = await fill(rig, 400)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
        async with rig.log() as log, rig.spool(log) as spool:
            assert not spool.holds(0)
            await spooled(spool, 4)
            await drained(spool)
        assert path.exists()
        assert "newer Sluice" in str([vars(one) for one in caplog.records])

    run(test())


def test_a_crash_after_the_salvage_neither_loses_nor_repeats_it(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        path = await fill(rig, 4_000)
        before = path.read_bytes()
        overwrite(path, 0.4, 0.5)
        async with rig.log() as log:
            log.trouble = AWAY
            async with rig.spool(log):
                assert rig.files("salvaged") == ["salvaged"]
            path.write_bytes(before)  # as if the damaged one had not been renamed yet
            log.trouble = None
            async with rig.spool(log) as spool:
                await drained(spool)
            landed = await land(log)
            assert landed.lost + len(landed.all) == 4_000
            assert landed.lost > 0

    run(test())


# ---------------------------------------------------------------- bounds


async def refused(spool: Spool, text: str) -> None:
    with pytest.raises(UnavailableError, match=text):
        await spool.append(0, encode(record(0)))


def test_a_full_spool_takes_no_more_and_discards_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log, spool_bytes_max=100_000) as spool:
            log.trouble = AWAY
            replies = await asyncio.gather(
                *(spool.append(number % 4, encode(record(number))) for number in range(2_000)), return_exceptions=True
            )
            taken = [number for number, reply in enumerate(replies) if isinstance(reply, Kept)]
            assert 90_000 < sum(len(encode(record(number))) for number in taken) < 101_000
            assert {type(reply) for reply in replies} == {Kept, UnavailableError}
            await refused(spool, "SLUICE_SPOOL_BYTES_MAX")
            log.trouble = None
            await drained(spool)
            assert spool.refusal is None
            assert (await land(log)).all == taken

    run(test())


def test_a_spool_that_nobody_drains_takes_no_more_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.spool.spool.TICK_S", 0.01)

    async def test() -> None:
        clock = ManualClock()
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log:
            log.trouble = AWAY
            async with rig.spool(log, clock, spool_age_max_s=100.0) as spool:
                one = record(0, received_us=clock.now_us() - PG_EPOCH_US)
                await spool.append(0, encode(one))
                clock.advance(99.0)

                async def looked() -> bool:
                    return rig.registry.get_sample_value("sluice_ingest_spool_age_seconds") == 99.0

                await until(looked)
                assert spool.refusal is None
            # The age is that of the record, whichever process has it.
            async with rig.spool(log, clock, spool_age_max_s=100.0) as spool:
                clock.advance(2.0)

                async def over() -> bool:
                    return spool.refusal is not None

                await until(over)
                await refused(spool, "SLUICE_SPOOL_AGE_MAX_S")
                log.trouble = None
                await drained(spool)

                async def takes() -> bool:
                    return spool.refusal is None

                await until(takes)
            assert (await land(log)).all == [0]

    run(test())


def test_a_disk_that_refuses_is_told_at_once_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.spool.spool.TICK_S", 0.05)

    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        rig.spool_directory.write_text("in the way")
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            await refused(spool, "SLUICE_SPOOL_DIR")
            rig.spool_directory.unlink()

            async def takes() -> bool:
                try:
                    await spool.append(0, encode(record(1)))
                except UnavailableError:
                    return False
                return True

            await until(takes)
            log.trouble = None
            await drained(spool)
            assert (await land(log)).all == [1]

    run(test())


def test_a_disk_that_goes_on_refusing_is_told_once_and_refuses_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ingest.spool.spool.TICK_S", 0.01)
    caplog.set_level("INFO", "sluice.spool")
    made: list[Path] = []
    make = Claim.make

    def counted(directory: Path) -> Claim:
        made.append(directory)
        return make(directory)

    monkeypatch.setattr(Claim, "make", counted)

    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            os.makedirs(rig.spool_directory)
            with file_size_limit(2_000):  # room for a lock, not for a database
                await refused(spool, "SLUICE_SPOOL_DIR")

                async def tried_again() -> bool:
                    assert spool.refusal is not None  # at no moment, or readiness would flicker
                    return len(made) >= 5

                await until(tried_again)

            async def takes() -> bool:
                return spool.refusal is None

            await until(takes)
            await spooled(spool, 4)
            log.trouble = None
            await drained(spool)
        told = [one.message for one in caplog.records]
        assert told.count("a spool cannot be drained now; it is kept and tried again") == 1
        assert told.count("a spool can be made again") == 1

    run(test())


def test_a_full_disk_is_told_and_what_was_taken_before_is_drained(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            await spooled(spool, 4_000)
            assert spool._files.own is not None
            assert spool._files.own.log is not None
            own = spool._files.own.log
            await own._in_thread(lambda: own._store._hold().execute("PRAGMA max_page_count = 1"))
            with pytest.raises(UnavailableError, match="full"):
                await spool.append(0, encode(record(0)) + bytes(CHUNK_BYTES_MAX))
            assert spool.refusal is not None
            log.trouble = None
            await drained(spool)
            assert (await land(log)).all == list(range(4_000))

    run(test())


def test_a_spool_id_is_the_file_s_own(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await SpoolRig.make(tmp_path)
        async with rig.log() as log, rig.spool(log) as spool:
            log.trouble = AWAY
            (kept,) = await spooled(spool, 1)
            (path,) = rig.spool_directory.glob("*.spool")
            assert UUID(bytes=kept.spool) == UUID(path.stem)
            log.trouble = None
            await drained(spool)
            (found,) = (await land(log)).records
            assert found.origin is not None
            assert found.origin.spool == kept.spool
            assert decode(encode(found)) == found

    run(test())
