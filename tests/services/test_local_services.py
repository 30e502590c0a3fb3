"""`deploy/local/services` against the real parts it starts, in state directories of their own."""

import asyncio
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "local" / "services"
PARTS = ["kafka", "timescaledb", "mosquitto"]
VARIABLES = {"SLUICE_DATABASE_URL", "SLUICE_DATABASE_OWNER_URL", "SLUICE_LOG_URL", "SLUICE_MQTT_URL"}
# A first run on a new machine downloads what the parts are made of.
COMMAND_SECONDS = 900
SECOND_START_CPU_S = 3


@dataclass(frozen=True)
class Services:
    """The command, bound to one state directory."""

    directory: Path

    def __call__(self, *arguments: str, code: int = 0) -> str:
        command = [str(SCRIPT), *arguments, "--dir", str(self.directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        assert done.returncode == code, f"{arguments} gave {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def env(self) -> dict[str, str]:
        return exports(self("env"))

    def pid(self, part: str) -> int:
        return int(self("pid", part))

    def postmaster_children(self) -> list[int]:
        postmaster = self.pid("timescaledb")
        return [pid for pid, parent in living().items() if parent == postmaster]


def exports(printed: str) -> dict[str, str]:
    """What `eval` would make of it; anything but an export line is an error."""
    lines = [line.split(" ", 1) for line in printed.splitlines()]
    assert all(word == "export" for word, _ in lines), printed
    return dict(line.split("=", 1) for _, line in lines)


def living() -> dict[int, int]:
    """Every process that is no zombie, with its parent."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(entry.parent.name)] = int(parent)
    return found


def wiped(directory: Path) -> Iterator[Services]:
    services = Services(directory)
    try:
        yield services
    finally:
        services("wipe")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """All three parts, started; what a test stops it starts again."""
    for services in wiped(tmp_path_factory.mktemp("services")):
        started = exports(services("start"))
        assert set(started) == VARIABLES
        yield services


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Services]:
    """A second state directory, nothing started in it."""
    yield from wiped(tmp_path / "other")


def address(url: str) -> str:
    return urlsplit(url).netloc


async def query(url: str, *statements: str) -> Any:
    """The last statement's value."""
    connection = await asyncpg.connect(url, timeout=60)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetchval(statements[-1])
    finally:
        await connection.close()


async def make_topic(bootstrap: str, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, 1)])
    finally:
        await admin.close()


async def append(bootstrap: str, topic: str, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all")
    await producer.start()
    try:
        await producer.send_and_wait(topic, value)
    finally:
        await producer.stop()


async def first_record(bootstrap: str, topic: str) -> bytes:
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0)])
        record = await asyncio.wait_for(consumer.getone(), 60)
        return bytes(record.value)
    finally:
        await consumer.stop()


def publish(url: str, *options: str) -> None:
    """At QoS 1, so that success is the broker's own acknowledgement."""
    subprocess.run(["mosquitto_pub", *mqtt_options(url), *options], check=True, timeout=60)


def mqtt_options(url: str) -> list[str]:
    return ["-h", "127.0.0.1", "-p", str(urlsplit(url).port), "-q", "1", "-t", "sluice/test"]


def test_each_part_answers_right_after_the_start(services: Services) -> None:
    env = services.env()
    log = address(env["SLUICE_LOG_URL"])

    async def use_log_and_database() -> None:
        await make_topic(log, "at-once")
        await append(log, "at-once", b"reading")
        assert await first_record(log, "at-once") == b"reading"
        assert await query(env["SLUICE_DATABASE_URL"], "SELECT current_user::text") == "sluice"
        assert await query(env["SLUICE_DATABASE_OWNER_URL"], "SELECT current_user::text") == "sluice_owner"

    asyncio.run(use_log_and_database())
    publish(env["SLUICE_MQTT_URL"], "-m", "reading")


