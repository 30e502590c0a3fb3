"""A site deleted on the real parts while records of it stand in the log and in a spool, and the worker is killed.

`ERASURE_READINGS` sets how many readings it has, for a run by hand.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from runtime.secrets import new_ring
from tests.conftest import exports, run_services
from tests.databases import Database
from tests.support import Answer, ask, eventually, run
from tests.system.roles import Role, clean_environment, role, sluice, start_role
from tests.system.test_people import command
from tests.system.test_spool import Kafka, wait_drained
from tests.system.test_verify import verify

READINGS = int(os.environ.get("ERASURE_READINGS", "50000"))
A_REQUEST = 10_000
NOW = int(datetime.now(UTC).timestamp())
DAY = 86_400
UNLIMITED = {
    f"SLUICE_LIMIT_{whose}_{what}": "0"
    for whose in ("DEVICE", "ORGANISATION")
    for what in ("REQUESTS_PER_MINUTE", "READINGS_PER_MINUTE", "BYTES_PER_DAY")
}


@dataclass(frozen=True)
class Stage:
    """A database, a broker of its own, and an owner's key."""

    environment: dict[str, str]
    database: Database
    kafka: Kafka
    organisation: str
    key: str

    def ingest(self) -> Role:
        return start_role(self.environment, "ingest", "--listen", "127.0.0.1:0")

    def fetch(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        async def work() -> list[tuple[Any, ...]]:
            connection = await asyncpg.connect(self.database.superuser_url)
            try:
                return [tuple(row) for row in await connection.fetch(sql, *values)]
            finally:
                await connection.close()

        return run(work())

    def value(self, sql: str, *values: object) -> Any:
        return self.fetch(sql, *values)[0][0]


@pytest.fixture
def stage(database: Database, tmp_path: Path) -> Iterator[Stage]:
    directory = tmp_path / "kafka"
    try:
        url = exports(run_services("start", "kafka", "--dir", str(directory)))["SLUICE_LOG_URL"]
        environment = clean_environment(
            **database.environment,
            **UNLIMITED,
            SLUICE_LOG_URL=url,
            SLUICE_SECRET_KEYS=str(new_ring()),
            SLUICE_LOG_APPEND_TIMEOUT_MS="1000",
            SLUICE_LANDING_LEASE_TTL_S="2",
            XDG_CONFIG_HOME=str(tmp_path / "config"),
        )
        sluice(environment, "migrate")
        seeded = json.loads(sluice(environment, "seed", "--json"))
        yield Stage(environment, database, Kafka(directory, url), seeded["organisation_id"], seeded["api_key"])
    finally:
        run_services("wipe", "--dir", str(directory))


@dataclass(frozen=True)
class Device:
    """A device, and how to send for it."""

    id: str
    token: str

    def post(self, url: str, times: list[int], **headers: str) -> Answer:
        readings = [{"type": "temperature", "value": one % 50, "ts": one} for one in times]
        body = json.dumps({"measurements": readings}).encode()
        return ask(f"{url}/v1/ingest", token=self.token, method="POST", body=body, **headers)

    def send(self, url: str, times: list[int], durable: str = "log") -> None:
        for first in range(0, len(times), A_REQUEST):
            answer = self.post(url, times[first : first + A_REQUEST])
            assert (answer.status, answer.json()["durable"]) == (202, durable), answer.body


@dataclass(frozen=True)
class Api:
    """The API with the owner's key."""

    url: str
    stage: Stage

    def ask(self, method: str, path: str, body: object = None, status: int = 200) -> Any:
        sent = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if sent else {}
        answer = ask(f"{self.url}{path}", token=self.stage.key, method=method, body=sent, **headers)
        assert answer.status == status, answer.body
        return answer.json() if answer.body else None

    def site(self, name: str) -> str:
        path = f"/api/organisations/{self.stage.organisation}/sites"
        return str(self.ask("POST", path, {"name": name, "slug": name}, 201)["id"])

    def device(self, name: str, *stays: tuple[str, int]) -> Device:
        """One that stands at each of these sites from that time on."""
        (first, since), *later = stays
        body = {"site_id": first, "local_id": name, "name": name, "model": "diy_esp32"}
        made = self.ask("POST", "/v1/devices", body, 201)
        for site, at in ((first, since), *later):
            self.move(made["id"], site, at)
        return Device(made["id"], made["ingest_token"])

    def move(self, device: str, site: str | None, at: int) -> None:
        text = datetime.fromtimestamp(at, UTC).isoformat()
        self.ask("POST", f"/v1/devices/{device}/move", {"to_site_id": site, "effective_at": text})

    def readings(self, site: str) -> list[tuple[str, str, float]]:
        """All that the site has."""
        found: list[tuple[str, str, float]] = []
        cursor = ""
        while True:
            page = self.ask("GET", f"/api/v1/readings?site_id={site}&limit=10000{cursor}")
            found += [(one["device_id"], one["ts"], one["value"]) for one in page["data"]]
            if page["next_cursor"] is None:
                return found
            cursor = f"&cursor={page['next_cursor']}"


def spread(count: int, first: int, end: int) -> list[int]:
    """So many times in order, all different."""
    return [first + (end - first) * number // count for number in range(count)]


def test_a_site_is_erased_whatever_is_killed_meanwhile(stage: Stage) -> None:
    with role(stage.environment, "api", "--listen", "127.0.0.1:0") as serving:
        api = Api(serving.url, stage)
        before, site, after = [api.site(name) for name in ("before", "plant", "after")]
        resident = api.device("resident", (site, NOW - 60 * DAY))
        passing = api.device("passing", (before, NOW - 60 * DAY), (site, NOW - 20 * DAY), (after, NOW - 2 * DAY))
        neighbour = api.device("neighbour", (after, NOW - 60 * DAY))
        ingest = stage.ingest()
        ingest.wait_ready()
        with role(stage.environment, "worker"):
            resident.send(ingest.url, spread(READINGS - 4_000, NOW - 70 * DAY, NOW - DAY))
            passing.send(ingest.url, spread(6_000, NOW - 50 * DAY, NOW - DAY))
            neighbour.send(ingest.url, spread(2_000, NOW - 50 * DAY, NOW - DAY))
            refused = {"measurements": [{"type": "temperature", "value": "warm", "ts": NOW - DAY}]}
            ask(f"{ingest.url}/v1/ingest", token=resident.token, method="POST", body=json.dumps(refused).encode())
            landed(stage)
        kept = {one: api.readings(one) for one in (before, after)}
        assert min(map(len, kept.values())) > 1_000

        # Some of it in the log, some in a spool, when the site is deleted; nobody lands.
        in_log, in_spool = spread(500, NOW - DAY + 1, NOW - DAY // 2), spread(500, NOW - DAY // 2, NOW - 60)
        resident.send(ingest.url, in_log)
        passing.send(ingest.url, [NOW - 10 * DAY + 7, NOW - DAY + 7])
        stage.kafka.services("kill")
        resident.send(ingest.url, in_spool, "spool")
        passing.send(ingest.url, [NOW - 10 * DAY + 9, NOW - DAY + 9], "spool")
        path = f"/api/organisations/{stage.organisation}/sites"
        api.ask("DELETE", f"{path}/{site}", status=202)
        api.ask("GET", f"{path}/{site}", status=404)
        eventually("the token is dead", lambda: resident.post(ingest.url, [NOW]).status == 401)
        assert passing.post(ingest.url, [NOW]).status == 202
        ingest.kill()

        stage.kafka.services("start")
        slow = stage.environment | {"SLUICE_ERASURE_STEP_ROWS": "500", "SLUICE_ERASURE_CHECK_S": "0.2"}
        worker = start_role(slow, "worker")
        eventually("a third of it is gone", lambda: erased(api, site)["readings"] > READINGS // 3, 120.0)
        worker.kill()
        assert erased(api, site)["state"] == "erasing"
        checked = verify(stage.environment)
        assert checked.returncode == 0, checked.stdout + checked.stderr

        with role(stage.environment, "worker"):
            eventually("it is erased", lambda: erased(api, site)["state"] == "done", 300.0)
            assert api.ask("GET", f"/api/v1/erasures/{site}")["devices_removed"] == 1
            finished = verify(stage.environment)
            assert finished.returncode == 0, finished.stdout + finished.stderr
            with stage_ingest(stage) as again:
                # Another process takes over the spool of the one that was killed.
                wait_drained(again)
                landed(stage)
                answer = passing.post(again.url, [NOW - 1], Prefer="wait=stored")
                assert (answer.status, answer.json()["stored"]) == (200, 1)
                answer = passing.post(again.url, [NOW - 5 * DAY], Prefer="wait=stored")
                assert (answer.json()["stored"], answer.json()["erased"]) == (0, 1)
                assert resident.post(again.url, [NOW]).status == 401
        check_left(stage, api, site, resident, kept)
        last = verify(stage.environment)
        assert last.returncode == 0, last.stdout + last.stderr
        assert "no difference" in last.stdout
        api.site("plant")
        told = command(stage.environment, f"{stage.key}\n", "login", serving.url, "--api-key")
        assert told.returncode == 0, told.stderr
        listed = sluice(stage.environment, "site", "erasures")
        assert site in listed
        assert "done" in listed


def check_left(
    stage: Stage, api: Api, site: str, resident: Device, kept: dict[str, list[tuple[str, str, float]]]
) -> None:
    """What is stored is what other sites had, and what came for them since."""
    found = {one: api.readings(one) for one in kept}
    for one, readings in kept.items():
        assert set(found[one]) >= set(readings)
    # In the log, in the spool, while the site went, and after.
    assert sum(map(len, found.values())) - sum(map(len, kept.values())) == 4
    assert stage.value("SELECT count(*) FROM readings") == sum(map(len, found.values()))
    device = resident.id.removeprefix("dev_")
    for table in ("devices", "series", "device_sites", "credentials", "quarantine"):
        assert stage.value(f"SELECT count(*) FROM {table} WHERE device_id = $1", device) == 0
    for table in ("sites", "device_sites", "credentials"):
        assert stage.value(f"SELECT count(*) FROM {table} WHERE site_id = $1", site) == 0
    api.ask("GET", f"/api/v1/readings?device_id={device}", status=404)


def stage_ingest(stage: Stage) -> Any:
    return role(stage.environment, "ingest", "--listen", "127.0.0.1:0")


def erased(api: Api, site: str) -> Any:
    return api.ask("GET", f"/api/v1/erasures/{site}")


def landed(stage: Stage) -> None:
    """Wait until the worker has taken all there is: nothing moves any more, and something had."""
    sql = "SELECT sum(received)::bigint, (SELECT sum(position) FROM log_positions)::bigint FROM ledger"
    seen: list[tuple[Any, ...]] = []

    def still() -> bool:
        seen.extend(stage.fetch(sql))
        return len(seen) > 50 and len(set(seen[-50:])) == 1

    eventually("everything has landed", still, 120.0)
