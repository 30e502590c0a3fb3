"""The real parts a run stands on: those that SLUICE_ variables name, or an instance of its own, made and removed.

Also starts and ends the roles of Sluice as processes. Left out: what is measured.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

import asyncpg

from bench.errors import BenchError
from bench.usage import family, free_port, listener
from runtime.secrets import VARIABLE as KEYS_VARIABLE
from runtime.secrets import new_ring

CHECKOUT: Final = Path(__file__).resolve().parents[1]
SERVICES: Final = CHECKOUT / "deploy" / "local" / "services"
PARTS: Final = ("SLUICE_LOG_URL", "SLUICE_DATABASE_URL", "SLUICE_DATABASE_OWNER_URL")
BROKER: Final = "SLUICE_MQTT_URL"
START_TIMEOUT_S: Final = 900.0
READY_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 40.0
POLL_S: Final = 0.05
TAIL_BYTES: Final = 2_000


def progress(text: str) -> None:
    """What is under way, for whoever watches; figures go to standard output."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Parts:
    """Kafka and PostgreSQL: where they are, for the roles, and which processes they are."""

    environment: Mapping[str, str]
    kafka: int
    postgresql: int
    superuser_url: str | None
    """Only of an instance of the run's own."""
    mosquitto: int | None = None
    """Only where a broker was asked for."""

    @property
    def database_url(self) -> str:
        return self.environment["SLUICE_DATABASE_URL"]

    @property
    def owner_url(self) -> str:
        return self.environment["SLUICE_DATABASE_OWNER_URL"]


@contextmanager
def real_parts(directory: Path, kept: Path | None = None, *, with_broker: bool = False) -> Iterator[Parts]:
    """Parts that are ready and migrated; those in `kept` stay there, and are what a later run finds.

    `with_broker`: a broker of MQTT too.
    Raises `BenchError` when they cannot be had.
    """
    wanted = (*PARTS, BROKER) if with_broker else PARTS
    given = [name for name in wanted if os.environ.get(name)]
    if given and len(given) < len(wanted):
        raise BenchError(f"set all of {', '.join(wanted)} to measure on those, or none to have parts started")
    if given:
        yield _migrated({name: os.environ[name] for name in wanted}, None)
        return
    (kept or directory).mkdir(parents=True, exist_ok=True)
    home = kept or Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
    names = ["kafka", "timescaledb", *(["mosquitto"] if with_broker else [])]
    progress(f"starting {', '.join(names)} in {home}")
    try:
        exported = run_services(home, "start", *names)
        lines = [line.removeprefix("export ") for line in exported.splitlines()]
        superuser_url = read_superuser_url(home)
        asyncio.run(_without_autovacuum(superuser_url))
        yield _migrated(dict(line.split("=", 1) for line in lines), superuser_url)
    finally:
        run_services(home, "wipe" if kept is None else "stop")


def run_services(home: Path, *arguments: str) -> str:
    """What the script prints about the instance in `home`. Raises `BenchError` for anything but success."""
    command = [str(SERVICES), "--dir", str(home), *arguments]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=START_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"waited in vain for `{' '.join(command)}`: {START_TIMEOUT_S:g} s at most") from None
    if done.returncode:
        raise BenchError(f"`{' '.join(command)}` failed with status {done.returncode}")
    return done.stdout


def read_superuser_url(home: Path) -> str:
    state = json.loads((home / "state.json").read_text())
    password = quote(state["passwords"]["postgres"])
    return f"postgresql://postgres:{password}@127.0.0.1:{state['ports']['timescaledb']}/sluice"


async def _without_autovacuum(superuser_url: str) -> None:
    """It would wake up once a minute, in one phase of a run or in another: what it does is done when it is due."""
    connection = await asyncpg.connect(superuser_url)
    await connection.execute("ALTER SYSTEM SET autovacuum = off")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()


def _migrated(urls: Mapping[str, str], superuser_url: str | None) -> Parts:
    log = urlsplit(urls["SLUICE_LOG_URL"])
    if not log.scheme.startswith("kafka"):
        raise BenchError("SLUICE_LOG_URL does not name Kafka: the figures are of the real parts")
    keys = os.environ.get(KEYS_VARIABLE) or str(new_ring())
    environment = {**os.environ, **urls, KEYS_VARIABLE: keys}
    done = subprocess.run(
        sluice_command("migrate"), env=environment, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise BenchError("`sluice migrate` failed")
    database = urlsplit(urls["SLUICE_DATABASE_URL"])
    broker = listener(urlsplit(urls[BROKER]).port or 1883) if BROKER in urls else None
    return Parts(environment, listener(log.port or 9092), listener(database.port or 5432), superuser_url, broker)


def sluice_command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "deploy.cli", *arguments]


# ---------------------------------------------------------------- processes


class Process:
    """A process that was started for the run, in a session of its own: a Ctrl-C reaches it through us alone."""

    def __init__(self, name: str, argv: list[str], environment: Mapping[str, str], probe: str, output: Path) -> None:
        self.name = name
        self._probe = probe
        self._output = output
        with output.open("wb") as file:
            self._popen = subprocess.Popen(
                argv, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def ready(self) -> None:
        """Once its probe says so. Raises `BenchError` when it ends before, or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not await asyncio.to_thread(answers, self._probe):
            if self._popen.poll() is not None:
                raise BenchError(f"{self.name} ended with status {self._popen.returncode}: {self._tail()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} is not ready after {READY_TIMEOUT_S:g} s: {self._tail()}")
            await asyncio.sleep(POLL_S)

    def output(self) -> str:
        """All that it has written so far."""
        return self._output.read_text(errors="replace")

    def _tail(self) -> str:
        return self._output.read_bytes()[-TAIL_BYTES:].decode(errors="replace")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Where it stands, with its processes, until this is left."""
        for pid in family(self.pid):
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in family(self.pid):
                os.kill(pid, signal.SIGCONT)

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._popen.poll()

    @property
    def failed(self) -> bool:
        """Whether it has ended otherwise than it does when it is asked to."""
        return self.status not in (None, 0)

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    async def stop(self) -> None:
        """Ask it to end, and make it when it does not."""
        if self._popen.poll() is not None:
            return
        self._popen.terminate()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._popen.wait), STOP_TIMEOUT_S)
        finally:
            if self._popen.poll() is None:
                # Its children end with it: they notice that their parent is gone.
                self._popen.kill()
                self._popen.wait()


class Workshop:
    """Starts processes, and ends those that are left when it is left."""

    def __init__(self, parts: Parts, directory: Path, stack: AsyncExitStack) -> None:
        self._parts = parts
        self._directory = directory
        self._stack = stack
        self._started = 0

    async def role(self, name: str, **settings: str) -> "Role":
        """`sluice NAME` with these settings, ready."""
        metrics = free_port()
        environment = {**self._parts.environment, **settings, "SLUICE_METRICS_LISTEN": f"127.0.0.1:{metrics}"}
        probe = f"http://127.0.0.1:{metrics}/health/ready"
        return Role(await self.start(f"sluice {name}", sluice_command(name), probe, environment), metrics)

    async def start(
        self, name: str, argv: list[str], probe: str, environment: Mapping[str, str] | None = None
    ) -> Process:
        self._started += 1
        output = self._directory / f"{self._started}-{name.replace(' ', '-')}.log"
        process = Process(name, argv, os.environ if environment is None else environment, probe, output)
        self._stack.push_async_callback(process.stop)
        await process.ready()
        return process


@asynccontextmanager
async def workshop(parts: Parts) -> AsyncIterator[Workshop]:
    """A place for processes; their output is thrown away with it."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        async with AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            current = asyncio.current_task()
            assert current is not None
            # A Ctrl-C cancels already; being told to end is to leave as little behind.
            loop.add_signal_handler(signal.SIGTERM, current.cancel)
            stack.callback(loop.remove_signal_handler, signal.SIGTERM)
            yield Workshop(parts, Path(directory), stack)


class Role:
    """A role of Sluice that runs, and what it says of itself."""

    def __init__(self, process: Process, metrics_port: int) -> None:
        self.process = process
        self._metrics = f"http://127.0.0.1:{metrics_port}/metrics"

    @property
    def pid(self) -> int:
        return self.process.pid

    async def stop(self) -> None:
        await self.process.stop()

    def held(self) -> AbstractContextManager[None]:
        return self.process.held()

    async def metrics(self) -> dict[str, float]:
        """Its metrics by name and labels, as they are written."""
        text = await asyncio.to_thread(_get, self._metrics)
        lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
        return body.decode()


def answers(url: str) -> bool:
    """Whether the server there says 200."""
    with suppress(OSError, urllib.error.URLError):
        _get(url)
        return True
    return False
