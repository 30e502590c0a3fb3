"""The order of events of a fault run: load, the fault, its end, recovery, and every reading looked up.

A run without a fault tells what the machine sustains. What a backlog is landed at in health is measured in each run,
just before its fault and under its load, after the workers were held for as long as the fault is. Left out: what the
faults are (`bench.faults.catalogue`), and what they are judged by (`bench.faults.figures`).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
import uvloop

from bench.errors import BenchError, within
from bench.faults.catalogue import FAULTS, Fault
from bench.faults.check import Check, Verdict
from bench.faults.figures import Faulted, Reference, Suite
from bench.faults.over_mqtt import MqttSender
from bench.faults.sender import Journal, Landing, Lanes, Sender
from bench.faults.stage import LOOK_EVERY_S, Instance, Stage, open_stage, own_parts
from bench.parts import progress
from runtime.postgres import UNAVAILABLE

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
    compares: bool = True
    """Whether what a backlog is landed at in health is measured first."""

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
            faulted += [await _attempt(fault, rate, options, instance) for fault in faults]
    return Suite(options.seconds, options.hold, Reference(sustained, rate or 0.0), faulted)


async def _attempt(fault: Fault, rate: float, options: Options, instance: Instance) -> Faulted:
    """A fault that cannot be run to its end is a row as well: the others are run none the less."""
    try:
        return await run_fault(fault, rate, options, instance)
    except (BenchError, *UNAVAILABLE, asyncpg.PostgresError) as error:
        return Faulted(name=fault.name, verdict=Verdict(wrong=[f"could not be run: {error or repr(error)}"]))


# ---------------------------------------------------------------- the measure


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


async def _in_health(stage: Stage, sender: Lanes[Any], rate: float, options: Options) -> float | None:
    """What a backlog is landed at, in readings a second; None where there was none worth the name."""
    with stage.worker.held():
        await asyncio.sleep(options.hold)
    released = time.monotonic()
    async with within(RECOVERY_MAX_S, "a backlog to land without a fault"):
        while (recovery := _recovery(sender.journal, stage.landing, released, rate)).recovered_s is None:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_EVERY_S)
    return recovery.drained_per_s


# ---------------------------------------------------------------- one fault


async def run_fault(fault: Fault, rate: float, options: Options, instance: Instance) -> Faulted:
    """One fault, on a database and a log of its own."""
    progress(fault.name)
    async with open_stage(instance, options.settings) as stage, stage.watched(), AsyncExitStack() as stack:
        began_us = time.time_ns() // 1_000
        sender = await _sender(fault, stage, rate)
        health = None
        if fault.at_start:
            healed = await _from_the_start(fault, stage, sender, stack, options)
        else:
            await _lead(fault, stage, sender, stack, options)
            health = await _in_health(stage, sender, rate, options) if options.compares else None
            healed = await _in_the_middle(fault, stage, sender, options)
        sender.widen()
        await asyncio.sleep(max(options.tail, sender.began + options.seconds - time.monotonic()))
        await sender.stop()
        stuck = await _settle(stage, sender)
        await stage.looked()
        verdict = await _check(fault, stage, sender.journal, began_us)
        verdict.wrong += [*stuck, *_ended(fault, stage)]
        if options.logs is not None:
            await asyncio.to_thread(_keep_logs, options.logs / fault.name, stage)
        recovery = _recovery(sender.journal, stage.landing, healed, rate)
        return _faulted(fault, stage, sender.journal, recovery, verdict, health)


async def _sender(fault: Fault, stage: Stage, rate: float) -> Lanes[Any]:
    if not fault.by_mqtt:
        return Sender(stage.port, stage.devices, CONNECTIONS, rate)
    await stage.instance.fresh_broker()
    return MqttSender(stage.instance.broker_port, stage.devices, CONNECTIONS, rate, stage.organisation)


async def _lead(fault: Fault, stage: Stage, sender: Lanes[Any], stack: AsyncExitStack, options: Options) -> None:
    """Until the load flows through all parts: of whoever nobody has heard, nothing flows once a part is away."""
    way_in = stage.start_bridges() if fault.by_mqtt else stage.start_ingest()
    await asyncio.gather(way_in, stage.start_worker(fault.workers))
    await stack.enter_async_context(sender)
    await asyncio.sleep(options.lead)
    await stage.landed(sender.journal.acknowledged, RECOVERY_MAX_S)


async def _in_the_middle(fault: Fault, stage: Stage, sender: Lanes[Any], options: Options) -> float:
    """When it was over."""
    stage.forget_said()
    async with fault.happen(stage, sender):
        await _hold(fault, stage, sender, options)
    return time.monotonic()


async def _from_the_start(
    fault: Fault, stage: Stage, sender: Lanes[Any], stack: AsyncExitStack, options: Options
) -> float:
    """When it was over."""
    async with fault.happen(stage, sender):
        await stage.start_ingest()
        starting = asyncio.create_task(stage.start_worker(fault.workers))
        stack.callback(starting.cancel)
        await stack.enter_async_context(sender)
        await _hold(fault, stage, sender, options)
    healed = time.monotonic()
    await starting
    return healed


async def _hold(fault: Fault, stage: Stage, sender: Lanes[Any], options: Options) -> None:
    """Until the roles tell of it, which they do once they meet it, and for as long as is asked for from there.

    Only then does the load widen: what waits for a part that is away may hold up what would meet the fault.
    """
    if not fault.says_after:
        await stage.told(fault.says)
    sender.widen()
    await asyncio.sleep(options.hold)


async def _settle(stage: Stage, sender: Lanes[Any]) -> list[str]:
    """Wait until all that was acknowledged has landed; what did not come to an end."""
    try:
        if isinstance(sender, MqttSender):
            async with within(RECOVERY_MAX_S, "the broker to acknowledge each device's last message"):
                last = await sender.end()
            await stage.stored(last, RECOVERY_MAX_S)
        await stage.settled(RECOVERY_MAX_S)
    except BenchError as error:
        return [str(error)]
    return []


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


class _Recovery(NamedTuple):
    """What came after a moment: seconds from there, readings, and readings a second."""

    first_acknowledged_s: float | None
    first_landed_s: float | None
    recovered_s: float | None
    drained_per_s: float | None
    backlog: int


def _recovery(journal: Journal, landing: Landing, healed: float, rate: float) -> _Recovery:
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
    return _Recovery(
        first_acknowledged_s=None if first_acknowledged is None else first_acknowledged - healed,
        first_landed_s=None if first is None else max(0.0, landing.moments[first] - healed),
        recovered_s=None if level is None else max(0.0, landing.moments[level] - healed),
        drained_per_s=drained,
        backlog=max(0, behind),
    )


def _faulted(
    fault: Fault, stage: Stage, journal: Journal, recovery: _Recovery, verdict: Verdict, health: float | None
) -> Faulted:
    return Faulted(
        name=fault.name,
        verdict=verdict,
        **recovery._asdict(),
        health_per_s=health,
        spooled=journal.spooled,
        failures=dict(journal.failures),
        unexpected=dict(journal.unexpected),
        told=fault.told(stage.said()),
        fails_nothing=fault.fails_nothing,
        breaks_broker=fault.breaks_broker,
    )
