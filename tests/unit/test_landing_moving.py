"""Where readings with a time of our making go when their place is taken, without a database."""

from hypothesis import given
from hypothesis import strategies as st

from workers.landing.moving import Met, place, windows

TIMES = st.integers(0, 12)
SERIES = st.integers(1, 2)


def met(series_id: int, ts: int, outcome: int) -> Met:
    return Met(outcome, 0, series_id, 4, ts, 1.0, False)


@st.composite
def meetings(draw: st.DrawFn) -> tuple[list[Met], set[tuple[int, int]]]:
    """Readings in the order of series and time, and what stands: where each of them wanted to be, and more."""
    wanted = sorted(draw(st.lists(st.tuples(SERIES, TIMES), max_size=12)))
    standing = draw(st.sets(st.tuples(SERIES, st.integers(0, 25)), max_size=15))
    return [met(*one, outcome) for outcome, one in enumerate(wanted)], standing | set(wanted)


@given(meetings(), st.integers(0, 20))
def test_each_goes_to_the_first_free_time_within_its_reach(
    meeting: tuple[list[Met], set[tuple[int, int]]], reach: int
) -> None:
    moving, taken = meeting
    placed, crowded = place(moving, taken, reach)
    assert sorted([one for one, _ in placed] + crowded) == moving
    occupied = set(taken)
    where = dict(placed)
    for one in moving:
        free = next(at for at in range(one.ts + 1, 100) if (one.series_id, at) not in occupied)
        assert where.get(one) == (free if free - one.ts <= reach else None)
        if one in where:
            occupied.add((one.series_id, free))


@given(meetings(), st.integers(1, 20))
def test_windows_cover_every_place_within_reach_once(
    meeting: tuple[list[Met], set[tuple[int, int]]], reach: int
) -> None:
    moving, _ = meeting
    covered = [(found.series_id, at) for found in windows(moving, reach) for at in range(found.first, found.last + 1)]
    assert len(covered) == len(set(covered))
    assert set(covered) == {(one.series_id, one.ts + step) for one in moving for step in range(1, reach + 1)}
