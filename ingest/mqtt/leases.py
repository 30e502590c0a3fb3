"""Which sessions this bridge may have: leases in the database, as of partitions in landing.

A lease decides who may connect; who is connected is the broker's to say, which has one connection a session. Left
out: the connection (`session`).
"""

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from ingest.mqtt.settings import BridgeSettings
from ingest.registry import Connections, ask
from runtime.clock import Clock
from runtime.errors import UnavailableError

_log = logging.getLogger("sluice.bridge.leases")

_LEASE: Final = "SELECT * FROM lease_mqtt_slots($1, $2, $3, $4, $5::text[])"
_LEAVE: Final = """
WITH left_behind AS (DELETE FROM mqtt_bridges WHERE bridge = $2)
UPDATE mqtt_slots SET bridge = NULL, lease_until = '-infinity' WHERE broker = $1 AND bridge = $2"""
_FILTERS: Final = """
UPDATE mqtt_slots SET filters = $4 WHERE broker = $1 AND slot = $2 AND bridge = $3 RETURNING slot"""
_SETTLED: Final = """
UPDATE mqtt_slots SET settled = greatest(settled, $4)
WHERE broker = $1 AND slot = $2 AND bridge = $3 RETURNING slot"""


@dataclass(eq=False)
class Lease:
    """One session, held without a break since it was taken. A lease taken again is another one."""

    slot: str
    session: UUID
    fence: int
    """Higher than of every earlier lease of the session."""
    settled: int = 0
    """Of what was delivered before this number, nothing is sent again."""
    filters: list[str] = field(default_factory=list)
    """What the session is known to be subscribed to."""


class Leases:
    """The leases of one bridge. `run` keeps them; everyone else reads `held` and waits for `changed`."""

    def __init__(self, pool: Connections, settings: BridgeSettings, slots: list[str], clock: Clock) -> None:
        self._pool = pool
        self._settings = settings
        self._slots = slots
        self._clock = clock
        self._bridge = uuid4()
        self._valid_until = float("-inf")
        self._releasing: set[str] = set()
        self._wanted = asyncio.Event()
        self.held: dict[str, Lease] = {}
        self.surplus: frozenset[str] = frozenset()
        """Held beyond the fair share: to be given up when what is in flight is done."""
        self.changed = asyncio.Event()
        self.trouble: str | None = "no lease was asked for yet"

    @property
    def is_valid(self) -> bool:
        """Whether no lease of this bridge can have ended yet."""
        return self._clock.monotonic() < self._valid_until

    def holds(self, lease: Lease) -> bool:
        """Whether nobody else can have its session by now."""
        return self.is_valid and self.held.get(lease.slot) is lease

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            try:
                await self._renew()
            except UnavailableError as error:
                if self.trouble is None:
                    _log.warning("leases of sessions cannot be renewed", extra={"reason": str(error)})
                self.trouble = f"leases of sessions cannot be renewed: {error}"
            try:
                async with asyncio.timeout(self._settings.mqtt_lease_renew_s):
                    await self._wanted.wait()
            except TimeoutError:
                continue

    def release(self, slot: str) -> None:
        """Give it up with the next renewal: the session is not connected any more."""
        if slot in self.held:
            self._releasing.add(slot)
        self._wanted.set()

    async def subscribed(self, lease: Lease, filters: list[str]) -> None:
        """Remember what the session is subscribed to. Raises `UnavailableError`."""
        await self._ask(_FILTERS, self._settings.mqtt_broker, lease.slot, self._bridge, filters)
        lease.filters = filters

    async def settled(self, lease: Lease, number: int) -> None:
        """Remember that of what was delivered before this number nothing is sent again. Raises `UnavailableError`."""
        await self._ask(_SETTLED, self._settings.mqtt_broker, lease.slot, self._bridge, number)
        lease.settled = number

    async def leave(self) -> None:
        """Give everything up at once; nothing of this bridge is connected any more."""
        self.held.clear()
        self._valid_until = float("-inf")
        try:
            await self._ask(_LEAVE, self._settings.mqtt_broker, self._bridge)
        except UnavailableError as error:
            ttl = self._settings.mqtt_lease_ttl_s
            _log.warning(
                "leases could not be given back; others take them when they end",
                extra={"reason": str(error), "seconds": ttl},
            )

    async def _renew(self) -> None:
        self._wanted.clear()
        releasing = sorted(self._releasing)
        settings, began = self._settings, self._clock.monotonic()
        ttl = timedelta(seconds=settings.mqtt_lease_ttl_s)
        rows = await self._ask(_LEASE, settings.mqtt_broker, self._slots, self._bridge, ttl, releasing)
        self._releasing.difference_update(releasing)
        self._valid_until = began + settings.mqtt_lease_ttl_s
        self._take(rows)
        self.trouble = None

    def _take(self, rows: list[Any]) -> None:
        """Make `held` and `surplus` what the database says."""
        found = {row["held"] for row in rows}
        for slot in self.held.keys() - found:
            del self.held[slot]
            self.changed.set()
        for row in rows:
            slot = row["held"]
            if row["taken"] or slot not in self.held:
                self.held[slot] = Lease(
                    slot, row["session_id"], row["fence_number"], row["settled_number"], list(row["known_filters"])
                )
                self.changed.set()
                _log.info("a session was taken", extra={"slot": slot, "fence": row["fence_number"]})
        share = rows[0]["fair_share"] if rows else 0
        surplus = frozenset(sorted(found)[share:])
        if surplus != self.surplus:
            self.surplus = surplus
            self.changed.set()

    async def _ask(self, query: str, *arguments: Any) -> list[Any]:
        # Half the time a lease lasts: a session gone silent leaves time for another.
        return await ask(self._pool, query, *arguments, timeout_s=self._settings.mqtt_lease_ttl_s / 2)
