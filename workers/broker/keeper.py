"""Keeps whom the broker knows equal to the registry: at the start, when something changes, and now and then.

One process does it at a time, under a lock that its session with the database holds, on the broker's host. The
broker itself says how far it is, so that whoever goes on needs to know nothing: each step may be repeated. While the
database is away nothing changes at the broker. Left out: what is said to the broker (`planning`).
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from runtime.errors import ConfigurationError, SluiceError, UnavailableError
from runtime.mqtt import connected, endpoint
from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from runtime.secrets import BadSealError, KeyRing, Seal
from schemas.plants import HANDOVER_SEAL, PLANTS_CHANNEL
from workers.broker.control import ANSWERS_MAX, CLIENT_ID, Control
from workers.broker.lists import ListFile
from workers.broker.metrics import BrokerMetrics
from workers.broker.planning import NO_PASSWORD, Client, Command, Entry, commands_for, in_order, mark_of, plugin_file
from workers.broker.settings import BrokerSettings

_log = logging.getLogger("sluice.broker")

ROLE: Final = "sluice_worker"
VARIABLE: Final = "SLUICE_BROKER_URL"
#: One for devices, one for sites.
_LOCKS: Final = {"devices": 0x736C_7569_6365_0006, "sites": 0x736C_7569_6365_0007}
#: So often it is looked whether database and broker are there.
_PROBE_S: Final = 10.0
#: Devices and sites that changed and wait; beyond it, everything is compared.
_CHANGED_MAX: Final = 1_000

_ALONE: Final = "SELECT pg_try_advisory_lock($1)"
_CLIENTS: Final = """
SELECT user_name, subject_id, hash, enabled, revoked, changes_at FROM broker_clients
WHERE ($1::uuid[] IS NULL OR subject_id = ANY ($1)) AND ($2 = 'all' OR (kind = 'SITE') = ($2 = 'sites'))
ORDER BY subject_id
"""
_HANDOVERS: Final = """
SELECT subject_id, hash, sealed FROM broker_handovers WHERE $1::uuid[] IS NULL OR subject_id = ANY ($1)
"""
_HANDED_OVER: Final = """
DELETE FROM broker_handovers h USING unnest($1::uuid[], $2::text[]) d(subject_id, hash)
WHERE h.subject_id = d.subject_id AND h.hash = d.hash
"""


class OwnUser(NamedTuple):
    """One of our own, which the settings know."""

    mark: str
    password: str


class Trouble(Exception):  # noqa: N818 - it unwinds to the next attempt
    """It has to be begun anew; `part` is whose fault it is."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(reason)
        self.part = part


