"""What a process tells Prometheus of its health: one series a check and a note, which ends as 0."""

from prometheus_client import REGISTRY

from runtime.health import Health
from runtime.role_metrics import HealthMetrics


def told(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_checks_that_fail_and_notes_are_told_until_they_are_over() -> None:
    health, reasons = Health(), {"check": "the database is away", "note": "spooling"}
    health.register("database of this test", lambda: reasons.get("check"))
    health.note("spool of this test", lambda: reasons.get("note"))
    metrics = HealthMetrics(health)
    metrics.publish()
    assert told("sluice_not_ready", check="database of this test") == 1
    assert told("sluice_noted", note="spool of this test") == 1
    reasons.clear()
    metrics.publish()
    assert told("sluice_not_ready", check="database of this test") == 0
    assert told("sluice_noted", note="spool of this test") == 0


def test_what_never_failed_has_no_series() -> None:
    health = Health()
    health.register("a check that holds", lambda: None)
    HealthMetrics(health).publish()
    assert told("sluice_not_ready", check="a check that holds") is None
