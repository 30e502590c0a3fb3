"""The order of events of a fault run: load, the fault, its end, recovery, and every reading looked up.

Runs without a fault give the measure: what the machine sustains, then what a backlog is landed at, with the load
going on, after the workers were held for as long as a fault is. Left out: what the faults are
(`bench.faults.catalogue`), and what they are judged by (`bench.faults.figures`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import uvloop

from bench.errors import BenchError
from bench.faults.catalogue import FAULTS, Fault
from bench.faults.check import Check, Verdict
from bench.faults.figures import Faulted, Reference, Suite
from bench.faults.over_mqtt import MqttSender
from bench.faults.sender import Journal, Lanes, Sender
from bench.faults.stage import Instance, Stage, open_stage, own_parts
from bench.parts import progress

CONNECTIONS: Final = 16
CALIBRATION_S: Final = 6.0
SHARE_OF_MACHINE: Final = 0.5
LEAD_SHARE: Final = 0.2
LEAD_MAX_S: Final = 10.0
RECOVERY_MAX_S: Final = 120.0
#: Of the load, which stands between an acknowledgement and its row in health.
LEVEL_S: Final = 1.0


@dataclass(frozen=True)
class Options:
    """What is run."""

    seconds: float = 60.0
    """Of load, a fault in its middle."""
    hold: float = 10.0
    """Seconds that a fault is there."""
    rate: float | None = None
    """Readings a second; None: half of what the machine sustains."""
    tail: float = 5.0
    """Seconds of load at least, once a fault is over: there are acknowledgements and landings to see."""
    names: Sequence[str] = tuple(FAULTS)
    settings: Mapping[str, str] = field(default_factory=dict)
    """Of the roles."""
    logs: Path | None = None
    """Where what the roles log is kept, by fault."""

    def check(self) -> None:
        """Raises `BenchError` for options that do not go together."""
        unknown = set(self.names) - FAULTS.keys()
        if unknown:
            raise BenchError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")

    @property
    def lead(self) -> float:
        return min(LEAD_MAX_S, self.seconds * LEAD_SHARE)


def measure(options: Options, services: Path) -> Suite:
    """Raises `BenchError` when the suite cannot be run; a fault that does harm is a figure."""
    options.check()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_suite(options, services))


async def run_suite(options: Options, services: Path) -> Suite:
    sustained, rate = None, options.rate
    faulted: list[Faulted] = []
    for small_disk in (False, True):
        faults = [FAULTS[name] for name in options.names if FAULTS[name].small_disk == small_disk]
        if not faults:
            continue
        async with own_parts(services, small_disk=small_disk) as instance:
            if rate is None:
                sustained = await _sustained(options, instance)
                rate = sustained * SHARE_OF_MACHINE
            kinds = sorted({(fault.workers, fault.by_mqtt) for fault in faults})
            health = {kind: await _in_health(*kind, rate, options, instance) for kind in kinds}
            for fault in faults:
                run = await _attempt(fault, rate, options, instance)
                faulted.append(replace(run, health_per_s=health[fault.workers, fault.by_mqtt]))
    return Suite(options.seconds, options.hold, Reference(sustained, rate or 0.0), faulted)


async def _attempt(fault: Fault, rate: float, options: Options, instance: Instance) -> Faulted:
    """A fault that cannot be run to its end is a row as well: the others are run none the less."""
    try:
        return await run_fault(fault, rate, options, instance)
    except (BenchError, OSError) as error:
        return Faulted(name=fault.name, verdict=Verdict(wrong=[f"could not be run: {error}"]))


# ---------------------------------------------------------------- the measure


async def _in_health(workers: int, by_mqtt: bool, rate: float, options: Options, instance: Instance) -> float | None:
    """What a backlog is landed at, in readings a second; None where there was none worth the name."""
    progress(f"landing a backlog of {options.hold:g} s in health, at {rate:,.0f} readings/s")
    held = await run_fault(replace(_HELD, workers=workers, by_mqtt=by_mqtt), rate, options, instance)
    if not held.verdict.is_kept:
        raise BenchError(f"readings are lost or doubled without a fault: {held.verdict}")
    return held.drained_per_s


async def _sustained(options: Options, instance: Instance) -> float:
    progress("measuring what the machine sustains")
    async with open_stage(instance, options.settings) as stage:
        await stage.start_ingest()
        await stage.start_worker()
        async with Sender(stage.port, stage.devices, CONNECTIONS, None) as sender:
            sender.widen()
            sender.widen()
            await asyncio.sleep(CALIBRATION_S / 3)  # series are made, the broker's code is compiled
            began, before = time.monotonic(), sender.journal.acknowledged
            await asyncio.sleep(CALIBRATION_S)
            await sender.stop()
        await stage.settled(RECOVERY_MAX_S)  # what is only acknowledged is not sustained
        return (sender.journal.acknowledged - before) / (time.monotonic() - began)


@asynccontextmanager
async def _hold_workers(stage: Stage, _: object) -> AsyncIterator[None]:
    with stage.worker.held():
        yield


_HELD: Final = Fault("none", _hold_workers, "")


# ---------------------------------------------------------------- one fault


async def run_fault(fault: Fault, rate: float, options: Options, instance: Instance) -> Faulted:
    """One fault, on a database and a log of its own."""
    progress(fault.name)
    async with open_stage(instance, options.settings) as stage, AsyncExitStack() as stack:
        began_us = time.time_ns() // 1_000
        watching = asyncio.create_task(stage.watch())
        stack.callback(watching.cancel)
        sender = await _sender(fault, stage, rate)
        if fault.at_start:
            healed = await _from_the_start(fault, stage, sender, stack, options)
        else:
            healed = await _in_the_middle(fault, stage, sender, stack, options)
        sender.widen()
        await asyncio.sleep(max(options.tail, sender.began + options.seconds - time.monotonic()))
        await sender.stop()
        try:
            if isinstance(sender, MqttSender):
                await stage.stored(await sender.end(), RECOVERY_MAX_S)
            await stage.settled(RECOVERY_MAX_S)
            stuck = ""
        except BenchError as error:
            stuck = str(error)
        await stage.looked()
        verdict = await _check(fault, stage, sender.journal, began_us)
        verdict.wrong += [stuck] if stuck else []
        verdict.wrong += _ended(fault, stage)
        if options.logs is not None:
            await asyncio.to_thread(_keep_logs, options.logs / fault.name, stage)
        return _faulted(fault, stage, sender, healed, rate, verdict)


async def _sender(fault: Fault, stage: Stage, rate: float) -> Lanes[Any]:
    if not fault.by_mqtt:
        return Sender(stage.port, stage.devices, CONNECTIONS, rate)
    await stage.instance.fresh_broker()
    return MqttSender(stage.instance.broker_port, stage.devices, CONNECTIONS, rate, stage.organisation)


async def _in_the_middle(
    fault: Fault, stage: Stage, sender: Lanes[Any], stack: AsyncExitStack, options: Options
) -> float:
    way_in = stage.start_bridges() if fault.by_mqtt else stage.start_ingest()
    await asyncio.gather(way_in, stage.start_worker(fault.workers))
    await stack.enter_async_context(sender)
    await asyncio.sleep(options.lead)
    async with fault.happen(stage, sender):
        sender.widen()
        await asyncio.sleep(options.hold)
    return time.monotonic()


async def _from_the_start(
    fault: Fault, stage: Stage, sender: Lanes[Any], stack: AsyncExitStack, options: Options
) -> float:
    async with fault.happen(stage, sender):
        await stage.start_ingest()
        starting = asyncio.create_task(stage.start_worker(fault.workers))
        stack.callback(starting.cancel)
        await stack.enter_async_context(sender)
        sender.widen()
        await asyncio.sleep(options.hold)
    healed = time.monotonic()
    await starting
    return healed


async def _check(fault: Fault, stage: Stage, journal: Journal, began_us: int) -> Verdict:
    async with stage.superuser() as connection:
        check = Check(
            connection,
            stage.organisation,
            stage.devices,
            began_us=began_us,
            ended_us=time.time_ns() // 1_000,
            also_refused=fault.refuses,
            broker_broke=fault.breaks_broker,
        )
        return await check.run(journal)


def _keep_logs(directory: Path, stage: Stage) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, role in enumerate(stage.roles, 1):
        (directory / f"{number}-{role.process.name.replace(' ', '-')}.log").write_text(role.process.output())


def _ended(fault: Fault, stage: Stage) -> list[str]:
    """Roles that have ended by themselves."""
    if fault.stops_workers:
        return []
    return [
        f"{role.process.name} ended with status {role.process.status}"
        for role in stage.roles
        if role.process.failed and role not in stage.killed
    ]


def _faulted(fault: Fault, stage: Stage, sender: Lanes[Any], healed: float, rate: float, verdict: Verdict) -> Faulted:
    journal, landing = sender.journal, stage.landing
    first_acknowledged = journal.first_after(healed)
    first = landing.first_after(healed)
    behind = journal.acknowledged_by(healed) - landing.at(healed)
    level = drained = None
    if first is not None:
        wanted = [journal.acknowledged_by(moment) - round(rate * LEVEL_S) for moment in landing.moments[first - 1 :]]
        level = next(landing.level(first - 1, wanted), None)
    if first is not None and level is not None and behind > 2 * LEVEL_S * rate and level > first:
        begin = first - 1
        readings = landing.landed[level] - landing.landed[begin]
        drained = readings / (landing.moments[level] - landing.moments[begin])
    return Faulted(
        name=fault.name,
        verdict=verdict,
        first_acknowledged_s=None if first_acknowledged is None else first_acknowledged - healed,
        first_landed_s=None if first is None else max(0.0, landing.moments[first] - healed),
        drained_per_s=drained,
        recovered_s=None if level is None else max(0.0, landing.moments[level] - healed),
        backlog=max(0, behind),
        spooled=journal.spooled,
        failures=dict(journal.failures),
        unexpected=dict(journal.unexpected),
        told=fault.told(stage.said()),
        fails_nothing=fault.fails_nothing,
        breaks_broker=fault.breaks_broker,
    )
