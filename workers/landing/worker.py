"""The landing role: leases partitions, lands what stands in them, and goes on after whatever failed.

Every failure ends the run of the pipeline; the next begins from the positions that the database has, so nothing is
decided by what this process believes to have written. Left out: opening the log and checking that it is the right one
(`deploy.generation`).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from runtime.clock import Clock
from runtime.errors import ConfigurationError, UnavailableError
from runtime.health import Health
from runtime.log.port import BehindRetentionError, Log
from runtime.postgres import PostgresSettings
from schemas.record import PG_EPOCH_US
from workers.landing.apart import Apart
from workers.landing.failures import Backoff, Cause, FloodGuard, LeaseLapsedError, PositionMovedError, cause_of
from workers.landing.holding import Aside, Holding
from workers.landing.leases import Lease, Leases
from workers.landing.pipeline import Pipeline
from workers.landing.plan import Part, Plan
from workers.landing.registry import Registry
from workers.landing.series import SeriesCache
from workers.landing.store import Landed, Session, Standing, Store
from workers.landing.tombstones import Tombstones
from workers.metrics import LandingMetrics
from workers.settings import LandingSettings

_log = logging.getLogger("sluice.landing")

_REMIND_EVERY_S: Final = 60.0

_SAYING: Final = {
    Cause.UNAVAILABLE: "the database is away or full, readings wait in the log",
    Cause.CONTENTION: "rows met others, the batch is landed again with every reading checked",
    Cause.POSITION: "partitions are taken up again from where the database has them",
    Cause.LOG: "the log does not have what comes next",
    Cause.DATABASE: "the database refuses what landing needs: see its log, and run `sluice migrate`",
}


Heard = Callable[[Mapping[bytes, int]], None]
"""Takes the devices of a batch, each with the receive time of its newest record; returns at once, raises nothing."""


def _nobody(_: Mapping[bytes, int]) -> None:
    pass


async def run_worker(
    postgres: PostgresSettings,
    settings: LandingSettings,
    log: Log,
    *,
    stop: asyncio.Event,
    clock: Clock,
    metrics: LandingMetrics,
    health: Health,
    heard: Heard = _nobody,
) -> None:
    """Land `log` until `stop`, telling `heard` of each batch committed.

    Raises only what no wait would cure, a `PoisonFloodError` for one.
    """
    worker = LandingWorker(postgres, settings, log, clock=clock, metrics=metrics, heard=heard)
    forget = health.register("landing", lambda: worker.trouble)
    try:
        await worker.run(stop)
    finally:
        forget()


class LandingWorker:
    """One worker. Holdings outlive the pipeline's runs; a holding that a failure touched is made anew."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: LandingSettings,
        log: Log,
        *,
        clock: Clock,
        metrics: LandingMetrics,
        heard: Heard = _nobody,
    ) -> None:
        self._heard = heard
        self._settings = settings
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._leases = Leases(postgres, settings, log.source, clock=clock, metrics=metrics)
        self._store = Store(postgres, settings, log.source)
        self._registry = Registry(postgres, settings, clock, metrics)
        self._reader = log.reader()
        self._session: Session | None = None
        self._holdings: dict[int, Holding] = {}
        self._tombstones = Tombstones()
        self._backoff = Backoff(settings.landing_retry_min_ms / 1000, settings.landing_retry_max_ms / 1000)
        self._apart_registry = Registry(postgres, settings, clock, metrics)
        self._apart = Apart(
            self._holdings,
            self._apart_registry,
            settings,
            land=self._land_apart,
            trial=self._store.trial,
            reject=self._reject,
            clock=clock,
            tombstones=self._tombstones,
        )
        window = settings.landing_undecodable_window_s
        self._undecodable = FloodGuard(
            "undecodable records", "SLUICE_LANDING_UNDECODABLE_MAX", settings.landing_undecodable_max, window
        )
        self._rejecting = FloodGuard(
            "organisations with readings that the database refuses",
            "SLUICE_LANDING_REJECTED_ORGANISATIONS_MAX",
            settings.landing_rejected_organisations_max,
            window,
        )
        self._failure: str | None = None
        self._failed_plan: Plan | None = None
        self._shown: set[int] = set()

    @property
    def trouble(self) -> str | None:
        """Why nothing lands right now, or not all of it, in words for an operator."""
        waits = next((holding.waits for holding in self._holdings.values() if holding.waits is not None), None)
        return self._failure or self._leases.trouble or self._log.trouble or waits

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, then until the transaction under way has ended, within its time."""
        try:
            async with asyncio.TaskGroup() as group:
                working = group.create_task(self._work(stop), name="landing")
                beside = [
                    group.create_task(self._leases.run(), name="landing leases"),
                    group.create_task(self._watch_lag(), name="landing lag"),
                    group.create_task(self._watch_silence(), name="landing silence"),
                ]
                await self._until_stopped(working, stop)
                for task in beside:
                    task.cancel()
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            self._store.close()
            await self._leases.leave()
            await self._registry.close()
            await self._apart_registry.close()
            await self._reader.close()
            self._holdings.clear()
            self._show({})

    async def _until_stopped(self, working: asyncio.Task[None], stop: asyncio.Event) -> None:
        stopping = asyncio.create_task(stop.wait(), name="landing stop")
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({working}, timeout=self._settings.landing_stop_timeout_s)
        finally:
            stopping.cancel()
        if not working.done():
            _log.warning(
                "the transaction under way is rolled back: it took longer than a stop may",
                extra={"seconds": self._settings.landing_stop_timeout_s, "setting": "SLUICE_LANDING_STOP_TIMEOUT_S"},
            )
            working.cancel()

    async def _work(self, stop: asyncio.Event) -> None:
        """Run after run of the pipeline."""
        while not stop.is_set():
            self._failed_plan = None
            try:
                if await self._prepare(stop):
                    await self._run_pipeline(stop)
            except Exception as error:
                cause = cause_of(error)
                if cause is None:
                    raise
                wait = await self._recover(cause, error)
                await _any_of(stop, timeout=wait)

    async def _run_pipeline(self, stop: asyncio.Event) -> None:
        pipeline = Pipeline(
            self._holdings,
            self._reader,
            self._registry,
            self._settings,
            land=self._land,
            apart=self._apart,
            clock=self._clock,
            tombstones=self._tombstones,
        )
        ending = asyncio.create_task(_any_of(stop, self._leases.changed), name="landing end")
        ending.add_done_callback(lambda _: pipeline.end())
        try:
            await pipeline.run()
        finally:
            ending.cancel()
            self._failed_plan = pipeline.failed

    # ------------------------------------------------------------ before a run

    async def _prepare(self, stop: asyncio.Event) -> bool:
        """Hold what may be held, with every position and cache as the database has it. False: nothing to do."""
        usable = await self._usable(stop)
        for partition in [*self._holdings]:
            if usable.get(partition) is not self._holdings[partition].lease:
                del self._holdings[partition]
        if not usable:
            return False
        if not self._store.is_open:
            self._session = await self._store.open()
            await self._remember_undecodable()
        if self._session is None:
            raise LeaseLapsedError("there is no session to write with")
        unnamed = [partition for partition, lease in usable.items() if lease.previous != self._session]
        if unnamed:
            await self._leases.name_session(self._session, unnamed)
        for partition, lease in usable.items():
            self._holdings.setdefault(partition, Holding(lease))
        await self._read_positions()
        await self._store.learn(self._tombstones)
        return True

    async def _usable(self, stop: asyncio.Event) -> dict[int, Lease]:
        """The partitions to write to, once there are any and their leases are known to last."""
        leases = self._leases
        while not stop.is_set():
            leases.changed.clear()
            leases.release(leases.surplus)
            if leases.usable and leases.is_valid:
                return leases.usable
            await _any_of(stop, leases.changed, timeout=self._settings.landing_lease_renew_s)
        return {}

    async def _read_positions(self) -> None:
        unread = [partition for partition, holding in self._holdings.items() if not holding.is_clean]
        standing = await self._store.standing(unread) if unread else {}
        for partition in unread:
            if partition not in standing:
                raise ConfigurationError(
                    f"partition {partition} of log {self._log.source} has no position: run `sluice migrate`"
                )
            holding = self._holdings[partition]
            holding.position = standing[partition].position
            holding.landed_until = standing[partition].landed_until
            holding.has_losses = standing[partition].has_losses
            holding.spools = standing[partition].spools
            holding.deliveries = standing[partition].deliveries
            holding.jump = None
            holding.cache = SeriesCache(standing[partition].high_water)
            holding.is_clean = True
        self._resolve_doubt(standing)

    def _resolve_doubt(self, standing: Mapping[int, Standing]) -> None:
        """A COMMIT whose answer was lost had gone through if the positions are where it was to move them."""
        doubt, self._store.in_doubt = self._store.in_doubt, None
        if doubt is None:
            return
        plan, landed = doubt
        known = [part for part in plan.parts.values() if part.partition in standing]
        gone_through = bool(known) and all(standing[part.partition].position == part.position for part in known)
        _log.warning(
            "a COMMIT whose answer was lost had %s",
            "gone through" if gone_through else "not gone through, or another worker went on from it",
            extra={"partitions": [*plan.parts], "readings": plan.rows},
        )
        if gone_through:
            self._count(plan, landed)

    async def _remember_undecodable(self) -> None:
        seen = await self._store.undecodable_since(self._settings.landing_undecodable_window_s)
        self._undecodable.remember(seen, self._clock.monotonic())

    # ------------------------------------------------------------ in a run

    async def _land(self, plan: Plan) -> None:
        """Write one plan; the pipeline's way to the database."""
        if plan.undecodable:
            await self._remember_undecodable()  # other workers' too: a flood is one over all partitions
            self._undecodable.note(plan.undecodable, self._clock.monotonic())
        if not self._leases.is_valid:
            raise LeaseLapsedError("the lease may have ended: it is asked for again before anything is written")
        landed = await self._store.land(plan)
        self._count(plan, landed)
        self._heard(plan.heard)
        self._backoff.reset()
        if self._failure is not None:
            self._failure = None
            _log.info("landing goes on", extra={"readings": plan.rows})
        await self._log.landed({part.partition: part.position for part in plan.parts.values()})

    async def _land_apart(self, plan: Plan) -> str | None:
        """The same for a partition set aside; what the database says if it refuses the content."""
        try:
            await self._land(plan)
        except Exception as error:
            if cause_of(error) is not Cause.CONTENT:
                raise
            self._refused()
            return str(error)
        return None

    def _refused(self) -> None:
        self._metrics.retries.labels(Cause.CONTENT.value).inc()
        self._store.in_doubt = None  # a refusal is an answer, also of a COMMIT

    def _count(self, plan: Plan, landed: Landed) -> None:
        metrics = self._metrics
        metrics.rows.labels("fresh", "stored").inc(landed.fresh)
        for path, judgement in (("suspect", landed.suspects), ("text", landed.texts)):
            metrics.rows.labels(path, "stored").inc(judgement.stored)
            metrics.rows.labels(path, "duplicate").inc(judgement.duplicates)
            metrics.rows.labels(path, "conflict").inc(judgement.conflicts)
        metrics.rows.labels("none", "quarantined").inc(sum(told.quarantined for told in plan.outcomes))
        metrics.rows.labels("none", "erased").inc(sum(told.erased for told in plan.outcomes))
        metrics.refused.inc(sum(told.refused for told in plan.outcomes))
        metrics.records.inc(plan.records)
        metrics.repeats.inc(plan.late.repeats)
        metrics.spool_lost.inc(plan.late.lost)
        metrics.undecodable.inc(len(plan.undecodable))
        metrics.batch_rows.observe(plan.rows)
        metrics.batch_bytes.observe(plan.bytes)
        metrics.batch_seconds.observe(landed.seconds)
        now = self._clock.now_us() - PG_EPOCH_US
        for part in plan.parts.values():
            if part.received:
                metrics.receipt_to_commit.observe(max(0, now - part.oldest_received) / 1e6)

    # ------------------------------------------------------------ after a failure

    async def _recover(self, cause: Cause, error: Exception) -> float:
        """Make the next run differ in what the failure asks for; how long to wait before it."""
        plan = self._failed_plan
        if cause is Cause.CONTENT and plan is not None and plan.records:
            # Nothing of it stands, and nothing that is remembered was to change before its COMMIT.
            self._refused()
            self._set_aside(plan)
            return 0.0
        if cause is Cause.CONTENT:
            cause = Cause.DATABASE
        self._metrics.retries.labels(cause.value).inc()
        if cause is not Cause.TOMBSTONES:
            await self._registry.close()
            await self._apart_registry.close()
        for part in plan.parts.values() if plan is not None else ():
            self._holdings[part.partition].is_clean = False
            if cause is Cause.CONTENTION:
                self._holdings[part.partition].careful_until = part.position
        if isinstance(error, BehindRetentionError):
            return await self._skip(error)
        if cause is Cause.TOMBSTONES:
            return 0.0
        if isinstance(error, PositionMovedError):
            self._metrics.position_conflicts.inc()
        self._report(cause, error)
        return self._backoff.next()

    def _report(self, cause: Cause, error: Exception) -> None:
        """Say it when it begins and when it changes, not with every attempt."""
        reason = f"{_SAYING[cause]}: {str(error) or type(error).__name__}"
        if reason != self._failure:
            level = logging.ERROR if cause is Cause.DATABASE else logging.WARNING
            _log.log(level, "landing was interrupted and is tried again", extra={"reason": reason})
        self._failure = reason

    def _set_aside(self, plan: Plan) -> None:
        """Let the partitions of a refused batch land by themselves until the records at fault are found."""
        for part in _begun(plan):
            holding = self._holdings[part.partition]
            if holding.aside is None:
                holding.aside = Aside(part.position)

    def _reject(self, partition: int, said: Mapping[int, str], organisations: set[bytes]) -> None:
        """Records of a partition that are quarantined whole. Raises `PoisonFloodError`."""
        self._rejecting.note(organisations, self._clock.monotonic())
        self._holdings[partition].rejected |= said
        self._metrics.rejected.inc(len(said))
        first = min(said)
        _log.error(
            "the database refuses records for their content, they are quarantined whole",
            extra={"partition": partition, "position": first, "records": len(said), "reason": said[first]},
        )

    async def _skip(self, error: BehindRetentionError) -> float:
        """Never silently: what the log no longer has is counted where the books are."""
        lost = error.start - error.position
        try:
            await self._store.skip(error.partition, error.position, error.start)
        except Exception as failed:
            cause = cause_of(failed)
            if cause is None:
                raise
            self._report(cause, failed)
            return self._backoff.next()
        self._metrics.lost.inc(lost)
        self._holdings[error.partition].is_clean = False
        _log.error(
            "the log deleted records before they landed: they are lost. Let the log keep them longer "
            "(SLUICE_LOG_RETENTION_H), or add workers",
            extra={"partition": error.partition, "first": error.position, "lost": lost},
        )
        return 0.0

    # ------------------------------------------------------------ beside it

    async def _watch_lag(self) -> None:
        reminded = float("-inf")
        while True:
            with suppress(UnavailableError):
                bounds = await self._log.bounds()
                held = self._holdings.items()
                self._show({p: max(0, bounds[p].end - holding.position) for p, holding in held if p in bounds})
            waiting = {p: h.newer_version for p, h in self._holdings.items() if h.newer_version is not None}
            self._metrics.waiting_for_upgrade.set(len(waiting))
            if waiting and self._clock.monotonic() >= reminded + _REMIND_EVERY_S:
                reminded = self._clock.monotonic()
                _log.error(
                    "partitions wait for an upgrade of this worker: their next records are of a newer version",
                    extra={"versions": waiting},
                )
            self._look_again()
            await asyncio.sleep(self._settings.landing_lag_period_s)

    async def _watch_silence(self) -> None:
        """An answer that was lost on its way would be waited for until its time-out, long after the way is open."""
        while True:
            await self._leases.silence.wait()
            self._leases.silence.clear()
            self._store.interrupt()
            self._registry.interrupt()
            self._apart_registry.interrupt()

    def _look_again(self) -> None:
        """An operator may have resolved what partitions wait for: take them up again from what the database says."""
        jumped = [holding for holding in self._holdings.values() if holding.jump is not None]
        for holding in jumped:
            holding.is_clean = False
        if jumped:
            self._leases.changed.set()

    def _show(self, lags: Mapping[int, int]) -> None:
        for partition in self._shown - lags.keys():
            self._metrics.lag.labels(partition).set(0)
        for partition, lag in lags.items():
            self._metrics.lag.labels(partition).set(lag)
        self._shown = set(lags)
        self._metrics.series_cached.set(sum(holding.cache.count for holding in self._holdings.values()))


def _begun(plan: Plan) -> list[Part]:
    """The partitions of which the plan has a record."""
    return [part for part in plan.parts.values() if part.position > part.expected]


async def _any_of(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Until one of them is set, or `timeout` seconds have passed."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
