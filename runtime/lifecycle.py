"""The life of a process: its event loop, its signals, and an end in order and in time.

Left out: what a role does in between, and several processes of one role (`runtime.supervisor`).
"""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import uvloop

from runtime.settings import setting

_log = logging.getLogger("sluice.lifecycle")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LifecycleSettings:
    """How long a process may take to start and to end."""

    shutdown_timeout_ms: int = setting(
        20_000,
        unit="ms",
        least=100,
        most=600_000,
        why="From SIGTERM to the end, whatever is still open; orchestrators kill after 30 s by default.",
    )
    process_ready_timeout_ms: int = setting(
        60_000,
        unit="ms",
        least=1_000,
        why="How long a new process may take until it is ready when it replaces another (SIGHUP).",
    )


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on uvloop. Its event is set by SIGTERM or SIGINT; a second signal cancels it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_with_signals(main))


async def _with_signals(main: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    task = asyncio.create_task(main(stop), name="main")

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            _log.warning("ending at once", extra={"signal": number.name})
            task.cancel()
        else:
            _log.info("ending", extra={"signal": number.name})
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return await task


#: What every step of an end is given, however late it is: the last ones leave nothing behind on the machine.
STEP_LEAST_S: Final = 1.0


class Teardown:
    """What has to be closed, in the order it was opened; `run` closes it in the opposite one."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._steps: list[tuple[str, Callable[[], Awaitable[object]]]] = []

    def add(self, name: str, close: Callable[[], Awaitable[object]]) -> None:
        self._steps.append((name, close))

    async def run(self) -> None:
        """Close everything within the time; a step that fails or takes too long is logged, the others go on."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        while self._steps:
            name, close = self._steps.pop()
            try:
                async with asyncio.timeout_at(max(deadline, loop.time() + STEP_LEAST_S)):
                    await close()
            except TimeoutError:
                _log.error("not closed in time", extra={"part": name, "setting": "SLUICE_SHUTDOWN_TIMEOUT_MS"})
            except Exception:
                _log.exception("not closed cleanly", extra={"part": name})


async def first_of(stop: asyncio.Event, *tasks: "asyncio.Task[Any]") -> None:
    """Return when `stop` is set; a task that ends before it ends everything, with its own error.

    The tasks go on: their owner stops them.
    """
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    if stop.is_set():
        return
    for task in done:
        task.result()
        raise RuntimeError(f"{task.get_name()} ended by itself")
