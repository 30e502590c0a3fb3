"""Settings of the workers behind the log. Left out: the log's own (`runtime.log.settings`) and the database's."""

from dataclasses import dataclass

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class LandingSettings:
    """How much lands at once, how a partition is held, and how long anything is waited for."""

    landing_batch_rows_max: int = setting(
        100_000,
        unit="readings",
        least=1,
        most=5_000_000,
        why="Of one transaction, 0.1 s of COPY; larger ones gain nothing measurable and hold partitions longer.",
    )
    landing_batch_records_max: int = setting(
        50_000, unit="records", least=1, why="Of one transaction; a decoded record of one reading takes about 1 kB."
    )
    landing_batch_bytes_max: int = setting(
        32_000_000, unit="bytes", least=1_000, why="Of one transaction, as it stands in the log; two are in memory."
    )
    landing_batch_wait_ms: float = setting(
        50.0,
        unit="ms",
        least=0,
        most=1_000,
        why="Least time between the starts of two transactions: a trickle does not become one commit a record. "
        "What arrives after a longer silence goes at once.",
    )
    landing_read_bytes_max: int = setting(
        1_000_000,
        unit="bytes",
        least=1_000,
        why="Of one read of the log, planned in one go: about 20 ms of work beside the transaction that runs.",
    )
    landing_lease_ttl_s: float = setting(
        5.0, unit="s", least=0.5, most=300, why="After so long without a renewal another worker takes the partition."
    )
    landing_lease_renew_s: float = setting(
        1.0, unit="s", least=0.05, most=60, why="Several renewals may fail before the lease ends."
    )
    landing_terminate_timeout_ms: int = setting(
        5_000, unit="ms", least=100, why="How long the session of a partition's previous holder may take to end."
    )
    landing_transaction_timeout_s: float = setting(
        60.0,
        unit="s",
        least=1,
        why="Of one whole transaction, on both sides; far beyond the largest batch in health.",
    )
    landing_idle_timeout_s: float = setting(
        10.0,
        unit="s",
        least=1,
        why="The database ends a transaction whose worker is silent for so long; a successor does not wait for it.",
    )
    landing_lock_timeout_s: float = setting(
        10.0, unit="s", least=0.1, why="Nothing that landing waits for is held longer in health."
    )
    landing_stop_timeout_s: float = setting(
        20.0, unit="s", least=0, why="On a stop, what the running transaction may take before it is rolled back."
    )
    landing_retry_min_ms: float = setting(
        50.0, unit="ms", least=1, why="First wait after a failure; doubled each time, with jitter."
    )
    landing_retry_max_ms: float = setting(
        5_000.0, unit="ms", least=1, why="Longest wait: a database that is back is noticed within it."
    )
    landing_future_s: float = setting(
        600.0,
        unit="s",
        least=0,
        why="A reading further ahead of its receive time takes the careful path and moves no high-water, so that one "
        "wrong clock does not make every other series look late.",
    )
    landing_move_max_ms: float = setting(
        100.0,
        unit="ms",
        least=0,
        most=60_000,
        why="How far a reading with a time of our making may move on, µs by µs, where others of its series stand: "
        "ten requests of 10,000 such readings at once fit in. Beyond it, it is quarantined as a conflict.",
    )
    landing_nonce_memory_s: float = setting(
        3_600.0,
        unit="s",
        least=60,
        most=86_400,
        why="For how long a plant's nonce is remembered, a row each: at least twice SLUICE_MQTT_REPLAY_WINDOW_S, and "
        "longer than a broker takes to send something again. The longer, the likelier nonces of 8 digits come back.",
    )
    landing_series_per_device_max: int = setting(
        1_000, unit="series", least=1, why="A device beyond it invents names; its further ones are quarantined."
    )
    landing_series_cache_max: int = setting(
        2_000_000,
        unit="series",
        least=1_000,
        why="Kept in memory by one worker, about 0.2 kB each. Fewer than report makes landing look them up again.",
    )
    landing_registry_refresh_s: float = setting(
        30.0, unit="s", least=1, why="How soon a changed retention or series limit of an organisation is noticed."
    )
    landing_refusal_ttl_s: float = setting(
        10.0, unit="s", least=0, why="How long a refused series is not looked up again: a flood costs no queries."
    )
    landing_undecodable_max: int = setting(
        20,
        unit="records",
        least=0,
        why="Within the window below; more mean a bad deploy: the worker stops instead of emptying the log into "
        "quarantine.",
    )
    landing_rejected_organisations_max: int = setting(
        3,
        unit="organisations",
        least=0,
        why="Of so many, records may be quarantined whole because the database refused them, within the same window; "
        "more mean that landing and the schema do not fit.",
    )
    landing_undecodable_window_s: float = setting(
        3_600.0, unit="s", least=1, why="Long enough that a worker which is started again remembers."
    )
    landing_quarantine_payload_max: int = setting(
        65_536, unit="bytes", least=256, why="Of one quarantined item; the rest of a longer one is cut off."
    )
    landing_lag_period_s: float = setting(
        5.0, unit="s", least=0.1, why="How often the distance to the end of the log is measured."
    )


