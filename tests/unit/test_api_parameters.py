"""Query parameters of the reading routes: what is wrong is named, and nothing breaks the parsing."""

import contextlib
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import MultiDict

from api.auth import presented_key
from api.errors import ApiError
from api.parameters import Span, known_once, parse_time, series_filter, span
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, make_token

DEVICE = "01a1fc35-2541-757a-960f-61e37ea28410"


def span_of(**query: str) -> Span:
    return span({name.rstrip("_"): text for name, text in query.items()}, limit_default=1000, limit_max=10_000)


def test_what_is_left_out_has_a_default() -> None:
    assert span_of() == Span(None, None, False, 1000, None)
    assert series_filter({"device_id": DEVICE}).device_id == UUID(DEVICE)


def test_an_empty_label_is_a_label() -> None:
    assert series_filter({"device_id": DEVICE, "label": ""}).label == ""
    assert series_filter({"device_id": DEVICE}).label is None


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-21T03:04:05Z",
        "2026-11-21t03:04:05z",
        "2026-11-21T04:04:05+01:00",
        "2026-11-21T04:04:05 01:00",  # an unescaped plus sign
        "2026-11-21T02:34:05-00:30",
        "1795230245",
        "1795230245.0000009",
        "2026-11-21T03:04:05.0000009Z",
    ],
)
def test_times_in_both_ways(text: str) -> None:
    assert parse_time(text) == datetime(2026, 11, 21, 3, 4, 5, tzinfo=UTC)


def test_times_before_1970() -> None:
    assert parse_time("-1.5") == datetime(1969, 12, 31, 23, 59, 58, 500_000, tzinfo=UTC)


@given(
    st.datetimes(
        min_value=datetime(1, 1, 3),  # noqa: DTZ001
        max_value=datetime(9999, 12, 29),  # noqa: DTZ001
        timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    )
)
def test_every_time_is_read_as_it_is_written(moment: datetime) -> None:
    assert parse_time(moment.isoformat()) == moment


@given(st.text(), st.sampled_from(["from", "to", "limit", "order", "cursor", "metric", "label", "device_id"]))
def test_no_text_breaks_the_parsing(text: str, name: str) -> None:
    query = {"device_id": DEVICE} | {name: text}
    with contextlib.suppress(ApiError):
        series_filter(query)
        span(query, limit_default=1, limit_max=10)


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ({"from_": "yesterday"}, "from"),
        ({"from_": "2026-11-21"}, "from"),
        ({"from_": "2026-11-21T03:04:05"}, "from"),
        ({"to": "2026-13-21T03:04:05Z"}, "to"),
        ({"to": "999999999999"}, "to"),
        ({"from_": "2", "to": "1"}, "from"),
        ({"limit": "0"}, "limit"),
        ({"limit": "10001"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": "١"}, "limit"),
        ({"order": "up"}, "order"),
        ({"cursor": "x" * 600}, "cursor"),
    ],
)
def test_what_is_wrong_is_named(query: dict[str, str], name: str) -> None:
    with pytest.raises(ApiError) as raised:
        span_of(**query)
    assert raised.value.message.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "query", [{}, {"device_id": ""}, {"device_id": "fridge"}, {"metric": "a\0"}, {"label": "x" * 257}]
)
def test_a_series_that_cannot_be_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(ApiError):
        series_filter({"device_id": DEVICE} | query if query and "device_id" not in query else query)


def test_a_misspelt_or_doubled_parameter_does_not_widen_the_answer() -> None:
    with pytest.raises(ApiError, match="metrc: is no parameter here"):
        known_once(MultiDict({"metrc": "temperature"}), frozenset({"metric"}))
    with pytest.raises(ApiError, match="metric: stands there twice"):
        known_once(MultiDict([("metric", "a"), ("metric", "b")]), frozenset({"metric"}))


@pytest.mark.parametrize("header", [None, "", "Basic abc", "sk_live_abc"])
def test_who_shows_no_key_is_asked_for_one(header: str | None) -> None:
    with pytest.raises(ApiError) as raised:
        presented_key(header)
    assert (raised.value.status, raised.value.code) == (401, "auth_required")


def test_what_was_never_a_key_is_turned_away_without_a_look_up() -> None:
    for token in ("sk_live_abc", make_token(DEVICE_PREFIX), "", "ü" * 44):
        with pytest.raises(ApiError) as raised:
            presented_key(f"Bearer {token}")
        assert raised.value.code == "token_invalid"
    key = make_token(API_KEY_PREFIX)
    assert presented_key(f"bearer  {key} ") == key
