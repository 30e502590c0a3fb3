"""What certificates need beside signing: where devices are told that the broker is, and tokens that show nowhere."""

import pytest

from api.settings import ApiSettings, broker_address
from runtime.errors import ConfigurationError
from runtime.logging import redact
from runtime.secrets import REGISTRATION_PREFIX, make_token, without_secrets
from runtime.settings import Settings


@pytest.mark.parametrize(
    ("mqtt", "public", "expected"),
    [
        ("mqtts://broker.example:18883", "https://api.example", ("broker.example", 18883)),
        ("mqtts://broker.example", "", ("broker.example", 8883)),
        ("mqtt://10.0.0.7", "", ("10.0.0.7", 1883)),
        ("mqtts://[2001:db8::1]:1", "", ("2001:db8::1", 1)),
        ("", "https://api.example:8443", ("api.example", 8883)),
        ("", "", ("localhost", 8883)),
    ],
)
def test_devices_are_told_where_the_broker_is(mqtt: str, public: str, expected: tuple[str, int]) -> None:
    assert broker_address(ApiSettings(mqtt_public_url=mqtt, public_url=public)) == expected


@pytest.mark.parametrize(
    "url", ["broker.example:8883", "https://broker.example", "mqtts://user:secret@broker.example"]
)
def test_what_devices_are_told_is_a_broker_s_address_without_a_login(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_MQTT_PUBLIC_URL") as refused:
        Settings.load([ApiSettings], {"SLUICE_MQTT_PUBLIC_URL": url})
    assert "secret" not in str(refused.value)


def test_a_registration_token_is_blotted_out() -> None:
    token = make_token(REGISTRATION_PREFIX)
    whole = f"01a1ff90-480c-72d1-8ea3-fba91af3f256.01a1ff90-480c-72d1-8ea3-fba91af3f257.{token}"
    for blotted in (without_secrets(whole), redact(whole)):
        assert token[8:] not in blotted
