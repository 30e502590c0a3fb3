"""When landed records may leave a SQLite log: after a while, or when they take too much room."""

from runtime.clock import ManualClock
from runtime.log.keeping import Kept

HOUR = 3600.0


def test_what_has_landed_goes_after_its_time() -> None:
    clock = ManualClock()
    kept = Kept(24 * HOUR, 1_000, clock.monotonic)
    assert kept.due({0: 5, 1: 2}, 0) == {}
    clock.advance(12 * HOUR)
    assert kept.due({0: 9}, 0) == {}
    clock.advance(12 * HOUR)
    assert kept.due({0: 10}, 0) == {0: 5, 1: 2}
    clock.advance(12 * HOUR)
    assert kept.due({}, 0) == {0: 9, 1: 2}
    clock.advance(30 * HOUR)
    assert kept.due({1: 3}, 0) == {0: 10, 1: 2}


def test_the_oldest_go_first_where_room_is_short() -> None:
    clock = ManualClock()
    kept = Kept(24 * HOUR, 1_000, clock.monotonic)
    for position in (1, 2, 3):
        assert kept.due({0: position}, 1_000) == {}
        clock.advance(HOUR)
    assert [kept.due({0: 4}, 1_001)[0] for _ in range(5)] == [1, 2, 3, 4, 4]


def test_without_a_time_everything_goes_at_once() -> None:
    kept = Kept(0.0, 1_000, ManualClock().monotonic)
    assert kept.due({0: 5}, 0) == {0: 5}
    assert kept.due({0: 6}, 0) == {0: 6}


def test_marks_are_bounded() -> None:
    clock = ManualClock()
    kept = Kept(24 * HOUR, 1_000, clock.monotonic)
    for position in range(100_000):
        kept.due({0: position}, 0)
        clock.advance(1.0)
    assert len(kept._marks) <= 201
