"""Lives of processes: ends in order and in time, and children that are kept, replaced and never left behind."""

import asyncio
import functools
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from runtime.errors import ConfigurationError
from runtime.health import Health
from runtime.lifecycle import Teardown, first_of
from runtime.sockets import address_of, listen
from runtime.supervisor import Inherited, Supervisor
from tests.support import run

CHILD = str(Path(__file__).with_name("supervised.py"))
CHECKOUT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- the end of a process


def test_what_was_opened_last_is_closed_first_and_a_failure_keeps_nobody_from_closing() -> None:
    closed: list[str] = []

    async def close(name: str) -> None:
        closed.append(name)
        if name == "b":
            raise RuntimeError("b does not want to")

    async def test() -> None:
        teardown = Teardown(timeout_s=5)
        for name in ("a", "b", "c"):
            teardown.add(name, functools.partial(close, name))
        await teardown.run()

    run(test())
    assert closed == ["c", "b", "a"]


def test_a_step_that_hangs_is_given_up_and_the_rest_is_still_closed() -> None:
    closed: list[str] = []

    async def close() -> None:
        closed.append("a")

    async def test() -> None:
        teardown = Teardown(timeout_s=0.05)
        teardown.add("a", close)
        teardown.add("hangs", asyncio.Event().wait)
        await teardown.run()

    run(test())
    assert closed == ["a"]


def test_a_part_that_fails_or_ends_by_itself_ends_everything() -> None:
    async def fail() -> None:
        raise ConfigurationError("no")

    async def end() -> None:
        return

    async def test() -> None:
        with pytest.raises(ConfigurationError):
            await first_of(asyncio.Event(), asyncio.create_task(fail()))
        with pytest.raises(RuntimeError, match="part ended by itself"):
            await first_of(asyncio.Event(), asyncio.create_task(end(), name="part"))
        stop = asyncio.Event()
        stop.set()
        await first_of(stop, asyncio.create_task(end()))

    run(test())


PROCESS = """
import asyncio, sys
from runtime.lifecycle import run

async def main(stop):
    print("up", flush=True)
    await stop.wait()
    print("ending", flush=True)
    if "--hang" in sys.argv:
        await asyncio.Event().wait()

run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_the_end_and_a_second_one_insists(number: signal.Signals) -> None:
    for arguments, signals in (([], 1), (["--hang"], 2)):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), *arguments],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        for said in (b"up\n", b"ending\n")[:signals]:
            assert process.stdout.readline() == said
            process.send_signal(number)
        assert (process.wait(timeout=60) == 0) == (signals == 1)
        process.stdout.close()


# ---------------------------------------------------------------- several processes


class Family:
    """A supervisor of test children, and a client of theirs."""

    def __init__(self, *arguments: str, count: int = 2, ready_timeout_s: float = 20) -> None:
        self.health = Health()
        self.listener = listen("TEST", "127.0.0.1:0")
        self.supervisor = Supervisor(
            [CHILD, *arguments],
            count=count,
            listeners=[self.listener],
            health=self.health,
            ready_timeout_s=ready_timeout_s,
            stop_timeout_s=0.2,
        )
        self.answers = 0

    async def ask(self) -> int:
        reader, writer = await asyncio.open_connection(*address_of(self.listener))
        try:
            writer.write(b"?")
            pid = int(await reader.read())
            self.answers += 1
            return pid
        finally:
            writer.close()
            await writer.wait_closed()

    async def pids(self, count: int) -> set[int]:
        """Who answers, once it is `count` of them."""
        found: set[int] = set()
        while len(found) < count:
            found.add(await self.ask())
        return found

    async def ready(self) -> None:
        while self.health.not_ready():  # noqa: ASYNC110 -- what tells is in other processes
            await asyncio.sleep(0.01)


@asynccontextmanager
async def family(*arguments: str, count: int = 2, ready_timeout_s: float = 20) -> AsyncIterator[Family]:
    it = Family(*arguments, count=count, ready_timeout_s=ready_timeout_s)
    it.supervisor.start()
    try:
        yield it
    finally:
        await it.supervisor.stop()
        it.listener.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def opened(pid: int) -> set[str]:
    """What the descriptors of a process lead to."""
    found: set[str] = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(os.readlink(link))
    return found


def test_children_share_the_socket_and_end_with_their_parent() -> None:
    async def test() -> set[int]:
        async with family() as it:
            assert "process 0: not running" in it.health.not_ready()["processes"]
            await it.ready()
            return await it.pids(2)

    assert all(gone(pid) for pid in run(test()))


def test_a_child_that_dies_is_started_again() -> None:
    async def test() -> None:
        async with family() as it:
            first = await it.pids(2)
            os.kill(next(iter(first)), signal.SIGKILL)
            while await it.ask() in first:
                pass
            assert b"sluice_process_restarts_total 1.0" in it.supervisor.metrics.render()

    run(test())


def test_a_child_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter, real = tmp_path / "python", sys.executable
    monkeypatch.setattr(sys, "executable", str(interpreter))

    async def test() -> None:
        async with family(count=1) as it:
            while "cannot be started" not in it.health.not_ready()["processes"]:  # noqa: ASYNC110 -- a file tells
                await asyncio.sleep(0.01)
            interpreter.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
            interpreter.chmod(0o755)
            await it.ready()
            first = await it.pids(1)
            # Nor does a replacement that cannot be started cost anything.
            interpreter.rename(tmp_path / "elsewhere")
            it.supervisor.replace()
            assert it.supervisor._replacement is not None
            await it.supervisor._replacement
            assert await it.pids(1) == first

    run(test())


def test_children_are_replaced_one_by_one_and_no_connection_is_lost() -> None:
    async def test() -> None:
        async with family() as it:
            old = await it.pids(2)
            it.supervisor.replace()
            while not all(gone(pid) for pid in old):
                assert await it.ask()  # would raise on a connection refused or reset
            assert not it.health.not_ready()
            assert not await it.pids(2) & old

    run(test())


def test_the_old_stay_when_the_new_do_not_get_ready(tmp_path: Path) -> None:
    async def test() -> None:
        async with family(count=1, ready_timeout_s=0.3) as it:
            await it.ready()
            old = await it.pids(1)
            # From now on what is started never gets ready.
            it.supervisor._argv.append("--never-ready")
            it.supervisor.replace()
            assert it.supervisor._replacement is not None
            await it.supervisor._replacement
            assert await it.pids(1) == old

    run(test())


def test_metrics_of_processes_that_end_stay_bounded_and_exact() -> None:
    async def test() -> None:
        async with family() as it:
            metrics = it.supervisor.metrics
            for _ in range(3):
                old = await it.pids(2)
                os.kill(next(iter(old)), signal.SIGKILL)
                while await it.ask() in old:
                    pass
            it.supervisor.replace()
            assert it.supervisor._replacement is not None
            await it.supervisor._replacement
            await it.pids(2)
            shown = metrics.render().decode()
            assert f"supervised_answers_total {it.answers}.0" in shown
            assert "supervised_serving 2.0" in shown
            assert {path.stem.split("_")[-1] for path in metrics.directory.rglob("counter_*.db")} == {
                "ended",
                *map(str, await it.pids(2)),
            }

    run(test())


def test_every_process_shows_its_memory_by_slot_and_none_holds_the_directory_for_its_parent() -> None:
    async def test() -> None:
        async with family() as it:
            pids = await it.pids(2)
            shown = it.supervisor.metrics.render().decode()
            for process in ("parent", "0", "1"):
                assert f'process_resident_memory_bytes{{process="{process}"}}' in shown
            directory = str(it.supervisor.metrics.directory)
            assert directory in opened(os.getpid())
            assert not any(directory in opened(pid) for pid in pids)

    run(test())


def test_one_that_does_not_end_is_killed() -> None:
    async def test() -> set[int]:
        async with family("--deaf", count=1) as it:
            return await it.pids(1)

    assert all(gone(pid) for pid in run(test()))


def test_a_start_that_is_refused_ends_the_parent_instead_of_being_repeated() -> None:
    async def test() -> None:
        it = Family("--refuse", count=1)
        (task,) = it.supervisor.start()
        try:
            with pytest.raises(ConfigurationError, match="refused to start"):
                await task
        finally:
            await it.supervisor.stop()
            it.listener.close()

    run(test())


PARENT = """
import asyncio
from tests.unit.test_lifecycle import family

