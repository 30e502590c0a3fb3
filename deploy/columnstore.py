"""Readings kept as columns once they are older than a setting says: only where TimescaleDB's licence allows it.

Left out: everything that works without it, which is everything else.
"""

from typing import Any, Final

from runtime.errors import ConfigurationError
from workers.retention.settings import RetentionSettings

_LICENCE: Final = "SELECT current_setting('timescaledb.license', true)"
_ENABLE: Final = """
ALTER TABLE readings SET (timescaledb.compress, timescaledb.compress_segmentby = 'series_id',
                          timescaledb.compress_orderby = 'ts')"""
_REMOVE: Final = "SELECT remove_compression_policy('readings', if_exists => true)"
_ADD: Final = "SELECT add_compression_policy('readings', compress_after => make_interval(days => $1))"


async def check_columnstore(connection: Any, settings: RetentionSettings) -> bool:
    """Whether the database may have a columnstore. Raises `ConfigurationError` where it is asked for and may not."""
    licence = await connection.fetchval(_LICENCE)
    days = settings.columnstore_after_days
    if days and licence != "timescale":
        found = "has no TimescaleDB" if licence is None else f"runs with timescaledb.license = '{licence}'"
        raise ConfigurationError(
            f"SLUICE_COLUMNSTORE_AFTER_DAYS={days} needs TimescaleDB under its own licence (timescaledb.license = "
            f"'timescale'), and this database {found}: set it to 0"
        )
    return bool(licence == "timescale")


async def set_columnstore(connection: Any, settings: RetentionSettings) -> None:
    """Make the policy what the setting says, as the tables' owner. Raises `ConfigurationError`."""
    if not await check_columnstore(connection, settings):
        return
    await connection.execute(_REMOVE)
    if settings.columnstore_after_days:
        await connection.execute(_ENABLE)
        await connection.fetchval(_ADD, settings.columnstore_after_days)
