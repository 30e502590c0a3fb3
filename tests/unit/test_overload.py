"""When a process turns requests away for its loop's lag, and when it takes them again."""

import pytest

from ingest.overload import Overload


def after(overload: Overload, *lags_s: float) -> list[bool]:
    states = []
    for lag_s in lags_s:
        overload.note(lag_s)
        states.append(overload.is_on)
    return states


def ignore(lag_s: float) -> None:
    """Nobody measures here."""


def test_one_pause_is_no_overload_and_two_are() -> None:
    assert after(Overload(1.0, ignore), 5.0, 0.0, 5.0, 0.9, 1.1, 1.2) == [False] * 5 + [True]


def test_it_ends_after_five_moments_in_a_row_below_half_of_the_threshold() -> None:
    overload = Overload(1.0, ignore)
    assert after(overload, 2.0, 2.0, 0.6, 0.6, 0.6, 0.6, 0.6)[-1]
    assert after(overload, 0.4, 0.4, 0.4, 0.4, 0.6, 0.4, 0.4, 0.4, 0.4, 0.4) == [True] * 9 + [False]


@pytest.mark.parametrize("threshold_s", [0.0, 100.0])
def test_a_threshold_of_0_is_none_and_every_lag_is_told(threshold_s: float) -> None:
    told: list[float] = []
    assert not any(after(Overload(threshold_s, told.append), 50.0, 50.0, 50.0))
    assert told == [50.0] * 3
