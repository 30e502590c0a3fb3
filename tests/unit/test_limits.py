"""Limits and the counters that processes share: what holds across them, across restarts, and in little room."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest

from ingest.credentials import Grant
from ingest.limits import (
    BYTES,
    KINDS,
    READINGS,
    REQUESTS,
    Allowance,
    Cost,
    Kind,
    LimitExceededError,
    Limits,
    LimitSettings,
    Meters,
    defaults,
)
from ingest.limits_table import Table, open_table
from runtime.clock import ManualClock

ROWS = 1024
ADDRESS = bytes(15) + b"\x07"
NO_LIMITS = {f"limit_{scope}_{kind.name}": 0 for scope in ("device", "gateway", "organisation") for kind in KINDS}


def grant(
    kind: str = "device",
    organisation: bytes = b"o" * 16,
    device: bytes | None = None,
    limits: tuple[int | None, ...] | None = None,
) -> Grant:
    own = device or uuid4().bytes
    return Grant(
        kind,
        organisation,
        own if kind == "device" else None,
        own if kind == "gateway" else None,
        "",
        False,
        30,
        float("inf"),
        b"",
        0,
        0.0,
        limits,
    )


@contextmanager
def opened(directory: Path, clock: ManualClock, **settings: int) -> Iterator[Limits]:
    """The limits of one process; all are off but those given."""
    limits = Limits(LimitSettings(**NO_LIMITS | settings), clock, directory)
    try:
        yield limits
    finally:
        limits.close()


class Meter:
    """One limit of one subject, as one process counts it."""

    def __init__(self, meters: Meters, key: bytes, kind: Kind, value: int) -> None:
        values = tuple(value if one is kind else 0 for one in KINDS)
        self._meters, self._key, self._kind = meters, key, kind
        self._allowance = Allowance("device", (values[0], values[1], values[2]))

    def take(self, amount: int, now_us: int) -> bool:
        row = self._meters.row(self._key, self._allowance, now_us)
        return self._meters.take(row, self._kind, amount, now_us)

    def used(self, now_us: int) -> int:
        return self._meters.used(self._meters.row(self._key, self._allowance, now_us), self._kind, now_us)


def allowed(limits: Limits, sender: Grant, clock: ManualClock, times: int) -> int:
    """How many of so many requests pass."""
    passed = 0
    for _ in range(times):
        try:
            limits.request(sender, clock.now_us())
        except LimitExceededError:
            continue
        passed += 1
    return passed


# ---------------------------------------------------------------- one process


def test_a_minute_allows_its_limit_and_the_next_one_again(tmp_path: Path) -> None:
    clock, sender = ManualClock(), grant()
    with opened(tmp_path, clock, limit_device_requests_per_minute=60) as limits:
        assert allowed(limits, sender, clock, 100) == 60
        with pytest.raises(LimitExceededError) as refused:
            limits.request(sender, clock.now_us())
        error = refused.value
        assert (error.kind, error.scope, error.value, error.used) == (REQUESTS, "device", 60, 60)
        assert 1 <= error.resets_in_s <= 60
        clock.advance(error.resets_in_s - 1)
        assert allowed(limits, sender, clock, 1) == 0
        clock.advance(1)
        assert allowed(limits, sender, clock, 100) == 60


def test_devices_have_limits_of_their_own_and_share_their_organisation_s(tmp_path: Path) -> None:
    clock, one, other, stranger = ManualClock(), grant(), grant(), grant(organisation=b"p" * 16)
    limit = {"limit_device_requests_per_minute": 7, "limit_organisation_requests_per_minute": 10}
    with opened(tmp_path, clock, **limit) as limits:
        assert allowed(limits, one, clock, 9) == 7
        assert allowed(limits, other, clock, 9) == 3
        with pytest.raises(LimitExceededError) as refused:
            limits.request(other, clock.now_us())
        assert refused.value.scope == "organisation"
        assert allowed(limits, stranger, clock, 9) == 7


def test_what_the_organisation_refuses_is_not_counted_against_the_device(tmp_path: Path) -> None:
    clock, one, other = ManualClock(), grant(), grant()
    limit = {"limit_device_readings_per_minute": 100, "limit_organisation_readings_per_minute": 120}
    with opened(tmp_path, clock, **limit) as limits:
        limits.volume(one, 90, 1)
        with pytest.raises(LimitExceededError, match="organisation's limit of 120 readings a minute"):
            limits.volume(other, 40, 1)
        limits.volume(other, 30, 1)
        with pytest.raises(LimitExceededError, match="device's limit of 100 readings a minute") as refused:
            limits.volume(one, 11, 1)
        assert refused.value.used == 90


def test_a_request_that_has_too_many_bytes_gives_its_readings_back(tmp_path: Path) -> None:
    clock, sender = ManualClock(), grant()
    limit = {"limit_device_readings_per_minute": 100, "limit_device_bytes_per_day": 1_000}
    with opened(tmp_path, clock, **limit) as limits:
        with pytest.raises(
            LimitExceededError, match="1001 bytes in one request are more than the device's whole limit"
        ):
            limits.volume(sender, 100, 1_001)
        limits.volume(sender, 100, 1_000)


def test_a_day_ends_at_midnight_utc(tmp_path: Path) -> None:
    clock, sender = ManualClock(1_700_006_400_000_000 - 3_600_000_000), grant()  # 23:00
    with opened(tmp_path, clock, limit_device_bytes_per_day=1_000) as limits:
        limits.volume(sender, 1, 1_000)
        with pytest.raises(LimitExceededError) as refused:
            limits.volume(sender, 1, 1)
        assert (refused.value.kind, refused.value.resets_in_s) == (BYTES, 3_600)
        clock.advance(3_600)
        limits.volume(sender, 1, 1_000)


@pytest.mark.parametrize("kind", ["gateway", "api_key"])
def test_a_gateway_and_a_key_are_limited_too(tmp_path: Path, kind: str) -> None:
    clock, sender = ManualClock(), grant(kind)
    limit = {"limit_gateway_requests_per_minute": 4, "limit_organisation_requests_per_minute": 6}
    with opened(tmp_path, clock, **limit) as limits:
        assert allowed(limits, sender, clock, 9) == (4 if kind == "gateway" else 6)


def test_an_override_counts_from_the_moment_it_is_known_and_0_is_no_limit(tmp_path: Path) -> None:
    clock, device = ManualClock(), uuid4().bytes
    with opened(tmp_path, clock, limit_device_requests_per_minute=5) as limits:
        assert allowed(limits, grant(device=device), clock, 9) == 5
        more = (8, None, None, None, None, None)
        assert allowed(limits, grant(device=device, limits=more), clock, 9) == 3
        assert allowed(limits, grant(device=device, limits=(0, *more[1:])), clock, 99) == 99
        whole = (8, None, None, 2, None, None)
        assert allowed(limits, grant(device=uuid4().bytes, limits=whole), clock, 9) == 2
        assert allowed(limits, grant(device=device), clock, 9) == 0


def test_what_was_taken_ahead_of_a_limit_is_nobody_s_under_another(tmp_path: Path) -> None:
    clock, device = ManualClock(), uuid4().bytes
    high, low = ((None, value, None, None, None, None) for value in (1_000_000, 100))
    with opened(tmp_path, clock) as limits:
        limits.volume(grant(device=device, limits=high), 60, 1)
        limits.volume(grant(device=device, limits=low), 40, 1)
        with pytest.raises(LimitExceededError) as refused:
            limits.volume(grant(device=device, limits=low), 1, 1)
        assert refused.value.used == 100
        limits.volume(grant(device=device, limits=high), 1_000_000 - 100, 1)
        with pytest.raises(LimitExceededError):
            limits.volume(grant(device=device, limits=high), 1, 1)


def test_an_organisation_has_one_limit_whoever_sends(tmp_path: Path) -> None:
    """What was taken ahead for one of its devices is there for another one with overrides of its own."""
    clock, plain, special = ManualClock(), grant(), grant(limits=(50, None, None, None, None, None))
    with opened(tmp_path, clock, limit_organisation_requests_per_minute=1_000) as limits:
        rows = {limits._rows(sender, clock.now_us())[-1] for sender in (plain, special, grant("gateway"))}
        assert len(rows) == 1
        limits.request(plain, clock.now_us())
        spare = limits._subjects.requests[rows.pop()]
        limits.request(special, clock.now_us())
        assert [count for count in limits._subjects.requests if count > 50] == [spare - 1]


def test_overrides_of_many_kinds_take_bounded_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingest.limits._ALLOWANCES_MAX", 10)
    clock, device = ManualClock(), uuid4().bytes
    with opened(tmp_path, clock, limit_subjects_max=64) as limits:
        for value in range(1, 1_000):
            limits.request(grant(device=device, limits=(value, None, None, None, None, None)), clock.now_us())
        assert len(limits._allowances) + len(limits._resolved["device"]) <= 30
        with pytest.raises(LimitExceededError):
            limits.request(grant(device=device, limits=(999, None, None, None, None, None)), clock.now_us())


def test_a_limit_of_any_size_is_reached_exactly_by_a_single_process(tmp_path: Path) -> None:
    clock, random = ManualClock(), Random(4)
    for value in (1, 59, 255, 256, 257, 5_000, 1_000_000):
        sender, left = grant(limits=(None, value, None, None, None, None)), value
        with opened(tmp_path / str(value), clock) as limits:
            while left:
                some = random.randint(1, min(left, max(1, value // 7)))
                limits.volume(sender, some, 1)
                left -= some
            with pytest.raises(LimitExceededError):
                limits.volume(sender, 1, 1)


def test_every_default_is_a_limit() -> None:
    assert all(value > 0 for values in defaults(LimitSettings()).values() for value in values)


# ---------------------------------------------------------------- several processes, and their ends


@pytest.mark.parametrize("value", [1, 60, 1_000, 50_000])
def test_a_limit_holds_across_processes(tmp_path: Path, value: int) -> None:
    clock, sender, random = ManualClock(), grant(), Random(value)
    limit = {"limit_device_requests_per_minute": value}
    with opened(tmp_path, clock, **limit) as a, opened(tmp_path, clock, **limit) as b:
        with opened(tmp_path, clock, **limit) as c:
            passed = sum(allowed(random.choice((a, b, c)), sender, clock, 1) for _ in range(2 * value + 10))
            # What a process holds ahead goes to none of the others: 1/256 of the limit by all of them.
            assert value * 255 // 256 <= passed <= value
            assert passed == value or value > 256
        assert allowed(a, sender, clock, 500) + allowed(b, sender, clock, 500) + passed <= value


def test_a_process_that_begins_later_sees_what_was_used_and_is_seen(tmp_path: Path) -> None:
    clock, sender = ManualClock(), grant()
    limit = {"limit_device_requests_per_minute": 60}
    with opened(tmp_path, clock, **limit) as first:
        assert allowed(first, sender, clock, 20) == 20
        with opened(tmp_path, clock, **limit) as second:
            assert allowed(second, sender, clock, 25) == 25
            assert allowed(first, sender, clock, 99) == 15
            assert allowed(second, sender, clock, 99) == 0


def test_what_was_used_of_a_day_outlives_all_processes(tmp_path: Path) -> None:
    clock, sender = ManualClock(), grant()
    limit = {"limit_device_bytes_per_day": 1_000_000}
    with opened(tmp_path, clock, **limit) as first, opened(tmp_path, clock, **limit) as second:
        first.volume(sender, 1, 400_000)
        second.volume(sender, 1, 300_000)
    with opened(tmp_path, clock, **limit) as limits:
        with pytest.raises(LimitExceededError) as refused:
            limits.volume(sender, 1, 300_001)
        assert refused.value.used == 700_000
        limits.volume(sender, 1, 300_000)


def test_a_process_that_was_killed_leaves_its_count_and_its_column(tmp_path: Path) -> None:
    clock = ManualClock()
    child = os.fork()
    if not child:  # nothing is closed: the process is gone
        table = Table(ROWS, clock, tmp_path)
        took = Meter(Meters(table), b"k" * 16, REQUESTS, 60).take(40, clock.now_us())
        os._exit(0 if took else 1)
    assert os.waitpid(child, 0)[1] == 0
    table = Table(ROWS, clock, tmp_path)
    assert table.columns == 1
    meter = Meter(Meters(table), b"k" * 16, REQUESTS, 60)
    assert not meter.take(21, clock.now_us())
    assert meter.take(20, clock.now_us())
    table.close()


@pytest.mark.parametrize("value", [500, 20_000])
def test_processes_that_count_at_the_same_time_never_allow_more(tmp_path: Path, value: int) -> None:
    clock, sender = ManualClock(), grant()
    reading, writing = os.pipe()
    (begin, begun), (end, ended) = os.pipe(), os.pipe()
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            with opened(tmp_path, clock, limit_device_requests_per_minute=value) as limits:
                os.write(writing, b"open")
                os.read(begin, 1)
                os.write(writing, allowed(limits, sender, clock, value).to_bytes(4, "big"))
                os.read(end, 1)
            os._exit(0)
        children.append(child)
    assert [os.read(reading, 4) for _ in children] == [b"open"] * 3
    os.write(begun, b"...")
    passed = sum(int.from_bytes(os.read(reading, 4), "big") for _ in children)
    os.write(ended, b"...")
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert 0.9 * value <= passed <= value


def test_columns_without_use_today_are_forgotten_and_those_with_are_not(tmp_path: Path) -> None:
    clock = ManualClock()
    tables = [Table(ROWS, clock, tmp_path) for _ in range(4)]
    assert tables[-1].columns == 4
    for table in tables:
        table.close()
    same_day = Table(ROWS, clock, tmp_path)
    assert same_day.columns == 4
    same_day.close()
    clock.advance(86_400)
    next_day = Table(ROWS, clock, tmp_path)
    assert next_day.columns == 1
    next_day.close()


# ---------------------------------------------------------------- room


def test_a_table_that_overflows_forgets_who_was_not_seen_for_longest() -> None:
    clock = ManualClock()
    table = Table(16, clock)
    keys = [uuid4().bytes for _ in range(17)]
    process = Meters(table)
    meters = [Meter(process, key, BYTES, 100) for key in keys]
    for meter in meters[:16]:
        assert meter.take(60, clock.now_us())
        clock.advance(60)
    again = Meter(process, keys[0], BYTES, 100)  # seen again, in a later minute
    assert not again.take(60, clock.now_us())
    clock.advance(60)
    assert meters[16].take(60, clock.now_us())
    used = [Meter(process, keys[number], BYTES, 100).used(clock.now_us()) for number in (0, 2, 15, 16)]
    assert used == [60, 60, 60, 60]
    assert meters[1].used(clock.now_us()) == 0


def test_a_row_that_was_given_away_is_asked_for_again() -> None:
    """Its former holder must not count for the new one."""
    clock = ManualClock()
    table = Table(16, clock)
    process = Meters(table)
    first = Meter(process, uuid4().bytes, BYTES, 100)
    assert first.take(50, clock.now_us())
    clock.advance(60)
    others = [Meter(process, uuid4().bytes, BYTES, 100) for _ in range(16)]
    assert all(other.take(30, clock.now_us()) for other in others)
    assert first.take(100, clock.now_us())
    survivors = [other for other in others if other.used(clock.now_us()) == 30]
    assert len(survivors) >= 15 - 1


def test_a_row_that_another_process_gave_away_is_not_counted_in_again(tmp_path: Path) -> None:
    """Neither by what was found there before, nor by what was taken ahead there."""
    clock, sender = ManualClock(), grant()
    limit = {"limit_subjects_max": 16, "limit_device_readings_per_minute": 2_000}
    with opened(tmp_path, clock, **limit) as one, opened(tmp_path, clock, **limit) as other:
        one.request(sender, clock.now_us())
        one.volume(sender, 1, 1)
        clock.advance(60)
        strangers = [grant() for _ in range(16)]
        for stranger in strangers:
            other.volume(stranger, 2_000, 1)
        one.volume(sender, 1_000, 1)
        one.volume(sender, 1_000, 1)
        with pytest.raises(LimitExceededError) as refused:
            one.volume(sender, 1, 1)
        assert (refused.value.scope, refused.value.used) == ("device", 2_000)
        refusals = 0
        for stranger in strangers:
            try:
                other.volume(stranger, 1, 1)
            except LimitExceededError:
                refusals += 1
        assert refusals == 15  # of whom one was displaced now


def test_what_was_taken_ahead_ends_with_its_window_and_not_before(tmp_path: Path) -> None:
    clock, sender = ManualClock(1_700_006_400_000_000 - 600_000_000), grant()  # 23:50
    limit = {"limit_device_requests_per_minute": 1_000, "limit_device_bytes_per_day": 1_000_000}
    with opened(tmp_path, clock, **limit) as limits:
        for _ in range(9):
            assert allowed(limits, sender, clock, 1) == 1
            limits.volume(sender, 1, 1)
            clock.advance(60)
        assert allowed(limits, sender, clock, 2_000) == 1_000
        with pytest.raises(LimitExceededError) as refused:
            limits.volume(sender, 1, 1_000_000)
        assert refused.value.used == 9
        clock.advance(60)
        limits.volume(sender, 1, 1)
        limits.volume(sender, 1, 1_000_000 - 1)
        with pytest.raises(LimitExceededError):
            limits.volume(sender, 1, 1)


def test_who_is_given_a_row_begins_with_nothing(tmp_path: Path) -> None:
    clock = ManualClock()
    limit = {"limit_subjects_max": 16, "limit_device_readings_per_minute": 2_000}
    with opened(tmp_path, clock, **limit) as limits:
        for _ in range(16):
            limits.volume(grant(), 1, 1)  # and some is taken ahead
        displacing = grant()
        limits.volume(displacing, 2_000, 1)
        with pytest.raises(LimitExceededError):
            limits.volume(displacing, 1, 1)


def test_who_is_displaced_within_its_request_is_counted_where_it_stands_then(tmp_path: Path) -> None:
    clock, sender = ManualClock(), grant()
    limit = {"limit_subjects_max": 16, "limit_device_readings_per_minute": 2_000}
    with opened(tmp_path, clock, **limit) as limits:
        limits.request(sender, clock.now_us())
        clock.advance(60)
        for _ in range(16):
            limits.seconds_for(grant(), Cost(1, 1, 1), 1.0)
        limits.volume(sender, 2_000, 1)
        (row,) = limits._rows(sender, clock.now_us())
        assert limits._subjects.used(row, READINGS, clock.now_us()) == 2_000


def test_who_is_displaced_by_its_own_organisation_is_served(tmp_path: Path) -> None:
    clock = ManualClock()
    limit = {"limit_device_requests_per_minute": 9, "limit_organisation_requests_per_minute": 99}
    with opened(tmp_path, clock, limit_subjects_max=16, **limit) as limits:
        for _ in range(200):
            assert allowed(limits, grant(organisation=uuid4().bytes), clock, 9) == 9


def test_many_addresses_displace_no_device(tmp_path: Path) -> None:
    clock, sender = ManualClock(), grant()
    limit = {"limit_device_requests_per_minute": 5, "limit_addresses_max": 16, "limit_subjects_max": 16}
    with opened(tmp_path, clock, limit_unknown_requests_per_minute=1, **limit) as limits:
        assert allowed(limits, sender, clock, 3) == 3
        for number in range(5_000):
            limits.count_stranger(number.to_bytes(16, "big"))
        assert limits._unknown is not None
        assert len(limits._unknown.rows) <= 16
        assert allowed(limits, sender, clock, 9) == 2


def test_an_unknown_caller_is_refused_once_too_many_were(tmp_path: Path) -> None:
    clock = ManualClock()
    with opened(tmp_path, clock, limit_unknown_requests_per_minute=3) as limits:
        for _ in range(3):
            limits.check_stranger(ADDRESS)
            limits.count_stranger(ADDRESS)
        with pytest.raises(LimitExceededError, match="address's limit of 3 requests a minute"):
            limits.check_stranger(ADDRESS)
        limits.check_stranger(bytes(16))
        clock.advance(60)
        limits.check_stranger(ADDRESS)


# ---------------------------------------------------------------- files that are not as expected


def test_another_size_begins_anew(tmp_path: Path) -> None:
    clock = ManualClock()
    small = Table(ROWS, clock, tmp_path)
    assert Meter(Meters(small), b"k" * 16, REQUESTS, 9).take(9, clock.now_us())
    large = Table(2 * ROWS, clock, tmp_path)
    assert Meter(Meters(large), b"k" * 16, REQUESTS, 9).take(9, clock.now_us())
    assert not Meter(Meters(small), b"k" * 16, REQUESTS, 9).take(1, clock.now_us())
    small.close()
    large.close()


def test_files_that_are_damaged_begin_anew(tmp_path: Path) -> None:
    clock = ManualClock()
    Table(ROWS, clock, tmp_path).close()
    (tmp_path / "index").write_bytes(b"no table")
    table = Table(ROWS, clock, tmp_path)
    assert Meter(Meters(table), b"k" * 16, READINGS, 9).take(9, clock.now_us())
    table.close()


def test_without_a_place_for_files_limits_hold_in_the_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    table = open_table(ROWS, ManualClock(), tmp_path / "file")
    meter = Meter(Meters(table), b"k" * 16, REQUESTS, 9)
    assert meter.take(9, 0)
    assert not meter.take(1, 0)
    assert "limits hold for this process alone" in caplog.text
    table.close()


def test_a_process_stopped_while_it_opens_the_table_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest.limits_table._LOCK_TIMEOUT_S", 0.05)
    held = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="is held by another process"):
        Table(ROWS, ManualClock(), tmp_path)
    os.close(held)
    Table(ROWS, ManualClock(), tmp_path).close()
