"""Sends the commands that wait, and ends those whose time is over.

What is published of a command is fixed in its row before the first time, so whoever sends it again, after a crash
or beside another, sends the same bytes. It is noted as sent once the broker has acknowledged it; while the broker is
away it waits. Every worker may do this: a claim in the row keeps them apart as a rule, and the commands of one device
go one after the other. Left out: what the device answers, which a bridge notes.
"""

import asyncio
import logging
import math
import random
from contextlib import suppress
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import msgspec

from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.mqtt import Client, DisconnectedError, Endpoint, RefusedError, connected
from runtime.notifications import Notifications
from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from runtime.secrets import BadSealError, KeyRing, Seal
from schemas.commands import TooLargeError, Way, message, topic
from schemas.plants import COMMANDS_CHANNEL, SECRET_SEAL
from schemas.signing import NotCanonicalError
from workers.commands.metrics import CommandsMetrics
from workers.commands.settings import CommandsSettings
from workers.upkeep import repeat

_log = logging.getLogger("sluice.commands")

ROLE: Final = "sluice_worker"
APPLICATION: Final = "sluice commands"
_TIMED_OUT_AT_ONCE: Final = 1_000
#: Nothing is sent to us: we subscribe to nothing.
_MESSAGES_MAX: Final = 1_000

_CLAIM: Final = "SELECT * FROM claim_commands($1, $2 * interval '1 second', $3)"
_FIX: Final = "SELECT * FROM fix_command($1, $2, $3)"
_SENT: Final = """
SELECT command_sent(c.command_id) AS is_news, extract(epoch FROM clock_timestamp() - c.created_at)::float8 AS waited_s
FROM commands c WHERE c.command_id = $1
"""
_UNSENDABLE: Final = "SELECT command_unsendable($1, $2)"
_TIMED_OUT: Final = "SELECT commands_timed_out($1)"
_WAITING: Final = """
SELECT count(*) AS waiting, coalesce(extract(epoch FROM now() - min(c.created_at)), 0)::float8 AS oldest_s
FROM commands c JOIN devices d ON d.device_id = c.device_id LEFT JOIN plants p ON p.device_id = c.device_id
WHERE c.state = 'PENDING' AND c.expires_at > now() AND d.status = 'active'
  AND coalesce(p.lifecycle, 'ACTIVE') = 'ACTIVE'
"""


