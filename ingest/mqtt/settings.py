"""Settings of the bridge: what may be open at a time, how sessions are held and how long is waited."""

from dataclasses import dataclass

from ingest.mqtt.packets import VERSIONS
from runtime.settings import setting


def _check_version(version: str) -> None:
    if version not in VERSIONS:
        raise ValueError(f"is none of {', '.join(VERSIONS)}")


def _check_name(name: str) -> None:
    if not name.isascii() or not name.isprintable() or not 1 <= len(name) <= 64:
        raise ValueError("is 1 to 64 printable ASCII characters")


@dataclass(frozen=True, kw_only=True)
class BridgeSettings:
    """What a bridge between a broker and the log needs to know; which broker, `runtime.mqtt` does."""

    mqtt_version: str = setting("5", check=_check_version, why="5, or 3.1.1 for a broker that knows no better.")
    mqtt_broker: str = setting(
        "main",
        check=_check_name,
        why="Names the broker's sessions in the database: several brokers have sessions and bridges of their own.",
    )
    mqtt_in_flight_max: int = setting(
        2_000, unit="messages", least=1, most=16_000,
        why="Taken and not acknowledged, a session: 12,000 a second that wait 150 ms for the log. MQTT 5 tells the"
        " broker (Receive Maximum); for 3.1.1 it has a setting of its own.",
    )  # fmt: skip
    mqtt_in_flight_bytes_max: int = setting(
        16_000_000, unit="bytes", least=10_000,
        why="Of their payloads, a session; beyond it nothing is read. A quarter of the log's queue.",
    )  # fmt: skip
    mqtt_message_bytes_max: int = setting(
        262_144, unit="bytes", least=1_000, most=4_000_000,
        why="Of a payload; a larger one is quarantined with its beginning. The bound that the topics have elsewhere.",
    )  # fmt: skip
    mqtt_held_max: int = setting(
        500, unit="messages", least=0,
        why="Of those in flight, a process: how many may wait for a limit. Beyond it, they are quarantined as"
        " rate_limited, of devices with more than an even share of it, so that a wild one stops no others.",
    )  # fmt: skip
    mqtt_limit_wait_s: float = setting(
        60.0, unit="s", least=0, most=3_600,
        why="How long a message may wait for its device's limits, a whole window; then it is quarantined.",
    )  # fmt: skip
    mqtt_replay_window_s: float = setting(
        300.0, unit="s", least=1, most=86_400,
        why="How far a plant's publish time may be from its arrival: as clocks are off and networks slow, and short"
        " for who repeats what he overheard. Landing remembers nonces for longer (SLUICE_LANDING_NONCE_MEMORY_S).",
    )  # fmt: skip
    mqtt_keep_alive_s: int = setting(
        30, unit="s", least=2, most=3_600, why="After one and a half of it the broker takes a silent bridge for gone."
    )
    mqtt_session_expiry_s: int = setting(
        2**32 - 1, unit="s", least=60, most=2**32 - 1,
        why="How long the broker keeps a session without a bridge; the default is MQTT 5's `never`. 3.1.1 has none.",
    )  # fmt: skip
    mqtt_timeout_s: float = setting(
        10.0,
        unit="s",
        least=0.1,
        most=300,
        why="For any answer of the broker; one that hangs is left, and tried again.",
    )
    mqtt_retry_min_ms: float = setting(
        100.0, unit="ms", least=1, why="First wait after a connection broke; doubled each time, with jitter."
    )
    mqtt_retry_max_ms: float = setting(
        5_000.0, unit="ms", least=1, why="Longest such wait: a broker that is back is noticed within it."
    )
    mqtt_lease_ttl_s: float = setting(
        10.0, unit="s", least=0.5, most=300, why="After so long without a renewal another bridge takes the session."
    )
    mqtt_lease_renew_s: float = setting(
        2.0, unit="s", least=0.05, most=60, why="Several renewals may fail before the lease ends."
    )
    mqtt_stop_timeout_s: float = setting(
        8.0, unit="s", least=0, why="On a stop, what the messages in flight may take until they are acknowledged."
    )
    mqtt_events_batch_max: int = setting(
        500, unit="messages", least=1, most=10_000,
        why="Answers, alarms and reports of devices that are kept in one transaction: tens of milliseconds.",
    )  # fmt: skip
    mqtt_presence_flush_s: float = setting(
        1.0, unit="s", least=0.05, most=30, why="How often it is written which devices their broker says are there."
    )
    mqtt_presence_devices_max: int = setting(
        100_000, unit="devices", least=1,
        why="Noted while the database is away, about 0.2 kB each; beyond it the first noted are forgotten.",
    )  # fmt: skip
    mqtt_topics_cache_max: int = setting(
        200_000, unit="topics", least=100, why="Topics that are known, about 0.3 kB each: one or two a device."
    )
    mqtt_tray_names_max: int = setting(
        500, unit="names", least=0, most=100_000,
        why="Unassigned devices that a site's tray may show at a time; readings of more names are not kept.",
    )  # fmt: skip
