"""Every message lands once, whatever breaks: broker, bridges and landing, walked through at random.

The broker is a model: packet identifiers that come back after a few dozen messages, a window as wide as it likes,
repeats in order. The window and the memory of landing are the real ones.
"""

import random
from collections import deque
from hashlib import blake2b

import pytest

from ingest.mqtt.window import Mark, Window
from schemas.record import FENCE_SHIFT, Delivery
from workers.landing import deliveries
from workers.landing.deliveries import Deliveries, Stretches
from workers.landing.late import Memory

PACKETS = 300
REACH = 200
PARTITIONS = 3
SESSION = bytes(16)


class Broker:
    """One session: what is queued, what was sent and not acknowledged, in order."""

    def __init__(self) -> None:
        self.queue: deque[int] = deque()
        self.in_flight: list[tuple[int, int]] = []
        self.packet = 0
        self.wire: deque[tuple[str, int, int, bool]] = deque()
        """To the client: kind, packet, message, again."""
        self.back: deque[tuple[str, int]] = deque()
        """From the client."""

    def connect(self) -> None:
        self.wire.clear()
        self.back.clear()
        self.wire.extend(("publish", packet, message, True) for packet, message in self.in_flight)

    def send(self, most: int) -> None:
        for _ in range(min(most, len(self.queue))):
            used = {packet for packet, _ in self.in_flight}
            if len(used) >= PACKETS - 5:
                return
            self.packet = self.packet % PACKETS + 1
            while self.packet in used:
                self.packet = self.packet % PACKETS + 1
            message = self.queue.popleft()
            self.in_flight.append((self.packet, message))
            self.wire.append(("publish", self.packet, message, False))

    def hear(self, most: int) -> None:
        for _ in range(min(most, len(self.back))):
            kind, packet = self.back.popleft()
            if kind == "ping":
                self.wire.append(("pong", 0, 0, False))
            else:
                index = next(i for i, (one, _) in enumerate(self.in_flight) if one == packet)
                del self.in_flight[index]


