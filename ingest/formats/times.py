"""Times as devices send them: RFC 3339, or an epoch in s, ms, µs or ns told apart by its magnitude.

Left out: whether a time is plausible, which depends on when it was received (`ingest.admit`).
"""

from datetime import datetime
from typing import Final

#: Below these magnitudes an epoch is taken for seconds, ms, µs; above the last for ns. 1e11 s is the year 5138,
#: 1e11 ms is 1973: no plausible time of one unit is also one of another.
_SECONDS_BELOW: Final = 100_000_000_000
_MILLISECONDS_BELOW: Final = 100_000_000_000_000
_MICROSECONDS_BELOW: Final = 100_000_000_000_000_000

#: Epochs beyond this many of any unit are no times at all.
_MAGNITUDE_MAX: Final = 10**20


def parse_time(raw: object) -> int | None:
    """Microseconds since 1970-01-01 UTC; None for a local time, which says nothing without its zone.

    Takes RFC 3339 text, an epoch as number or numeric text. Raises `ValueError` for anything else.
    """
    if type(raw) is str:
        try:
            moment = datetime.fromisoformat(raw)
        except ValueError:
            return _parse_epoch_text(raw)
        if moment.tzinfo is None:
            # Python reads eight digits as a date (20260517), but devices mean an epoch by a bare number.
            return _parse_epoch_text(raw) if raw.isdecimal() else None
        return round(moment.timestamp() * 1e6)
    if type(raw) is int or type(raw) is float:
        return _from_epoch(raw)
    raise ValueError("a time is RFC 3339 text or an epoch number")


def _parse_epoch_text(text: str) -> int:
    if len(text) > 32 or "_" in text:  # Python reads 1_0 as 10; nobody else does
        raise ValueError("a time is RFC 3339 text or an epoch number")
    try:
        return _from_epoch(int(text) if text.isdecimal() else float(text))
    except ValueError:
        raise ValueError("a time is RFC 3339 text or an epoch number") from None


def _from_epoch(epoch: float) -> int:
    size = abs(epoch)
    if not size < _MAGNITUDE_MAX:  # also NaN
        raise ValueError("an epoch beyond any time")
    if size < _SECONDS_BELOW:
        return round(epoch * 1_000_000)
    if size < _MILLISECONDS_BELOW:
        return round(epoch * 1000)
    if size < _MICROSECONDS_BELOW:
        return round(epoch)
    return round(epoch) // 1000
