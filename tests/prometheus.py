"""Prometheus' own programs for tests: its rules checked and tested by promtool, and a server of a test's own.

Left out: what is expected of the rules. A program that is missing is installed, or fails the test.
"""

import functools
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from bench.usage import free_port
from tests.conftest import CHECKOUT, run_services
from tests.support import ask, eventually

DIRECTORY = CHECKOUT / "deploy" / "prometheus"
CONFIG = DIRECTORY / "prometheus.yml"
RULES = sorted((DIRECTORY / "rules").glob("*.yml"))
STOP_TIMEOUT_S = 60.0


@functools.cache
def program(name: str) -> str:
    return run_services("path", name).strip()


def promtool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [program("promtool"), *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=DIRECTORY
    )


def rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """Alert rules by their names."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def unknown_metrics(expression: str) -> set[str]:
    """Metrics of ours in an expression that no role declares and no rule records: `or vector(0)` would hide them."""
    sources = [path for part in ("ingest", "workers", "api", "runtime") for path in (CHECKOUT / part).rglob("*.py")]
    declared = set(re.findall(r'"(sluice_\w+)"', "".join(path.read_text() for path in sources)))
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = set(re.findall(r"\bsluice[_:]\w[\w:]*", expression))
    plain = {name: re.sub(r"_(bucket|sum|count|total)$", "", name) for name in named}
    return {name for name in named - recorded if not declared & {name, plain[name], f"{plain[name]}_total"}}


@dataclass(frozen=True)
class Prometheus:
    """A server that answers at `url`."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What it gives now. Fails for an expression that it refuses."""
        answer = ask(f"{self.url}/api/v1/query?{urlencode({'query': expression})}")
        assert answer.status == 200, (expression, answer.body)
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def firing(self) -> set[str]:
        found = json.loads(ask(f"{self.url}/api/v1/alerts").body)["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}


@contextmanager
def prometheus(directory: Path, targets: Mapping[str, str], interval: str = "500ms") -> Iterator[Prometheus]:
    """The shipped configuration and rules, looking at `targets` (host:port by job) every `interval`.

    What an alert waits for (`for`) is taken out: promtool's tests show the real times.
    """
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    assert {job["job_name"] for job in config["scrape_configs"]} <= targets.keys()
    # What not everybody runs stands in comments there.
    config["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
    ]
    (directory / "rules").mkdir(parents=True)
    for path in RULES:
        content = yaml.safe_load(path.read_text())
        for rule in (rule for group in content["groups"] for rule in group["rules"]):
            rule.pop("for", None)
        (directory / "rules" / path.name).write_text(yaml.safe_dump(content))
    (directory / CONFIG.name).write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        program("prometheus"), f"--config.file={directory / CONFIG.name}",
        f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://{address}")
        eventually("Prometheus answers", lambda: ask(f"{server.url}/-/ready").status == 200)
        yield server
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
