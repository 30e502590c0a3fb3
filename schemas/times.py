"""Times as devices send them: RFC 3339, or an epoch in s, ms, µs or ns told apart by its magnitude.

Left out: whether a time is plausible, which depends on when it was received (`ingest.admit`).
"""

import re
from datetime import UTC, datetime
from typing import Final

#: Below these magnitudes an epoch is taken for seconds, ms, µs; above the last for ns. 1e11 s is the year 5138,
#: 1e11 ms is 1973: no plausible time of one unit is also one of another.
_SECONDS_BELOW: Final = 100_000_000_000
_MILLISECONDS_BELOW: Final = 100_000_000_000_000
_MICROSECONDS_BELOW: Final = 100_000_000_000_000_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
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
            return _parse_other_text(raw)
        return _parse_zoneless(raw) if moment.tzinfo is None else _since_epoch(moment)
    if type(raw) is int or type(raw) is float:
        return _from_epoch(raw)
    raise ValueError("a time is RFC 3339 text or an epoch number")


def _parse_zoneless(text: str) -> int | None:
    # Python reads some bare numbers as local times (20260517, 1612011212345.6), but devices mean an epoch by them.
    try:
        return _parse_epoch_text(text)
    except ValueError:
        return None


def _parse_other_text(text: str) -> int:
    """An epoch, or what RFC 3339 allows and Python does not: a small z, a leap second (the next second's first)."""
    try:
        return _parse_epoch_text(text)
    except ValueError:
        found = _RARE.fullmatch(text)
        if found is None:
            raise
    minute, second, fraction, zone = found.groups()
    leap = second == "60" and minute.endswith("59:")
    moment = datetime.fromisoformat(f"{minute}{'59' if leap else second}{fraction or ''}{zone.upper()}")
    return _since_epoch(moment) + leap * 1_000_000


def _since_epoch(moment: datetime) -> int:
    """Exact, and two thirds of what `timestamp` takes."""
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


_RARE: Final = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:)(\d\d)(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _parse_epoch_text(text: str) -> int:
    if len(text) > 32 or "_" in text or not text.isascii():  # Python reads 1_0 as 10; nobody else does
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
