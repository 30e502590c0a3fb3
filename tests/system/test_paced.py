"""A device's backlog beyond its limit, sent with `Prefer: respond-async`: it lands, though ingest is killed."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg

from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import Answer, ask, eventually, run
from tests.system.roles import clean_environment, role, sluice
from tests.system.test_verify import verify

FIRST_TS = 1_790_000_000
BACKLOG = 200
BEFORE_THE_KILL = 90
LIMIT = 60


def post(url: str, token: str, numbers: range) -> Sequence[Answer]:
    """A reading each, eight at a time."""

    def one(number: int) -> Answer:
        body = {"measurements": [{"type": "temperature", "value": number % 50, "ts": FIRST_TS + number}]}
        headers = {"Prefer": "respond-async"}
        return ask(f"{url}/v1/ingest", token=token, method="POST", body=json.dumps(body).encode(), **headers)

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, numbers))


def stored(database: Database) -> list[tuple[int, float]]:
    """Second and value of every reading that stands."""

    async def read() -> list[tuple[int, float]]:
        connection = await asyncpg.connect(database.superuser_url)
        try:
            rows = await connection.fetch("SELECT extract(epoch FROM ts)::int AS at, value FROM readings ORDER BY ts")
            return [(row["at"], row["value"]) for row in rows]
        finally:
            await connection.close()

    return run(read())


def test_a_backlog_of_two_hundred_lands_once(services: dict[str, str], database: Database, tmp_path: Path) -> None:
    environment = clean_environment(
        **database.environment,
        SLUICE_LOG_URL=services["SLUICE_LOG_URL"],
        SLUICE_SECRET_KEYS=str(new_ring()),
        SLUICE_DATA_DIR=str(tmp_path),
    )
    sluice(environment, "migrate")
    demo: dict[str, Any] = json.loads(sluice(environment, "seed", "--json"))
    token, limits = demo["ingest_token"], ("limits", "set", "--device", demo["device_id"], "--requests-per-minute")
    sluice(environment, *limits, str(LIMIT))
    with role(environment, "worker"):
        with role(environment, "ingest", "--listen", "127.0.0.1:0") as ingest:
            answers = [*post(ingest.url, token, range(BEFORE_THE_KILL))]
            assert "senders wait for their limits" in ask(f"{ingest.metrics_url}/health/ready").body.decode()
            ingest.kill()
        (left,) = (tmp_path / "spool").glob("*/paced/*.spool")
        with role(environment, "ingest", "--listen", "127.0.0.1:0", "--processes", "2") as ingest:
            answers += post(ingest.url, token, range(BEFORE_THE_KILL, BACKLOG))
            assert {answer.status for answer in answers} == {202}
            paced = [answer for answer in answers if answer.json().get("paced")]
            assert len(paced) >= BACKLOG - 3 * LIMIT
            assert all(answer.headers["Preference-Applied"] == "respond-async" for answer in paced)
            assert len(stored(database)) <= 2 * LIMIT
            sluice(environment, *limits, "0")
            expected = [(FIRST_TS + number, number % 50) for number in range(BACKLOG)]
            eventually("all of it has landed", lambda: len(stored(database)) >= BACKLOG, 60.0)
            assert stored(database) == expected
            receipts = [answer.json()["receipt"] for answer in paced]
            for receipt in (receipts[0], receipts[-1]):
                found = ask(f"{ingest.url}/v1/receipts/{receipt}", token=demo["api_key"]).json()
                assert (found["state"], found["stored"]) == ("landed", 1)
            eventually("what was left is drained and gone", lambda: not left.exists())
    checked = verify(environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr
