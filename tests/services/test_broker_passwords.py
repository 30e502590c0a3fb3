"""What is kept of a plant's password is what a real Mosquitto checks it by, from its password file or its plugin."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.registry.broker_passwords import broker_hash, make_password
from runtime.sockets import address_of, listen

STARTED_S = 10.0
REFUSED = 5  # what mosquitto_pub ends with when its name or password is


def plugin() -> str:
    found = next(Path("/usr/lib").rglob("mosquitto_dynamic_security.so"))
    return str(found)


@contextmanager
def broker(directory: Path, *configuration: str) -> Iterator[int]:
    """The port of a Mosquitto with that configuration."""
    listener = listen("TEST", "127.0.0.1:0")
    port = address_of(listener).port
    listener.close()
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous false", "user root", *configuration]
    (directory / "mosquitto.conf").write_text("\n".join(lines) + "\n")
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    assert program is not None
    process = subprocess.Popen([program, "-c", str(directory / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def published(port: int, password: str) -> int:
    """How mosquitto_pub ends, once the broker answers at all."""
    until = time.monotonic() + STARTED_S
    while True:
        command = [
            "mosquitto_pub",
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-u",
            "plant",
            "-P",
            password,
            "-t",
            "a",
            "-n",
        ]
        done = subprocess.run(command, capture_output=True, check=False, timeout=10)
        if done.returncode in (0, REFUSED) or time.monotonic() > until:
            return done.returncode


@pytest.mark.usefixtures("services")
@pytest.mark.parametrize("kept", ["file", "plugin"])
def test_a_broker_lets_the_password_in_and_no_other(tmp_path: Path, kept: str) -> None:
    password = make_password()
    made = broker_hash(password)
    if kept == "file":
        (tmp_path / "passwords").write_text(f"plant:{made}\n")
        configuration = [f"password_file {tmp_path / 'passwords'}"]
    else:
        _, _, iterations, salt, content = made.split("$")
        client = {"username": "plant", "password": content, "salt": salt, "iterations": int(iterations), "roles": []}
        (tmp_path / "plugin.json").write_text(
            json.dumps({"defaultACLAccess": {"publishClientSend": True}, "clients": [client], "roles": []})
        )
        configuration = [f"plugin {plugin()}", f"plugin_opt_config_file {tmp_path / 'plugin.json'}"]
    with broker(tmp_path, *configuration) as port:
        assert [published(port, one) for one in (password, password[:-1], "")] == [0, REFUSED, REFUSED]
