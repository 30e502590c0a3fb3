"""Microseconds since 2000 for people, as findings have them."""

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)


def as_text(time: int) -> str:
    """RFC 3339; a number where no calendar has it."""
    try:
        return (_EPOCH + timedelta(microseconds=time)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return f"{time} microseconds since 2000"


def from_datetime(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)
