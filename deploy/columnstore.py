"""Readings kept as columns once they are older than a setting says: only where TimescaleDB's licence allows it.

Left out: everything that works without it, which is everything else.
"""

import logging
from typing import Any, Final

from runtime.errors import ConfigurationError
from runtime.postgres import transaction
from workers.retention.settings import RetentionSettings

_log = logging.getLogger("sluice.columnstore")

# A server may have loaded the library for the sake of another database.
_LICENCE: Final = """
SELECT current_setting('timescaledb.license', true) FROM pg_extension WHERE extname = 'timescaledb'"""
STANDING: Final = """
SELECT h.compression_enabled AS is_enabled, j.config IS NOT NULL AS has_policy,
       coalesce((j.config->>'compress_after')::interval = make_interval(days => $1), false) AS is_same
FROM timescaledb_information.hypertables h
LEFT JOIN timescaledb_information.jobs j
    ON (j.hypertable_schema, j.hypertable_name, j.proc_name)
     = (h.hypertable_schema, h.hypertable_name, 'policy_compression')
WHERE h.hypertable_schema = 'public' AND h.hypertable_name = 'readings'"""
# By the names before 2.18, which later versions know as well.
ENABLE: Final = """
ALTER TABLE readings SET (timescaledb.compress, timescaledb.compress_segmentby = 'series_id',
                          timescaledb.compress_orderby = 'ts')"""
REMOVE: Final = "SELECT remove_compression_policy('readings', if_exists => true)"
ADD: Final = "SELECT add_compression_policy('readings', compress_after => make_interval(days => $1))"


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
    days = settings.columnstore_after_days
    standing = await connection.fetchrow(STANDING, days)
    if standing["is_same"] if days else not standing["has_policy"]:
        return
    async with transaction(connection):
        await connection.fetchval(REMOVE)
        if days and not standing["is_enabled"]:
            await connection.execute(ENABLE)  # keeps everybody from the table for a moment
        if days:
            await connection.fetchval(ADD, days)
    if days:
        _log.warning("readings become columns in time: `sluice verify` cannot read those", extra={"after_days": days})
