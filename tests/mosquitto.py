"""A Mosquitto of a test's own that asks clients for certificates, and clients of it. Left out: whose certificates."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.sockets import address_of, listen
from tests.support import eventually

PROGRAM: Final = "/usr/sbin/mosquitto"
_TIMEOUT_S: Final = 20.0
_CONFIGURATION: Final = """
user root
persistence false
allow_anonymous false
log_dest stderr
listener {port} 127.0.0.1
cafile {directory}/roots.pem
certfile {directory}/server.crt
keyfile {directory}/server.key
crlfile {directory}/crl.pem
require_certificate true
use_identity_as_username true
acl_file {directory}/acl
"""


@dataclass(frozen=True)
class Client:
    """A device's certificate and key, in files."""

    certificate: Path
    key: Path

    @classmethod
    def of(cls, directory: Path, name: str, certificate: str, key: str) -> "Client":
        made = cls(directory / f"{name}.crt", directory / f"{name}.key")
        made.certificate.write_text(certificate)
        made.key.write_text(key)
        return made


@dataclass
class Broker:
    """A broker whose files stand in `directory`: `roots.pem`, `crl.pem`, `server.crt`, `server.key`."""

    directory: Path
    port: int
    process: "subprocess.Popen[bytes]"

    def reload(self) -> None:
        """Read certificates and lists again, as an operator has it done."""
        self.process.send_signal(signal.SIGHUP)

    def lets_in(self, client: Client, topic: str = "cpi/x/telemetry") -> bool:
        """Whether a message of the client is acknowledged."""
        return self._run("mosquitto_pub", client, "-t", topic, "-m", "1", "-q", "1").returncode == 0

    def hears(self, client: Client, topic: str, publish: "list[tuple[Client, str]]") -> list[str]:
        """The topics of what the client gets while others publish, up to what is published last."""
        listening = subprocess.Popen(
            ["mosquitto_sub", *self._options(client), "-t", topic, "-q", "1", "-v", "-C", "1", "-W", "15"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            while listening.poll() is None:
                for sender, where in publish:
                    assert self.lets_in(sender, where)
            return listening.communicate(timeout=_TIMEOUT_S)[0].splitlines()
        finally:
            listening.kill()
            listening.wait()

    def _options(self, client: Client) -> list[str]:
        files = {"cafile": self.directory / "roots.pem", "cert": client.certificate, "key": client.key}
        named = [part for name, file in files.items() for part in (f"--{name}", str(file))]
        return ["-h", "127.0.0.1", "-p", str(self.port), *named]

    def _run(self, program: str, client: Client, *more: str) -> "subprocess.CompletedProcess[bytes]":
        command = ["timeout", "10", program, *self._options(client), *more]
        return subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)


@contextmanager
def broker(directory: Path, *, acl: str) -> Iterator[Broker]:
    """Ended by its own pid. `acl`: what clients may do, as Mosquitto spells it."""
    with listen("TEST", "127.0.0.1:0") as free:
        port = address_of(free).port
    (directory / "acl").write_text(acl)
    (directory / "acl").chmod(0o600)
    file = directory / "mosquitto.conf"
    file.write_text(_CONFIGURATION.format(port=port, directory=directory))
    with (directory / "mosquitto.log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "-c", str(file)], stdout=log, stderr=log)
    try:
        eventually("the broker runs", lambda: b" running" in (directory / "mosquitto.log").read_bytes())
        yield Broker(directory, port, process)
    finally:
        process.terminate()
        process.wait(_TIMEOUT_S)
