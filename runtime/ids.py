"""UUIDv7 (RFC 9562, section 5.7): ids that sort by the time they were made, which keeps their indexes compact."""

import os
import time
from uuid import UUID


def uuid7() -> UUID:
    """A new UUIDv7: 48 bits of Unix milliseconds, version, variant and 74 random bits."""
    random_bits = int.from_bytes(os.urandom(10), "big")
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & 0xFFFF_FFFF_FFFF) << 80 | 0x7 << 76 | (random_bits >> 68 & 0xFFF) << 64
    return UUID(int=value | 0b10 << 62 | random_bits & 0x3FFF_FFFF_FFFF_FFFF)
