"""Settings of the log, whichever engine keeps it."""

from dataclasses import dataclass

from runtime.log.address import check_log_url
from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """How appends are batched and bounded, and how long the log is waited for."""

    log_url: str = setting(
        "sqlite:///sluice-log",
        why="kafka://host:port[,host:port], kafkas://user:password@host:port (TLS, SASL; ?cafile=&certfile=&keyfile="
        "&mechanism=), or sqlite:///directory",
        secret=True,
        check=check_log_url,
    )
    log_linger_ms: float = setting(
        2.0,
        unit="ms",
        least=0,
        most=1000,
        why="Appends wait this long for company: a produce request costs far more than the records in it.",
    )
    log_batch_bytes_max: int = setting(
        1_000_000,
        unit="bytes",
        least=10_000,
        most=8_000_000,
        why="The largest batch of one partition; brokers refuse more than their message.max.bytes.",
    )
    log_queue_bytes_max: int = setting(
        64_000_000,
        unit="bytes",
        least=1_000_000,
        why="Records waiting to be durable, per process; beyond it callers are told to slow down.",
    )
    log_append_timeout_ms: int = setting(
        5_000,
        unit="ms",
        least=100,
        most=120_000,
        why="After this an append is reported as not known; devices rarely wait longer than ten seconds.",
    )
    log_fetch_bytes_max: int = setting(
        16_000_000,
        unit="bytes",
        least=100_000,
        why="How much a reader holds ahead of its caller.",
    )
    log_replication: int = setting(
        0,
        unit="copies",
        least=0,
        why="Of a Kafka topic that is made; 0 takes the brokers' default. With 1, a lost broker loses readings.",
    )
    log_keep_landed_h: float = setting(
        24.0,
        unit="h",
        least=0,
        why="How long a SQLite log keeps what has landed, for `sluice verify` to read it again, and for the database "
        "if an old copy of it is brought back. Kafka keeps all records alike.",
    )
    log_keep_landed_bytes_max: int = setting(
        1_000_000_000, unit="bytes", least=0, why="Of a SQLite log: beyond it, what landed first goes sooner."
    )
    log_retention_h: int = setting(
        168,
        unit="h",
        least=1,
        why="How long Kafka keeps a record whether it has landed or not: the longest that landing may stand still.",
    )
