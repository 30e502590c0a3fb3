"""One session, while this bridge has its lease: connected again and again, subscribed to its family's topics.

Nothing is read while the log cannot take it: the connection is dropped, and the broker keeps what is not
acknowledged. Left out: what is done with a message (`intake`), and who has which session (`leases`).
"""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from ingest.mqtt import packets
from ingest.mqtt.connection import Bounds, ClosedError, Connection, Message
from ingest.mqtt.intake import Intake, Source
from ingest.mqtt.leases import Lease, Leases
from ingest.mqtt.metrics import BridgeMetrics
from ingest.mqtt.packets import VERSIONS, Connack, Filter, Login, Version
from ingest.mqtt.settings import BridgeSettings
from ingest.mqtt.topics import RETAINED, Family, Router
from ingest.mqtt.window import Window
from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.mqtt import Endpoint

_log = logging.getLogger("sluice.bridge")

_TICK_S: Final = 1.0
_LOOK_S: Final = 0.1
#: After so long a connection was a good one, and the next wait is a short one.
_GOOD_S: Final = 10.0
_STORED: Final = "$SYS/broker/store/messages/count"
_DROPPED: Final = "$SYS/broker/publish/messages/dropped"


class Broker:
    """What all sessions with one broker have in common."""

    def __init__(self, endpoint: Endpoint, settings: BridgeSettings) -> None:
        self.address = endpoint.address
        self.version: Version = VERSIONS[settings.mqtt_version]
        self._user = endpoint.user
        self._password = endpoint.password
        self._settings = settings
        self.bounds = Bounds(
            # QoS 0 knows no bound of the broker's: it is not to keep the answers to pings from being read either.
            settings.mqtt_in_flight_max * 2,
            settings.mqtt_in_flight_bytes_max,
            settings.mqtt_message_bytes_max,
            settings.mqtt_timeout_s,
        )

    def login(self, lease: Lease) -> Login:
        settings = self._settings
        return Login(
            f"sluice-{lease.session.hex}",
            self._user,
            self._password,
            settings.mqtt_keep_alive_s,
            settings.mqtt_session_expiry_s,
            settings.mqtt_in_flight_max,
        )


