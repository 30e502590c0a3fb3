"""The connection to a broker, against one that is scripted byte for byte: what a real one never sends."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import uvloop

from ingest.mqtt import packets
from ingest.mqtt.connection import Bounds, ClosedError, Connection, Message
from ingest.mqtt.packets import Filter, Login, Version
from ingest.mqtt.window import Window
from runtime.clock import SystemClock
from runtime.mqtt import Address
from tests.support import run

CONNACK = {Version.V5: b"\x20\x06\x01\x00\x03\x21\x00\x0a", Version.V3_1_1: b"\x20\x02\x01\x00"}
LOGIN = Login("client", "user", "password", 30, 3_600, 10)
BOUNDS = Bounds(20, 100_000, 1_000, 5.0)


@dataclass
class Script:
    """A broker that answers CONNECT, and then sends what it is told to."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    heard: bytearray = field(default_factory=bytearray)

    async def expect(self, wanted: bytes) -> None:
        """Read on until `wanted` came; nothing else may."""
        while len(self.heard) < len(wanted):
            self.heard += await asyncio.wait_for(self.reader.read(65_536), 5)
        assert bytes(self.heard[: len(wanted)]) == wanted
        del self.heard[: len(wanted)]


@asynccontextmanager
async def connected(
    version: Version,
    take: Callable[[Connection, Message], None],
    *,
    connack: bytes | None = None,
    holds: Callable[[], bool] = lambda: True,
) -> AsyncIterator[tuple[Connection, Script]]:
    scripts: asyncio.Queue[Script] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        script = Script(reader, writer)
        await script.expect(packets.connect(version, LOGIN))
        writer.write(CONNACK[version] if connack is None else connack)
        await scripts.put(script)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    window = Window(bytes(16), 1)
    connection = Connection(version, LOGIN, BOUNDS, window, SystemClock(), holds=holds, take=take)
    try:
        await connection.open(Address("127.0.0.1", port, None))
        script = await asyncio.wait_for(scripts.get(), 5)
        yield connection, script
    finally:
        connection.abort("the test is over")
        for writer in writers:
            writer.transport.abort()
        server.close()
        await asyncio.sleep(0.01)  # transports close in the loop's next turn


def publish(version: Version, packet: int, payload: bytes, *, flags: int = 0x02, properties: bytes = b"") -> bytes:
    head = b"\x00\x05topic" + (packet.to_bytes(2, "big") if flags & 0x06 else b"")
    if version is Version.V5:
        head += packets._with_length(properties)
    return packets._packet(0x30 | flags, head + payload)


def puback(packet: int) -> bytes:
    return b"\x40\x02" + packet.to_bytes(2, "big")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells of it but asking
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("version", [Version.V5, Version.V3_1_1])
@pytest.mark.parametrize("seed", range(5))
def test_messages_are_the_same_wherever_the_stream_is_cut(version: Version, seed: int) -> None:
    """Of every size around where a length has a digit more, and too large ones among them."""

    async def test() -> None:
        chance = random.Random(seed)
        sizes = [0, 1, 100, 117, 118, 119, 120, 127, 128, 900, 1_000, 1_001, 90_000, 0, 16_400, 200_000, 5]
        sent = [chance.randbytes(size) for size in sizes]
        stream = b"".join(
            publish(version, number, payload, properties=b"\x26\x00\x01a\x00\x01b" * (number % 40))
            for number, payload in enumerate(sent, 1)
        )
        taken: list[Message] = []
        async with connected(version, lambda _, message: taken.append(message)) as (_, script):
            at = 0
            while at < len(stream):
                step = chance.choice((1, 2, 3, 50, 1_000, 70_000))
                script.writer.write(stream[at : at + step])
                await script.writer.drain()
                at += step
                await asyncio.sleep(0)
            await until(lambda: len(taken) == len(sent))
        assert [message.packet for message in taken] == [*range(1, len(sent) + 1)]
        assert [message.size for message in taken] == sizes
        for payload, message in zip(sent, taken, strict=True):
            whole = len(payload) <= BOUNDS.message_bytes
            assert message.payload == payload if whole else payload.startswith(message.payload)
            assert len(message.payload) <= 4_096

    run(test())


def test_acknowledgements_that_fall_together_are_written_together_and_once() -> None:
    async def test() -> None:
        taken: list[Message] = []
        async with connected(Version.V5, lambda _, message: taken.append(message)) as (connection, script):
            flags = (0x02, 0x0A, 0x03, 0x00)
            script.writer.write(b"".join(publish(Version.V5, n, b"x", flags=flags[n - 1]) for n in range(1, 5)))
            await until(lambda: len(taken) == 4)
            assert [(one.again, one.retained, one.packet) for one in taken] == [
                (False, False, 1), (True, False, 2), (False, True, 3), (False, False, 0),
            ]  # fmt: skip
            for message in (*taken[::-1], *taken):
                connection.acknowledge(message)
            await script.expect(puback(3) + puback(2) + puback(1))
            connection.tick()
            await script.expect(packets.PINGREQ)

    run(test())


