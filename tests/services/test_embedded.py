"""The embedded PostgreSQL: durable, private, without a superuser for our sessions, and never left behind."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest

from deploy.embedded import SOCKET_PATH_BYTES_MAX, EmbeddedPostgres
from runtime.errors import ConfigurationError
from tests.support import eventually, run

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not below pytest's own, which every session closes to the user that PostgreSQL runs as."""
    with TemporaryDirectory(prefix="sluice-embedded-") as made:
        yield Path(made)


async def show(postgres: EmbeddedPostgres, login: str, sql: str) -> object:
    connection = await asyncpg.connect(postgres.url(login))
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def test_it_is_durable_private_and_keeps_what_it_was_given(directory: Path) -> None:
    async def test() -> None:
        postgres = EmbeddedPostgres(directory)
        await postgres.start()
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await show(postgres, "sluice", f"SHOW {setting}") == "on"
        assert await show(postgres, "sluice", "SHOW listen_addresses") == ""
        for login in ("sluice", "sluice_owner"):
            assert (
                await show(postgres, login, "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = user")
                is False
            )
        await show(postgres, "sluice_owner", "CREATE TABLE kept AS SELECT 1 AS one")
        await postgres.stop()
        await postgres.start()
        assert await show(postgres, "sluice_owner", "SELECT one FROM kept") == 1
        await postgres.stop()
        await postgres.stop()

    run(test())
    assert stat.S_IMODE((directory / "postgres").stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "run").stat().st_mode) == 0o700


def test_a_path_too_long_for_a_socket_is_no_obstacle(directory: Path) -> None:
    async def test() -> str:
        long = directory / ("x" * SOCKET_PATH_BYTES_MAX)
        long.mkdir()
        postgres = EmbeddedPostgres(long)
        await postgres.start()
        url = postgres.url("sluice")
        assert await show(postgres, "sluice", "SELECT 1") == 1
        await postgres.stop()
        return url

    sockets = run(test()).split("host=")[1].split("&")[0].replace("%2F", "/")
    assert not Path(sockets).exists()


def test_an_end_that_nobody_asked_for_is_noticed(directory: Path) -> None:
    async def test() -> None:
        postgres = EmbeddedPostgres(directory)
        await postgres.start()
        ended = asyncio.create_task(postgres.ended())
        os.kill(int((directory / "postgres" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        await ended
        await postgres.stop()

    run(test())


def test_data_of_another_version_is_refused(directory: Path) -> None:
    (directory / "postgres").mkdir()
    (directory / "postgres" / "PG_VERSION").write_text("15\n")
    with pytest.raises(ConfigurationError, match="made by PostgreSQL 15"):
        run(EmbeddedPostgres(directory).start())


def test_an_interrupted_first_start_is_begun_again(directory: Path) -> None:
    (directory / "postgres.new").mkdir()
    (directory / "postgres.new" / "PG_VERSION").write_text("18\n")

    async def test() -> None:
        postgres = EmbeddedPostgres(directory)
        await postgres.start()
        await postgres.stop()

    run(test())


PARENT = """
import asyncio, sys
from pathlib import Path
from deploy.embedded import EmbeddedPostgres

async def main():
    await EmbeddedPostgres(Path(sys.argv[1])).start()
    print("up", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_server_whose_parent_is_killed_ends_and_a_start_waits_for_that(directory: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, directory], cwd=CHECKOUT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    pid = int((directory / "postgres" / "postmaster.pid").read_text().split()[0])
    parent.kill()
    parent.wait(timeout=60)
    parent.stdout.close()

    async def test() -> None:
        postgres = EmbeddedPostgres(directory)
        await postgres.start()
        assert await show(postgres, "sluice", "SELECT 1") == 1
        await postgres.stop()

    run(test())
    eventually("the first server is gone", lambda: not Path(f"/proc/{pid}").exists())
