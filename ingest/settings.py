"""Settings of the way in: listeners, bounds of a request, how long credentials are believed."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class IngestSettings:
    """What one request may cost, and how long anything is waited for."""

    http_listen: str = setting("127.0.0.1:8080", why="host:port of the ingest face")
    http_processes: int = setting(1, unit="processes", least=1, most=256, why="One event loop uses one core.")
    http_body_timeout_s: float = setting(
        30.0, unit="s", least=0.1, why="For the whole body: 4 MB over a slow mobile link."
    )
    http_in_flight_bytes_max: int = setting(
        256_000_000, unit="bytes", least=1_000_000, why="Bodies being worked on, per process; beyond it 503."
    )
    body_bytes_max: int = setting(4_000_000, unit="bytes", least=1_000, why="Of a body, packed and unpacked alike.")
    readings_per_request_max: int = setting(10_000, unit="readings", least=1, why="Bounds the work of one request.")
    reading_future_s: float = setting(
        600.0, unit="s", least=0, why="How far a device's clock may run ahead before it is not believed."
    )
    reading_year_floor: int = setting(
        2015, unit="year", least=1970, most=2100,
        why="A time before it is a clock that was never set (1970, 2000, uptime), not old data.",
    )  # fmt: skip
    wait_stored_s: float = setting(
        10.0, unit="s", least=0, most=120, why="Longest hold of a `Prefer: wait=stored`; devices rarely wait longer."
    )
    receipt_ttl_s: float = setting(7 * 86_400.0, unit="s", least=60, why="How long a receipt can be asked about.")
    credential_cache_entries_max: int = setting(
        200_000, unit="entries", least=100, why="Known credentials kept in memory; about 0.4 kB each."
    )
    credential_unknown_entries_max: int = setting(
        10_000, unit="entries", least=10, why="Unknown tokens remembered, so that guessing costs no look-ups."
    )
    credential_grace_s: float = setting(
        86_400.0, unit="s", least=0,
        why="How long a cached credential is honoured while the database is away: a reading kept beats one lost.",
    )  # fmt: skip
    credential_refresh_s: float = setting(
        300.0, unit="s", least=1, why="A cached credential is read again after this, whether or not it was changed."
    )
