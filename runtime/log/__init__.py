"""The log: durable, ordered by partition, read from positions. One port, two engines."""

from runtime.log.address import Engine, check_log_url, engine_of
from runtime.log.engines import create_log, open_log
from runtime.log.late_log import LateLog
from runtime.log.port import (
    BehindRetentionError,
    Bounds,
    Expected,
    Log,
    LogMisfitError,
    Reader,
    Slice,
    check_positions,
)
from runtime.log.settings import LogSettings

__all__ = [
    "BehindRetentionError",
    "Bounds",
    "Engine",
    "Expected",
    "LateLog",
    "Log",
    "LogMisfitError",
    "LogSettings",
    "Reader",
    "Slice",
    "check_log_url",
    "check_positions",
    "create_log",
    "engine_of",
    "open_log",
]
