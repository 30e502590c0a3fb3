"""What the tests on real services share."""

from collections.abc import Iterator

import pytest

from tests.databases import Server
from tests.ingest_rig import Installation, install


@pytest.fixture(scope="session")
def installation(
    timescaledb: Server, timescaledb_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """A registry in TimescaleDB and a SQLite log for the tests of the way in; each has tenants of its own."""
    yield from install(timescaledb, timescaledb_template, tmp_path_factory.mktemp("ingest"))
