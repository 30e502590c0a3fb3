"""A plant's whole life with nothing but HTTP, openssl and the broker's own tools, over the broker that is delivered.

API → keeper → secured broker → bridge → log → worker → API → command → answer, with `sluice up` as both bridge and
sender of commands. Left out: each part's own cases.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import pytest

from ingest.mqtt.topics import FAMILIES
from tests.broker_rig import BRIDGE_PASSWORD, COMMANDS_PASSWORD, MTLS, OURS, PASSWORD, TOKEN, Broker, configured
from tests.support import ask, eventually
from tests.system.roles import clean_environment, role, sluice
from tests.system.test_simulate import log_in
from tests.system.test_up import Up, below, up

TIMEOUT_S = 60
#: Less than the minute of silence that says so, too.
WILL_S = 40


def tool(*command: str, sent: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, input=sent, capture_output=True, timeout=TIMEOUT_S, check=False)


def signature(secret: str, *parts: str) -> str:
    """As `openssl` makes it."""
    options = ("-sha256", "-mac", "HMAC", "-macopt", f"hexkey:{secret}")
    done = tool("openssl", "dgst", *options, sent="|".join(parts).encode())
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split()[-1]


@dataclass
class Installation:
    """`sluice up` with a secured broker whose identities are kept."""

    directory: Path
    running: Up
    environment: dict[str, str]

    def ask(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        demo = self.running.json
        sent = None if body is None else json.dumps(body).encode()
        answer = ask(f"{demo['url']}/api/v1/{path}", token=demo["api_key"], method=method, body=sent)
        assert answer.status == status, answer.body
        return answer.json()

    def file(self, name: str, content: str) -> str:
        file = self.directory / name
        file.write_text(content)
        return str(file)

    def values(self, device: str, metric: str) -> list[Any]:
        """What was measured, in the order of its times."""
        return [one["value"] for one in self.ask("GET", f"readings?device_id={device}&metric={metric}")["data"]]


@dataclass
class Plant:
    """A plant, and how its tools reach the broker."""

    installation: Installation
    id: str
    secret: str
    options: list[str]

    @classmethod
    def make(cls, installation: Installation, method: str) -> "Plant":
        """Created and provisioned: with what stands in its package alone."""
        body = {"name": "Roof", "serialNumber": uuid4().hex, "type": "GATEWAY", "authMethod": method}
        plant = installation.ask("POST", "plants", body, 201)["id"]
        package = installation.ask("POST", f"plants/{plant}/provision")
        security, mqtt = package["security"], package["mqtt"]
        options = ["-h", mqtt["broker"], "-p", str(mqtt["port"])]
        options += ["--cafile", installation.file(f"{plant}.ca", security["caCert"])]
        if method == "MTLS":
            options += ["--cert", installation.file(f"{plant}.crt", security["clientCert"])]
            options += ["--key", installation.file(f"{plant}.key", security["clientKey"])]
        else:
            options += ["-u", security["username"], "-P", security.get("password") or cls.token(installation, plant)]
        return cls(installation, plant, security["hmacSecret"], options)

    @staticmethod
    def token(installation: Installation, plant: str) -> str:
        return str(installation.ask("POST", f"plants/{plant}/mqtt-token")["token"])

    def step(self, name: str) -> Any:
        return self.installation.ask("POST", f"plants/{self.id}/{name}")

    def now(self) -> Any:
        return self.installation.ask("GET", f"plants/{self.id}")

    def publish(self, topic: str, payload: str) -> str | None:
        """At QoS 1: why it was refused, or None."""
        command = ("mosquitto_pub", *self.options, "-V", "5", "-q", "1", "-t", topic, "-s")
        done = tool(*command, sent=payload.encode())
        said = done.stderr.decode()
        return said or f"status {done.returncode}" if done.returncode or said else None

    def say(self, kind: str, told: Any) -> str | None:
        return self.publish(f"cpi/{self.id}/{kind}", told if isinstance(told, str) else json.dumps(told))

    def snapshot(self, power: int, imported: float, secret: str | None = None) -> str:
        ts, nonce = str(time.time_ns() // 1_000_000), uuid4().hex
        values = f'{{"exported":3.5,"imported":{imported},"power":{power}}}'
        devices = f'[{{"externalId":"M1","type":"METER","values":{values}}}]'
        sig = signature(secret or self.secret, self.id, ts, nonce, "", devices)
        return f'{{"ts":{ts},"n":"{nonce}","sig":"{sig}","devices":{devices}}}'

    def measures(self, power: int, imported: float = 1204.25, secret: str | None = None) -> None:
        """Let in, once the broker knows it, and stored."""
        eventually("it is let in", lambda: self.say("telemetry", self.snapshot(power, imported, secret)) is None)
        eventually("it is stored", lambda: power in self.installation.values(self.id, "power"))

    def is_refused(self) -> bool:
        return self.say("telemetry", self.snapshot(-1, 1300.5)) is not None

    def is_told(self, box: "subprocess.Popen[bytes]", body: Any) -> tuple[str, Any]:
        """What it is asked for, and what it hears of that."""
        assert box.stdout is not None
        asked = self.installation.ask("POST", f"plants/{self.id}/commands", body, 201)["cmdId"]
        return asked, json.loads(box.stdout.readline())

    @contextmanager
    def listening(self) -> Iterator["subprocess.Popen[bytes]"]:
        """To its commands, with a session and a last will; nothing is to be published meanwhile: a plant has one."""
        will = ["--will-topic", f"cpi/{self.id}/status", "--will-payload", "offline", "--will-qos", "1"]
        topic = ["-q", "1", "-c", "-i", "plant", "-t", f"cpi/{self.id}/command"]
        assert tool("mosquitto_sub", *self.options, *topic, "-E").returncode == 0
        process = subprocess.Popen(
            ["mosquitto_sub", *self.options, *topic, *will], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    """In the order of the README: the broker's files come from what `sluice up` made."""
    # Not below pytest's own directory, which is closed to the user PostgreSQL runs as.
    with TemporaryDirectory(prefix="sluice-plants-") as name:
        directory = Path(name)
        (directory / "broker").mkdir()
        with configured(directory / "broker") as broker:
            ours = f"127.0.0.1:{broker.ports[OURS]}"
            settings = {
                "SLUICE_MQTT_URL": f"mqtt://sluice-bridge:{BRIDGE_PASSWORD}@{ours}",
                "SLUICE_COMMANDS_MQTT_URL": f"mqtt://sluice-commands:{COMMANDS_PASSWORD}@{ours}",
                "SLUICE_MQTT_PUBLIC_URL": f"mqtts://localhost:{broker.ports[MTLS]}",
                "SLUICE_MQTT_TOKEN_PORT": str(broker.ports[TOKEN]),
                "SLUICE_MQTT_PASSWORD_PORT": str(broker.ports[PASSWORD]),
            }
            with up(directory / "data", "--json", lines=1, **settings) as running:
                environment = clean_environment(SLUICE_CONFIG=running.json["config"], XDG_CONFIG_HOME=name)
                keeper = environment | broker.keeping
                begin(broker, keeper)
                with role(keeper, "broker", "keep"):
                    connections = len(FAMILIES)
                    eventually(
                        "the bridge listens",
                        lambda: running.events.read_text().count("connected to the broker") >= connections,
                    )
                    yield Installation(directory, running, environment)
                assert running.end() == 0
        eventually("nothing works in it any more", lambda: not below(directory))


