"""What the tests of the broker's security share: a Mosquitto as `deploy/mosquitto` has it, clients of it, a keeper.

Left out: plants (`people_rig`), what is expected of anybody.
"""

import asyncio
import contextlib
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiomqtt
from prometheus_client import CollectorRegistry

from api.certificates.authorities import Authorities, trusted
from api.certificates.building import Span, key_pem_of, new_key, pem_of, sign_server, utc_now
from deploy.broker import write_seed
from deploy.roles.broker import list_file, own_users
from deploy.settings import GROUPS
from runtime.postgres import PostgresSettings, connect
from runtime.secrets import KeyRing, SecretSettings
from runtime.settings import Settings
from runtime.sockets import address_of, listen
from tests.conftest import CHECKOUT
from tests.databases import Database
from tests.people_rig import RING
from tests.support import EVENTUALLY_S, eventually
from workers.broker.keeper import Keeper
from workers.broker.metrics import BrokerMetrics
from workers.broker.settings import BrokerSettings

PROGRAM: Final = "/usr/sbin/mosquitto"
SOURCE: Final = CHECKOUT / "deploy" / "mosquitto"
KEEPER_PASSWORD, BRIDGE_PASSWORD, COMMANDS_PASSWORD = "keeper-password", "bridge-password", "commands-password"
#: By the port that the configuration names.
OURS, MTLS, TOKEN, PASSWORD = 1883, 8883, 8884, 8885
#: Of the broker for sites.
SITES_OURS, SITES = 1884, 8886
LISTENERS: Final = {"MTLS": MTLS, "TOKEN": TOKEN, "PASSWORD": PASSWORD}
_PATHS: Final = ("/etc/mosquitto/sluice", "/var/lib/mosquitto/sites", "/var/lib/mosquitto", "/run/mosquitto")
_TIMEOUT_S: Final = 20.0


class Certified(aiomqtt.Client):
    """Shows a certificate. In TLS 1.3 it takes itself for connected until it is told, and would wait for long."""

    attempt: list[str]

    async def is_let_in(self) -> bool:
        process = await asyncio.create_subprocess_exec(
            *self.attempt, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        async with asyncio.timeout(_TIMEOUT_S):
            return await process.wait() == 0


@dataclass
class Broker:
    """One of a test's own, with the configuration that is delivered, on ports and in a directory of its own."""

    directory: Path
    source: str = "mosquitto.conf"
    ports: dict[int, int] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def clients_file(self) -> Path:
        return self.directory / "sluice-clients.json"

    @property
    def roots(self) -> Path:
        return self.directory / "roots.pem"

    def configure(self) -> None:
        (self.directory / "conf.d").mkdir()
        for file in ("acl", "conf.d/keeping.conf"):
            (self.directory / file).write_text((SOURCE / file).read_text())
            (self.directory / file).chmod(0o600)
        text = (SOURCE / self.source).read_text().replace("user mosquitto", "user root")
        for path in _PATHS:
            text = text.replace(path, str(self.directory))
        for port in map(int, re.findall(r"^listener (\d+)", text, flags=re.MULTILINE)):
            with listen("TEST", "127.0.0.1:0") as free:
                self.ports[port] = address_of(free).port
            text = re.sub(
                rf"^listener {port}( 127.0.0.1)?$", f"listener {self.ports[port]} 127.0.0.1", text, flags=re.MULTILINE
            )
        (plugin,) = {str(found) for found in Path("/usr/lib").rglob("mosquitto_dynamic_security.so")}
        text = re.sub(r"^plugin .*$", f"plugin {plugin}", text, flags=re.MULTILINE)
        (self.directory / "mosquitto.conf").write_text(text)

    def start(self) -> None:
        with (self.directory / "mosquitto.log").open("wb") as opened:
            self.process = subprocess.Popen(
                [PROGRAM, "-c", str(self.directory / "mosquitto.conf")], stdout=opened, stderr=opened
            )
        eventually("the broker listens", lambda: all(map(_listens, self.ports.values())), _TIMEOUT_S)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(_TIMEOUT_S)
            self.process = None

    def environment(self, database: Database, **more: str) -> dict[str, str]:
        """Of whoever keeps its identities."""
        return {"SLUICE_DATABASE_URL": database.url, "SLUICE_SECRET_KEYS": str(RING)} | self.keeping | more

    @property
    def keeping(self) -> dict[str, str]:
        """What says that it is this broker's identities."""
        return {
            "SLUICE_BROKER_URL": self.url_of("sluice-broker", KEEPER_PASSWORD),
            "SLUICE_BROKER_BRIDGE_PASSWORD": BRIDGE_PASSWORD,
            "SLUICE_BROKER_COMMANDS_PASSWORD": COMMANDS_PASSWORD,
            "SLUICE_BROKER_CRL_FILE": str(self.directory / "sluice-crl.pem"),
            "SLUICE_BROKER_PID_FILE": str(self.directory / "mosquitto.pid"),
            "SLUICE_BROKER_RETRY_S": "0.1",
        }

    def url_of(self, user: str, password: str) -> str:
        """For one of our own roles."""
        return f"mqtt://{user}:{password}@127.0.0.1:{self._port_of_ours}"

    @property
    def _port_of_ours(self) -> int:
        return next(port for name, port in self.ports.items() if name in (OURS, SITES_OURS))

    # ------------------------------------------------------------ clients

    def publish(self, device: str, password: str, topic: str, payload: bytes) -> bool:
        """One message of a device at QoS 1, by the broker's own tool; whether it is let in and acknowledged."""
        command = [
            "mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.ports[PASSWORD]), "--cafile", str(self.roots),
            "-u", device, "-P", password, "-t", topic, "-q", "1", "-s",
        ]  # fmt: skip
        return subprocess.run(command, input=payload, capture_output=True, timeout=30, check=False).returncode == 0

    def client(
        self, listener: int, user: str | None, password: str | None, client_id: str = "test", **options: Any
    ) -> aiomqtt.Client:
        return aiomqtt.Client(
            "127.0.0.1", self.ports[listener], username=user, password=password, identifier=client_id,
            protocol=aiomqtt.ProtocolVersion.V5, timeout=_TIMEOUT_S,
            tls_context=self._tls() if listener in (TOKEN, PASSWORD, SITES) else None, **options,
        )  # fmt: skip

    def certified(self, package: Any, client_id: str = "test", **options: Any) -> "Certified":
        """One that shows the certificate of a plant's package."""
        tls, directory = self._tls(), self.directory
        file = directory / f"{package['plantId']}.pem"
        file.write_text(package["security"]["clientCert"] + package["security"]["clientKey"])
        tls.load_cert_chain(file)
        made = Certified(
            "127.0.0.1", self.ports[MTLS], identifier=client_id, protocol=aiomqtt.ProtocolVersion.V5,
            timeout=_TIMEOUT_S, tls_context=tls, **options,
        )  # fmt: skip
        files = {"--cafile": self.roots, "--cert": file, "--key": file}
        named = [str(part) for option in files.items() for part in option]
        made.attempt = [
            "mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.ports[MTLS]), *named, "-i", client_id,
            "-t", "nothing", "-m", "1", "-q", "1",
        ]  # fmt: skip
        return made

    def bridge(self, client_id: str = "bridge", **options: Any) -> aiomqtt.Client:
        return self.client(OURS, "sluice-bridge", BRIDGE_PASSWORD, client_id, **options)

    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.roots))


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True
    except OSError:
        return False