@pytest.mark.parametrize(
    "junk",
    [
        b"\x32\x03\x00\x05t",  # a topic that is longer than its packet
        b"\x34\x0a\x00\x05topic\x00\x01\x00",  # QoS 2, which nobody asked for
        b"\x32\x0a\x00\x05topic\x00\x00\x00",  # no packet identifier
        b"\x32\xff\xff\xff\xff\x01",  # a length of five bytes
        b"\x10\x02\x00\x00",  # what only clients send
        b"\x00\x00",
        b"\x90\x01\x00",
    ],
)
def test_what_is_no_mqtt_ends_the_connection_and_nothing_else(junk: bytes) -> None:
    async def test() -> None:
        taken: list[Message] = []
        async with connected(Version.V5, lambda _, message: taken.append(message)) as (connection, script):
            script.writer.write(publish(Version.V5, 7, b"good") + junk)
            assert "no MQTT" in await asyncio.wait_for(connection.closed, 5)
        assert [message.payload for message in taken] == [b"good"]

    run(test())


@pytest.mark.parametrize(
    ("version", "connack", "why"),
    [
        (Version.V5, b"\x20\x03\x00\x86\x00", "bad user name or password"),
        (Version.V3_1_1, b"\x20\x02\x00\x05", "not authorized"),
        (Version.V5, b"\x20\x02\x00\x01", "SLUICE_MQTT_VERSION"),
        (Version.V5, b"\x20\x05\x00\x00\x02\x24\x00", "no QoS 1"),
        (Version.V5, b"\x20\x05\x00\x00\x02\xff\x00", "no MQTT"),
        (Version.V5, b"\x32\x0a\x00\x05topic\x00\x01\x00", "no MQTT"),
    ],
)
def test_a_refusal_says_why(version: Version, connack: bytes, why: str) -> None:
    async def test() -> None:
        with pytest.raises(ClosedError, match=why):
            async with connected(version, lambda *_: None, connack=connack):
                pass

    run(test())


def test_who_lost_the_lease_while_connecting_takes_nothing() -> None:
    async def test() -> None:
        taken: list[Message] = []
        connack = CONNACK[Version.V5] + publish(Version.V5, 1, b"x")
        with pytest.raises(ClosedError, match="lease"):
            async with connected(
                Version.V5, lambda _, message: taken.append(message), connack=connack, holds=lambda: False
            ):
                pass
        assert taken == []

    run(test())


def test_no_more_is_read_than_may_be_open() -> None:
    async def test() -> None:
        taken: list[Message] = []
        async with connected(Version.V5, lambda _, message: taken.append(message)) as (connection, script):
            for number in range(1, 2_001):
                script.writer.write(publish(Version.V5, number, b"x" * 900))
            await until(lambda: len(taken) >= BOUNDS.messages)
            await asyncio.sleep(0.1)
            before = len(taken)
            assert before < 2_000
            while len(taken) < 2_000:
                for message in taken:
                    connection.acknowledge(message)
                await asyncio.sleep(0.01)

    run(test())


def test_a_broker_that_falls_silent_or_takes_the_session_away_is_told() -> None:
    async def silent(connection: Connection, script: Script) -> str:
        bounds = connection._bounds._replace(timeout_s=0.05)
        connection._bounds = bounds
        script.writer.write(publish(Version.V5, 1, b"x"))
        await until(lambda: len(connection.window) == 1)
        while not connection.closed.done():
            connection.tick()
            await asyncio.sleep(0.02)
        return connection.reason

    async def taken_over(connection: Connection, script: Script) -> str:
        script.writer.write(b"\xe0\x02\x8e\x00")
        return await asyncio.wait_for(connection.closed, 5)

    async def told(how: Callable[[Connection, Script], Awaitable[str]]) -> str:
        async with connected(Version.V5, lambda *_: None) as (connection, script):
            return await how(connection, script)

    assert "did not answer a ping" in run(told(silent))
    assert "taken over" in run(told(taken_over))


@pytest.mark.parametrize("version", [Version.V5, Version.V3_1_1])
def test_what_is_asked_for_is_answered(version: Version) -> None:
    async def test() -> None:
        async with connected(version, lambda *_: None) as (connection, script):
            filters = [Filter("a/+", 1, False), Filter("b", 1, True)]
            asking = asyncio.create_task(connection.subscribe(filters))
            await script.expect(packets.subscribe(version, 1, filters))
            properties = b"\x00" if version is Version.V5 else b""
            script.writer.write(packets._packet(0x90, b"\x00\x01" + properties + b"\x01\x87"))
            assert await asking == b"\x01\x87"
            leaving = asyncio.create_task(connection.close(within_s=1))
            for _ in range(2):  # once to hear that nothing more is waiting, and again that it heard all
                await script.expect(packets.PINGREQ)
                script.writer.write(b"\xd0\x00")
            await script.expect(packets.disconnect())
            script.writer.close()
            await leaving

    run(test())


@pytest.mark.parametrize("heard", [1, 2])
def test_a_broker_that_goes_away_while_it_is_left_is_no_failure(heard: int) -> None:
    """On the roles' own loop, whose transports refuse to be written to once they are closed."""

    async def test() -> None:
        async with connected(Version.V5, lambda *_: None) as (connection, script):
            leaving = asyncio.create_task(connection.close(within_s=1))
            await script.expect(packets.PINGREQ)
            for _ in range(1, heard):
                script.writer.write(b"\xd0\x00")
                await script.expect(packets.PINGREQ)
            script.writer.transport.abort()
            await asyncio.wait_for(leaving, 5)
            assert "by us" not in connection.reason

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test())
