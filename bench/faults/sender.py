"""Sends what devices send, at a rate, whatever happens, and keeps the record of what was acknowledged.

Like a device it repeats what was not acknowledged, unless a repeat would be another reading; it connects anew when a
connection ends, and when an answer says that it will. Left out: what is sent (`bench.faults.traffic`).
"""

import asyncio
import random
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from itertools import count
from typing import Final, Generic, NamedTuple, Protocol, Self, TypeVar

import orjson

from bench.errors import within
from bench.faults.traffic import MIX, Device, Kind
from bench.load import LOOPBACK

ANSWER_TIMEOUT_S: Final = 30.0
#: A connection and an answer, twice: of what is under way, and of its repeat.
STOP_TIMEOUT_S: Final = 5 * ANSWER_TIMEOUT_S
TRIES: Final = 3
#: Of what can be repeated, also when it was acknowledged: a client that did not see its answer.
REPEATED_SHARE: Final = 0.1
WAIT_S: Final = (0.1, 0.4)
#: How much of what it could not send in time a lane makes up for.
BEHIND_MAX_S: Final = 1.0
HEAD_BYTES_MAX: Final = 65_536
UNKNOWN_CODES: Final = ("outcome_unknown",)


class Fate(IntEnum):
    """What is known of a request."""

    OPEN = 0
    """Not answered; like UNKNOWN, should it stay so."""
    ACKNOWLEDGED = 1
    UNKNOWN = 2
    """It may have been kept or not: once at most."""
    NOT_KEPT = 3


class Journal:
    """The fate of every request of a run, and when readings were acknowledged."""

    def __init__(self) -> None:
        self.fates: dict[tuple[int, Kind], bytearray] = {}
        """By device and kind, and in there by number."""
        self.failures: Counter[str] = Counter()
        """Attempts that were not answered as in health."""
        self.unexpected: Counter[str] = Counter()
        """Answers that no fault excuses."""
        self.spooled = 0
        """Readings acknowledged from a spool."""
        self._moments = array("d")
        self._acknowledged = array("q")
        self.requests = 0

    @property
    def acknowledged(self) -> int:
        return self._acknowledged[-1] if self._acknowledged else 0

    def acknowledged_by(self, moment: float) -> int:
        """Readings, the refused ones among them."""
        at = bisect_right(self._moments, moment)
        return self._acknowledged[at - 1] if at else 0

    def first_after(self, moment: float) -> float | None:
        """When the first acknowledgement after a moment came."""
        at = bisect_right(self._moments, moment)
        return self._moments[at] if at < len(self._moments) else None

    def begin(self, device: Device, kind: Kind) -> int:
        """The number of the device's next request of the kind."""
        self.requests += 1
        fates = self.fates.setdefault((device.number, kind), bytearray())
        fates.append(Fate.OPEN)
        return len(fates) - 1

    def end(self, device: Device, kind: Kind, number: int, fate: Fate) -> None:
        self.fates[device.number, kind][number] = fate
        if fate is Fate.ACKNOWLEDGED:
            self._moments.append(time.monotonic())
            self._acknowledged.append(self.acknowledged + kind.readings)


class Answer(NamedTuple):
    status: int
    body: bytes
    closes: bool


class Connection(Protocol):
    """What a lane of a sender has and ends with."""

    def close(self) -> None: ...