def begin(broker: Broker, environment: dict[str, str]) -> None:
    sluice(environment, "ca", "init")
    sluice(environment, "ca", "export", "--output", str(broker.roots))
    sluice(environment, "ca", "server-certificate", "--name", "localhost", "--output", str(broker.directory))
    sluice(environment, "broker", "seed", str(broker.clients_file))
    broker.start()


@pytest.mark.parametrize("method", ["MTLS", "TOKEN", "PASSWORD"])
def test_a_plant_lives_from_its_package_to_its_end(installation: Installation, method: str) -> None:
    plant = Plant.make(installation, method)
    plant.measures(-230)
    assert installation.values(plant.id, "energy_imported") == [1_204_250.0]
    plant.measures(-240, imported=1206.5)
    found = installation.ask("GET", f"telemetry/latest?plantId={plant.id}")["data"]
    assert {one["metric"]: (one["label"], one["value"], one["unit"]) for one in found} == {
        "power": ("M1", -240.0, "W"), "energy_imported": ("M1", 1_206_500.0, "Wh"),
        "energy_exported": ("M1", 3_500.0, "Wh"),
    }  # fmt: skip
    assert installation.ask("GET", f"plants/{plant.id}/energy/today")["imported"] in (2.25, 0.0)  # 0: at midnight
    commands_are_answered(plant)
    alarms_are_shown(plant)
    others_topics_are_refused(plant)
    secrets_are_rotated(plant)
    it_is_suspended_and_back(plant)
    plant.step("revoke")
    eventually("it is gone", plant.is_refused)
    installation.ask("POST", f"plants/{plant.id}/reactivate", status=400)
    assert plant.now()["lifecycleStatus"] == "DECOMMISSIONED"
    assert plant.is_refused()
    assert set(installation.values(plant.id, "power")) - {-1} == {-230, -240, 1, 2, 3}