def test_a_second_start_is_quick_and_changes_nothing(services: Services) -> None:
    pids = [services.pid(part) for part in PARTS]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = exports(services("start"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECOND_START_CPU_S
    assert started == services.env()
    assert [services.pid(part) for part in PARTS] == pids


def test_status_names_pid_and_port_of_what_runs(services: Services) -> None:
    port = urlsplit(services.env()["SLUICE_LOG_URL"]).port
    assert services("status", "kafka").split() == [
        "kafka",
        "running",
        "pid",
        str(services.pid("kafka")),
        "port",
        str(port),
    ]


def test_roles_hold_nothing_but_what_they_take(services: Services) -> None:
    env = services.env()

    async def check() -> None:
        app, owner = env["SLUICE_DATABASE_URL"], env["SLUICE_DATABASE_OWNER_URL"]
        for role in ("sluice_app", "sluice_ingest", "sluice_worker", "sluice_reader"):
            assert await query(f"{app}?options=-crole%3D{role}", "SELECT current_user::text") == role
        strong = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'sluice%' AND (rolsuper OR rolbypassrls)"
        assert await query(owner, strong) == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await query(app, "CREATE TABLE forbidden (n int)")
        await query(owner, "CREATE TABLE owned (n int)", "GRANT SELECT ON owned TO sluice_reader", "SELECT 1")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await query(app, "SELECT count(*) FROM owned")
        assert await query(app, "SET ROLE sluice_reader", "SELECT count(*) FROM owned") == 0

    asyncio.run(check())


def test_the_owner_can_make_a_hypertable(services: Services) -> None:
    made = "SELECT (create_hypertable('series', by_range('ts'))).created"
    table = "CREATE TABLE series (ts timestamptz NOT NULL, value float8)"
    assert asyncio.run(query(services.env()["SLUICE_DATABASE_OWNER_URL"], table, made)) is True


def test_a_row_survives_a_killed_database(services: Services) -> None:
    env = services.env()
    owner = env["SLUICE_DATABASE_OWNER_URL"]
    asyncio.run(query(owner, "CREATE TABLE kept (n int)", "INSERT INTO kept VALUES (42)", "SELECT 1"))
    children = services.postmaster_children()
    assert children

    services("kill", "timescaledb")

    assert not living().keys() & set(children)
    assert services("status", "timescaledb", code=1).split()[1] == "stopped"
    assert "SLUICE_DATABASE_URL" not in services.env()
    assert exports(services("start", "timescaledb")) == env
    assert asyncio.run(query(owner, "SELECT n FROM kept")) == 42


def test_a_record_survives_a_killed_broker(services: Services) -> None:
    env = services.env()
    log = address(env["SLUICE_LOG_URL"])

    async def write() -> None:
        await make_topic(log, "kept")
        await append(log, "kept", b"reading")

    asyncio.run(write())
    services("kill", "kafka")
    services("status", "kafka", code=1)
    assert exports(services("start", "kafka")) == env
    assert asyncio.run(first_record(log, "kept")) == b"reading"


def test_a_restart_keeps_data_and_port(services: Services) -> None:
    env = services.env()
    publish(env["SLUICE_MQTT_URL"], "-m", "retained", "-r")
    pid = services.pid("mosquitto")

    assert exports(services("restart", "mosquitto")) == env

    assert services.pid("mosquitto") != pid
    listen = ["mosquitto_sub", *mqtt_options(env["SLUICE_MQTT_URL"]), "-C", "1", "-W", "10"]
    assert subprocess.run(listen, capture_output=True, check=True, timeout=60).stdout == b"retained\n"


def test_stop_ends_gracefully_what_is_named(services: Services) -> None:
    pid = services.pid("timescaledb")
    services("stop", "timescaledb")
    assert pid not in living()
    assert "database system is shut down" in (services.directory / "timescaledb" / "log").read_text()
    services("status", "kafka", "mosquitto")
    services("status", code=1)
    services("start")


def test_a_process_that_took_over_a_pid_is_left_alone(services: Services) -> None:
    services("stop", "mosquitto")
    with subprocess.Popen(["sleep", "60"]) as stranger:
        state = json.loads((services.directory / "state.json").read_text())
        state["processes"]["mosquitto"]["pid"] = stranger.pid
        (services.directory / "state.json").write_text(json.dumps(state))
        services("status", "mosquitto", code=1)
        services("stop", "mosquitto")
        services("kill", "mosquitto", code=1)
        assert stranger.poll() is None
        stranger.kill()
    services("start", "mosquitto")


def test_two_starts_at_once_and_a_second_directory_do_not_collide(services: Services, other: Services) -> None:
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: other("start", "timescaledb", "mosquitto"), range(2)))
    assert both[0] == both[1]
    mine, theirs = services.env(), exports(both[0])
    assert not {address(url) for url in mine.values()} & {address(url) for url in theirs.values()}
    assert asyncio.run(query(theirs["SLUICE_DATABASE_URL"], "SELECT 1")) == 1
    services("status")

    pid = other.pid("timescaledb")
    other("wipe")
    assert not other.directory.exists()
    assert pid not in living()
    services("status")


def test_wipe_leaves_what_it_did_not_make(other: Services) -> None:
    other("start", "mosquitto")
    (other.directory / "mine").touch()
    other("wipe")
    assert os.listdir(other.directory) == ["mine"]


def test_a_small_disk_fills_up_and_is_unmounted(other: Services) -> None:
    owner = exports(other("start", "timescaledb", "--small-disk"))["SLUICE_DATABASE_OWNER_URL"]
    disk = other.directory / "timescaledb" / "volume" / "pgdata"
    # A filler leaves little to write, which is how a test of the product would go about it.
    room = os.statvfs(disk)
    assert room.f_blocks * room.f_frsize < 512 * 1024 * 1024
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - 16 * 1024 * 1024)
    fill = "INSERT INTO bulk SELECT repeat(md5(n::text), 200) FROM generate_series(1, 100000) n"
    plain = "ALTER TABLE bulk ALTER text SET STORAGE PLAIN"
    asyncio.run(query(owner, "CREATE TABLE bulk (text text)", plain, "SELECT 1"))
    with pytest.raises(asyncpg.DiskFullError):
        asyncio.run(query(owner, fill, "SELECT 1"))
    filler.unlink()
    asyncio.run(query(owner, "INSERT INTO bulk VALUES ('room again')", "SELECT 1"))

    other("stop")
    assert not os.path.ismount(disk)
    assert exports(other("start", "timescaledb"))["SLUICE_DATABASE_OWNER_URL"] == owner
    assert asyncio.run(query(owner, "SELECT count(*) FROM bulk")) == 1


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


def test_an_advertised_proxy_carries_the_clients(services: Services) -> None:
    broker = address(services.env()["SLUICE_LOG_URL"])
    carried = 0

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal carried
        carried += 1
        there = await asyncio.open_connection(*broker.split(":"))
        await asyncio.gather(forward(reader, there[1]), forward(there[0], writer))

    async def use() -> None:
        async with await asyncio.start_server(carry, "127.0.0.1") as proxy:
            port = str(proxy.sockets[0].getsockname()[1])
            started = await asyncio.to_thread(services, "restart", "kafka", "--kafka-advertise", port)
            assert address(exports(started)["SLUICE_LOG_URL"]) == broker
            await make_topic(broker, "proxied")
            await append(broker, "proxied", b"reading")
            assert await first_record(broker, "proxied") == b"reading"

    asyncio.run(use())
    assert carried > 0
    services("restart", "kafka")
    before = carried
    assert asyncio.run(first_record(broker, "proxied")) == b"reading"
    assert carried == before
