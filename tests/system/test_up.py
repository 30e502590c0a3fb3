"""`sluice up` as a newcomer meets it: one command, a reading seen through the API, and an end without a trace."""

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support import ask, eventually

SLUICE = Path(sys.executable).with_name("sluice")
READY_S = 180
END_S = 90


@pytest.fixture
def data() -> Iterator[Path]:
    """A data directory; not below pytest's own, which every session closes to the user PostgreSQL runs as."""
    with TemporaryDirectory(prefix="sluice-up-") as directory:
        yield Path(directory) / "data"
        eventually("nothing works in it any more", lambda: not below(Path(directory)))


def environment(**variables: str) -> dict[str, str]:
    """Ours, without what would lead to other parts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return kept | variables


@dataclass
class Up:
    """One `sluice up`, ready, and what it printed."""

    process: "subprocess.Popen[str]"
    printed: list[str]
    events: Path

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.printed[0])
        return found

    @property
    def metrics(self) -> str:
        """Where it says that probes are served."""
        match = re.search(r"probes are served address=(\S+)", self.events.read_text())
        assert match
        return f"http://{match[1]}"

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=END_S)


@contextmanager
def up(data: Path, *arguments: str, lines: int = 1, **variables: str) -> Iterator[Up]:
    """Started and ready; killed at the end if a test has not ended it."""
    events = data.with_name("events")
    with events.open("w") as errors:
        process = subprocess.Popen(
            [SLUICE, "up", "--data", data, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(**variables),
        )
    assert process.stdout is not None
    try:
        printed = [process.stdout.readline().rstrip("\n") for _ in range(lines)]
        assert all(printed), events.read_text()
        yield Up(process, printed, events)
    finally:
        process.kill()
        process.wait(timeout=END_S)
        process.stdout.close()


def values(url: str, device: str, key: str) -> list[Any]:
    answer = ask(f"{url}/api/v1/readings?device_id={device}", token=key)
    assert answer.status == 200, answer.body
    return [reading["value"] for reading in answer.json()["data"]]


def send(url: str, token: str, value: float) -> int:
    body = json.dumps({"measurements": [{"type": "temperature", "value": value}]}).encode()
    return ask(
        f"{url}/v1/ingest", token=token, method="POST", body=body, **{"Content-Type": "application/json"}
    ).status


def below(directory: Path) -> list[str]:
    """Processes that work in `directory`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if bytes(directory) in command:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def test_the_two_lines_that_are_printed_send_the_first_reading_and_read_it_back(data: Path) -> None:
    with up(data, lines=3) as it:
        assert all(line.startswith("curl ") for line in it.printed[:2])
        sent = subprocess.run(shlex.split(it.printed[0]), capture_output=True, text=True, timeout=120, check=True)
        assert json.loads(sent.stdout)["accepted"] == 1

        def read() -> Any:
            back = subprocess.run(shlex.split(it.printed[1]), capture_output=True, text=True, timeout=120, check=True)
            return json.loads(back.stdout)["data"]

        (reading,) = eventually("the first reading", read)
        assert (reading["metric"], reading["value"], reading["unit"]) == ("temperature", 21.5, "°C")
        key = it.printed[1].rsplit(" ", 1)[1].strip('"')
        url = next(part for part in shlex.split(it.printed[0]) if part.startswith("http")).removesuffix("/v1/ingest")
        told = re.fullmatch(r"The organisation is (\S+), its device (\S+)\.", it.printed[2])
        assert told
        assert told[2] == reading["device_id"]
        assert ask(f"{url}/api/organisations/{told[1]}/sites", token=key).status == 200


def test_it_lives_on_in_its_directory_and_leaves_nothing_running(data: Path) -> None:
    began = time.monotonic()
    with up(data, "--json") as first:
        made_s = time.monotonic() - began
        known = first.json
        assert set(known) == {
            "url", "organisation_id", "site_id", "device_id", "ingest_token", "api_key", "data_dir", "config",
        }  # fmt: skip
        assert known["data_dir"] == str(data)
        assert send(known["url"], known["ingest_token"], 1.5) == 202
        eventually("the reading", lambda: values(known["url"], known["device_id"], known["api_key"]) == [1.5])
        assert first.end() == 0
    assert not below(data)
    began = time.monotonic()
    with up(data, "--json") as second:
        assert time.monotonic() - began < made_s, "the second start makes nothing"
        again = second.json
        assert set(again) == {"url", "organisation_id", "site_id", "device_id", "data_dir", "config"}
        assert again["device_id"] == known["device_id"]
        assert send(again["url"], known["ingest_token"], 2.5) == 202
        url = again["url"]
        eventually("both", lambda: sorted(values(url, known["device_id"], known["api_key"])) == [1.5, 2.5])
        assert second.end() == 0
    assert not below(data)