async def main():
    async with family() as it:
        print(*await it.pids(2), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_no_child_outlives_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=CHECKOUT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    waits = [os.pidfd_open(pid) for pid in children]
    parent.kill()
    parent.wait(timeout=60)
    parent.stdout.close()
    for wait in waits:
        assert select.select([wait], [], [], 10)[0], "a child lives on"
        os.close(wait)


def test_what_a_child_inherits_is_not_for_people() -> None:
    with pytest.raises(ConfigurationError, match="--inherited"):
        Inherited.parse("listen=9999")
    with pytest.raises(ConfigurationError, match="--inherited"):
        Inherited.parse("nonsense")


# ---------------------------------------------------------------- sockets and health


@pytest.mark.parametrize("text", ["8080", "localhost", "::1:80", "a:b", "127.0.0.1:99999", "127.0.0.1:-1"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_TEST="):
        listen("SLUICE_TEST", text)


def test_a_port_that_is_taken_is_named() -> None:
    with listen("SLUICE_TEST", "127.0.0.1:0") as first, pytest.raises(ConfigurationError, match="is taken"):
        listen("SLUICE_TEST", str(address_of(first)))


@pytest.mark.parametrize("text", [":0", "[::1]:0", "0.0.0.0:0"])
def test_other_addresses_can_be_listened_on(text: str) -> None:
    with listen("SLUICE_TEST", text) as listener:
        assert address_of(listener).port


def test_health_names_what_is_not_ready() -> None:
    def broken() -> str | None:
        raise ValueError("oh")

    health = Health()
    forget = health.register("log", lambda: "it is away")
    health.register("database", lambda: None)
    health.register("broken", broken)
    assert health.not_ready() == {"log": "it is away", "broken": "the check itself failed: oh"}
    forget()
    assert "log" not in health.not_ready()
    health.stopping()
    assert "shutting down" in health.not_ready()["process"]
    with pytest.raises(ValueError, match="two health checks"):
        health.register("database", lambda: None)
