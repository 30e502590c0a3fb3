"""Kafka and TimescaleDB that ask for TLS and logins, in a state directory of their own, to be wiped afterwards."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.conftest import exports, run_services


@dataclass(frozen=True)
class SecureParts:
    """Where they are, as `services` tells it, and what they wrote."""

    directory: Path
    environment: dict[str, str]

    @property
    def log_url(self) -> str:
        return self.environment["SLUICE_LOG_URL"]

    @property
    def database_url(self) -> str:
        return self.environment["SLUICE_DATABASE_URL"]

    @property
    def superuser_url(self) -> str:
        state = json.loads((self.directory / "state.json").read_text())
        return (
            f"postgresql://postgres:{state['passwords']['postgres']}@127.0.0.1:{state['ports']['timescaledb']}/sluice"
        )

    @property
    def passwords(self) -> list[str]:
        """Of the logins that Sluice uses."""
        found = [urlsplit(url).password for url in self.environment.values()]
        return [password for password in found if password]

    def services(self, *arguments: str) -> str:
        return run_services(*arguments, "--dir", str(self.directory))

    def written(self) -> str:
        """What the servers themselves logged."""
        return "".join((self.directory / part / "log").read_text() for part in ("kafka", "timescaledb"))


@contextmanager
def secure_parts(directory: Path) -> Iterator[SecureParts]:
    try:
        printed = run_services("start", "kafka", "timescaledb", "--tls", "--dir", str(directory))
        yield SecureParts(directory, exports(printed))
    finally:
        run_services("wipe", "--dir", str(directory))
