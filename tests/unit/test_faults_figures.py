"""What a row of `sluice bench faults` is judged by."""

from bench.faults.check import Verdict
from bench.faults.figures import Faulted

HEALTH = 40_000.0


def row(drained_per_s: float, backlog: int) -> Faulted:
    return Faulted(
        name="any",
        verdict=Verdict(),
        first_acknowledged_s=0.0,
        first_landed_s=1.0,
        drained_per_s=drained_per_s,
        health_per_s=HEALTH,
        recovered_s=5.0,
        backlog=backlog,
    )


def test_a_backlog_that_lands_slower_than_in_health_is_missed() -> None:
    assert row(0.79 * HEALTH, 200_000).missed == ["drained at < 0.8 × landing"]
    assert row(0.81 * HEALTH, 200_000).missed == []


def test_a_backlog_that_health_lands_within_a_second_is_not_judged() -> None:
    assert row(0.2 * HEALTH, 39_999).drained is None
    assert row(0.2 * HEALTH, 40_000).missed == ["drained at < 0.8 × landing"]
