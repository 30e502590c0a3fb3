"""Makes sure that the database is what this version works on, before anything works on it.

With SLUICE_DATABASE_OWNER_URL it is brought there, by whichever role starts first; without, the start is refused.
"""

from importlib import resources
from typing import Any

from deploy.columnstore import check_columnstore, set_columnstore
from deploy.generation import Generation, active_generation, ensure_generation
from deploy.settings import DeploySettings
from runtime.errors import MissingSettingError
from runtime.log import LogSettings
from runtime.migrate import SESSION, Migration, assert_migrated, exclusively, migrate, read_migrations
from runtime.postgres import OWNER_VARIABLE, PostgresSettings, check_role, connect
from runtime.settings import Settings
from workers.retention.settings import RetentionSettings


def migrations() -> list[Migration]:
    return read_migrations(resources.files("schemas") / "sql")


async def connect_owner(settings: PostgresSettings) -> Any:
    """Raises `ConfigurationError`, `UnavailableError`."""
    if not settings.database_owner_url:
        raise MissingSettingError(f"{OWNER_VARIABLE} is not set: only the owner of the tables may change them")
    connection = await connect(
        settings, role=None, application="sluice migrate", url=settings.database_owner_url, **SESSION
    )
    try:
        await check_role(connection, OWNER_VARIABLE)
    except BaseException:
        await connection.close()
        raise
    return connection


async def bring_up_to_date(settings: Settings) -> tuple[list[Migration], Generation]:
    """Apply the migrations that are missing and make the first generation of the log, as the owner.

    Raises `ConfigurationError`, `UnavailableError`. May be repeated, and run by several at once.
    """
    connection = await connect_owner(settings.get(PostgresSettings))
    try:
        async with exclusively(connection):
            applied = await migrate(connection, migrations())
            await set_columnstore(connection, settings.get(RetentionSettings))
            generation = await ensure_generation(
                connection, settings.get(LogSettings), settings.get(DeploySettings).log_partitions
            )
    finally:
        await connection.close()
    return applied, generation


async def check_up_to_date(settings: Settings) -> None:
    """Raises `ConfigurationError` naming the command that helps, `UnavailableError`."""
    connection = await connect(settings.get(PostgresSettings), role="sluice_reader", application="sluice start")
    try:
        await check_role(connection)
        await assert_migrated(connection, migrations())
        await check_columnstore(connection, settings.get(RetentionSettings))
        await active_generation(connection, settings.get(LogSettings).log_url)
    finally:
        await connection.close()


async def prepare(settings: Settings, *, may_change: bool) -> None:
    """What every role does first. Raises `ConfigurationError`, `UnavailableError`."""
    if may_change and settings.get(PostgresSettings).database_owner_url:
        await bring_up_to_date(settings)
    await check_up_to_date(settings)
