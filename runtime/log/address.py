"""Log URLs: which engine one names, and whether it can be one at all.

Left out: what Kafka's say about brokers and how to be let in (`kafka_address`).
"""

from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from runtime.errors import ConfigurationError
from runtime.log.kafka_address import OPTIONS
from runtime.urls import check_query, check_server, split_url

Engine = Literal["kafka", "sqlite"]

ENGINES: Final[dict[str, Engine]] = {"kafka": "kafka", "kafkas": "kafka", "sqlite": "sqlite"}


def engine_of(url: str) -> Engine:
    """Raises `ConfigurationError` for a URL that names none."""
    scheme = urlsplit(url).scheme
    if scheme not in ENGINES:
        raise ConfigurationError(f"SLUICE_LOG_URL: {scheme!r} is none of {', '.join(ENGINES)}")
    return ENGINES[scheme]


def directory_of(url: str) -> Path:
    """Of a SQLite log: `sqlite:///path` is relative to the working directory, `sqlite:////path` is not.

    Raises `ValueError`.
    """
    parts = urlsplit(url)
    directory = unquote(parts.path)[1:]
    if parts.netloc or parts.query or parts.fragment or not directory:
        raise ValueError("is not sqlite:///directory, nor sqlite:////directory for an absolute one")
    return Path(directory).absolute()


def check_log_url(url: str) -> None:
    """Raises `ValueError` for what is no URL of a log, without the password in it; opens nothing."""
    parts = split_url(url, tuple(ENGINES))
    if ENGINES[parts.scheme] == "sqlite":
        directory_of(url)
        return
    check_server(parts, several=True)
    check_query(parts, OPTIONS)
