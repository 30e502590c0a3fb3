"""A TCP proxy to put before a broker or a database, to lose, keep, delay or cut what passes.

Left out: what is inside; it knows bytes only.
"""

import asyncio
import contextlib
import enum
import ssl
from collections import deque
from types import TracebackType
from typing import Self


class Mode(enum.Enum):
    """What happens to bytes as they arrive."""

    PASS = "pass"
    BLACKHOLE = "blackhole"  # lost, in both directions
    MUTE = "mute"  # requests pass, answers are lost
    HOLD = "hold"  # requests are kept until `release`


class Link:
    """One client's connection through the proxy."""

    def __init__(
        self,
        mode: Mode,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.mode = mode
        self.delay_s = 0.0
        self.keeps_ended = False
        self.answered = asyncio.Event()  # the server said something, or hung up, since the last `release`
        self._client = client
        self._server = server
        self._held = bytearray()
        self._late: dict[asyncio.StreamWriter, deque[bytes]] = {client[1]: deque(), server[1]: deque()}

    async def run(self) -> None:
        pumps = [asyncio.create_task(self._ask()), asyncio.create_task(self._answer())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.cut()

    async def _ask(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._client[0].read(65536):
                if self.mode is Mode.HOLD:
                    self._held += data
                elif self.mode is not Mode.BLACKHOLE:
                    self._pass_on(self._server[1], data)
            if self._held:
                await asyncio.Event().wait()  # the client has gone, what it sent has not arrived yet

    async def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._server[0].read(65536):
                if self.mode in (Mode.PASS, Mode.HOLD):
                    self._pass_on(self._client[1], data)
                self.answered.set()
        self.answered.set()
        if self.keeps_ended:
            await asyncio.Event().wait()  # the server has gone, its client has not heard of it yet

    def _pass_on(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Now, or late: as on a long way, what is late holds nothing else up."""
        late = self._late[writer]
        if not late and not self.delay_s:
            writer.write(data)
            return
        late.append(data)
        asyncio.get_running_loop().call_later(self.delay_s, self._arrive_late, writer)

    def _arrive_late(self, writer: asyncio.StreamWriter) -> None:
        data = self._late[writer].popleft()
        if not writer.is_closing():
            writer.write(data)

    def release(self) -> None:
        """Let what was held arrive, even if its client has gone."""
        self.answered.clear()
        self._server[1].write(bytes(self._held))
        self._held.clear()

    def cut(self) -> None:
        for _, writer in (self._client, self._server):
            writer.transport.abort()


class Proxy:
    """Listens on `port` of loopback while entered, with TLS if told how; new connections get `mode`."""

    def __init__(self, port: int, target_port: int, tls: ssl.SSLContext | None = None) -> None:
        self.mode = Mode.PASS
        self.delay_s = 0.0
        """Each way, of new connections."""
        self.refuse = False
        self.keeps_ended = False
        """Of new connections: a client does not hear that its server hung up."""
        self.links: list[Link] = []
        self.target_port = target_port
        self._port = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, ssl=self._tls)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted close in the next turn

    def set_mode(self, mode: Mode) -> None:
        """For the connections there are, and those to come."""
        self.mode = mode
        for link in self.links:
            link.mode = mode

    def set_delay(self, seconds: float) -> None:
        """Each way, for the connections there are, and those to come."""
        self.delay_s = seconds
        for link in self.links:
            link.delay_s = seconds

    def cut(self) -> None:
        """End the connections there are."""
        for link in self.links:
            link.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refuse:
            writer.transport.abort()
            return
        try:
            server = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        link = Link(self.mode, (reader, writer), server)
        link.delay_s = self.delay_s
        link.keeps_ended = self.keeps_ended
        self.links.append(link)
        try:
            await link.run()
        except asyncio.CancelledError:
            pass  # the proxy ends; a cancelled handler would be reported as an error
        finally:
            self.links.remove(link)
