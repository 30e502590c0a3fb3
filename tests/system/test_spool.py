"""Kafka is killed while `sluice ingest` is used, and so is that: everything acknowledged comes into the log, once."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import count, islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from deploy.generation import open_generation
from runtime.log import LogSettings
from runtime.secrets import new_ring
from tests.conftest import exports, run_services
from tests.databases import Database
from tests.spool_rig import Landed, land
from tests.support import ask, eventually, run
from tests.system.roles import Role, clean_environment, role, sluice, start_role

READINGS_A_REQUEST = 10
FIRST_TS = 1_790_000_000
SENDERS = 4
# Becomes a command that has a small disk at $0, in a mount namespace of its own: it goes with the process.
SMALL_DISK = 'mount -t tmpfs -o size=4m tmpfs "$0" && head -c 1000000 /dev/zero > "$0/filler" && exec "$@"'


@dataclass(frozen=True)
class Kafka:
    """A broker of its own, to be killed."""

    directory: Path
    url: str

    def services(self, command: str) -> None:
        run_services(command, "kafka", "--dir", str(self.directory))


@dataclass(frozen=True)
class Stage:
    """A database, a broker, a directory for spools, and a device."""

    environment: dict[str, str]
    database: Database
    kafka: Kafka
    directory: Path
    token: str

    @property
    def spools(self) -> list[Path]:
        return list((self.directory / "spool").glob("*/*"))

    def ingest(self, **variables: str) -> Role:
        return start_role(self.environment | variables, "ingest", "--listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    directory = tmp_path_factory.mktemp("kafka")
    try:
        printed = run_services("start", "kafka", "--dir", str(directory))
        yield Kafka(directory, exports(printed)["SLUICE_LOG_URL"])
    finally:
        run_services("wipe", "--dir", str(directory))


@pytest.fixture
def stage(kafka: Kafka, database: Database, tmp_path: Path) -> Stage:
    kafka.services("start")
    environment = clean_environment(
        **database.environment,
        SLUICE_LOG_URL=kafka.url,
        SLUICE_SECRET_KEYS=str(new_ring()),
        SLUICE_DATA_DIR=str(tmp_path),
        SLUICE_LOG_APPEND_TIMEOUT_MS="1000",
    )
    sluice(environment, "migrate")
    seeded = json.loads(sluice(environment, "seed", "--json"))
    return Stage(environment, database, kafka, tmp_path, seeded["ingest_token"])


def send(url: str, token: str, requests: range) -> list[Any]:
    """Post the numbered requests on one connection; the answers, which acknowledge all of them."""
    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "", where.port, timeout=120)
    answers = []
    for number in requests:
        times = range(number * READINGS_A_REQUEST, (number + 1) * READINGS_A_REQUEST)
        readings = [{"type": "temperature", "value": one % 50, "ts": FIRST_TS + one} for one in times]
        body = json.dumps({"measurements": readings})
        connection.request("POST", "/v1/ingest", body, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 202, content
        answers.append(json.loads(content))
    connection.close()
    return answers


def send_until_refused(url: str, token: str, numbers: Iterator[int]) -> tuple[list[int], list[int]]:
    """Post numbered requests until ten are refused in a row: which were acknowledged, and which refused."""
    acknowledged: list[int] = []
    refused: list[int] = []
    for number in numbers:
        times = range(number * READINGS_A_REQUEST, (number + 1) * READINGS_A_REQUEST)
        readings = [{"type": "temperature", "value": one % 50, "ts": FIRST_TS + one} for one in times]
        answer = ask(
            f"{url}/v1/ingest", token=token, method="POST", body=json.dumps({"measurements": readings}).encode()
        )
        if answer.status == 202:
            assert answer.json()["durable"] == "spool"
            acknowledged.append(number)
            continue
        assert (answer.status, "Retry-After" in answer.headers) == (503, True), answer.body
        refused.append(number)
        if refused[-10:] == list(range(number - 9, number + 1)):
            break
    return acknowledged, refused


def send_all(url: str, token: str, first: int, end: int) -> list[Any]:
    with ThreadPoolExecutor(SENDERS) as pool:
        sent = [pool.submit(send, url, token, range(first + one, end, SENDERS)) for one in range(SENDERS)]
        return [answer for one in sent for answer in one.result()]


def in_log(stage: Stage) -> Landed:
    """What landing would take of the log; fails at a jump in a spool's sequence."""

    async def read() -> Landed:
        connection = await asyncpg.connect(stage.database.owner_url)
        try:
            _, log = await open_generation(connection, LogSettings(log_url=stage.kafka.url), client_id="test")
        finally:
            await connection.close()
        try:
            return await land(log)
        finally:
            await log.close()

    return run(read())