@dataclass(frozen=True, kw_only=True)
class QuarantineSettings:
    """How much is held in quarantine and for how long."""

    quarantine_held_rows_max: int = setting(
        100_000,
        unit="rows",
        least=0,
        why="Of one organisation, about 0.5 kB each; its oldest beyond go as expired, whatever others hold.",
    )
    quarantine_held_days_max: int = setting(
        90, unit="days", least=1, most=36_500, why="What nobody has looked at for a quarter is not missed."
    )
    tray_held_rows_max: int = setting(
        10_000,
        unit="rows",
        least=0,
        why="Of one unassigned device: a week of a reading a minute. Its oldest beyond go as expired.",
    )
    tray_site_rows_max: int = setting(
        50_000, unit="rows", least=0, why="Of all unassigned devices of a site: half of an organisation's."
    )
    tray_held_days_max: int = setting(
        30, unit="days", least=1, most=36_500, why="What nobody has claimed for a month is forgotten."
    )
    books_memory_days: int = setting(
        30,
        unit="days",
        least=1,
        most=36_500,
        why="How long it is remembered what left the quarantine, which requests were named, and which readings made "
        "way: longer than a record can still come, or be asked about by `sluice verify` (a day, the spool's age and "
        "the log's retention).",
    )
    quarantine_check_s: float = setting(
        60.0, unit="s", least=0.05, why="How often the bounds are looked at, by each worker; one at a time does it."
    )
    quarantine_step_rows: int = setting(
        1_000, unit="rows", least=1, most=100_000, why="Of one transaction, which holds their rows of the books."
    )


@dataclass(frozen=True, kw_only=True)
class LedgerSettings:
    """How the books are shown."""

    ledger_check_s: float = setting(
        30.0, unit="s", least=0.05, why="How often the ledger of the last day is summed up for the metrics."
    )


@dataclass(frozen=True, kw_only=True)
class PresenceSettings:
    """How it is kept which devices are heard."""

    presence_flush_s: float = setting(
        5.0,
        unit="s",
        least=0.05,
        most=30,
        why="How often it is written who was heard: well within the minute after which silence counts.",
    )
    presence_steady_s: float = setting(
        15.0,
        unit="s",
        least=0,
        most=30,
        why="The same of a device that was written lately and goes on sending: a row of it costs PostgreSQL 25 µs.",
    )
    presence_step_rows: int = setting(
        2_000, unit="rows", least=1, most=100_000, why="Of one statement, which holds their locks for milliseconds."
    )
    presence_devices_max: int = setting(
        1_000_000,
        unit="devices",
        least=1,
        why="Noted while the database is away, about 0.2 kB each; beyond it the first noted are forgotten.",
    )
