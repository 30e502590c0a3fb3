"""Partitions that land by themselves while the database refuses records of them; the others go on in between.

What is read of them waits here. In each turn one partition lands what waits, in a transaction of its own. If that is
refused, its records are tried in ever smaller groups, all in one transaction that is rolled back, for a bounded time;
the next turn lands those that were tried, the culprits as rejected. Left out: the reading (`pipeline`), what is told
of culprits (`worker`), the statements (`store`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Final

from runtime.clock import Clock
from runtime.log.port import Slice
from schemas.record import PG_EPOCH_US, UnknownVersionError
from workers.landing.failures import Cause, cause_of
from workers.landing.holding import Aside, Holding, bounds_of
from workers.landing.late import SpoolJumpError
from workers.landing.plan import Plan
from workers.landing.registry import Registry, settle
from workers.landing.tombstones import Tombstones
from workers.settings import LandingSettings

_log = logging.getLogger("sluice.landing")

# How long the others wait while culprits are looked for.
_TURN_S: Final = 0.25
# A partition with a culprit in it would cost the others a batch with each further one.
_QUIET_S: Final = 10.0
# Into so many a refused group is divided: few trials for one culprit among thousands, and for every second one.
_PARTS: Final = 8

Attempt = Callable[[Plan], Awaitable[str | None]]
"""Writes a plan; what the database says if it refuses the content."""


class Apart:
    """The partitions of `holdings` that are set aside. `land` commits, what `trial` gives takes back."""

    def __init__(
        self,
        holdings: Mapping[int, Holding],
        registry: Registry,
        settings: LandingSettings,
        *,
        land: Attempt,
        trial: Callable[[Plan], AbstractAsyncContextManager[Attempt]],
        reject: Callable[[int, Mapping[int, str], set[bytes]], None],
        clock: Clock,
        tombstones: Tombstones,
    ) -> None:
        """`registry` is this one's own: it is asked while the next plan of the others is prepared.

        `reject` is told a partition, its culprits by position with what the database said, and whose they are; it may
        raise.
        """
        self._holdings = holdings
        self._registry = registry
        self._settings = settings
        self._bounds = bounds_of(settings)
        self._land = land
        self._trial = trial
        self._reject = reject
        self._clock = clock
        self._tombstones = tombstones
        self._last = -1
        self.landing: Plan | None = None
        """What is being written."""

    @property
    def has_work(self) -> bool:
        return bool(self._waiting())

    def resting(self) -> set[int]:
        """The partitions of which nothing more is to be read for now."""
        asides = {at: holding.aside for at, holding in self._holdings.items()}
        return {at for at, aside in asides.items() if aside is not None and aside.is_resting}

    def keep(self, read: Slice) -> bool:
        """Take what was read of a partition that is set aside; False for any other."""
        aside = self._holdings[read.partition].aside
        if aside is None:
            return False
        aside.bodies += read.bodies
        aside.bytes += sum(map(len, read.bodies))
        if aside.bytes >= self._settings.landing_batch_bytes_max // len(self._holdings):
            aside.is_resting = True
        return True

    async def turn(self) -> bool:
        """Land something of one partition, or find what keeps it from landing.

        False: a partition has gone back to the others and must be read again from where it stands.
        """
        self.landing = None
        waiting = self._waiting()
        partition = min((at for at in waiting if at > self._last), default=min(waiting))
        self._last = partition
        holding, aside = waiting[partition]
        plan = self._plan(holding, aside, 0, aside.tried or aside.attempt)
        if not plan.records:  # it must wait: the usual way says so
            holding.aside = None
            return False
        self.landing = plan
        said = await self._settle_and(self._land, plan)
        self.landing = None
        if said is None:
            self._landed(holding, aside, plan)
        elif not aside.tried:
            await self._sift(holding, aside, plan)
        else:
            self._refused_together(holding, aside, plan, said)
        return True

    def _waiting(self) -> dict[int, tuple[Holding, Aside]]:
        return {
            at: (holding, holding.aside)
            for at, holding in self._holdings.items()
            if holding.aside is not None and holding.aside.bodies and not holding.is_waiting
        }

    def _plan(self, holding: Holding, aside: Aside, first: int, end: int, *, is_trial: bool = False) -> Plan:
        """Of the bodies from `first` to `end`, or to one that must wait, or to a bounded size."""
        plan = Plan(self._registry.limits, self._bounds, self._tombstones)
        part = holding.part(holding.position + first, is_trial=is_trial)
        plan.parts[part.partition] = part
        now = self._clock.now_us() - PG_EPOCH_US
        for body in aside.bodies[first : min(end, first + self._settings.landing_batch_records_max)]:
            try:
                plan.add(part, body, now)
            except (UnknownVersionError, SpoolJumpError):
                break
            if (
                plan.bytes >= self._settings.landing_read_bytes_max
                or plan.weight >= self._settings.landing_batch_rows_max
            ):
                break
        return plan

    async def _settle_and(self, attempt: Attempt, plan: Plan) -> str | None:
        try:
            async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
                await self._registry.refresh()
                until = self._clock.monotonic() + self._settings.landing_refusal_ttl_s
                await settle(plan, self._registry, until)
        except Exception as error:
            if cause_of(error) is not Cause.CONTENT:
                raise
            return str(error)
        return await attempt(plan)

    def _landed(self, holding: Holding, aside: Aside, plan: Plan) -> None:
        (part,) = plan.parts.values()
        holding.landed(part)
        aside.bytes -= sum(map(len, aside.bodies[: plan.records]))
        del aside.bodies[: plan.records]
        if aside.tried:
            aside.tried -= plan.records
        else:
            aside.attempt = min(2 * aside.attempt, self._settings.landing_batch_records_max)
        may_leave = holding.position >= aside.until and self._clock.monotonic() >= aside.quiet_at
        if may_leave and not aside.bodies:
            holding.aside = None
        elif may_leave:
            aside.is_resting = True  # else it may never be without any
        elif aside.bytes < self._settings.landing_read_bytes_max // 4:
            aside.is_resting = False

    async def _sift(self, holding: Holding, aside: Aside, refused: Plan) -> None:
        """Try the refused records in order, in groups that shrink where they are refused, as far as time allows."""
        rejected: dict[int, str] = {}
        organisations: set[bytes] = set()
        tried, groups = 0, _divided(0, refused.records)
        deadline = self._clock.monotonic() + _TURN_S
        async with self._trial(refused) as attempt:
            while groups and (not tried or self._clock.monotonic() < deadline):
                first, end = groups.pop()
                plan = self._plan(holding, aside, first, end, is_trial=True)
                said = await self._settle_and(attempt, plan)
                if said is not None and end - first > 1:
                    groups += _divided(first, end)
                    continue
                tried = end
                if said is not None and holding.position + first not in holding.rejected:
                    rejected[holding.position + first] = said
                    organisations |= plan.parts[holding.lease.partition].organisations()
        self._note(holding, aside, rejected, organisations)
        aside.tried = tried
        aside.attempt = 2 * tried

    def _refused_together(self, holding: Holding, aside: Aside, plan: Plan, said: str) -> None:
        """Each by itself is taken, or quarantined, and all at once are not: half as many at once."""
        (part,) = plan.parts.values()
        if plan.records > 1:
            aside.tried = plan.records // 2
        elif part.expected not in holding.rejected:
            self._note(holding, aside, {part.expected: said}, part.organisations())
        else:
            holding.waits_at = part.expected
            holding.jump = f"the database refuses a record even for the quarantine: {said}"
            _log.error(
                "the database refuses a record even for the quarantine, its partition waits",
                extra={"partition": part.partition, "position": part.expected, "reason": said},
            )

    def _note(self, holding: Holding, aside: Aside, rejected: Mapping[int, str], organisations: set[bytes]) -> None:
        if rejected:
            self._reject(holding.lease.partition, rejected, organisations)
            aside.quiet_at = self._clock.monotonic() + _QUIET_S


def _divided(first: int, end: int) -> list[tuple[int, int]]:
    """The range in some parts, the first one last."""
    step = max(1, -(-(end - first) // _PARTS))
    return [(at, min(at + step, end)) for at in range(first, end, step)][::-1]
