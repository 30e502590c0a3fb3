"""Readings as JSON, the form in rows."""

import re
from collections.abc import Sequence
from typing import Any, Final

import orjson

from api.readings.series import Found, Series
from schemas.record import Quality

_FLAGS: Final = list(Quality)
_JSON_INTEGER: Final = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)


def render(rows: Sequence[Any], found: Found, next_cursor: str | None) -> bytes:
    """The answer's body."""
    data = [reading_of(row, found.series[row["series_id"]]) for row in rows]
    content: dict[str, Any] = {"data": data, "next_cursor": next_cursor}
    if found.removed_at is not None:
        content["removed_at"] = found.removed_at
    return orjson.dumps(content, option=orjson.OPT_UTC_Z)


def reading_of(row: Any, series: Series) -> dict[str, Any]:
    quality = row["quality"]
    return {
        "device_id": series.device_id,
        "metric": series.metric,
        "label": series.label,
        "unit": series.unit,
        "ts": row["ts"],
        "value": _value(row, quality),
        "flags": [flag.name.lower() for flag in _FLAGS if quality & flag and flag.name] if quality else [],
    }


def _value(row: Any, quality: int) -> object:
    text = row["text_value"]
    if text is None:
        value = row["value"]
        return value != 0 if quality & Quality.BOOLEAN else value
    if quality & Quality.INTEGER and _JSON_INTEGER.fullmatch(text):
        return orjson.Fragment(text)  # of any length: no number type here holds all of its digits
    return text
