"""Settings of whoever keeps the broker's identities."""

from dataclasses import dataclass

from runtime.mqtt import check_mqtt_url
from runtime.settings import setting

KEEPS = ("all", "devices", "sites")


def _check_keeps(text: str) -> None:
    if text not in KEEPS:
        raise ValueError(f"is none of {', '.join(KEEPS)}")


@dataclass(frozen=True, kw_only=True)
class BrokerSettings:
    """Which broker's, and with what."""

    broker_url: str = setting(
        "",
        secret=True,
        check=check_mqtt_url,
        why="mqtt://sluice-broker:password@127.0.0.1:1883 of the broker whose identities are kept here: its listener "
        "for ourselves. `sluice broker seed` lets that user in.",
    )
    broker_keeps: str = setting(
        "all",
        check=_check_keeps,
        why="Whom this broker knows: all, or only devices, or only sites, whose devices name themselves and need a "
        "broker of their own, where they may have any client identifier.",
    )
    broker_bridge_password: str = setting(
        "",
        secret=True,
        why="Of the user sluice-bridge, with which SLUICE_MQTT_URL of the bridges logs in; empty: none.",
    )
    broker_commands_password: str = setting(
        "",
        secret=True,
        why="Of the user sluice-commands, with which SLUICE_MQTT_URL, or SLUICE_COMMANDS_MQTT_URL, of workers does; "
        "empty: none.",
    )
    broker_crl_file: str = setting(
        "",
        why="Where the broker reads its list of revoked certificates (`crlfile`); empty: it takes no certificates.",
    )
    broker_pid_file: str = setting(
        "",
        why="The broker's own (`pid_file`): it is sent SIGHUP there, so that it reads a new list. With certificates "
        "this runs on the broker's host, as its user.",
    )
    broker_clients_max: int = setting(
        20_000,
        unit="clients",
        least=1,
        why="With passwords at the broker, which writes all of them anew for each that changes: 0.2 s at so many, in "
        "its only thread. Further ones are not let in, and counted.",
    )
    broker_batch_max: int = setting(
        10,
        unit="commands",
        least=1,
        most=1_000,
        why="In one message: the broker does nothing else meanwhile, 0.4 s with 5,000 clients.",
    )
    broker_check_s: float = setting(
        300.0, unit="s", least=0.1, why="How often everything is compared; changes are told of, and applied at once."
    )
    broker_crl_check_s: float = setting(
        30.0, unit="s", least=0.1, why="How often it is looked whether a list is due to be made anew."
    )
    broker_retry_s: float = setting(
        1.0,
        unit="s",
        least=0.05,
        why="After which it is tried again when database or broker is away, or another is at it.",
    )
    broker_timeout_s: float = setting(
        30.0,
        unit="s",
        least=0.1,
        most=300,
        why="For any answer of the broker: a batch with the most clients takes 2 s.",
    )
