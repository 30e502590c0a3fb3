"""Names of logs and where a device's records stand in them. Changing either needs a new generation of the log."""

from typing import Final
from uuid import UUID
from zlib import crc32

PARTITIONS_DEFAULT: Final = 8


def log_name(generation: UUID) -> str:
    """The Kafka topic, and the stem of the SQLite file, of one generation of the log."""
    return f"sluice.readings.{generation}"


def partition_of(device: bytes, partitions: int) -> int:
    """The partition of a device (its 16 bytes): one for all its records, whatever way they come.

    CRC-32 is fixed for ever and needs no dependency; UUIDv7 ids differ enough in their low bits to spread.
    """
    return crc32(device) % partitions
