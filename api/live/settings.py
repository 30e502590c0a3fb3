"""Settings of streams of readings."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class LiveSettings:
    """How many may listen, how closely the log is followed, and how far behind a listener may be."""

    live_listeners_max: int = setting(
        2_000, unit="streams", least=1, most=100_000, why="Per process; each is a connection and about 60 kB."
    )
    live_listeners_per_organisation_max: int = setting(
        1_000, unit="streams", least=1, most=100_000, why="Per process: none takes all places of the others."
    )
    live_devices_max: int = setting(
        5_000, unit="devices", least=1, most=100_000, why="That one stream may be about: a site may have many."
    )
    live_watched_max: int = setting(
        200_000, unit="devices", least=1, why="Of all selections together, per process: about 200 bytes each."
    )
    live_poll_ms: int = setting(
        100, unit="ms", least=10, most=10_000, why="How often what has landed is asked for: one small query."
    )
    live_check_s: float = setting(
        3.0, unit="s", least=0.1, most=60, why="How often rights and selections are looked at anew."
    )
    live_heartbeat_s: float = setting(
        15.0, unit="s", least=0.1, most=300, why="Proxies cut connections on which nothing comes for 30 s or more."
    )
    live_queue_bytes_max: int = setting(
        1_000_000, unit="bytes", least=1_000, why="Waiting for one listener; one that is slower for long is let go."
    )
    live_queues_bytes_max: int = setting(
        64_000_000, unit="bytes", least=1_000, why="Waiting for all listeners of a process together."
    )
    live_resume_records_max: int = setting(
        200_000, unit="records", least=0, why="A listener further behind is told of a gap: a query is cheaper."
    )
