"""What every test may lean on: the real parts of this machine. Never skips: a part that does not start fails."""

import asyncio
import logging
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

from tests.databases import Database, EmbeddedServer, LocalServer, Server

CHECKOUT = Path(__file__).resolve().parents[1]
SERVICES = CHECKOUT / "deploy" / "local" / "services"
# How long an example takes to be drawn or tried is the machine's, which is shared: it says nothing of the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

START_TIMEOUT_S = 900  # a first run on a new machine downloads the parts

#: A file is one process's work: those that take minutes go first, so that nobody waits for them at the end.
LONG = ("faults", "system", "contract")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(parent.name in LONG for parent in item.path.parents))


def run_services(*arguments: str) -> str:
    """What the script prints. Raises for anything but success."""
    done = subprocess.run(
        [str(SERVICES), *arguments], capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"services {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


def exports(printed: str) -> dict[str, str]:
    """The variables in lines of `export NAME=value`."""
    words = [shlex.split(line) for line in printed.splitlines() if line.startswith("export ")]
    return dict(assignment.split("=", 1) for _, assignment in words)


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """For a test that sets logging up as a process does."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)  # not the attribute alone: loggers remember what they let through
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def services() -> dict[str, str]:
    """Kafka, TimescaleDB and Mosquitto run, in the checkout's own state directory: the `SLUICE_…` that lead there."""
    return exports(run_services("start"))


@pytest.fixture(scope="session")
def timescaledb(services: dict[str, str]) -> Server:
    return LocalServer(CHECKOUT / ".services")


@pytest.fixture(scope="session")
def embedded() -> Iterator[Server]:
    # Not below pytest's own directory, which every session closes to the user that PostgreSQL runs as.
    with TemporaryDirectory(prefix="sluice-embedded-") as directory:
        server = EmbeddedServer(Path(directory))
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def timescaledb_template(timescaledb: Server) -> Iterator[str]:
    yield from _template(timescaledb)


@pytest.fixture(scope="session")
def embedded_template(embedded: Server) -> Iterator[str]:
    yield from _template(embedded)


@pytest.fixture
def database(timescaledb: Server, timescaledb_template: str) -> Iterator[Database]:
    """A migrated database of the test's own, in TimescaleDB."""
    yield from _database(timescaledb, timescaledb_template)


@pytest.fixture
def embedded_database(embedded: Server, embedded_template: str) -> Iterator[Database]:
    """A migrated database of the test's own, in the embedded PostgreSQL."""
    yield from _database(embedded, embedded_template)


@pytest.fixture(params=["database", "embedded_database"], ids=["timescaledb", "embedded"])
def any_database(request: pytest.FixtureRequest) -> Database:
    """Each in turn."""
    found: Database = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def bare_database(timescaledb: Server) -> Iterator[Database]:
    """A database with roles and nothing else."""
    yield from _database(timescaledb, None)


@pytest.fixture(params=["timescaledb", "embedded"])
def any_bare_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """Likewise, on each server in turn."""
    yield from _database(request.getfixturevalue(request.param), None)


def _template(server: Server) -> Iterator[str]:
    name = asyncio.run(server.create_template())
    yield name
    asyncio.run(server.drop(name))


def _database(server: Server, template: str | None) -> Iterator[Database]:
    database = asyncio.run(server.create(f"test_{uuid4().hex}", template))
    yield database
    asyncio.run(server.drop(database.name))
