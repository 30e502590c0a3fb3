"""Settings of the way out. Left out: the database's own (`runtime.postgres`)."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """Where the API listens and what one request may cost."""

    api_listen: str = setting(
        "127.0.0.1:8081", why="host:port of the API; `sluice up` serves it on the ingest face's."
    )
    api_processes: int = setting(1, unit="processes", least=1, most=256, why="One event loop uses one core.")
    api_page_readings_max: int = setting(
        10_000, unit="readings", least=1, most=100_000, why="Of one answer; bounds its memory and time."
    )
    api_page_readings_default: int = setting(
        1_000, unit="readings", least=1, most=100_000, why="Of an answer whose request names no limit."
    )
    api_statement_timeout_ms: int = setting(
        10_000, unit="ms", least=100, why="A page takes milliseconds; whatever takes longer is given up."
    )
    api_connection_wait_ms: int = setting(
        2_000, unit="ms", least=1, why="For a session of the pool; beyond it the request is told to come back."
    )