class World:
    """One broker, one bridge at a time, a log of each partition, and landing that reads it."""

    def __init__(self, seed: int, *, is_named: bool = False) -> None:
        """`is_named`: what a message is of, and so its partition, is found only when it is given to the log."""
        self.random = random.Random(seed)
        self.is_named = is_named
        self.broker = Broker()
        self.fence = self.settled = 0
        self.published = 0
        self.log: list[list[tuple[Delivery, int]]] = [[] for _ in range(PARTITIONS)]
        self.landed: list[int] = []
        self.position = [0] * PARTITIONS
        self.standing: list[Stretches] = [{} for _ in range(PARTITIONS)]
        self.acknowledged: set[int] = set()
        self.take_over()

    # a message's content comes back, so that only its place tells it from others
    def digest(self, message: int) -> bytes:
        return blake2b(b"%d" % (message % 4), digest_size=8).digest()

    def partition(self, message: int) -> int:
        return message % 4 % PARTITIONS

    def take_over(self) -> None:
        """Another bridge, or the same started again: nothing is left of the former but what it gave to the log."""
        self.fence += 1
        self.window = Window(SESSION, self.fence, self.settled)
        self.reconnect()

    def reconnect(self) -> None:
        self.broker.connect()
        self.window.connected()
        self.held: list[tuple[int, int, int, bool]] = []
        self.appended: deque[tuple[int, int, int]] = deque()
        self.messages: dict[int, int] = {}
        self.marks: deque[Mark] = deque()

    def publish(self) -> None:
        for _ in range(self.random.choice((1, 3, 10))):
            self.broker.queue.append(self.published)
            self.published += 1

    def receive(self) -> None:
        for _ in range(self.random.randrange(1, 8)):
            if not self.broker.wire or len(self.window) > 30:
                return
            kind, packet, message, again = self.broker.wire.popleft()
            if kind == "pong":
                self.hear_pong()
                continue
            number = self.window.take(packet, 1, 0)
            if self.is_named:
                self.window.expect(number)
            else:
                self.window.assign(number, self.partition(message))
            self.held.append((number, packet, message, again))
            if self.random.random() < 0.8:
                self.append(len(self.held) - 1)

    def hear_pong(self) -> None:
        """What is released when nothing was on its way is soon over, before much more has come; then that is kept."""
        if self.window.confirm(self.marks.popleft()) and (released := self.window.release()):
            self.acknowledge(released)
            self.broker.hear(len(self.broker.back))
            self.window.confirm(self.window.mark())
            self.settled = max(self.settled, self.window.settled)
        elif self.random.random() < 0.5:
            self.settled = max(self.settled, self.window.settled)

    def append(self, index: int) -> None:
        """One device's messages stay in order: its earlier ones go first."""
        message = self.held[index][2]
        index = next(i for i, one in enumerate(self.held) if one[2] % 4 == message % 4)
        number, packet, message, again = self.held.pop(index)
        partition = self.partition(message)
        if self.is_named:
            self.window.decide(number, partition)
        where = number, self.window.began, self.window.floor(partition)
        self.log[partition].append((Delivery(SESSION, packet, again, self.digest(message), *where), message))
        self.appended.append((number, packet, message))

    def settle(self) -> None:
        """What was given to the log is durable; its packet may be acknowledged."""
        for _ in range(self.random.randrange(1, 10)):
            if not self.appended:
                return
            number, packet, message = self.appended.popleft()
            self.messages[packet] = message
            self.acknowledge(self.window.done(number, is_known_again=True))

    def acknowledge(self, packets: list[int]) -> None:
        for packet in packets:
            self.acknowledged.add(self.messages[packet])
            self.broker.back.append(("ack", packet))

    def ping(self) -> None:
        if not self.marks:
            self.marks.append(self.window.mark())
            self.broker.back.append(("ping", 0))

    def land(self) -> None:
        """Some of each partition, in one plan or two that overlap; now and then the worker begins anew."""
        for partition in range(PARTITIONS):
            before = None
            for _ in range(self.random.choice((1, 2))):
                plan = Deliveries(self.standing[partition], before)
                end = min(len(self.log[partition]), self.position[partition] + self.random.randrange(0, 30))
                for delivery, message in self.log[partition][self.position[partition] : end]:
                    if not plan.take(delivery):
                        self.landed.append(message)
                self.position[partition] = end
                if before is not None:
                    before.apply(self.standing[partition])
                before = plan
            assert before is not None
            before.apply(self.standing[partition])

    def stop(self) -> None:
        """As a bridge that is told to: what was given to the log is waited for, and the broker hears all of it."""
        while self.appended:
            self.settle()
        for _ in range(4):
            self.ping()
            self.broker.hear(len(self.broker.back))
            while self.marks:
                if self.broker.wire.popleft()[0] != "pong":
                    self.take_over()  # more was on its way, of which this bridge takes nothing any more
                    return
                self.hear_pong()
        self.take_over()

    def step(self) -> None:
        some = self.random.randrange(1, 12)
        actions = (
            self.publish, self.receive, self.receive, self.settle, self.settle, self.land, self.ping,
            lambda: self.broker.send(some), lambda: self.broker.hear(some),
            lambda: self.append(self.random.randrange(len(self.held))) if self.held else None,
        )  # fmt: skip
        self.random.choice(actions)()
        chance = self.random.random()
        if chance < 0.01:
            self.reconnect()
        elif chance < 0.02:
            self.take_over()
        elif chance < 0.023:
            self.stop()

    def finish(self) -> None:
        """Nothing breaks any more, until nothing is left to do."""
        for _ in range(10_000):
            self.broker.send(10)
            self.receive()
            while self.held:
                self.append(0)
            self.settle()
            self.ping()
            self.broker.hear(10)
            if not (self.broker.queue or self.broker.in_flight):
                break
        while any(at < len(log) for at, log in zip(self.position, self.log, strict=True)):
            self.land()


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_every_message_lands_once(seed: int, is_named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "REACH", REACH)
    world = World(seed, is_named=is_named)
    for _ in range(3_000):
        world.step()
    world.finish()
    assert not world.broker.in_flight
    assert sorted(world.landed) == list(range(world.published))
    assert world.acknowledged <= set(world.landed)


def test_what_is_planned_while_the_first_ever_is_written_keeps_it() -> None:
    standing: Stretches = {}
    first = Memory({}, delivered=standing)
    second = Memory({}, first, delivered=standing)
    began, again = 1 << FENCE_SHIFT, 2 << FENCE_SHIFT
    for number, memory in enumerate((first, second)):
        sent = Delivery(b"s" * 16, number + 1, False, bytes(8), began + number, began, 0)
        assert not memory.deliveries.take(sent)
    first.deliveries.apply(standing)
    second.settled()
    assert [set(stretch.seen) for stretch in second.deliveries.kept(b"s" * 16)] == [{1}, {2}]
    second.deliveries.apply(standing)
    successor = Deliveries(standing)
    for number in range(2):
        assert successor.take(Delivery(b"s" * 16, number + 1, True, bytes(8), again + number, again, 0))
