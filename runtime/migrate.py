"""Numbered SQL files, each applied once, in order, whoever asks and however many ask at once.

Left out: where the files come from, and what is in them.
"""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources.abc import Traversable
from typing import Any, Final

import asyncpg

from runtime.errors import ConfigurationError, UnavailableError

#: The session lock under which the database's shape changes; the high half spells "sluice".
LOCK: Final = 0x736C_7569_6365_0001
#: Statements of a migration may take long on a large table, but nobody waits for ever for its locks.
SESSION: Final = {"statement_timeout": "0", "lock_timeout": "60000", "idle_in_transaction_session_timeout": "60000"}

_FILE: Final = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    version    int PRIMARY KEY,
    name       text NOT NULL,
    checksum   bytea NOT NULL CHECK (octet_length(checksum) = 32),
    applied_at timestamptz NOT NULL DEFAULT now()
);
GRANT SELECT ON schema_migrations TO PUBLIC;
"""


@dataclass(frozen=True)
class Migration:
    """One file: `0001_pipeline.sql` is version 1, name pipeline."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> bytes:
        return sha256(self.sql.encode()).digest()

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"


def read_migrations(directory: Traversable) -> list[Migration]:
    """All migrations in `directory`, in order. Raises `ConfigurationError` for a set that is not 1, 2, 3, …"""
    found = []
    for file in directory.iterdir():
        if match := _FILE.fullmatch(file.name):
            found.append(Migration(int(match[1]), match[2], file.read_text(encoding="utf-8")))
        elif file.name.endswith(".sql"):
            raise ConfigurationError(f"migration {file.name} is not named like 0001_what_it_does.sql")
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise ConfigurationError("the numbers of the migrations have a gap or a double: install Sluice again")
    return found


async def migrate(
    connection: "asyncpg.Connection[asyncpg.Record]", migrations: Sequence[Migration]
) -> list[Migration]:
    """Apply what is missing, as the owner in a session with `SESSION`; returns it. May be repeated.

    Raises `ConfigurationError` when what the database had applied is not what these files say, and
    `UnavailableError` when another run holds the lock for long.
    """
    async with exclusively(connection):
        await connection.execute(_TABLE)
        applied = await _applied(connection)
        _check(applied, migrations)
        missing = [migration for migration in migrations if migration.version not in applied]
        for migration in missing:
            await _apply(connection, migration)
        return missing


@asynccontextmanager
async def exclusively(connection: "asyncpg.Connection[asyncpg.Record]") -> AsyncIterator[None]:
    """Holds `LOCK` for this session. Raises `UnavailableError` when it cannot be had in the session's lock time."""
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
    except (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError) as error:
        raise UnavailableError("another `sluice migrate` is at work on this database: try again") from error
    try:
        yield
    finally:
        # A session that is gone has given the lock back.
        if not connection.is_closed():
            await connection.execute("SELECT pg_advisory_unlock($1)", LOCK)


async def assert_migrated(connection: Any, migrations: Sequence[Migration]) -> None:
    """Raises `ConfigurationError` when the database is not exactly at the last of `migrations`."""
    try:
        applied = await _applied(connection)
    except asyncpg.UndefinedTableError:
        raise ConfigurationError("the database has no tables of Sluice: run `sluice migrate`") from None
    _check(applied, migrations)
    missing = [str(migration) for migration in migrations if migration.version not in applied]
    if missing:
        raise ConfigurationError(f"the database lacks {', '.join(missing)}: run `sluice migrate`")


async def _applied(connection: Any) -> dict[int, asyncpg.Record]:
    rows = await connection.fetch("SELECT version, name, checksum FROM schema_migrations ORDER BY version")
    return {row["version"]: row for row in rows}


def _check(applied: dict[int, asyncpg.Record], migrations: Sequence[Migration]) -> None:
    known = {migration.version: migration for migration in migrations}
    for version, row in applied.items():
        migration = known.get(version)
        if migration is None:
            raise ConfigurationError(
                f"the database has migration {version:04d}_{row['name']}, which this version of Sluice does not "
                "know: a newer one has been at work here: install that one"
            )
        if migration.checksum != row["checksum"]:
            raise ConfigurationError(
                f"migration {migration} was changed after this database had applied it: "
                "restore the file; changes belong in a new migration"
            )


async def _apply(connection: "asyncpg.Connection[asyncpg.Record]", migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO schema_migrations (version, name, checksum) VALUES ($1, $2, $3)",
                migration.version,
                migration.name,
                migration.checksum,
            )
    except asyncpg.LockNotAvailableError as error:
        raise UnavailableError(f"migration {migration} waits for a lock that a session keeps: {error}") from error
    except asyncpg.UndefinedObjectError as error:
        raise ConfigurationError(
            f"migration {migration}: {error}: run deploy/sql/bootstrap.sql again, as a superuser, on this database"
        ) from error
    except asyncpg.IntegrityConstraintViolationError as error:
        raise ConfigurationError(f"migration {migration} does not fit what is in the database: {error}") from error
    except asyncpg.InsufficientPrivilegeError as error:
        raise ConfigurationError(
            f"migration {migration}: {error}: SLUICE_DATABASE_OWNER_URL must be the owner that "
            "deploy/sql/bootstrap.sql makes"
        ) from error
