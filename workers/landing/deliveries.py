"""Messages that came over MQTT, known again when their broker sends them once more: each lands once.

A message without a time of its own is stamped at each arrival, so that its times do not tell. What is remembered, of
a session and a partition, is what its latest connections delivered. A connection begins with what the broker repeats,
in the order in which it was first sent, and the bridge saw to it that the newest of each partition is among that. So
only what was delivered up to that one can be a repeat: packet identifiers and contents come back, and no later
message may be taken for an earlier one. Records need not come in the order of deliveries: some had to wait. Left out:
what a repeat counts as (`plan`).
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import UUID

from schemas.record import FENCE_SHIFT, Delivery

#: Packet identifiers come back after 65,535 deliveries at the earliest: what is as old as this is not looked at.
REACH: Final = 60_000
NEVER: Final = 2**63 - 1
_ENTRY: Final = struct.Struct(">HQ8s")

_REMEMBER: Final = """
INSERT INTO mqtt_deliveries (source, partition, session, last, began, floor, repeats_end, packed)
SELECT $1, *
FROM unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bytea[])
ON CONFLICT DO NOTHING"""

# The newest of a session stays, whatever is still repeated: it tells which bridge had the session last.
_FORGET: Final = """
DELETE FROM mqtt_deliveries d
USING unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[]) AS n (partition, session, newest, floor)
WHERE d.source = $1 AND d.partition = n.partition AND d.session = n.session
  AND d.last < n.floor AND d.last < n.newest"""

_STANDING: Final = """
SELECT partition, session, last, began, floor, repeats_end, packed FROM mqtt_deliveries
WHERE source = $1 AND partition = ANY ($2::int[]) ORDER BY partition, session, began, landing"""


class Seen(NamedTuple):
    """A delivery that landed, of some packet identifier."""

    number: int
    digest: bytes


class Stretch:
    """Deliveries of one connection in one partition that landed together, by packet identifier."""

    __slots__ = ("began", "floor", "last", "repeats_end", "seen")

    def __init__(self, began: int, last: int = -1, floor: int = 0, repeats_end: int = NEVER) -> None:
        self.began = began
        self.last = last
        self.floor = floor
        """Nothing of a lower number is repeated; not 0 once all that the connection had to repeat is over."""
        self.repeats_end = repeats_end
        """From this number on the connection delivers no repeats; `NEVER` while that is not known."""
        self.seen: dict[int, Seen] = {}

    def add(self, delivery: Delivery) -> None:
        self.seen[delivery.packet] = Seen(delivery.number, delivery.digest)
        self.last = max(self.last, delivery.number)
        self.floor = max(self.floor, delivery.floor)

    def packed(self) -> bytes:
        return b"".join([_ENTRY.pack(packet, *seen) for packet, seen in self.seen.items()])


#: By session, the oldest first.
Stretches = dict[bytes, list[Stretch]]


class _Repeats(NamedTuple):
    """What a connection may repeat."""

    seen: Mapping[int, Seen]
    last: int
    """The number of the newest: nothing behind its repeat is one."""


class Deliveries:
    """What is known of them in one partition: what has landed, what the transaction under way brings, this plan's."""

    __slots__ = ("_before", "_repeats", "_standing", "new")

    def __init__(self, standing: Mapping[bytes, list[Stretch]], before: "Deliveries | None" = None) -> None:
        self._standing = standing
        self._before = before
        self._repeats: dict[tuple[bytes, int], _Repeats] = {}
        self.new: Stretches = {}

    def settled(self) -> None:
        """What was under way is committed, and stands."""
        self._before = None

    def take(self, delivery: Delivery, *, has_landed: bool = False) -> bool:
        """Whether its message landed already, or will land from a later delivery; it is remembered.

        A delivery to a bridge from which the session had been taken stands behind one to its successor: the broker
        did not get its acknowledgement, so it repeats the message to the successor. `has_landed`: the record has, and
        all that stands behind it, so that neither its place nor what is remembered tells more than that it is known.
        """
        newest = next(self._newest_first(delivery.session), None)
        if has_landed:
            return delivery.again and any(
                stretch.seen.get(delivery.packet) == (delivery.number, delivery.digest)
                for stretch in self._newest_first(delivery.session)
            )
        if newest is not None and delivery.began < newest.began:
            return delivery.number >> FENCE_SHIFT < newest.last >> FENCE_SHIFT
        stretch = self._stretch(delivery, newest)
        is_repeat = False
        if not delivery.again:
            stretch.repeats_end = min(stretch.repeats_end, delivery.number)
        elif delivery.number < stretch.repeats_end:
            is_repeat = self._is_repeated(delivery, stretch)
        stretch.add(delivery)
        return is_repeat

    def _is_repeated(self, delivery: Delivery, stretch: Stretch) -> bool:
        repeats = self._repeats_of(delivery)
        seen = repeats.seen.get(delivery.packet)
        if seen is None or seen.digest != delivery.digest:
            return False
        if seen.number < delivery.floor or seen.number <= repeats.last - REACH:
            return False
        if seen.number == repeats.last:
            stretch.repeats_end = min(stretch.repeats_end, delivery.number + 1)
        return True

    def _newest_first(self, session: bytes) -> Iterator[Stretch]:
        for layer in (self, self._before):
            if layer is not None and session in layer.new:
                yield from reversed(layer.new[session])
        yield from reversed(self._standing.get(session, ()))

    def _stretch(self, delivery: Delivery, newest: Stretch | None) -> Stretch:
        """The one that grows: of this plan, and of the delivery's connection."""
        ours = self.new.setdefault(delivery.session, [])
        if ours and ours[-1].began == delivery.began:
            return ours[-1]
        stretch = Stretch(delivery.began)
        if newest is not None and newest.began == delivery.began:
            stretch.repeats_end = newest.repeats_end
        ours.append(stretch)
        return stretch

    def _repeats_of(self, delivery: Delivery) -> _Repeats:
        """What earlier connections delivered, back to one whose own repeats were over; each message as it came last."""
        key = delivery.session, delivery.began
        if key in self._repeats:
            return self._repeats[key]
        seen: dict[int, Seen] = {}
        last, is_last_known = -1, False
        earlier = (one for one in self._newest_first(delivery.session) if one.began != delivery.began)
        for _, connection in groupby(earlier, lambda one: one.began):
            stretches = list(connection)
            for stretch in stretches:
                for packet, one in stretch.seen.items():
                    seen.setdefault(packet, one)
            if not is_last_known:
                # A connection that delivered nothing but repeats has none that is newer than all before it.
                last = max(stretch.last for stretch in stretches)
                is_last_known = stretches[0].repeats_end != NEVER
            if any(stretch.floor for stretch in stretches):
                break
        found = self._repeats[key] = _Repeats(seen, last)
        return found

    def apply(self, standing: Stretches) -> None:
        """The plan is committed: `standing` is what it began with."""
        for session, stretches in self.new.items():
            floor = _floor(stretches)
            kept = [one for one in standing.get(session, ()) if one.last >= floor]
            standing[session] = [*kept, *stretches]


