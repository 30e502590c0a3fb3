"""Log URLs: what they mean, and that a bad one says so without giving the password away."""

import pytest

from runtime.errors import ConfigurationError
from runtime.log import engine_of
from runtime.log.kafka_address import parse_address


def test_the_engine_is_the_scheme() -> None:
    assert engine_of("kafka://a") == "kafka"
    assert engine_of("kafkas://user:secret@a") == "kafka"
    assert engine_of("sqlite:///here") == "sqlite"
    with pytest.raises(ConfigurationError, match="SLUICE_LOG_URL"):
        engine_of("postgres://here")


def test_brokers_with_and_without_a_port() -> None:
    address = parse_address("kafka://one:9000,two,[::1]:9093")
    assert address.hosts == (("one", 9000), ("two", 9092), ("::1", 9093))
    assert address.access == {"security_protocol": "PLAINTEXT"}


def test_tls_alone_and_with_a_login() -> None:
    assert parse_address("kafkas://one").access["security_protocol"] == "SSL"
    access = parse_address("kafkas://us%40er:p%2Fw:x@one:9/?mechanism=PLAIN").access
    assert access["security_protocol"] == "SASL_SSL"
    assert access["sasl_mechanism"] == "PLAIN"
    assert (access["sasl_plain_username"], access["sasl_plain_password"]) == ("us@er", "p/w:x")
    assert parse_address("kafkas://user:pw@one").access["sasl_mechanism"] == "SCRAM-SHA-512"


@pytest.mark.parametrize(
    "url",
    [
        "kafka://",
        "kafka://one,,two",
        "kafka://one:port",
        "kafka://one/topic",
        "kafka://user:geheim@one",
        "kafka://one?cafile=x",
        "kafkas://user@one",
        "kafkas://:geheim@one",
        "kafkas://user:geheim@one?mechanism=GSSAPI",
        "kafkas://user:geheim@one?colour=blue",
        "kafkas://user:geheim@one?cafile=/not/there",
    ],
)
def test_a_bad_url_names_the_setting_and_keeps_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_LOG_URL") as refused:
        parse_address(url)
    assert "geheim" not in str(refused.value)