def times_of(landed: Landed) -> list[int]:
    return sorted(
        (time // 1_000_000 + 946_684_800 - FIRST_TS)
        for record in landed.records
        for channel in record.channels
        for time in channel.unpack_times()
    )


def wait_drained(ingest: Role) -> None:
    def drained() -> bool:
        answer = ask(f"{ingest.metrics_url}/health/ready")
        return answer.status == 200 and "notes" not in answer.json()

    eventually("the spool is drained", drained, 60.0)


def test_kafka_is_killed_and_every_acknowledged_reading_lands_once(stage: Stage) -> None:
    with role(stage.environment, "ingest", "--listen", "127.0.0.1:0") as ingest:
        assert {one["durable"] for one in send_all(ingest.url, stage.token, 0, 40)} == {"log"}
        stage.kafka.services("kill")
        answers = send_all(ingest.url, stage.token, 40, 1_040)
        assert {one["durable"] for one in answers} == {"spool"}
        ready = ask(f"{ingest.metrics_url}/health/ready")
        assert (ready.status, ready.json()["ready"]) == (200, True)
        assert "1000 records" in ready.json()["notes"]["spool"]
        stage.kafka.services("start")
        with ThreadPoolExecutor(1) as pool:  # served while it is drained
            more = pool.submit(send_all, ingest.url, stage.token, 1_040, 1_140)
            wait_drained(ingest)
            answers += more.result()
        wait_drained(ingest)
        assert send_all(ingest.url, stage.token, 1_140, 1_141)[0]["durable"] == "log"
        appended, drained = (
            f'sluice_ingest_spool_records_total{{outcome="{one}"}}' for one in ("appended", "drained")
        )

        def counted() -> bool:
            samples = dict(
                line.rsplit(" ", 1) for line in ask(f"{ingest.metrics_url}/metrics").body.decode().splitlines()
            )
            return float(samples.get(drained, 0)) == float(samples.get(appended, 0)) >= 1_000

        eventually("metrics that say as many were drained as spooled", counted)
        landed = in_log(stage)
        readings = 1_141 * READINGS_A_REQUEST
        assert times_of(landed) == list(range(readings))
        with role(stage.environment, "worker"):

            def stored() -> bool:
                statuses = [
                    ask(f"{ingest.url}/v1/receipts/{one['receipt']}", token=stage.token).json()
                    for one in (answers[0], answers[-1], answers[500])
                ]
                return all(one["state"] == "landed" and one["stored"] == READINGS_A_REQUEST for one in statuses)

            eventually("the receipts say stored", stored, 60.0)
    assert stage.spools == []


def test_ingest_killed_too_leaves_its_spool_to_one_that_starts_without_kafka(stage: Stage) -> None:
    first = stage.ingest()
    first.wait_ready()
    send_all(first.url, stage.token, 0, 4)
    stage.kafka.services("kill")
    send_all(first.url, stage.token, 4, 104)
    first.kill()
    assert stage.spools
    second = stage.ingest()
    try:
        second.wait_ready()
        assert {one["durable"] for one in send_all(second.url, stage.token, 104, 204)} == {"spool"}
        assert "200 records" in ask(f"{second.metrics_url}/health/ready").json()["notes"]["spool"]
        second.end()  # in order, with a backlog
        third = stage.ingest()
        try:
            third.wait_ready()
            stage.kafka.services("start")
            wait_drained(third)
            assert send_all(third.url, stage.token, 204, 208)[0]["durable"] == "log"
            landed = in_log(stage)
            assert times_of(landed) == list(range(208 * READINGS_A_REQUEST))
            assert len({one.origin.spool for one in landed.records if one.origin}) == 2
            eventually("the drained files are deleted", lambda: not stage.spools, 20.0)
        finally:
            third.end()
    finally:
        second.end()


def test_a_full_disk_refuses_and_keeps_what_it_acknowledged(stage: Stage, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    ingest = start_role(
        stage.environment | {"SLUICE_SPOOL_DIR": str(disk)},
        *("ingest", "--listen", "127.0.0.1:0"),
        within=["unshare", *user, "--mount", "sh", "-ec", SMALL_DISK, str(disk)],
    )
    numbers = count()
    try:
        ingest.wait_ready()
        seen = Path(f"/proc/{ingest.process.pid}/root{disk}")  # the disk is mounted for that process alone
        stage.kafka.services("kill")
        kept, refused = send_until_refused(ingest.url, stage.token, numbers)
        assert kept
        assert shutil.disk_usage(seen).free < 100_000
        (seen / "filler").unlink()

        def taken() -> bool:
            nonlocal kept, refused
            more = send_until_refused(ingest.url, stage.token, islice(numbers, 1))
            kept, refused = kept + more[0], refused + more[1]
            return bool(more[0])

        eventually("there is room again", taken)
        more = send_until_refused(ingest.url, stage.token, numbers)
        assert len(more[0]) > 10
        kept, refused = kept + more[0], refused + more[1]
        stage.kafka.services("start")  # what is spooled can be drained from a disk that is full
        wait_drained(ingest)
        after = next(numbers)
        assert send(ingest.url, stage.token, range(after, after + 1))[0]["durable"] == "log"
        times = times_of(in_log(stage))
        assert len(times) == len(set(times))
        assert set(times) >= times_in([*kept, after])
        assert set(times) <= times_in([*kept, *refused, after])
    finally:
        ingest.end()
    assert list(disk.iterdir()) == []  # nothing was ever written beside the small disk


def times_in(numbers: Iterable[int]) -> set[int]:
    return {number * READINGS_A_REQUEST + one for number in numbers for one in range(READINGS_A_REQUEST)}


def test_without_a_spool_it_is_503_as_long_as_kafka_is_away(stage: Stage) -> None:
    with role(stage.environment | {"SLUICE_SPOOL": "false"}, "ingest", "--listen", "127.0.0.1:0") as ingest:
        stage.kafka.services("kill")
        body = json.dumps({"measurements": [{"type": "temperature", "value": 1}]}).encode()

        def refused() -> bool:
            return ask(f"{ingest.url}/v1/ingest", token=stage.token, method="POST", body=body).status == 503

        eventually("503", refused)
        eventually("not ready", lambda: ask(f"{ingest.metrics_url}/health/ready").status == 503)
        assert stage.spools == []
    stage.kafka.services("start")
