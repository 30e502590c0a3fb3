"""Settings of the sending of commands. Left out: how long one may take, which the API says when it is asked for."""

from dataclasses import dataclass
from typing import Final

from runtime.mqtt import check_mqtt_url
from runtime.settings import setting

VARIABLE: Final = "SLUICE_COMMANDS_MQTT_URL"


@dataclass(frozen=True, kw_only=True)
class CommandsSettings:
    """How commands that wait are looked for and sent."""

    commands_mqtt_url: str = setting(
        "",
        secret=True,
        check=check_mqtt_url,
        why="SLUICE_MQTT_URL of whoever sends commands, where that names the bridge's user: `sluice up` is both. "
        "Empty: SLUICE_MQTT_URL.",
    )
    commands_check_s: float = setting(
        5.0,
        unit="s",
        least=0.05,
        most=60,
        why="How often it is looked which wait and whose time is over; new ones are told of, and go at once.",
    )
    commands_claim_s: float = setting(
        30.0,
        unit="s",
        least=1,
        most=3_600,
        why="After so long another worker sends what one was about to send, and did not note: longer than it takes.",
    )
    commands_batch_max: int = setting(
        100, unit="commands", least=1, most=10_000, why="Taken at a time, of as many devices; they wait in memory."
    )
    commands_timeout_s: float = setting(
        10.0, unit="s", least=0.1, most=300, why="For any answer of the broker; one that hangs is left."
    )
    commands_retry_min_ms: float = setting(
        100.0, unit="ms", least=1, why="First wait after the broker was away; doubled each time, with jitter."
    )
    commands_retry_max_ms: float = setting(
        5_000.0, unit="ms", least=1, why="Longest such wait: a broker that is back is noticed within it."
    )
