"""Apache Kafka as one KRaft node, its jars taken from Maven Central.

No authentication and no encryption, for it listens on loopback only; with `--tls` a second listener asks for both.
"""

import base64
import hashlib
import shutil
import signal
import socket
import struct
import uuid
from pathlib import Path
from urllib.parse import quote

from .locks import cache_dir, locked
from .packages import need, run, say
from .state import State
from .tls import certificate

HERE = Path(__file__).resolve().parent.parent
POM = HERE / "pom.xml"
# Measured on two cores: the serial collector is the cheapest by a little, and the first compiler
# alone spares two thirds of the broker's CPU over its first million records. The second compiler
# pays off only after minutes of many small requests.
JVM = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
LOGGING = [
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
]
ANSWER_SECONDS = 2.0
# Who may log in on the listener with TLS.
USER, TLS_PORT = "sluice", "kafka_tls"

# A Metadata request, version 1, that asks for no topic: header, then an empty array.
METADATA_REQUEST = struct.pack(">hhih", 3, 1, 1, -1) + struct.pack(">i", 0)


class Kafka:
    name = "kafka"
    ports: tuple[str, ...] = ("kafka", "kafka_internal", "kafka_controller")
    stop_signal = signal.SIGTERM

    def prepare(self, state: State) -> None:
        if state.tls:
            state.choose_ports((TLS_PORT,))
        config = _write_config(state)
        if not (state.home(self.name) / "data" / "meta.properties").exists():
            login = ["--add-scram", _scram(state)] if state.tls else []
            run([*_java(), "kafka.tools.StorageTool", "format", "-t", _random_id(), "-c", str(config), *login])

    def command(self, state: State) -> list[str]:
        return [*_java(), "kafka.Kafka", str(_config(state))]

    def answers(self, state: State) -> bool:
        """Whether the broker names itself among the brokers that take topics and records."""
        try:
            return _live_brokers(state.ports[self.name]) > 0
        except OSError:
            return False

    def complete(self, state: State) -> None:
        """Topics are the product's business."""

    def release(self, state: State) -> None:
        """Nothing is held outside the state directory."""

    def exports(self, state: State) -> dict[str, str]:
        if not state.tls:
            return {"SLUICE_LOG_URL": f"kafka://127.0.0.1:{state.ports[self.name]}"}
        login = f"{USER}:{state.choose_password(self.name)}"
        authority = quote(str(certificate(state).authority))
        return {"SLUICE_LOG_URL": f"kafkas://{login}@127.0.0.1:{state.ports[TLS_PORT]}?cafile={authority}"}


def _java() -> list[str]:
    java = need("java", ["default-jre-headless"])
    return [java, *JVM, *LOGGING, "-cp", f"{_jars()}/*"]


def _jars() -> Path:
    """The directory of jars that the pom names; another pom gives another directory."""
    version = hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    jars = cache_dir() / f"kafka-{version}"
    if jars.exists():
        return jars
    with locked(cache_dir() / "kafka.lock"):
        if not jars.exists():
            _fetch(jars)
    return jars


def _fetch(jars: Path) -> None:
    maven = need("mvn", ["maven"])
    say("fetching Kafka's jars")
    # Renamed when complete, so that an interrupted download is never taken for a cache.
    unfinished = cache_dir() / "kafka-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    copy = [maven, "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
    run([*copy, f"-DoutputDirectory={unfinished}", "-DincludeScope=runtime"])
    unfinished.rename(jars)


def _config(state: State) -> Path:
    return state.home("kafka") / "server.properties"


def _write_config(state: State) -> Path:
    client, internal, controller = (state.ports[name] for name in Kafka.ports)
    # The broker talks to itself over INTERNAL, so a test's proxy can cut the clients alone.
    advertised = state.kafka_advertise or client
    own = [
        f"listeners=CLIENT://127.0.0.1:{client},INTERNAL://127.0.0.1:{internal},CONTROLLER://127.0.0.1:{controller}",
        f"advertised.listeners=CLIENT://127.0.0.1:{advertised},INTERNAL://127.0.0.1:{internal}",
        f"controller.quorum.voters=1@127.0.0.1:{controller}",
        f"log.dirs={state.home('kafka') / 'data'}",
    ]
    if state.tls:
        own += _secure_listener(state, own)
    config = _config(state)
    config.touch(0o600)  # it may hold a password
    config.write_text((HERE / "conf" / "kafka.properties").read_text() + "\n".join(own) + "\n")
    return config


def _secure_listener(state: State, own: list[str]) -> list[str]:
    """The lines that replace those before them by what they say and one listener more."""
    listeners, advertised = (f"{line},SECURE://127.0.0.1:{state.ports[TLS_PORT]}" for line in own[:2])
    made = certificate(state)
    keystore = state.home("kafka") / "keystore.pem"
    keystore.touch(0o600)
    keystore.write_text(made.key.read_text() + made.certificate.read_text())
    security, listener = "org.apache.kafka.common.security", "listener.name.secure"
    password = state.choose_password("kafka")
    return [
        listeners,
        advertised,
        "listener.security.protocol.map=CLIENT:PLAINTEXT,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL",
        f"{listener}.ssl.keystore.type=PEM",
        f"{listener}.ssl.keystore.location={keystore}",
        f"{listener}.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
        f'{listener}.plain.sasl.jaas.config={security}.plain.PlainLoginModule required user_{USER}="{password}";',
        f"{listener}.scram-sha-256.sasl.jaas.config={security}.scram.ScramLoginModule required;",
        f"{listener}.scram-sha-512.sasl.jaas.config={security}.scram.ScramLoginModule required;",
    ]


def _scram(state: State) -> str:
    return f"SCRAM-SHA-512=[name={USER},password={state.choose_password('kafka')}]"


def _random_id() -> str:
    """A cluster's identifier as Kafka writes it: 16 bytes, URL-safe, without padding.

    Its first bit is 0, so it begins with a letter: Kafka's tool takes what begins with `-` for an option.
    """
    first, *others = uuid.uuid4().bytes
    return base64.urlsafe_b64encode(bytes([first & 0x7F, *others])).rstrip(b"=").decode()


def _live_brokers(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as connection:
        connection.sendall(struct.pack(">i", len(METADATA_REQUEST)) + METADATA_REQUEST)
        with connection.makefile("rb") as answer:
            # Length of the frame, correlation, then the array of live brokers begins.
            head = answer.read(12)
    return struct.unpack(">iii", head)[2] if len(head) == 12 else 0
