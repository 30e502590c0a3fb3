"""HTTPS as an operator has it: several processes of a role, replaced under load while their certificate is renewed.

Left out: connections and bounds (`tests.unit.test_tls`), and TLS towards the parts (`tests.services`).
"""

import json
import signal
import ssl
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from runtime.secrets import new_ring
from tests.certificates import Authority, Files
from tests.databases import Database
from tests.support import ask, eventually
from tests.system.roles import Role, clean_environment, role, sluice, start_role

BODY = b'{"measurements":[{"type":"co2","value":400}]}'
SENDERS = 4


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def shown(authority: Authority) -> Files:
    return authority.sign("server", "127.0.0.1")


def environment_of(database: Database, directory: Path, files: Files) -> dict[str, str]:
    return clean_environment(
        **database.environment,
        SLUICE_LOG_URL=f"sqlite:///{directory}/log",
        SLUICE_DATA_DIR=str(directory / "data"),
        SLUICE_SECRET_KEYS=str(new_ring()),
        SLUICE_TLS_CERTIFICATE_FILE=files.certificate,
        SLUICE_TLS_KEY_FILE=files.key,
        SLUICE_LIMIT_DEVICE_REQUESTS_PER_MINUTE="0",
    )


def post(url: str, token: str, context: ssl.SSLContext) -> int:
    headers = {"Authorization": f"Bearer {token}", "Connection": "close"}
    request = urllib.request.Request(f"{url}/v1/ingest", data=BODY, headers=headers)
    with urllib.request.urlopen(request, context=context, timeout=60) as answer:
        return int(answer.status)


def started(ingest: Role) -> int:
    return sum(line.get("event") == "a process was started" for line in list(ingest.lines))


def test_processes_are_replaced_over_tls_without_a_lost_request(
    database: Database, tmp_path: Path, authority: Authority, shown: Files
) -> None:
    environment = environment_of(database, tmp_path, shown)
    sluice(environment, "migrate")
    seeded = json.loads(sluice(environment, "seed", "--json"))
    assert seeded["url"].startswith("https://")
    stop = Event()

    def send(url: str) -> int:
        context = ssl.create_default_context(cafile=authority.file)
        sent = 0
        while not stop.is_set():
            assert post(url, seeded["ingest_token"], context) == 202
            sent += 1
        return sent

    with (
        role(environment, "ingest", "--processes", "2", "--listen", "127.0.0.1:0") as ingest,
        ThreadPoolExecutor(SENDERS) as pool,
    ):
        url = ingest.url.replace("http://", "https://")
        sending = [pool.submit(send, url) for _ in range(SENDERS)]
        try:
            authority.sign("server", "127.0.0.1")
            ingest.process.send_signal(signal.SIGHUP)
            eventually("both processes are replaced", lambda: started(ingest) == 4, 60.0)
            ingest.wait_ready()
        finally:
            stop.set()
        assert all(one.result() > 0 for one in sending)


def test_a_role_shows_probes_and_metrics_over_tls(
    database: Database, tmp_path: Path, authority: Authority, shown: Files
) -> None:
    environment = environment_of(database, tmp_path, shown) | {
        "SLUICE_METRICS_TLS_CERTIFICATE_FILE": shown.certificate,
        "SLUICE_METRICS_TLS_KEY_FILE": shown.key,
    }
    sluice(environment, "migrate")
    context = ssl.create_default_context(cafile=authority.file)
    ingest = start_role(environment, "ingest", "--processes", "2", "--listen", "127.0.0.1:0")
    try:
        url = ingest.metrics_url.replace("http://", "https://")

        def refusals() -> bool:
            with urllib.request.urlopen(f"{url}/metrics", context=context, timeout=60) as answer:
                return b'sluice_http_refused_connections_total{listener="ingest",reason="handshake"}' in answer.read()

        eventually("metrics of a child", refusals, 60.0)
        assert ask(f"{ingest.metrics_url}/health/live").status == 0  # plain HTTP
    finally:
        ingest.end()


def test_a_certificate_without_its_key_refuses_the_start(
    database: Database, tmp_path: Path, authority: Authority, shown: Files
) -> None:
    other = authority.sign("other", "127.0.0.1")
    environment = environment_of(database, tmp_path, Files(shown.certificate, other.key))
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "ingest", "--processes", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 2
    assert f"SLUICE_TLS_KEY_FILE={other.key} is not the key of {shown.certificate}" in done.stderr
