"""A command through `sluice up` and a real broker, with the broker's own tools as the device and its last will."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.bridge_rig import Broker, own_broker
from tests.support import ask, eventually
from tests.system.test_up import below, up


@pytest.fixture
def data() -> Iterator[Path]:
    """Not below pytest's own directory, which every session closes to the user PostgreSQL runs as."""
    with TemporaryDirectory(prefix="sluice-up-") as directory:
        yield Path(directory) / "data"
        eventually("nothing works in it any more", lambda: not below(Path(directory)))


@contextmanager
def device(broker: Broker, topic: str, will: str) -> Iterator["subprocess.Popen[str]"]:
    """Listens on `topic`; its broker says on `will` that it is gone when it is killed."""
    process = subprocess.Popen(
        ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-q", "1", "-t", topic, "-V", "5",
         "--will-topic", will, "--will-payload", "offline", "--will-qos", "1"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_command_is_sent_answered_and_its_device_seen_until_its_last_will(data: Path) -> None:
    with own_broker() as broker, up(data, "--json", SLUICE_MQTT_URL=broker.url) as running:
        demo = running.json
        begin = f"v1/gateways/{demo['organisation_id']}/{demo['device_id']}"
        one = f"{demo['url']}/api/v1/devices/{demo['device_id']}"

        def get(path: str) -> Any:
            return ask(f"{one}/{path}", token=demo["api_key"]).json()

        def asked(name: str) -> str:
            body = json.dumps({"command": name}).encode()
            answer = ask(f"{one}/commands", token=demo["api_key"], method="POST", body=body)
            assert answer.status == 201, answer.body
            return str(answer.json()["command_id"])

        with device(broker, f"{begin}/commands", f"{begin}/status") as box:
            assert box.stdout is not None
            broker.publish(f"{begin}/status", "online")
            eventually("the device is there", lambda: get("health")["online"])
            command = asked("restart")
            told = json.loads(box.stdout.readline())
            assert (told["cmdId"], told["action"]) == (command, "restart")
            eventually("it is sent", lambda: get(f"commands/{command}")["state"] == "SENT")
            answer = {"cmdId": command, "status": "SUCCESS", "response": {"uptime": 1}}
            broker.publish(f"{begin}/commands/response", json.dumps(answer))
            eventually("it is answered", lambda: get(f"commands/{command}")["state"] == "SUCCESS")
            assert get(f"commands/{command}")["response"] == {"uptime": 1}
        eventually("its last will is known", lambda: not get("health")["online"])
        assert get("health")["online_changed_at"] > get("health")["last_seen_at"]
        assert running.end() == 0
