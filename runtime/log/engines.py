"""Picks the engine that a log URL names: creates the log of a new generation, opens the one the database knows.

Left out: the engines.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

from runtime.errors import ConfigurationError
from runtime.log.address import directory_of, engine_of
from runtime.log.kafka_address import parse_address
from runtime.log.kafka_cluster import LoginRefusedError
from runtime.log.kafka_log import create_kafka_log, open_kafka_log
from runtime.log.keeping import Kept
from runtime.log.port import NEW_GENERATION, Expected, Log, LogMisfitError
from runtime.log.settings import LogSettings
from runtime.log.sqlite_log import SqliteLog
from runtime.log.sqlite_store import DamagedError, Store, create_store

SUFFIX: Final = ".db"


async def create_log(settings: LogSettings, *, source: UUID, name: str, partitions: int) -> str:
    """Make the log of a new generation; its identity, by which `open_log` knows it again.

    Raises `ConfigurationError` for a URL or a log that is refused, `LogMisfitError` when there is one of that name
    already, and `UnavailableError`.
    """
    if engine_of(settings.log_url) == "kafka":
        with _login_refused():
            return await create_kafka_log(settings, parse_address(settings.log_url), name, partitions)
    path = _path(settings.log_url, name)
    try:
        origin = await asyncio.to_thread(create_store, path, source, partitions)
    except FileExistsError as error:
        raise LogMisfitError(
            f"a file {path} exists already: move it away if nothing needs it, or {NEW_GENERATION}"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"SLUICE_LOG_URL: {path} cannot be made: {error}") from error
    return str(origin.identity)


async def open_log(settings: LogSettings, expected: Expected, *, client_id: str) -> Log:
    """Open the log that the database knows.

    Raises `ConfigurationError` for a bad URL, `LogMisfitError` for any other log than the expected, or none, and
    `UnavailableError` when it cannot be reached.
    """
    if engine_of(settings.log_url) == "kafka":
        with _login_refused():
            return await open_kafka_log(settings, parse_address(settings.log_url), expected, client_id)
    path = _path(settings.log_url, expected.name)
    try:
        store = Store(path, UUID(expected.identity))
    except ValueError as error:
        raise LogMisfitError(f"{expected.identity} is no identity of a SQLite log: {NEW_GENERATION}") from error
    await asyncio.to_thread(_verify, store, expected)
    kept = Kept(settings.log_keep_landed_h * 3600, settings.log_keep_landed_bytes_max)
    return SqliteLog(settings, store, expected.source, expected.partitions, kept)


@contextmanager
def _login_refused() -> Iterator[None]:
    """At the start a login that is refused is a setting to be mended; later it may be on its way to being changed."""
    try:
        yield
    except LoginRefusedError as error:
        raise ConfigurationError(str(error)) from error


def _path(url: str, name: str) -> Path:
    """Of the generation `name`, a file of its own in the directory that the URL names."""
    try:
        return directory_of(url) / f"{name}{SUFFIX}"
    except ValueError as error:
        raise ConfigurationError(f"SLUICE_LOG_URL {error}") from error


def _verify(store: Store, expected: Expected) -> None:
    try:
        found = store.open()
    except DamagedError as error:
        raise DamagedError(f"{error}: bring it back from a copy, or {NEW_GENERATION}") from error
    finally:
        store.close()  # the thread that will use it opens it again
    if (found.source, found.partitions) != (expected.source, expected.partitions):
        raise LogMisfitError(
            f"{store.path} is of generation {found.source} with {found.partitions} partitions, "
            f"the database knows {expected.source} with {expected.partitions}: "
            f"bring that one back, or {NEW_GENERATION}"
        )
