"""Query parameters of the reading routes: what is wrong is named, and nothing breaks the parsing."""

import contextlib
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import MultiDict

from api.access.authority import Authority
from api.access.door import Door
from api.access.scopes import READINGS_READ
from api.access.settings import AccessSettings
from api.http.decoding import read_body, read_query
from api.http.operations import PUBLIC, Role, needs
from api.http.parameters import limit_within
from api.http.problems import Problem
from api.http.spelt import parse_time
from api.platform.readings import Page, Whose
from api.settings import ApiSettings
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, make_token, new_ring

DEVICE = "01a1fc35-2541-757a-960f-61e37ea28410"


READS = needs(Role.VIEWER, READINGS_READ)


def page_of(**query: str) -> Page:
    return read_query(Page, MultiDict({"device_id": DEVICE} | {name.rstrip("_"): query[name] for name in query}))


def test_what_is_left_out_has_a_default() -> None:
    page = page_of()
    assert (page.start, page.end, page.order, page.limit, page.cursor) == (None, None, "asc", None, None)
    assert page.device_id == UUID(DEVICE)
    assert limit_within(page.limit, 1_000, 10_000) == 1_000


def test_an_empty_label_is_a_label() -> None:
    assert page_of(label="").label == ""
    assert page_of().label is None


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
    with contextlib.suppress(Problem):
        page_of(**{name: text})


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
        ({"limit": "ten"}, "limit"),
        ({"limit": "١"}, "limit"),
        ({"order": "up"}, "order"),
        ({"cursor": "x" * 1_100}, "cursor"),
        ({"device_id": ""}, "device_id"),
        ({"device_id": "fridge"}, "device_id"),
        ({"metric": "a\0"}, "metric"),
        ({"label": "x" * 257}, "label"),
        ({"metrc": "temperature"}, "metrc"),
    ],
)
def test_what_is_wrong_is_named(query: dict[str, str], name: str) -> None:
    with pytest.raises(Problem) as raised:
        page_of(**query)
    assert raised.value.kind.code == "invalid_parameter"
    assert raised.value.message.startswith(f"{name}: ")
    assert [detail.field for detail in raised.value.details] == [name]


@pytest.mark.parametrize("text", ["null", "NULL", "Null"])
def test_null_is_no_way_to_leave_a_filter_out(text: str) -> None:
    for query in ({"from": text}, {"limit": text}, {"site_id": text}):
        with pytest.raises(Problem) as raised:
            read_query(Page, MultiDict({"device_id": DEVICE} | query))
        assert [detail.field for detail in raised.value.details] == [*query]
    assert page_of(label=text).label == text


class Body(msgspec.Struct):
    whole: int
    text: str = ""


@pytest.mark.parametrize(
    ("raw", "whole", "text"),
    [
        (b'{"whole": 5.0}', 5, ""),
        (b'{"whole": 5e2, "text": "2.0"}', 500, "2.0"),
        (rb'{"whole": 1, "text": "\\u0000"}', 1, r"\u0000"),
    ],
)
def test_a_body_is_read_as_json_means_it(raw: bytes, whole: int, text: str) -> None:
    assert read_body(Body, raw) == Body(whole, text)


@pytest.mark.parametrize("raw", [b'{"whole": 5.5}', b'{"whole": "5"}', rb'{"whole": 1, "text": "\\\u0000"}'])
def test_a_body_of_another_shape_is_refused(raw: bytes) -> None:
    with pytest.raises(Problem) as raised:
        read_body(Body, raw)
    assert raised.value.kind.code == "invalid"


def test_a_limit_beyond_the_setting_is_refused() -> None:
    with pytest.raises(Problem, match="limit: must be a number from 1 to 10"):
        limit_within(11, 1, 10)


def test_a_doubled_parameter_does_not_widen_the_answer() -> None:
    with pytest.raises(Problem, match="metric: stands twice"):
        read_query(Whose, MultiDict([("device_id", DEVICE), ("metric", "a"), ("metric", "b")]))


def authority() -> Authority:
    return Door(None, new_ring(), ApiSettings(), AccessSettings()).authority  # type: ignore[arg-type]


def presented(header: str | None) -> str | None:
    return authority().presented(READS, {} if header is None else {"Authorization": header}, bytes(16))


def test_where_nobody_is_asked_for_nothing_is_looked_at() -> None:
    assert authority().presented(PUBLIC, {"Authorization": "Bearer anything"}, bytes(16)) is None


@pytest.mark.parametrize("header", [None, "", "Basic abc", "sk_live_abc"])
def test_who_shows_no_key_is_asked_for_one(header: str | None) -> None:
    with pytest.raises(Problem) as raised:
        presented(header)
    assert (raised.value.kind.status, raised.value.kind.code) == (401, "auth_required")


def test_what_was_never_a_key_is_turned_away_without_a_look_up() -> None:
    for token in ("sk_live_abc", make_token(DEVICE_PREFIX), "", "ü" * 44):
        with pytest.raises(Problem) as raised:
            presented(f"Bearer {token}")
        assert raised.value.kind.code == "token_invalid"
    key = make_token(API_KEY_PREFIX)
    assert presented(f"bearer  {key} ") == key
