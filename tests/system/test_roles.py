"""Roles as processes of their own on real parts: starts that wait or are refused, processes replaced under load."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from bench.usage import free_port
from runtime.secrets import new_ring
from tests.databases import Database
from tests.support import Answer, ask, eventually

SLUICE = Path(sys.executable).with_name("sluice")
COMMAND_S = 180
END_S = 90


@dataclass(frozen=True)
class Place:
    """Where roles run: settings that lead to a database and a log of a test's own."""

    variables: dict[str, str]
    directory: Path

    def command(self, *arguments: str, code: int = 0, **variables: str) -> "subprocess.CompletedProcess[str]":
        """A command that ends by itself."""
        done = subprocess.run(
            [SLUICE, *arguments],
            env=self.environment(variables),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return done

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
        return kept | self.variables | variables

    @contextmanager
    def role(self, name: str, *arguments: str, **variables: str) -> "Iterator[Running]":
        """A role, running; killed at the end if a test has not ended it."""
        events = self.directory / f"{name}.events"
        with events.open("w") as errors:
            process = subprocess.Popen(
                [SLUICE, name, "--metrics-listen", "127.0.0.1:0", *arguments],
                stderr=errors,
                env=self.environment(variables),
            )
        try:
            yield Running(process, events)
        finally:
            process.kill()
            process.wait(timeout=END_S)


@dataclass(frozen=True)
class Running:
    process: "subprocess.Popen[bytes]"
    events: Path

    def said(self, pattern: str) -> str:
        """What the first group of `pattern` matches in its events, once it does."""
        match = eventually(f"{pattern} in its events", lambda: re.search(pattern, self.events.read_text()))
        assert match
        return match[1]

    @property
    def url(self) -> str:
        return "http://" + self.said(r"listening role=\S+ address=(\S+)")

    @property
    def probes(self) -> str:
        return "http://" + self.said(r"probes are served address=(\S+)")

    def probe(self) -> Answer:
        return ask(f"{self.probes}/health/ready")

    def metrics(self) -> str:
        return ask(f"{self.probes}/metrics").body.decode()

    def ready(self) -> "Running":
        eventually(f"readiness: {self.events.read_text()}", lambda: self.probe().status == 200)
        return self

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=END_S)


@pytest.fixture
def place(bare_database: Database, services: dict[str, str], tmp_path: Path) -> Place:
    """An empty database and the real Kafka."""
    variables = bare_database.environment | {
        "SLUICE_LOG_URL": services["SLUICE_LOG_URL"],
        "SLUICE_SECRET_KEYS": str(new_ring()),
        "SLUICE_HTTP_LISTEN": "127.0.0.1:0",
        "SLUICE_API_LISTEN": "127.0.0.1:0",
    }
    return Place(variables, tmp_path)


def without_owner(place: Place) -> Place:
    return replace(place, variables={**place.variables, "SLUICE_DATABASE_OWNER_URL": ""})


def seeded(place: Place) -> dict[str, Any]:
    place.command("migrate")
    found: dict[str, Any] = json.loads(place.command("seed", "--json").stdout)
    return found


def test_every_role_may_start_first_and_all_at_once(place: Place) -> None:
    with place.role("ingest") as ingest, place.role("worker") as worker, place.role("api") as api:
        for running in (ingest, worker, api):
            running.ready()
        known = json.loads(place.command("seed", "--json").stdout)
        sent = ask(f"{ingest.url}/v1/ingest?token={known['ingest_token']}&temp=4.5")
        assert (sent.status, sent.json()["accepted"]) == (202, 1)

        def values() -> list[float]:
            answer = ask(f"{api.url}/api/v1/readings?device_id={known['device_id']}", token=known["api_key"])
            return [reading["value"] for reading in answer.json()["data"]]

        eventually("the reading", lambda: values() == [4.5])
        assert [running.end() for running in (ingest, worker, api)] == [0, 0, 0]


def test_without_the_owner_a_start_is_refused_until_somebody_has_migrated(place: Place) -> None:
    roles = without_owner(place)
    for role in ("ingest", "worker", "api"):
        refused = roles.command(role, "--metrics-listen", "127.0.0.1:0", code=2, SLUICE_LOG_LEVEL="error").stderr
        assert refused == "sluice: the database has no tables of Sluice: run `sluice migrate`\n"
    assert "SLUICE_DATABASE_OWNER_URL is not set" in roles.command("migrate", code=2).stderr
    place.command("migrate")
    with roles.role("api") as api:
        api.ready()


