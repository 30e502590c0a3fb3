"""Produce requests and answers, written and read in one go: as aiokafka's own types have them, field by field."""

from io import BytesIO
from typing import Any

import pytest
from aiokafka.protocol.types import CompactArray, CompactBytes, Int16, Int32, Int64

from runtime.log.kafka_wire import NO_TAGS, TAGS, TEXT, Batches, Written

BATCHES: Any = CompactArray(("partition", Int32), ("records", CompactBytes), TAGS)
WRITTEN: Any = CompactArray(
    ("partition", Int32),
    ("error_code", Int16),
    ("base_offset", Int64),
    ("log_append_time", Int64),
    ("log_start_offset", Int64),
    ("record_errors", CompactArray(("index", Int32), ("message", TEXT), TAGS)),
    ("error_message", TEXT),
    TAGS,
)


@pytest.mark.parametrize("count", [0, 1, 200])
def test_batches_are_written_as_the_protocol_has_them(count: int) -> None:
    batches = [(partition, bytearray(b"x" * (partition * 101 + 1))) for partition in range(count)]

    written = Batches.encode(batches)

    assert written == BATCHES.encode([(partition, records, NO_TAGS) for partition, records in batches])


def test_answers_are_read_whether_or_not_there_is_more_to_tell() -> None:
    answers = [
        (0, 0, 2**40, -1, 7, [], None, NO_TAGS),
        (1, 87, -1, -1, -1, [(3, "no key", NO_TAGS)], "records are refused", NO_TAGS),
        (2, 3, -1, -1, -1, [], "", NO_TAGS),
        (3, 0, 5, 1_700_000_000_000, 0, [], None, NO_TAGS),
    ]
    wire = BytesIO(WRITTEN.encode(answers) + b"next")

    read = Written.decode(wire)

    assert [(*answer[:5], list(answer[5]), *answer[6:]) for answer in read] == answers
    assert wire.read() == b"next"
