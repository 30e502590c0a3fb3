"""Runs the roles as processes of their own, as an operator would; their log lines tell where they listen."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from runtime.supervisor import EXIT_REFUSED
from tests.support import ask, eventually

STOP_TIMEOUT_S = 90.0
_data = TemporaryDirectory(prefix="sluice-data-")


class Role:
    """One running role."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except ValueError:
                self.lines.append({"event": line.rstrip()})

    def address(self, message: str) -> str:
        """The address in the role's log line of that message."""
        return next((str(line["address"]) for line in list(self.lines) if line.get("event") == message), "")

    @property
    def url(self) -> str:
        return f"http://{eventually('the role listens', lambda: self.address('listening'))}"

    @property
    def metrics_url(self) -> str:
        return f"http://{eventually('metrics', lambda: self.address('metrics and probes are served'))}"

    def wait_ready(self) -> None:
        eventually("the role is ready", lambda: ask(f"{self.metrics_url}/health/ready").status == 200, 60.0)

    def kill(self) -> None:
        """SIGKILL, as a machine that goes away."""
        self.process.kill()
        self.end()

    def end(self) -> None:
        """SIGTERM, unless it has ended already, and wait."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._thread.join(STOP_TIMEOUT_S)
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()


def sluice(environment: Mapping[str, str], *arguments: str) -> str:
    """What a command prints. Raises for anything but success."""
    done = _done(environment, arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(environment: Mapping[str, str], *arguments: str) -> str:
    """The one line that a command is refused with."""
    done = _done(environment, arguments)
    assert done.returncode == EXIT_REFUSED, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def _done(environment: Mapping[str, str], arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def start_role(
    environment: Mapping[str, str], *arguments: str, within: Sequence[str] = (), metrics: str = "127.0.0.1:0"
) -> Role:
    """`within`: a command that becomes the role, once it has made the place that the role runs in.

    `metrics` is where probes and metrics are served: any free port, unless somebody has to find it again.
    """
    process = subprocess.Popen(
        [*within, sys.executable, "-m", "deploy.cli", *arguments, "--metrics-listen", metrics],
        env={**environment, "SLUICE_LOG_FORMAT": "json"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return Role(process)


@contextmanager
def role(environment: Mapping[str, str], *arguments: str, metrics: str = "127.0.0.1:0") -> Iterator[Role]:
    """A role that is ready, ended afterwards."""
    running = start_role(environment, *arguments, metrics=metrics)
    try:
        running.wait_ready()
        yield running
    finally:
        running.end()


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of Sluice but `variables`, and a data directory of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return kept | {"SLUICE_DATA_DIR": mkdtemp(dir=_data.name)} | variables
