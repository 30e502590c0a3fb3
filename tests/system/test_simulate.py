"""`sluice simulate` as somebody uses it who has logged in: a fleet for a time, and one that is interrupted."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from runtime.secrets import new_ring
from tests.bridge_rig import own_broker
from tests.databases import Database
from tests.support import eventually
from tests.system.roles import clean_environment, refusal, role, sluice


def test_a_fleet_runs_for_a_time_and_ends_when_it_is_told_to(bare_database: Database, tmp_path: Path) -> None:
    environment = clean_environment(
        **bare_database.environment,
        SLUICE_LOG_URL=f"sqlite:///{tmp_path / 'log'}",
        SLUICE_SECRET_KEYS=str(new_ring()),
        XDG_CONFIG_HOME=str(tmp_path),
    )
    assert "sluice login" in refusal(environment, "simulate")
    sluice(environment, "migrate")
    demo = json.loads(sluice(environment, "seed", "--json"))
    with role(environment, "api", "--listen", "127.0.0.1:0") as api, own_broker() as broker:
        log_in(environment, api.url, demo["api_key"])
        common = ("simulate", "--plants", "2", "--auth", "password", "--rate", "20", "--broker", broker.url)

        told = json.loads(sluice(environment, *common, "--duration", "2", "--seed", "7", "--json"))
        assert (told["plants"], told["connected"], told["waiting"], told["failures"]) == (2, 2, 0, {})
        assert told["made"] == told["acknowledged"] == told["published"] > 10

        command = [sys.executable, "-m", "deploy.cli", *common]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as running:
            assert running.stderr is not None
            eventually("they are there", running.stderr.readline)
            running.send_signal(signal.SIGINT)
            printed, said = running.communicate(timeout=60)
        assert (running.returncode, said) == (0, "")
        assert {line.split()[0] for line in printed.splitlines()} >= {"plants", "connected", "acknowledged"}


def log_in(environment: dict[str, str], url: str, key: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "deploy.cli", "login", url, "--api-key"],
        env=environment, input=f"{key}\n", text=True, check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip
