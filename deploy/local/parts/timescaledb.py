"""PostgreSQL with TimescaleDB: its data, its roles and its life in one state directory.

Where the programs come from is the business of `postgresql.py`.
"""

import hashlib
import os
import shutil
import signal
from pathlib import Path
from urllib.parse import quote

from .errors import ServicesError
from .packages import need, run, say
from .postgresql import Installation, installation
from .state import State
from .tls import certificate

HERE = Path(__file__).resolve().parent.parent
BOOTSTRAP = HERE.parent / "sql" / "bootstrap.sql"
SUPERUSER = "postgres"
OWNER, APP = "sluice_owner", "sluice"
PWFILE = "password"
SMALL_DISK_MEGABYTES = 512


class TimescaleDB:
    name = "timescaledb"
    ports: tuple[str, ...] = ("timescaledb",)
    # A fast shutdown; SIGTERM would wait for the clients to leave.
    stop_signal = signal.SIGINT

    def prepare(self, state: State) -> None:
        programs = installation()
        volume = _volume(state)
        for role in (SUPERUSER, OWNER, APP):
            state.choose_password(role)
        if state.small_disk:
            _mount_small_disk(state, volume / "pgdata")
            programs.own(volume / "pgdata")
        programs.own(volume)
        # The password file goes last: while it is there, an initialisation was cut short.
        if (volume / PWFILE).exists() or not (volume / "pgdata" / "PG_VERSION").exists():
            _initialise(state, programs, volume)
        _configure(state, programs, volume / "pgdata")

    def command(self, state: State) -> list[str]:
        programs, volume = installation(), _volume(state)
        server = programs.command(volume, "postgres", "-D", f"{programs.seen(volume)}/pgdata")
        if (dead := state.processes.get(self.name)) is None:
            return server
        # Killed and not yet reaped by init, it would pass for a running server: PostgreSQL asks
        # only whether the pid in its lock file exists, but trusts its caller's about that one.
        return ["env", f"PG_GRANDPARENT_PID={dead.pid}", *server]

    def answers(self, state: State) -> bool:
        try:
            _query(state, SUPERUSER, "postgres", "SELECT 1")
        except ServicesError:
            return False
        return True

    def complete(self, state: State) -> None:
        """Make the roles and the database, and prove that the application can query it."""
        wanted = hashlib.sha256(BOOTSTRAP.read_bytes()).hexdigest()
        # Not at every start: it would get in the way of clients that alter the same catalogue.
        if state.bootstrap != wanted:
            _bootstrap(state)
            state.bootstrap = wanted
            state.save()
        _query(state, APP, "sluice", "SET ROLE sluice_app; SELECT 1")

    def release(self, state: State) -> None:
        disk = _volume(state) / "pgdata"
        if os.path.ismount(disk):
            run(["umount", str(disk)])

    def exports(self, state: State) -> dict[str, str]:
        place = f"127.0.0.1:{state.ports[self.name]}/sluice"
        if state.tls:
            place += f"?sslmode=verify-full&sslrootcert={quote(str(certificate(state).authority))}"
        app, owner = (f"{role}:{state.passwords[role]}" for role in (APP, OWNER))
        return {
            "SLUICE_DATABASE_URL": f"postgresql://{app}@{place}",
            "SLUICE_DATABASE_OWNER_URL": f"postgresql://{owner}@{place}",
        }


def _volume(state: State) -> Path:
    """All that the server sees of this state directory; its data directory lies in it."""
    volume = state.home("timescaledb") / "volume"
    volume.mkdir(exist_ok=True)
    return volume


def choose_small_disk(state: State) -> None:
    """From now on this state directory's database lives on a small disk."""
    if os.geteuid() != 0:
        raise ServicesError("--small-disk mounts a file system: run as root")
    if not state.small_disk and (_volume(state) / "pgdata" / "PG_VERSION").exists():
        raise ServicesError("--small-disk is for a new database: `services wipe` first")
    state.small_disk = True


def _mount_small_disk(state: State, data: Path) -> None:
    if os.path.ismount(data):
        return
    image = state.home("timescaledb") / "small-disk.img"
    if not image.exists():
        unfinished = image.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            file.truncate(SMALL_DISK_MEGABYTES * 1024 * 1024)
        # No blocks kept back for root: the disk is full when it says so.
        run([need("mkfs.ext4", ["e2fsprogs"]), "-q", "-m", "0", str(unfinished)])
        unfinished.rename(image)
    data.mkdir(exist_ok=True)
    run(["mount", "-o", "loop", str(image), str(data)])
    # initdb wants an empty directory.
    shutil.rmtree(data / "lost+found", ignore_errors=True)


def _initialise(state: State, programs: Installation, volume: Path) -> None:
    say("making a database cluster")
    # An interrupted attempt leaves a directory that initdb would refuse.
    for leftover in ("pgdata", "wal"):
        shutil.rmtree(volume / leftover, ignore_errors=True)
    password_file = volume / PWFILE
    password_file.write_text(state.passwords[SUPERUSER])
    programs.own(password_file, 0o600)
    seen = programs.seen(volume)
    options = ["--encoding=UTF8", "--locale=C.UTF-8", "--auth=scram-sha-256", "--no-sync"]
    where = ["-D", f"{seen}/pgdata", "-U", SUPERUSER, f"--pwfile={seen}/{PWFILE}"]
    if state.small_disk:
        # Rows are to find the disk full and be refused; without room for its log the server
        # would instead fall over at a moment that no test can foresee.
        where.append(f"--waldir={seen}/wal")
    run(programs.command(volume, "initdb", *options, *where))
    password_file.unlink()


def _configure(state: State, programs: Installation, data: Path) -> None:
    shared = (HERE / "conf" / "postgresql.conf").read_text()
    config = data / "postgresql.conf"
    secure = _install_certificate(state, programs, data) if state.tls else ""
    config.write_text(f"{shared}port = {state.ports['timescaledb']}\n{secure}")
    programs.own(config, 0o600)


def _install_certificate(state: State, programs: Installation, data: Path) -> str:
    """Copies that the server may read, and the lines that name them."""
    made = certificate(state)
    for source, name in ((made.certificate, "server.crt"), (made.key, "server.key")):
        shutil.copyfile(source, data / name)
        programs.own(data / name, 0o600)
    return "ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\n"


def _bootstrap(state: State) -> None:
    exists = "SELECT 1 FROM pg_database WHERE datname = 'sluice'"
    if not _query(state, SUPERUSER, "postgres", exists).strip():
        _query(state, SUPERUSER, "postgres", "CREATE DATABASE sluice")
    logins = "".join(f"ALTER ROLE {role} PASSWORD '{state.passwords[role]}';\n" for role in (OWNER, APP))
    _query(state, SUPERUSER, "sluice", BOOTSTRAP.read_text() + logins)


def _query(state: State, role: str, database: str, sql: str) -> str:
    """Run SQL as a client would, over TCP; it goes by standard input, which no `ps` shows."""
    port = str(state.ports["timescaledb"])
    client = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", port]
    command = installation().command(_volume(state), *client, "-U", role, "-d", database)
    return run(command, stdin=sql, environment={"PGPASSWORD": state.passwords[role]})
