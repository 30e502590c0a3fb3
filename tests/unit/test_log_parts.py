"""Parts of the log that need no broker and no disk."""

import asyncio
import logging

import pytest
from aiokafka.record.default_records import DefaultRecordBatch

from runtime.errors import UnavailableError
from runtime.log.kafka_reader import _cut
from runtime.log.kafka_wire import ProduceById, ProduceByName, ProduceRequest, spell_topic_id
from runtime.log.kafka_writer import EPOCH_MAX, NO_PRODUCER, _Batch, _Lane
from runtime.log.sqlite_store import _chunks, _lengths, _unpack
from runtime.log.waiting import Landed, Trouble, fail, settle


def batch_of(*bodies: bytes) -> _Batch:
    batch = _Batch(0.0, 100_000)
    for body in bodies:
        batch.builder.append(batch.count, 1_000, None, body, [])
        batch.count += 1
    return batch


def test_a_batch_that_is_stamped_anew_is_as_if_stamped_for_the_first_time() -> None:
    first = batch_of(b"a", b"b")
    first.stamped((1, 2, 3))
    assert bytes(first.stamped((7, 8, 9))) == bytes(batch_of(b"a", b"b").stamped((7, 8, 9)))
    again = DefaultRecordBatch(bytes(first.stamped((2**40, EPOCH_MAX, 2**31 - 1))))
    assert again.validate_crc()
    assert (again.producer_id, again.producer_epoch, again.base_sequence) == (2**40, EPOCH_MAX, 2**31 - 1)


def test_what_may_have_been_written_keeps_its_stamp() -> None:
    lane, batch = _Lane(0), batch_of(b"a")
    lane.producer, lane.epoch, lane.sequence = 5, 1, 40
    batch.stamped(lane.stamp(batch))
    batch.uncertain = True
    lane.renew(producer_lost=False)
    assert lane.stamp(batch) == (5, 1, 40)
    assert lane.stamp(batch_of(b"b")) == (5, 2, 0)


def test_a_producer_without_epochs_left_asks_to_be_replaced() -> None:
    lane = _Lane(0)
    lane.producer, lane.epoch, lane.sequence = 5, EPOCH_MAX, 40
    lane.renew(producer_lost=False)
    assert lane.stamp(batch_of(b"a")) == (NO_PRODUCER, 0, 0)


def test_a_fetch_is_cut_into_whole_batches() -> None:
    one, two = bytes(batch_of(b"a", b"b").stamped((1, 0, 0))), bytes(batch_of(b"c").stamped((1, 0, 2)))
    two = (2).to_bytes(8, "big") + two[8:]
    for torn in (0, 10, 70):
        chunks = list(_cut(one + two + one[:torn]))
        assert [(chunk.first, chunk.end) for chunk in chunks] == [(0, 2), (2, 3)]
        assert [record.value for chunk in chunks for record in chunk.batch] == [b"a", b"b", b"c"]
    with pytest.raises(UnavailableError, match="damaged"):
        list(_cut(one[:-1] + b"\xff"))


def test_a_produce_request_names_the_topic_as_the_broker_understands() -> None:
    request = ProduceRequest("name", b"0123456789abcdef", 1_000, [(3, bytearray(b"batch"))])
    by_id, by_name = request.prepare({0: (0, 13)}), request.prepare({0: (3, 12)})
    assert isinstance(by_id, ProduceById)
    assert isinstance(by_name, ProduceByName)
    assert b"0123456789abcdef" in by_id.encode()
    assert b"name" in by_name.encode()
    assert spell_topic_id(b"\xff" * 16) == "_" * 21 + "w"


def test_chunks_of_a_file_come_back_as_records() -> None:
    bodies = [b"", b"x" * 200_000, b"y" * 100_000, b"z" * 300_000, b"tail"]
    chunks = list(_chunks(bodies))
    assert [first for first, _ in chunks] == [0, 2, 3, 4]
    assert [body for _, chunk in chunks for body in _unpack(_lengths(chunk), b"".join(chunk))] == bodies


def test_futures_that_were_cancelled_are_left_alone() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[int]] = [loop.create_future() for _ in range(4)]
        futures[1].cancel()
        settle(futures[:3], 7)
        fail(futures, UnavailableError, "why")
        assert [future.result() for future in (futures[0], futures[2])] == [7, 9]
        assert isinstance(futures[3].exception(), UnavailableError)

    asyncio.run(test())


def test_trouble_is_told_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble("here")
    with caplog.at_level(logging.INFO):
        trouble.over()
        for reason in ("first", "second"):
            trouble.begin(reason)
        assert trouble.reason == "second"
        trouble.over()
        trouble.over()
    assert [record.message for record in caplog.records] == ["the log cannot be used", "the log can be used again"]
    assert trouble.reason is None


def test_landed_positions_are_passed_on_once_and_kept_when_that_fails() -> None:
    passed: list[dict[int, int]] = []

    async def pass_on(positions: dict[int, int]) -> None:
        passed.append(positions)
        if len(passed) == 1:
            landed.tell({0: 9})
            raise UnavailableError("not now")
        done.set()

    async def test() -> None:
        landed.tell({})
        landed.tell({0: 5, 1: 3})
        landed.tell({0: 4})
        await done.wait()
        await landed.close()
        assert passed == [{0: 5, 1: 3}, {0: 9, 1: 3}]

    done = asyncio.Event()
    landed = Landed(pass_on, every_s=0.0)
    asyncio.run(test())
