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
    api_quarantine_rows_max: int = setting(
        500, unit="rows", least=1, most=10_000, why="Of one answer about the quarantine, about 8 kB each at most."
    )
    api_quarantine_rows_default: int = setting(
        100, unit="rows", least=1, most=10_000, why="Of an answer whose request names no limit."
    )
    api_quarantine_changes_max: int = setting(
        1_000,
        unit="rows",
        least=1,
        most=100_000,
        why="That one request replays or discards; it is repeated for the rest.",
    )
    api_quarantine_payload_bytes_max: int = setting(
        8_000, unit="bytes", least=100, most=65_536, why="Of an edited payload: the longest text a reading may have."
    )