def test_a_wrong_engine_is_refused_at_the_start_and_the_command_helps(place: Place, tmp_path: Path) -> None:
    place.command("migrate")
    other = f"sqlite:///{tmp_path / 'log'}"
    refused = place.command("worker", "--metrics-listen", "127.0.0.1:0", code=2, SLUICE_LOG_URL=other).stderr
    assert "`sluice migrate --new-generation`" in refused.splitlines()[-1]
    with place.role("ingest") as ingest:
        ingest.ready()
        in_use = place.command("migrate", "--new-generation", code=2)
        assert "the log is in use" in in_use.stderr
    kafka = place.variables["SLUICE_LOG_URL"]

    def closed() -> bool:
        """The killed process's session gives its lock back a moment later."""
        options = ("--new-generation", "--json", "--closing-log-url", kafka)
        done = subprocess.run(
            [SLUICE, "migrate", *options],
            env=place.environment({"SLUICE_LOG_URL": other}),
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        return done.returncode == 0 and json.loads(done.stdout)["closed"]["lost"] == 0

    eventually("the generation is closed", closed)
    with place.role("worker", SLUICE_LOG_URL=other) as worker:
        worker.ready()


def test_processes_are_replaced_under_load_without_a_lost_request(place: Place) -> None:
    known = seeded(place)
    with place.role("ingest", "--processes", "2") as ingest, place.role("worker") as worker:
        ingest.ready()
        worker.ready()
        before = started(ingest)
        assert len(before) == 2
        ingest.process.send_signal(signal.SIGHUP)
        sent = 0
        while len(started(ingest)) < 4 or alive(before):
            answer = ask(f"{ingest.url}/v1/ingest?token={known['ingest_token']}&temp={sent % 40}")
            assert answer.status == 202, answer
            sent += 1
        assert ingest.probe().status == 200
        done = f"sluice_landing_records_total {sent}.0"
        eventually("all have landed", lambda: done in worker.metrics())
        eventually(
            "the counts of processes that ended are kept",
            lambda: f'sluice_ingest_records_total{{outcome="durable"}} {sent}.0' in ingest.metrics(),
        )
        processes = re.findall(r'^process_cpu_seconds_total{process="(\w+)"}', ingest.metrics(), re.MULTILINE)
        assert processes == ["parent", "0", "1"]
        assert "process_cpu_seconds_total " in worker.metrics()
        assert ingest.end() == 0
    assert not alive(started(ingest))


def started(running: Running) -> list[int]:
    return [int(pid) for pid in re.findall(r"a process was started pid=(\d+)", running.events.read_text())]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_refused_start_of_several_processes_is_refused_once(place: Place) -> None:
    place.command("migrate")
    options = ("--processes", "2", "--metrics-listen", "127.0.0.1:0")
    done = place.command("api", *options, code=2, SLUICE_SECRET_KEYS="", SLUICE_LOG_LEVEL="error")
    assert "SLUICE_SECRET_KEYS is not set: `sluice token keys`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_role_waits_for_a_database_that_is_away_and_says_so(place: Place) -> None:
    place.command("migrate")
    url = place.variables["SLUICE_DATABASE_URL"]
    nobody = free_port()
    away = url.replace(f":{urlsplit(url).port}/", f":{nobody}/")
    with without_owner(place).role("api", SLUICE_DATABASE_URL=away) as api:
        api.said("(waiting) for=database")
        probe = api.probe()
        assert probe.status == 503
        assert "the database cannot be reached" in probe.json()["not_ready"]["database"]
        assert api.end() == 0


class Listening:
    """A client of a stream, which notes the id of the last event that it was told."""

    def __init__(self, api: Running, known: dict[str, Any], last_id: str) -> None:
        headers = {"Authorization": f"Bearer {known['api_key']}"} | ({"Last-Event-ID": last_id} if last_id else {})
        self._connection = http.client.HTTPConnection(urlsplit(api.url).netloc, timeout=END_S)
        self._connection.request("GET", f"/api/v1/readings/stream?device_id={known['device_id']}", headers=headers)
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.last_id = last_id
        self.values: list[float] = []

    def close(self) -> None:
        self._answer.close()
        self._connection.close()

    def event(self) -> str:
        """The name of the next event; empty at the end."""
        name = ""
        for raw in self._answer:
            field, _, value = raw.decode().rstrip("\n").partition(": ")
            if field == "id":
                self.last_id = value
            elif field == "event":
                name = value
            elif field == "data" and name == "readings":
                self.values += [reading["value"] for reading in json.loads(value)]
            elif not field and name:
                return name
        return ""


def test_a_stream_goes_on_where_it_was_after_the_api_was_started_again(place: Place) -> None:
    """The end of a process does not wait for streams; what landed meanwhile is told by the next."""
    known = seeded(place)

    def send(before: int) -> int:
        """Two more."""
        for value in (before + 1, before + 2):
            assert ask(f"{ingest.url}/v1/ingest?token={known['ingest_token']}&temp={value}").status == 202
        return before + 2

    with place.role("ingest") as ingest, place.role("worker") as worker:
        ingest.ready()
        worker.ready()
        told: list[float] = []
        last_id, sent = "", 0
        for _ in range(3):
            with place.role("api") as api:
                api.ready()
                stream = Listening(api, known, last_id)
                assert stream.event() == "position"
                sent = send(sent)
                while len(told) + len(stream.values) < sent:
                    assert stream.event() == "readings"
                assert api.end() == 0
                assert (stream.event(), stream.event()) == ("end", "")
                told += stream.values
                last_id = stream.last_id
                stream.close()
            sent = send(sent)
        assert told == [float(value) for value in range(1, sent - 1)]