class Link:
    """A connection that is made when it is needed, and made anew when it has ended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self) -> None:
        """Raises `OSError` or `TimeoutError` when nobody listens."""
        if self._streams is None:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                self._streams = await asyncio.open_connection(LOOPBACK, self._port, limit=HEAD_BYTES_MAX)

    async def ask(self, request: bytes) -> Answer:
        """Raises `OSError`, `EOFError` or `TimeoutError` when there is no whole answer."""
        assert self._streams is not None
        reader, writer = self._streams
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(request)
                answer = await _read(reader)
        except BaseException:
            self.close()
            raise
        if answer.closes:
            self.close()
        return answer

    def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()


async def _read(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    _, found, rest = head.partition(b"\r\ncontent-length:")
    body = await reader.readexactly(int(rest.partition(b"\r\n")[0])) if found else b""
    return Answer(int(head[9:12]), body, b"\r\nconnection: close" in head)


L = TypeVar("L", bound=Connection)


class Lanes(Generic[L]):
    """Connections that share the devices, each with some of its own.

    Three quarters of them send from the start. Others come later: with devices that nobody has heard of so far, whose
    requests may have to wait where those of known ones need not.
    """

    def __init__(self, port: int, devices: Sequence[Device], connections: int, rate: float | None) -> None:
        """`rate`: readings a second, of all together; None: as fast as they are answered."""
        self.journal = Journal()
        self._port = port
        self._rate = rate
        self._shares = [devices[lane::connections] for lane in range(connections)]
        self._active = connections * 3 // 4
        self._widened = asyncio.Event()
        self.began = 0.0
        """Of the monotonic clock."""
        self._stopped = False
        self._lanes: list[asyncio.Task[None]] = []

    #: What every device sends in turn.
    mix: Sequence[Kind] = MIX

    def _link(self) -> L:
        raise NotImplementedError

    async def _attempt(self, link: L, device: Device, kind: Kind, number: int) -> Fate:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self.began = time.monotonic()
        self._lanes = [asyncio.create_task(self._run(share, lane)) for lane, share in enumerate(self._shares)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)

    def widen(self) -> None:
        """An eighth of the connections, with devices unheard so far, send from now on."""
        self._active = min(len(self._shares), self._active + len(self._shares) // 8)
        self._widened.set()

    async def stop(self) -> None:
        """Once what is under way has been answered, or given up. Raises `BenchError` when that takes too long."""
        self._stopped = True
        self._widened.set()
        async with within(STOP_TIMEOUT_S, "answers to what the load has under way"):
            await asyncio.gather(*self._lanes)

    async def _run(self, devices: Sequence[Device], lane: int) -> None:
        loop = asyncio.get_running_loop()
        while lane >= self._active and not self._stopped:
            self._widened.clear()
            await self._widened.wait()
        due = loop.time() + self._interval_s() * lane / len(self._shares)
        link = self._link()
        try:
            for device, kind in _turns(devices, self.mix):
                if self._stopped:
                    return
                due = max(due + self._interval_s(), loop.time() - BEHIND_MAX_S)
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._deliver(link, device, kind)
        finally:
            link.close()

    def _interval_s(self) -> float:
        if self._rate is None:
            return 0.0
        return self._active * sum(kind.readings for kind in self.mix) / len(self.mix) / self._rate

    async def _deliver(self, link: L, device: Device, kind: Kind) -> int:
        """Its number."""
        journal = self.journal
        number = journal.begin(device, kind)
        fate = await self._attempt(link, device, kind, number)
        repeats = TRIES - 1 if kind.repeatable else 0
        while repeats and fate is not Fate.ACKNOWLEDGED and not self._stopped:
            repeats -= 1
            await asyncio.sleep(random.uniform(*WAIT_S))
            again = await self._attempt(link, device, kind, number)
            # An attempt that was certainly not kept says nothing of the one before.
            fate = again if again is not Fate.NOT_KEPT else fate
        journal.end(device, kind, number, fate)
        if kind.repeatable and fate is Fate.ACKNOWLEDGED and random.random() < REPEATED_SHARE:
            await self._attempt(link, device, kind, number)
        return number


class Sender(Lanes[Link]):
    """Over HTTP."""

    def _link(self) -> Link:
        return Link(self._port)

    async def _attempt(self, link: Link, device: Device, kind: Kind, number: int) -> Fate:
        request = device.request(kind, number)
        try:
            await link.connect()
        except OSError as error:
            self.journal.failures[f"no connection: {type(error).__name__}"] += 1
            await asyncio.sleep(random.uniform(*WAIT_S))
            return Fate.NOT_KEPT
        try:
            answer = await link.ask(request)
        except (OSError, EOFError, TimeoutError) as error:
            self.journal.failures[f"no answer: {type(error).__name__}"] += 1
            return Fate.UNKNOWN
        return self._judge(answer, kind)

    def _judge(self, answer: Answer, kind: Kind) -> Fate:
        journal = self.journal
        plain: dict[str, object] = {}
        with suppress(orjson.JSONDecodeError):
            plain = orjson.loads(answer.body)
        if answer.status == 202 and plain.get("accepted") == kind.accepted:
            if plain.get("durable") == "spool":
                journal.spooled += kind.readings
            return Fate.ACKNOWLEDGED
        error = plain.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        journal.failures[f"{answer.status} {code}"] += 1
        if answer.status == 503 and code is not None:
            return Fate.UNKNOWN if code in UNKNOWN_CODES else Fate.NOT_KEPT
        journal.unexpected[f"{answer.status} {code}: {answer.body[:200].decode(errors='replace')}"] += 1
        return Fate.UNKNOWN


def _turns(devices: Sequence[Device], mix: Sequence[Kind]) -> Iterator[tuple[Device, Kind]]:
    for turn in count():
        for device in devices:
            yield device, mix[turn % len(mix)]


class Landing:
    """When readings landed, as somebody who asks again and again has seen it."""

    def __init__(self) -> None:
        self.moments = array("d")
        self.landed = array("q")

    def add(self, moment: float, landed: int) -> None:
        self.moments.append(moment)
        self.landed.append(landed)

    def first_after(self, moment: float) -> int | None:
        """The first look after a moment that found more than the one before it."""
        begin = bisect_right(self.moments, moment)
        return next((at for at in range(begin + 1, len(self.moments)) if self.landed[at] > self.landed[at - 1]), None)

    def at(self, moment: float) -> int:
        """What the last look before a moment found."""
        found = bisect_right(self.moments, moment)
        return self.landed[found - 1] if found else 0

    def level(self, begin: int, wanted: Sequence[int]) -> Iterator[int]:
        """From look `begin` on, those that found at least what was wanted at each."""
        return (at for at in range(begin, len(self.moments)) if self.landed[at] >= wanted[at - begin])
