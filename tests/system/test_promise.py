"""The roles as processes of their own on the real parts: nothing lost, nothing doubled, and what operators see."""

import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import NamedTuple
from urllib.parse import urlsplit

import asyncpg
import pytest

from deploy.local.parts.packages import need
from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import ask, eventually, run
from tests.system.roles import Role, clean_environment, role, sluice, start_role

READINGS_A_REQUEST = 100
REQUESTS = 2_000
SENDERS = 8
FIRST_TS = 1_790_000_000


class Installation(NamedTuple):
    """A database and a log of their own, seeded."""

    environment: dict[str, str]
    token: str
    api_key: str
    device_id: str


@pytest.fixture
def installation(services: dict[str, str], database: Database) -> Installation:
    environment = clean_environment(
        **database.environment, SLUICE_LOG_URL=services["SLUICE_LOG_URL"], SLUICE_SECRET_KEYS=str(new_ring())
    )
    sluice(environment, "migrate")
    seeded = json.loads(sluice(environment, "seed", "--json"))
    return Installation(environment, seeded["ingest_token"], seeded["api_key"], seeded["device_id"])


def rows(database: Database, query: str) -> list[asyncpg.Record]:
    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(database.superuser_url)
        try:
            return await connection.fetch(query)
        finally:
            await connection.close()

    return run(fetch())


