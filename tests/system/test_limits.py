"""Limits of a running installation: over several processes, over their ends, and as an operator sets them."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID
from zlib import crc32

import pytest

from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import Answer, ask, eventually
from tests.system.roles import clean_environment, refusal, role, sluice

BODY = b'{"measurements":[{"type":"temperature","value":21.5}]}'
WINDOW_S = 60
#: What a test needs of a window.
ENOUGH_S = 40


class Place(NamedTuple):
    """A database with a demo organisation, a SQLite log, and a directory for what is counted."""

    environment: dict[str, str]
    demo: dict[str, Any]

    def limits(self, *arguments: str) -> Any:
        return json.loads(sluice(self.environment, "limits", *arguments, "--json"))


@pytest.fixture
def place(bare_database: Database, tmp_path: Path) -> Place:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=f"sqlite:///{tmp_path}/log",
        SLUICE_DATA_DIR=str(tmp_path),
        SLUICE_SECRET_KEYS=str(new_ring()),
    )
    sluice(environment, "migrate")
    return Place(environment, json.loads(sluice(environment, "seed", "--json")))


def post(url: str, token: str, times: int) -> Sequence[Answer]:
    """So many requests, eight at a time, each on a connection of its own."""
    with ThreadPoolExecutor(8) as threads:
        return list(
            threads.map(lambda _: ask(f"{url}/v1/ingest", token=token, method="POST", body=BODY), range(times))
        )


def begin_window(device: str) -> None:
    """Wait until enough is left of the device's minute."""
    left_s = WINDOW_S - (time.time() + crc32(UUID(device).bytes) % (WINDOW_S * 10**6) / 1e6) % WINDOW_S
    if left_s < ENOUGH_S:
        time.sleep(left_s + 0.1)


def test_sixty_a_minute_hold_across_processes(place: Place) -> None:
    device, token = place.demo["device_id"], place.demo["ingest_token"]
    limits = ("set", "--device", device, "--requests-per-minute")
    # The demo's device has no limit until it is given one.
    assert place.limits("show", "--device", device)["requests_per_minute"] == 0
    assert place.limits(*limits, "default")["requests_per_minute"] is None
    with role(place.environment, "ingest", "--listen", "127.0.0.1:0", "--processes", "2") as ingest:
        begin_window(device)
        answers: list[Answer] = []

        def both_took_some() -> bool:
            answers.extend(post(ingest.url, token, 75))
            return len(answers) > 75 and len({answer.headers["X-Request-Id"][:12] for answer in answers}) == 2

        eventually("both processes take some", both_took_some, ENOUGH_S / 2)
        assert [answer.status for answer in answers].count(202) == 60
        assert {answer.status for answer in answers} == {202, 429}
        place.limits(*limits, "0")
        eventually("the override is felt", lambda: {answer.status for answer in post(ingest.url, token, 40)} == {202})


def test_what_was_used_of_a_day_outlives_a_killed_process(place: Place) -> None:
    token = place.demo["ingest_token"]
    allowed = 20
    place.limits("set", "--device", place.demo["device_id"], "--bytes-per-day", str(allowed * len(BODY)))
    with role(place.environment, "ingest", "--listen", "127.0.0.1:0") as ingest:
        assert {answer.status for answer in post(ingest.url, token, allowed // 2)} == {202}
        ingest.kill()
    with role(place.environment, "ingest", "--listen", "127.0.0.1:0", "--processes", "2") as ingest:
        statuses = [answer.status for answer in post(ingest.url, token, allowed)]
        assert statuses.count(202) == allowed // 2
        assert statuses.count(429) == allowed // 2
        (refused, *_) = (answer for answer in post(ingest.url, token, 1))
        limit = refused.json()["error"]["limit"]
        assert (limit["name"], limit["value"]) == ("bytes_per_day", allowed * len(BODY))


def test_unknown_callers_are_told_apart_behind_a_trusted_proxy(place: Place) -> None:
    environment = place.environment | {
        "SLUICE_TRUSTED_PROXIES": "127.0.0.1,10.0.0.0/8",
        "SLUICE_LIMIT_UNKNOWN_REQUESTS_PER_MINUTE": "3",
    }

    def from_address(address: str) -> int:
        forwarded = {"X-Forwarded-For": f"{address}, 10.1.1.1"}
        return ask(f"{ingest.url}/v1/ingest", token="none", method="POST", body=BODY, **forwarded).status

    with role(environment, "ingest", "--listen", "127.0.0.1:0") as ingest:
        assert from_address("203.0.113.1") == 401
        eventually("the address is limited", lambda: from_address("203.0.113.1") == 429)
        assert from_address("203.0.113.2") == 401
        assert post(ingest.url, place.demo["ingest_token"], 1)[0].status == 202


def test_an_operator_sees_limits_and_is_told_what_is_wrong(place: Place) -> None:
    demo = place.demo
    assert place.limits("show", "--organisation", demo["organisation_id"])["requests_per_minute"] == 0
    assert place.limits("show", "--site", demo["site_id"])["requests_per_minute"] is None
    place.limits("set", "--site", demo["site_id"], "--readings-per-minute", "500")
    shown = sluice(place.environment, "limits", "show", "--site", demo["site_id"])
    assert "readings_per_minute = 500  [override]" in shown
    assert "requests_per_minute = 600  [SLUICE_LIMIT_GATEWAY_REQUESTS_PER_MINUTE as set here]" in shown
    for arguments, message in (
        (("--device", demo["site_id"], "--bytes-per-day", "1"), "there is no device"),
        (("--device", demo["device_id"], "--bytes-per-day", "-1"), "--bytes-per-day '-1' is neither `default` nor"),
        (("--device", demo["device_id"]), "name a limit to set"),
        (("--bytes-per-day", "1"), "by one of --device, --site and --organisation"),
    ):
        assert message in refusal(place.environment, "limits", "set", *arguments)


def test_without_a_place_for_counts_ingest_runs_and_says_so(place: Place, tmp_path: Path) -> None:
    (tmp_path / "limits").touch()
    with role(place.environment, "ingest", "--listen", "127.0.0.1:0") as ingest:
        eventually("it is told", lambda: "limits hold for this process alone" in str(ingest.lines))
        assert post(ingest.url, place.demo["ingest_token"], 1)[0].status == 202
