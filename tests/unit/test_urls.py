"""URLs of settings: a bad one is told before anything is opened, by the setting's name and without its password."""

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.settings import GROUPS
from runtime.errors import ConfigurationError
from runtime.settings import Settings

LOG, DATABASE, MQTT = "SLUICE_LOG_URL", "SLUICE_DATABASE_URL", "SLUICE_MQTT_URL"

GOOD = [
    (LOG, "kafka://one"),
    (LOG, "kafka://one:9000,two,[::1]:9093/"),
    (LOG, "kafkas://us%40er:p%2Fw:x@one:9/?mechanism=PLAIN&cafile=/not/opened/yet"),
    (LOG, "sqlite:///here and there"),
    (LOG, "sqlite:////absolute"),
    (DATABASE, "postgresql://user:pw@host:5432/database?sslmode=require"),
    (DATABASE, "postgres://one,two:5433,[::1]:5434/database"),
    (DATABASE, "postgresql://sluice@/sluice?host=/run/a%20socket&port=5432"),
    (MQTT, "mqtts://user:pw@broker:8883"),
    (MQTT, "mqtt://[::1]"),
]

BAD = [
    (LOG, "geheim"),
    (LOG, "user:geheim@one:9092"),
    (LOG, "rabbit://user:geheim@one"),
    (LOG, "kafka://"),
    (LOG, "kafka://one,,two"),
    (LOG, "kafka://one:port"),
    (LOG, "kafka://one:99999"),
    (LOG, "kafka://::1:9092"),
    (LOG, "kafkas://user:ge/heim@one"),
    (LOG, "kafkas://user:geheim?heim=geheim@one"),
    (LOG, "kafkas://user:geheim#heim@one"),
    (LOG, "kafkas://user:geheim@heim@one"),
    (LOG, "kafkas://user:geheim"),
    (LOG, "kafkas://user:geheim@[::1"),
    (LOG, "kafkas://user:geheim@one?colour=blue"),
    (LOG, "kafkas://user:gehe im@one"),
    (LOG, "kafkas://user:ge\nheim@one"),
    (LOG, "kafkas://user:geheim\u2100@one"),
    (LOG, "sqlite://relative"),
    (LOG, "sqlite:///"),
    ("SLUICE_CLOSING_LOG_URL", "mysql://user:geheim@one"),
    (DATABASE, "mysql://user:geheim@one/database"),
    (DATABASE, "postgresql://user:geheim@one:port/database"),
    (DATABASE, "postgresql://user:geheim@heim@one/database"),
    (DATABASE, "postgresql://user:ge/heim@one/database"),
    (DATABASE, "postgresql://user:geheim@one/database?geheim"),
    (DATABASE, "postgresql://user:geheim@one/database#geheim"),
    ("SLUICE_DATABASE_OWNER_URL", "one:5432/geheim"),
    (MQTT, "http://user:geheim@broker"),
    (MQTT, "mqtt://user:geheim@"),
    (MQTT, "mqtt://one,two"),
    (MQTT, "mqtt://user:geheim@broker?geheim"),
]


def told(error: BaseException | None) -> Iterator[str]:
    """What a log would show of it: its own words, and those of what it came from."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize(("variable", "url"), GOOD)
def test_urls_that_are_fine(variable: str, url: str) -> None:
    loaded = Settings.load(GROUPS, {variable: url})
    assert {one.variable: one.origin for one in loaded.listing}[variable] == "environment"


@pytest.mark.parametrize(("variable", "url"), BAD)
def test_a_bad_url_names_its_setting_and_keeps_its_password(variable: str, url: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{variable} ") as refused:
        Settings.load(GROUPS, {variable: url})
    assert not any("heim" in text for text in told(refused.value))


@pytest.mark.parametrize("command", ["settings", "ingest", "worker", "api", "up", "migrate"])
def test_every_command_refuses_a_bad_url_at_once(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATABASE, "postgresql://user:geheim@one:port/database")
    refused = CliRunner().invoke(main, [command])
    assert refused.exit_code == 2
    assert f"{DATABASE} names no port" in refused.output
    assert "geheim" not in refused.output
