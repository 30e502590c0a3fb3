"""Messages that came over MQTT, known again when their broker sends them once more: each lands once.

A message without a time of its own is stamped at each arrival, so that its times do not tell. What is remembered, of
a session and a partition, are deliveries that the broker may still repeat: bridges say with each record from which
number on that is (`Delivery.floor`). Left out: what a repeat counts as (`plan`).
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from uuid import UUID

from schemas.record import FENCE_SHIFT, Delivery

_ENTRY: Final = struct.Struct(">HQ8s")

_REMEMBER: Final = """
INSERT INTO mqtt_deliveries (source, partition, session, last, packed)
SELECT $1, * FROM unnest($2::int[], $3::uuid[], $4::bigint[], $5::bytea[])
ON CONFLICT (source, partition, session, last) DO UPDATE SET packed = EXCLUDED.packed, landed_at = now()"""

# The newest of a session stays, whatever is still repeated: it tells which bridge had the session last.
_FORGET: Final = """
DELETE FROM mqtt_deliveries d
USING unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[]) AS n (partition, session, floor, newest)
WHERE d.source = $1 AND d.partition = n.partition AND d.session = n.session
  AND d.last < n.floor AND d.last < n.newest"""

_STANDING: Final = """
SELECT partition, session, last, packed FROM mqtt_deliveries
WHERE source = $1 AND partition = ANY ($2::int[]) ORDER BY partition, session, last"""


class Seen(NamedTuple):
    """A delivery that landed, of some packet identifier."""

    sequence: int
    digest: bytes


class Stretch:
    """The deliveries of one session in one partition that landed together, by packet identifier."""

    __slots__ = ("floor", "last", "seen")

    def __init__(self) -> None:
        self.last = -1
        self.floor = 0
        self.seen: dict[int, Seen] = {}

    def add(self, delivery: Delivery) -> None:
        self.seen[delivery.packet] = Seen(delivery.sequence, delivery.digest)
        self.last = max(self.last, delivery.sequence)
        self.floor = max(self.floor, delivery.floor)

    def packed(self) -> bytes:
        return b"".join([_ENTRY.pack(packet, *seen) for packet, seen in self.seen.items()])


def unpack(last: int, packed: bytes) -> Stretch:
    found = Stretch()
    found.last = last
    found.seen = {packet: Seen(sequence, digest) for packet, sequence, digest in _ENTRY.iter_unpack(packed)}
    return found


#: By session, the oldest first.
Stretches = dict[bytes, list[Stretch]]


class Deliveries:
    """What is known of them in one partition: what has landed, what the transaction under way brings, this plan's."""

    __slots__ = ("_before", "_standing", "new")

    def __init__(self, standing: Mapping[bytes, list[Stretch]], before: "Deliveries | None" = None) -> None:
        self._standing = standing
        self._before = before
        self.new: dict[bytes, Stretch] = {}

    def settled(self) -> None:
        """What was under way is committed, and stands."""
        self._before = None

    def _newest_first(self, session: bytes) -> Iterable[Stretch]:
        for layer in (self, self._before):
            if layer is not None and session in layer.new:
                yield layer.new[session]
        yield from reversed(self._standing.get(session, ()))

    def is_repeat(self, delivery: Delivery, *, has_landed: bool = False) -> bool:
        """Whether its message landed already, or will land from a later delivery.

        A delivery to a bridge from which the session had been taken stands behind one to its successor: the broker
        did not get its acknowledgement, so it repeats the message to the successor. `has_landed`: its record has, and
        all that stands behind it, so that its place says nothing.
        """
        newest = next(iter(self._newest_first(delivery.session)), None)
        if newest is None:
            return False
        if not has_landed and delivery.sequence >> FENCE_SHIFT < newest.last >> FENCE_SHIFT:
            return True
        if not delivery.again:
            return False
        for stretch in self._newest_first(delivery.session):
            seen = stretch.seen.get(delivery.packet)
            if seen is not None:
                return seen.digest == delivery.digest and seen.sequence >= delivery.floor
        return False

    def remember(self, delivery: Delivery) -> None:
        """Unless it came to a bridge that had lost the session."""
        newest = next(iter(self._newest_first(delivery.session)), None)
        if newest is None or delivery.sequence >> FENCE_SHIFT >= newest.last >> FENCE_SHIFT:
            self.new.setdefault(delivery.session, Stretch()).add(delivery)

    def apply(self, standing: Stretches) -> None:
        """The plan is committed: `standing` is what it began with."""
        for session, stretch in self.new.items():
            stretches = [one for one in standing.get(session, ()) if one.last >= stretch.floor]
            standing[session] = [*stretches, stretch]


async def write(connection: Any, source: UUID, parts: Iterable[tuple[int, Deliveries]]) -> None:
    """Within the landing's transaction."""
    rows = [
        (partition, UUID(bytes=session), stretch)
        for partition, deliveries in parts
        for session, stretch in deliveries.new.items()
    ]
    if not rows:
        return
    partitions, sessions, stretches = (list(column) for column in zip(*rows, strict=True))
    last = [stretch.last for stretch in stretches]
    await connection.execute(
        _REMEMBER, source, partitions, sessions, last, [stretch.packed() for stretch in stretches]
    )
    await connection.execute(_FORGET, source, partitions, sessions, [one.floor for one in stretches], last)


async def standing(connection: Any, source: UUID, partitions: list[int]) -> dict[int, Stretches]:
    """What has landed in these partitions."""
    found: dict[int, Stretches] = {}
    for row in await connection.fetch(_STANDING, source, partitions):
        by_session = found.setdefault(row["partition"], {})
        by_session.setdefault(row["session"].bytes, []).append(unpack(row["last"], row["packed"]))
    return found
