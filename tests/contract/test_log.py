"""What the port promises, on both engines and their real parts."""

import asyncio
import collections
import contextlib
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from aiokafka.errors import KafkaError

from runtime.errors import ConfigurationError, OutcomeUnknownError, OverloadedError, UnavailableError
from runtime.log import (
    BehindRetentionError,
    Bounds,
    Expected,
    Log,
    LogMisfitError,
    Reader,
    check_positions,
    create_log,
    open_log,
)
from runtime.log.kafka_reader import KafkaReader
from runtime.log.port import RECORD_ROOM
from tests.contract.conftest import (
    PARTITIONS,
    KafkaPlace,
    Place,
    SqlitePlace,
    eventually,
    make,
    opened,
    read_all,
    run,
)

# A process of its own that appends and prints where its records stand, as one line of JSON.
APPENDER = """
import asyncio, json, sys
from uuid import UUID
from runtime.log import Expected, LogSettings, open_log

async def main(url, source, name, identity, partitions, tag, count):
    expected = Expected(UUID(source), name, identity, int(partitions))
    log = await open_log(LogSettings(log_url=url), expected, client_id=tag)
    futures = [(n % log.partitions, log.append(n % log.partitions, f"{tag} {n}".encode())) for n in range(int(count))]
    print(json.dumps([(partition, await future) for partition, future in futures]))
    await log.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def append_all(log: Log, tag: str, count: int) -> dict[tuple[int, int], bytes]:
    """Append over all partitions, all at once; what stands where."""
    bodies = [f"{tag} {n}".encode() for n in range(count)]
    futures = [log.append(n % log.partitions, body) for n, body in enumerate(bodies)]
    positions = await asyncio.gather(*futures)
    return {(n % log.partitions, position): bodies[n] for n, position in enumerate(positions)}


def by_position(found: dict[int, list[bytes]]) -> dict[tuple[int, int], bytes]:
    return {(partition, n): body for partition, bodies in found.items() for n, body in enumerate(bodies)}


def append_without_end(log: Log, taken: list["asyncio.Future[int]"]) -> None:
    while True:
        taken.append(log.append(len(taken) % PARTITIONS, b"%05d" % len(taken) * 100))


async def read_without_end(reader: Reader) -> None:
    while True:
        await reader.read(bytes_max=1_000, wait_s=10.0)


async def read_one(reader: Reader) -> bytes:
    slices = await reader.read(bytes_max=1_000, wait_s=30.0)
    assert len(slices) == 1
    assert len(slices[0].bodies) == 1
    return slices[0].bodies[0]


def test_a_record_stands_at_the_position_its_append_gave(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            first = await append_all(log, "first", 500)
            second = await append_all(log, "second", 3)
            assert by_position(await read_all(log)) == first | second
            assert [position for partition, position in first if partition == 1] == list(range(125))

    run(test())


def test_appends_of_one_partition_keep_their_order_whatever_their_size(place: Place) -> None:
    async def test() -> None:
        async with opened(place, log_batch_bytes_max=10_000) as log:
            bodies = [n.to_bytes(2, "big") * (1 + n * 37 % 2_000) for n in range(1, 600)]
            positions = await asyncio.gather(*(log.append(2, body) for body in bodies))
            assert positions == list(range(len(bodies)))
            assert (await read_all(log))[2] == bodies

    run(test())


def test_an_empty_and_the_largest_body_come_back(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            largest = bytes(log.body_bytes_max)
            await asyncio.gather(log.append(0, b""), log.append(0, largest), log.append(0, b"\0"))
            assert (await read_all(log))[0] == [b"", largest, b"\0"]

    run(test())


def test_what_can_never_be_written_is_refused_at_once(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            with pytest.raises(ValueError, match="SLUICE_LOG_BATCH_BYTES_MAX"):
                log.append(0, bytes(log.body_bytes_max + 1))
            for partition in (-1, PARTITIONS):
                with pytest.raises(ValueError, match="partition"):
                    log.append(partition, b"")
            assert log.queued_bytes == 0

    run(test())


def test_several_logs_in_one_process_share_the_partitions(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected) as one, opened(place, expected) as two, opened(place, expected) as three:
            told = await asyncio.gather(
                *(append_all(log, f"log {n}", 400) for n, log in enumerate((one, two, three)))
            )
            assert by_position(await read_all(one)) == told[0] | told[1] | told[2]
            for mine in told:
                in_order = [mine[key] for key in sorted(mine)]
                assert in_order == [b"%s" % body for body in sorted(mine.values(), key=_turn)]
        await place.destroy(expected)

    def _turn(body: bytes) -> tuple[int, int]:
        number = int(body.split()[-1])
        return number % PARTITIONS, number

    run(test())


def test_several_processes_share_the_partitions(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        where = [place.settings().log_url, str(expected.source), expected.name, expected.identity]
        async with opened(place, expected) as log:
            processes = [
                await asyncio.create_subprocess_exec(
                    *[sys.executable, "-c", APPENDER, *where, str(PARTITIONS), f"process {n}", "400"],
                    stdout=asyncio.subprocess.PIPE,
                    cwd=Path(__file__).parents[2],
                )
                for n in range(3)
            ]
            told = await append_all(log, "process 3", 400)
            for n, process in enumerate(processes):
                printed, _ = await process.communicate()
                assert process.returncode == 0
                for record, (partition, position) in enumerate(json.loads(printed)):
                    told[partition, position] = f"process {n} {record}".encode()
            assert len(told) == 1_600
            assert by_position(await read_all(log)) == told
        await place.destroy(expected)

    run(test())


def test_a_log_that_is_opened_again_goes_on(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected) as log:
            await append_all(log, "before", 10)
            before = await log.bounds()
        async with opened(place, expected) as log:
            assert await log.bounds() == before == {0: (0, 3), 1: (0, 3), 2: (0, 2), 3: (0, 2)}
            assert await log.append(0, b"after") == 3
            assert (await read_all(log))[0] == [b"before 0", b"before 4", b"before 8", b"after"]
        await place.destroy(expected)

    run(test())


def test_close_writes_what_is_queued_and_then_takes_no_more(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected, log_linger_ms=500) as log:
            futures = [log.append(n % PARTITIONS, b"x") for n in range(40)]
        assert sorted(future.result() for future in futures) == sorted(list(range(10)) * PARTITIONS)
        assert log.queued_bytes == 0
        with pytest.raises(UnavailableError):
            await log.append(0, b"late")
        async with opened(place, expected) as again:
            assert {bounds.end for bounds in (await again.bounds()).values()} == {10}
        await place.destroy(expected)

    run(test())


def test_a_caller_that_stops_waiting_harms_nobody(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            futures = [log.append(0, b"%d" % n) for n in range(10)]
            for future in futures[::2]:
                future.cancel()
            assert await asyncio.gather(*futures[1::2]) == [1, 3, 5, 7, 9]
            assert len((await read_all(log))[0]) == 10
            assert log.queued_bytes == 0

    run(test())


def test_a_full_queue_refuses_at_once_and_loses_nothing_it_took(place: Place) -> None:
    async def test() -> None:
        async with opened(place, log_queue_bytes_max=1_000_000) as log:
            taken: list[asyncio.Future[int]] = []
            with pytest.raises(OverloadedError, match="SLUICE_LOG_QUEUE_BYTES_MAX"):
                append_without_end(log, taken)
            assert 0 < log.queued_bytes <= 1_000_000
            await asyncio.gather(*taken)
            assert log.queued_bytes == 0
            await log.append(0, b"more")
            found = await read_all(log)
            bodies = [body for partition in found.values() for body in partition]
            assert sorted(bodies) == sorted([b"%05d" % n * 100 for n in range(len(taken))] + [b"more"])

    run(test())


def test_a_reader_begins_where_it_is_told(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            await asyncio.gather(*(log.append(1, b"%d" % n) for n in range(100)))
            reader = log.reader()
            await reader.assign({1: 37})
            found: list[bytes] = []
            while len(found) < 63:
                (part,) = await reader.read(bytes_max=10_000, wait_s=10.0)
                assert part.first == 37 + len(found)
                found += part.bodies
            assert found == [b"%d" % n for n in range(37, 100)]
            assert part.next_position == 100
            await reader.assign({1: 99, 2: 0})
            (part,) = await reader.read(bytes_max=10_000, wait_s=10.0)
            assert (part.partition, part.first, part.bodies) == (1, 99, [b"99"])
            await reader.close()

    run(test())


def test_a_reader_sees_a_record_that_comes_while_it_waits(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected) as log, opened(place, expected) as other:
            reader = log.reader()
            await reader.assign(dict.fromkeys(range(PARTITIONS), 0))
            assert await reader.read(bytes_max=1_000, wait_s=0.05) == []
            for n, writer in enumerate((log, other, log)):
                waiting = asyncio.create_task(read_one(reader))
                await asyncio.sleep(0.05)
                await writer.append(n, b"news %d" % n)
                assert await waiting == b"news %d" % n
            await reader.close()
        await place.destroy(expected)

    run(test())


def test_a_read_that_is_cancelled_loses_nothing(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            reader = log.reader()
            await reader.assign({0: 0})
            for n in range(5):
                waiting = asyncio.create_task(reader.read(bytes_max=1_000, wait_s=30.0))
                await asyncio.sleep(0.01 * n)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            await log.append(0, b"here")
            assert await read_one(reader) == b"here"
            await reader.close()

    run(test())


def test_a_reader_whose_end_is_cancelled_leaves_no_connection(services: dict[str, str]) -> None:
    async def test() -> None:
        async with opened(KafkaPlace(services["SLUICE_LOG_URL"])) as log:
            await log.append(0, b"here")
            for turns in range(1, 4):
                reader = log.reader()
                assert isinstance(reader, KafkaReader)
                await reader.assign({0: 0})
                assert await read_one(reader) == b"here"
                ending = asyncio.create_task(reader.close())
                for _ in range(turns):
                    await asyncio.sleep(0)
                ending.cancel()
                await asyncio.gather(ending, return_exceptions=True)
                assert not reader._cluster._connections, turns

    run(test())


def test_a_busy_partition_does_not_keep_the_others_waiting(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            await asyncio.gather(*(log.append(0, bytes(10_000)) for _ in range(300)))
            await asyncio.gather(*(log.append(partition, b"small") for partition in (1, 2, 3)))
            reader = log.reader()
            await reader.assign(dict.fromkeys(range(PARTITIONS), 0))
            seen = collections.Counter[int]()
            while not {1, 2, 3} <= seen.keys():
                seen.update(part.partition for part in await reader.read(bytes_max=50_000, wait_s=10.0))
            assert seen[0] < 10
            await reader.close()

    run(test())


def test_a_slow_reader_holds_little_and_misses_nothing(place: Place) -> None:
    total, size = 12_000_000, 10_000

    async def test() -> None:
        async with opened(place, log_fetch_bytes_max=400_000, log_batch_bytes_max=100_000) as log:
            for begin in range(0, total // size, 100):
                bodies = (b"%08d" % n + bytes(size - 8) for n in range(begin, begin + 100))
                await asyncio.gather(*(log.append(0, body) for body in bodies))
            reader = log.reader()
            tracemalloc.start()
            await reader.assign({0: 0})
            position = 0
            while position < total // size:
                for part in await reader.read(bytes_max=50_000, wait_s=10.0):
                    assert [int(body[:8]) for body in part.bodies] == list(range(position, part.next_position))
                    assert sum(map(len, part.bodies)) < 500_000
                    position = part.next_position
                await asyncio.sleep(0.002)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            await reader.close()
            assert peak < 5_000_000

    run(test())


def test_a_reader_behind_retention_is_told_what_is_lost(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected) as log:
            for n in range(6):
                await log.append(0, b"%d" % n)
            await log.append(1, b"untouched")
            await place.forget(log, expected, {0: 4})
            assert await log.bounds() == {0: (4, 6), 1: (0, 1), 2: (0, 0), 3: (0, 0)}
            reader = log.reader()
            await reader.assign({0: 1, 1: 0})
            with pytest.raises(BehindRetentionError, match="3 records are lost") as told:
                await read_without_end(reader)
            assert (told.value.partition, told.value.position, told.value.start) == (0, 1, 4)
            await reader.assign({0: 4})
            ((_, first, bodies),) = await reader.read(bytes_max=1_000, wait_s=10.0)
            assert (first, bodies[0]) == (4, b"4")
            await reader.close()
            assert await log.append(0, b"goes on") == 6
        await place.destroy(expected)

    run(test())


def test_a_position_beyond_the_end_is_refused(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            await log.append(0, b"only")
            reader = log.reader()
            await reader.assign({0: 5})
            with pytest.raises(LogMisfitError, match="migrate --new-generation"):
                await reader.read(bytes_max=1_000, wait_s=10.0)
            await reader.assign({0: 1})
            assert await reader.read(bytes_max=1_000, wait_s=0.01) == []
            await reader.close()

    run(test())


def test_positions_that_do_not_fit_the_bounds() -> None:
    bounds = {0: Bounds(5, 9), 1: Bounds(0, 0)}
    check_positions(bounds, {0: 9, 1: 0})
    check_positions(bounds, {0: 2})  # behind retention is the reader's to tell
    for wrong in ({0: 10}, {1: 1}, {2: 0}):
        with pytest.raises(LogMisfitError, match="migrate --new-generation"):
            check_positions(bounds, wrong)


def test_another_log_than_expected_is_refused(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        other = await make(place)
        misfits = [
            expected._replace(identity=other.identity),
            expected._replace(partitions=PARTITIONS + 1),
            expected._replace(name="test.missing"),
        ]
        if place.engine == "sqlite":  # a topic has its generation in its name alone
            misfits.append(expected._replace(source=other.source))
        for misfit in misfits:
            with pytest.raises(LogMisfitError, match="migrate --new-generation"):
                await open_log(place.settings(), misfit, client_id="test")
        with pytest.raises(LogMisfitError, match="exists already"):
            await create_log(place.settings(), source=expected.source, name=expected.name, partitions=PARTITIONS)
        await place.destroy(expected)
        await make(place, source=expected.source)
        with pytest.raises(LogMisfitError, match="migrate --new-generation"):
            await open_log(place.settings(), expected, client_id="test")
        for log in (expected, other):
            await place.destroy(log)

    run(test())


def test_a_log_made_anew_under_a_running_process_gets_none_of_its_records(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected, log_append_timeout_ms=2_000) as log:
            await log.append(0, b"in the old one")
            reader = log.reader()
            await reader.assign({0: 1})
            await place.destroy(expected)
            anew = await make(place, source=expected.source)
            with pytest.raises((UnavailableError, OutcomeUnknownError)):
                await log.append(0, b"lost")
            assert log.trouble is not None
            with pytest.raises(LogMisfitError, match="migrate --new-generation"):
                await read_without_end(reader)
            with pytest.raises(UnavailableError):
                await log.append(0, b"certainly not written")
            async with opened(place, anew) as other:
                assert {bounds.end for bounds in (await other.bounds()).values()} == {0}
        await place.destroy(anew)

    run(test())


def test_what_has_landed_is_passed_on(place: Place) -> None:
    async def test() -> None:
        expected = await make(place)
        async with opened(place, expected) as log:
            for n in range(6):
                await log.append(n % 2, b"%d" % n)
            await log.landed({0: 2})
            await log.landed({1: 3})
            await log.landed({})
            await _passed_on(place, expected, log)
        await log.landed({0: 3})  # closed: nothing happens
        await place.destroy(expected)

    run(test())


async def _passed_on(place: Place, expected: Expected, log: Log) -> None:
    async def pruned() -> bool:
        return await log.bounds() == {0: (2, 3), 1: (3, 3), 2: (0, 0), 3: (0, 0)}

    async def published() -> bool:
        assert isinstance(place, KafkaPlace)
        async with place.admin() as admin:
            with contextlib.suppress(KafkaError):  # the first group of a broker makes it think for a moment
                offsets = await admin.list_consumer_group_offsets("sluice-landing")
                return {at.partition: told.offset for at, told in offsets.items() if at.topic == expected.name} == {
                    0: 2,
                    1: 3,
                }
        return False

    await eventually(pruned if place.engine == "sqlite" else published)


def test_a_url_that_names_no_log_is_refused() -> None:
    place = SqlitePlace(Path("unused"))
    settings = place.settings()
    for url in ("", "redis://here", "sqlite://host/path", "kafka://", "kafka://host:port"):
        bad = type(settings)(log_url=url)
        with pytest.raises(ConfigurationError, match="SLUICE_LOG_URL"):
            run(open_log(bad, Expected(*[None] * 4), client_id="test"))  # type: ignore[arg-type]


def test_what_the_log_will_delete_soon_is_told_by_age_and_nothing_for_a_log_that_waits(place: Place) -> None:
    async def test() -> None:
        async with opened(place, log_retention_h=1) as log:
            await append_all(log, "old", 2 * log.partitions)
            await asyncio.sleep(1.0)  # records are told apart by their age alone
            between = asyncio.get_running_loop().time() - 0.5
            await append_all(log, "new", log.partitions)
            expiring = await log.expiring((asyncio.get_running_loop().time() - between) / 3600)
            if place.engine == "sqlite":
                assert expiring == {}
                return
            assert expiring == dict.fromkeys(range(log.partitions), 2)
            assert await log.expiring(1.0) == dict.fromkeys(range(log.partitions), 0)
            assert await log.expiring(0.0) == dict.fromkeys(range(log.partitions), 3)

    run(test())


def test_records_appended_together_stand_together_in_the_order_of_all(place: Place) -> None:
    async def test() -> None:
        async with opened(place) as log:
            futures = [
                log.append(0, b"before"),
                log.append_all(0, [b"%d" % n for n in range(1_000)]),
                log.append(0, b"between"),
                log.append_all(0, [b"only"]),
                log.append(0, b"after"),
            ]
            assert await asyncio.gather(*futures) == [0, 1, 1_001, 1_002, 1_003]
            found = (await read_all(log))[0]
            assert found == [b"before", *(b"%d" % n for n in range(1_000)), b"between", b"only", b"after"]

    run(test())


def test_what_does_not_fit_together_is_refused_whole(place: Place) -> None:
    async def test() -> None:
        async with opened(place, log_batch_bytes_max=100_000) as log:
            most = log.body_bytes_max
            await log.append_all(0, [bytes(most)])
            await log.append_all(0, [bytes(most // 1_000 - RECORD_ROOM)] * 1_000)
            for bodies in ([], [bytes(most + 1)], [b""] * (most // RECORD_ROOM + 1), [bytes(most), b""]):
                with pytest.raises(ValueError, match="fit into one batch"):
                    log.append_all(0, bodies)
            assert (await log.bounds())[0].end == 1_001

    run(test())


def test_records_appended_together_are_written_whole_or_not_at_all(place: Place) -> None:
    async def test() -> None:
        async with opened(place, log_queue_bytes_max=1_000_000, log_batch_bytes_max=300_000) as log:
            together = [bytes(29_000)] * 10
            futures = [log.append_all(0, together) for _ in range(3)]
            with pytest.raises(OverloadedError):
                log.append_all(0, together)
            assert await asyncio.gather(*futures) == [0, 10, 20]
            assert (await log.bounds())[0].end == 30

    run(test())