class Session:
    """`run` is all of it; `stop` ends it in order, cancelling it at once."""

    def __init__(
        self,
        broker: Broker,
        family: Family,
        lease: Lease,
        leases: Leases,
        *,
        intake: Intake,
        router: Router,
        settings: BridgeSettings,
        clock: Clock,
        metrics: BridgeMetrics,
        log_trouble: Callable[[], str | None],
    ) -> None:
        self._broker = broker
        self._family = family
        self.lease = lease
        self._leases = leases
        self._take = partial(self._route, intake, Source(family.name, router))
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._log_trouble = log_trouble
        self._window = Window(lease.session.bytes, lease.fence, lease.settled)
        self._settled = 0
        self._news = asyncio.Event()
        self._connection: Connection | None = None
        self._is_stopping = False
        self._retry_s = settings.mqtt_retry_min_ms / 1000
        self.trouble: str | None = "it is not connected yet"

    @property
    def in_flight(self) -> int:
        return self._window.waiting

    @property
    def oldest_us(self) -> int | None:
        """When the oldest message in flight came."""
        return self._window.oldest_us

    async def run(self) -> None:
        """Until cancelled or stopped."""
        while not self._is_stopping:
            await self._until_usable()
            began = self._clock.monotonic()
            try:
                await self._connect_and_take()
            except ClosedError as error:
                self._ended(str(error))
            if self._clock.monotonic() - began > _GOOD_S:
                self._retry_s = self._settings.mqtt_retry_min_ms / 1000
            if not self._is_stopping:
                await asyncio.sleep(self._retry_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads, hides nothing
                self._retry_s = min(2 * self._retry_s, self._settings.mqtt_retry_max_ms / 1000)

    async def stop(self) -> None:
        """Take nothing more, acknowledge what becomes durable in time, and leave the session to the broker."""
        self._is_stopping = True
        if self._connection is not None:
            await self._connection.close(within_s=self._settings.mqtt_stop_timeout_s)
            await self._remember()

    def _settle(self, number: int) -> None:
        self._settled = number
        if self._window.is_settled:
            self._news.set()

    async def _remember(self) -> None:
        """Let whoever has the session next know what is over."""
        if self._settled > self.lease.settled and self._leases.holds(self.lease):
            with suppress(UnavailableError):  # it is told again
                await self._leases.settled(self.lease, self._settled)

    def abort(self, reason: str) -> None:
        """Cut the connection, now."""
        self._is_stopping = True
        if self._connection is not None:
            self._connection.abort(reason)

    async def _until_usable(self) -> None:
        """The log takes readings, and the session is nobody else's."""
        while not self._is_stopping:
            trouble = self._log_trouble()
            if trouble is None and self._leases.holds(self.lease):
                return
            self.trouble = trouble or "its lease has to be renewed before it is connected again"
            await asyncio.sleep(_LOOK_S)

    async def _connect_and_take(self) -> None:
        if self._is_stopping:
            return
        broker = self._broker
        self._connection = connection = Connection(
            broker.version,
            broker.login(self.lease),
            broker.bounds,
            self._window,
            self._clock,
            holds=lambda: self._leases.holds(self.lease),
            take=self._take,
            settled=self._settle,
        )
        try:
            connack = await connection.open(broker.address)
            await self._subscribe(connection, connack)
            self.trouble = None
            _log.info("connected to the broker", extra={"family": self._family.name})
            while not connection.closed.done():
                await self._pause(connection)
                await self._remember()
                connection.tick()
                if (trouble := self._log_trouble()) is not None:
                    connection.abort(trouble)
            raise ClosedError(connection.reason)
        finally:
            connection.abort("it was given up")

    async def _pause(self, connection: Connection) -> None:
        """A second, or until the connection ends or there is something to be remembered at once."""
        news = asyncio.create_task(self._news.wait())
        either: set[asyncio.Future[Any]] = {connection.closed, news}
        try:
            await asyncio.wait(either, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        self._news.clear()

    async def _subscribe(self, connection: Connection, connack: Connack) -> None:
        """Raises `ClosedError`."""
        lease, wanted = self.lease, [topic.filter for topic in self._family.topics]
        if not connack.session_present and lease.filters:
            self._metrics.sessions_lost.add((self._family.name,))
            _log.error(
                "the broker no longer has the session: what it kept for it is lost",
                extra={"family": self._family.name, "setting": "its persistence, and the expiry of sessions"},
            )
        if stale := sorted(set(lease.filters) - set(wanted)) if connack.session_present else []:
            await connection.unsubscribe(stale)
        # Always: a broker that lost the session has an empty one since somebody connected and got no further.
        filters = [Filter(topic.filter, 1, topic.kind in RETAINED, only_if_new=True) for topic in self._family.topics]
        for code, topic in zip(await connection.subscribe(filters), filters, strict=False):
            if code != 1:
                why = packets.reason(code) if code >= packets.FAILED else "it gives QoS 0 only"
                raise ClosedError(f"the broker refuses the subscription to {topic.pattern}: {why}")
        if lease.filters != wanted:
            with suppress(UnavailableError):  # it is told with the next connection
                await self._leases.subscribed(lease, wanted)
        await self._watch(connection)

    async def _watch(self, connection: Connection) -> None:
        """What Mosquitto says of itself; another broker has no such topics, or does not let us see them."""
        await connection.subscribe([Filter(_STORED, 0, True), Filter(_DROPPED, 0, True)])

    def _route(self, intake: Intake, source: Source, connection: Connection, message: Message) -> None:
        if message.topic.startswith(b"$"):
            self._note(message)
            connection.acknowledge(message)
        else:
            intake.take(source, connection, message)

    def _note(self, message: Message) -> None:
        gauges = {_STORED: self._metrics.broker_stored, _DROPPED: self._metrics.broker_dropped}
        gauge = gauges.get(message.topic.decode(errors="replace"))
        if gauge is not None and message.payload.isdigit():
            gauge.set(int(message.payload[:18]))

    def _ended(self, reason: str) -> None:
        self._metrics.broken.add((self._family.name,))
        if self._is_stopping:
            return
        if self.trouble is None:
            _log.warning("the connection to the broker ended", extra={"family": self._family.name, "reason": reason})
        self.trouble = reason
