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
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, NamedTuple
from uuid import UUID

from schemas.record import FENCE_SHIFT, Delivery

#: Packet identifiers come back after 65,535 deliveries at the earliest: what is as old as this is not looked at.
REACH: Final = 60_000
NEVER: Final = 2**63 - 1
_ENTRY: Final = struct.Struct(">HQQ8s")

_REMEMBER: Final = """
INSERT INTO mqtt_deliveries (source, partition, session, began, last, last_place, last_packet, floor, repeats_end,
    edge, shift, awaited, reached, packed)
SELECT $1, n.partition, n.session, n.began, n.last, n.last_place, n.last_packet, n.floor, n.repeats_end, n.edge,
       n.shift, string_to_array(n.awaited, ',')::bigint[], n.reached, n.packed
FROM unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[], $6::bigint[], $7::int[], $8::bigint[], $9::bigint[],
            $10::bigint[], $11::bigint[], $12::text[], $13::bigint[], $14::bytea[])
    AS n (partition, session, began, last, last_place, last_packet, floor, repeats_end, edge,
          shift, awaited, reached, packed)"""

# The newest of a session stays, whatever is still repeated: it tells which bridge had the session last.
_FORGET: Final = """
DELETE FROM mqtt_deliveries d
USING unnest($2::int[], $3::uuid[], $4::bigint[], $5::bigint[]) AS n (partition, session, newest, floor)
WHERE d.source = $1 AND d.partition = n.partition AND d.session = n.session
  AND d.last < n.floor AND d.last < n.newest"""

_STANDING: Final = """
SELECT * FROM mqtt_deliveries
WHERE source = $1 AND partition = ANY ($2::int[]) ORDER BY partition, session, landing"""


class Seen(NamedTuple):
    """A delivery that landed, of some packet identifier."""

    number: int
    place: int
    """In the order in which the broker first sent its messages; a repeat has its first delivery's."""
    digest: bytes


@dataclass(slots=True)
class Stretch:
    """Deliveries of one connection in one partition that landed together, by packet identifier."""

    began: int
    """The number that the connection began with."""
    last: int = -1
    """Of the newest."""
    last_place: int = 0
    last_packet: int = 0
    floor: int = 0
    """Nothing of a lower number is repeated; from `began` on, nothing of earlier connections is."""
    repeats_end: int = NEVER
    """From this number on the connection delivers no repeats; `NEVER` while that is not known."""
    edge: int = 0
    """The last place that was known when it began."""
    shift: int | None = None
    """What its numbers lack to a place, as far as it is known."""
    awaited: frozenset[int] | None = None
    """Numbers of earlier connections' deliveries that this one has to repeat still; None while it repeated none."""
    reached: int = 0
    """The highest number with which it repeated one of those."""
    seen: dict[int, Seen] = field(default_factory=dict)

    def add(self, delivery: Delivery, place: int) -> None:
        self.seen[delivery.packet] = Seen(delivery.number, place, delivery.digest)
        if delivery.number > self.last:
            self.last, self.last_place, self.last_packet = delivery.number, place, delivery.packet
        self.floor = max(self.floor, delivery.floor)

    def place(self, number: int) -> int:
        """Of one that is no repeat."""
        return self.edge if self.shift is None else number + self.shift

    def lead(self, shift: int) -> None:
        """One of this connection has this much between its number and its place: those behind it no less."""
        self.shift = shift if self.shift is None else max(self.shift, shift)

    def row(self) -> tuple[Any, ...]:
        awaited = None if self.awaited is None else ",".join(map(str, self.awaited))
        head = self.began, self.last, self.last_place, self.last_packet, self.floor, self.repeats_end
        packed = b"".join([_ENTRY.pack(packet, *seen) for packet, seen in self.seen.items()])
        return (*head, self.edge, self.shift, awaited, self.reached, packed)


def _stretch_of(row: Any) -> Stretch:
    stretch = Stretch(row["began"], row["last"], row["last_place"], row["last_packet"], row["floor"])
    stretch.repeats_end, stretch.reached = row["repeats_end"], row["reached"]
    stretch.edge, stretch.shift = row["edge"], row["shift"]
    stretch.awaited = None if row["awaited"] is None else frozenset(row["awaited"])
    stretch.seen = {packet: Seen(*seen) for packet, *seen in _ENTRY.iter_unpack(row["packed"])}
    return stretch


#: By session, the oldest first.
Stretches = dict[bytes, list[Stretch]]


