"""What operators watch, on real parts: Prometheus scrapes the roles, every query of every dashboard gives data."""

import asyncio
import contextlib
import json
import math
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from api.registry.devices import add_device
from api.registry.organisations import acting_for
from bench.usage import free_port
from runtime.postgres import connect
from tests.broker_rig import BRIDGE_PASSWORD, COMMANDS_PASSWORD, Broker, certify, configured, seed
from tests.databases import Database, Server
from tests.grafana import Dashboard, dashboards, promql, sql, targets
from tests.people_rig import RING
from tests.prometheus import Prometheus, prometheus
from tests.support import ask, eventually, run
from tests.system.roles import Role, clean_environment, role, sluice, start_role

JOBS = ("sluice-ingest", "sluice-worker", "sluice-api", "sluice-bridge", "sluice-broker")
#: As long as a fault of two scrapes would take; a rate needs two samples.
RATE_INTERVAL = "20s"
FELT_WITHIN_S = 120.0


@dataclass
class Live:
    """Roles on a database, a log and a broker of their own, requests all the while; Prometheus looks at them."""

    database: Database
    environment: dict[str, str]
    demo: dict[str, Any]
    places: dict[str, str]
    server: Prometheus
    broker: Broker
    worker: Role

    def start_worker(self) -> None:
        environment = self.environment | {"SLUICE_MQTT_URL": self.broker.url_of("sluice-commands", COMMANDS_PASSWORD)}
        self.worker = start_role(environment, "worker", metrics=self.places["sluice-worker"])


@contextmanager
def own_database(server: Server) -> Iterator[Database]:
    database = run(server.create(f"test_{uuid4().hex}"))
    try:
        yield database
    finally:
        asyncio.run(server.drop(database.name))