def _floor(stretches: list[Stretch]) -> int:
    """What is older than this is never looked at again."""
    newest = stretches[-1]
    return max(newest.floor, newest.last - 2 * REACH)


async def write(connection: Any, source: UUID, parts: Iterable[tuple[int, Deliveries]]) -> None:
    """Within the landing's transaction."""
    rows = [
        (partition, UUID(bytes=session), one.last, one.began, one.floor, one.repeats_end, one.packed())
        for partition, deliveries in parts
        for session, stretches in deliveries.new.items()
        for one in stretches
    ]
    if not rows:
        return
    await connection.execute(_REMEMBER, source, *map(list, zip(*rows, strict=True)))
    forgotten = [
        (partition, UUID(bytes=session), stretches[-1].last, _floor(stretches))
        for partition, deliveries in parts
        for session, stretches in deliveries.new.items()
    ]
    await connection.execute(_FORGET, source, *map(list, zip(*forgotten, strict=True)))


async def standing(connection: Any, source: UUID, partitions: list[int]) -> dict[int, Stretches]:
    """What has landed in these partitions."""
    found: dict[int, Stretches] = {}
    for row in await connection.fetch(_STANDING, source, partitions):
        by_session = found.setdefault(row["partition"], {})
        stretch = Stretch(row["began"], row["last"], row["floor"], row["repeats_end"])
        entries = _ENTRY.iter_unpack(row["packed"])
        stretch.seen = {packet: Seen(number, digest) for packet, number, digest in entries}
        by_session.setdefault(row["session"].bytes, []).append(stretch)
    return found