class Keeper:
    """`run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: BrokerSettings,
        ring: KeyRing,
        own: Mapping[str, OwnUser],
        lists: ListFile | None,
        metrics: BrokerMetrics,
    ) -> None:
        """`lists`: None for a broker that takes no certificates."""
        self._postgres = postgres
        self._settings = settings
        self._broker = endpoint(settings.broker_url, VARIABLE)
        self._seal = Seal(ring, HANDOVER_SEAL)
        self._own = own
        self._lists = lists
        self._metrics = metrics
        self._there: dict[str, Entry] = {}
        self._wanted: dict[str, Client] = {}
        #: What a device or site is called there, as it was last seen.
        self._names: dict[UUID, str] = {}
        self._changed: set[UUID] = set()
        self._compare_all = True
        self._lists_at = 0.0
        self._told_at = 0.0
        self._wake = asyncio.Event()
        self.trouble: str | None = "it has not compared anything yet"

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self._keep()
            except Trouble as error:
                if self.trouble != str(error):
                    _log.warning("the broker's identities are not kept", extra={"reason": str(error)})
                self.trouble = str(error)
                if error.part:
                    self._metrics.failures.labels(error.part).inc()
            await asyncio.sleep(self._settings.broker_retry_s)

    async def _keep(self) -> None:
        """Until something is away. Raises `Trouble`."""
        try:
            connection: Any = await connect(self._postgres, role=ROLE, application="sluice broker")
        except SluiceError as error:
            raise Trouble("database", str(error)) from error
        try:
            for whose, lock in _LOCKS.items():
                if self._settings.broker_keeps in ("all", whose) and not await connection.fetchval(_ALONE, lock):
                    raise Trouble("", f"another process keeps those of {whose}, see SLUICE_BROKER_KEEPS")
            connection.add_termination_listener(lambda _: self._wake.set())
            await connection.add_listener(PLANTS_CHANNEL, self._hear)
            await self._with_broker(connection)
        except (*UNAVAILABLE, asyncpg.PostgresError) as error:
            raise Trouble("database", f"the database is away: {error or type(error).__name__}") from error
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close(timeout=self._settings.broker_retry_s)

    async def _with_broker(self, connection: Any) -> None:
        timeout_s = self._settings.broker_timeout_s
        try:
            async with connected(self._broker, CLIENT_ID, timeout_s=timeout_s, messages_max=ANSWERS_MAX) as client:
                control = Control(client, timeout_s)
                await control.open()
                self._compare_all = True
                if self._lists is not None:
                    self._lists.forget()
                while True:
                    await self._rounds(connection, control)
                    await asyncio.sleep(self._settings.broker_retry_s)
        except UnavailableError as error:
            raise Trouble("broker", str(error)) from error

    # ------------------------------------------------------------ when

    def _hear(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        try:
            self._changed.add(UUID(payload))
        except ValueError:
            self._compare_all = True
        if len(self._changed) > _CHANGED_MAX:
            self._compare_all = True
        self._wake.set()

    async def _rounds(self, connection: Any, control: Control) -> None:
        """All once, then what changes, until all is due again."""
        again_at = time.monotonic() + self._settings.broker_check_s
        await self._compare(connection, control, None)
        while time.monotonic() < again_at and not self._compare_all:
            await self._pause(again_at)
            due = self._due()
            if due or self._lists_due():
                await self._compare(connection, control, due)
            else:  # what has ended tells nothing
                await connection.fetchval("SELECT true")
                await control.settle()
                if self.trouble is None:
                    self._metrics.agreed.set_to_current_time()
        self._compare_all = True

    async def _pause(self, again_at: float) -> None:
        """Until something is told, or falls due by its time."""
        # A signal has the broker check every password again: what is revoked in a row shares one.
        await asyncio.sleep(max(0.0, self._told_at + self._settings.broker_retry_s - time.monotonic()))
        if self._lists is not None:
            again_at = min(again_at, self._lists_at)
        ends = [one.changes_at for one in self._wanted.values() if one.changes_at is not None]
        wait_s = min(_PROBE_S, again_at - time.monotonic())
        if ends:
            wait_s = min(wait_s, (min(ends) - datetime.now(UTC)).total_seconds())
        with suppress(TimeoutError):
            async with asyncio.timeout(max(wait_s, self._settings.broker_retry_s / 10)):
                await self._wake.wait()
        self._wake.clear()

    def _due(self) -> list[UUID]:
        now = datetime.now(UTC)
        wanted = ((subject, self._wanted.get(name)) for subject, name in self._names.items())
        due = {one for one, client in wanted if client and client.changes_at and client.changes_at <= now}
        due |= self._changed
        self._changed.clear()
        return sorted(due)

    def _lists_due(self) -> bool:
        return self._lists is not None and time.monotonic() >= self._lists_at

    # ------------------------------------------------------------ what

    async def _compare(self, connection: Any, control: Control, subjects: Sequence[UUID] | None) -> None:
        """Of these, or of all. Raises as `Control`, and what the database raises."""
        if subjects is None:
            self._compare_all = False
            self._changed.clear()
            self._there = await control.entries()
        hashes = await self._ask(connection, subjects)
        if subjects is None:
            names = self._wanted.keys() | self._there.keys()
        else:
            names = {self._name(one) for one in subjects}
        plain = await self._handed_over(connection, subjects)
        names, beyond = self._bounded(names)
        planned = [
            commands_for(name, self._wanted.get(name), self._there.get(name), self._password(name, plain))
            for name in sorted(names)
        ]
        planned = in_order(some for some in planned if some)
        is_brought = await self._lists_brought(control, planned)
        if not is_brought:
            planned = [self._without_list(some) for some in planned]
        is_done = await self._apply(control, planned) and is_brought
        await self._tell_handed_over(connection, hashes, plain)
        self._show(beyond, is_done=is_done)

    def _name(self, subject: UUID) -> str:
        """Devices are called by their ids, and are those that nothing is known of yet."""
        return self._names.get(subject, str(subject))

    async def _ask(self, connection: Any, subjects: Sequence[UUID] | None) -> dict[str, tuple[UUID, str]]:
        """What is wanted now; by user name, whose it is and the hash of each that has one."""
        rows = await connection.fetch(_CLIENTS, subjects, self._settings.broker_keeps)
        if subjects is None:
            self._wanted = {name: Client(user.mark, is_enabled=True) for name, user in self._own.items()}
            self._names = {}
        else:
            for subject in subjects:
                self._wanted.pop(self._name(subject), None)
        for row in rows:
            self._names[row["subject_id"]] = row["user_name"]
            self._wanted[row["user_name"]] = wanted_client(row, with_certificates=self._lists is not None)
        return {row["user_name"]: (row["subject_id"], row["hash"]) for row in rows if row["hash"] is not None}

    def _bounded(self, names: set[str]) -> tuple[set[str], int]:
        """Without those that would be more than the broker is to carry."""
        room = self._settings.broker_clients_max - sum(one.is_ours for one in self._there.values())
        new = sorted(name for name in names & self._wanted.keys() - self._there.keys() if self._wanted[name].is_there)
        left_out = new[max(room, 0) :]
        return names - set(left_out), len(left_out)

    def _password(self, name: str, plain: Mapping[str, tuple[str, str]]) -> str | None:
        if name in self._own:
            return self._own[name].password
        mark, password = plain.get(name, ("", None))
        return password if name in self._wanted and self._wanted[name].mark == mark else None

    async def _handed_over(self, connection: Any, subjects: Sequence[UUID] | None) -> dict[str, tuple[str, str]]:
        """By user name, which password is on its way: its mark, and it."""
        found = {}
        for row in await connection.fetch(_HANDOVERS, subjects):
            with suppress(BadSealError):
                found[self._name(row["subject_id"])] = (mark_of(row["hash"]), self._seal.open(row["sealed"]).decode())
        return found

    async def _tell_handed_over(
        self, connection: Any, hashes: Mapping[str, tuple[UUID, str]], plain: Mapping[str, tuple[str, str]]
    ) -> None:
        done = [
            hashes[name]
            for name in plain
            if name in hashes and name in self._there and self._there[name].mark == mark_of(hashes[name][1])
        ]
        if done:
            await connection.execute(_HANDED_OVER, [subject for subject, _ in done], [hashed for _, hashed in done])

    # ------------------------------------------------------------ doing it

    async def _lists_brought(self, control: Control, planned: Sequence[Sequence[Command]]) -> bool:
        """Whether the broker checks certificates by what is revoked now."""
        needed = any(command.needs_list for some in planned for command in some)
        if self._lists is None or not (needed or self._lists_due()):
            return True
        try:
            told, ends = await self._lists.bring()
        except (SluiceError, *UNAVAILABLE) as error:
            self._lists_at = time.monotonic() + self._settings.broker_retry_s
            self._metrics.failures.labels("list").inc()
            _log.warning("the broker has no new list of revoked certificates", extra={"reason": str(error)})
            return False
        if told:
            self._told_at = time.monotonic()
            await control.settle()
        self._lists_at = time.monotonic() + self._settings.broker_crl_check_s
        self._metrics.list_ends.set(ends.timestamp())
        return True

    def _without_list(self, commands: Sequence[Command]) -> list[Command]:
        """What can be done at once; the rest is looked at again when the list is."""
        if any(command.needs_list for command in commands):
            self._changed.add(UUID(commands[0].user_name))  # a device: sites have no certificates
        return [command for command in commands if not command.needs_list]

    async def _apply(self, control: Control, planned: Sequence[Sequence[Command]]) -> bool:
        """Whether the broker took all of it."""
        commands = [command for some in planned for command in some]
        size, is_done = self._settings.broker_batch_max, True
        for at in range(0, len(commands), size):
            batch = commands[at : at + size]
            answers = await control.say([command.body for command in batch])
            for command, answer in zip(batch, answers, strict=False):
                is_done = self._note(command, answer) and is_done
            if len(answers) < len(batch):
                raise UnavailableError("the broker answered fewer commands than it was given")
        return is_done

    def _note(self, command: Command, answer: Mapping[str, Any]) -> bool:
        if "error" in answer:
            self._metrics.failures.labels("command").inc()
            self._compare_all = True
            _log.warning(
                "the broker refused a command",
                extra={"command": command.body["command"], "client": command.user_name, "reason": answer["error"]},
            )
            return False
        self._metrics.changes.labels(command.kind).inc()
        if command.leaves is None:
            self._there.pop(command.user_name, None)
        else:
            self._there[command.user_name] = command.leaves
        return True

    def _show(self, beyond: int, *, is_done: bool) -> None:
        waiting = [name for name, one in self._wanted.items() if self._waits(name, one)]
        states = {
            "wanted": sum(one.is_there for one in self._wanted.values()),
            "there": sum(one.is_ours for one in self._there.values()),
            "waiting": len(waiting),
            "beyond": beyond,
        }
        for state, count in states.items():
            self._metrics.clients.labels(state).set(count)
        if is_done and self.trouble is not None:
            _log.info("the broker's identities are kept", extra={"whose": self._settings.broker_keeps})
        self.trouble = None if is_done else "the broker did not take everything: see the log"
        if is_done:
            self._metrics.agreed.set_to_current_time()

    def _waits(self, name: str, client: Client) -> bool:
        entry = self._there.get(name)
        return client.is_enabled and client.mark != NO_PASSWORD and entry is not None and entry.mark != client.mark


def wanted_client(row: Any, *, with_certificates: bool) -> Client:
    """As the registry wants one; certificates say nothing about a broker that takes none."""
    revoked = row["revoked"].isoformat() if with_certificates and row["revoked"] is not None else ""
    return Client(mark_of(row["hash"]), is_enabled=row["enabled"], revoked=revoked, changes_at=row["changes_at"])


async def seeded(
    connection: Any,
    own: Mapping[str, OwnUser],
    own_hashes: Mapping[str, str],
    settings: BrokerSettings,
    *,
    with_certificates: bool,
) -> dict[str, Any]:
    """What the plugin is to read at its start. Raises `ConfigurationError` for more clients than it may carry."""
    most = settings.broker_clients_max
    rows = await connection.fetch(_CLIENTS, None, settings.broker_keeps)
    clients = {name: Client(user.mark, is_enabled=True) for name, user in own.items()}
    clients |= {row["user_name"]: wanted_client(row, with_certificates=with_certificates) for row in rows}
    clients = {name: client for name, client in clients.items() if client.is_there}
    if len(clients) > most:
        raise ConfigurationError(f"SLUICE_BROKER_CLIENTS_MAX={most}: there are {len(clients)} clients with passwords")
    hashes = {row["user_name"]: row["hash"] for row in rows if row["hash"] is not None}
    return plugin_file(clients, {**hashes, **own_hashes})
