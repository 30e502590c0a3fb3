"""What is sent: readings that ingest takes as they are, once each, and the same ones as rows for the yardstick."""

import struct
from collections import defaultdict
from uuid import uuid4

import pytest

from bench.errors import BenchError
from bench.pipeline import Options
from bench.workload import METRICS, PG_EPOCH_S, ROW, Fleet, Round
from ingest.admit import Admission, Admitted, Sender
from ingest.formats import measurements_json

BEGIN_S = 1_770_000_000
RECEIVED_US = (BEGIN_S + 86_400) * 1_000_000
SENDER = Sender(uuid4().bytes, uuid4().bytes)


def fleet(devices: int, *, epoch_times: bool = False) -> Fleet:
    return Fleet([f"token-{device}" for device in range(devices)], BEGIN_S, epoch_times)


def body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


def admitted(body: bytes) -> Admitted:
    admission = Admission(future_us=0, year_floor=2015)
    submissions = list(enumerate(measurements_json.decode(body)))
    window = admission.window(RECEIVED_US, 396)
    return admission.admit(submissions, SENDER, window, record_id=bytes(16), request_id="x", way="http")


@pytest.mark.parametrize("epoch_times", [False, True], ids=["rfc3339", "epoch"])
def test_ingest_takes_every_reading_without_a_flag(epoch_times: bool) -> None:
    body = fleet(1, epoch_times=epoch_times).body(0, 40, 100)

    taken = admitted(body)

    assert (taken.accepted, taken.rejections) == (100, [])
    assert {channel.metric for channel in taken.record.channels} == {name for name, _ in METRICS}
    assert all(set(channel.unpack_quality()) == {0} for channel in taken.record.channels)


def test_each_device_keeps_to_a_connection_and_its_order() -> None:
    sent = Round(fleet(5), 8, 8, 12)

    lanes = sent.lanes(2)

    assert sum(map(len, lanes)) == 12
    times: dict[str, list[str]] = defaultdict(list)
    for number, lane in enumerate(lanes):
        for request in lane:
            token = request.partition(b"Bearer ")[2].partition(b"\r\n")[0].decode()
            assert int(token.removeprefix("token-")) % 2 == number
            times[token] += [reading.ts for reading in measurements_json.decode(body_of(request))[0].measurements]
    assert all(stamps == sorted(stamps) for stamps in times.values())


def test_a_further_round_begins_beyond_the_last() -> None:
    first = Round(fleet(3), 0, 4, 7)
    second = Round(first.fleet, first.next_first, 4, 3)

    def rows(sent: Round) -> set[bytes]:
        (copied,) = [body for body, _ in sent.copies(1000)]
        return {copied[begin : begin + ROW.size] for begin in range(19, len(copied) - 2, ROW.size)}

    assert (len(rows(first)), len(rows(second))) == (first.readings, second.readings)
    assert not rows(first) & rows(second)


def test_the_rows_are_what_was_sent() -> None:
    sent = Round(fleet(2), 0, 8, 2)

    copies = list(sent.copies(8))

    assert [count for _, count in copies] == [8, 8]
    stored = set()
    for copied, _ in copies:
        for begin in range(19, len(copied) - 2, ROW.size):
            _, _, series, _, quality, _, us, _, value = ROW.unpack_from(copied, begin)
            stored.add((series, quality, us, value))
    expected = set()
    for device, lane in enumerate(sent.lanes(2)):
        for channel in admitted(body_of(lane[0])).record.channels:
            series = device * 4 + [name for name, _ in METRICS].index(channel.metric) + 1
            for us, value in zip(channel.unpack_times(), channel.unpack_values(), strict=True):
                expected.add((series, 0, us, value))
    assert stored == expected
    assert min(us for _, _, us, _ in stored) == (BEGIN_S - PG_EPOCH_S) * 1_000_000


def test_copy_is_framed_as_postgresql_reads_it() -> None:
    ((copied, _),) = Round(fleet(1), 0, 4, 1).copies(100)

    assert copied.startswith(b"PGCOPY\n\xff\r\n\0")
    assert struct.unpack_from(">h", copied, len(copied) - 2) == (-1,)


def options(**changed: int) -> Options:
    usual = {"readings": 2000, "readings_per_request": 100, "connections": 4, "series": 40}
    return Options(
        **(usual | changed), processes=1, singles=1000, single_connections=8, epoch_times=False
    )  # fmt: skip


@pytest.mark.parametrize("changed", [{"series": 42}, {"series": 12}, {"readings": 2050}, {"readings": 900}], ids=str)
def test_options_that_do_not_fit_are_refused(changed: dict[str, int]) -> None:
    options().check()

    with pytest.raises(BenchError):
        options(**changed).check()
