"""Settings of retention. Left out: how long an organisation keeps its readings, which it says itself."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class RetentionSettings:
    """How long roll-ups are kept where an organisation does not say, and how what is older goes."""

    retention_5m_days: int = setting(
        1_826,
        unit="days",
        least=0,
        most=36_600,
        why="Roll-ups of 5 minutes, 5 years; 0: for ever. Never less than the organisation's readings.",
    )
    retention_1h_days: int = setting(
        1_826,
        unit="days",
        least=0,
        most=36_600,
        why="Those of an hour; 0: for ever. Never less than those of 5 minutes.",
    )
    retention_1d_days: int = setting(
        0, unit="days", least=0, most=36_600, why="Those of a day; 0: for ever, a year of a series is 50 kB."
    )
    retention_commands_days: int = setting(
        395,
        unit="days",
        least=0,
        most=36_600,
        why="Commands that are over, 13 months as readings: a year beside the one before; 0: for ever.",
    )
    retention_check_s: float = setting(
        3_600.0, unit="s", least=0.05, why="How often it is looked what may go; the finest chunk has a week."
    )
    retention_settle_s: float = setting(
        10.0,
        unit="s",
        least=0,
        most=300,
        why="How long a pass waits for transactions that do not know a horizon yet; the next one goes on waiting.",
    )
    retention_lock_timeout_ms: int = setting(
        500,
        unit="ms",
        least=1,
        most=10_000,
        why="How long a chunk is waited for, and with it, without the extension, whoever lands: then it is let go.",
    )
    retention_lock_tries: int = setting(
        10, unit="tries", least=1, most=1_000, why="Of one chunk in one pass, with twice that time in between."
    )
    retention_step_rows: int = setting(
        5_000, unit="rows", least=1, most=100_000, why="Of one transaction: tens of milliseconds, so that none waits."
    )
    retention_pause_ms: float = setting(
        50.0, unit="ms", least=0, most=60_000, why="After a step in whole: the database has others to serve."
    )
    retention_ahead_weeks: int = setting(
        4,
        unit="weeks",
        least=0,
        most=520,
        why="Partitions made ahead where the database does not make them, so that landing need not at midnight.",
    )
    columnstore_after_days: int = setting(
        0,
        unit="days",
        least=0,
        most=36_600,
        why="Readings older than that are kept as columns; 0: none. It takes TimescaleDB's own licence; what is in "
        "columns `sluice verify` cannot read and erasing and retention delete with trouble (DECISIONS.md, 138).",
    )