def send(url: str, token: str, requests: list[int]) -> int:
    """Post the numbered requests on one connection, each again until it is acknowledged; how many readings were."""
    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "", where.port, timeout=120)
    acknowledged = 0
    for number in requests:
        measurements = [
            {
                "type": "temperature",
                "value": index / 10,
                "label": str(number % 50),
                "ts": FIRST_TS + number * 100 + index,
            }
            for index in range(READINGS_A_REQUEST)
        ]
        body = json.dumps({"measurements": measurements})
        connection.request("POST", "/v1/ingest", body, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 202, content
        acknowledged += json.loads(content)["accepted"]
    connection.close()
    return acknowledged


def test_workers_killed_on_the_way_lose_and_double_nothing(installation: Installation, database: Database) -> None:
    with role(installation.environment, "ingest", "--listen", "127.0.0.1:0") as ingest:
        workers = [start_role(installation.environment, "worker") for _ in range(2)]
        try:
            with ThreadPoolExecutor(SENDERS) as pool:
                sent = [
                    pool.submit(send, ingest.url, installation.token, list(range(first, REQUESTS, SENDERS)))
                    for first in range(SENDERS)
                ]
                for kill_at in (REQUESTS * 10, REQUESTS * 40):
                    wait_landed(database, kill_at)
                    workers.pop(0).kill()
                    workers.append(start_role(installation.environment, "worker"))
                acknowledged = sum(one.result() for one in sent)
            assert acknowledged == REQUESTS * READINGS_A_REQUEST
            wait_landed(database, acknowledged)
        finally:
            for worker in workers:
                worker.end()
    assert landed(database) == acknowledged
    check_values(database)
    check_books(database, acknowledged)


def wait_landed(database: Database, readings: int) -> None:
    eventually(f"{readings} readings have landed", lambda: landed(database) >= readings, 60.0)


def landed(database: Database) -> int:
    return int(rows(database, "SELECT count(*) AS n FROM readings")[0]["n"])


def check_values(database: Database) -> None:
    """Row by row: each reading stands where it was sent to, with its value."""
    wrong = rows(
        database,
        f"""SELECT count(*) AS n FROM readings r JOIN series s USING (series_id)
            CROSS JOIN LATERAL (SELECT extract(epoch FROM r.ts)::bigint - {FIRST_TS} AS place) p
            WHERE r.value <> (p.place % 100) / 10.0::float8 OR s.label <> ((p.place / 100) % 50)::text""",
    )
    assert wrong[0]["n"] == 0


def check_books(database: Database, acknowledged: int) -> None:
    books = rows(
        database,
        """SELECT sum(received) AS received, sum(stored) AS stored, sum(duplicates + conflicts + quarantined) AS other
           FROM ledger""",
    )[0]
    assert (books["received"], books["stored"], books["other"]) == (acknowledged, acknowledged, 0)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_body_on_its_way_when_the_process_is_told_to_stop_is_answered(
    installation: Installation, processes: str
) -> None:
    body = b'{"measurements":[{"type":"temperature","value":21.5}]}'
    head = (
        f"POST /v1/ingest HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {installation.token}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with role(installation.environment, "ingest", "--listen", "127.0.0.1:0", "--processes", processes) as ingest:
        where = urlsplit(ingest.url)
        with socket.create_connection((where.hostname or "", where.port or 0), timeout=60) as client:
            client.sendall(head.encode() + body[:10])
            eventually("the request is in hand", lambda: b"sluice_ingest_connections 1.0" in metrics(ingest))
            ingest.process.terminate()
            eventually("nobody listens", lambda: ask(f"{ingest.url}/v1/ingest").status == 0)
            client.sendall(body[10:])
            answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 202 "), answer
        assert b"Connection: close" in answer


def test_a_reading_is_read_back_and_every_role_shows_its_metrics(installation: Installation) -> None:
    environment = installation.environment
    with (
        role(environment, "ingest", "--listen", "127.0.0.1:0", "--processes", "2") as ingest,
        role(environment, "worker") as worker,
        role(environment, "api", "--listen", "127.0.0.1:0") as api,
    ):
        body = b'{"measurements":[{"type":"temperature","value":68,"unit":"\xc2\xb0F","ts":"2026-11-01T00:00:00Z"}]}'
        answer = ask(
            f"{ingest.url}/v1/ingest", token=installation.token, method="POST", body=body, Prefer="wait=stored"
        )
        assert (answer.status, answer.json()["stored"]) == (200, 1)
        found = ask(f"{api.url}/api/v1/readings?device_id={installation.device_id}", token=installation.api_key)
        reading = found.json()["data"][0]
        assert (reading["value"], reading["unit"], reading["ts"]) == (20.0, "°C", "2026-11-01T00:00:00Z")
        assert reading["flags"] == ["unit_converted"]
        eventually("the request is counted", lambda: b'route="ingest",status="200"} 1.0' in metrics(ingest))
        assert b"sluice_landing_rows_total" in metrics(worker)
        assert b"sluice_landing_rows_total" not in metrics(ingest)
        for running in (ingest, worker, api):
            check_with_promtool(metrics(running))


def metrics(running: Role) -> bytes:
    answer = ask(f"{running.metrics_url}/metrics")
    assert answer.status == 200
    return answer.body


def check_with_promtool(exposition: bytes) -> None:
    promtool = need("promtool", ["prometheus"], service="prometheus")
    checked = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout.decode() + checked.stderr.decode()


def test_untimed_readings_of_requests_that_arrive_together_are_all_stored(
    installation: Installation, database: Database
) -> None:
    body = json.dumps({"measurements": [{"type": "temperature", "value": 1 + n % 7} for n in range(5_000)]}).encode()
    with (
        role(installation.environment, "ingest", "--listen", "127.0.0.1:0") as ingest,
        role(installation.environment, "worker"),
        ThreadPoolExecutor(4) as pool,
    ):
        url = f"{ingest.url}/v1/ingest"
        answers = list(pool.map(lambda _: ask(url, token=installation.token, method="POST", body=body), range(4)))
        assert [answer.status for answer in answers] == [202] * 4
        wait_landed(database, 20_000)
    check_books(database, 20_000)


def test_untimed_readings_through_two_processes_are_all_stored(
    installation: Installation, database: Database
) -> None:
    """Processes that know nothing of each other, as on two hosts: their stamps of one device coincide."""
    many = json.dumps({"measurements": [{"type": "temperature", "value": 1 + n % 7} for n in range(5_000)]}).encode()
    one = b'{"measurements":[{"type":"temperature","value":1}]}'
    bodies = ([many] * 2 + [one] * 50) * 8  # each process has one of many under way at the same time
    arguments = ("ingest", "--listen", "127.0.0.1:0", "--processes", "1")
    with (
        role(installation.environment, *arguments) as first,
        role(installation.environment, *arguments) as second,
        role(installation.environment, "worker"),
        ThreadPoolExecutor(8) as pool,
    ):
        urls = [f"{ingest.url}/v1/ingest" for ingest in (first, second)]
        acknowledged = moved = 0
        # Whether both work at the same moment is the machine's doing.
        while not moved and acknowledged < 10 * 16 * 5_025:
            sent = zip(bodies, urls * len(bodies), strict=False)
            answers = pool.map(lambda to: ask(to[1], token=installation.token, method="POST", body=to[0]), sent)
            assert {answer.status for answer in answers} == {202}
            acknowledged += 16 * 5_025
            wait_landed(database, acknowledged)
            moved = rows(database, "SELECT count(*) AS n FROM moved_readings")[0]["n"]
    check_books(database, acknowledged)
    assert moved > 0
    found = rows(database, "SELECT value, count(*) AS n FROM readings GROUP BY value ORDER BY value")
    readings = [n % 7 for n in range(5_000)]
    expected = {1.0 + rest: 16 * readings.count(rest) for rest in range(7)}
    expected[1.0] += 16 * 25
    assert {row["value"]: row["n"] for row in found} == expected
