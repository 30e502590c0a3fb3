"""One plant that is connected: it publishes what it has, does what it is told, and comes back when it is cut off.

What was not acknowledged is sent again with the same bytes, once it is connected again, in order and one message at
a time. Left out: what is in messages (`bench.simulator.speech`), and how many are made (`bench.simulator.fleet`).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Final

from bench.simulator import speech
from bench.simulator.connection import Connection, Login
from bench.simulator.plants import Plant
from bench.simulator.speech import BadCommandError, Outgoing
from runtime.errors import SluiceError, UnavailableError
from schemas.plants import AuthMethod

#: The broker keeps commands for a plant that is away; it is forgotten when nobody simulates it any more.
SESSION_S: Final = 300
#: Of what it cannot send, a plant keeps the newest.
WAITING_MAX: Final = 1_000
COMMANDS_MAX: Final = 100
REASON_CHARACTERS_MAX: Final = 100
BACK_OFF_S: Final = (0.5, 10.0)
#: Before its end, and by chance up to twice as long before: tokens of a fleet do not end at once.
RENEWED_BEFORE_S: Final = 60.0
RENEWED_BEFORE_SHARE: Final = 0.2


@dataclass
class Counts:
    """What a fleet did. Of what was made, each message is acknowledged, given up or waiting at the end."""

    made: int = 0
    published: int = 0
    """Times that a message was sent."""
    acknowledged: int = 0
    redelivered: int = 0
    """Of those published, that had been sent before."""
    given_up: int = 0
    """What a plant that is away for long has no room for."""
    connections: int = 0
    commands: int = 0
    """Answered; each once, however often it came."""
    renewed_tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Connections that were refused or broke, and commands that were none."""


@dataclass
class _Waiting:
    message: Outgoing
    was_sent: bool = False


class Device:
    """A plant and its connection: `run` until it is cancelled, or ends after `stop`."""

    def __init__(
        self,
        plant: Plant,
        counts: Counts,
        random: Random,
        gate: asyncio.Semaphore,
        renew: Callable[[Plant], Awaitable[None]],
    ) -> None:
        """`gate` bounds how many of a fleet connect at a time; `renew` gets another token."""
        self.plant = plant
        self.is_connected = False
        self.was_connected = False
        self._counts = counts
        self._random = random
        self._gate = gate
        self._renew = renew
        self._renewed_at_s = 0.0
        self._waiting: deque[_Waiting] = deque()
        self._answers: deque[Outgoing] = deque()
        self._done: deque[str] = deque(maxlen=COMMANDS_MAX)
        self._something = asyncio.Event()
        self._stopping = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Readings that nobody has acknowledged."""
        return len(self._waiting)

    def send(self, message: Outgoing) -> None:
        """As soon as it can be; the oldest goes where too many wait."""
        self._counts.made += 1
        if len(self._waiting) >= WAITING_MAX:
            self._waiting.popleft()
            self._counts.given_up += 1
        self._waiting.append(_Waiting(message))
        self._something.set()

    def stop(self) -> None:
        """Send what waits, say good-bye, and let `run` end."""
        self._stopping.set()
        self._something.set()

    async def run(self) -> None:
        """Connect, and again whenever the connection ends."""
        wait_s = BACK_OFF_S[0]
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._live()
            except SluiceError as error:
                self._counts.failures[_reason(error)] += 1
                wait_s = min(wait_s * 2, BACK_OFF_S[1])
                if time.monotonic() - began > BACK_OFF_S[1]:
                    wait_s = BACK_OFF_S[0]
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), self._random.uniform(0, wait_s))

    # ------------------------------------------------------------ one connection

    async def _live(self) -> None:
        """Until it is stopped or its token is due. Raises `SluiceError` where it cannot connect, or is cut off."""
        who = self.plant.identity
        login = Login(str(who.plant), who.topic("status"), speech.OFFLINE, SESSION_S)
        async with self._gate:
            await self._renew_token()
            connection = await Connection.opened(self.plant.endpoint, login, self._hear)
            try:
                await connection.subscribe(who.topic("command"))
                await connection.publish(who.topic("status"), speech.ONLINE, retained=True)
            except BaseException:
                connection.abort("it was given up")
                raise
        self._counts.connections += 1
        self.is_connected = self.was_connected = True
        try:
            await self._talk(connection)
            if self._stopping.is_set():
                await connection.publish(who.topic("status"), speech.OFFLINE, retained=True)
            await connection.close()
        finally:
            self.is_connected = False
            connection.abort("it was given up")

    async def _renew_token(self) -> None:
        plant = self.plant
        if plant.method is not AuthMethod.TOKEN or time.time() < self._renewed_at_s:
            return
        await self._renew(plant)
        self._counts.renewed_tokens += 1
        before_s = min(RENEWED_BEFORE_S, (plant.token_ends_s - time.time()) * RENEWED_BEFORE_SHARE)
        self._renewed_at_s = plant.token_ends_s - before_s * self._random.uniform(1, 2)

    async def _talk(self, connection: Connection) -> None:
        """Until there is nothing more to say on this connection. Raises `UnavailableError` when it ends before."""
        loop = asyncio.get_running_loop()
        due = None
        if self.plant.method is AuthMethod.TOKEN:
            due = loop.call_later(max(0.0, self._renewed_at_s - time.time()), self._something.set)
        connection.closed.add_done_callback(self._wake)
        try:
            while self.plant.method is not AuthMethod.TOKEN or time.time() < self._renewed_at_s:
                if connection.closed.done():
                    raise UnavailableError(connection.closed.result())
                if self._answers:
                    await connection.publish(self._answers[0].topic, self._answers[0].payload)
                    self._answers.popleft()
                elif self._waiting:
                    await self._publish(connection, self._waiting[0])
                elif self._stopping.is_set():
                    return
                else:
                    self._something.clear()
                    await self._something.wait()
        finally:
            connection.closed.remove_done_callback(self._wake)
            if due is not None:
                due.cancel()

    def _wake(self, _: object) -> None:
        self._something.set()

    async def _publish(self, connection: Connection, one: _Waiting) -> None:
        self._counts.published += 1
        self._counts.redelivered += one.was_sent
        one.was_sent = True
        await connection.publish(one.message.topic, one.message.payload)
        if self._waiting and self._waiting[0] is one:  # it has not been given up meanwhile
            self._waiting.popleft()
            self._counts.acknowledged += 1

    def _hear(self, payload: bytes) -> None:
        try:
            command = speech.understand(self.plant.identity, payload)
        except BadCommandError as error:
            self._counts.failures[f"a command was refused: {error}"] += 1
            return
        if command.command not in self._done:  # one that comes again is answered again, and not done again
            self._done.append(command.command)
            self._counts.commands += 1
        if len(self._answers) < 2 * COMMANDS_MAX:
            self._answers += speech.answers(self.plant.identity, command)
            self._something.set()


def _reason(error: SluiceError) -> str:
    return str(error)[:REASON_CHARACTERS_MAX]