class Commands:
    """One worker's part. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: CommandsSettings,
        broker: Endpoint | None,
        ring: KeyRing | None,
        clock: Clock,
        metrics: CommandsMetrics,
    ) -> None:
        """Without a broker, commands only time out; without keys, those that have to be signed cannot be sent."""
        self._postgres = postgres
        self._settings = settings
        self._broker = broker
        self._seal = None if ring is None else Seal(ring, SECRET_SEAL)
        self._clock = clock
        self._metrics = metrics
        self._sender = uuid4()
        self._wanted = asyncio.Event()
        # Mosquitto ends the connection after a refusal, which is then why.
        self._refusal: str | None = None
        self.trouble: str | None = None
        """Why nothing can be sent right now."""

    async def run(self) -> None:
        """Send and look, for ever."""
        every_s = self._settings.commands_check_s
        async with asyncio.TaskGroup() as tasks:
            looking = repeat(self.look, every_s, _log, "it could not be looked which commands wait")
            tasks.create_task(looking, name="commands look")
            if self._broker is not None:
                tasks.create_task(self._listen(), name="commands listen")
                tasks.create_task(self._keep_sending(self._broker), name="commands send")

    async def look(self) -> None:
        """Ends what has timed out, and counts what waits. Raises what the database raises."""
        connection = await connect(self._postgres, role=ROLE, application=APPLICATION)
        try:
            ended = _TIMED_OUT_AT_ONCE
            while ended == _TIMED_OUT_AT_ONCE:
                ended = await connection.fetchval(_TIMED_OUT, _TIMED_OUT_AT_ONCE)
                self._metrics.commands.labels("timed_out").inc(ended)
            row = await connection.fetchrow(_WAITING)
            self._metrics.waiting.set(row["waiting"])  # type: ignore[index]
            self._metrics.oldest.set(row["oldest_s"])  # type: ignore[index]
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()

    async def _listen(self) -> None:
        notifications = Notifications(self._postgres, role=ROLE, application=APPLICATION)
        while True:
            with suppress(UnavailableError):  # they are looked for meanwhile
                await notifications.listen(COMMANDS_CHANNEL, lambda *_: self._wanted.set())
            await asyncio.sleep(self._settings.commands_check_s)

    # ------------------------------------------------------------ while the broker is there

    async def _keep_sending(self, broker: Endpoint) -> None:
        settings = self._settings
        least_s, most_s = settings.commands_retry_min_ms / 1000, settings.commands_retry_max_ms / 1000
        retry_s = least_s
        while True:
            began = self._clock.monotonic()
            try:
                await self._send_over(broker)
            except UnavailableError as error:
                self._tell(self._refusal or str(error))
            except Exception as error:
                _log.exception("commands cannot be sent")
                self.trouble = f"commands cannot be sent: {error}"
            finally:
                self._metrics.connected.set(0)
            if self._clock.monotonic() - began > most_s:
                retry_s = least_s
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads, hides nothing
            retry_s = min(2 * retry_s, most_s)

    async def _send_over(self, broker: Endpoint) -> None:
        """Until the connection ends. Raises `UnavailableError`."""
        client = f"sluice-commands-{self._sender.hex}"
        timeout_s = self._settings.commands_timeout_s
        self._refusal = None
        async with connected(broker, client, timeout_s=timeout_s, messages_max=_MESSAGES_MAX) as opened:
            self._metrics.connected.set(1)
            sending = asyncio.create_task(self._send_what_comes(opened), name="commands to the broker")
            try:
                watching = asyncio.create_task(_until_it_ends(opened), name="commands connection")
                done, _ = await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in (sending, watching):
                    task.cancel()
                await asyncio.gather(sending, watching, return_exceptions=True)

    async def _send_what_comes(self, client: Client) -> None:
        """Raises `DisconnectedError`; the database may be away meanwhile."""
        while True:
            self._wanted.clear()
            self._refusal = None
            try:
                await self._send_all(client)
                self._tell(self._refusal)
            except DisconnectedError:
                raise
            except (*UNAVAILABLE, UnavailableError, asyncpg.PostgresError) as error:
                self._tell(f"the database cannot be asked for commands: {str(error) or type(error).__name__}")
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.commands_check_s):
                    await self._wanted.wait()

    async def _send_all(self, client: Client) -> None:
        connection = await connect(self._postgres, role=ROLE, application=APPLICATION)
        try:
            while await self._send_some(connection, client):
                pass
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()

    async def _send_some(self, connection: Any, client: Client) -> bool:
        """The first of each device. Whether one of them went, so that others may follow."""
        settings = self._settings
        claim = self._sender, settings.commands_claim_s, settings.commands_batch_max
        went = False
        rows, claimed_s = await connection.fetch(_CLAIM, *claim), self._clock.monotonic()
        for row in rows:
            left_s = row["left_s"] - (self._clock.monotonic() - claimed_s)
            # It has timed out where those before it took that long: nobody expects it to be carried out any more.
            went |= left_s <= 0 or await self._send(connection, client, row, left_s)
        return went

    async def _send(self, connection: Any, client: Client, row: Any, left_s: float) -> bool:
        """Whether it waits no longer."""
        command = row["id"]
        where, what = row["fixed_topic"], row["fixed_message"]
        if what is None:
            try:
                made = self._make(row)
            except (NotCanonicalError, TooLargeError, BadSealError) as error:
                await self._give_up(connection, command, str(error))
                return True
            fixed = await connection.fetchrow(_FIX, command, _topic(row), made.decode())
            if fixed is None:
                return True
            where, what = fixed
        try:
            await client.send(where, what.encode(), expires_s=math.ceil(left_s))
        except RefusedError as error:
            self._metrics.commands.labels("refused").inc()
            self._refusal = f"the broker refuses a command: {error}"
            return False
        self._metrics.commands.labels("sent").inc()
        if (noted := await connection.fetchrow(_SENT, command)) is not None:
            self._metrics.sent_seconds.observe(noted["waited_s"])
        return True

    def _tell(self, trouble: str | None) -> None:
        """Once of each cause that begins."""
        if trouble is not None and self.trouble is None:
            _log.warning("commands cannot be sent", extra={"reason": trouble})
        self.trouble = trouble

    async def _give_up(self, connection: Any, command: Any, reason: str) -> None:
        _log.warning("a command cannot be sent", extra={"command": str(command), "reason": reason})
        self._metrics.commands.labels("unsendable").inc()
        await connection.execute(_UNSENDABLE, command, reason)

    def _make(self, row: Any) -> bytes:
        """Raises `NotCanonicalError`, `TooLargeError`, `BadSealError`."""
        secret = None
        if row["sealed"] is not None:
            if self._seal is None:
                raise BadSealError("SLUICE_SECRET_KEYS is not set where commands are sent")
            secret = self._seal.open(row["sealed"])
        return message(
            _uuid(row["device"]),
            _uuid(row["id"]),
            row["action"],
            msgspec.json.decode(row["arguments"]),
            row["behind"],
            ts_ms=self._clock.now_us() // 1000,
            secret=secret,
        )


async def _until_it_ends(client: Client) -> None:
    """Raises why."""
    async for _ in client.messages:
        pass


def _topic(row: Any) -> str:
    return topic(Way(row["by_way"]), _uuid(row["organisation"]), _uuid(row["device"]), row["action"])


def _uuid(value: Any) -> UUID:
    """The driver has a kind of its own."""
    return UUID(int=value.int)