@contextmanager
def requests(ingest: str, api: str, broker: Broker, demo: dict[str, Any]) -> Iterator[None]:
    """One of each kind, again and again: good readings, refused ones, callers known and not, commands; a listener."""
    stop = threading.Event()
    device, key, token = demo["device_id"], demo["api_key"], demo["ingest_token"]
    readings_topic = f"v1/readings/{demo['organisation_id']}/{device}"
    answers_topic = f"v1/gateways/{demo['organisation_id']}/{device}/commands/response"

    def command() -> None:
        asked = ask(
            f"{api}/api/v1/devices/{device}/commands", token=key, method="POST", body=b'{"command": "restart"}'
        )
        if asked.status == 201:  # where no worker sends them, no more than a device's bound may wait
            answer = {"cmdId": asked.json()["command_id"], "status": "SUCCESS"}
            broker.publish(device, token, answers_topic, json.dumps(answer).encode())

    def once(number: int) -> None:
        now = datetime.now(UTC).isoformat()
        readings = [
            {"type": "temperature", "value": number % 40, "unit": "°C", "ts": now},
            {"type": "humidity", "value": 40 + number % 10, "label": "front", "ts": now},
            {"type": "state", "value": f"step {number}", "ts": now},
            {"type": "pressure", "value": 1, "unit": "°R"},
            # The same moment again and again: a conflict each time but the first.
            {"type": "power", "value": number, "ts": int(demo["since"])},
        ]
        body = json.dumps({"measurements": readings}).encode()
        ask(f"{ingest}/v1/ingest", token=token, method="POST", body=body)
        ask(f"{ingest}/v1/ingest?token={token}&temp={number % 40}")
        ask(f"{ingest}/v1/ingest", token="unknown", method="POST", body=body)
        broker.publish(device, token, readings_topic, body)
        command()
        ask(f"{api}/api/v1/readings?device_id={device}&limit=10", token=key)
        ask(f"{api}/api/v1/readings?device_id={uuid4()}", token=key)

    def work() -> None:
        number = 0
        while not stop.wait(0.1):
            once(number)
            number += 1

    def hear() -> None:
        url = f"{api}/api/v1/readings/stream?device_id={device}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
        while not stop.is_set():
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as stream:
                while not stop.is_set() and stream.readline():
                    pass

    threads = [threading.Thread(target=one) for one in (work, hear)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def kept_broker(directory: Path, database: Database, environment: dict[str, str], metrics: str) -> Iterator[Broker]:
    """As it is delivered, with its keeper."""
    directory.mkdir()
    with configured(directory) as broker:
        sluice(environment, "ca", "init")
        run(certify(broker, database))
        run(seed(broker, database))
        broker.start()
        with role(environment | broker.environment(database), "broker", "keep", metrics=metrics):
            yield broker


async def make_silent_device(database: Database, organisation: UUID, site: UUID) -> None:
    connection = await connect(database.settings, role=None, application="test")
    async with acting_for(connection, organisation):
        await add_device(connection, organisation, site, "Silent device", "silent")
    await connection.close()


@pytest.fixture(scope="module")
def live(timescaledb: Server, services: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with ExitStack() as stack:
        database = stack.enter_context(own_database(timescaledb))
        environment = clean_environment(
            **database.environment,
            SLUICE_LOG_URL=services["SLUICE_LOG_URL"],
            SLUICE_SECRET_KEYS=str(RING),
            SLUICE_LEDGER_CHECK_S="0.5",
            SLUICE_QUARANTINE_CHECK_S="0.5",
            SLUICE_LANDING_LAG_PERIOD_S="0.5",
            SLUICE_LIVE_HEARTBEAT_S="0.5",
        )
        sluice(environment, "migrate")
        demo = json.loads(sluice(environment, "seed", "--json"))
        demo["since"] = datetime.now(UTC).timestamp()
        run(make_silent_device(database, UUID(demo["organisation_id"]), UUID(demo["site_id"])))
        places = {job: f"127.0.0.1:{free_port()}" for job in JOBS}
        ingest = stack.enter_context(
            role(
                environment, "ingest", "--listen", "127.0.0.1:0", "--processes", "2", metrics=places["sluice-ingest"]
            )
        )
        api = stack.enter_context(role(environment, "api", "--listen", "127.0.0.1:0", metrics=places["sluice-api"]))
        directory = tmp_path_factory.mktemp("operators")
        server = stack.enter_context(prometheus(directory / "shipped", places))
        broker = stack.enter_context(
            kept_broker(directory / "broker", database, environment, places["sluice-broker"])
        )
        by_mqtt = environment | {"SLUICE_MQTT_URL": broker.url_of("sluice-bridge", BRIDGE_PASSWORD)}
        stack.enter_context(role(by_mqtt, "bridge", metrics=places["sluice-bridge"]))
        found = Live(database, environment, demo, places, server, broker, worker=ingest)
        found.start_worker()
        stack.callback(lambda: found.worker.end())  # noqa: PLW0108 - another worker by then
        found.worker.wait_ready()
        stack.enter_context(requests(ingest.url, api.url, broker, demo))
        yield found


def test_every_role_is_up_and_nothing_fires(live: Live) -> None:
    up = "sum by (job) (up)"
    eventually("every role is up", lambda: values(live.server.query(up)) == [1.0] * len(JOBS))
    eventually("no alert fires in health", lambda: not live.server.firing(), FELT_WITHIN_S)
    assert values(live.server.query("sum(sluice_processes_ready)")) == [2.0]
    assert values(live.server.query("max(sluice_log_partitions) - sum(sluice_worker_partitions_held)")) == [0.0]


def values(found: list[dict[str, Any]]) -> list[float]:
    """The numbers of an answer, but for those that are none."""
    return [value for one in found if not math.isnan(value := float(one["value"][1]))]


def test_every_query_of_prometheus_in_a_dashboard_gives_data(live: Live) -> None:
    asked = [(dashboard.uid, panel.title, target.expr or "") for dashboard, panel, target in targets("prometheus")]
    assert len(asked) > 80

    def empty() -> list[tuple[str, str, str]]:
        return [one for one in asked if not values(live.server.query(promql(one[2], RATE_INTERVAL)))]

    with suppress(AssertionError):
        eventually("data for every query", lambda: not empty(), FELT_WITHIN_S)
    assert empty() == []


def test_every_query_of_sql_in_a_dashboard_gives_data(live: Live) -> None:
    user = json.loads(
        sluice(live.environment, "dashboard-user", "create", "--json", "--organisation", live.demo["organisation_id"])
    )
    place = urlsplit(live.database.url).netloc.rpartition("@")[2]

    async def test() -> None:
        session = await asyncpg.connect(f"postgresql://{user['user']}:{user['password']}@{place}/{user['database']}")
        try:
            for dashboard in dashboards().values():
                await ask_all(session, dashboard)
        finally:
            await session.close()

    try:
        eventually(
            "a text has landed", lambda: values(live.server.query('sluice_ledger_readings{outcome="stored"} > 0'))
        )
        eventually("the device is online", lambda: run(online(live)))
        run(test())
    finally:
        sluice(live.environment, "dashboard-user", "drop", "--organisation", live.demo["organisation_id"])


async def online(live: Live) -> bool:
    connection = await asyncpg.connect(live.database.superuser_url)
    try:
        return bool(await connection.fetchval("SELECT count(*) FROM devices WHERE online_until > now()"))
    finally:
        await connection.close()


async def ask_all(session: Any, dashboard: Dashboard) -> None:
    until = datetime.now(UTC) + timedelta(minutes=1)
    since, chosen = until - timedelta(hours=24), dict[str, list[str]]()
    for variable in dashboard.templating.list:
        rows = await session.fetch(sql(variable.query, chosen, since, until, 60))
        assert rows, (dashboard.uid, variable.name)
        chosen[variable.name] = [row["__value"] if "__value" in row else row[0] for row in rows]
        if not variable.several:
            chosen[variable.name] = chosen[variable.name][:1]
    for panel in dashboard.panels:
        for target in (target for target in panel.targets if target.sql):
            rows = await session.fetch(sql(target.sql or "", chosen, since, until, 60))
            assert rows, (dashboard.uid, panel.title)
            if panel.type == "stat":
                assert rows[0][0] > 0, (dashboard.uid, panel.title)
            if target.format == "time_series":
                assert all({"time", "metric", "value"} <= {*row.keys()} for row in rows), (dashboard.uid, panel.title)


def test_an_alert_fires_when_the_worker_is_stopped_and_clears_when_it_is_back(live: Live) -> None:
    live.worker.end()
    gone = {"SluiceWorkerDown", "SluicePartitionsUnheld"}
    eventually("alerts that the worker is gone", lambda: gone <= live.server.firing(), FELT_WITHIN_S)
    assert not {"SluiceIngestDown", "SluiceApiDown", "SluiceLostRecords"} & live.server.firing()
    live.start_worker()
    eventually("they clear", lambda: not gone & live.server.firing(), FELT_WITHIN_S)
