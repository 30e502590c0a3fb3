"""`sluice broker seed` and `keep` as an operator uses them, with the broker that is delivered."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker_rig import Broker, configured
from tests.databases import Database
from tests.people_rig import RING
from tests.support import eventually
from tests.system.roles import clean_environment, refusal, role, sluice


@pytest.fixture
def installed(bare_database: Database, tmp_path: Path) -> Iterator[tuple[Broker, dict[str, str]]]:
    (tmp_path / "log").mkdir()
    (tmp_path / "broker").mkdir()
    with configured(tmp_path / "broker") as broker:
        environment = clean_environment(
            **bare_database.environment, SLUICE_LOG_URL=f"sqlite:///{tmp_path / 'log'}", SLUICE_SECRET_KEYS=str(RING)
        )
        sluice(environment, "migrate")
        sluice(environment, "ca", "init")
        sluice(environment, "ca", "export", "--output", str(broker.roots))
        sluice(environment, "ca", "server-certificate", "--name", "127.0.0.1", "--output", str(broker.directory))
        yield broker, environment | broker.environment(bare_database)


def published(broker: Broker, device: str, token: str) -> bool:
    return broker.publish(device, token, f"v1/readings/any/{device}", b"1")


def test_a_broker_is_begun_with_a_file_and_kept_from_then_on(installed: tuple[Broker, dict[str, str]]) -> None:
    broker, environment = installed
    demo = json.loads(sluice(environment, "seed", "--json"))
    device, token = demo["device_id"], demo["ingest_token"]
    sluice(environment, "broker", "seed", str(broker.clients_file))
    assert broker.clients_file.stat().st_mode & 0o777 == 0o600
    assert token not in broker.clients_file.read_text()
    broker.start()
    assert published(broker, device, token)
    assert not published(broker, device, token[:-1])
    with role(environment, "broker", "keep") as keeper:
        newer = sluice(environment, "token", "device", device).split()[-1]
        eventually("the newer one is good", lambda: published(broker, device, newer), 30)
        assert not published(broker, device, token)
        assert not any(newer in json.dumps(line) for line in keeper.lines)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("SLUICE_BROKER_URL", "", "SLUICE_BROKER_URL"),
        ("SLUICE_BROKER_URL", "mqtt://somebody:x@127.0.0.1:1", "sluice-broker"),
        ("SLUICE_BROKER_PID_FILE", "", "SLUICE_BROKER_PID_FILE"),
        ("SLUICE_BROKER_CLIENTS_MAX", "1", "SLUICE_BROKER_CLIENTS_MAX"),
    ],
)
def test_what_cannot_be_is_refused(
    installed: tuple[Broker, dict[str, str]], variable: str, value: str, named: str
) -> None:
    broker, environment = installed
    said = refusal(environment | {variable: value}, "broker", "seed", str(broker.clients_file))
    assert named in said
    assert not broker.clients_file.exists()
