"""What one state directory remembers: its ports, passwords and running processes.

Ports are chosen once and kept, so that clients find a restarted part where it was.
"""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .errors import ServicesError
from .locks import cache_dir, locked
from .processes import Process

STATE = "state.json"
# Below the kernel's ephemeral range: no outgoing connection takes a stopped part's port,
# and a client that retries it cannot connect to itself.
PORTS = range(15000, 32000)
PORT_TRIES = 1000


@dataclass
class State:
    """One state directory; every change is followed by `save`."""

    directory: Path
    ports: dict[str, int] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    kafka_advertise: int | None = None
    small_disk: bool = False
    tls: bool = False
    # Digest of the SQL that made the database's roles.
    bootstrap: str = ""

    @classmethod
    def load(cls, directory: Path) -> "State":
        file = directory / STATE
        if not file.exists():
            return cls(directory)
        kept = json.loads(file.read_text())
        kept["processes"] = {name: Process(**was) for name, was in kept["processes"].items()}
        return cls(directory, **kept)

    def save(self) -> None:
        kept = asdict(self)
        del kept["directory"]
        temporary = self.directory / f"{STATE}.new"
        # Readable by its owner only, for it holds the passwords.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(kept, file, indent=2)
        temporary.replace(self.directory / STATE)

    def home(self, part: str) -> Path:
        home = self.directory / part
        home.mkdir(parents=True, exist_ok=True)
        return home

    def log(self, part: str) -> Path:
        return self.home(part) / "log"

    def running(self, part: str) -> Process | None:
        process = self.processes.get(part)
        return process if process is not None and process.alive() else None

    def choose_ports(self, names: tuple[str, ...]) -> None:
        """Give each of `names` a port that no other state directory on this machine has."""
        missing = [name for name in names if name not in self.ports]
        if not missing:
            return
        with locked(cache_dir() / "ports.lock"):
            register = cache_dir() / "ports.json"
            taken = _taken(register)
            for name in missing:
                self.ports[name] = _free_port(taken)
                taken[str(self.ports[name])] = str(self.directory)
            self.save()
            temporary = register.with_suffix(".new")
            temporary.write_text(json.dumps(taken, indent=2))
            temporary.replace(register)

    def choose_password(self, role: str) -> str:
        if role not in self.passwords:
            self.passwords[role] = secrets.token_urlsafe(24)
            self.save()
        return self.passwords[role]


def _taken(register: Path) -> dict[str, str]:
    """Port to state directory, without the directories that are no more."""
    kept: dict[str, str] = json.loads(register.read_text()) if register.exists() else {}
    return {port: home for port, home in kept.items() if Path(home, STATE).exists()}


def _free_port(taken: dict[str, str]) -> int:
    for _ in range(PORT_TRIES):
        port = secrets.choice(PORTS)
        if str(port) not in taken and not port_in_use(port):
            return port
    raise ServicesError(f"no free port between {PORTS.start} and {PORTS.stop - 1}")


def port_in_use(port: int) -> bool:
    with socket.socket() as probe:
        # Connections that linger in TIME_WAIT do not keep a server from its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
