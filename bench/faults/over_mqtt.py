"""Sends what devices send over MQTT, at QoS 1, and keeps the record of what the broker acknowledged.

A message with times is sent again until it is acknowledged; one without is sent once, since nothing would tell a
second one from another reading. Left out: what is sent (`bench.faults.traffic`).
"""

import asyncio
import random
import struct
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from bench.faults.sender import ANSWER_TIMEOUT_S, WAIT_S, Fate, Lanes
from bench.faults.traffic import MQTT_MIX, Device, Kind, Reading
from bench.load import LOOPBACK
from bench.publish import CONNACK, KEEP_ALIVE_S, PUBACK, message
from ingest.mqtt import packets
from ingest.mqtt.packets import Login, Version

PACKET: Final = struct.Struct(">H")
ANSWER_BYTES: Final = 4
#: A message that ends a device's, and is sent until the broker has it.
LAST_TRIES: Final = 20


class MqttLink:
    """A connection that is made when it is needed, with one message at a time under way."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self) -> None:
        """Raises `OSError`, `EOFError` or `TimeoutError` when the broker does not let us in."""
        if self._streams is not None:
            return
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            self._streams = await asyncio.open_connection(LOOPBACK, self._port)
        name = f"faults-{random.getrandbits(64):x}"
        await self._ask(packets.connect(Version.V3_1_1, Login(name, None, None, KEEP_ALIVE_S, 0, 0)), CONNACK)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Until it is acknowledged. Raises `OSError`, `EOFError` or `TimeoutError`."""
        head, rest = message(topic, payload)
        await self._ask(head + PACKET.pack(1) + rest, PUBACK)

    async def _ask(self, packet: bytes, wanted: int) -> None:
        assert self._streams is not None
        reader, writer = self._streams
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(packet)
                answer = await reader.readexactly(ANSWER_BYTES)
        except BaseException:
            self.close()
            raise
        if answer[0] != wanted:
            self.close()
            raise ConnectionError(f"the broker answered with a packet of kind {answer[0] >> 4}")

    def close(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].transport.abort()


class MqttSender(Lanes[MqttLink]):
    """Over MQTT."""

    mix = MQTT_MIX

    def __init__(
        self, port: int, devices: Sequence[Device], connections: int, rate: float | None, organisation: UUID
    ) -> None:
        super().__init__(port, devices, connections, rate)
        self._organisation = organisation
        self._devices = devices

    def _link(self) -> MqttLink:
        return MqttLink(self._port)

    async def _attempt(self, link: MqttLink, device: Device, kind: Kind, number: int) -> Fate:
        try:
            await link.connect()
        except (OSError, EOFError, TimeoutError) as error:
            self.journal.failures[f"no connection: {type(error).__name__}"] += 1
            await asyncio.sleep(random.uniform(*WAIT_S))
            return Fate.NOT_KEPT
        try:
            await link.publish(f"v1/readings/{self._organisation}/{device.device}", device.body(kind, number))
        except (OSError, EOFError, TimeoutError) as error:
            self.journal.failures[f"not acknowledged: {type(error).__name__}"] += 1
            return Fate.UNKNOWN
        return Fate.ACKNOWLEDGED

    async def end(self) -> list[tuple[Device, Reading]]:
        """After `stop`: a last message of each device, and a reading of it. What came before it has landed by then.

        A device's messages are taken in their order.
        """
        link = self._link()
        last: list[tuple[Device, Reading]] = []
        try:
            for device in self._devices:
                number = self.journal.begin(device, Kind.BATCH)
                for _ in range(LAST_TRIES):
                    fate = await self._attempt(link, device, Kind.BATCH, number)
                    if fate is Fate.ACKNOWLEDGED:
                        break
                self.journal.end(device, Kind.BATCH, number, fate)
                last.append((device, device.readings(Kind.BATCH, number)[-1]))
        finally:
            link.close()
        return last
