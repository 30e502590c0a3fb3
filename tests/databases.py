"""Fresh databases for tests: cloned from a template that has everything but data.

Left out: which tests run on which (`tests.conftest` has the fixtures).
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import asyncpg

from deploy.database import migrations
from deploy.embedded import EmbeddedPostgres, bootstrap
from runtime.migrate import SESSION, migrate
from runtime.postgres import PostgresSettings, connect


@dataclass(frozen=True)
class Database:
    """One database of a test's own, and who may log in there."""

    name: str
    url: str
    owner_url: str
    superuser_url: str

    @property
    def environment(self) -> dict[str, str]:
        return {"SLUICE_DATABASE_URL": self.url, "SLUICE_DATABASE_OWNER_URL": self.owner_url}

    @property
    def settings(self) -> PostgresSettings:
        return PostgresSettings(database_url=self.url, database_owner_url=self.owner_url)


class Server:
    """A PostgreSQL whose superuser makes databases for tests."""

    def url(self, login: str, database: str) -> str:
        raise NotImplementedError

    def database(self, name: str) -> Database:
        return Database(name, self.url("sluice", name), self.url("sluice_owner", name), self.url("postgres", name))

    async def create(self, name: str, template: str | None = None) -> Database:
        """An empty database with roles, or a copy of `template`."""
        await self._execute(
            f"CREATE DATABASE {name}" + (f" TEMPLATE {template} OWNER sluice_owner" if template else "")
        )
        database = self.database(name)
        if template is None:
            await bootstrap(database.superuser_url)
        return database

    async def create_template(self) -> str:
        """A migrated database that can be copied: nobody, no background worker either, may connect to it."""
        database = await self.create(f"template_{uuid4().hex}")
        await migrated(database)
        await self._execute(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
        await self._execute(
            f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{database.name}'"
        )
        return database.name

    async def drop(self, name: str) -> None:
        await self._execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    async def _execute(self, sql: str) -> None:
        connection = await asyncpg.connect(self.url("postgres", "postgres"))
        try:
            await connection.execute(sql)
        finally:
            await connection.close()


class LocalServer(Server):
    """The TimescaleDB that `deploy/local/services` runs; its state directory knows the superuser's password."""

    def __init__(self, state_directory: Path) -> None:
        state = json.loads((state_directory / "state.json").read_text())
        self._port = state["ports"]["timescaledb"]
        self._passwords = state["passwords"]

    def url(self, login: str, database: str) -> str:
        return f"postgresql://{login}:{quote(self._passwords[login])}@127.0.0.1:{self._port}/{database}"


class EmbeddedServer(Server):
    """The PostgreSQL of `sluice up`."""

    def __init__(self, directory: Path) -> None:
        self._postgres = EmbeddedPostgres(directory)

    def start(self) -> None:
        asyncio.run(self._postgres.start())

    def stop(self) -> None:
        asyncio.run(self._postgres.stop())

    def url(self, login: str, database: str) -> str:
        return self._postgres.url(login, database)


async def migrated(database: Database) -> None:
    connection = await connect(database.settings, role=None, application="test", url=database.owner_url, **SESSION)
    try:
        await migrate(connection, migrations())
    finally:
        await connection.close()
