"""The paced lane beside a real log in a file: its rate, whose records come first, what it survives, its bounds."""

import sqlite3
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import msgspec
import pytest

from ingest.limits import Cost
from ingest.paced import entries, lane
from ingest.paced.lane import LaneFullError
from runtime.errors import OutcomeUnknownError
from schemas.record import UndecodableError, UnknownVersionError
from tests.landing_rig import until
from tests.paced_rig import LaneRig, depth_of, left, sender
from tests.spool_rig import PARTITIONS, land, spooled
from tests.support import run

A_MINUTE = 60.0
AWAY = "gone, as the test has it"
_FEW: dict[str, Any] = {"paced_slots_max": 3 * PARTITIONS, "paced_organisation_share": 0.5}
SIXTY: dict[str, Any] = {"limit_device_requests_per_minute": 60}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "POLL_S", 0.01)
    monkeypatch.setattr(lane, "TICK_S", 0.05)
    monkeypatch.setattr(lane, "TIDY_EVERY_S", 0.1)


def begin_minute(rig: LaneRig, whose: Any) -> None:
    """Every sender's minutes begin at a second of their own."""
    now = rig.clock.now_us() + crc32(whose.subject) % 60_000_000
    rig.clock.advance((60_000_000 - now % 60_000_000) / 1e6)


# ---------------------------------------------------------------- the rate


