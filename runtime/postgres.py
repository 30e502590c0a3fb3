"""Connections to PostgreSQL under the role of a process. Left out: what is asked of them.

Every session has time-outs, so that neither a lost peer nor a stopped process holds anything for long.
"""

import ssl
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from runtime.errors import ConfigurationError, UnavailableError
from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class PostgresSettings:
    """Where the database is and how long anything there is waited for."""

    database_url: str = setting(
        "",
        secret=True,
        why="postgresql://user:password@host:port/database; the user may take the roles sluice_app, …_worker, …",
    )
    database_owner_url: str = setting(
        "", secret=True, why="The same for the owner of the tables; only migrations use it."
    )
    database_connect_timeout_ms: int = setting(
        5_000, unit="ms", least=100, why="A host that is away must not hold a start."
    )
    database_statement_timeout_ms: int = setting(
        30_000, unit="ms", least=100, why="No statement of ours takes longer in health; a hung one is given up."
    )
    database_pool_size_max: int = setting(10, unit="connections", least=1, most=1000, why="Per process and role.")


#: What a connection raises when the database is away, going down, coming up or read-only: try again later.
UNAVAILABLE: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)


def session_settings(settings: PostgresSettings, role: str | None, application: str) -> dict[str, str]:
    """What every session of ours is started with; the TCP ones notice a peer that vanished within 15 s."""
    timeout = settings.database_statement_timeout_ms
    session = {
        "application_name": application,
        "statement_timeout": str(timeout),
        "lock_timeout": str(timeout),
        "idle_in_transaction_session_timeout": str(timeout),
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "2",
        "tcp_keepalives_count": "5",
        "tcp_user_timeout": "15000",
        "TimeZone": "UTC",
        "jit": "off",
    }
    if role:
        session["role"] = role
    return session


async def connect(
    settings: PostgresSettings, *, role: str | None, application: str, url: str | None = None, **overrides: str
) -> "asyncpg.Connection[asyncpg.Record]":
    """One session as `role`; `overrides` replace session settings. Raises `UnavailableError`, `ConfigurationError`."""
    dsn = url or _required(settings)
    try:
        return await asyncpg.connect(
            dsn,
            timeout=settings.database_connect_timeout_ms / 1000,
            server_settings=session_settings(settings, role, application) | overrides,
        )
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.ClientConfigurationError,
    ) as error:
        raise _refused(error) from error
    except (*UNAVAILABLE, ssl.SSLError) as error:
        raise UnavailableError(f"the database cannot be reached: {error}") from error


async def open_pool(
    settings: PostgresSettings, *, role: str, application: str, size_max: int | None = None
) -> "asyncpg.Pool[asyncpg.Record]":
    """A pool of sessions as `role`, after one has been checked. Raises `UnavailableError`, `ConfigurationError`."""
    try:
        pool = await asyncpg.create_pool(
            _required(settings),
            min_size=1,
            max_size=size_max or settings.database_pool_size_max,
            timeout=settings.database_connect_timeout_ms / 1000,
            server_settings=session_settings(settings, role, application),
        )
    except (
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
        asyncpg.ClientConfigurationError,
    ) as error:
        raise _refused(error) from error
    except (*UNAVAILABLE, ssl.SSLError) as error:
        raise UnavailableError(f"the database cannot be reached: {error}") from error
    async with pool.acquire() as connection:
        await check_role(connection)
    return pool


async def check_role(connection: Any) -> None:
    """Raises `ConfigurationError` for a session that could look past row-level security."""
    row = await connection.fetchrow(
        "SELECT rolname, rolsuper OR rolbypassrls AS excessive FROM pg_roles WHERE rolname IN (session_user, current_user)"
        " ORDER BY excessive DESC LIMIT 1"
    )
    if row is None or row["excessive"]:
        name = "?" if row is None else row["rolname"]
        raise ConfigurationError(
            f"SLUICE_DATABASE_URL: role {name} is superuser or bypasses row-level security; "
            "use the login `sluice` that deploy/sql/bootstrap.sql makes"
        )


def _required(settings: PostgresSettings) -> str:
    if not settings.database_url:
        raise ConfigurationError('SLUICE_DATABASE_URL is not set: `eval "$(deploy/local/services start)"` sets it')
    return settings.database_url


def _refused(error: Exception) -> ConfigurationError:
    return ConfigurationError(f"SLUICE_DATABASE_URL is refused by the database: {error}")
