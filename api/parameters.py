"""Query parameters, checked. Left out: whether a device exists."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final
from uuid import UUID

from multidict import MultiMapping

from api.errors import invalid_parameter
from api.quarantine import Filter

NAME_CHARACTERS_MAX: Final = 256
CURSOR_CHARACTERS_MAX: Final = 512
_ATTEMPTS_MAX: Final = 1_000_000

_RFC_3339: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:([Zz])|([+\- ])(\d\d:\d\d))", re.ASCII
)
_EPOCH_SECONDS: Final = re.compile(r"-?\d{1,12}(\.\d{1,9})?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class SeriesFilter:
    """Which series of a device: None stands for every metric or label."""

    device_id: UUID
    metric: str | None
    label: str | None


@dataclass(frozen=True)
class Span:
    """`[start, end)` in time, and the direction and number of what is read from it."""

    start: datetime | None
    end: datetime | None
    descending: bool
    limit: int
    cursor: str | None


def series_filter(query: Mapping[str, str]) -> SeriesFilter:
    return SeriesFilter(_uuid("device_id", query.get("device_id")), _name(query, "metric"), _name(query, "label"))


def span(query: Mapping[str, str], *, limit_default: int, limit_max: int) -> Span:
    start, end = _time(query, "from"), _time(query, "to")
    if start is not None and end is not None and start > end:
        raise invalid_parameter("from", "lies after `to`")
    order = query.get("order", "asc")
    if order not in ("asc", "desc"):
        raise invalid_parameter("order", "is asc (oldest first) or desc")
    return Span(start, end, order == "desc", limit_of(query, limit_default, limit_max), cursor_of(query))


def quarantine_filter(query: Mapping[str, str]) -> Filter:
    start, end = _time(query, "from"), _time(query, "to")
    if start is not None and end is not None and start > end:
        raise invalid_parameter("from", "lies after `to`")
    device = query.get("device_id")
    device_id = None if device is None else _uuid("device_id", device)
    attempts_max = _number(query, "attempts_max", _ATTEMPTS_MAX) if "attempts_max" in query else None
    return Filter(_name(query, "code"), device_id, _name(query, "request_id"), start, end, attempts_max)


def one_of(query: Mapping[str, str], name: str, choices: Sequence[str]) -> str | None:
    text = query.get(name)
    if text is not None and text not in choices:
        raise invalid_parameter(name, f"is one of {', '.join(choices)}")
    return text


def cursor_of(query: Mapping[str, str]) -> str | None:
    cursor = query.get("cursor")
    if cursor is not None and len(cursor) > CURSOR_CHARACTERS_MAX:
        raise invalid_parameter("cursor", "was not given out by this service")
    return cursor


def known_once(query: MultiMapping[str], known: frozenset[str]) -> dict[str, str]:
    """The parameters, each of which is known and stands there once: a misspelt filter must not widen an answer."""
    found: dict[str, str] = {}
    for name, value in query.items():
        if name not in known:
            raise invalid_parameter(name[:NAME_CHARACTERS_MAX], f"is no parameter here: {', '.join(sorted(known))}")
        if name in found:
            raise invalid_parameter(name, "stands there twice")
        found[name] = value
    return found


def _uuid(name: str, text: str | None) -> UUID:
    if not text:
        raise invalid_parameter(name, "is needed")
    try:
        return UUID(text)
    except ValueError:
        raise invalid_parameter(name, "is not a UUID") from None


def _name(query: Mapping[str, str], name: str) -> str | None:
    text = query.get(name)
    if text is not None and (len(text) > NAME_CHARACTERS_MAX or "\0" in text or not _encodable(text)):
        raise invalid_parameter(name, f"is not a text of at most {NAME_CHARACTERS_MAX} characters")
    return text


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def limit_of(query: Mapping[str, str], default: int, most: int) -> int:
    return _number(query, "limit", most) if "limit" in query else min(default, most)


def _number(query: Mapping[str, str], name: str, most: int) -> int:
    text = query[name]
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= most:
        raise invalid_parameter(name, f"is a number from 1 to {most}")
    return int(text)


def _time(query: Mapping[str, str], name: str) -> datetime | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        return parse_time(text)
    except (ValueError, OverflowError):
        raise invalid_parameter(name, "is neither RFC 3339 with an offset nor seconds since 1970") from None


def parse_time(text: str) -> datetime:
    """RFC 3339 or seconds since 1970, to the microsecond, later digits cut off. Raises `ValueError`."""
    if _EPOCH_SECONDS.fullmatch(text):
        return _EPOCH + timedelta(microseconds=int(Decimal(text).scaleb(6)))
    match = _RFC_3339.fullmatch(text)
    if match is None:
        raise ValueError(text)
    day, clock, fraction, zulu, sign, offset = match.groups()
    # A plus sign that was not escaped in the URL arrives as a space.
    zone = "+00:00" if zulu else ("+" if sign == " " else sign) + offset
    fraction = (fraction or "").ljust(6, "0")[:6]
    return datetime.fromisoformat(f"{day}T{clock}.{fraction}{zone}").astimezone(UTC)
