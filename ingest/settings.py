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
    overload_lag_ms: int = setting(
        1_000, unit="ms", least=0, most=60_000,
        why="An event loop as late as this, twice in a row: new requests get 503 until it has caught up; 0: never.",
    )  # fmt: skip
    trusted_proxies: tuple[str, ...] = setting(
        (),
        why="Addresses and networks (CIDR) of proxies whose X-Forwarded-For or Forwarded tells who is calling;"
        " from others it could be made up. They must drop the one of the two that they do not set.",
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
    idempotency_entries_max: int = setting(
        10_000,
        unit="requests",
        least=0,
        why="Named requests whose answers a process remembers, up to 4 kB each; landing knows all of them.",
    )
    log_retention_share: float = setting(
        0.8, unit="of its time", least=0.1, most=1.0,
        why="When what has not landed has been in the log for so much of its retention, readings are refused (503).",
    )  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """How quarantined readings that somebody wants replayed go back onto the log, beside live traffic."""

    replay_rows_per_s: float = setting(
        500.0, unit="rows/s", least=0.1, why="Per process: a million replayed rows are no burst for anybody else."
    )
    replay_rows_max: int = setting(
        100, unit="rows", least=1, most=10_000, why="Claimed at once; they wait if this process dies with them."
    )
    replay_turn_rows: int = setting(
        50, unit="rows", least=1, most=10_000, why="Of those, from one organisation: the others have their turn."
    )
    replay_lease_s: float = setting(
        60.0, unit="s", least=0.1, why="A claimed row that was not put on the log by then is claimed again."
    )
    replay_landing_s: float = setting(
        3_600.0, unit="s", least=1,
        why="A row on the log that has not landed by then is put there again; landing takes only one of them.",
    )  # fmt: skip
    replay_poll_s: float = setting(
        5.0, unit="s", least=0.05, why="How soon a request for a replay is felt when its notification was not heard."
    )


@dataclass(frozen=True, kw_only=True)
class SpoolSettings:
    """Where acknowledged records wait while the log cannot be reached, and how many may."""

    spool: bool = setting(
        True, why="Off: while the log cannot be reached, requests are answered 503 and devices have to send again."
    )
    spool_dir: str = setting(
        "", why="A directory on a local disk that outlives the process; unset: `spool` in SLUICE_DATA_DIR."
    )
    spool_bytes_max: int = setting(
        2_000_000_000, unit="bytes", least=100_000,
        why="Records waiting, per process; beyond it 503, nothing is discarded. 2 GB: some 10 million requests.",
    )  # fmt: skip
    spool_age_max_s: float = setting(
        259_200.0, unit="s", least=1,
        why="Beyond it 503: nobody has noticed for three days. Idempotency keys are kept this much longer.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PacedSettings:
    """The paced lane: backlogs over their limits that ask to be let in at the permitted rate (respond-async)."""

    paced: bool = setting(True, why="Off: `Prefer: respond-async` is ignored, and what is over a limit gets 429.")
    paced_share: float = setting(
        0.9, unit="share", least=0.01, most=1,
        why="Of a limit, how much backlogs may use: of a minute's, of what has passed of the minute. The rest is left"
        " to live requests.",
    )  # fmt: skip
    paced_bytes_max: int = setting(
        500_000_000, unit="bytes", least=100_000,
        why="Records waiting, per process, in `paced` beside the spool; beyond it 429. A million small requests.",
    )  # fmt: skip
    paced_organisation_share: float = setting(
        0.5, unit="share", least=0.01, most=1,
        why="Of the lane's bytes and slots, how much one organisation may take: the others have room left.",
    )  # fmt: skip
    paced_sender_bytes_max: int = setting(
        20_000_000, unit="bytes", least=10_000,
        why="Of one device, or one site's gateways: a day of readings in 1-second steps of ten channels.",
    )  # fmt: skip
    paced_age_max_s: float = setting(
        86_400.0, unit="s", least=1,
        why="A backlog that would take longer at its rate, or has waited longer, gets 429: it needs a higher limit.",
    )  # fmt: skip
    paced_slots_max: int = setting(
        512, unit="senders", least=1, most=1_024,
        why="With a backlog at once, per process, spread over the log's partitions; beyond it 429.",
    )  # fmt: skip
