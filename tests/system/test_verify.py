"""`sluice verify` as an operator runs it, on the real parts: exit status, names, coverage, JSON."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest

from deploy.embedded import EmbeddedPostgres
from deploy.settings import SETTINGS_FILE
from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import ask, run
from tests.system.roles import clean_environment, role, sluice
from tests.system.test_up import up

READINGS = 500


def verify(environment: Mapping[str, str], *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "verify", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def delete(url: str, statement: str) -> None:
    async def test() -> None:
        connection = await asyncpg.connect(url)
        assert (await connection.execute(statement)).endswith(" 1")
        await connection.close()

    run(test())


@pytest.fixture
def environment(services: dict[str, str], database: Database) -> dict[str, str]:
    found = clean_environment(
        **database.environment, SLUICE_LOG_URL=services["SLUICE_LOG_URL"], SLUICE_SECRET_KEYS=str(new_ring())
    )
    sluice(found, "migrate")
    return found


@pytest.fixture
def up_directory() -> Iterator[Path]:
    # Not below pytest's own, which every session closes to the user that PostgreSQL runs as.
    with TemporaryDirectory(prefix="sluice-up-") as directory:
        yield Path(directory)


def test_a_deleted_row_is_found_and_named(environment: dict[str, str], database: Database) -> None:
    seeded = json.loads(sluice(environment, "seed", "--json"))
    measurements = [
        {"type": "temperature", "value": at / 10, "label": "hall", "ts": 1_790_000_000 + at} for at in range(READINGS)
    ]
    body = json.dumps({"measurements": [*measurements, {"type": "temperature", "value": "warm"}]}).encode()
    with (
        role(environment, "ingest", "--listen", "127.0.0.1:0") as ingest,
        role(environment, "worker"),
    ):
        answer = ask(
            f"{ingest.url}/v1/ingest", token=seeded["ingest_token"], method="POST", body=body, Prefer="wait=stored"
        )
        assert (answer.status, answer.json()["stored"]) == (200, READINGS), answer

        clean = verify(environment)
        assert clean.returncode == 0, clean.stdout + clean.stderr
        assert f"1 records with {READINGS} readings" in clean.stdout
        assert "no difference" in clean.stdout
        heads, counts = (
            line.split()
            for line in clean.stdout.splitlines()
            if line.startswith(("organ", seeded["organisation_id"]))
        )
        assert counts == [seeded["organisation_id"], "501", "500", "0", "0", "1", "0", "0", "0", "0", "0"]
        assert heads[-3:] == ["LOST", "altered", "unexplained"]

        delete(database.superuser_url, "DELETE FROM readings WHERE value = 12.3")
        differing = verify(environment, "--rate", "1000000")
        assert differing.returncode == 1, differing.stderr
        (line,) = (line for line in differing.stdout.splitlines() if line.startswith("lost:"))
        for name in (
            seeded["device_id"],
            "temperature",
            "hall",
            "2026-09-21T14:15:23Z",
            "12.3",
            "position 0",
            "item 123",
        ):
            assert name in line, line

        told = [json.loads(line) for line in verify(environment, "--json").stdout.splitlines()]
        assert told[0]["finding"]["device_id"] == seeded["device_id"]
        assert told[0]["finding"]["time"] == "2026-09-21T14:15:23Z"
        summary = told[1]["summary"]
        assert (summary["ok"], summary["findings"]) == (False, {"lost": 1})
        assert summary["organisations"][seeded["organisation_id"]]["lost"] == 1
        empty = verify(environment, "--until", "2026-01-01T00:00:00Z")
        assert empty.returncode == 0, empty.stderr
        assert "not covered: nothing was compared" in empty.stdout
        assert "no difference: nothing was compared" in empty.stdout
        empty = verify(environment, "--until", "2026-01-01T00:00:00Z", "--json")
        coverage = json.loads(empty.stdout)["summary"]["coverage"]
        assert (coverage["judged_readings"], coverage["ledger_rows"]) == (0, 0)
        assert coverage["not_covered"][0].startswith("nothing was compared")


def test_beside_all_in_one_process_on_a_log_that_prunes(up_directory: Path) -> None:
    """The embedded log keeps what has landed for a while, and the same operator finds the same deleted row."""
    data = up_directory / "data"
    with up(data, "--json") as one:
        seeded = one.json
        for at in range(3):
            body = json.dumps({"measurements": [{"type": "temperature", "value": at, "ts": 1_790_000_000 + at}]})
            answer = ask(
                f"{seeded['url']}/v1/ingest",
                token=seeded["ingest_token"],
                method="POST",
                body=body.encode(),
                Prefer="wait=stored",
            )
            assert answer.status == 200, answer
        environment = clean_environment(SLUICE_CONFIG=str(data / SETTINGS_FILE))
        assert verify(environment).returncode == 0
        delete(EmbeddedPostgres(data).url("postgres", "sluice"), "DELETE FROM readings WHERE value = 1")
        differing = verify(environment)
        assert differing.returncode == 1, differing.stderr
        (line,) = (line for line in differing.stdout.splitlines() if line.startswith("lost:"))
        assert seeded["device_id"] in line
        assert "2026-09-21T14:13:21Z" in line


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        (["--since", "yesterday"], {}, "RFC 3339"),
        (["--organisation", "7"], {}, "UUID"),
        (["--organisation", "01920000-0000-7000-8000-000000000000"], {}, "there is no organisation 01920000-"),
        (["--since", "2026-01-02T00:00:00Z", "--until", "2026-01-01T00:00:00Z"], {}, "is not before --until"),
        (["--since", "2026-01-02T00:00:00Z", "--until", "2026-01-02T00:00:00Z"], {}, "is not before --until"),
        (["--rate", "-1"], {}, "SLUICE_VERIFY_RATE"),
        ([], {"SLUICE_VERIFY_DIR": "/nowhere/at/all"}, "SLUICE_VERIFY_DIR"),
        ([], {"SLUICE_LOG_URL": "kafka://127.0.0.1:1"}, "Kafka"),
        ([], {"SLUICE_DATABASE_URL": "postgresql://sluice:x@127.0.0.1:1/none"}, "database"),
    ],
)
def test_what_cannot_be_told_is_no_difference(
    environment: dict[str, str], options: list[str], changes: dict[str, str], said: str
) -> None:
    done = verify(environment | changes, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