def commands_are_answered(plant: Plant) -> None:
    def newest() -> Any:
        return plant.installation.ask("GET", f"plants/{plant.id}/commands")["data"][0]

    with plant.listening() as box:
        asked, told = plant.is_told(box, {"command": "reboot", "payload": {"delay": 5}, "target": "M1"})
        eventually("it is there", lambda: plant.now()["status"] == "ONLINE")
    eventually("its last will is known", lambda: plant.now()["status"] == "OFFLINE", WILL_S)
    assert (told["cmdId"], told["action"], told["deviceId"]) == (asked, "reboot", "M1")
    assert told["sig"] == signature(plant.secret, "M1", asked, str(told["ts"]), "reboot", '{"delay":5}')
    eventually("it is sent", lambda: newest()["responseStatus"] == "SENT")
    assert plant.say("ack", {"cmdId": asked, "status": "ACKNOWLEDGED"}) is None
    eventually("it is acknowledged", lambda: newest()["responseStatus"] == "ACKNOWLEDGED")
    assert plant.say("ack", {"cmdId": asked, "status": "SUCCESS", "response": {"uptime": 3}}) is None
    eventually("it is done", lambda: newest()["responseStatus"] == "SUCCESS")
    assert newest()["response"] == {"uptime": 3}


def alarms_are_shown(plant: Plant) -> None:
    assert plant.say("alarm", {"type": "THRESHOLD_EXCEEDED", "severity": "WARNING", "message": "too hot"}) is None
    (alert,) = eventually("the alert stands", lambda: plant.now()["alerts"])
    assert (alert["type"], alert["severity"], alert["status"]) == ("THRESHOLD_EXCEEDED", "WARNING", "ACTIVE")


def others_topics_are_refused(plant: Plant) -> None:
    for topic in (f"cpi/{uuid4()}/telemetry", f"v1/readings/any/{uuid4()}", f"cpi/{plant.id}/command"):
        assert "Not authorized" in (plant.publish(topic, "1") or ""), topic


def secrets_are_rotated(plant: Plant) -> None:
    former, plant.secret = plant.secret, plant.step("rotate-secret")["hmacSecret"]
    plant.measures(1, secret=former)
    plant.measures(2)
    assert plant.now()["authFailureCount"] == 0
    assert plant.say("telemetry", plant.snapshot(99, 1206.5, secret="00" * 32)) is None
    eventually("it is counted", lambda: plant.now()["authFailureCount"] == 1)
    assert 99 not in plant.installation.values(plant.id, "power")


def it_is_suspended_and_back(plant: Plant) -> None:
    with plant.listening() as box:
        plant.is_told(box, {"command": "identify"})
        plant.step("suspend")
        eventually("it is cut off, and not let in again", lambda: box.poll() is not None)
    assert plant.is_refused()
    plant.step("reactivate")
    plant.measures(3)


def test_a_device_that_keeps_its_key_is_given_a_certificate_and_publishes(installation: Installation) -> None:
    token = installation.ask("POST", "devices/registration/tokens", {"deviceName": uuid4().hex}, 201)["token"]
    key, request = str(installation.directory / "device.key"), str(installation.directory / "device.csr")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    made = tool("openssl", "req", "-new", *curve, "-nodes", "-keyout", key, "-subj", "/", "-out", request)
    assert made.returncode == 0, made.stderr
    body = {"token": token, "csr": Path(request).read_text()}
    given = installation.ask("POST", "devices/provision", body, 201)
    mqtt = given["mqtt"]
    files = ("--cafile", installation.file("device.ca", given["caChain"]), "--key", key)
    shown = ("--cert", installation.file("device.crt", given["certificate"]))
    message = '{"measurements":[{"type":"temperature","value":4.5,"unit":"°C"}]}'
    done = tool(
        "mosquitto_pub", "-h", mqtt["broker"], "-p", str(mqtt["port"]), *files, *shown,
        "-q", "1", "-t", mqtt["topics"]["readings"], "-m", message,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    eventually("it is stored", lambda: installation.values(given["deviceId"], "temperature") == [4.5])
    installation.ask("POST", "devices/provision", body, 401)


@pytest.mark.parametrize("method", ["mtls", "token", "password"])
def test_simulated_plants_go_where_their_packages_say(installation: Installation, method: str) -> None:
    demo = installation.running.json
    log_in(installation.environment, demo["url"], demo["api_key"])
    options = ("--plants", "2", "--auth", method, "--rate", "20", "--duration", "2", "--json")
    told = json.loads(sluice(installation.environment, "simulate", *options))
    assert (told["plants"], told["connected"], told["waiting"]) == (2, 2, 0)
    assert told["made"] == told["acknowledged"] > 10