async def is_let_in(client: aiomqtt.Client) -> bool:
    """Whether it can connect; the session is taken over from whoever has it."""
    if isinstance(client, Certified):
        return await client.is_let_in()
    try:
        async with client:
            return True
    except aiomqtt.MqttError:
        return False


async def is_taken(client: aiomqtt.Client, topic: str) -> bool:
    """Whether the broker takes a message of it there, as MQTT 5 lets it say."""
    loop = asyncio.get_running_loop()
    reason: asyncio.Future[Any] = loop.create_future()
    client._client.on_publish = lambda *told: reason.set_result(told[3])
    try:
        async with client:
            client._client.publish(topic, b"1", qos=1)
            async with asyncio.timeout(_TIMEOUT_S):
                return not (await reason).is_failure
    except aiomqtt.MqttError:
        return False


async def ended(client: aiomqtt.Client) -> None:
    """Until the broker ends its connection."""
    async with asyncio.timeout(EVENTUALLY_S):
        with contextlib.suppress(aiomqtt.MqttError):
            async for _ in client.messages:
                pass


@contextmanager
def configured(directory: Path, source: str = "mosquitto.conf") -> Iterator[Broker]:
    """Ended by its own pid."""
    broker = Broker(directory, source)
    broker.configure()
    try:
        yield broker
    finally:
        broker.stop()


async def certify(broker: Broker, database: Database) -> None:
    """Its own certificate, and whom it trusts, of the authority in the database."""
    connection = await connect(database.settings, role="sluice_app", application="test")
    try:
        authority = await Authorities(RING).issuing(connection)
        broker.roots.write_text(await trusted(connection))
    finally:
        await connection.close()
    key = new_key()
    made = sign_server(authority.signer, key.public_key(), ["127.0.0.1"], Span.of(utc_now(), 9))
    (broker.directory / "server.crt").write_text(pem_of(made) + authority.chain)
    (broker.directory / "server.key").write_text(key_pem_of(key))


@dataclass
class Kept:
    """A broker whose identities are kept in this process."""

    broker: Broker
    keeper: Keeper
    registry: CollectorRegistry

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def agreed(self) -> None:
        """Until it has compared everything."""
        await until("it agrees", lambda: self.keeper.trouble is None)


async def until(what: str, look: Any, timeout_s: float = EVENTUALLY_S) -> None:
    """Until `look` gives something true, or something to await that does."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = look()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def keeping(broker: Broker, database: Database, **more: str) -> AsyncIterator[Kept]:
    """`more` are variables."""
    settings = Settings.load(GROUPS, broker.environment(database, **more))
    registry = CollectorRegistry()
    keeper = Keeper(
        settings.get(PostgresSettings),
        settings.get(BrokerSettings),
        KeyRing.parse(settings.get(SecretSettings).secret_keys),
        own_users(settings),
        list_file(settings),
        BrokerMetrics(registry),
    )
    task = asyncio.create_task(keeper.run())
    try:
        yield Kept(broker, keeper, registry)
        assert not task.done(), task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def seed(broker: Broker, database: Database, **more: str) -> None:
    """As the command does it, but for the look at the log."""
    await write_seed(Settings.load(GROUPS, broker.environment(database, **more)), broker.clients_file)


@asynccontextmanager
async def secured(directory: Path, database: Database, **more: str) -> AsyncIterator[Kept]:
    """A broker that knows whom the database, which has an authority, knows; kept."""
    with configured(directory) as broker:
        await certify(broker, database)
        await seed(broker, database, **more)
        broker.start()
        async with keeping(broker, database, **more) as kept:
            await kept.agreed()
            yield kept
