"""Connections to PostgreSQL under the role of a process. Left out: what is asked of them.

Every session has time-outs, so that neither a lost peer nor a stopped process holds anything for long.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import asyncpg

from runtime.errors import ConfigurationError, MissingSettingError, UnavailableError
from runtime.settings import setting
from runtime.urls import check_query, check_server, split_url

VARIABLE: Final = "SLUICE_DATABASE_URL"
OWNER_VARIABLE: Final = "SLUICE_DATABASE_OWNER_URL"
PROBE_EVERY_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 3.0
#: Longer than a session of a busy pool is waited for: what none comes free of is no longer just busy.
_PROBE_SESSION_S: Final = 15.0
#: Of both ends of a session: seconds, seconds, probes, milliseconds.
_TCP_OPTIONS: Final = {
    socket.TCP_KEEPIDLE: 5,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 5,
    socket.TCP_USER_TIMEOUT: 15_000,
}
_LOGINS: Final = {VARIABLE: "sluice", OWNER_VARIABLE: "sluice_owner"}


def check_database_url(url: str) -> None:
    """Raises `ValueError` for what is no URL of a database, without the password in it."""
    parts = split_url(url, ("postgresql", "postgres"))
    # `host=` may name the directory of a socket instead.
    check_server(parts, several=True, host_required=False)
    check_query(parts)


@dataclass(frozen=True, kw_only=True)
class PostgresSettings:
    """Where the database is and how long anything there is waited for."""

    database_url: str = setting(
        "",
        secret=True,
        check=check_database_url,
        why="postgresql://user:password@host:port/database; the user may take the roles sluice_app, …_worker, …",
    )
    database_owner_url: str = setting(
        "", secret=True, check=check_database_url, why="The same for the owner of the tables; only migrations use it."
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
    asyncpg.InternalClientError,  # a session that was ended between the messages of a query
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)


#: What the database answers to a login, role or database it does not have or does not allow: mend the setting.
_REFUSED: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.InvalidParameterValueError,
    asyncpg.ClientConfigurationError,
)


def session_settings(settings: PostgresSettings, role: str | None, application: str) -> dict[str, str]:
    """What every session of ours is started with; the TCP ones notice a peer that vanished within 15 s."""
    timeout = settings.database_statement_timeout_ms
    session = {
        "application_name": application,
        "statement_timeout": str(timeout),
        "lock_timeout": str(timeout),
        "idle_in_transaction_session_timeout": str(timeout),
        "tcp_keepalives_idle": str(_TCP_OPTIONS[socket.TCP_KEEPIDLE]),
        "tcp_keepalives_interval": str(_TCP_OPTIONS[socket.TCP_KEEPINTVL]),
        "tcp_keepalives_count": str(_TCP_OPTIONS[socket.TCP_KEEPCNT]),
        "tcp_user_timeout": str(_TCP_OPTIONS[socket.TCP_USER_TIMEOUT]),
        "TimeZone": "UTC",
        "jit": "off",
    }
    if role:
        session["role"] = role
    return session


async def connect(
    settings: PostgresSettings, *, role: str | None, application: str, url: str | None = None, **overrides: str
) -> "asyncpg.Connection[asyncpg.Record]":
    """One session as `role`; `overrides` replace session settings.

    Raises `UnavailableError`, `ConfigurationError`.
    """
    dsn = url or _required(settings)
    variable = OWNER_VARIABLE if url is not None and url == settings.database_owner_url else VARIABLE
    try:
        connection = await asyncpg.connect(
            dsn,
            timeout=settings.database_connect_timeout_ms / 1000,
            server_settings=session_settings(settings, role, application) | overrides,
        )
    except _REFUSED as error:
        raise _refused(error, variable) from error
    except (*UNAVAILABLE, ssl.SSLError) as error:
        raise _away(error, variable, dsn) from error
    await _bound_silence(connection)
    return connection


async def _bound_silence(connection: Any) -> None:
    """Our end of a TCP session notices a peer that vanished as soon as the other end does: within 15 s."""
    found = connection._transport.get_extra_info("socket")
    if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _TCP_OPTIONS.items():
            found.setsockopt(socket.IPPROTO_TCP, option, value)


@asynccontextmanager
async def transaction(connection: Any, **options: Any) -> AsyncIterator[None]:
    """A transaction on a connection that is used again afterwards; `options` are those of asyncpg's `transaction`.

    Whoever is cancelled while BEGIN is under way leaves asyncpg's connection in a transaction that nobody ends: the
    next one on it would be a savepoint, released and never committed. So a connection of which that is not known for
    certain is cut.
    """
    block = connection.transaction(**options)
    try:
        await block.start()
    except BaseException:
        connection.terminate()
        raise
    try:
        yield
    except BaseException:
        await _roll_back(connection, block)
        raise
    try:
        await block.commit()
    except BaseException:
        connection.terminate()
        raise


@contextmanager
def cut_after(connection: Any, seconds: float) -> Iterator[None]:
    """Cut the connection if what is done meanwhile takes longer: whoever waits then gets one of `UNAVAILABLE`.

    A server that was stopped, or a network that swallows everything, ends no statement and answers no cancellation,
    for which asyncpg waits without an end.
    """
    cut = asyncio.get_running_loop().call_later(seconds, connection.terminate)
    try:
        yield
    finally:
        cut.cancel()


@contextmanager
def copying(connection: Any) -> Iterator[None]:
    """Around a COPY on a connection that others may end: raises `InterfaceError` once it has been, as all else does.

    asyncpg looks before every other call whether it is still open.
    """
    try:
        yield
    except AttributeError:
        if connection.is_closed():
            raise asyncpg.InterfaceError("connection is closed") from None
        raise


async def _roll_back(connection: Any, block: Any) -> None:
    try:
        await block.rollback()
    except Exception:  # what it was rolled back for is told
        connection.terminate()
    except BaseException:
        connection.terminate()
        raise


async def open_pool(
    settings: PostgresSettings, *, role: str, application: str, size_max: int | None = None, **overrides: str
) -> "asyncpg.Pool[asyncpg.Record]":
    """A pool of sessions as `role`, after one has been checked; `overrides` replace session settings.

    Raises `UnavailableError`, `ConfigurationError`.
    """
    dsn = _required(settings)
    try:
        pool = await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=size_max or settings.database_pool_size_max,
            timeout=settings.database_connect_timeout_ms / 1000,
            server_settings=session_settings(settings, role, application) | overrides,
            init=_bound_silence,
        )
    except _REFUSED as error:
        raise _refused(error, VARIABLE) from error
    except (*UNAVAILABLE, ssl.SSLError) as error:
        raise _away(error, VARIABLE, dsn) from error
    try:
        async with pool.acquire() as connection:
            await check_role(connection)
    except BaseException:
        await pool.close()
        raise
    return pool


async def check_role(connection: Any, variable: str = VARIABLE) -> None:
    """Raises `ConfigurationError` for a session that could look past row-level security."""
    row = await connection.fetchrow(
        "SELECT rolname, rolsuper OR rolbypassrls AS excessive FROM pg_roles"
        " WHERE rolname IN (session_user, current_user) ORDER BY excessive DESC LIMIT 1"
    )
    if row is None or row["excessive"]:
        name = "?" if row is None else row["rolname"]
        raise ConfigurationError(
            f"{variable}: role {name} is superuser or bypasses row-level security; "
            f"use the login `{_LOGINS[variable]}` that deploy/sql/bootstrap.sql makes"
        )


def _required(settings: PostgresSettings) -> str:
    if not settings.database_url:
        raise MissingSettingError('SLUICE_DATABASE_URL is not set: `eval "$(deploy/local/services start)"` sets it')
    return settings.database_url


def _refused(error: Exception, variable: str) -> ConfigurationError:
    return ConfigurationError(f"{variable} is refused by the database: {error}")


def _away(error: Exception, variable: str, dsn: str) -> Exception:
    """What to raise for a database that is not reached: for TLS the setting is named, as it may be at fault."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return UnavailableError(
            f"{variable}: the database's certificate is not trusted: {error.verify_message} "
            "(sslrootcert= names the authority that signed it; with sslmode=verify-full it has to name the host)"
        )
    unreadable = _unreadable(dsn)
    if unreadable is not None:
        return ConfigurationError(f"{variable}: {unreadable}")
    if isinstance(error, ssl.SSLError):
        return UnavailableError(f"{variable}: no TLS with the database: {error}")
    return UnavailableError(f"the database cannot be reached: {str(error) or type(error).__name__}")


def _unreadable(dsn: str) -> str | None:
    """The first file that a URL names for TLS and that cannot be used; the library does not say which."""
    for name, file in parse_qsl(urlsplit(dsn).query):
        if name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
            try:
                content = Path(file).read_bytes()
            except OSError as error:
                return f"{name}={file} cannot be read: {error.strerror or error}"
            if b"-----BEGIN " not in content:
                return f"{name}={file} holds nothing in PEM"
    return None


class Probe:
    """Whether the database answers, as a health check that costs one small query a second."""

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool
        self._reason: str | None = None

    def check(self) -> str | None:
        return self._reason

    async def run(self) -> None:
        """Ask for ever; its owner cancels it."""
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            try:
                async with self._pool.acquire(timeout=_PROBE_SESSION_S) as connection:
                    with cut_after(connection, PROBE_TIMEOUT_S):
                        await connection.fetchval("SELECT 1")
                self._reason = None
            except UNAVAILABLE as error:
                self._reason = f"the database is away: {str(error) or type(error).__name__}"