def test_an_open_stream_is_told_of_the_reading_and_of_the_end(data: Path) -> None:
    """It never ends by itself: whoever stops the process does not wait for it."""
    with up(data, "--json") as it:
        known = it.json
        connection = http.client.HTTPConnection(urlsplit(known["url"]).netloc, timeout=END_S)
        headers = {"Authorization": f"Bearer {known['api_key']}"}
        connection.request("GET", f"/api/v1/readings/stream?device_id={known['device_id']}", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200
        lines = iter(answer)
        assert b"event: position\n" in lines
        assert send(known["url"], known["ingest_token"], 21.5) == 202
        assert b"event: readings\n" in lines
        assert b'"metric":"temperature"' in next(lines)
        assert it.end() == 0
        assert [*lines][-3:] == [b"event: end\n", b'data: {"reason":"shutdown"}\n', b"\n"]
        connection.close()


def test_what_was_acknowledged_before_a_kill_is_there_after_it(data: Path) -> None:
    with up(data, "--json") as it:
        known = it.json
        sent = [float(number) for number in range(20) if send(known["url"], known["ingest_token"], number) == 202]
        it.process.kill()
        it.process.wait(timeout=END_S)
    assert len(sent) == 20
    eventually("PostgreSQL ends with its parent", lambda: not below(data))
    with up(data, "--json") as it:
        url = it.json["url"]
        eventually("all of them", lambda: sorted(values(url, known["device_id"], known["api_key"])) == sent)


def test_probes_and_metrics_of_every_role_on_a_port_of_their_own(data: Path) -> None:
    with up(data, "--json") as it:
        assert send(it.json["url"], it.json["ingest_token"], 1) == 202
        ready = ask(f"{it.metrics}/health/ready")
        assert (ready.status, ready.json()) == (200, {"ready": True, "not_ready": {}})
        assert ask(f"{it.metrics}/health/live").json() == {"live": True}
        names = ("sluice_ingest_requests_total", "sluice_landing_records_total 1.0", "process_cpu_seconds_total")

        def all_there() -> str:
            text = ask(f"{it.metrics}/metrics").body.decode()
            return text if all(f"\n{name}" in text for name in names) else ""

        text = eventually("what every role counts", all_there)
        assert not re.search(r"[a-z]{2}_live_", text.replace("sluice_api_live_", "")), "no token"
        assert it.json["device_id"] not in text


def test_the_file_of_settings_leads_other_commands_to_the_same_parts(data: Path) -> None:
    with up(data, "--json") as it:
        known = it.json
        made = subprocess.run(
            [SLUICE, "token", "device", known["device_id"], "--name", "another"],
            env=environment(SLUICE_CONFIG=str(data / "sluice.toml")),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert send(known["url"], made.stdout.strip(), 3) == 202
    with up(data, "--json", SLUICE_CONFIG=str(data / "sluice.toml")) as it:
        assert it.json["device_id"] == known["device_id"]
    assert (data / "sluice.toml").stat().st_mode & 0o077 == 0
    assert (data / "secret-keys").stat().st_mode & 0o077 == 0
    assert (data / "log").stat().st_mode & 0o077 == 0


def typed(line: str, password: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """A command as it is printed, its program too, with the password that it asks for."""
    assignment, *command = shlex.split(line)
    name, _, value = assignment.partition("=")
    return subprocess.run(
        command,
        env=environment(**variables, **{name: value}),
        input=f"{password}\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_is_printed_makes_who_may_do_everything_and_links_lead_here(data: Path) -> None:
    with up(data, lines=5) as it:
        url = next(part for part in shlex.split(it.printed[0]) if part.startswith("http")).removesuffix("/v1/ingest")
        made = typed(it.printed[4], "correct horse battery")
        assert (made.returncode, "may do everything" in made.stdout) == (0, True), made.stderr
        email = it.printed[4].split()[-1]
        link = typed(f"SLUICE_CONFIG={data / 'sluice.toml'} {SLUICE} admin reset-link {email}").stdout
        assert link.startswith(f"{url}/account#reset=")
        assert ask(f"{url}/account").status == 200
        assert it.end() == 0
    with up(data, lines=5, SLUICE_PUBLIC_URL="https://sluice.example") as it:
        assert it.printed[4].startswith(f"SLUICE_CONFIG={data / 'sluice.toml'} {SLUICE} admin create ")
        link = typed(f"SLUICE_CONFIG={data / 'sluice.toml'} {SLUICE} admin reset-link {email}").stdout
        assert link.startswith("https://sluice.example/account#reset=")


@pytest.mark.parametrize(
    "command", ["admin create you@example.org", "token api-key " + "0" * 32, "migrate", "worker"]
)
def test_a_command_without_settings_names_those_of_the_one_that_runs_here(command: str, tmp_path: Path) -> None:
    def told(**variables: str) -> str:
        done = subprocess.run(
            [SLUICE, *command.split()],
            cwd=tmp_path, env=environment(**variables), input="correct horse battery\n",
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        return done.stderr

    assert "SLUICE_CONFIG" not in told()
    (tmp_path / ".sluice").mkdir()
    (tmp_path / ".sluice" / "sluice.toml").write_text("")
    assert "SLUICE_CONFIG=.sluice/sluice.toml" in told()
    assert "SLUICE_CONFIG" not in told(SLUICE_CONFIG=str(tmp_path / ".sluice" / "sluice.toml"))


def test_no_token_is_logged_and_none_is_kept_in_the_clear(data: Path) -> None:
    with up(data, "--json", SLUICE_LOG_LEVEL="debug") as it:
        known = it.json
        ask(f"{known['url']}/v1/ingest/shelly/{known['ingest_token']}?temp=1")
        ask(f"{known['url']}/v1/nothing/{known['ingest_token']}")
        values(known["url"], known["device_id"], known["api_key"])
        assert it.end() == 0
        secrets = [known[name][8:] for name in ("ingest_token", "api_key")]
        assert not [secret for secret in secrets if secret in it.events.read_text()]
    grep = ["grep", "--recursive", "--files-with-matches", "--fixed-strings"]
    patterns = [part for secret in secrets for part in ("-e", secret)]
    assert not subprocess.run([*grep, *patterns, data], capture_output=True, check=False).stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLUICE_NO_SUCH": "1"}, "SLUICE_NO_SUCH is no setting of Sluice"),
        ({"SLUICE_LOG_PARTITIONS": "0"}, "SLUICE_LOG_PARTITIONS=0 is out of bounds"),
        ({"SLUICE_LOG_URL": "redis://x"}, "SLUICE_LOG_URL begins with 'redis', which is none of"),
        ({"SLUICE_SECRET_KEYS": "abc"}, "SLUICE_SECRET_KEYS is a list of id:key"),
        ({"SLUICE_HTTP_LISTEN": "nowhere"}, "SLUICE_HTTP_LISTEN=nowhere is not host:port"),
    ],
)
def test_a_start_that_is_refused_is_one_line_without_a_traceback(
    data: Path, variables: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [SLUICE, "up", "--data", data],
        env=environment(SLUICE_LOG_LEVEL="error") | variables,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"sluice: {message}")
    assert not below(data)


def test_a_signal_in_the_middle_of_the_first_start_ends_it_cleanly(data: Path) -> None:
    process = subprocess.Popen([SLUICE, "up", "--data", data, "--port", "0"], env=environment())
    eventually("the server's files", (data / "postgres" / "PG_VERSION").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=END_S) == 0
    assert not below(data)
    with up(data, "--json") as it:
        assert it.json["ingest_token"], "nobody has been shown a token yet"


def test_two_at_once_in_one_directory_are_refused(data: Path) -> None:
    with up(data, "--json"):
        second = subprocess.run(
            [SLUICE, "up", "--data", data, "--port", "0"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert second.returncode == 2
        assert "is in use by another `sluice up`" in second.stderr


def test_settings_do_not_hide_a_database_that_the_directory_holds(data: Path) -> None:
    with up(data, "--json") as it:
        assert it.end() == 0
    before = (data / "sluice.toml").read_text()
    done = subprocess.run(
        [SLUICE, "up", "--data", data, "--port", "0"],
        env=environment(SLUICE_DATABASE_URL="postgresql://sluice@127.0.0.1:1/sluice"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "holds a database of its own, and SLUICE_DATABASE_URL names another" in done.stderr
    assert (data / "sluice.toml").read_text() == before


def test_its_one_listener_is_as_strict_and_as_patient_as_a_role_of_its_own(data: Path) -> None:
    """Both faces: odd expectations, malformed chunks, error answers, and bodies on their way when it ends."""
    with up(data, "--json") as it:
        host, port = it.json["url"].removeprefix("http://").split(":")
        head = f"POST /v1/ingest HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {it.json['ingest_token']}\r\n".encode()
        body = b'{"measurements":[{"type":"temperature","value":1}]}'

        def connected() -> socket.socket:
            return socket.create_connection((host, int(port)), timeout=60)

        def told(raw: bytes) -> bytes:
            with connected() as wire:
                wire.sendall(raw)
                return wire.recv(10_000)

        assert told(head + b"Expect: wonders\r\nContent-Length: %d\r\n\r\n" % len(body) + body).startswith(
            b"HTTP/1.1 202 "
        )
        malformed = told(head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n")
        assert malformed.startswith(b"HTTP/1.1 400 ")
        assert b'"bad_request"' in malformed, "it did not wait for the rest, which would be 408"
        for raw in (b"rubbish\r\n\r\n", b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n"):
            answer = told(raw)
            assert answer.startswith(b"HTTP/1.1 40")
            assert b"aiohttp" not in answer
            assert b"Content-Type: application/problem+json\r\n" in answer
        for path, kind in (("/v1/ingest", b"json"), ("/v1/devices", b"json"), ("/api/v1/readings", b"problem+json")):
            answer = told(f"GET {path} HTTP/1.1\r\nHost: a\r\nX: {'x' * 9_000}\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b"Content-Type: application/%s\r\n" % kind in answer
        document = ask(f"{it.json['url']}/api/v3/api-docs").json()
        assert {"/v1/ingest", "/v1/devices"} <= set(document["paths"])
        assert "servers" not in document["paths"]["/v1/ingest"], "it is served at the document's own"
        with connected() as wire:
            wire.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:10])
            time.sleep(0.2)
            it.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            wire.sendall(body[10:])
            answer = wire.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 202 ")
        assert b"Connection: close\r\n" in answer
        assert it.process.wait(timeout=END_S) == 0
