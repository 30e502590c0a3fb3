"""What every test may lean on: the real parts of this machine. Never skips: a part that does not start fails."""

import subprocess
from pathlib import Path

import pytest

SERVICES = Path(__file__).resolve().parents[1] / "deploy" / "local" / "services"
START_TIMEOUT_S = 900  # a first run on a new machine downloads the parts


def run_services(*arguments: str) -> str:
    """What the script prints. Raises for anything but success."""
    done = subprocess.run(
        [str(SERVICES), *arguments], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"services {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


def exports(printed: str) -> dict[str, str]:
    """The variables in lines of `export NAME=value`."""
    lines = [line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export ")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="session")
def services() -> dict[str, str]:
    """Kafka, TimescaleDB and Mosquitto run, in the checkout's own state directory: the `SLUICE_…` that lead there."""
    return exports(run_services("start"))