def test_a_backlog_comes_in_evenly_at_its_share_of_the_limit(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        async with rig.rig.log() as log, rig.lane(log, **SIXTY) as paced:
            begin_minute(rig, whose)
            kept = await rig.paced(paced, whose, range(100))
            assert [one.position for one in kept] == list(range(100))
            assert paced.has(whose)
            assert paced.until_us(whose) == pytest.approx(rig.clock.now_us() + 100 / 54 * 60e6, abs=1e6)
            await left(paced, 100)
            for passed_s, waiting in ((10, 91), (20, 73), (29.9, 46), (0.2, 45), (10, 36), (49, 0)):
                rig.clock.advance(passed_s)
                await left(paced, waiting)
            assert not paced.has(whose)
            landed = await land(log)
            assert landed.numbers == {0: list(range(100))}
            assert landed.repeats == 0
        assert rig.files() == []

    run(test())


def test_live_requests_come_first(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        async with rig.rig.log() as log, rig.lane(log, **SIXTY) as paced:
            assert rig.limits is not None
            begin_minute(rig, whose)
            await rig.paced(paced, whose, range(50))
            rig.clock.advance(20)
            await left(paced, 50 - 18)
            for _ in range(20):  # a burst of live requests, all of which pass
                rig.limits.request(whose, rig.clock.now_us())
            rig.clock.advance(20)  # 36 of the share are used up by those 38
            await left(paced, 50 - 18)
            rig.clock.advance(10)
            await left(paced, 50 - 18 - 7)
            for _ in range(60 - 45):  # what the share leaves over is theirs alone
                rig.limits.request(whose, rig.clock.now_us())

    run(test())


def test_one_record_may_cost_more_than_a_minute_permits(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        limit: dict[str, Any] = {"limit_device_readings_per_minute": 100}
        async with rig.rig.log() as log, rig.lane(log, **limit) as paced:
            begin_minute(rig, whose)
            await rig.paced(paced, whose, [1], readings=225)
            await rig.paced(paced, whose, [2], readings=1)
            for waiting in (2, 2, 0):
                rig.clock.advance(59.9)
                await left(paced, waiting)
                rig.clock.advance(0.1)
            assert (await land(log)).all == [1, 2]

    run(test())


def test_beyond_today_s_bytes_a_backlog_waits_for_tomorrow(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        limit: dict[str, Any] = {"limit_device_bytes_per_day": 1_000}
        async with rig.rig.log() as log, rig.lane(log, **limit) as paced:
            await rig.paced(paced, whose, range(12), size=100)
            await left(paced, 3)
            rig.clock.advance(86_000)
            await left(paced, 3)
            assert paced.until_us(whose) == rig.clock.now_us() + 400_000_000
            rig.clock.advance(401)
            await left(paced, 0)

    run(test())


def test_the_organisation_s_limit_holds_too_and_a_higher_one_is_felt(tmp_path: Path) -> None:
    async def test() -> None:
        rig, one, other = await LaneRig.make(tmp_path), sender(1), sender(2)
        limit: dict[str, Any] = {"limit_organisation_requests_per_minute": 10}
        async with rig.rig.log() as log, rig.lane(log, **limit) as paced:
            await rig.paced(paced, one, range(50))
            await rig.paced(paced, other, range(50, 100))
            rig.clock.advance(A_MINUTE)
            await until(_let_in(paced, 100 - 1))
            rig.clock.advance(A_MINUTE)
            await until(_let_in(paced, 100 - 9))
            assert await depth_of(paced) >= 100 - 3 * 10
            rig.registry.overrides = {whose.subject: (None, None, None, 0, None, None) for whose in (one, other)}
            await left(paced, 0)
            assert (await land(log)).all == list(range(100))

    run(test())


def _let_in(paced: Any, waiting: int) -> Any:
    async def let_in() -> bool:
        return await depth_of(paced) <= waiting

    return let_in


def test_devices_of_one_partition_do_not_hold_each_other_up(tmp_path: Path) -> None:
    async def test() -> None:
        rig, slow, fast = await LaneRig.make(tmp_path), sender(1), sender(2)
        rig.registry.overrides = {slow.subject: (1, *[None] * 5), fast.subject: (0, *[None] * 5)}
        async with rig.rig.log() as log, rig.lane(log, **SIXTY) as paced:
            slow.learn(rig.registry.overrides[slow.subject])
            begin_minute(rig, slow)
            await rig.paced(paced, slow, range(10))
            await rig.paced(paced, fast, range(10, 500))
            await left(paced, 10)
            assert {one.organisation for one in (await land(log)).records} == {b"o" * 16}
            assert (await land(log)).numbers == {0: list(range(10, 500))}
            assert not paced.has(fast)
            assert paced.has(slow)

    run(test())


# ---------------------------------------------------------------- what it waits for, and what it survives


def test_it_waits_for_the_log_and_for_what_is_spooled(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        async with rig.rig.log() as log, rig.rig.spool(log) as spool, rig.lane(log, spool) as paced:
            log.trouble = AWAY
            await spooled(spool, PARTITIONS)
            log.failures = repeat(OutcomeUnknownError)  # written, and spooled records go on being held
            await rig.paced(paced, whose, range(100, 200))
            await left(paced, 100)
            log.trouble = None
            await left(paced, 100)
            log.failures = iter(())
            await left(paced, 0)
            landed = await land(log)
            assert landed.all == [*range(PARTITIONS), *range(100, 200)]
            assert landed.numbers[0][0] == 0

    run(test())


def test_an_append_that_nobody_knows_of_is_made_again_and_lands_once(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        async with rig.rig.log() as log, rig.lane(log) as paced:
            log.failures = iter([OutcomeUnknownError, OutcomeUnknownError, None])
            await rig.paced(paced, whose, range(3))
            await left(paced, 0)
            landed = await land(log)
            assert landed.numbers == {0: [0, 1, 2]}
            assert landed.repeats >= 2

    run(test())


def test_the_next_process_goes_on_with_what_was_left_at_the_rate_of_its_owner(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose, other = await LaneRig.make(tmp_path), sender(1), sender(2, kind="gateway")
        async with rig.rig.log() as log:
            async with rig.lane(log, **SIXTY) as paced:
                begin_minute(rig, whose)
                await rig.paced(paced, whose, range(30))
                await rig.paced(paced, other, range(100, 130), partition=3)
                rig.clock.advance(10)
                await left(paced, 21)
                (kept,) = await rig.paced(paced, whose, [30])
            rig.registry.landed[UUID(bytes=kept.spool), 0] = 9
            rig.registry.is_away = True
            async with rig.lane(log, **SIXTY) as paced:
                await until(lambda: _told(paced, "records of 0 senders"))
                rig.clock.advance(5)
                await left(paced, await depth_of(paced))  # its limits are not known
                rig.registry.is_away = False
                await left(paced, 22 - 5)
                assert "17 records of 1 senders" in str(paced.note)
                assert not paced.has(other)
                rig.clock.advance(44)
                await left(paced, 0)
                await until(lambda: _no_files(rig))
            landed = await land(log)
            assert landed.numbers == {0: list(range(31)), 3: list(range(100, 130))}

    run(test())


async def _told(paced: Any, words: str) -> bool:
    return words in str(paced.note)


async def _no_files(rig: LaneRig) -> bool:
    return rig.files() == []


def test_a_damaged_file_gives_what_it_can_and_the_rest_is_declared(tmp_path: Path) -> None:
    async def test() -> None:
        rig = await LaneRig.make(tmp_path)
        async with rig.rig.log() as log:
            log.trouble = AWAY
            async with rig.lane(log) as paced:
                for number in range(30):  # a commit each, and so a chunk
                    await rig.paced(paced, sender(1), [number])
            (path,) = rig.directory.glob("*.spool")
            with sqlite3.connect(path) as file:
                keys = [key for (key,) in file.execute("SELECT key FROM chunks ORDER BY key")]
                assert len(keys) == 30
                file.execute("UPDATE chunks SET bodies = zeroblob(length(bodies)) WHERE key IN (?, ?)", keys[10:12])
            file.close()
            log.trouble = None
            async with rig.lane(log) as paced:
                await until(lambda: _gone(rig))
                assert await depth_of(paced) == 0
                assert next(_counted(rig, "sluice_ingest_spool_damaged_files_total")) == 1
            landed = await land(log)
            assert landed.numbers == {0: [*range(10), *range(12, 30)]}
            assert landed.lost == 2
            assert [name for name in rig.files() if "damaged" in name] != []

    run(test())


def test_a_file_damaged_while_it_is_written_makes_way_for_another(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        async with rig.rig.log() as log, rig.lane(log) as paced:
            log.trouble = AWAY
            for number in range(30):
                await rig.paced(paced, whose, [number])
            (path,) = rig.directory.glob("*.spool")
            file = sqlite3.connect(path, isolation_level=None)
            file.execute("UPDATE chunks SET checksum = 0 WHERE key = (SELECT max(key) FROM chunks)")
            file.close()
            log.trouble = None
            await until(lambda: _gone(rig))
            await rig.paced(paced, whose, [30])
            await left(paced, 0)
            landed = await land(log)
            assert landed.numbers == {0: [*range(29), 30]}
            assert landed.lost == 1

    run(test())


async def _gone(rig: LaneRig) -> bool:
    """All but the damaged file."""
    return not [name for name in rig.files() if not name.startswith("damaged")]


def _counted(rig: LaneRig, name: str, **labels: str) -> Iterator[float]:
    for metric in rig.metrics.collect():
        for sample in metric.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample.value


# ---------------------------------------------------------------- bounds


def test_each_bound_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose, other = await LaneRig.make(tmp_path), sender(1), sender(2)
        stranger = sender(3, organisation=b"p" * 16)
        bounds: dict[str, Any] = {
            "paced_bytes_max": 100_000,
            "paced_sender_bytes_max": 20_000,
            "paced_organisation_share": 0.3,
        }
        async with rig.rig.log() as log, rig.lane(log, **bounds) as paced:
            log.trouble = AWAY
            assert await _fill(rig, paced, whose) > 50
            assert "full for this device (SLUICE_PACED_SENDER_BYTES_MAX)" in str(paced.refusal(whose, 400))
            assert paced.refusal(other, 400) is None
            await _fill(rig, paced, other)
            assert "SLUICE_PACED_ORGANISATION_SHARE" in str(paced.refusal(sender(4), 400))
            for number in range(5, 10):
                await _fill(rig, paced, sender(number, organisation=number.to_bytes(16, "big")))
            assert "the paced lane is full (SLUICE_PACED_BYTES_MAX)" in str(paced.refusal(stranger, 400))
            log.trouble = None
            await until(_let_in(paced, 0))
            assert paced.refusal(whose) is None

    run(test())


async def _fill(rig: LaneRig, paced: Any, whose: Any) -> int:
    """How many records it takes of a sender."""
    for count in range(10_000):
        try:
            await rig.paced(paced, whose, [count])
        except LaneFullError:
            return count
    raise AssertionError("it has no bound")


def test_a_backlog_that_would_take_too_long_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        async with rig.rig.log() as log, rig.lane(log, paced_age_max_s=120.0, **SIXTY) as paced:
            begin_minute(rig, whose)
            assert await _fill(rig, paced, whose) == 2 * 54
            assert "would take 0.0 h (SLUICE_PACED_AGE_MAX_S)" in str(paced.refusal(whose, 0, Cost(1, 0, 0)))
            assert paced.refusal(sender(2)) is None
            rig.registry.overrides = {whose.subject: (1, *[None] * 5)}
            rig.clock.advance(121)
            await until(lambda: _is_late(paced, whose))

    run(test())


async def _is_late(paced: Any, whose: Any) -> bool:
    return "what it has there is late" in str(paced.refusal(whose))


def test_slots_are_shared_out_and_used_again(tmp_path: Path) -> None:
    async def test() -> None:
        rig, few = await LaneRig.make(tmp_path), _FEW
        async with rig.rig.log() as log, rig.lane(log, **few) as paced:
            log.trouble = AWAY
            mine = [sender(number) for number in range(1, 5)]
            others = [sender(number, organisation=b"p" * 16) for number in range(5, 8)]
            await rig.paced(paced, mine[0], [1])
            await rig.paced(paced, mine[1], [2])
            with pytest.raises(LaneFullError, match="SLUICE_PACED_SLOTS_MAX"):
                await rig.paced(paced, mine[2], [3])
            assert not paced.has(mine[2])
            with pytest.raises(LaneFullError, match="SLUICE_PACED_SLOTS_MAX"):  # all of it or nothing
                await paced.take(mine[2], [rig.item(3, 1), rig.item(4, 0)])
            assert not paced.has(mine[2])
            await rig.paced(paced, mine[2], [5], partition=1)
            await rig.paced(paced, others[0], [6])
            with pytest.raises(LaneFullError, match="SLUICE_PACED_SLOTS_MAX"):
                await rig.paced(paced, others[1], [7])
            log.trouble = None
            await left(paced, 0)
            kept = await rig.paced(paced, others[1], [8])
            assert kept[0].position == 1
            await left(paced, 0)
            landed = await land(log)
            assert {0: sorted(landed.numbers[0]), 1: landed.numbers[1]} == {0: [1, 2, 6, 8], 1: [5]}

    run(test())


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        rig, whose = await LaneRig.make(tmp_path), sender(1)
        rig.directory.touch()
        async with rig.rig.log() as log, rig.lane(log) as paced:
            with pytest.raises(Exception, match="make room, or set SLUICE_SPOOL_DIR"):
                await rig.paced(paced, whose, [1])
            assert not paced.has(whose)
            rig.directory.unlink()
            await until(lambda: _takes(paced, whose))
            await rig.paced(paced, whose, [1])
            await left(paced, 0)

    run(test())


async def _takes(paced: Any, whose: Any) -> bool:
    return paced.refusal(whose) is None


# ---------------------------------------------------------------- entries


def test_an_entry_that_is_none_is_told_from_a_newer_one() -> None:
    good = entries.Entry(1, "device", b"o" * 16, b"d" * 16, 1, 2, 3, b"record")
    assert entries.unpack(entries.encode(good)) == good
    assert len(entries.encode(good)) < len(good.record) + entries.ENTRY_BYTES_MAX
    newer = entries.encode([2, *msgspec.structs.astuple(good)[1:], "more"])
    with pytest.raises(UnknownVersionError):
        entries.unpack(newer)
    for bad in (b"", b"\xff", entries.encode([1, "device", b"o", b"d" * 16, 1, 2, 3, b""])):
        with pytest.raises(UndecodableError):
            entries.unpack(bad)
