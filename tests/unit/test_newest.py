"""Where the newest readings are looked for first."""

from datetime import UTC, datetime, timedelta

import pytest

from api.readings import raw
from api.readings.raw import Newest

T0 = datetime(2026, 11, 2, tzinfo=UTC)


def seen(minutes: dict[int, int]) -> dict[int, dict[str, datetime]]:
    return {series: {"ts": T0 + timedelta(minutes=minute)} for series, minute in minutes.items()}


def test_nine_of_ten_have_one_since_then() -> None:
    hints = Newest()
    hints.note(seen({series: series for series in range(200)}))
    assert hints.since(range(200)) == T0 + timedelta(minutes=20)
    assert hints.since(range(20, 220)) == T0 + timedelta(minutes=20), "which are all that are known of them"
    assert hints.since(range(21, 221)) is None
    assert hints.since(range(99)) is None, "so few are asked at once"
    hints.note(seen(dict.fromkeys(range(100), 300)))
    assert hints.since(range(200)) == T0 + timedelta(minutes=120)


def test_what_was_seen_last_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "_HINTS_MAX", 150)
    hints = Newest()
    hints.note(seen(dict.fromkeys(range(150), 1)))
    hints.note(seen(dict.fromkeys(range(100), 2)))
    hints.note(seen(dict.fromkeys(range(200, 250), 3)))
    assert hints.since(range(100)) == T0 + timedelta(minutes=2)
    assert hints.since(range(100, 200)) is None
