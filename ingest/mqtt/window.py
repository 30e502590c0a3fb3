"""Which deliveries of a session are open, and which are certain not to be sent again. Pure: no I/O.

Deliveries are numbered in the order in which they came, over all connections of whoever holds the session. One is
done once it is durable, and over once the broker answered a PINGREQ written behind its PUBACK. Of each partition the
newest that is durable stays unacknowledged for as long as more may be on the way: a broker repeats in order, so that
landing knows by it where the repeats end. Left out: the session (`session`), and what landing makes of it.
"""

from typing import NamedTuple

from schemas.record import FENCE_SHIFT


class Open(NamedTuple):
    """A delivery that is not acknowledged."""

    packet: int
    size: int
    arrived_us: int


class Mark(NamedTuple):
    """Where a window stood when a PINGREQ was written."""

    next: int
    first_open: int
    """Every delivery before it was acknowledged."""
    first_open_of: dict[int, int]
    """The same by partition."""
    first_open_else: int
    """Of a partition with none open: the first of which the partition was not known yet, or `next`."""


class Window:
    """Of one lease of a session, over all of its connections."""

    def __init__(self, session: bytes, fence: int, settled: int = 0) -> None:
        """`session`: its id, 16 bytes; `fence`: how often it was taken by now, which no other lease of it has.

        `settled`: of what was delivered to others before this number, nothing is sent again.
        """
        self.session = session
        self.next = fence << FENCE_SHIFT
        """The number of the next delivery."""
        self.began = self.next
        """The number of the first delivery of this connection."""
        self.bytes = 0
        """Of open deliveries."""
        self._open: dict[int, Open] = {}
        self._partitions: dict[int, int] = {}
        self._undecided: dict[int, None] = {}
        self._open_of: dict[int, dict[int, None]] = {}
        self._tails: dict[int, int] = {}
        self._confirmed: Mark | None = None
        self._repeats_end: int | None = None
        self._are_repeats_over = False
        self._inherited = settled
        self._inherited_of: dict[int, int] = {}

    def connected(self) -> None:
        """A connection begins: what was open is sent again, or was lost with the session."""
        if self._are_repeats_over and self._confirmed is not None:
            self._inherited, self._inherited_of = self._confirmed.first_open_else, self._confirmed.first_open_of
        self._open.clear()
        self._partitions.clear()
        self._undecided.clear()
        self._open_of.clear()
        self._tails.clear()
        self.bytes = 0
        self.began = self.next
        self._confirmed = self._repeats_end = None
        self._are_repeats_over = False

    def take(self, packet: int, size: int, arrived_us: int) -> int:
        """The number of a delivery that has come, which is open now."""
        number = self.next
        self.next = number + 1
        self._open[number] = Open(packet, size, arrived_us)
        self.bytes += size
        return number

    def assign(self, number: int, partition: int) -> None:
        """To which partition its record goes, if it becomes one."""
        self._partitions[number] = partition
        self._open_of.setdefault(partition, {})[number] = None

    def expect(self, number: int) -> None:
        """The same of one whose partition is not known yet: it may be any."""
        self._undecided[number] = None

    def decide(self, number: int, partition: int) -> None:
        """To which partition one goes that was expected; nothing for one of an earlier connection."""
        if number not in self._open:
            return
        self._undecided.pop(number, None)
        former = self._partitions.get(number)
        if former is not None and former != partition:
            del self._open_of[former][number]
        if former != partition:
            self.assign(number, partition)

    def done(self, number: int, *, is_known_again: bool) -> list[int]:
        """Packet identifiers that may be acknowledged, now that this delivery's record is durable, or there is none.

        Nothing for one of an earlier connection, which the broker sends again. `is_known_again`: the record tells how
        it was delivered.
        """
        opened = self._open.get(number)
        if opened is None:
            return []
        partition = self._partitions.get(number)
        if not is_known_again or partition is None or not opened.packet:
            return self._close(number)
        tail = self._tails.get(partition, -1)
        if number < tail:
            return self._close(number)
        self._tails[partition] = number
        return self._close(tail) if tail >= 0 else []

    def release(self) -> list[int]:
        """The same of what was kept as the newest of its partition: nothing more is on its way."""
        tails, self._tails = self._tails, {}
        return [packet for number in tails.values() for packet in self._close(number)]

    def _close(self, number: int) -> list[int]:
        closed = self._open.pop(number)
        self.bytes -= closed.size
        if self._undecided:
            self._undecided.pop(number, None)
        if (partition := self._partitions.pop(number, None)) is not None:
            del self._open_of[partition][number]
        return [closed.packet] if closed.packet else []

    def __len__(self) -> int:
        return len(self._open)

    @property
    def waiting(self) -> int:
        """How many deliveries are open for another reason than that they are the newest."""
        return len(self._open) - len(self._tails)

    @property
    def oldest_us(self) -> int | None:
        """When the oldest of these came, microseconds since 1970."""
        tails = set(self._tails.values())
        return next((one.arrived_us for number, one in self._open.items() if number not in tails), None)

    # ------------------------------------------------------------ what is over

    def mark(self) -> Mark:
        undecided = next(iter(self._undecided), self.next)
        first_open_of = {
            partition: min(*numbers, undecided) for partition, numbers in self._open_of.items() if numbers
        }
        return Mark(self.next, next(iter(self._open), self.next), first_open_of, undecided)

    def confirm(self, mark: Mark) -> bool:
        """The broker has answered what was written at `mark`. Whether it has nothing more waiting."""
        if self._repeats_end is None:
            self._repeats_end = self.next
        elif mark.first_open >= self._repeats_end:
            self._are_repeats_over = True
        self._confirmed = mark
        return self.next == mark.next

    @property
    def is_settled(self) -> bool:
        """Whether it is known of every delivery that it is over."""
        return self._are_repeats_over and self._confirmed is not None and self._confirmed.first_open == self.next

    @property
    def settled(self) -> int:
        """Of what was delivered before this number, nothing is sent again; 0 where that is not known."""
        return self._confirmed.first_open if self._are_repeats_over and self._confirmed is not None else 0

    def floor(self, partition: int) -> int:
        """No delivery with a record in this partition and a lower number is sent again.

        Below the connection's first number until all that it had to repeat is over.
        """
        if not self._are_repeats_over or self._confirmed is None:
            return self._inherited_of.get(partition, self._inherited)
        return self._confirmed.first_open_of.get(partition, self._confirmed.first_open_else)
