"""Tombstones: times of a device whose readings are never stored again, because they belong to a site that is erased.

Beside them the times before which an organisation's readings are gone. Both only ever become more. What is known of
them goes with the epoch they were read at: a plan is written only if no other has come since. Left out: who writes
them, and what goes with them (`workers.erasure`, `workers.retention`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from uuid import UUID

#: All that were written since, with the epoch of the same moment.
READ: Final = """
SELECT e.epoch, t.device_id, NULL::uuid AS organisation_id, t.from_ts, t.to_ts
FROM tombstone_epoch e LEFT JOIN tombstones t ON t.epoch > $1
UNION ALL
SELECT e.epoch, NULL, h.organisation_id, '-infinity', h.refused_through
FROM tombstone_epoch e JOIN retention_horizons h ON h.tier = 'raw' AND h.epoch > $1"""


class Span(NamedTuple):
    """`[first, end)`, in microseconds since 2000; the least and the largest int64 stand for no bound."""

    first: int
    end: int


Spans = tuple[Span, ...]
"""In order, without a gap of nothing between two."""

_NO_SPANS: Final[Mapping[bytes, Spans]] = {}
_NO_HORIZONS: Final[Mapping[bytes, int]] = {}


class Tombstones:
    """As they were at an epoch. `spans` and `horizons` are never changed, but replaced."""

    __slots__ = ("epoch", "horizons", "spans")

    def __init__(self, epoch: int = 0, spans: Mapping[bytes, Spans] = _NO_SPANS) -> None:
        self.epoch = epoch
        self.spans = spans
        """By device."""
        self.horizons = _NO_HORIZONS
        """By organisation: no reading of an earlier time is stored."""

    async def refresh(self, connection: Any) -> None:
        """Read what has come since. Times go out as integers there. Raises what the database raises."""
        self.take(await connection.fetch(READ, self.epoch))

    def take(self, rows: Iterable[tuple[int, UUID | None, UUID | None, int, int]]) -> None:
        """Rows of `READ`."""
        spans, horizons = dict(self.spans), dict(self.horizons)
        for epoch, device, organisation, first, end in rows:
            if device is not None:
                spans[device.bytes] = _joined([*spans.get(device.bytes, ()), Span(first, end)])
            elif organisation is not None:
                horizons[organisation.bytes] = end
            self.epoch = epoch
        self.spans, self.horizons = spans, horizons


NONE: Final = Tombstones()


def within(spans: Spans, time: int) -> bool:
    return any(first <= time < end for first, end in spans)


def _joined(spans: Iterable[Span]) -> Spans:
    found: list[Span] = []
    for first, end in sorted(spans):
        if found and first <= found[-1].end:
            found[-1] = Span(found[-1].first, max(found[-1].end, end))
        else:
            found.append(Span(first, end))
    return tuple(found)