class _Repeats(NamedTuple):
    """What a connection may repeat."""

    seen: Mapping[int, Seen]
    awaited: frozenset[int]
    """Numbers of deliveries that it has to repeat: once it did, everything behind them is new."""


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
            known = (stretch.seen.get(delivery.packet) for stretch in self._newest_first(delivery.session))
            return delivery.again and any(seen is not None and seen.number == delivery.number for seen in known)
        if newest is not None and delivery.began < newest.began:
            return delivery.number >> FENCE_SHIFT < newest.last >> FENCE_SHIFT
        stretch = self._stretch(delivery, newest)
        if not delivery.again and delivery.number < stretch.repeats_end:
            stretch.repeats_end = delivery.number
            stretch.lead(stretch.edge + 1 - delivery.number)
        if delivery.number >= stretch.repeats_end:
            stretch.add(delivery, stretch.place(delivery.number))
            return False
        return self._take_in_doubt(delivery, stretch)

    def _take_in_doubt(self, delivery: Delivery, stretch: Stretch) -> bool:
        """One that came while the broker repeated what it had sent before: was it among what landed?"""
        repeats = self._repeats_of(delivery)
        seen = repeats.seen.get(delivery.packet)
        place = stretch.place(delivery.number)
        if (
            seen is None
            or seen.digest != delivery.digest
            or seen.number < delivery.floor
            or seen.place <= max(place, stretch.edge) - REACH
        ):
            stretch.add(delivery, place)
            return False
        stretch.add(delivery, seen.place)
        stretch.lead(seen.place - delivery.number)
        awaited = repeats.awaited if stretch.awaited is None else stretch.awaited
        if seen.number in awaited:
            stretch.awaited = awaited - {seen.number}
            stretch.reached = max(stretch.reached, delivery.number)
            if not stretch.awaited:
                stretch.repeats_end = min(stretch.repeats_end, stretch.reached + 1)
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
            stretch.repeats_end, stretch.edge, stretch.shift = newest.repeats_end, newest.edge, newest.shift
            stretch.awaited, stretch.reached = newest.awaited, newest.reached
        elif newest is not None:
            stretch.edge = max(one.last_place for one in self._newest_first(delivery.session))
        ours.append(stretch)
        return stretch

    def _repeats_of(self, delivery: Delivery) -> _Repeats:
        """What earlier connections delivered, back to one whose repeats were over; each message as it came last.

        Of each of them the newest was not acknowledged when it ended. Unless a later one has repeated it since, the
        broker still has to: of one that came beyond its repeats, that is the newest of all before it, too.
        """
        key = delivery.session, delivery.began
        if key in self._repeats:
            return self._repeats[key]
        seen: dict[int, Seen] = {}
        awaited: set[int] = set()
        is_beyond = False
        earlier = (one for one in self._newest_first(delivery.session) if one.began != delivery.began)
        for _, connection in groupby(earlier, lambda one: one.began):
            stretches = list(connection)
            newest = max(stretches, key=lambda one: one.last)
            again = seen.get(newest.last_packet)
            if not is_beyond and (again is None or again.place != newest.last_place):
                awaited.add(newest.last)
            is_beyond = is_beyond or stretches[0].repeats_end != NEVER
            for stretch in stretches:
                for packet, one in stretch.seen.items():
                    seen.setdefault(packet, one)
            if any(stretch.floor >= stretch.began for stretch in stretches):
                break
        found = self._repeats[key] = _Repeats(seen, frozenset(awaited))
        return found

    def apply(self, standing: Stretches) -> None:
        """The plan is committed: `standing` is what it began with."""
        for session in self.new:
            standing[session] = self.kept(session)

    def kept(self, session: bytes) -> list[Stretch]:
        """What is remembered once the plan is committed: all that may be repeated, within a bound."""
        stretches = [*self._standing.get(session, ()), *self.new[session]]
        floor = stretches[-1].floor
        kept: list[Stretch] = []
        count = 0
        for stretch in reversed(stretches):
            if stretch.last < floor or count > 2 * REACH:
                continue
            kept.append(stretch)
            count += len(stretch.seen)
        return kept[::-1]


async def write(connection: Any, source: UUID, parts: Iterable[tuple[int, Deliveries]]) -> None:
    """Within the landing's transaction."""
    rows = [
        (partition, UUID(bytes=session), *one.row())
        for partition, deliveries in parts
        for session, stretches in deliveries.new.items()
        for one in stretches
    ]
    if not rows:
        return
    await connection.execute(_REMEMBER, source, *map(list, zip(*rows, strict=True)))
    forgotten = [
        (partition, UUID(bytes=session), stretches[-1].last, min(one.last for one in deliveries.kept(session)))
        for partition, deliveries in parts
        for session, stretches in deliveries.new.items()
    ]
    await connection.execute(_FORGET, source, *map(list, zip(*forgotten, strict=True)))


async def standing(connection: Any, source: UUID, partitions: list[int]) -> dict[int, Stretches]:
    """What has landed in these partitions."""
    found: dict[int, Stretches] = {}
    for row in await connection.fetch(_STANDING, source, partitions):
        by_session = found.setdefault(row["partition"], {})
        by_session.setdefault(row["session"].bytes, []).append(_stretch_of(row))
    return found
