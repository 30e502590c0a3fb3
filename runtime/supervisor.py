"""Several processes of one role: a parent that owns the listening sockets and keeps its children alive.

A child tells its parent whether it is ready over a socket pair, and ends when that closes: no child outlives its
parent. Left out: what the children do.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from runtime.errors import ConfigurationError
from runtime.health import Health
from runtime.merged_metrics import MergedMetrics, environment
from runtime.process_metrics import ProcessMetrics

_log = logging.getLogger("sluice.supervisor")

#: The exit status of a start that was refused: starting again would be refused again.
EXIT_REFUSED: Final = 2
#: The option by which a child learns what it inherits: `--inherited listen=5,channel=7`.
INHERITED_OPTION: Final = "--inherited"

_BACKOFF_FIRST_S: Final = 0.1
_BACKOFF_MOST_S: Final = 10.0
_STEADY_S: Final = 60.0
_REPORT_EVERY_S: Final = 0.1
_LINE_BYTES_MAX: Final = 64_000
_REPORT_LENGTH_MAX: Final = 4_000
#: Between what is not ready and what is noted.
_NOTES: Final = "\t"


# ---------------------------------------------------------------- the child's side


@dataclass(frozen=True)
class Inherited:
    """What a child got from its parent: sockets that listen already, and the channel to report on."""

    listeners: list[socket.socket]
    channel: socket.socket

    @classmethod
    def parse(cls, text: str) -> "Inherited":
        """Take over the descriptors named in the value of `INHERITED_OPTION`."""
        pairs = [part.split("=") for part in text.split(",")]
        try:
            listeners = [socket.socket(fileno=int(number)) for name, number in pairs if name == "listen"]
            (channel,) = (socket.socket(fileno=int(number)) for name, number in pairs if name == "channel")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{INHERITED_OPTION} is for processes that Sluice starts itself") from error
        for descriptor in (*listeners, channel):
            descriptor.setblocking(False)
            descriptor.set_inheritable(False)
        return cls(listeners, channel)


async def report(channel: socket.socket, health: Health, stop: asyncio.Event) -> None:
    """Tell the parent what is not ready and what is noted, as it changes; sets `stop` when the parent is gone."""
    reader, writer = await asyncio.open_unix_connection(sock=channel)
    gone = asyncio.create_task(reader.read(), name="parent's end")
    told: str | None = None
    try:
        while not gone.done():
            told = _tell(writer, f"{_line(health.not_ready())}{_NOTES}{_line(health.notes())}", told)
            await asyncio.wait({gone}, timeout=_REPORT_EVERY_S)
        _log.warning("the parent is gone")
        stop.set()
    finally:
        gone.cancel()
        writer.close()


def _line(reasons: Mapping[str, str]) -> str:
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return text.replace("\n", " ").replace(_NOTES, " ")[:_REPORT_LENGTH_MAX]


def _tell(writer: asyncio.StreamWriter, report: str, told: str | None) -> str:
    if report != told:
        writer.write(f"{report}\n".encode())
    return report


# ---------------------------------------------------------------- the parent's side


@dataclass(eq=False)
class _Child:
    process: asyncio.subprocess.Process
    #: Where its metrics are.
    share: Path
    any_was_ready: asyncio.Event
    not_ready: str = "it is starting"
    notes: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def take_reports(self, channel: socket.socket) -> None:
        """Take in reports until the child closes its end."""
        reader, writer = await asyncio.open_unix_connection(sock=channel, limit=_LINE_BYTES_MAX)
        try:
            while line := await reader.readline():
                # What is not ready comes first: nothing there is "ready".
                self.not_ready, _, self.notes = line.decode(errors="replace").strip("\n").partition(_NOTES)
                if self.not_ready:
                    self.ready.clear()
                else:
                    self.ready.set()
                    self.any_was_ready.set()
        except (OSError, ValueError):
            pass  # a child that dies in the middle of a line
        finally:
            self.not_ready = self.not_ready or "it is ending"
            self.ready.clear()
            writer.close()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


class Supervisor:
    """Keeps `count` children of `argv` running between `start` and `stop`."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        count: int,
        listeners: Iterable[socket.socket],
        health: Health,
        ready_timeout_s: float,
        stop_timeout_s: float,
    ) -> None:
        self._argv = [sys.executable, *argv]
        self._listeners = list(listeners)
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._registry = CollectorRegistry()
        self.metrics = MergedMetrics(self._registry)
        self._registry.register(ProcessMetrics(self._pids))
        self._slots: list[_Child | None] = [None] * count
        self._failures: list[str | None] = [None] * count
        """Why a slot's process could not be started."""
        self._alive: set[_Child] = set()
        self._any_was_ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._listening: set[asyncio.Task[None]] = set()
        self._replacement: asyncio.Task[None] | None = None
        self._ready_gauge = Gauge(
            "sluice_processes_ready", "Processes of this role that are ready", registry=self._registry
        )
        self._ready_gauge.set_function(
            lambda: sum(child is not None and child.ready.is_set() for child in self._slots)
        )
        self._restarts = Counter(
            "sluice_process_restarts", "Processes started again after they had ended", registry=self._registry
        )
        health.register("processes", self._not_ready)
        health.note("processes", self._notes)

    def start(self) -> list["asyncio.Task[None]"]:
        """Start every child; the tasks returned end only with an error: the role cannot run."""
        self._tasks = [
            asyncio.create_task(self._keep(slot), name=f"process {slot}") for slot in range(len(self._slots))
        ]
        return self._tasks

    async def stop(self) -> None:
        """Ask every child to end, wait for their own deadline, kill what is left."""
        tasks = [*self._tasks, *([self._replacement] if self._replacement else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._end(child) for child in self._alive))
        self.metrics.close()

    def replace(self) -> None:
        """Replace the children one by one: each new one is ready before its old one is asked to end."""
        if self._replacement is not None and not self._replacement.done():
            _log.warning("the processes are being replaced already")
            return
        self._replacement = asyncio.create_task(self._replace_all(), name="replacement")

    def _notes(self) -> str | None:
        """What single processes say, those that are not ready while others are among it."""
        said = [
            f"process {slot}: {'; '.join(filter(None, (child.not_ready, child.notes)))}"
            for slot, child in enumerate(self._slots)
            if child is not None and (child.not_ready or child.notes)
        ]
        return "; ".join(said) or None

    def _not_ready(self) -> str | None:
        reasons = [
            f"process {slot}: {(self._failures[slot] or 'not running') if child is None else child.not_ready}"
            for slot, child in enumerate(self._slots)
            if child is None or not child.ready.is_set()
        ]
        return "; ".join(reasons) if len(reasons) == len(self._slots) else None

    def _pids(self) -> list[int | None]:
        children = [None if child is None else child.process for child in self._slots]
        return [None if child is None or child.returncode is not None else child.pid for child in children]

    async def _keep(self, slot: int) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = _BACKOFF_FIRST_S
        while True:
            started = loop.time()
            if await self._begin(slot):
                await self._serve_out(slot)
                self._restarts.inc()
            if loop.time() - started > _STEADY_S:
                backoff_s = _BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_MOST_S)

    async def _begin(self, slot: int) -> bool:
        """Start the slot's child; False where the system has no means for one now: processes, memory, descriptors."""
        try:
            self._slots[slot] = await self._spawn()
        except OSError as error:
            self._failures[slot] = f"it cannot be started: {error}"
            _log.error("a process cannot be started", extra={"slot": slot, "reason": str(error)})
            return False
        self._failures[slot] = None
        return True

    async def _serve_out(self, slot: int) -> None:
        """Wait until the slot is empty again. Raises `ConfigurationError` where no child will ever start."""
        child, status = await self._ended(slot)
        self._slots[slot] = None
        self._gone(child)
        _log.error("a process ended", extra={"slot": slot, "pid": child.process.pid, "status": status})
        if status == EXIT_REFUSED and not self._any_was_ready.is_set():
            raise ConfigurationError("a process of this role refused to start: its message stands above")

    async def _ended(self, slot: int) -> tuple[_Child, int]:
        """Wait for the end of the slot's child, or of the one that replaced it meanwhile."""
        while True:
            child = self._slots[slot]
            if child is None:
                raise RuntimeError(f"slot {slot} was emptied by another task")
            status = await child.process.wait()
            if self._slots[slot] is child:
                return child, status

    async def _spawn(self) -> _Child:
        """Raises `OSError` where the system has no means for one more process."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            share = self.metrics.share()
        except BaseException:
            ours.close()
            theirs.close()
            raise
        try:
            inherited = [f"listen={listener.fileno()}" for listener in self._listeners]
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                INHERITED_OPTION,
                ",".join([*inherited, f"channel={theirs.fileno()}"]),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[*(listener.fileno() for listener in self._listeners), theirs.fileno()],
                env=environment(share),
                # A terminal's Ctrl-C reaches the parent alone, which ends the children in order.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            self.metrics.forget(share)
            raise
        finally:
            theirs.close()
        child = _Child(process, share, self._any_was_ready)
        self._alive.add(child)
        task = asyncio.create_task(child.take_reports(ours), name=f"reports of {process.pid}")
        self._listening.add(task)
        task.add_done_callback(self._listening.discard)
        _log.info("a process was started", extra={"pid": process.pid})
        return child

    async def _replace_all(self) -> None:
        for slot in range(len(self._slots)):
            if not await self._replace(slot):
                return

    async def _replace(self, slot: int) -> bool:
        old = self._slots[slot]
        if old is None:  # just being started again anyway
            return True
        try:
            new = await self._spawn()
        except OSError as error:
            _log.error("the old processes stay: no new one can be started", extra={"reason": str(error)})
            return False
        if not await self._gets_ready(new):
            _log.error(
                "the old processes stay: the new one does not get ready",
                extra={"pid": new.process.pid, "why": new.not_ready},
            )
            await self._end(new)
            return False
        if self._slots[slot] is not old:  # it died meanwhile and was started again
            await self._end(new)
            return True
        self._slots[slot] = new
        await self._end(old)
        return True

    async def _gets_ready(self, child: _Child) -> bool:
        waits = [asyncio.create_task(child.ready.wait()), asyncio.create_task(child.process.wait())]
        try:
            await asyncio.wait(waits, timeout=self._ready_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return child.ready.is_set()

    async def _end(self, child: _Child) -> None:
        child.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                await child.process.wait()
        except TimeoutError:
            _log.error("a process does not end and is killed", extra={"pid": child.process.pid})
            child.signal(signal.SIGKILL)
            await child.process.wait()
        self._gone(child)

    def _gone(self, child: _Child) -> None:
        self._alive.discard(child)
        self.metrics.forget(child.share)
